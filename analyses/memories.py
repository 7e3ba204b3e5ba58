"""What a state effectively holds: how many writes, how old, and whether they are in each other's way."""

from __future__ import annotations

from typing import Any

import xarray as xr

from statescope.analyses import core
from statescope.analyses.blocks import Array, Block, caveat, map_tokens, state_shape, steps

LABELS = {
    "live_memories": ("live memories", "1"),
    "coherence": ("coherence of the live memories", "1"),
    "age": ("mean age of the live memories", "token"),
}


def memories(record: xr.DataTree, shape: tuple[int, int] | None = None) -> xr.Dataset:
    r"""Count, weigh and date the writes a state still holds, at every token.

    .. math::

        N_{eff} = \frac{(\sum_i e_i)^2}{\sum_i e_i^2}, \quad \text{load} = \frac{N_{eff}}{\min(K, V)}, \quad
        \text{coherence} = \frac{|S_t|^2}{\sum_i e_i^2}, \quad
        \text{age} = \frac{\sum_i (t - i) e_i}{\sum_i e_i}, \qquad e_i = e^{G_t - G_i} |U_i|

    Parameters
    ----------
    record : DataTree
        A record. Exact with ``window=1``; with longer windows, as if the tokens of a window wrote equally
        much and forgot equally fast.
    shape : (int, int), optional
        Key and value size, :math:`K` and :math:`V`. Default: the record's own.

    Returns
    -------
    Dataset, (sequence, layer, token, head)
        ``live_memories``, from 1 (one write dominates) upwards, 0 where nothing was written; ``load``;
        ``coherence``: 1 if writes are orthogonal, above 1 if they pile up, below if they cancel; ``age`` in
        tokens.

    Notes
    -----
    Trouble: a load above 1 (more live memories than orthogonal directions to hold them apart) that goes on
    growing; an age that grows with the text instead of settling; a coherence that grows: one direction takes
    the state over. What survives is that of the decay alone (``attrs["caveat"]`` says what that leaves out).
    After a token that is not finite, everything is NaN, as the state is. The age weighs
    tokens by what is left of their writes; DeciMamba's mean distance (arXiv 2406.14528) weighs them by what
    the query reads (:func:`statescope.analyses.mean_distance`). Source: derived.
    """
    key, value = state_shape(record, shape)
    found = _memories(record, ("live_memories", "coherence", "age"))
    load = (found["live_memories"] / min(key, value)).assign_attrs(
        long_name="live memories over directions", units="1"
    )
    return found.assign(load=load).assign_attrs(caveat=caveat(record))


def live_memories(record: xr.DataTree) -> xr.DataArray:
    r"""How many writes a state effectively holds (participation number of what survives).

    .. math:: N_{eff}(t) = \frac{(\sum_i e_i)^2}{\sum_i e_i^2}, \qquad e_i = e^{G_t - G_i} |U_i|

    Parameters
    ----------
    record : DataTree
        A record; for longer windows see :func:`memories`.

    Returns
    -------
    DataArray, (sequence, layer, token, head)
        From 1 (one write dominates) upwards; 0 where nothing was written.

    Notes
    -----
    Trouble: above ``min(key, value)`` there are more live memories than orthogonal directions to hold them
    apart. Source: derived.
    """
    return _memories(record, ("live_memories",))["live_memories"]


def _memories(record: xr.DataTree, wanted: tuple[str, ...]) -> xr.Dataset:
    names = ("log_decay", "write_norm", "state_norm")

    def count(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        decay, write, norm = (block[n] for n in names)
        found, carry = core.memories(
            decay, write, norm, block["last"], block["width"], carry, "age" in wanted
        )
        by_name = dict(zip(LABELS, found, strict=True))
        return tuple(x for n, x in by_name.items() if n in wanted and x is not None), carry

    return map_tokens(steps(record), names, count, {n: LABELS[n] for n in wanted})
