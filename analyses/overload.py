"""The verdict on every head: it forgets, it retains, or it is overloaded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import Array, blocks, by_layer, caveat, state_shape, steps, train_length
from statescope.analyses.retention import KEPT, head_reach
from statescope.analyses.state import largest_inside

OVERLOADED = math.sqrt(2)
"""Overload ratio from which a head counts as overloaded: its state has twice the energy it ever had inside
the training length, so that at most half of what is there is what training taught it to read."""

VERDICTS = ("forgets", "retains", "overloaded", "not finite")
"""From harmless to worst; a layer's verdict is its worst head's."""

BINS = 8
"""Bins of a training length in which norms are averaged before anything is concluded from them."""

PER_HEAD = ("sequence", "layer", "head")

LABELS = {
    "overload_ratio": ("mean norm beyond the training length over the largest inside", "1"),
    "low": ("overload ratio, lower bound", "1"),
    "high": ("overload ratio, upper bound", "1"),
    "live_memories": ("mean number of live memories", "1"),
    "load": ("live memories over directions", "1"),
    "coherence": ("mean coherence of the live memories", "1"),
    "retention": ("retention over the training length", "1"),
    "onset": ("token from which on the state stays overloaded", "token"),
    "verdict": ("verdict", "1"),
}


def overload(
    record: xr.DataTree,
    train_length: int | None = None,
    shape: tuple[int, int] | None = None,
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Judge every head: it forgets, it retains, or it is overloaded.

    .. math::

        \text{overloaded} \iff \frac{\overline{|S_t|}_{t \ge T}}{\max_{s < T} |S_s|} > \sqrt 2, \qquad
        \text{retains} \iff e^{T \overline{g}} > 1/e

    Parameters
    ----------
    record : DataTree
        A record; best several training lengths long. With ``window=w`` norms are those at the ends of
        windows; for memories see :func:`~statescope.analyses.memories`.
    train_length : int, optional
        :math:`T` in tokens. Default: the record's own.
    shape : (int, int), optional
        Key and value size. Default: the record's own.
    confidence : float
        Of the interval of the ratio: a bootstrap (fixed seed) over stretches of half a training length, the
        mean age of what a head holds that never forgets: states nearer to each other share what they hold.
        Growth widens it. NaN if fewer than two stretches lie beyond the training length.

    Returns
    -------
    Dataset, (sequence, layer, head)
        ``overload_ratio``, the mean beyond the training length, with ``low`` and ``high``; ``live_memories``,
        ``load`` and ``coherence``, means over the same tokens (over all, if none lie beyond); ``retention``
        over the training length; ``onset``, the token from which on the ratio, averaged over eighths of the
        training length, stays above the threshold, NaN where it does not; ``verdict``: "overloaded" if
        ``low`` (or, without an interval, the ratio) is above :data:`OVERLOADED`, else "retains" if
        ``retention`` is above :data:`~statescope.analyses.retention.KEPT`, else "forgets"; "not finite" where
        a state is not. ``layer_verdict``, (sequence, layer), is that of the worst head. ``attrs["sentence"]``
        says it in words.

    Notes
    -----
    Trouble: "overloaded"; "retains" in a record not much longer than the training length may become it. The
    ratio is about the text that was read: a text of other matter fills the states otherwise. Sources:
    *Stuffed Mamba* (arXiv 2410.07145), sections 3 and 4, for what overload is; the thresholds are ours.
    """
    limit = _train_length(record, train_length)
    found, least = steps(record), min(state_shape(record, shape))
    largest = largest_inside(found, limit)
    parts = [
        _judge(layer, limit, largest.isel(layer=slice(i, i + 1)).values, confidence)
        for i, layer in enumerate(by_layer(found))
    ]
    values = {name: np.concatenate([p[name] for p in parts], axis=1) for name in parts[0]}
    values["load"] = values["live_memories"] / least
    values["retention"] = head_reach(record, limit)["retention"].values
    values["verdict"], worst = _verdicts(values)
    coords = {d: found[d] for d in PER_HEAD}
    result = xr.Dataset(
        {
            name: xr.DataArray(values[name], coords, PER_HEAD, attrs={"long_name": long_name, "units": units})
            for name, (long_name, units) in LABELS.items()
        }
    )
    result["layer_verdict"] = (PER_HEAD[:2], worst, {"long_name": "verdict on the worst head", "units": "1"})
    tokens = int(found["token"].values[-1]) + 1
    result.attrs = {
        "train_length": limit,
        "tokens": tokens,
        "complete": tokens == int(record.attrs["tokens"]),
        "overloaded_above": OVERLOADED,
        "retains_above": KEPT,
        "confidence": confidence,
        "caveat": caveat(record),
    }
    result.attrs["sentence"] = _sentence(result)
    return result


_train_length = train_length


