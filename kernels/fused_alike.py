r"""Heads whose keys all decay alike on a GPU (Triton): the delta rule, and states wide in keys (RetNet).

The algebra is that of :mod:`statescope.kernels.chunked` and :mod:`statescope.kernels.delta`. All launches but
``walk`` do all chunks at once:

1. ``prepare``: what queries and keys of a chunk read of its earlier writes, and under the delta rule the
   inverse of what they erase of one another.
2. ``walk``: over all chunks for each head and block of the state, which stays in registers: the state that
   enters each chunk, its energy, and under the delta rule what is written.
3. ``read``: ``y``, and what is written beside what is stored.
4. ``walk`` and ``read`` again, which return at once for every head that no NaN or infinity has entered.
5. ``measure``: energy and sum of the state token by token, from scalars alone.

What feeds back into later writes is computed by products of bfloat16 halves, or with other inputs in tf32x3;
what is only read, in bfloat16 or float32. Nothing waits for the device.

With ``h`` heads of ``k`` keys and ``v`` values in bfloat16 a token of a chunk of 64 moves ``h (8 k + 6 v)``
bytes of inputs and outputs, ``256 h`` of relations between rows, ``h k v / 16`` of states, and under the
delta rule ``h (256 + 4 v)`` more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from .interface import ScanOutput, Steps

ROWS = 2**21
"""Tokens times heads times sequences worked on at once: bounds the memory whatever the length."""

PART = 16
"""Rows of a block that is inverted row by row."""


@dataclass(frozen=True)
class Tiling:
    """How a shape is cut up: rows of a chunk, and keys, columns, warps and stages of every launch."""

    chunk: int
    slice: int
    walked_keys: int
    walked: int
    read_slice: int
    columns: int
    warps: int = 4
    stages: int = 1
    walk_warps: int = 4
    walk_stages: int = 1
    read_warps: int = 4
    read_stages: int = 1
    measure_warps: int = 4


def wins(recurrence: Recurrence, modern: bool) -> bool:
    """Whether this is faster than the scan of :mod:`statescope.kernels.fused` where nothing is erased.

    That one holds all keys of a state in a program, which with more than 128 leaves it few columns.
    """
    return modern and recurrence.key > 128 and halves(recurrence)


def halves(recurrence: Recurrence) -> bool:
    """Whether products take bfloat16 operands, and what feeds back is multiplied in halves."""
    r = recurrence
    bfloat16 = r.k.dtype == r.v.dtype == torch.bfloat16  # queries are only read
    return bfloat16 and 32 < r.key <= (128 if r.erases else 256) and r.value > 32


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
        if r.erases:
            return Tiling(64, 64, keys, 32, 64, min(values, 128), walk_stages=3, read_stages=3)
        return Tiling(64, 64, 64, 64, 64, min(values, 128), walk_stages=3, read_stages=3)
    some, columns = min(keys, 32), min(values, 32)
    across = keys if r.erases else some
    return Tiling(32 if keys <= 128 else 16, some, across, min(columns, 16), some, columns)


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
    """Run a recurrence with one decay per head, and no erase term or the delta rule's.

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
    half = halves(r)
    cut = tiling(r, half, modern)
    block = cut.chunk * max(1, ROWS // (r.batch * r.heads * cut.chunk))
    found, state = [], r.initial_state
    kept: dict[int, Tensor] = {}
    for first in range(0, r.time, block):
        stop = min(first + block, r.time)
        part = r if block >= r.time else r.between(first, stop, state)
        here = [p for p in positions if first <= p < stop]
        found.append(_Part(part, cut, half).run(outputs, measure, [p - first for p in here]))
        state = found[-1].final_state
        kept |= zip(here, found[-1].states.unbind(1), strict=True)
    if len(found) == 1 and list(positions) == sorted(positions):
        return found[0]
    erased = [o.erased for o in found if o.erased is not None]
    steps = [o.steps for o in found if o.steps is not None]
    return ScanOutput(
        torch.cat([o.y for o in found if o.y is not None], 1) if outputs else None,
        Steps.concatenate(steps) if measure else None,
        torch.stack([kept[p] for p in positions], 1) if positions else found[0].states,
        found[-1].final_state,
        torch.cat(erased, 2) if erased else None,
    )


class _Part:
    """A stretch of the text, of which all chunks are worked on at once: the launches, and what they share."""

    def __init__(self, r: Recurrence, cut: Tiling, half: bool) -> None:
        from . import fused_alike_kernels

        self.kernels: Any = fused_alike_kernels
        self.r, self.cut = r, cut
        self.chunks = -(-r.time // cut.chunk)
        self.padded = self.chunks * cut.chunk
        self.heads = (r.batch, r.heads)
        self.blocks, self.pieces = -(-r.value // cut.walked), -(-r.value // cut.columns)
        self.split = half and r.v.is_cuda  # the interpreter truncates bfloat16 and cannot multiply it
        self.dtype = torch.bfloat16 if self.split else torch.float32
        self.of_rows = self.empty(6, *self.heads, self.padded)
        self.since, self.survives, self.rate, self.weight, self.key_square, self.key_sum = self.of_rows
        self.final = self.empty(*self.heads, r.key, r.value)
        self.spoiled = torch.zeros(self.heads, dtype=torch.int32, device=r.v.device)
        self.sizes = (r.time, self.padded, self.chunks, r.batch)
        self.shape = {"HEADS": r.heads, "KEY": r.key, "L": cut.chunk, "ERASES": r.erases}
        self.exact = {
            "PRECISION": "tf32x3" if torch.version.cuda else "ieee", "SPLIT": self.split, "GROUPS": r.groups,
        }  # fmt: skip

    def run(self, outputs: bool, measure: bool, positions: Sequence[int]) -> ScanOutput:
        r, reads = self.r, outputs or measure
        square = (*self.heads, self.padded, self.cut.chunk)
        seen = self.empty(*square, dtype=self.dtype) if outputs else self.final
        met = self.empty(*square, dtype=self.dtype) if measure else self.final
        inverse = self._prepare(seen, met, outputs, measure)
        of_state = (*self.heads, self.chunks, r.key, r.value)
        states = self.empty(*of_state, dtype=self.dtype) if reads else self.final
        of_values = (*self.heads, self.padded, r.value)
        values = self.empty(*of_values, dtype=self.dtype) if r.erases and reads else self.final
        counts = (*self.heads, self.chunks, self.blocks, r.key, 2)
        energy = self.empty(*counts) if measure else self.final
        summed = self.blocks if r.erases else self.pieces
        sums = self.empty(3, summed, *self.heads, self.padded) if measure else self.of_rows
        at = self._walk(inverse, states, values, energy, sums, reads, measure, positions)
        y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
        crossed = self.empty(self.pieces, *self.heads, self.padded) if measure else self.final
        if reads:
            self._read(values, seen, met, states, y, crossed, sums)
        found = self._measure(sums, crossed, energy) if measure else None
        steps = None if found is None else Steps(r.log_decay.to(torch.float32), *found[:4])
        return ScanOutput(y, steps, at, self.final, found[4:] if found is not None and r.erases else None)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.r.v.device)

    def _prepare(self, seen: Tensor, met: Tensor, outputs: bool, measure: bool) -> Tensor:
        """Relate the rows of each chunk, and return the inverse: float32, or two bfloat16 in its place."""
        r, cut = self.r, self.cut
        inverse = scratch = self.final
        if r.erases:
            inverse = self.empty(*self.heads, self.padded, cut.chunk)
            inverse = inverse.view(torch.bfloat16).view(2, -1) if self.split else inverse
            scratch = self.empty(*self.heads, self.padded, PART)
        self.kernels.prepare[(self.chunks, r.heads, r.batch)](
            *_rows(r.q), *_rows(r.k), *self._scalars(), *self.of_rows, seen, met, scratch, inverse,
            *self.sizes, **self.shape, **self.exact, BS=cut.slice, HAS_SCALE=r.write_scale is not None,
            OUTPUTS=outputs, MEASURE=measure, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        return inverse

    def _walk(
        self,
        inverse: Tensor,
        states: Tensor,
        values: Tensor,
        energy: Tensor,
        sums: Tensor,
        store: bool,
        measure: bool,
        positions: Sequence[int],
    ) -> Tensor:
        """Find the states that enter chunks, and return those after some tokens."""
        r, cut = self.r, self.cut
        held = sorted({p // cut.chunk for p in positions})
        entered = written = slots = self.final
        if held:
            slot = torch.full((self.chunks,), -1, dtype=torch.int32)
            slot[held] = torch.arange(len(held), dtype=torch.int32)
            # From pinned memory, so that the host does not wait for the device.
            slots = slot.pin_memory().to(r.v.device, non_blocking=True) if r.v.is_cuda else slot
            entered = self.empty(len(held), *self.heads, r.key, r.value)
            written = self.empty(len(held), *self.heads, cut.chunk, r.value) if r.erases else entered
        initial = self.final if r.initial_state is None else r.initial_state.contiguous()
        across = -(-r.key // cut.walked_keys)
        for careful in (False, True) if r.erases else (False,):
            self.kernels.walk[(r.heads * self.blocks * across, r.batch)](
                *_rows(r.k), *_rows(r.v), *self.of_rows[:4], inverse, initial, self.final, states, values,
                energy, *sums[:3], entered, written, slots, self.spoiled, *self.sizes,
                **self.shape, **self.exact, VALUE=r.value, BK=cut.walked_keys, BV=cut.walked,
                STAGES=cut.walk_stages, HAS_INITIAL=r.initial_state is not None, STORE=store,
                MEASURE=measure, KEEP=bool(held), CAREFUL=careful, num_warps=cut.walk_warps,
            )  # fmt: skip
        at = [_after(r, entered[i], written[i] if r.erases else None, p, cut.chunk)
              for p in positions for i in [held.index(p // cut.chunk)]]  # fmt: skip
        return torch.stack(at, 1) if at else self.empty(r.batch, 0, r.heads, r.key, r.value)

    def _read(
        self,
        values: Tensor,
        seen: Tensor,
        met: Tensor,
        states: Tensor,
        y: Tensor | None,
        crossed: Tensor,
        sums: Tensor,
    ) -> None:
        r, cut = self.r, self.cut
        measure = crossed is not self.final
        u = (values, values.stride(0), values.stride(2), values.stride(1)) if r.erases else _rows(r.v)
        for careful in (False, True):
            self.kernels.read[(self.chunks * self.pieces, r.heads, r.batch)](
                *_rows(r.q), *_rows(r.k), *u, *_rows(r.v), self.since, seen, met, states, self.spoiled,
                self.since if r.skip is None else r.skip, self.since if y is None else y, crossed, *sums[:2],
                *self.sizes, **self.shape, **self.exact, VALUE=r.value, BS=cut.read_slice, BV=cut.columns,
                HAS_SKIP=r.skip is not None, OUTPUTS=y is not None, MEASURE=measure, CAREFUL=careful,
                num_warps=cut.read_warps, num_stages=cut.read_stages,
            )  # fmt: skip

    def _measure(self, sums: Tensor, crossed: Tensor, energy: Tensor) -> Tensor:
        r, cut = self.r, self.cut
        found = self.empty(6 if r.erases else 4, r.batch, r.time, r.heads)
        self.kernels.measure[(self.chunks, r.heads, r.batch)](
            *self._scalars(), self.since, self.key_square, self.key_sum, *sums, crossed, energy, found,
            *self.sizes, **self.shape, VALUE=r.value, BE=256, BLOCKS=self.blocks, SUMS=sums.shape[1],
            PIECES=self.pieces, HAS_SCALE=r.write_scale is not None, num_warps=cut.measure_warps,
        )  # fmt: skip
        return found

    def _scalars(self) -> tuple[Any, ...]:
        r = self.r
        found = (r.log_decay if r.write_scale is None else r.write_scale, r.log_decay,
                 r.log_decay if r.a is None else r.a)  # fmt: skip
        return tuple(argument for x in found for argument in _rows(x))


def _rows(x: Tensor) -> tuple[Any, ...]:
    return x, *x.stride()[:3]


def _after(r: Recurrence, entering: Tensor, written: Tensor | None, position: int, length: int) -> Tensor:
    """The state after one token, from that which entered its chunk."""
    first = position // length * length
    past = slice(first, position + 1)
    # Of the tokens in between alone: from each on, what comes after it.
    remaining = r.log_decay[:, past].float().flip(1).cumsum(1).flip(1)
    survives = torch.cat([remaining[:, 1:], torch.zeros_like(remaining[:, :1])], 1).exp()
    keys = r.k[:, past].float().repeat_interleave(r.heads // r.groups, 2) * survives[..., None]
    if written is None:
        u = r.v[:, past].float()
        u = (u if r.write_scale is None else u * r.write_scale[:, past, :, None]).transpose(1, 2)
    else:
        u = written[:, :, : position + 1 - first]
    return remaining[:, 0].exp()[..., None, None] * entering + keys.permute(0, 2, 3, 1) @ u.float()
