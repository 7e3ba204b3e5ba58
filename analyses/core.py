"""The arithmetic of the measures: numpy on arrays of (sequence, layer, token, head).

Everything that runs along tokens takes the state it was left in and gives back the state it ends in (its
*carry*), so that a text of any length can be worked through in blocks. Numpy only, float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TOKEN = 2
"""The token axis."""

FORGOTTEN = -1e4
"""Log decays below this count as this: what is left, e^-10000, is 0 in any number format."""


class Memories(NamedTuple):
    """What a state effectively holds, from sums over its surviving writes; and the logs to go on from."""

    live: Array
    coherence: Array
    age: Array | None


def log_accumulate(log_decay: Array, log_amount: Array, carry: Array | None = None) -> Array:
    r"""Run ``x_t = decay_t x_{t-1} + amount_t`` along the tokens, in logarithms.

    .. math::

        \log x_t = G_t + \log \Big( x_{-1} + \sum_{i \le t} e^{\log b_i - G_i} \Big), \quad
        G_t = \sum_{s \le t} g_s

    Nothing underflows or overflows, however strong the decay, and there is no loop over tokens: the sum is
    a running ``logaddexp``. A relative rounding error of 1e-16 times ``|G|`` over the block remains.

    Parameters
    ----------
    log_decay, log_amount : array, (sequence, layer, token, head)
        Nat; amounts are not negative, so their logs are real or -inf.
    carry : array, (sequence, layer, 1, head), optional
        ``log x`` before the first token; nothing (-inf) by default.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = np.cumsum(np.maximum(log_decay, FORGOTTEN), axis=TOKEN)
        amounts = log_amount - total
        if carry is not None:
            amounts[:, :, :1] = np.logaddexp(amounts[:, :, :1], carry)
        return total + np.logaddexp.accumulate(amounts, axis=TOKEN)


