"""The recurrence token by token: the truth the other kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from .interface import Attribution, ScanOutput, Steps


def supports(recurrence: Recurrence) -> str | None:
    """Return None: every structure is served."""
    return None


def scan(
    recurrence: Recurrence,
    *,
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
) -> ScanOutput:
    """Step through the recurrence, one state at a time.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    outputs, measure : bool
        Whether to compute ``y`` and ``steps``.
    positions : sequence of int
        Tokens after which the state is kept.
    dtype : torch.dtype
        Arithmetic and results.
    """
    r = recurrence.to(dtype)
    erase = r.erase_vectors()
    state = r.start_state(dtype)
    ys: list[Tensor] = []
    rows: list[tuple[Tensor, ...]] = []
    erased: list[Tensor] = []
    kept: dict[int, Tensor] = {}
    wanted = set(positions)
    for t in range(r.time):
        decayed, update = _step(r, erase, t, state)
        state = decayed + update
        if outputs:
            y = torch.einsum("bhkv,bhk->bhv", state, _heads(r, r.q[:, t]))
            ys.append(y if r.skip is None else y + r.skip[:, None] * r.v[:, t])
        if measure:
            rows.append(_measure(r.log_decay[:, t], decayed, update, state))
        if measure and r.delta_rule:
            assert r.a is not None
            k = _heads(r, r.k[:, t])
            read = r.a[:, t, :, None] * torch.einsum("bhk,bhkv->bhv", k, decayed)
            erased.append(torch.stack([k.norm(dim=-1) * read.norm(dim=-1), -r.a[:, t] * k.square().sum(-1)]))
        if t in wanted:
            kept[t] = state.clone()
    return ScanOutput(
        y=_stack(ys, r.v) if outputs else None,
        steps=Steps(*(_stack(list(c), r.v[..., 0]) for c in zip(*rows, strict=True))) if measure else None,
        states=torch.stack([kept[p] for p in positions], 1) if positions else state[:, None][:, :0],
        final_state=state,
        erased=torch.stack(erased, 2) if erased else None,
    )


Erase = tuple[Tensor, Tensor] | None
"""See :meth:`Recurrence.erase_vectors`."""


def _step(r: Recurrence, erase: Erase, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decayed state and what token ``t`` adds to it."""
    decayed = _of_entries(r.log_decay[:, t]).exp() * state
    update = torch.einsum("bhk,bhv->bhkv", _heads(r, r.k[:, t]), r.v[:, t])
    if r.write_scale is not None:
        update = r.write_scale[:, t, :, None, None] * update
    if erase is not None:
        a, b = erase
        read = torch.einsum("bhk,bhkv->bhv", b[:, t], state)
        update = update + torch.einsum("bhk,bhv->bhkv", a[:, t], read)
    return decayed, update


def _of_entries(log_decay: Tensor) -> Tensor:
    """Log decay of a token, (batch, heads[, key[, value]]), to stand beside a state."""
    return log_decay.reshape(*log_decay.shape, *(1,) * (4 - log_decay.ndim))


