r"""Erase terms and decay per key on a GPU (Triton): the delta rule, GLA, HGRN-2, RWKV-6 and 7, KDA.

The algebra is that of :mod:`statescope.kernels.keyed` and :mod:`statescope.kernels.erasing`. All launches
but ``walk`` do all chunks at once:

1. ``prepare``: what each chunk does to whatever state enters it, the triangular system of what is erased
   included.
2. ``walk``: over all chunks for each head and block of the state, which stays in registers; all it computes
   for a chunk are two products, or one where nothing is erased.
3. ``read``: ``y``; where all keys decay alike also what is written beside what is stored.
4. ``measure`` and ``tally``, where each key decays at its own rate: the same, and energy and sum of each row
   of the state, token by token inside the chunks.

Where the decay is per key, two factors for each row stand for what is forgotten between any two. Chunks of
which a key forgets more than float32 holds that way are *hard*, and left to launches of their own
(:mod:`statescope.kernels.fused_hard_kernels`).

A chunk is so many *writes* of rank one. A token of the delta rule makes one, :math:`k_t u_t^\top`; with any
other erase term it makes two, of which the second decays nothing: :math:`a_t z_t^\top` and :math:`k_t
u_t^\top`. What feeds back into later writes is computed by three products of halves for each, in tf32 or,
where :func:`halves` says so, in bfloat16, which is then also the precision of what is only read. Nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from .interface import ScanOutput, Steps
from .keyed import Measured

ROWS = 2**21
"""Writes times heads times sequences worked on at once: bounds the memory whatever the length."""

PROGRAMS = 1024
"""Of the launches for hard chunks, among which they look for these."""

PART = 16
"""Rows that are related to earlier ones at once where keys forget much."""

FIELDS = 7
"""Of what is measured."""


@dataclass(frozen=True)
class Tiling:
    """How a shape is cut up: rows of a chunk, keys and columns at once, and the warps of every launch.

    ``walk`` has ``walked_keys`` of ``walked`` columns of the state, ``read`` ``read_slice`` keys of
    ``columns``, what goes part by part ``part_slice`` of ``block``, ``tally`` all ``keys``, and the others
    ``slice`` keys of ``block`` columns.
    """

    chunk: int
    keys: int
    slice: int
    block: int
    walked_keys: int
    walked: int
    read_slice: int
    columns: int
    walk_stages: int = 1
    stages: int = 1
    warps: int = 4
    part_slice: int = 32
    part_warps: int = 2
    tally_warps: int = 1


def halves(recurrence: Recurrence) -> bool:
    """Whether products that feed back take three products of bfloat16 halves, in chunks of 64."""
    r = recurrence
    return r.v.dtype == torch.bfloat16 and 32 < r.key <= (128 if r.erases else 256) and r.value > 32


def tiling(recurrence: Recurrence, half: bool, modern: bool) -> Tiling:
    """Choose tiles.

    Parameters
    ----------
    recurrence : Recurrence
        What is to be run.
    half : bool
        As :func:`halves`.
    modern : bool
        Whether matrix units read shared memory by themselves (compute capability 9 and 10).
    """
    r = recurrence
    keys, values = (max(16, 1 << (n - 1).bit_length()) for n in (r.key, r.value))
    if half and modern:
        across, columns = keys if r.erases else 64, min(values, 128)
        return Tiling(64, keys, 64, 64, across, 32, 32, columns, walk_stages=3, stages=2)
    some, columns = min(keys, 32), min(values, 32)
    across = keys if r.erases else some
    return Tiling(32 if keys <= 128 else 16, keys, some, columns, across, min(columns, 16), some, columns,
                  part_slice=some)  # fmt: skip


def scan(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: bool,
    measure: bool,
    positions: Sequence[int],
    modern: bool,
) -> ScanOutput:
    """Run a recurrence with decay per key or head, and any erase term.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    q, k, v : Tensor
        Its queries, keys and values, with contiguous rows.
    outputs, measure, positions
        As :func:`statescope.kernels.fused.scan`.
    modern : bool
        As :func:`tiling`.
    """
    r = recurrence.replace(q=q, k=k, v=v)
    writes = 1 if r.delta_rule or not r.erases else 2
    half = halves(r)
    cut = tiling(r, half, modern)
    tokens = cut.chunk // writes
    block = tokens * max(1, ROWS // (r.batch * r.heads * cut.chunk))
    found, state = [], r.initial_state
    for first in range(0, r.time, block):
        stop = min(first + block, r.time)
        here = [p - first for p in positions if first <= p < stop]
        part = r if block >= r.time else r.between(first, stop, state)
        found.append(_run(part, cut, writes, outputs, measure, here, half))
        state = found[-1].final_state
    if len(found) == 1 and list(positions) == sorted(positions):
        return found[0]
    kept = {p: x for o, ps in zip(found, _by_block(positions, block, len(found)), strict=True)
            for p, x in zip(ps, o.states.unbind(1), strict=True)}  # fmt: skip
    erased = [o.erased for o in found if o.erased is not None]
    steps = [o.steps for o in found if o.steps is not None]
    return ScanOutput(
        torch.cat([o.y for o in found if o.y is not None], 1) if outputs else None,
        Steps.concatenate(steps) if measure else None,
        torch.stack([kept[p] for p in positions], 1) if positions else found[0].states,
        found[-1].final_state,
        torch.cat(erased, 2) if erased else None,
    )


def _by_block(positions: Sequence[int], block: int, count: int) -> list[list[int]]:
    return [[p for p in positions if p // block == i] for i in range(count)]


def _run(
    r: Recurrence,
    cut: Tiling,
    writes: int,
    outputs: bool,
    measure: bool,
    positions: Sequence[int],
    half: bool,
) -> ScanOutput:
    from . import fused_erasing_kernels, fused_hard_kernels

    kernels: Any = fused_erasing_kernels
    careful: Any = fused_hard_kernels
    keyed = not r.scalar_decay or writes == 2
    rows, length = writes * r.time, cut.chunk
    chunks = -(-rows // length)
    padded = chunks * length
    pieces, across = -(-r.value // cut.columns), -(-r.key // cut.walked_keys)
    blocks = cut.columns // cut.walked  # of a piece
    energies = blocks * (1 if keyed else across)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=r.v.device)

    heads = (r.batch, r.heads)
    split = half and r.v.is_cuda  # the interpreter truncates bfloat16 and cannot multiply it
    rounded = torch.bfloat16 if split else torch.float32

    def of_keys() -> Tensor:  # float32, or two bfloat16 in its place
        found = empty(*heads, padded, r.key)
        return found.view(torch.bfloat16).view(2, -1) if split else found

    final, hard = empty(*heads, r.key, r.value), empty(*heads, chunks, dtype=torch.int32)
    remaining = of_keys() if keyed else empty(*heads, padded)
    kept = empty(*heads, chunks, r.key if keyed else 1)
    through = of_keys() if r.erases else final
    values = empty(*heads, padded, r.value) if r.erases else r.v
    strides = (values.stride(0), values.stride(2), values.stride(1)) if r.erases else r.v.stride()[:3]
    states = empty(*heads, chunks, r.key, r.value, dtype=rounded) if outputs or measure else final
    energy = empty(2, *heads, chunks, pieces * energies, r.key if keyed else 1) if measure else kept
    scale = r.log_decay if r.write_scale is None else r.write_scale
    a = r.log_decay if r.a is None else r.a if r.a.stride(-1) == 1 or r.delta_rule else r.a.contiguous()
    b = r.log_decay if r.b is None else r.b if r.b.stride(-1) == 1 else r.b.contiguous()
    q, k, v, weight, erase, along = ((x, *x.stride()[:3]) for x in (r.q, r.k, r.v, scale, a, b))
    u = (values, *strides)
    decay = (r.log_decay, *r.log_decay.stride()[:3], 0 if r.scalar_decay else r.log_decay.stride(3))
    sizes = (rows, padded, chunks, r.batch)
    shape = {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "L": length}
    exact = {"PRECISION": "tf32x3" if torch.version.cuda else "ieee", "SPLIT": split}
    wide = shape | exact | {"VALUE": r.value, "ERASES": r.erases}
    kinds = {"PAIRS": writes == 2, "HAS_SCALE": r.write_scale is not None}
    grid, few = (chunks, r.heads, r.batch), (PROGRAMS if r.v.is_cuda else 1,)
    system = empty(*heads, padded, length) if keyed and r.erases else kept
    seen = empty(*heads, padded, length, dtype=rounded) if keyed and outputs else kept

    kernels.prepare[grid](
        *k, *v, *weight, *decay, *along, *erase, remaining, kept, through, values, hard, *sizes,
        **wide, **kinds, BS=cut.slice, BV=cut.block, KEYED=keyed,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if keyed:
        careful.relate[few](
            *q, *k, *decay, *along, *erase, system, seen, hard, *sizes, **shape, **exact,
            PART=PART, BS=cut.part_slice, PAIRS=writes == 2, ERASES=r.erases, OUTPUTS=outputs,
            num_warps=cut.part_warps, num_stages=cut.stages,
        )  # fmt: skip
        careful.solve[few](
            *k, *v, *weight, *decay, *along, *erase, system, remaining, kept, through, values, hard, *sizes,
            **wide, **kinds, BS=cut.slice, BV=cut.block, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    held = sorted({(writes * p + writes - 1) // length for p in positions})
    entered, slots = final, kept
    if held:
        slot = torch.full((chunks,), -1, dtype=torch.int32)
        slot[held] = torch.arange(len(held), dtype=torch.int32)
        slots = _to(slot, r.v)
        entered = empty(len(held), *heads, r.key, r.value)
    initial = final if r.initial_state is None else r.initial_state.contiguous()
    kernels.walk[(r.heads * pieces * blocks * across, r.batch)](
        *k, remaining, kept, through, *u, values, initial, final, states, energy, entered, slots, *sizes,
        **wide, BK=cut.walked_keys, BV=cut.walked, BLOCKS=pieces * blocks, STAGES=cut.walk_stages,
        KEYED=keyed, HAS_INITIAL=r.initial_state is not None, STORE=outputs or measure, MEASURE=measure,
        KEEP=bool(held), num_warps=cut.warps,
    )  # fmt: skip
    y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
    pieces = 1 if keyed else pieces  # of what is measured
    found = empty(FIELDS, pieces, r.batch, rows, r.heads) if measure else kept

    def read(again: bool) -> None:
        both = measure and not keyed
        kernels.read[(chunks * -(-r.value // cut.columns) * (outputs + both), r.heads, r.batch)](
            *q, *k, *u, *v, *weight, *decay, *erase, kept, states, energy, seen, hard,
            kept if r.skip is None else r.skip, kept if y is None else y, found, *sizes, **wide, **kinds,
            BS=cut.read_slice, BV=cut.columns, BLOCKS=energies, KEYED=keyed, DELTA=r.delta_rule,
            HAS_SKIP=r.skip is not None, OUTPUTS=outputs, MEASURE=both, RELATED=again,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    if outputs or (measure and not keyed):
        read(False)
    if keyed and outputs:
        read(True)
    if keyed and measure:
        gained = empty(*heads, padded, r.key)
        written = (*k, *u, *v, *weight, *decay, *erase)
        delta = {"DELTA": r.delta_rule}
        kernels.measure[grid](
            *written, kept, states, gained, hard, found, *sizes, **wide, **kinds, **delta,
            BS=cut.slice, BV=cut.block, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        careful.measure_parts[few](
            *written, states, gained, hard, found, *sizes, **wide, **kinds, **delta,
            PART=PART, BS=cut.part_slice, BV=cut.block, num_warps=cut.part_warps, num_stages=cut.stages,
        )  # fmt: skip
        kernels.tally[grid](
            *k, *decay, *erase, energy, gained, found, *sizes, **shape, BK=cut.keys,
            BLOCKS=energy.shape[-2], PAIRS=writes == 2, num_warps=cut.tally_warps,
        )  # fmt: skip
    steps, erased = None, None
    if measure:
        decayed, written, cross, total, _, both, _ = (x[0] if pieces == 1 else x.sum(0) for x in found)
        pace = found[4, 0] if keyed else r.log_decay.float()
        if r.delta_rule:
            erased = torch.stack([both.sqrt(), found[6, 0]])
        mean = total / (r.key * r.value)
        steps = _steps(Measured(decayed, written, cross, mean), both, pace, writes)
    at = [_after(r, writes, entered[held.index((writes * p + writes - 1) // length)], p, length, values)
          for p in positions]  # fmt: skip
    states = torch.stack(at, 1) if at else empty(r.batch, 0, r.heads, r.key, r.value)
    return ScanOutput(y, steps, states, final, erased)


def _steps(measured: Measured, both: Tensor, pace: Tensor, writes: int) -> Steps:
    if writes == 2:
        erased, added = measured.every_other()
        measured = Measured(
            decayed=erased.decayed,
            written=(erased.written + added.written + 2 * both[:, 1::2]).clamp(min=0),
            cross=erased.cross + added.cross,
            mean=added.mean,
        )
    return measured.steps(pace[:, ::writes])


def _after(
    r: Recurrence, writes: int, entering: Tensor, position: int, length: int, values: Tensor
) -> Tensor:
    """The state after one token, from that which entered its chunk."""
    tokens = length // writes
    first = position // tokens * tokens
    past = slice(first, position + 1)
    log_decay = r.log_decay[:, past].float()
    log_decay = log_decay[..., None] if r.scalar_decay else log_decay
    # Of the tokens in between alone: from each on, what comes after it.
    remaining = log_decay.flip(1).cumsum(1).flip(1)
    survives = torch.cat([remaining[:, 1:], torch.zeros_like(remaining[:, :1])], 1).exp()
    keys = r.k[:, past].float().repeat_interleave(r.heads // r.groups, 2) * survives
    if r.erases:
        u = values[:, :, writes * first : writes * (position + 1)]
    else:
        u = r.v[:, past].float() if r.write_scale is None else r.v[:, past] * r.write_scale[:, past, :, None]
        u = u.float().transpose(1, 2)
    added = keys.permute(0, 2, 3, 1) @ u[:, :, writes - 1 :: writes]
    if writes == 2:
        assert r.a is not None
        added += (r.a[:, past].float() * survives).permute(0, 2, 3, 1) @ u[:, :, ::2]
    return remaining[:, 0].exp()[..., None] * entering + added


def _to(x: Tensor, like: Tensor) -> Tensor:
    """Bring to the device from pinned memory, so that the host does not wait."""
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x
