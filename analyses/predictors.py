"""Which measure of the states, read inside the training length only, says how a run will do beyond it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

Array = NDArray[np.float64]

OVER_HEADS: dict[str, Callable[..., Any]] = {"mean": np.nanmean, "max": np.nanmax, "median": np.nanmedian}
"""How the heads of all layers become one number of a run."""

DRAWS = 1000


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
    table: xr.Dataset, outcome: xr.DataArray, size: str = "state_size", confidence: float = 0.95
) -> xr.Dataset:
    """Rank the measures read inside the training length by how well they order the runs by an outcome.

    Parameters
    ----------
    table : Dataset
        Runs, with ``inside_...`` measures.
    outcome : DataArray, (run)
        What came of them, such as :func:`statescope.analyses.laws.context_lengths`.
    size : str
        Coordinate by which runs are left out.
    confidence : float
        Of the bootstrap over runs.

    Returns
    -------
    Dataset, (predictor)
        ``correlation`` (Spearman) with ``low`` and ``high``; ``least`` and ``most``, its extremes when one
        state size after another is left out. Strongest first. Training length and state size are among the
        predictors, as what any measure must better.
    """
    known = np.isfinite(outcome.values)
    y, groups = outcome.values[known].astype(float), table[size].values[known]
    candidates = {name: table[name].values[known].astype(float) for name in ("train_length", "state_numbers")}
    for name in [str(n) for n in table.data_vars if str(n).startswith("inside_")]:
        values = table[name].values[known].reshape(int(known.sum()), -1)
        for how, collect in OVER_HEADS.items():
            candidates[f"{name.removeprefix('inside_')} ({how})"] = collect(values, axis=1)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(y), (DRAWS, len(y)))
    rows = {}
    for name, x in candidates.items():
        usable = np.isfinite(x)
        if usable.sum() < 3 or np.isnan(rank_correlation(x[usable], y[usable])):
            continue
        many = np.array([rank_correlation(x[i][usable[i]], y[i][usable[i]]) for i in draws])
        left = [
            rank_correlation(x[keep], y[keep])
            for n in np.unique(groups)
            if (keep := usable & (groups != n)).any()
        ]
        tail = (1 - confidence) / 2
        low, high = np.nanquantile(many, (tail, 1 - tail))
        without = (np.nan, np.nan) if len(left) < 2 else (np.nanmin(left), np.nanmax(left))
        rows[name] = (rank_correlation(x[usable], y[usable]), low, high, *without)
    order = sorted(rows, key=lambda n: -abs(rows[n][0]))
    names = ("correlation", "low", "high", "least", "most")
    columns = np.array([rows[n] for n in order]).reshape(-1, len(names)).T
    return xr.Dataset(
        {n: ("predictor", c, {"units": "1"}) for n, c in zip(names, columns, strict=True)},
        {"predictor": order},
    )
