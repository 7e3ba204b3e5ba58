"""Passkeys and the states that were to hold them: what a failure is explained with.

Every prompt is asked, as in :func:`statescope.experiments.passkey.passkey`, and traced. The statistics
are in :mod:`statescope.analyses.failure`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor, nn

from statescope.analyses.needle import MEASURES, needle_measures
from statescope.experiments.passkey import passkey
from statescope.experiments.prompts import Prompt
from statescope.tracing import trace

TRACE_TOKENS = {"cpu": 8192, "cuda": 2**17}
"""Tokens traced at once, all prompts together, by device."""


def failure_table(
    model: nn.Module | str | Path,
    lengths: Iterable[int],
    depths: Iterable[float],
    trials: int,
    *,
    train_length: int | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Ask for passkeys, and measure at each question what the states still hold of the needle.

    Parameters
    ----------
    model, lengths, depths, trials, **settings
        As for :func:`statescope.experiments.passkey.passkey`. Choose lengths around failure: prompts that
        are all answered rightly, or all wrongly, explain nothing.
    train_length : int, optional
        Training length in tokens, for the overload. Default: the checkpoint's own word.

    Returns
    -------
    Dataset, (length, depth, trial[, layer, head])
        The table of answers, joined with :data:`statescope.analyses.needle.MEASURES` of every prompt.
        :func:`statescope.analyses.failure.explain_failure` says what they explain.

    Raises
    ------
    ValueError, TypeError, OSError
        As for :func:`statescope.experiments.passkey.passkey`; also if the training length is not known.
    """
    return passkey(model, lengths, depths, trials, observe=NeedleStates(train_length), **settings)


@dataclass(frozen=True)
class NeedleStates:
    """Measures the states of a batch of prompts at their questions."""

    train_length: int | None = None

    def __repr__(self) -> str:
        return f"NeedleStates(train_length={self.train_length}, measures={', '.join(MEASURES)})"

    def __call__(self, model: nn.Module, ids: Tensor, prompts: Sequence[Prompt]) -> xr.Dataset:
        """Trace a few prompts at a time, each as one segment, so that it is read once only."""
        device = next(model.parameters()).device.type
        some = max(1, TRACE_TOKENS.get(device, TRACE_TOKENS["cuda"]) // ids.shape[1])
        measured = []
        for i in range(0, len(ids), some):
            record = trace(
                model,
                ids[i : i + some],
                probes=[-1],
                segment=ids.shape[1],
                backend="chunked" if device == "cpu" else "auto",
                train_length=self.train_length,
                progress=False,
            )
            needles = prompts[i : i + some]
            starts, stops = [p.needle_start for p in needles], [p.needle_stop for p in needles]
            measured.append(needle_measures(record, starts, stops))
        return xr.concat(measured, dim="sequence")