def _judge(layer: xr.Dataset, limit: int, largest: Array, confidence: float) -> dict[str, Array]:
    """Values of one layer's heads, (sequence, 1, head)."""
    means, starts, finite = _binned(layer, limit)
    beyond = starts >= limit
    ratio = means[0] / largest
    chosen = means[1:, beyond] if beyond.any() else means[1:]
    live, coherence = (_mean(x) for x in chosen)
    stretches = [_mean(x) for x in _split(ratio[beyond], BINS // 2)]
    low, high = core.bootstrap(np.stack(stretches), confidence) if stretches else (np.nan, np.nan)
    above = (ratio[beyond] > OVERLOADED) | np.isnan(ratio[beyond])
    stays = np.logical_and.accumulate(above[::-1], axis=0)[::-1]
    onset = np.full(largest.shape, np.nan)
    if beyond.any():
        onset = np.where(stays.any(0), starts[beyond][stays.argmax(0)], np.nan)
    full = np.broadcast_to
    mean = _mean(ratio[beyond]) if beyond.any() else np.full(largest.shape, np.nan)
    return {
        "overload_ratio": mean,
        "low": np.array(full(low, largest.shape)),
        "high": np.array(full(high, largest.shape)),
        "live_memories": live,
        "coherence": coherence,
        "onset": np.where(finite & np.isfinite(mean), onset, np.nan),
        "finite": finite,
    }


def _binned(layer: xr.Dataset, limit: int) -> tuple[Array, Array, Array]:
    """Mean norm, live memories, coherence by bin, (3, bin, sequence, 1, head); first tokens; if finite."""
    names = ("log_decay", "write_norm", "state_norm")
    width = max(int(layer["width"].values[0]), limit // BINS, 1)
    before = -(-limit // width)  # a bin begins at the training length
    bins = before + max(0, -(-(int(layer["token"].values[-1]) + 1 - limit) // width))
    shape = (layer.sizes["sequence"], 1, layer.sizes["head"])
    total, count, finite = np.zeros((3, bins, *shape)), np.zeros((3, bins, *shape)), np.ones(shape, bool)
    carry: Any = None
    for block in blocks(layer, names):
        decay, write, norm = (block[n] for n in names)
        memories, carry = core.memories(decay, write, norm, block["last"], block["width"], carry, False)
        at = (block["last"] - limit) // width + before
        cuts = np.flatnonzero(np.diff(at, prepend=-1))
        finite &= np.isfinite(norm).all(2)
        for i, x in enumerate((norm, memories.live, memories.coherence)):
            known = np.isfinite(x)
            total[i, at[cuts]] += np.moveaxis(np.add.reduceat(np.where(known, x, 0), cuts, axis=2), 2, 0)
            count[i, at[cuts]] += np.moveaxis(np.add.reduceat(known.astype(float), cuts, axis=2), 2, 0)
    with np.errstate(invalid="ignore"):
        return total / count, limit + (np.arange(bins) - before) * width, finite


def _split(x: Array, size: int) -> list[Array]:
    """Cut into whole stretches of ``size``; what is left at the end joins the last."""
    pieces = max(1, len(x) // size) if len(x) else 0
    return [x[i * size : (i + 1) * size if i + 1 < pieces else None] for i in range(pieces)]


def _mean(x: Array) -> Array:
    """Mean along the first axis of what is known."""
    known = np.isfinite(x)
    with np.errstate(invalid="ignore"):
        return np.where(known, x, 0).sum(0) / known.sum(0)


def _verdicts(values: dict[str, Array]) -> tuple[Array, Array]:
    evidence = np.where(np.isfinite(values["low"]), values["low"], values["overload_ratio"])
    rank = np.where(values["retention"] > KEPT, 1, 0)
    rank = np.where(evidence > OVERLOADED, 2, rank)
    rank = np.where(values["finite"], rank, 3)
    values["onset"] = np.where(rank == 2, values["onset"], np.nan)
    names = np.array(VERDICTS)
    return names[rank], names[rank.max(2)]


def _sentence(result: xr.Dataset) -> str:
    limit, tokens = result.attrs["train_length"], result.attrs["tokens"]
    heads = result.sizes["layer"] * result.sizes["head"]
    per_head = (result["verdict"] == xr.DataArray(list(VERDICTS), dims="kind")).any("sequence")
    number = dict(zip(VERDICTS, per_head.sum(("layer", "head")).values.tolist(), strict=True))
    read = f"Of {heads} heads, after {tokens:,} tokens (training length {limit:,}),"
    if not result.attrs["complete"]:
        read = f"The record is interrupted. {read}"
    if tokens <= limit:
        rest = f"{number['retains']} keep more than {KEPT:.0%} of a write over the training length"
        return f"{read} none can be called overloaded, as nothing was read beyond it; {rest}."
    worst = result["overload_ratio"].mean("sequence")
    broken = f" {number['not finite']} hold values that are not finite." if number["not finite"] else ""
    if not number["overloaded"]:
        return f"{read} none is overloaded, {number['retains']} retain and the others forget.{broken}"
    at = worst.where(per_head.sel(kind=VERDICTS.index("overloaded"))).argmax(("layer", "head"))
    head = result.isel(at)
    onset = float(head["onset"].median())
    since = f", from token {onset:,.0f} on" if np.isfinite(onset) else ""
    count = number["overloaded"]
    return (
        f"{read} {count} {'is' if count == 1 else 'are'} overloaded, worst layer"
        f" {int(head['layer'])}, head {int(head['head'])}: its state is {float(worst.isel(at)):.2f} times the"
        f" largest of training{_interval(head)}{since}.{broken}"
    )


def _interval(head: xr.Dataset) -> str:
    low, high = float(head["low"].mean()), float(head["high"].mean())
    return f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