def memories(
    log_decay: Array,
    write_norm: Array,
    state_norm: Array,
    last: Array,
    width: Array,
    carry: Any,
    dated: bool,
) -> tuple[Memories, Any]:
    r"""Count, weigh and date the writes that survive, :math:`e_i = e^{G_t - G_i} |U_i|`.

    Where an entry stands for several tokens, they are taken to write equally much and to decay equally
    fast; for one token an entry this is exact.

    Parameters
    ----------
    log_decay, write_norm, state_norm : array, (sequence, layer, token, head)
        As in the record.
    last, width : array, (token,)
        Last token of every entry, and how many tokens it stands for.
    carry : tuple or None
        What this function gave for the tokens before; None at the start.
    dated : bool
        Whether the age is asked for.
    """
    last, width = last[:, None].astype(float), width[:, None].astype(float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        each = np.log(write_norm) - 0.5 * np.log(width)
        kept = np.maximum(log_decay, FORGOTTEN)
        sizes = _geometric(kept, width)
        first, square, when = carry or (None, None, None)
        total = log_accumulate(log_decay, each + np.log(sizes), first)
        energy = log_accumulate(2 * kept, 2 * each + np.log(_geometric(2 * kept, width)), square)
        empty = np.isneginf(total)
        live = np.where(empty, 0.0, np.exp(2 * total - energy))
        coherence = np.where(empty, np.nan, np.exp(2 * np.log(state_norm) - energy))
        age, left = None, [x[:, :, -1:] for x in (total, energy)] + [None]
        if dated:
            # The sum of token numbers times what survives; at token 0 it would be 0, so count from 1.
            number = (last + 1) * sizes - _geometric_index(kept, width)
            moment = log_accumulate(log_decay, each + np.log(number), when)
            age = np.where(empty, np.nan, last + 1 - np.exp(moment - total))
            left[2] = moment[:, :, -1:]
    return Memories(live, coherence, age), left


def budget(
    log_decay: Array, write_norm: Array, state_norm: Array, write_overlap: Array, carry: Array | None
) -> tuple[tuple[Array, Array, Array, Array], Array]:
    """Split the state's energy into what decay left, the cross term, the write, and what they leave over."""
    before = np.zeros_like(state_norm[:, :, :1]) if carry is None else carry
    before = np.concatenate([before, state_norm[:, :, :-1]], axis=TOKEN)
    decayed = np.exp(log_decay) * before
    with np.errstate(over="ignore", invalid="ignore"):
        cross = 2 * decayed * write_norm * write_overlap
        parts = (decayed**2, cross, write_norm**2)
        return (*parts, state_norm**2 - sum(parts)), state_norm[:, :, -1:]


def cumulative(log_decay: Array, carry: Array | None) -> tuple[tuple[Array], Array]:
    """Sum the log decay up to every token."""
    total = np.cumsum(np.maximum(log_decay, FORGOTTEN), axis=TOKEN)
    total = total if carry is None else total + carry
    return (total,), total[:, :, -1:]


def _geometric(log_total: Array, n: Array) -> Array:
    """Sum ``r^j`` over j = 0 ... n - 1, where ``r^n = exp(log_total)``."""
    if np.all(n == 1):
        return np.ones_like(log_total)
    r = np.expm1(log_total / n)
    return np.where(r == 0, n, np.expm1(log_total) / np.where(r == 0, 1, r))


def _geometric_index(log_total: Array, n: Array) -> Array:
    """Sum ``j r^j`` over j = 0 ... n - 1, where ``r^n = exp(log_total)``."""
    if np.all(n == 1):
        return np.zeros_like(log_total)
    lost = -np.expm1(log_total / n)
    near = np.abs(lost) * n < 1e-4  # there the closed form cancels; the first-order series is exact to 1e-8
    safe = np.where(near, 1.0, lost)
    closed = (1 - lost) * (_geometric(log_total, n) - n * np.exp(log_total * (n - 1) / n)) / safe
    return np.where(near, n * (n - 1) / 2 * (1 - lost * (2 * n - 1) / 3), closed)


def singular_values(state: Array) -> Array:
    """Singular values of every state, largest first; NaN where a state is not finite.

    Parameters
    ----------
    state : array, (..., key, value)
    """
    finite = np.asarray(np.isfinite(state).all((-2, -1)))
    values = np.linalg.svd(
        np.where(finite[..., None, None], state, 0.0), full_matrices=False, compute_uv=False
    )
    return np.where(finite[..., None], values, np.nan)


def ranks(sigma: Array, eps: float) -> tuple[Array, Array]:
    """How many singular values count, and how many they effectively are (the exponential of their entropy).

    Parameters
    ----------
    sigma : array, (..., value)
        Singular values, largest first; NaN, and NaN comes out, where all are 0.
    eps : float
        Those below this part of the largest do not count.
    """
    sigma = np.where(sigma[..., :1] > 0, sigma, np.nan)
    p = sigma / sigma.sum(-1, keepdims=True)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0 * p).sum(-1)
    count = np.where(np.isnan(sigma[..., 0]), np.nan, (sigma > eps * sigma[..., :1]).sum(-1))
    return count, np.exp(entropy)


def bootstrap(units: Array, confidence: float, resamples: int = 1000, seed: int = 0) -> tuple[Array, Array]:
    """Bound the mean over units from both sides: percentile bootstrap with a fixed seed.

    Parameters
    ----------
    units : array, (unit, ...)
        Independent values; NaN ones are left out. With fewer than two, the bounds are NaN.
    confidence : float
        Between 0 and 1.
    """
    if len(units) < 2:
        none = np.full(units.shape[1:], np.nan)
        return none, none
    rng = np.random.default_rng(seed)
    # How often each unit is drawn says all that its mean needs, and costs no copies of the units.
    times = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), resamples).astype(float)
    known = np.isfinite(units)
    total = np.tensordot(times, np.where(known, units, 0), 1)
    count = np.tensordot(times, known.astype(float), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(count > 0, total / count, np.nan)
    tail = (1 - confidence) / 2
    enough = known.sum(0) > 1
    bounds = np.quantile(np.where(np.isnan(means), 0, means), [tail, 1 - tail], axis=0)
    low, high = np.where(enough, bounds, np.nan)
    return low, high
