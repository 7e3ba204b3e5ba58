"""What is left of a needle at the question, and what lies over it: measures of a record, per head."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from statescope.analyses.attention import bound_interference
from statescope.analyses.probes import probe_variable
from statescope.analyses.state import overload_ratio

MEASURES = {
    "log_retention": "log retention at the question of what the needle's last token wrote",
    "log_contribution": "log norm of what survives of the needle's writes at the question",
    "share": "share of the needle in the state's energy at the question",
    "log_live_memories": "log number of writes after the needle that the state effectively holds",
    "log_interference": "log ratio of the norm of all other surviving writes to that of the needle's",
    "output_share": "share of the needle in what the question reads of the state",
    "log_output_interference": "log ratio of what the question reads of all else to that of the needle",
    "log_overload": "log ratio of the state's norm at the question to its largest inside the training length",
    "log_state_norm": "log norm of the state at the question",
}
"""What :func:`needle_measures` gives."""

SMALLEST = 1e-30
"""Norms below count as this one, so that logs are finite."""


def needle_measures(
    record: xr.DataTree,
    starts: Sequence[int],
    stops: Sequence[int],
    train_length: int | None = None,
) -> xr.Dataset:
    r"""Take the states at the question apart into needle and all else.

    .. math:: e_i = e^{G_t - G_i} |U_i|, \quad
        \text{contribution}^2 = \sum_{i \in needle} e_i^2, \quad
        \text{interference}^2 = \frac{\sum_{i \notin needle} e_i^2}{\sum_{i \in needle} e_i^2}, \quad
        \text{live memories} = \frac{(\sum_{i > needle} e_i)^2}{\sum_{i > needle} e_i^2}, \quad
        \text{output interference} =
        \frac{|\sum_{i \notin needle} M_{ti} v_i|}{|\sum_{i \in needle} M_{ti} v_i|}

    with :math:`t` the last token, :math:`G` the running sum of the log decay, :math:`|U_i|` the norm of
    a write and :math:`M_{ti}` the question's implicit attention. Norms are added as if writes, and parts of
    the output, were orthogonal; ``share`` and ``output_share``, which are signed, need no such assumption.

    Parameters
    ----------
    record : DataTree
        A record with ``window=1`` and a probe at its last token, of one prompt a sequence.
    starts, stops : sequence of int
        By sequence: the needle's first token, and the first one after it.
    train_length : int, optional
        Training length in tokens, for the overload. Default: the record's own.

    Returns
    -------
    Dataset, (sequence, layer, head)
        :data:`MEASURES`. All but the shares are natural logs, in nat, and finite whatever has decayed.

    Raises
    ------
    ValueError
        If the record is windowed, is not probed at its end, was made before probes kept what their query
        reads, or a needle does not lie within it before the last token.

    Notes
    -----
    Source: retention and interference after *Stuffed Mamba* (arXiv 2410.07145), eqs. 6 and 7. There the query
    weighs the memories: that is the output interference (:func:`statescope.analyses.interference`, which also
    bounds it); the other is that of the memories as they are stored.
    """
    steps = record["steps"].to_dataset()
    tokens = steps.sizes["token"]
    _check(record, starts, stops)
    position = xr.DataArray(np.arange(tokens), dims="token")
    start, stop = (xr.DataArray(np.asarray(s), dims="sequence") for s in (starts, stops))
    needle, after = (position >= start) & (position < stop), position >= stop

    log_decay = steps["log_decay"].drop_vars("token").astype("float64")
    since = log_decay.sum("token") - log_decay.cumsum("token")  # decay after each token, up to the last
    survives = since + _log(steps["write_norm"].drop_vars("token"))
    mine, others, later = (_log_sum(2 * survives, where) for where in (needle, ~needle, after))
    share, output_share, part, output = (
        probe_variable(record, name).isel(probe=-1, drop=True).astype("float64")
        for name in ("share", "output_share", "output_contribution", "output_norm")
    )
    share, output_share, part = (x.drop_vars("token").where(needle, 0.0) for x in (share, output_share, part))
    read = output_share.sum("token")
    sums = xr.broadcast(read, part.sum("token") / output, (part**2).sum("token") / output**2)
    norm = steps["state_norm"].isel(token=-1, drop=True)
    measures: dict[Hashable, Any] = {
        "log_retention": log_decay.where(after, 0.0).sum("token"),
        "log_contribution": mine / 2,
        "share": share.sum("token"),
        "log_live_memories": 2 * _log_sum(survives, after) - later,
        "log_interference": (others - mine) / 2,
        "output_share": read,
        "log_output_interference": _log(
            read.copy(data=bound_interference(*(x.values for x in sums))[0]).clip(max=1 / SMALLEST)
        ),
        "log_overload": _log(overload_ratio(record, train_length).isel(token=-1, drop=True)),
        "log_state_norm": _log(norm),
    }
    table = xr.Dataset({name: values.transpose(*norm.dims) for name, values in measures.items()})
    for name, about in MEASURES.items():
        table[name].attrs = {"long_name": about, "units": "nat" if name.startswith("log_") else "1"}
    return table


def _check(record: xr.DataTree, starts: Sequence[int], stops: Sequence[int]) -> None:
    steps = record["steps"].to_dataset()
    tokens, sequences = steps.sizes["token"], steps.sizes["sequence"]
    last = int(steps["token"][-1])
    if tokens != last + 1:
        raise ValueError("needle_measures needs a record with window=1")
    if "probes" not in record or int(record["probes"].to_dataset()["probe"][-1]) != last:
        raise ValueError("needle_measures needs a probe at the last token; trace with probes=[-1]")
    if len(starts) != sequences or len(stops) != sequences:
        raise ValueError(
            f"starts and stops have {len(starts)} and {len(stops)} entries; expected {sequences}"
        )
    for start, stop in zip(starts, stops, strict=True):
        if not 0 <= start < stop < tokens:
            raise ValueError(
                f"starts and stops name a needle at {start} to {stop}; the text has {tokens} tokens"
            )


def _log(values: Any) -> xr.DataArray:
    logs: xr.DataArray = xr.apply_ufunc(np.log, values.astype("float64").clip(SMALLEST))
    return logs


def _log_sum(logs: xr.DataArray, where: xr.DataArray) -> xr.DataArray:
    """Log of the sum of exponentials along the tokens, without overflow; -inf becomes a very small number."""

    def core(x: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        x = np.where(mask, x, -np.inf)
        top = x.max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 2 * np.log(SMALLEST))
        total = np.exp(x - top).sum(-1)
        return np.asarray(top[..., 0] + np.log(np.maximum(total, SMALLEST)))

    summed: xr.DataArray = xr.apply_ufunc(core, logs, where, input_core_dims=[["token"]] * 2)
    return summed
