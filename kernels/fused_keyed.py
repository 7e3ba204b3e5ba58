r"""Decay per key on a GPU (Triton), with any erase term: GLA, HGRN-2, RWKV-6 and 7, KDA.

The algebra is that of :mod:`statescope.kernels.keyed` and :mod:`statescope.kernels.erasing`. All launches
but ``walk`` do all chunks at once:

1. ``relate``: what the rows of each chunk have to do with one another, with the state that enters it, and
   with that which leaves. Chunks of which a key forgets more than float32 holds that way are *hard*, and left
   to ``relate_parts``.
2. ``solve``: the triangular system of what is erased.
3. ``walk``: over all chunks for each head and block of the state, which stays in registers; all it computes
   for a chunk are two products, or one where nothing is erased.
4. ``read``: ``y``.
5. ``measure`` and ``tally``: what is written beside what is stored, and energy and sum of each row of the
   state, token by token inside the chunks; for hard chunks ``measure_parts``.

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
"""Of the launches for hard chunks, which share these out."""

PART = 16
"""Rows that are related to earlier ones at once where keys forget much."""

FIELDS = 7
"""Of what is measured."""


@dataclass(frozen=True)
class Tiling:
    """How a shape is cut up: rows of a chunk, and keys and columns of every launch.

    ``relate`` has ``related`` keys at once, ``solve`` ``solved`` keys and columns, ``walk`` ``walked_keys``
    of ``walked`` columns of the state, ``read`` ``read_keys`` of ``read_columns``, ``measure`` ``measured``
    of ``measured_columns``, ``tally`` all ``keys``, and what goes part by part ``part`` keys and columns.

    ptxas 12.8, which comes with triton 3.6, errs in products of 32 columns whose first operand lies in
    registers (with 13.0 they are right). So ``solved`` and ``measured`` are 64, and ``walk`` has stages.
    """

    chunk: int
    keys: int
    related: int
    solved: int
    walked_keys: int
    walked: int
    read_keys: int
    read_columns: int
    measured: int
    measured_columns: int
    part: int
    walk_stages: int = 1
    stages: int = 1
    measure_stages: int = 1
    part_stages: int = 1
    warps: int = 4
    part_warps: int = 2
    solve_registers: int | None = None


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
        across, narrow = keys if r.erases else 64, r.erases and keys <= 64
        return Tiling(64, keys, 32, 64, across, 16 if narrow else 32, 64, 64, 64, min(values, 128), 32,
                      walk_stages=3 if r.erases and keys > 64 else 4, stages=3, measure_stages=2,
                      part_stages=2, solve_registers=168)  # fmt: skip
    some, columns = min(keys, 32), min(values, 32)
    across = keys if r.erases else some
    return Tiling(32 if keys <= 128 else 16, keys, some, min(some, columns), across, min(columns, 16), some,
                  columns, some, columns, min(some, columns))  # fmt: skip


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
    from . import fused_hard_kernels, fused_keyed_kernels

    kernels: Any = fused_keyed_kernels
    careful: Any = fused_hard_kernels
    rows, length = writes * r.time, cut.chunk
    chunks = -(-rows // length)
    padded = chunks * length
    pieces, across = -(-r.value // cut.walked), -(-r.key // cut.walked_keys)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=r.v.device)

    heads = (r.batch, r.heads)
    split = half and r.v.is_cuda  # the interpreter truncates bfloat16 and cannot multiply it
    rounded = torch.bfloat16 if split else torch.float32

    def of_keys() -> Tensor:  # float32, or two bfloat16 in its place
        found = empty(*heads, padded, r.key)
        return found.view(torch.bfloat16).view(2, -1) if split else found

    final, hard = empty(*heads, r.key, r.value), empty(*heads, chunks, dtype=torch.int32)
    listed = torch.zeros(1 + hard.numel(), dtype=torch.int32, device=r.v.device)
    remaining, kept, halves = of_keys(), empty(*heads, chunks, r.key), empty(*heads, chunks, r.key)
    through = of_keys() if r.erases else final
    values = empty(*heads, padded, r.value) if r.erases else r.v
    strides = (values.stride(0), values.stride(2), values.stride(1)) if r.erases else r.v.stride()[:3]
    states = empty(*heads, chunks, r.key, r.value, dtype=rounded) if outputs or measure else final
    energy = empty(2, *heads, chunks, pieces, r.key) if measure else kept
    scale = r.log_decay if r.write_scale is None else r.write_scale
    a = r.log_decay if r.a is None else r.a if r.a.stride(-1) == 1 or r.delta_rule else r.a.contiguous()
    b = r.log_decay if r.b is None else r.b if r.b.stride(-1) == 1 else r.b.contiguous()
    q, k, v, weight, erase, along = ((x, *x.stride()[:3]) for x in (r.q, r.k, r.v, scale, a, b))
    u = (values, *strides)
    decay = (r.log_decay, *r.log_decay.stride()[:3], 0 if r.scalar_decay else r.log_decay.stride(3))
    sizes = (rows, padded, chunks, r.batch)
    exact = {"PRECISION": "tf32x3" if torch.version.cuda else "ieee", "SPLIT": split}
    one = {"HEADS": r.heads, "KEY": r.key, "L": length, **exact}
    shape, whole = one | {"GROUPS": r.groups}, one | {"VALUE": r.value}
    kinds = {"PAIRS": writes == 2, "HAS_SCALE": r.write_scale is not None}
    erases = {"ERASES": r.erases}
    usual = {"num_warps": cut.warps, "num_stages": cut.stages}
    part = {"PART": PART, "BS": cut.part, "num_warps": cut.part_warps, "num_stages": cut.part_stages}
    solved = {"BS": cut.solved, "BV": cut.solved, **usual}
    if cut.solve_registers and r.v.is_cuda and torch.version.cuda:
        solved |= {"maxnreg": cut.solve_registers}
    grid, few = (chunks, r.heads, r.batch), (PROGRAMS if r.v.is_cuda else 1,)
    system = empty(*heads, padded, length) if r.erases else kept
    asked = empty(*heads, padded, r.key, dtype=rounded) if outputs else kept
    seen = empty(*heads, padded, length, dtype=rounded) if outputs else kept

    held = sorted({(writes * p + writes - 1) // length for p in positions})
    entered, slots = final, kept
    if held:
        slot = torch.full((chunks,), -1, dtype=torch.int32)
        slot[held] = torch.arange(len(held), dtype=torch.int32)
        slots = _to(slot, r.v)
        entered = empty(len(held), *heads, r.key, r.value)
    initial = final if r.initial_state is None else r.initial_state.contiguous()
    given = (*q, *k, *weight, *decay, *along, *erase)
    for wide in (False, True):
        kernels.relate[grid](
            *given, remaining, kept, halves, through, asked, system, seen, hard, listed, *sizes,
            **shape, **kinds, **erases, **usual, BS=cut.related, OUTPUTS=outputs, WIDE=wide,
        )  # fmt: skip
    careful.relate_parts[few](
        *given, remaining, kept, through, asked, system, seen, listed, *sizes,
        **shape, **kinds, **erases, **part, OUTPUTS=outputs,
    )  # fmt: skip
    solved |= {"HAS_SCALE": r.write_scale is not None}
    if writes == 2:
        kernels.solve_pairs[(-(-chunks // 2), r.heads, r.batch)](
            *v, *weight, system, through, values, *sizes, **whole, **solved
        )  # fmt: skip
    elif r.erases:
        kernels.solve[grid](*v, *weight, *erase, system, through, values, *sizes, **whole, **solved)
    kernels.walk[(r.heads * pieces * across, r.batch)](
        remaining, kept, through, *u, values, initial, final, states, energy, entered, slots, *sizes,
        **whole, **erases, BK=cut.walked_keys, BV=cut.walked, BLOCKS=pieces, STAGES=cut.walk_stages,
        HAS_INITIAL=r.initial_state is not None, STORE=outputs or measure, MEASURE=measure,
        KEEP=bool(held), num_warps=cut.warps,
    )  # fmt: skip
    y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
    if y is not None:
        kernels.read[(chunks * -(-r.value // cut.read_columns), r.heads, r.batch)](
            *u, *v, *weight, asked, states, seen, kept if r.skip is None else r.skip, y, *sizes,
            **whole, **kinds, **erases, BS=cut.read_keys, BV=cut.read_columns, HAS_SKIP=r.skip is not None,
            **usual,
        )  # fmt: skip
    steps, erased = None, None
    if measure:
        found, gained = empty(FIELDS, r.batch, rows, r.heads), empty(*heads, padded, r.key)
        written = (*k, *u, *v, *weight, *decay, *erase)
        named = kinds | erases | {"GROUPS": r.groups, "DELTA": r.delta_rule}
        for wide in (False, True):
            kernels.measure[grid](
                *written, kept, halves, states, gained, hard, found, *sizes,
                **whole, **named, BS=cut.measured, BV=cut.measured_columns, WIDE=wide,
                num_warps=cut.warps, num_stages=cut.measure_stages,
            )  # fmt: skip
        careful.measure_parts[few](
            *written, states, gained, listed, found, *sizes, **whole, **named, **part, BV=cut.part
        )  # fmt: skip
        kernels.tally[grid](
            *k, *decay, *erase, energy, gained, found, *sizes,
            **{name: shape[name] for name in ("HEADS", "GROUPS", "KEY", "L")}, BK=cut.keys, BLOCKS=pieces,
            PAIRS=writes == 2, num_warps=1,
        )  # fmt: skip
        decayed, written_, cross, total, pace, both, along_key = found
        if r.delta_rule:
            erased = torch.stack([both.sqrt(), along_key])
        steps = _steps(Measured(decayed, written_, cross, total / (r.key * r.value)), both, pace, writes)
    at = [_after(r, writes, entered[held.index((writes * p + writes - 1) // length)], p, length, values)
          for p in positions]  # fmt: skip
    kept_states = torch.stack(at, 1) if at else empty(r.batch, 0, r.heads, r.key, r.value)
    return ScanOutput(y, steps, kept_states, final, erased)


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
