r"""How a length grows with the size of a state: laws fitted, and compared by what they predict.

*Stuffed Mamba* (arXiv 2410.07145, section 4) finds :math:`T_{forget} = 5.172\, N_S - 4.469` and
:math:`T_{recall} = 4.756\,(1.365^{N_S} - 1) - 0.742`, with :math:`N_S` the million numbers of recurrent and
convolution state and :math:`T` in thousand tokens (:mod:`statescope.analyses.paper`). Lengths with intervals
come from :mod:`statescope.analyses.thresholds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

DRAWS = 200
"""Resamples of the bootstrap; the seed is fixed."""

SHORTEST = 1.0
"""Predictions below one token are set to it, where they are compared in ratio."""


class Law(NamedTuple):
    """One form of law: how many parameters, how it is fitted to (size, length), and what it predicts."""

    formula: str
    parameters: int
    fit: Callable[[Array, Array], Array]
    predict: Callable[[Array, Array], Array]


def _relative(columns: Sequence[Array], y: Array) -> Array:
    """Least squares of the relative error."""
    found: Array = np.linalg.lstsq(np.stack(columns, 1) / y[:, None], np.ones_like(y), rcond=None)[0]
    return found


def _fit_power(x: Array, y: Array) -> Array:
    log_a, b = np.linalg.lstsq(np.stack([np.ones_like(x), np.log(x)], 1), np.log(y), rcond=None)[0]
    return np.array([np.exp(log_a), b])


def _fit_exponential(x: Array, y: Array) -> Array:
    """Try many rates at once, then finer around the best; for each, the rest is a linear fit of two."""
    z, center, width = x / x.max(), 0.0, 8.0
    for _ in range(7):
        rates = center + np.linspace(-width, width, 64)  # an even number: never 0 itself
        grown = np.expm1(rates[:, None] * z) / rates[:, None]
        u, v = grown / y, np.broadcast_to(1 / y, grown.shape)
        uu, uv, vv = (u * u).sum(1), (u * v).sum(1), (v * v).sum(1)
        det = uu * vv - uv**2
        a, c = (vv * u.sum(1) - uv * v.sum(1)) / det, (uu * v.sum(1) - uv * u.sum(1)) / det
        best = int((((a[:, None] * u + c[:, None] * v) - 1) ** 2).sum(1).argmin())
        center, width = rates[best], width / 16
    return np.array([a[best] / center, np.exp(center / x.max()), c[best]])


LAWS: dict[str, Law] = {
    "linear": Law(
        "a N + b", 2, lambda x, y: _relative([x, np.ones_like(x)], y), lambda p, x: p[0] * x + p[1]
    ),
    "power": Law("a N^b", 2, _fit_power, lambda p, x: p[0] * x ** p[1]),
    "exponential": Law(
        "a (b^N - 1) + c", 3, _fit_exponential, lambda p, x: p[0] * np.expm1(x * np.log(p[1])) + p[2]
    ),
}
"""The forms compared; relative errors are what is least."""


def fit_laws(
    size: ArrayLike, length: ArrayLike, low: ArrayLike | None = None, high: ArrayLike | None = None
) -> xr.Dataset:
    r"""Fit every law, and compare them by the error at a state size left out.

    .. math:: \text{error} = \sqrt{ \overline{ \log^2 ( \hat T_{-i}(N_i) / T_i ) } }

    Parameters
    ----------
    size, length : array, (point,)
        State sizes, and lengths in tokens (or any unit), positive.
    low, high : array, (point,), optional
        Interval of every length: parameters get intervals from fits to lengths drawn from it, half of them
        below the length and half above, log-uniformly; or from fits to the law's own predictions times its
        resampled errors, if that is wider: a law that misses its points is not known better than they are.

    Returns
    -------
    Dataset, (law, parameter)
        ``value`` with ``low`` and ``high`` (95 %), in the order of ``formula``; by law ``r2``, ``error``
        (held out; NaN where too few points are left) and ``clamped``: how many of the held-out predictions
        were below one and were set to it. ``attrs["best"]`` is the law of the least held-out error.
    """
    x, y = np.asarray(size, dtype=float), np.asarray(length, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(
            f"size and length have shapes {x.shape} and {y.shape}; expected 3 points or more of each"
        )
    if not ((x > 0) & (y > 0) & np.isfinite(y)).all():
        raise ValueError(
            "size and length hold values that are not positive and finite; leave those points out"
        )
    ends = [y if end is None else np.clip(np.asarray(end, float), 1e-9, None) for end in (low, high)]
    rng = np.random.default_rng(0)
    most = max(law.parameters for law in LAWS.values())
    value, bounds = np.full((len(LAWS), most), np.nan), np.full((2, len(LAWS), most), np.nan)
    scores = np.full((3, len(LAWS)), np.nan)
    for i, law in enumerate(LAWS.values()):
        if len(x) < law.parameters:
            continue
        value[i, : law.parameters] = p = law.fit(x, y)
        spread = ((y - y.mean()) ** 2).sum()
        residual = ((law.predict(p, x) - y) ** 2).sum()
        scores[:, i] = 1 - residual / spread if spread else np.nan, *_held_out(law, x, y)
        if low is not None and high is not None:
            bounds[:, i, : law.parameters] = _bounds(law, x, rng, _draw(rng, y, *ends), y)
    return _as_dataset(value, bounds, scores)


def _draw(rng: np.random.Generator, y: Array, low: Array, high: Array) -> Array:
    """Lengths from their intervals, with the known one as their median."""
    ends = np.where(rng.random((DRAWS, len(y))) < 0.5, np.minimum(low, y), np.maximum(high, y))
    drawn: Array = y * (ends / y) ** rng.random((DRAWS, len(y)))
    return drawn


def _bounds(law: Law, x: Array, rng: np.random.Generator, drawn: Array, y: Array) -> Array:
    """Ends of the parameters' intervals: of lengths drawn, or of the law's scatter where that is wider."""
    samples = [drawn]
    predicted = law.predict(law.fit(x, y), x)
    spare = len(x) - law.parameters
    if spare > 0 and (predicted > 0).all():
        error = np.log(y / predicted)
        error = (error - error.mean()) * np.sqrt(len(x) / spare)
        samples.append(predicted * np.exp(rng.choice(error, drawn.shape)))
    ends = [np.quantile([law.fit(x, sample) for sample in some], (0.025, 0.975), axis=0) for some in samples]
    found: Array = np.stack([np.min([e[0] for e in ends], axis=0), np.max([e[1] for e in ends], axis=0)])
    return found


def _held_out(law: Law, x: Array, y: Array) -> tuple[float, float]:
    if len(x) <= law.parameters:
        return np.nan, np.nan
    predicted = np.array(
        [law.predict(law.fit(np.delete(x, i), np.delete(y, i)), x[i]) for i in range(len(x))]
    )
    clamped = predicted < SHORTEST
    error = np.log(np.where(clamped, SHORTEST, predicted) / y)
    return float(np.sqrt((error**2).mean())), float(clamped.sum())


def _as_dataset(value: Array, bounds: Array, scores: Array) -> xr.Dataset:
    dims = ("law", "parameter")
    result = xr.Dataset(
        {"value": (dims, value), "low": (dims, bounds[0]), "high": (dims, bounds[1])},
        {"law": list(LAWS), "parameter": list("abc")[: value.shape[1]]},
    )
    for name, row in zip(("r2", "error", "clamped"), scores, strict=True):
        result[name] = ("law", row)
    result["formula"] = ("law", [law.formula for law in LAWS.values()])
    known = scores[1][~np.isnan(scores[1])]
    best = "" if not len(known) else list(LAWS)[int(np.nanargmin(scores[1]))]
    return result.assign_attrs(best=best)