def _measure(log_decay: Tensor, decayed: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    old, write, overlap = _norm(decayed), _norm(update), (decayed * update).sum((-2, -1))
    scale = old * write
    return (
        log_decay.flatten(2).mean(-1) if log_decay.ndim > 2 else log_decay,
        write,
        _norm(state),
        state.mean((-2, -1)),
        torch.where(scale == 0, torch.zeros_like(scale), overlap / scale),
    )


def probe(
    recurrence: Recurrence,
    state: Tensor,
    query: Tensor,
    after: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Attribution:
    r"""Attribute a state, and what a query reads of it, to the writes that made it, by stepping backwards.

    With :math:`T_i` the linear map of token ``i`` and :math:`M_t = T_{last} \cdots T_{t+1}`, the
    write :math:`w_t k_t v_t^\top` survives as :math:`M_t w_t k_t v_t^\top`. What token ``t`` itself
    erases is part of :math:`T_t`: it takes from earlier writes and is none of its own.

    Parameters
    ----------
    recurrence : Recurrence
        Tokens up to the probe, or an earlier stretch.
    state : Tensor, (batch, heads, key, value)
        The state at the probe.
    query : Tensor, (batch, groups, key)
        The query there.
    after : Tensor, optional
        What happens from the end of this stretch to the probe; nothing if it ends there. Without an erase
        term the sum of the log decay, (batch, heads[, key[, value]]); with one :func:`transition`, (batch,
        heads, key, key).
    dtype : torch.dtype
        Arithmetic and results.

    Returns
    -------
    Attribution
        With :math:`R_t = M_t w_t k_t v_t^\top`.
    """
    r, state = recurrence.to(dtype), state.to(dtype)
    query = _heads(r, query.to(dtype))
    erase = r.erase_vectors()
    # The map from here to the probe, (batch, heads, value, key, key): one for every column of the state,
    # or 1 for all of them where they decay alike.
    survives = torch.eye(r.key, dtype=dtype, device=state.device).expand(r.batch, r.heads, 1, -1, -1)
    if after is not None:
        survives = after.to(dtype)[:, :, None] if r.erases else survives * _of_columns(after.to(dtype).exp())
    energy = _norm(state) ** 2
    output = torch.einsum("bhk,bhkv->bhv", query, state)
    output_norm = output.norm(dim=-1)
    rows: list[tuple[Tensor, ...]] = []
    for t in reversed(range(r.time)):
        key = torch.einsum("bhvij,bhj->bhiv", survives, _heads(r, r.k[:, t]))
        if r.write_scale is not None:
            key = key * r.write_scale[:, t, :, None, None]
        v = r.v[:, t]
        written, attention = key * v[:, :, None], torch.einsum("bhk,bhkv->bhv", query, key)
        read = attention * v
        share = (written * state).sum((-2, -1)) / energy
        output_share = (read * output).sum(-1) / output_norm**2
        rows.append((_norm(written), share, nearest(attention, v), read.norm(dim=-1), output_share))
        survives = _transition(r, erase, t, survives)
    columns = survives.expand(-1, -1, r.value, -1, -1)
    before = torch.einsum("bhvij,bhjv->bhiv", columns, r.start_state(dtype))
    return Attribution._make(
        [
            *(_stack(list(column)[::-1], r.v[..., 0]) for column in zip(*rows, strict=True)),
            (before * state).sum((-2, -1)) / energy,
            (torch.einsum("bhk,bhkv->bhv", query, before) * output).sum(-1) / output_norm**2,
            output_norm,
        ]
    )


def nearest(attention: Tensor, v: Tensor) -> Tensor:
    """The one number by which values are multiplied, or the nearest where columns differ in it.

    Parameters
    ----------
    attention : Tensor, (..., 1 or value)
        By what every column of the value is multiplied.
    v : Tensor, (..., value)
        The values.
    """
    if attention.shape[-1] == 1:
        return attention[..., 0]
    square = v.square()
    total = square.sum(-1)
    return torch.where(total == 0, torch.zeros_like(total), (attention * square).sum(-1) / total)


def transition(recurrence: Recurrence, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the map from the state before the first token to that after the last.

    Parameters
    ----------
    recurrence : Recurrence
        Whose columns decay alike.
    dtype : torch.dtype
        Arithmetic and result.

    Returns
    -------
    Tensor, (batch, heads, key, key)
    """
    r = recurrence.to(dtype)
    if r.log_decay.ndim == 5:
        raise ValueError("log_decay has a number for every entry, so that no one map serves all columns")
    erase = r.erase_vectors()
    survives = torch.eye(r.key, dtype=dtype, device=r.v.device).expand(r.batch, r.heads, 1, -1, -1)
    for t in reversed(range(r.time)):
        survives = _transition(r, erase, t, survives)
    return survives[:, :, 0]


def _transition(r: Recurrence, erase: Erase, t: int, survives: Tensor) -> Tensor:
    """Multiply by the map of token ``t`` from the right."""
    result = survives * _of_columns(r.log_decay[:, t].exp())
    if erase is not None:
        a, b = erase
        read = torch.einsum("bhvij,bhj->bhvi", survives, a[:, t])
        result = result + read[..., None] * b[:, t, :, None, None]
    return result


def _of_columns(decay: Tensor) -> Tensor:
    """Decay of a token to stand beside the maps of a state's columns, from the right."""
    return _of_entries(decay).transpose(-2, -1)[..., None, :]


def _heads(r: Recurrence, shared: Tensor) -> Tensor:
    return shared.repeat_interleave(r.heads // r.groups, dim=1)


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)


def _stack(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts, 1) if parts else torch.empty_like(like)
