r"""Erase terms and decay per key on a GPU (Triton): the delta rule, GLA, HGRN-2, RWKV-6 and 7, KDA.

The algebra is that of :mod:`statescope.kernels.keyed` and :mod:`statescope.kernels.erasing`. All launches
but ``walk`` do all chunks at once:

1. ``relate``: what the rows of a chunk erase, and what their queries read, of its earlier writes. Chunks of
   which a key forgets more than float32 holds are cut into parts, by a second launch.
2. ``invert``: the triangular system of what is erased, where something is.
3. ``solve``: what each chunk does to whatever state enters it.
4. ``walk``: over all chunks for each head and block of columns, with the state in registers; all it computes
   for a chunk are two products, or one where nothing is erased.
5. ``read``: ``y``.
6. ``measure``: what is written beside what is stored; as ``relate`` in two launches.
7. ``tally``: energy and sum of each row of the state, token by token inside the chunks.

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

PART = 16
"""Rows that are related to earlier ones at once where keys forget much; the fewest a matrix unit takes."""


@dataclass(frozen=True)
class Tiling:
    """How a shape is cut up: rows of a chunk, keys and columns at once, and the warps of every launch.

    ``walk`` has all ``keys`` of ``walked`` columns of the state, ``solve`` ``solve_slice`` of the first or
    ``solve_columns`` of the second, and the others ``slice`` keys of ``columns``.
    """

    chunk: int
    keys: int
    slice: int
    columns: int
    walked: int
    solve_slice: int
    solve_columns: int
    walk_stages: int = 1
    walk_warps: int = 4
    whole_warps: int = 4
    part_warps: int = 4
    invert_warps: int = 4
    solve_warps: int = 4
    read_warps: int = 4
    tally_warps: int = 1


def halves(recurrence: Recurrence) -> bool:
    """Whether products that feed back take three products of bfloat16 halves, in chunks of 64."""
    r = recurrence
    return r.v.dtype == torch.bfloat16 and 32 < r.key <= 128 and r.value > 32


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
    keys, values = (max(16, 1 << (n - 1).bit_length()) for n in (recurrence.key, recurrence.value))
    if half and modern:
        slice = 64 if recurrence.scalar_decay else 32
        return Tiling(64, keys, slice, 64, 32, 64, min(values, 128), walk_stages=3, invert_warps=2)
    some, columns = min(keys, 32), min(values, 32)
    return Tiling(32 if keys <= 128 else 16, keys, some, columns, 16, some, columns)


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
    from . import fused_erasing_kernels

    kernels: Any = fused_erasing_kernels
    rows, length = writes * r.time, cut.chunk
    chunks = -(-rows // length)
    padded = chunks * length
    columns, blocks = -(-r.value // cut.columns), -(-r.value // cut.walked)
    pieces = -(-r.key // cut.solve_slice) + -(-r.value // cut.solve_columns)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=r.v.device)

    heads = (r.batch, r.heads)
    split = half and r.v.is_cuda  # the interpreter truncates bfloat16 and cannot multiply it
    rounded = torch.bfloat16 if split else torch.float32
    rows_of_keys = empty(1 + r.erases, *heads, padded, r.key)  # float32, or two bfloat16 in its place
    gained = rows_of_keys[0]  # in place of the keys, once these have been walked with
    remaining, through = rows_of_keys[0], rows_of_keys[-1]
    if split:
        remaining, through = (x.view(torch.bfloat16).view(2, -1) for x in (remaining, through))
    values, final = empty(*heads, padded, r.value), empty(*heads, r.key, r.value)
    kept = empty(*heads, chunks, r.key)
    states = empty(*heads, chunks, r.key, r.value, dtype=rounded) if outputs or measure else final
    energy = empty(2, *heads, chunks, blocks, r.key) if measure else kept
    system = empty(*heads, padded, length) if r.erases else kept
    seen = empty(*heads, padded, length, dtype=rounded) if outputs else kept
    scale = r.log_decay if r.write_scale is None else r.write_scale
    a = r.log_decay if r.a is None else r.a if r.a.stride(-1) == 1 or r.delta_rule else r.a.contiguous()
    b = r.log_decay if r.b is None else r.b if r.b.stride(-1) == 1 else r.b.contiguous()
    q, k, v, weight, erase, along = ((x, *x.stride()[:3]) for x in (r.q, r.k, r.v, scale, a, b))
    decay = (r.log_decay, *r.log_decay.stride()[:3], 0 if r.scalar_decay else r.log_decay.stride(3))
    shape = {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "L": length, "PAIRS": writes == 2}
    wide = shape | {"VALUE": r.value, "BV": cut.columns, "BS": cut.slice, "KEYED": not r.scalar_decay}
    exact = {"PRECISION": "tf32x3" if torch.version.cuda else "ieee", "SPLIT": split}
    scaled = r.write_scale is not None
    fast = empty(*heads, chunks, dtype=torch.int32)
    turns = (True, length, cut.whole_warps), (False, PART, cut.part_warps)
    for whole, part, warps in turns:
        kernels.relate[(chunks * length // part, r.heads, r.batch)](
            *q, *k, *decay, *along, *erase, system, seen, fast, rows, padded, chunks, **shape, **exact,
            PART=part, WHOLE=whole, BS=cut.slice, KEYED=not r.scalar_decay, ERASES=r.erases,
            OUTPUTS=outputs, num_warps=warps,
        )  # fmt: skip
    if r.erases:
        kernels.invert[(chunks, r.heads, r.batch)](
            system, *erase, rows, padded, HEADS=r.heads, L=length, PAIRS=writes == 2, **exact,
            num_warps=cut.invert_warps,
        )  # fmt: skip
    kernels.solve[(chunks * pieces, r.heads, r.batch)](
        *k, *v, *weight, *decay, *along, *erase, system, remaining, kept, through, values,
        rows, padded, chunks, r.batch, **wide | {"BS": cut.solve_slice, "BV": cut.solve_columns}, **exact,
        ERASES=r.erases, HAS_SCALE=scaled, num_warps=cut.solve_warps,
    )  # fmt: skip
    held = sorted({(writes * p + writes - 1) // length for p in positions})
    entered, slots = final, kept
    if held:
        slot = torch.full((chunks,), -1, dtype=torch.int32)
        slot[held] = torch.arange(len(held), dtype=torch.int32)
        slots = _to(slot, r.v)
        entered = empty(len(held), *heads, r.key, r.value)
    initial = final if r.initial_state is None else r.initial_state.contiguous()
    kernels.walk[(r.heads * blocks, r.batch)](
        remaining, kept, through, values, initial, final, states, energy, entered, slots,
        padded, chunks, r.batch, HEADS=r.heads, KEY=r.key, VALUE=r.value, L=length, **exact, BK=cut.keys,
        BV=cut.walked, STAGES=cut.walk_stages, ERASES=r.erases, HAS_INITIAL=r.initial_state is not None,
        STORE=outputs or measure, MEASURE=measure, KEEP=bool(held), num_warps=cut.walk_warps,
    )  # fmt: skip
    y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
    if outputs:
        kernels.read[(chunks * columns, r.heads, r.batch)](
            *q, *v, *decay, values, states, seen, kept if r.skip is None else r.skip, y,
            rows, padded, chunks, **wide, **exact, HAS_SKIP=r.skip is not None, num_warps=cut.read_warps,
        )  # fmt: skip
    steps, erased = None, None
    if measure:
        erased = empty(2, r.batch, rows, r.heads) if r.delta_rule else None
        sums, written, cross, added, both, decayed, total, pace = empty(8, r.batch, rows, r.heads)
        for whole, part, warps in turns:
            kernels.measure[(chunks * length // part, r.heads, r.batch)](
                *k, *v, *weight, *decay, *erase, values, states, fast, gained, sums, written, cross, added,
                both, kept if erased is None else erased, rows, padded, chunks, r.batch, **wide, **exact,
                PART=part, WHOLE=whole, DELTA=r.delta_rule, HAS_SCALE=scaled, num_warps=warps,
            )  # fmt: skip
        kernels.tally[(chunks, r.heads, r.batch)](
            *k, *decay, *erase, energy, gained, sums, decayed, total, pace, rows, padded, chunks, r.batch,
            **shape, BK=cut.keys, BLOCKS=blocks, num_warps=cut.tally_warps,
        )  # fmt: skip
        mean = (total + added) / (r.key * r.value)
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
    u = values[:, :, writes * first : writes * (position + 1)]
    added = keys.permute(0, 2, 3, 1) @ u[:, :, writes - 1 :: writes]
    if writes == 2:
        assert r.a is not None
        added += (r.a[:, past].float() * survives).permute(0, 2, 3, 1) @ u[:, :, ::2]
    return remaining[:, 0].exp()[..., None] * entering + added


def _to(x: Tensor, like: Tensor) -> Tensor:
    """Bring to the device from pinned memory, so that the host does not wait."""
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x
