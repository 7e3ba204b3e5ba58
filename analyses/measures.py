"""Measures of a record. Each takes what ``statescope.open`` returns and gives labelled arrays."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def retention(record: xr.DataTree, token: int, at: int) -> xr.DataArray:
    r"""How much of what a token wrote is left, per layer and head.

    .. math:: \alpha_{i:t} = \exp \sum_{s=i+1}^{t} g_s

    Parameters
    ----------
    record : DataTree
        A record; windows must end at both tokens.
    token, at : int
        The writing token ``i`` and the later token ``t``.

    Returns
    -------
    DataArray, (sequence, layer, head)
        Between 0 (forgotten) and 1 (kept whole). Near 1 over the whole training length, for many heads,
        is the trouble the paper describes: nothing is ever forgotten.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), eq. 6 (whose printed product starts at 1, a misprint).
    """
    log_decay = record["steps"]["log_decay"]
    for name, position in (("token", token), ("at", at)):
        if position not in log_decay["token"]:
            raise ValueError(f"{name}={position} is no recorded token (the end of a window)")
    between = (log_decay["token"] > token) & (log_decay["token"] <= at)
    total = log_decay.isel(token=between.values).astype("float64").sum("token")
    kept: xr.DataArray = xr.apply_ufunc(np.exp, total)
    return kept.rename("retention").assign_attrs(long_name=f"retention of token {token} at {at}", units="1")


def overload_ratio(record: xr.DataTree, train_length: int | None = None) -> xr.DataArray:
    r"""How far a state has outgrown what it was trained with.

    .. math:: |S_t| \,/\, \max_{s \le T_{train}} |S_s|

    Parameters
    ----------
    record : DataTree
        A record longer than the training length.
    train_length : int, optional
        :math:`T_{train}` in tokens. Default: the record's own.

    Returns
    -------
    DataArray, (sequence, layer, token, head)
        Above 1 only beyond the training length; well above 1 is a state the model has never seen.
    """
    norm = record["steps"]["state_norm"]
    limit = _train_length(record, train_length)
    inside = norm.isel(token=(norm["token"] < limit).values).max("token")
    return (norm / inside).rename("overload_ratio").assign_attrs(long_name="overload ratio", units="1")


def live_memories(record: xr.DataTree) -> xr.DataArray:
    r"""How many writes a state effectively holds (participation number of what survives).

    .. math:: N_{eff}(t) = \frac{(\sum_i e_i)^2}{\sum_i e_i^2}, \qquad e_i = e^{G_t - G_i} |U_i|

    Parameters
    ----------
    record : DataTree
        A record with ``window=1``.

    Returns
    -------
    DataArray, (sequence, layer, token, head)
        From 1 (one write dominates) upwards. Above ``min(key, value)`` there are more live memories than
        orthogonal directions to hold them apart.
    """
    steps = record["steps"].to_dataset()
    if steps.sizes["token"] and int(steps["token"][0]) != 0:
        raise ValueError("live_memories needs a record with window=1")
    decay, write = np.exp(steps["log_decay"]), steps["write_norm"]
    total = xr.apply_ufunc(
        _accumulate, decay, write, input_core_dims=[["token"]] * 2, output_core_dims=[["token"]]
    )
    square = xr.apply_ufunc(
        _accumulate, decay**2, write**2, input_core_dims=[["token"]] * 2, output_core_dims=[["token"]]
    )
    count = (total**2 / square).transpose(*write.dims)
    return count.rename("live_memories").assign_attrs(long_name="live memories", units="1")


def share_of(record: xr.DataTree, start: int, stop: int) -> xr.DataArray:
    """What the tokens from ``start`` to ``stop - 1`` make up of the state's energy at every probe.

    Returns
    -------
    DataArray, (sequence, layer, probe, head)
        The sum of their signed shares.
    """
    share = record["probes"]["share"]
    chosen = (share["token"] >= start) & (share["token"] < stop)
    return share.isel(token=chosen.values).sum("token").rename("share").assign_attrs(units="1")


def _accumulate(decay: NDArray[np.float32], amount: NDArray[np.float32]) -> NDArray[np.float64]:
    """Run ``x_t = decay_t x_{t-1} + amount_t`` along the last axis."""
    out = np.empty(amount.shape, dtype=np.float64)
    x = np.zeros(amount.shape[:-1])
    for t in range(amount.shape[-1]):
        x = decay[..., t] * x + amount[..., t]
        out[..., t] = x
    return out


def _train_length(record: xr.DataTree, given: int | None) -> int:
    length = given or record.attrs.get("train_length")
    if not length:
        raise ValueError("train_length is not in the record; pass it")
    return int(length)
