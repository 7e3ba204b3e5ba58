r"""The recurrence token by token, a block of tokens at a time (torch): for decay that no product serves.

Where the entries of a state decay at their own rates, the weights :math:`e^{G_t - G_j}` of
:mod:`statescope.kernels.chunked` are not one number for two tokens, nor a sum over keys. (Where keys do, a
text with a NaN is stepped here too: in a product it would reach earlier tokens.) The states of a block are
stepped through with a few operations each, all else is worked out for the whole block at once, and the
memory they take is bounded whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import delta
from .interface import Attribution, ScanOutput, Steps
from .reference import nearest
from .writes import of_heads, scaled

ENTRIES = {"cpu": 2**20, "cuda": 2**26}
"""Entries of the states held at once, by device."""


def scan(
    recurrence: Recurrence,
    dtype: torch.dtype,
    *,
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
) -> ScanOutput:
    """Run a recurrence whose erase term, if it has one, is the delta rule's.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    dtype : torch.dtype
        Arithmetic and results.
    outputs, measure : bool
        Whether to compute ``y`` and ``steps``.
    positions : sequence of int
        Tokens after which the state is kept.
    """
    r = recurrence
    state = r.start_state(dtype)
    y = torch.empty(r.v.shape, dtype=dtype, device=state.device) if outputs else None
    steps: list[Steps] = []
    erased: list[Tensor] = []
    kept: dict[int, Tensor] = {}
    for first, stop in _blocks(r):
        part = r.between(first, stop, None)
        log_decay = _of_entries(part.log_decay.to(dtype))
        decay = log_decay.exp()
        states, update, values = (_erase if r.erases else _add)(part, state, decay)
        state = states[-1]
        after = states[1:].transpose(0, 1)
        if y is not None:
            q = of_heads(part, part.q).to(dtype)
            y[:, first:stop] = (q[:, :, :, None] @ after)[:, :, :, 0]
        if measure:
            steps.append(_measure(log_decay, states[:-1].transpose(0, 1) * decay, update, after))
        if measure and values is not None:
            erased.append(delta.erased(part, values))
        kept |= {p: after[:, p - first].clone() for p in positions if first <= p < stop}
    if y is not None and r.skip is not None:
        y.addcmul_(r.v.to(dtype), r.skip.to(dtype)[:, None])
    return ScanOutput(
        y=y,
        steps=Steps.concatenate(steps) if measure else None,
        states=torch.stack([kept[p] for p in positions], 1) if positions else state[:, None][:, :0],
        final_state=state.clone(),
        erased=torch.cat(erased, 2) if erased else None,
    )


def _add(r: Recurrence, state: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, None]:
    """Return the states, (time + 1, batch, heads, key, value), and what every token adds, batch first."""
    update = _written(r, state.dtype)
    states = torch.empty((r.time + 1, *state.shape), dtype=state.dtype, device=state.device)
    states[0] = state
    for t in range(r.time):
        torch.addcmul(update[:, t], states[t], decay[:, t], out=states[t + 1])
    return states, update, None


def _erase(r: Recurrence, state: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where what a token adds is known once it has read the decayed state; and the values."""
    assert r.a is not None
    k, a, values = of_heads(r, r.k).to(state.dtype), r.a.to(state.dtype)[..., None], scaled(r, state.dtype)
    written = torch.empty_like(values)
    states = torch.empty((r.time + 1, *state.shape), dtype=state.dtype, device=state.device)
    update = torch.empty((r.batch, r.time, *state.shape[1:]), dtype=state.dtype, device=state.device)
    states[0] = state
    for t in range(r.time):
        decayed = torch.mul(states[t], decay[:, t], out=states[t + 1])
        value = torch.add(values[:, t], a[:, t] * (k[:, t, :, None] @ decayed)[:, :, 0], out=written[:, t])
        decayed += torch.mul(k[:, t, ..., None], value[:, :, None], out=update[:, t])
    return states, update, written


def probe(
    recurrence: Recurrence, state: Tensor, query: Tensor, after: Tensor | None, dtype: torch.dtype
) -> Attribution:
    """Attribute the state at a probe, and what the query reads of it, to earlier writes, where none erases.

    See :func:`statescope.kernels.reference.probe`.
    """
    r, state = recurrence, state.to(dtype)
    energy = state.square().sum((-2, -1))
    query = query.to(dtype).repeat_interleave(r.heads // r.groups, 1)[..., None]
    output = (query * state).sum(-2)
    output_norm = output.norm(dim=-1)
    along = output / output_norm.square()[..., None]
    found = torch.empty((5, *r.v.shape[:3]), dtype=dtype, device=state.device)
    later = torch.zeros((), dtype=dtype, device=state.device)
    if after is not None:
        later = _of_entries(after[:, None])[:, 0].double()
    for first, stop in reversed(list(_blocks(r))):
        part = r.between(first, stop, None)
        log_decay = _of_entries(part.log_decay.double())
        remaining = log_decay.flip(1).cumsum(1).flip(1)
        survives = (remaining - log_decay + later[:, None] if later.ndim else remaining - log_decay).to(dtype)
        keys, v = of_heads(part, part.k).to(dtype)[..., None] * survives.exp(), part.v.to(dtype)
        if part.write_scale is not None:
            keys = keys * part.write_scale.to(dtype)[..., None, None]
        written, attention = keys * v[..., None, :], (query[:, None] * keys).sum(-2)
        read = attention * v
        rows = (
            torch.linalg.matrix_norm(written),
            (written * state[:, None]).sum((-2, -1)) / energy[:, None],
            nearest(attention, v),
            read.norm(dim=-1),
            (read * along[:, None]).sum(-1),
        )
        for row, values in zip(found, rows, strict=True):
            row[:, first:stop] = values
        later = later + remaining[:, 0]
    left = r.start_state(dtype) * later.to(dtype).exp()
    return Attribution._make(
        [
            *found,
            (left * state).sum((-2, -1)) / energy,
            ((query * left).sum(-2) * along).sum(-1),
            output_norm,
        ]
    )


def _blocks(r: Recurrence) -> Iterator[tuple[int, int]]:
    entries = r.batch * r.heads * r.key * r.value
    block = max(1, ENTRIES["cuda" if r.v.is_cuda else "cpu"] // entries)
    return ((first, min(first + block, r.time)) for first in range(0, r.time, block))


def _of_entries(log_decay: Tensor) -> Tensor:
    """Log decay, (batch, time, heads[, key[, value]]), to stand beside states."""
    return log_decay.reshape(*log_decay.shape, *(1,) * (5 - log_decay.ndim))


def _written(r: Recurrence, dtype: torch.dtype) -> Tensor:
    """What every token adds, (batch, time, heads, key, value)."""
    return of_heads(r, r.k).to(dtype)[..., None] * scaled(r, dtype)[..., None, :]


def _measure(log_decay: Tensor, decayed: Tensor, update: Tensor, state: Tensor) -> Steps:
    norms = [torch.linalg.matrix_norm(x) for x in (decayed, update, state)]
    scale = norms[0] * norms[1]
    overlap = (decayed * update).sum((-2, -1)) / scale
    return Steps(
        log_decay=log_decay.mean((-2, -1)),
        write_norm=norms[1],
        state_norm=norms[2],
        state_mean=state.mean((-2, -1)),
        write_overlap=torch.where(scale == 0, torch.zeros_like(scale), overlap).clamp(-1, 1),
    )
