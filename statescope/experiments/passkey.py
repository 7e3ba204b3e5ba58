"""Passkey retrieval over a grid of lengths and depths.

Source: *Stuffed Mamba* (arXiv 2410.07145), section 3; prompts are made by
:class:`statescope.experiments.prompts.Haystack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from statescope import caches
from statescope.adapters import Call
from statescope.analyses.passkey import Row, tabulate
from statescope.capture import capture, mixers
from statescope.carry import Carry
from statescope.experiments.answers import Answers, place_of
from statescope.experiments.prompts import DIGITS, Haystack, Prompt
from statescope.live import digest, resolve
from statescope.scan import scan
from statescope.tokens import find_tokenizer

BATCH = {"cpu": 16, "cuda": 64}
"""Prompts asked at once, unless said otherwise, by device."""

PASS_TOKENS = {"cpu": 4096, "cuda": 2**17}
"""Tokens of one forward pass, all prompts of a batch together; on a CPU, what stays in the caches."""

Observe = Callable[[nn.Module, Tensor, Sequence[Prompt]], xr.Dataset]
"""Measures the states of a batch of prompts, (sequence, layer, head)."""


def passkey(
    model: nn.Module | str | Path,
    lengths: Iterable[int],
    depths: Iterable[float],
    trials: int,
    *,
    haystack: str | None = None,
    tokenizer: Any = None,
    store: str | Path | None = None,
    seed: int = 0,
    batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    observe: Observe | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Ask a model for passkeys hidden at every depth of prompts of every length.

    Answers are decoded greedily, our scan in the place of the model's. Memory does not grow with the
    length: prompts are read in segments.

    Parameters
    ----------
    model : transformers model, str or Path
        A live model in evaluation mode, or what :func:`statescope.load` takes.
    lengths : iterable of int
        Tokens of the whole prompt, question included.
    depths : iterable of float
        Where the needle stands: 0 at the start, 1 right before the question.
    trials : int
        Prompts of each length and depth, each with its own passkey (and stretch of the haystack).
    haystack : str, optional
        Text to hide the passkeys in. Default: the paper's filler.
    tokenizer : optional
        As for :func:`statescope.trace`. Default: the model's own.
    store : str or Path, optional
        File of answers (JSON lines, see :mod:`statescope.experiments.answers`). What it holds already is
        not asked again, be it from an interrupted call or from one with fewer lengths, depths or trials.
    seed : int
        Another seed draws other passkeys. Every prompt has its own, from this one and its place in the grid.
    batch : int, optional
        Prompts asked at once. Default: 16 on a CPU, 64 on a GPU.
    device, dtype : optional
        Where and in which floating dtype to load a model that is given by name.
    observe : callable, optional
        ``observe(model, ids, prompts)`` measures a batch, (sequence, layer, head); the table is joined with
        what it returns. Its ``repr`` says what it does. See :mod:`statescope.experiments.failure`.
    progress : bool, optional
        Show a progress bar. Default: on a terminal, for work that takes longer than a second.

    Returns
    -------
    Dataset, (length, depth, trial)
        ``correct`` (1 or 0), ``passkey``, ``answer``, ``needle_start``, ``needle_stop``, ``seed``. The
        prompt is ``Haystack(haystack, tokenizer).hide(length, depth, seed)``. What it says about the model:
        :func:`statescope.analyses.passkey.recall_length`.

    Raises
    ------
    ValueError, TypeError
        For what does not fit; names the argument. Nothing is written then.
    OSError
        If ``store`` cannot be written.
    """
    grid = Grid.of(lengths, depths, trials)
    _check_whole(batch=(1, 1 if batch is None else batch), seed=(0, seed))
    model, model_id = resolve(model, device, dtype)
    hay = Haystack(haystack, find_tokenizer(tokenizer, model))
    for length in grid.lengths:  # what does not fit is refused before anything is run or written
        for depth in grid.depths:
            hay.hide(length, depth, 0)
    header = {
        "model_id": model_id,
        "weights": digest(model)(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "train_length": getattr(model.config, "train_length", None),
        "layers": list(mixers(model)),
        "haystack": "the paper's filler" if haystack is None else "a text",
        "haystack_hash": hay.fingerprint(),
        "seed": seed,
        "measured": None if observe is None else repr(observe),
        "statescope_version": version("statescope-ssm"),
    }
    answers = Answers(store, header)
    _ask_missing(model, grid, observe, hay, answers, batch, progress)
    wanted = {cell for length in grid.lengths for cell in grid.cells(length)}
    rows = {cell: row for row in answers.rows if (cell := place_of(row)) in wanted}
    return tabulate(answers.header, list(rows.values()))


def _check_whole(**given: tuple[int, Any]) -> None:
    for name, (least, value) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; expected a whole number, {least} or more")


@dataclass(frozen=True)
class Grid:
    """Lengths, depths and trials that were found to make sense."""

    lengths: list[int]
    depths: list[float]
    trials: int

    @classmethod
    def of(cls, lengths: Iterable[int], depths: Iterable[float], trials: int) -> Grid:
        """Check, sort, and drop what is there twice."""
        sizes, places = list(lengths), list(depths)
        for name, values, kind in (
            ("lengths", sizes, int | np.integer),
            ("depths", places, int | float | np.number),
        ):
            wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kind)]
            if wrong or not values:
                raise ValueError(
                    f"{name} holds {wrong[0]!r}" if wrong else f"{name} is empty; name at least one"
                )
        _check_whole(trials=(1, trials))
        return cls(sorted({int(n) for n in sizes}), sorted({float(d) for d in places}), trials)

    def cells(self, length: int) -> Iterator[tuple[int, float, int]]:
        """Prompts of one length, by length, depth and trial."""
        return ((length, depth, trial) for depth in self.depths for trial in range(self.trials))


