"""What the state at a probe is made of."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import xarray as xr

from statescope.analyses.blocks import BLOCK_NUMBERS, Array, group
from statescope.schema import PER_PROBE


def share_of(record: xr.DataTree, start: int, stop: int) -> xr.DataArray:
    r"""What the tokens from ``start`` to ``stop - 1`` make up of the state's energy at every probe.

    .. math:: \sum_{i=start}^{stop-1} \frac{\langle S_t, e^{G_t - G_i} U_i \rangle}{|S_t|^2}

    Parameters
    ----------
    record : DataTree
        A record with probes.
    start, stop : int
        First token, and the one after the last.

    Returns
    -------
    DataArray, (sequence, layer, probe, head)
        The sum of their signed shares; over all tokens it is 1. Tokens after the probe have none; NaN where
        some are further back than the probe's reach.

    Notes
    -----
    Trouble: what must be recalled makes up next to nothing in every head. Source: derived.
    """
    return sum_over(record, "share", between(record, start, stop), f"share of tokens {start} to {stop - 1}")


def contribution_of(record: xr.DataTree, start: int, stop: int) -> xr.DataArray:
    r"""What is left of the writes from ``start`` to ``stop - 1`` at every probe, if they were orthogonal.

    .. math:: \Big( \sum_{i=start}^{stop-1} e_i^2 \Big)^{1/2}, \qquad e_i = e^{G_t - G_i} |U_i|

    Parameters
    ----------
    record : DataTree
        A record with probes.
    start, stop : int
        First token, and the one after the last.

    Returns
    -------
    DataArray, (sequence, layer, probe, head)
        In the state's unit; NaN where some tokens are further back than the probe's reach.

    Notes
    -----
    Trouble: small beside the state's norm at the probe, in every head: what must be recalled is drowned.
    Source: derived.
    """
    label = f"surviving writes of tokens {start} to {stop - 1}"
    chosen = between(record, start, stop)
    energy = sum_over(record, "contribution", chosen, label, np.square)
    return (
        energy.copy(data=np.sqrt(energy.values))
        .rename("contribution")
        .assign_attrs(long_name=label, units="1")
    )


def probe_reach(record: xr.DataTree, recent: int = 64) -> xr.Dataset:
    r"""How far back the state at a probe reaches, by what is left of every write.

    .. math::

        \text{distance} = \frac{\sum_i (t - i) e_i}{\sum_i e_i}, \qquad
        \text{recency} = \frac{\sum_{i > t - n} e_i}{\sum_i e_i}, \qquad e_i = e^{G_t - G_i} |U_i|

    Parameters
    ----------
    record : DataTree
        A record whose probes reach back to the start of the text.
    recent : int
        :math:`n`, how many tokens count as recent, the probe included.

    Returns
    -------
    Dataset, (sequence, layer, probe, head)
        ``distance`` in tokens; ``recency``, between 0 and 1; ``recent_share``, the signed share of the same
        recent tokens in the state's energy.

    Notes
    -----
    Trouble: a recency near 1 in every head (nothing else is left to read), or near 0 far beyond the training
    length (what was just read does not count). DeciMamba's mean distance (arXiv 2406.14528) and RecurFormer's
    recency ratio have the same form with ``|M_ti|`` in the place of :math:`e_i`, which weighs a token by how
    it is read (:func:`statescope.analyses.mean_distance`); this is how it is stored.
    """
    total = sum_over(record, "contribution", lambda t, p: t <= p, "")
    moment = sum_over(record, "contribution", lambda t, p: t <= p, "", weight=lambda t, p: p - t)
    near = sum_over(record, "contribution", lambda t, p: (t <= p) & (t > p - recent), "")
    share = sum_over(record, "share", lambda t, p: (t <= p) & (t > p - recent), "")
    labels = {
        "distance": ("mean distance of what the state holds", "token"),
        "recency": (f"part left by the last {recent} tokens", "1"),
        "recent_share": (f"share of the last {recent} tokens", "1"),
    }
    values = (moment / total, near / total, share)
    return xr.Dataset(
        {
            n: v.assign_attrs(long_name=a, units=b)
            for (n, (a, b)), v in zip(labels.items(), values, strict=True)
        }
    )


Choice = Callable[[Array, Array], Array]
"""Which tokens (first argument, a column) are meant at which probes (second, a row)."""


def probe_variable(record: xr.DataTree, name: str) -> xr.DataArray:
    """Return a variable of ``/probes``, lazily.

    Raises
    ------
    ValueError
        If there are no probes, or the record was made before they held this; says what to do.
    """
    probes = group(record, "probes")
    if name not in probes:
        raise ValueError(f"record has no probes/{name}: it was made before these were kept; trace again")
    return probes[name]


def reach_of(record: xr.DataTree) -> int:
    """How many tokens, up to and including the probe, are attributed to."""
    return int(json.loads(record.attrs["watch"])["reach"])


def between(record: xr.DataTree, start: int, stop: int) -> Choice:
    """Choose the tokens from ``start`` to ``stop - 1``, up to each probe."""
    tokens = int(record.attrs["tokens"])
    if not 0 <= start < stop <= tokens:
        raise ValueError(f"start={start}, stop={stop}; expected 0 <= start < stop <= {tokens}")
    return lambda t, p: (t >= start) & (t < stop) & (t <= p)


def sum_over(
    record: xr.DataTree,
    name: str,
    choice: Choice,
    long_name: str,
    of: Callable[[Array], Array] = np.asarray,
    weight: Choice = lambda t, p: np.ones(1),
) -> xr.DataArray:
    """Sum over the tokens a choice names; NaN where one of them has no value: none is left out in silence."""
    variable, reach = probe_variable(record, name).transpose(*PER_PROBE), reach_of(record)
    probes = variable["probe"].values[None]
    total: Array = np.zeros([variable.sizes[d] for d in PER_PROBE if d != "token"])
    size = max(1, BLOCK_NUMBERS // max(1, total.size))
    for start in range(0, variable.sizes["token"], size):
        part = variable.isel(token=slice(start, start + size))
        tokens = part["token"].values[:, None]
        chosen = np.broadcast_to(choice(tokens, probes), (len(tokens), probes.size))
        if not chosen.any():
            continue
        known = tokens > probes - reach
        factor = np.where(chosen, np.where(known, weight(tokens, probes), np.nan), 0).T[:, :, None]
        values = of(part.values.astype(np.float64))
        total += np.where(factor == 0, 0, values * factor).sum(3)
    dims = [d for d in PER_PROBE if d != "token"]
    coords = {d: variable[d] for d in dims}
    return xr.DataArray(total, coords, dims, name, {"long_name": long_name, "units": "1"})
