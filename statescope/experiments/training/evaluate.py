"""What runs recall, by position and by lag, inside their training length and far beyond it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescope.experiments.training.config import Config
from statescope.experiments.training.draws import Draws
from statescope.experiments.training.ensemble import Ensemble, answer_logits
from statescope.experiments.training.streams import (
    SHORTEST,
    Batch,
    Recall,
    Rows,
    Stream,
    Text,
    held_out,
    pairs_since,
    read_corpus,
)

SEED = 2**40
"""Of the data read in evaluation, the same for every run; no run is seeded so."""

LAGS = tuple(2**i for i in range(13))
"""First pairs of the bins of lags."""

Counts = dict[str, Any]


def evaluate(ensemble: Ensemble, beyond: int, rows: int) -> list[dict[str, Counts]]:
    """Read new data with all runs, in sequences as long as in training, and in much longer ones.

    Parameters
    ----------
    ensemble : Ensemble
        The runs.
    beyond : int
        Tokens of the long sequences, a power of two; no more than that are read of the short ones, a row.
    rows : int
        Long sequences, and as many rows of short ones.

    Returns
    -------
    list of dict
        Of every run, ``inside`` and ``beyond``, each with ``position`` (first tokens of the bins), ``lag``
        (first pairs of the bins; a single one for text), and by position and lag how much was ``asked``, how
        much of it ``right``, and the summed ``loss`` in nat. The recall stream has log-uniform lags here,
        whatever the runs were trained with, and text no passkeys.
    """
    stream = _stream(ensemble)
    longest = torch.full_like(ensemble.lengths, beyond)
    parts = {"inside": ensemble.lengths, "beyond": longest}
    counted = {name: _count(ensemble, stream, length, beyond, rows) for name, length in parts.items()}
    starts = _positions(beyond)
    found = []
    for run in range(len(ensemble.configs)):
        of_run: dict[str, Counts] = {}
        for name, (asked, right, loss) in counted.items():
            of_run[name] = {"position": starts, "lag": list(LAGS) if asked.shape[-1] > 1 else [0]}
            for what, values in (("asked", asked), ("right", right), ("loss", loss)):
                digits = 3 if what == "loss" else None
                of_run[name][what] = [[round(v, digits) for v in row] for row in values[run].tolist()]
        found.append(of_run)
    return found


def _positions(longest: int) -> list[int]:
    """First tokens of the bins of positions: 0, 16, 32, 64, ..."""
    return [0, *(2**i for i in range(4, (longest - 1).bit_length()))]


def _stream(ensemble: Ensemble) -> Stream:
    c: Config = ensemble.configs[0]
    if c.stream == "text":
        return Text(held_out(read_corpus(c.corpus))[1].to(ensemble.device), 0.0)
    return Recall(c.keys, c.values, torch.zeros(len(ensemble.configs), device=ensemble.device))


@torch.no_grad()
def _count(ensemble: Ensemble, stream: Stream, longest: Tensor, tokens: int, rows: int) -> tuple[Tensor, ...]:
    """What was asked, right and lost, each (run, position, lag); a row at a time."""
    bins = len(_positions(tokens)), len(LAGS) if isinstance(stream, Recall) else 1
    total = torch.zeros(3, len(longest), bins[0] * bins[1], dtype=torch.float64, device=longest.device)
    p, c = ensemble.parameters(), ensemble.configs[0]
    for row in range(rows):
        seeds = torch.full_like(ensemble.seeds, SEED)
        draws = Draws(seeds, torch.tensor(row, device=longest.device))
        cut = Rows.cut(draws, 1, tokens, longest, 0.0, SHORTEST[c.stream])
        batch = stream.draw(draws, cut)
        logits = answer_logits(p, ensemble.shape, stream, batch, c.chunk, torch.float32)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 2), batch.answers.flatten(), reduction="none"
        ).view_as(batch.weight)
        at = _bin(stream, draws, cut, batch) + torch.zeros_like(batch.answers)
        right = logits.argmax(-1) == batch.answers
        weight = (batch.weight > 0).double()
        for sums, amount in zip(total, (weight, weight * right, weight * loss), strict=True):
            sums.scatter_add_(1, at.flatten(1), amount.flatten(1))
    asked, right, lost = total.unflatten(-1, bins).cpu()
    return asked.long(), right.long(), lost


def _bin(stream: Stream, draws: Draws, cut: Rows, batch: Batch) -> Tensor:
    """Number of the bin of every answer, by position and lag."""
    position = batch.position[..., :: stream.stride].contiguous()
    starts = torch.tensor(_positions(position.shape[-1] * stream.stride)[1:], device=position.device)
    by_position = torch.bucketize(position, starts, right=True)
    if not isinstance(stream, Recall):
        return by_position
    lag = pairs_since(stream.roots(draws, cut)[0])
    by_lag = torch.bucketize(lag, torch.tensor(LAGS[1:], device=lag.device), right=True)
    return by_position * len(LAGS) + by_lag
