r"""How much larger the loss is far beyond the training length than at its end: a threshold without counts.

A run that forgets reads as well at position 10,000 as at the last position it was trained on. One that does
not is worse there by a factor that falls smoothly with the training length, so that the length at which it
falls to 2, the factor of the paper's criterion, lies between the lengths that were trained and not on one of
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from statescope.analyses.predictors import rank_correlation
from statescope.analyses.runs import FAR, RECENT
from statescope.analyses.thresholds import LOSS_FACTOR

Array = NDArray[np.float64]

DRAWS = 1000
"""Resamples of every bootstrap, and permutations of every test; the seed is fixed."""


def loss_growth(table: xr.Dataset, far: int = FAR, recent: int = RECENT) -> xr.DataArray:
    r"""Compare the loss of recent pairs far beyond training with that at the end of the training length.

    .. math:: G = \frac{\sum_g w_g \bar\ell_g(t \ge \text{far})}{\sum_g w_g \bar\ell_g(T/2 \le t < T)}

    Parameters
    ----------
    table : Dataset
        Runs, from :func:`statescope.analyses.runs.read_runs`.
    far : int
        Tokens from which on positions are far beyond.
    recent : int
        Lags :math:`g` below are recent, in pairs.

    Returns
    -------
    DataArray, (run)
        1 for a run that forgets. Both losses weigh the lags as they are asked far beyond, since short
        sequences ask for shorter lags. NaN where the second half of the training length has no bin of its
        own, or a lag was not asked there.

    Notes
    -----
    After the criterion of *Stuffed Mamba* (arXiv 2410.07145), section 4, which compares the largest losses.
    """
    ends = end_and_far_losses(table, far, recent)
    growth: xr.DataArray = ends["far"] / ends["end"].where(ends["end"] > 0)
    return growth.rename("growth").assign_attrs(long_name="loss far beyond over loss at the end", units="1")


def end_and_far_losses(table: xr.Dataset, far: int = FAR, recent: int = RECENT) -> xr.Dataset:
    """What :func:`loss_growth` compares: loss of recent pairs at the ``end`` and ``far``, (run), in nat."""
    counted = table[["asked", "loss"]].isel(lag=(table["lag"] < recent).values)
    length, position = table["train_length"], table["position"]
    is_end = (position >= length / 2) & (position < length)
    end = counted.sel(part="inside", drop=True).where(is_end, 0).sum("position")
    beyond = counted.sel(part="beyond", drop=True).isel(position=(position >= far).values).sum("position")
    asked = (beyond["asked"] > 0).any("run")
    if not bool(asked.any()):
        raise ValueError(f"far={far}, but the last bin of positions begins at {int(position[-1])}; name less")
    end, beyond = (part.isel(lag=asked.values) for part in (end, beyond))
    weight = beyond["asked"] / beyond["asked"].sum("lag")
    losses = {
        name: (weight * p["loss"] / p["asked"].where(p["asked"] > 0)).sum("lag", skipna=False)
        for name, p in (("end", end), ("far", beyond))
    }
    return xr.Dataset(losses)


def crossings(
    growth: xr.DataArray, size: str = "state_numbers", level: float = LOSS_FACTOR, confidence: float = 0.95
) -> xr.Dataset:
    r"""Find for every state size the training length at which the growth of the loss falls to a level.

    Parameters
    ----------
    growth : DataArray, (run)
        From :func:`loss_growth`; runs that differ in more than size, length and seed should have been
        taken apart.
    size : str
        Coordinate that the threshold depends on.
    level : float
        The growth that counts as forgetting.
    confidence : float
        Of the bootstrap over seeds.

    Returns
    -------
    Dataset, (size[, train_length])
        ``growth``, geometric mean over seeds, (size, train_length); ``threshold`` with ``low`` and ``high``,
        tokens. Between lengths it is interpolated, log against log, after neighbours that rise were pooled.
        0 if the growth is below the level everywhere, infinite if nowhere; NaN without runs.
    """
    known = growth.isel(run=growth.notnull().values)
    sizes, lengths = (np.unique(growth[name].values) for name in (size, "train_length"))
    rng = np.random.default_rng(0)
    mean = np.full((len(sizes), len(lengths)), np.nan)
    drawn = np.full((len(sizes), len(lengths), DRAWS), np.nan)
    for i, n in enumerate(sizes):
        for j, length in enumerate(lengths):
            some = known.values[(known[size].values == n) & (known["train_length"].values == length)]
            if len(some):
                logs = np.log(some)
                mean[i, j] = logs.mean()
                drawn[i, j] = rng.choice(logs, (DRAWS, len(logs))).mean(1)
    tail = (1 - confidence) / 2
    columns = []
    for one, many in zip(mean, drawn, strict=True):
        ends = np.array([_crossing(lengths, values, np.log(level)) for values in many.T])
        low, high = np.quantile(ends, tail, method="lower"), np.quantile(ends, 1 - tail, method="higher")
        columns.append((_crossing(lengths, one, np.log(level)), low, high))
    found: dict[str, Any] = {"growth": ((size, "train_length"), np.exp(mean), {"units": "1"})}
    for name, values in zip(("threshold", "low", "high"), np.array(columns).T, strict=True):
        found[name] = ((size,), values, {"long_name": f"{name} of the training length", "units": "tokens"})
    return xr.Dataset(found, {size: sizes, "train_length": lengths}, {"level": level})


def _crossing(lengths: NDArray[Any], values: Array, level: float) -> float:
    """Where a curve, made falling, falls to a level; both logarithmic but the lengths."""
    known = ~np.isnan(values)
    if not known.any():
        return np.nan
    x, y = np.log(lengths[known]), falling(values[known])
    if y[0] < level:
        return 0.0
    if y[-1] >= level:
        return np.inf
    i = int(np.flatnonzero(y >= level)[-1])
    return float(np.exp(x[i] + (y[i] - level) / (y[i] - y[i + 1]) * (x[i + 1] - x[i])))


def falling(values: Array) -> Array:
    """The nearest sequence that never rises, in least squares: neighbours that rise share their mean."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([np.full(int(n), value) for value, n in blocks])


