"""From millions of tokens to the few hundred points that a panel can show, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from statescope.analyses.blocks import Array, Block, Labels, blocks, by_layer, steps

BINS = 200
"""Points of a curve."""

LONG = 32
"""A text of more training lengths than this is drawn on a logarithmic axis of tokens."""

Measure = Callable[[Block, Any], tuple[tuple[Array, ...], Any]]


def is_long(record: xr.DataTree, length: int | None) -> bool:
    """Whether the training length would be squeezed into the edge of the panel."""
    return length is not None and int(steps(record)["token"][-1]) + 1 > LONG * length


def scale_tokens(ax: Axes, record: xr.DataTree, length: int | None) -> None:
    """Scale and label the axis of tokens."""
    if is_long(record, length):
        ax.set_xscale("log")
    ax.set_xlabel("token")
    ax.margins(x=0.01)


def binned(
    record: xr.DataTree,
    names: tuple[str, ...],
    measure: Measure,
    labels: Labels,
    length: int | None = None,
    scale: xr.DataArray | None = None,
) -> xr.Dataset:
    """Average measures of ``/steps`` over sequences and bins of tokens; values not finite are left out.

    Parameters
    ----------
    record : DataTree
        A record; of any length, as one block is held at a time.
    names, measure, labels
        As for :func:`statescope.analyses.blocks.map_tokens`.
    length : int, optional
        Training length; a text much longer is binned evenly in the logarithm.
    scale : DataArray, (sequence, layer, head), optional
        What every measure is divided by.

    Returns
    -------
    Dataset, (layer, token, head)
        ``token`` is the mean of those in the bin.
    """
    found = steps(record)
    last = found["token"].values
    at = _places(last, is_long(record, length))
    heads, layers = found.sizes["head"], found.sizes["layer"]
    total = np.zeros((len(labels), layers, at[-1] + 1, heads))
    count = np.zeros(total.shape)
    for i, layer in enumerate(by_layer(found)):
        over = 1.0 if scale is None else scale.values[:, i : i + 1, None]
        carry, start = None, 0
        for block in blocks(layer, names):
            parts, carry = measure(block, carry)
            here = at[start : start + len(block["last"])]
            cuts = np.flatnonzero(np.diff(here, prepend=-1))
            start += len(here)
            for k, part in enumerate(parts):
                part = part / over
                known = np.isfinite(part)
                for sums, x in ((total, np.where(known, part, 0)), (count, known.astype(float))):
                    sums[k, i, here[cuts]] += np.add.reduceat(x, cuts, axis=2).sum((0, 1))
    with np.errstate(invalid="ignore"):
        means = total / count
    token = np.bincount(at, last) / np.bincount(at)
    coords = {"layer": found["layer"], "token": ("token", token), "head": found["head"]}
    return xr.Dataset(
        {
            name: (("layer", "token", "head"), mean, {"long_name": long_name, "units": units})
            for (name, (long_name, units)), mean in zip(labels.items(), means, strict=True)
        },
        coords,
    )


def _places(last: Array, logarithmic: bool) -> Array:
    """Number of each entry's bin; none is empty."""
    if len(last) <= BINS:
        return np.arange(len(last))
    if not logarithmic:
        return np.arange(len(last)) * BINS // len(last)
    where = np.log1p(last)
    raw = (BINS * (where - where[0]) / (where[-1] - where[0])).astype(int)
    return np.unique(np.minimum(raw, BINS - 1), return_inverse=True)[1]
