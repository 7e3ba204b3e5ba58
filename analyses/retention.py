"""How long a state keeps what is written into it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import Array, Block, blocks, by_layer, caveat, map_tokens, steps
from statescope.analyses.blocks import train_length as resolve

KEPT = 1 / math.e
"""A head that keeps more than this of a write over the training length is global: its time constant is longer
than anything it was trained on, so that within training it never had to forget."""

DECADES = np.linspace(-8, 1, 901)
"""Edges of the bins, in powers of ten of the log decay's size, in which time scales are counted."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def retention(record: xr.DataTree, token: int, at: int | None = None) -> xr.DataArray:
    r"""How much of what a token wrote is left, per layer and head.

    .. math:: \alpha_{i:t} = \exp \sum_{s=i+1}^{t} g_s

    Parameters
    ----------
    record : DataTree
        A record; windows must end at both tokens. Exact for any window.
    token : int
        The writing token :math:`i`.
    at : int, optional
        The later token :math:`t`. Default: every one.

    Returns
    -------
    DataArray, (sequence, layer, head), or (sequence, layer, token, head) without ``at``
        Between 0 (forgotten) and 1 (kept whole).

    Notes
    -----
    Trouble: near 1 over the whole training length, for many heads: nothing is ever forgotten. It is that of
    the decay: where keys or entries decay at their own rates, of its mean in nat; what a model erases is left
    out (``attrs["caveat"]`` says so; :func:`statescope.analyses.contribution_of` counts all of it). Source:
    *Stuffed Mamba* (arXiv 2410.07145), eq. 6 (whose printed product starts at 1, a misprint).
    """
    found = steps(record)
    for name, position in (("token", token), ("at", at)):
        if position is not None and position not in found["token"]:
            raise ValueError(f"{name}={position} is no recorded token (the end of a window)")
    if at is not None and at < token:
        raise ValueError(f"at={at} is before token={token}")
    start = int(np.searchsorted(found["token"], token))
    label = f"retention of token {token}" + ("" if at is None else f" at {at}")
    if at is not None:
        between = found.isel(token=slice(start + 1, int(np.searchsorted(found["token"], at)) + 1))
        sums = [sum(b["log_decay"].sum(2) for b in blocks(x, ("log_decay",))) for x in by_layer(between)]
        dims = ("sequence", "layer", "head")
        shape = tuple(found.sizes[d] for d in dims)
        total = np.concatenate([np.broadcast_to(s, (shape[0], 1, shape[2])) for s in sums], axis=1)
        kept = xr.DataArray(np.exp(total), {d: found[d] for d in dims}, dims, "retention")
        return kept.assign_attrs(long_name=label, units="1", caveat=caveat(record))

    def decay(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        later = (block["last"] > token)[:, None]
        (total,), carry = core.cumulative(np.where(later, block["log_decay"], 0.0), carry)
        return (np.exp(total),), carry

    curve = map_tokens(
        found.isel(token=slice(start, None)), ("log_decay",), decay, {"retention": (label, "1")}
    )
    return curve["retention"].assign_attrs(caveat=caveat(record))


def time_scales(record: xr.DataTree) -> xr.Dataset:
    r"""How fast every head forgets, and how much that varies.

    .. math::

        \text{half-life} = \frac{\ln 2}{-\overline{g}}, \quad
        \text{horizon} = \frac{1}{1 - \overline{\alpha}}, \quad
        \text{variation} = \frac{\operatorname{std} g}{-\overline{g}}, \quad \tau_t = \frac{1}{1 - \alpha_t}

    Parameters
    ----------
    record : DataTree
        A record. With ``window=w`` the half-life stays exact; the others are those of the mean decay of every
        window, which varies less.

    Returns
    -------
    Dataset
        ``half_life`` and ``horizon`` in tokens and ``gate_variation``, (sequence, layer, head);
        ``time_scale``, the quantiles of :math:`\tau_t` over the tokens, to 2.5 %, (sequence, layer, head,
        quantile); and ``count``, how many tokens have a time scale around each ``tau``, (..., tau).

    Notes
    -----
    Trouble: a half-life above the training length in many heads. A variation near 0 says that the head
    forgets at a fixed rate, whatever it reads. Entries that are not finite are left out. Sources: *Stuffed
    Mamba* (arXiv 2410.07145), section 4, for the decay; *Reanalysis of Time Scale Representation* (2021) for
    the time scale :math:`1/(1 - \alpha)`.
    """
    found = steps(record)
    sums, counts = zip(*(_decay_statistics(layer) for layer in by_layer(found)), strict=True)
    n, g, gg, alpha = np.concatenate(sums, axis=2)
    count = np.concatenate(counts, axis=1)
    dims = ("sequence", "layer", "head")
    coords = {d: found[d] for d in dims}
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = g / n
        half_life, horizon = np.log(2) / -mean, 1 / (1 - alpha / n)
        variation = np.sqrt(np.maximum(gg / n - mean**2, 0)) / -mean
    taus = _tau(10**DECADES)[::-1]
    counted = count[..., ::-1]
    quantiles = np.stack([_quantile(counted, taus, q) for q in QUANTILES], axis=-1)

    def label(data: Array, *extra: str, long_name: str, units: str) -> xr.DataArray:
        return xr.DataArray(data, coords, (*dims, *extra), attrs={"long_name": long_name, "units": units})

    return xr.Dataset(
        {
            "half_life": label(half_life, long_name="half-life of a write", units="token"),
            "horizon": label(horizon, long_name="horizon of the mean decay", units="token"),
            "gate_variation": label(variation, long_name="variation of the log decay", units="1"),
            "time_scale": label(quantiles, "quantile", long_name="time scale of the decay", units="token"),
            "count": label(counted, "tau", long_name="tokens by time scale of their decay", units="token"),
        }
    ).assign_coords(
        quantile=("quantile", list(QUANTILES)),
        tau=("tau", np.sqrt(taus[1:] * taus[:-1]), {"long_name": "time scale", "units": "token"}),
    )


def head_reach(record: xr.DataTree, train_length: int | None = None, threshold: float = KEPT) -> xr.Dataset:
    r"""Which heads are global: they keep over the training length what others forget.

    .. math:: R = \exp \Big( T_{train}\, \overline{g} \Big) > \theta

    Parameters
    ----------
    record : DataTree
        A record. Exact for any window.
    train_length : int, optional
        :math:`T_{train}` in tokens. Default: the record's own.
    threshold : float
        :math:`\theta`; default 1/e.

    Returns
    -------
    Dataset, (sequence, layer, head)
        ``retention`` over the training length at the head's mean log decay (the geometric mean over where
        the write stands), and ``is_global``.

    Notes
    -----
    Trouble: global heads hold all there is of the distant past, and they alone can be overloaded; none at
    all means that nothing from further back can be read. Source: *LongMamba* (arXiv 2504.16053), whose
    threshold is tuned for each model; ours is the time constant :math:`T_{train}`.
    """
    length = resolve(record, train_length)
    half_life = time_scales(record)["half_life"]
    kept: xr.DataArray = np.exp(-np.log(2) * length / half_life)
    attrs = {"long_name": f"retention over {length} tokens", "units": "1"}
    is_global = (kept > threshold).assign_attrs(long_name=f"keeps more than {threshold:.3g}", units="1")
    found = {"retention": kept.assign_attrs(attrs), "is_global": is_global}
    return xr.Dataset(found, attrs={"caveat": caveat(record)})


def _decay_statistics(layer: xr.Dataset) -> tuple[Array, Array]:
    """Sums of 1, g, g^2, alpha over tokens, (4, sequence, 1, head); tokens by bin of the decay."""
    shape = (layer.sizes["sequence"], 1, layer.sizes["head"])
    total, count = np.zeros((4, *shape)), np.zeros((int(np.prod(shape)), len(DECADES) - 1))
    for block in blocks(layer, ("log_decay",)):
        width = block["width"][:, None].astype(float)
        g = block["log_decay"] / width
        known = np.isfinite(g)
        g = np.where(known, np.maximum(g, core.FORGOTTEN), 0)
        n = known * width
        total += np.stack([x.sum(2) for x in (n, n * g, n * g**2, n * np.exp(g))])
        place = np.log10(np.maximum(-g, 10 ** DECADES[0]))
        at = np.clip(((place - DECADES[0]) / (DECADES[1] - DECADES[0])).astype(int), 0, count.shape[1] - 1)
        for i, (row, weight) in enumerate(
            zip(
                np.moveaxis(at, 2, -1).reshape(len(count), -1),
                np.moveaxis(n, 2, -1).reshape(len(count), -1),
                strict=True,
            )
        ):
            count[i] += np.bincount(row, weight, count.shape[1])
    return total, count.reshape(*shape, -1)


def _tau(rate: Array) -> Array:
    return -1 / np.expm1(-rate)


def _quantile(count: Array, edges: Array, q: float) -> Array:
    """Quantile of what was counted between increasing edges, along the last axis."""
    total = count.sum(-1, keepdims=True)
    at = (np.cumsum(count, -1) < q * total).sum(-1)
    middle = np.sqrt(edges[1:] * edges[:-1])
    return np.where(total[..., 0] > 0, middle[np.minimum(at, len(middle) - 1)], np.nan)
