"""What the states of a trained run do, measured from a record of :func:`statescope.trace`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from statescope.analyses import memories, overload_ratio, retention, time_scales
from statescope.experiments.training.config import Config
from statescope.experiments.training.draws import Draws
from statescope.experiments.training.streams import SHORTEST, Rows, stream_of
from statescope.models import load
from statescope.tracing import trace

SEED = 2**41
"""Of the data that is traced."""

TOKENS = 2**12
"""Tokens traced."""


def state_measures(folder: Path, tokens: int = TOKENS) -> dict[str, Any]:
    """Trace a run's checkpoint over new data of its own stream, and measure its states.

    Parameters
    ----------
    folder : Path
        The checkpoint; :class:`Config` beside it.
    tokens : int
        So many are traced in sequences of the training length, and half of that in one that is longer.

    Returns
    -------
    dict
        ``inside``, read within the training length only, and ``beyond``, over four training lengths or
        more; each measure is a list of layers of lists of heads. Inside: ``retention`` of the first token
        over the whole training length, ``half_life`` (token), ``gate_variation``, ``live_memories``,
        ``load`` and ``coherence`` at the last token, ``norm_growth``, the norm there over that in the
        middle. Beyond: ``overload``, the mean ratio of the norm to the largest inside, and ``live_memories``.
    """
    config = Config.from_json(_settings(folder))
    torch.set_num_threads(1)
    with quietly():
        model = load(folder, device="cpu")
    length = config.train_length
    record = trace(model, _ids(config, length, max(1, tokens // length)), **_TRACED)
    norm = record["steps"].to_dataset()["state_norm"]
    scales = time_scales(record)
    held = memories(record).isel(token=-1)
    inside: dict[str, xr.DataArray] = {
        "retention": retention(record, 0, length - 1),
        "half_life": scales["half_life"],
        "gate_variation": scales["gate_variation"],
        **{name: held[name] for name in ("live_memories", "load", "coherence")},
        "norm_growth": norm.isel(token=-1) / norm.isel(token=length // 2),
    }
    longer = max(4 * length, tokens // 2)
    record = trace(model, _ids(config, longer, 1), **_TRACED)
    beyond: dict[str, xr.DataArray] = {
        "overload": overload_ratio(record).isel(token=slice(length, None)).mean("token"),
        "live_memories": memories(record)["live_memories"].isel(token=-1),
    }
    return {"inside": _plain(inside), "beyond": _plain(beyond), "traced": [length, longer]}


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress bar of transformers: a sweep loads hundreds of tiny checkpoints."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_TRACED: dict[str, Any] = {"backend": "chunked", "progress": False}


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return settings


def _ids(config: Config, tokens: int, rows: int) -> torch.Tensor:
    """Draw new sequences of the stream a run was trained on."""
    stream = stream_of([config], torch.device("cpu"))
    draws = Draws(torch.tensor([SEED]), torch.tensor(0))
    cut = Rows.cut(draws, rows, tokens, torch.tensor([tokens]), 0.0, SHORTEST[config.stream])
    return stream.draw(draws, cut).ids[0]


def _plain(measures: dict[str, xr.DataArray]) -> dict[str, list[list[float]]]:
    found = {}
    for name, values in measures.items():
        mean = values.mean("sequence").transpose("layer", "head").values
        found[name] = [[float(f"{v:.5g}") for v in row] for row in mean.tolist()]
    return found
