"""What whole states look like, where a record kept them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import Array, group

PER_SNAPSHOT = ("sequence", "layer", "position", "head")


def state_extremes(record: xr.DataTree) -> xr.Dataset:
    r"""Largest entry of every kept state, and how many of its entries are not finite.

    .. math:: \max_{kv} |S_{kv}|, \qquad \#\{S_{kv} \text{ not finite}\}

    Parameters
    ----------
    record : DataTree
        A record with snapshots.

    Returns
    -------
    Dataset, (sequence, layer, position, head)
        ``largest`` of the finite entries, in the state's unit, and ``nonfinite``, a count.

    Notes
    -----
    Trouble: any entry that is not finite; a largest entry above 65504, where float16 ends. Source:
    *Stuffed Mamba* (arXiv 2410.07145), section 4.
    """

    def extremes(state: Array) -> tuple[Array, ...]:
        finite = np.isfinite(state)
        return np.abs(np.where(finite, state, 0)).max((-2, -1)), (~finite).sum((-2, -1))

    labels = {"largest": ("largest entry of the state", "1"), "nonfinite": ("entries not finite", "1")}
    return _per_state(record, extremes, labels)


def state_outliers(record: xr.DataTree, top: int = 1) -> xr.Dataset:
    r"""How much of a state's energy sits in a few channels.

    .. math::

        \frac{\sum_{c \in \text{top } k} E_c}{\sum_c E_c}, \quad
        E_c = \sum S_{kv}^2 \text{ over row or column } c,
        \qquad \text{kurtosis} = \frac{\overline{(S - \mu)^4}}{\sigma^4} - 3

    Parameters
    ----------
    record : DataTree
        A record with snapshots.
    top : int
        How many channels.

    Returns
    -------
    Dataset, (sequence, layer, position, head)
        ``key_share`` and ``value_share``, of the largest rows and columns, between ``top`` over their number
        (spread evenly) and 1; ``kurtosis``, 0 for a normal distribution.

    Notes
    -----
    Trouble: a share near 1, a kurtosis that grows with the position: few channels explode, as in *Stuffed
    Mamba* (arXiv 2410.07145), figure 6. NaN where a state is not finite, or zero.
    """

    def outliers(state: Array) -> tuple[Array, ...]:
        energy = state**2
        total = energy.sum((-2, -1))
        shares = [np.sort(energy.sum(axis), -1)[..., ::-1][..., :top].sum(-1) / total for axis in (-1, -2)]
        centred = (state - state.mean((-2, -1), keepdims=True)) ** 2
        return *shares, (centred**2).mean((-2, -1)) / centred.mean((-2, -1)) ** 2 - 3

    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top={top!r}; expected a number of channels, 1 or more")
    labels = {
        "key_share": (f"energy in the {top} largest rows", "1"),
        "value_share": (f"energy in the {top} largest columns", "1"),
        "kurtosis": ("excess kurtosis of the state's entries", "1"),
    }
    return _per_state(record, outliers, labels)


def state_rank(record: xr.DataTree, eps: float = 0.01) -> xr.Dataset:
    r"""How many directions every kept state uses.

    .. math::

        \frac{|S|_F^2}{|S|_2^2}, \quad \#\{\sigma_i > \epsilon \sigma_1\}, \quad \sum_i \sigma_i, \quad
        \exp \Big( - \sum_i p_i \ln p_i \Big), \; p_i = \frac{\sigma_i}{\sum_j \sigma_j}

    Parameters
    ----------
    record : DataTree
        A record with snapshots.
    eps : float
        Singular values below this part of the largest do not count.

    Returns
    -------
    Dataset, (sequence, layer, position, head)
        ``stable_rank``; ``rank``, a count; ``nuclear_norm`` in the state's unit; ``effective_rank``; and
        ``utilisation``, the rank over ``min(key, value)``. NaN where a state is not finite, or zero.

    Notes
    -----
    Trouble: a utilisation of 1 (no direction is left for what comes) or a stable rank near 1 (one direction
    drowns the rest). The effective rank has the form of the effective state size of arXiv 2504.19561, but
    of the state itself; that one is of the operator's blocks
    (:func:`statescope.analyses.effective_state_size`). Sources: arXiv 2602.04852 and 2602.02195 (rank
    utilisation); Roy and Vetterli (2007) for the effective rank.
    """

    def ranks(state: Array) -> tuple[Array, ...]:
        sigma = core.singular_values(state)
        sigma = np.where(sigma[..., :1] > 0, sigma, np.nan)
        count, effective = core.ranks(sigma, eps)
        stable = (sigma**2).sum(-1) / sigma[..., 0] ** 2
        return stable, count, sigma.sum(-1), effective, count / sigma.shape[-1]

    labels = {
        "stable_rank": ("stable rank", "1"),
        "rank": (f"singular values above {eps:g} of the largest", "1"),
        "nuclear_norm": ("nuclear norm", "1"),
        "effective_rank": ("effective rank", "1"),
        "utilisation": ("rank over min(key, value)", "1"),
    }
    return _per_state(record, ranks, labels)


def _per_state(
    record: xr.DataTree, function: Callable[[Array], tuple[Array, ...]], labels: Mapping[str, tuple[str, str]]
) -> xr.Dataset:
    """Apply a function of states, (..., key, value), to the snapshots one by one."""
    state = group(record, "snapshots")["state"].transpose(*PER_SNAPSHOT, "key", "value")
    shape = tuple(state.sizes[d] for d in PER_SNAPSHOT)
    results = [np.empty(shape) for _ in labels]
    for layer, position in np.ndindex(shape[1], shape[2]):
        one = state.isel(layer=layer, position=position).values.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for result, value in zip(results, function(one), strict=True):
                result[:, layer, position] = value
    coords = {d: state[d] for d in PER_SNAPSHOT}
    return xr.Dataset(
        {
            name: xr.DataArray(data, coords, PER_SNAPSHOT, attrs={"long_name": long_name, "units": units})
            for (name, (long_name, units)), data in zip(labels.items(), results, strict=True)
        }
    )