def trend(outcome: xr.DataArray, size: str = "state_size", within: str = "train_length") -> dict[str, float]:
    """Test whether an outcome rises or falls with the state size among runs of the same training length.

    Parameters
    ----------
    outcome : DataArray, (run)
        One number a run; NaN are left out.
    size, within : str
        Coordinates: what it is tested against, and what is held fixed.

    Returns
    -------
    dict
        ``correlation``, the mean over training lengths of Spearman's rank correlation, weighted by runs;
        ``p``, the two-sided share of permutations of the sizes, within training lengths, that reach it (NaN
        if nothing varies); ``runs``.
    """
    known = outcome.isel(run=outcome.notnull().values)
    groups = [known.isel(run=(known[within] == length).values) for length in np.unique(known[within].values)]
    pairs = [(g[size].values.astype(float), g.values.astype(float)) for g in groups if g.sizes["run"] > 1]
    pairs = [(x, y) for x, y in pairs if np.ptp(x) > 0 and np.ptp(y) > 0]
    total = sum(len(x) for x, _ in pairs)
    if not pairs:
        return {"correlation": np.nan, "p": np.nan, "runs": float(known.sizes["run"])}

    def mean(of: list[tuple[Array, Array]]) -> float:
        return float(sum(len(x) * rank_correlation(x, y) for x, y in of) / total)

    rng, seen = np.random.default_rng(0), mean(pairs)
    many = np.array([mean([(rng.permutation(x), y) for x, y in pairs]) for _ in range(DRAWS)])
    reached = int((np.abs(many) >= abs(seen) - 1e-12).sum())
    return {"correlation": seen, "p": (reached + 1) / (DRAWS + 1), "runs": float(total)}


def paired(before: xr.DataArray, after: xr.DataArray, confidence: float = 0.95) -> dict[str, float]:
    """Compare an outcome of runs with that of the same runs trained otherwise, such as for more steps.

    Parameters
    ----------
    before, after : DataArray, (run)
        One positive number a run; runs are the same that agree in state size, training length and seed.
    confidence : float
        Of the bootstrap over pairs.

    Returns
    -------
    dict
        ``ratio``, the geometric mean of after over before, with ``low`` and ``high``; ``pairs`` and in how
        many of them it ``rises``; ``p``, the two-sided share of random signs of the logarithms that reach
        their mean (NaN without pairs).
    """
    names = ("state_size", "train_length", "seed")
    old, new = (
        dict(zip(zip(*(of[n].values.tolist() for n in names), strict=True), of.values.tolist(), strict=True))
        for of in (before, after)
    )
    both = np.array([[old[key], new[key]] for key in old if key in new]).reshape(-1, 2)
    both = both[np.isfinite(both).all(1)]
    logs = np.log(both[:, 1] / both[:, 0])
    if not len(logs):
        return dict.fromkeys(("ratio", "low", "high", "p"), np.nan) | {"pairs": 0.0, "rises": 0.0}
    rng, tail = np.random.default_rng(0), (1 - confidence) / 2
    means = rng.choice(logs, (DRAWS, len(logs))).mean(1)
    signed = (rng.choice([-1.0, 1.0], (DRAWS, len(logs))) * logs).mean(1)
    reached = int((np.abs(signed) >= abs(logs.mean()) - 1e-12).sum())
    ratio, low, high = np.exp([logs.mean(), *np.quantile(means, (tail, 1 - tail))]).tolist()
    found = {"ratio": ratio, "low": low, "high": high, "p": (reached + 1) / (DRAWS + 1)}
    return found | {"pairs": float(len(logs)), "rises": float((logs > 0).sum())}
