"""Which measure of the states, read inside the training length only, says how a run will do beyond it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

Array = NDArray[np.float64]

OVER_HEADS: dict[str, Callable[..., Any]] = {"mean": np.nanmean, "max": np.nanmax, "median": np.nanmedian}
"""How the heads of all layers become one number of a run."""

KNOWN = ("train_length", "state_numbers")
"""Known before a run is trained: what a measure of its states must better."""

DRAWS = 1000
"""Resamples of the bootstrap, and permutations of the test; the seed is fixed."""


def rank_correlation(x: Array, y: Array) -> float:
    """Spearman's rank correlation; ties share their mean rank. NaN if one of the two does not vary."""
    a, b = (_ranks(v) - (len(v) + 1) / 2 for v in (x, y))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else np.nan


def _ranks(values: Array) -> Array:
    _, at, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[at]


def predictors(
    table: xr.Dataset,
    outcome: xr.DataArray,
    size: str = "state_size",
    confidence: float = 0.95,
    within: Sequence[str] = (),
) -> xr.Dataset:
    r"""Rank the measures read inside the training length by how well they order the runs by an outcome.

    .. math:: \rho = \frac{\sum_i a_i b_i}{\sqrt{\sum_i a_i^2 \sum_i b_i^2}}

    with :math:`a, b` the ranks of measure and outcome among the runs of a group, less their mean: Spearman's
    rank correlation, where all runs are one group.

    Parameters
    ----------
    table : Dataset
        Runs, with ``inside_...`` measures.
    outcome : DataArray, (run)
        What came of them, such as :func:`statescope.analyses.growth.loss_growth`; NaN are left out.
    size : str
        Coordinate by which runs are left out.
    confidence : float
        Of the bootstrap over runs.
    within : sequence of str
        Coordinates, such as ``train_length``: only runs alike in them are compared. Default: all runs.

    Returns
    -------
    Dataset, (predictor)
        ``correlation`` with ``low`` and ``high``; ``least`` and ``most``, its extremes when one state size
        after another is left out; ``p``, the share of permutations of the outcome, in each of which the
        *strongest* of all measures counts, that reach it. Strongest first. Training length and state size
        are among the predictors, as what any measure must better.
    """
    known = np.isfinite(outcome.values)
    y, sizes = outcome.values[known].astype(float), table[size].values[known]
    group = _groups(table, within, known)
    candidates = _candidates(table, known)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(y), (DRAWS, len(y)))
    shuffled = np.array([_shuffle(rng, group) for _ in range(DRAWS)])
    rows, strongest, tail = {}, np.zeros(DRAWS), (1 - confidence) / 2
    for name, x in candidates.items():
        usable = np.isfinite(x)
        a, b = (_centred(np.where(usable, v, np.nan), group) for v in (x, y))
        if usable.sum() < 3 or np.isnan(seen := _cosine(a, b)):
            continue
        left = [_cosine(a[keep], b[keep]) for n in np.unique(sizes) if (keep := sizes != n).any()]
        low, high = np.nanquantile(_cosine(_level(a[drawn]), _level(b[drawn])), (tail, 1 - tail))
        without = (np.nan, np.nan) if len(left) < 2 else (np.nanmin(left), np.nanmax(left))
        rows[name] = [float(seen), low, high, *without]
        if name not in KNOWN:
            strongest = np.fmax(strongest, np.abs(_cosine(a, b[shuffled])))
    for row in rows.values():
        row.append((int((strongest >= abs(row[0]) - 1e-12).sum()) + 1) / (DRAWS + 1))
    order = sorted(rows, key=lambda n: -abs(rows[n][0]))
    names = ("correlation", "low", "high", "least", "most", "p")
    columns = np.array([rows[n] for n in order]).reshape(-1, len(names)).T
    return xr.Dataset(
        {n: ("predictor", c, {"units": "1"}) for n, c in zip(names, columns, strict=True)},
        {"predictor": order},
    )


def _candidates(table: xr.Dataset, known: NDArray[np.bool_]) -> dict[str, Array]:
    """Numbers of a run by name: what was known before it was trained, and its states' measures."""
    found = {name: table[name].values[known].astype(float) for name in KNOWN}
    for name in [str(n) for n in table.data_vars if str(n).startswith("inside_")]:
        values = table[name].values[known].reshape(int(known.sum()), -1)
        for how, collect in OVER_HEADS.items():
            found[f"{name.removeprefix('inside_')} ({how})"] = collect(values, axis=1)
    return found


def _groups(table: xr.Dataset, within: Sequence[str], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of every run's group."""
    settings = np.array([table[name].values[known].astype(float) for name in within])
    if not len(settings):
        return np.zeros(int(known.sum()), dtype=np.int64)
    return np.unique(settings, axis=1, return_inverse=True)[1].reshape(-1)


def _centred(values: Array, group: NDArray[np.int64]) -> Array:
    """Ranks within every group, less their mean; 0 where the value is not known."""
    out = np.zeros(len(values))
    for g in np.unique(group):
        at = (group == g) & np.isfinite(values)
        out[at] = _ranks(values[at]) - (at.sum() + 1) / 2
    return out


def _shuffle(rng: np.random.Generator, group: NDArray[np.int64]) -> NDArray[np.int64]:
    """A permutation of the runs that leaves every one in its group."""
    out = np.arange(len(group))
    for g in np.unique(group):
        at = np.flatnonzero(group == g)
        out[at] = rng.permutation(at)
    return out


def _level(values: Array) -> Array:
    return values - values.mean(-1, keepdims=True)


def _cosine(a: Array, b: Array) -> Array:
    """Along the last axis; NaN where one of the two does not vary."""
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    found: Array = (a * b).sum(-1) / np.where(scale > 0, scale, np.nan)
    return found