def _ask_missing(
    model: Any,
    grid: Grid,
    observe: Observe | None,
    hay: Haystack,
    answers: Answers,
    batch: int | None,
    progress: bool | None,
) -> None:
    done = answers.done()
    missing = {length: [c for c in grid.cells(length) if c not in done] for length in grid.lengths}
    together = batch or BATCH.get(next(model.parameters()).device.type, BATCH["cuda"])
    disable = None if progress is None else not progress
    total = sum(length * len(cells) for length, cells in missing.items())
    with tqdm(total=total, unit="tok", unit_scale=True, disable=disable, delay=1.0, leave=False) as bar:
        for length, cells in missing.items():
            for i in range(0, len(cells), together):
                some = cells[i : i + together]
                answers.add(_ask_some(model, hay, some, answers.header["seed"], observe))
                bar.update(length * len(some))


def _ask_some(
    model: Any,
    hay: Haystack,
    cells: Sequence[tuple[int, float, int]],
    seed: int,
    observe: Observe | None,
) -> list[Row]:
    seeds = [prompt_seed(seed, *cell) for cell in cells]
    prompts = [hay.hide(length, depth, s) for (length, depth, _), s in zip(cells, seeds, strict=True)]
    ids = torch.from_numpy(np.stack([p.ids for p in prompts]))
    said = ask(model, prompts, hay)
    measured = observe(model, ids, prompts) if observe else None
    rows: list[Row] = []
    for i, (cell, prompt) in enumerate(zip(cells, prompts, strict=True)):
        row: Row = dict(zip(("length", "depth", "trial"), cell, strict=True))
        row |= {"seed": seeds[i], "passkey": prompt.passkey, "answer": said[i]}
        row |= {"needle_start": prompt.needle_start, "needle_stop": prompt.needle_stop}
        if measured is not None:
            row["measures"] = _plain(measured.isel(sequence=i))
        rows.append(row)
    return rows


def prompt_seed(seed: int, length: int, depth: float, trial: int) -> int:
    """Seed of one prompt: the same in every grid that holds it."""
    bits = int(np.float64(depth).view(np.uint64))
    return int(np.random.SeedSequence([seed, length, bits, trial]).generate_state(1)[0])


def ask(model: nn.Module, prompts: Sequence[Prompt], hay: Haystack) -> list[str]:
    """Ask a model for the passkey of every prompt; all prompts are of one length."""
    ids = torch.from_numpy(np.stack([p.ids for p in prompts]))
    return [hay.answer(row) for row in answer(model, ids, DIGITS + 1).tolist()]


def answer(model: nn.Module, ids: Tensor, new_tokens: int, segment: int | None = None) -> Tensor:
    """Continue a batch of token ids greedily, our scan in the place of the model's: it is the faster one.

    Parameters
    ----------
    model : nn.Module
        A causal language model with a recurrent cache.
    ids : Tensor, (batch, time)
        Prompts of one length.
    new_tokens : int
        How many tokens to add.
    segment : int, optional
        Tokens of one forward pass, of each prompt. Default: :data:`PASS_TOKENS` for the whole batch.

    Returns
    -------
    Tensor, (batch, new_tokens)
    """
    device = next(model.parameters()).device
    segment = segment or max(64, PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"]) // len(ids))
    cache = Carry.fresh(model).cache
    fed, position = ids.to(device), 0
    chosen: list[Tensor] = []
    with torch.no_grad(), capture(model, our_scan):
        while len(chosen) < new_tokens:
            for part in segments(fed, segment):
                inputs = caches.inputs(model, cache, position, part) | caches.only_last(model)
                logits = model(part, **inputs).logits
                position += part.shape[1]
            fed = logits[:, -1:].argmax(-1)
            chosen.append(fed[:, 0])
    return torch.stack(chosen, 1).cpu()


def segments(ids: Tensor, segment: int) -> list[Tensor]:
    """Cut token ids, (batch, time); a single token left over is read with those before it, as they are."""
    parts = list(ids.split(segment, 1))
    if len(parts) > 1 and parts[-1].shape[1] == 1:
        parts[-2:] = [torch.cat(parts[-2:], 1)]
    return parts


def our_scan(layer: int, call: Call, run_own: Callable[[], Any]) -> Any:
    """Answer a model's call of its scan with ours."""
    return call.answer(scan(call.recurrence, measure=False))


def _plain(measured: xr.Dataset) -> dict[str, list[list[float]]]:
    """Measures as JSON, five significant digits each: a file of text need not hold more."""
    arrays = {str(name): values.transpose("layer", "head") for name, values in measured.items()}
    return {
        name: [[float(f"{v:.5g}") for v in row] for row in a.values.tolist()] for name, a in arrays.items()
    }
