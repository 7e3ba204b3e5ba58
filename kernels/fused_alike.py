r"""Heads whose keys all decay alike on a GPU (Triton): the delta rule, and states wide in keys (RetNet).

The algebra is that of :mod:`statescope.kernels.chunked` and :mod:`statescope.kernels.delta`. All launches but
``walk`` do all chunks at once:

1. ``pace``: what each chunk forgets. ``invert``, under the delta rule: what is erased of one write after
   another.
2. ``walk``: over all chunks for each head and block of the state, which stays in registers: the state that
   enters each chunk, its energy, and under the delta rule what is written.
3. ``prepare``, meanwhile: what queries and keys of a chunk read of its earlier writes.
4. ``read``: ``y``, and what is written beside what is stored.
5. ``measure``: energy and sum of the state token by token, from scalars alone.

``invert``, ``walk`` and ``read`` are launched again, and return at once for every head that no NaN and no
infinity has entered. A long text is cut into stretches, of which one is walked while others are prepared and
read: a walk leaves most of a GPU idle.

What feeds back into later writes is computed by products of bfloat16 halves, or with other inputs in tf32x3;
what is only read, in bfloat16 or float32. Nothing waits for the device.

With ``h`` heads of ``k`` keys and ``v`` values in bfloat16, in chunks of 64, a token moves ``h (10 k + 6 v)``
bytes of inputs and outputs, ``512 h`` of relations between rows and ``h k v / 16`` of states; under the delta
rule ``h (2 k + 2 v + 768)`` more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import launches
from .interface import ScanOutput, Steps
from .launches import Launcher

ROWS = 2**19
"""Tokens times heads times sequences of a stretch: bounds the memory whatever the length.

One stretch is walked while others are prepared and read. Shorter ones would wait for the host.
"""

BESIDE = 2**16
"""Fewest tokens times heads times sequences that are walked on a stream of their own."""

PART = 16
"""Rows of a block that is inverted row by row; a chunk has one, two or four."""


ALIKE = {"enable_fp_fusion": False}
"""Where a product and a sum were one operation here and two there, what is done again would differ a bit."""

ENTRIES = 256
"""Energies that are added up at once."""


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
            return Tiling(64, 64, keys, 32, 64, min(values, 128), stages=3, walk_stages=3, read_stages=3)
        return Tiling(64, 64, 64, 64, 64, min(values, 128), stages=3, walk_stages=3, read_stages=3)
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
    work = _Scan(r, modern, outputs, measure)
    state, before = r.initial_state, None
    kept: dict[int, Tensor] = {}
    for first in range(0, r.time, work.stretch):
        stop = min(first + work.stretch, r.time)
        here = [p for p in positions if first <= p < stop]
        part = _Part(work, first, stop, state, here)
        part.pace()
        part.walk()
        part.prepare()
        state = part.final
        if before is not None:
            kept |= before.finish()
        before = part
    assert before is not None
    kept |= before.finish()
    steps = None if work.found is None else Steps(r.log_decay.to(torch.float32), *work.found[:4])
    return ScanOutput(
        work.y,
        steps,
        torch.stack([kept[p] for p in positions], 1) if positions else before.final[:, None][:, :0],
        before.final,
        work.found[4:] if work.found is not None and r.erases else None,
    )


class _Scan:
    """What the stretches of one text share: tiles, results, the stream of the walks, compiled kernels."""

    def __init__(self, r: Recurrence, modern: bool, outputs: bool, measure: bool) -> None:
        from . import fused_alike_kernels

        self.kernels: Any = fused_alike_kernels
        self.r, self.outputs, self.measure = r, outputs, measure
        half = halves(r)
        self.cut = cut = tiling(r, half, modern)
        self.stretch = cut.chunk * max(1, ROWS // (r.batch * r.heads * cut.chunk))
        overlaps = r.v.is_cuda and r.batch * r.time * r.heads >= BESIDE
        self.side = torch.cuda.Stream(r.v.device, priority=-1) if overlaps else None
        self.split = half and launches.multiplies_bfloat16(r.v)
        self.dtype = torch.bfloat16 if self.split else torch.float32
        self.y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
        fields = (6 if r.erases else 4, r.batch, r.time, r.heads)
        self.found = torch.empty(fields, dtype=torch.float32, device=r.v.device) if measure else None
        self.blocks, self.pieces = -(-r.value // cut.walked), -(-r.value // cut.columns)
        self.across = -(-r.key // cut.walked_keys)
        self.shape = {"HEADS": r.heads, "KEY": r.key, "L": cut.chunk}
        self.exact = {
            "GROUPS": r.groups, "PRECISION": "tf32x3" if torch.version.cuda else "ieee", "SPLIT": self.split,
        }  # fmt: skip
        tensors = (r.q, r.k, r.v, r.log_decay, r.write_scale, r.a, r.initial_state, r.skip)
        self._launch = Launcher.of((__name__, cut, self.split), *tensors)

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launch a kernel, again if another stretch or text like this has been here."""
        function = getattr(self.kernels, name)
        self._launch(function, grid, arguments, constants, variant=tuple(constants.values()), **options)


class _Part:
    """A stretch of the text, of which all chunks are worked on at once."""

    def __init__(
        self, work: _Scan, first: int, stop: int, state: Tensor | None, positions: Sequence[int]
    ) -> None:
        self.work, self.first, self.stop, self.positions = work, first, stop, positions
        self.r = r = work.r.between(first, stop, None if state is None else state.float().contiguous())
        cut, reads = work.cut, work.outputs or work.measure
        self.chunks = -(-r.time // cut.chunk)
        self.padded = self.chunks * cut.chunk
        self.sizes = (r.time, self.padded, self.chunks, r.batch)
        heads = (r.batch, r.heads)

        def empty(asked: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=r.v.device) if asked else self.final

        self.final = torch.empty((*heads, r.key, r.value), dtype=torch.float32, device=r.v.device)
        self.spoiled = torch.zeros(heads, dtype=torch.int32, device=r.v.device)
        self.of_rows = empty(True, 6, *heads, self.padded)
        square = (*heads, self.padded, cut.chunk)
        self.inverse = empty(r.erases, *square)
        if r.erases and work.split:  # two bfloat16 in its place
            self.inverse = self.inverse.view(torch.bfloat16).view(2, -1)
        self.system = empty(r.erases, *square)
        self.states = empty(reads, *heads, self.chunks, r.key, r.value, dtype=work.dtype)
        self.values = empty(reads and r.erases, *heads, self.padded, r.value, dtype=work.dtype)
        self.energy = empty(work.measure, *heads, self.chunks, work.blocks, r.key, 2)
        self.walked_sums = empty(work.measure and r.erases, work.blocks, *heads, self.padded, 4)
        self.read_sums = empty(work.measure, 3, work.pieces, *heads, self.padded)
        self.held = sorted({p // cut.chunk for p in self.relative})
        self.entered = empty(bool(self.held), len(self.held), *heads, r.key, r.value)
        self.written = empty(bool(self.held) and r.erases, len(self.held), *heads, cut.chunk, r.value)
        self.slots = self._slots() if self.held else self.final
        self.ready = torch.cuda.Event() if work.side is not None else None

    @property
    def relative(self) -> list[int]:
        """Positions counted from the first token of the stretch."""
        return [p - self.first for p in self.positions]

    def pace(self) -> None:
        """Find what the walk needs of decays, and invert what is erased."""
        r, work = self.r, self.work
        self.work.launch(
            "pace", (self.chunks, r.heads, r.batch),
            (*self._scalars(), *self.of_rows[:4], *self.sizes),
            {"HEADS": r.heads, "L": work.cut.chunk, "ERASES": r.erases,
             "HAS_SCALE": r.write_scale is not None},
            num_warps=1,
        )  # fmt: skip
        if r.erases:
            self._invert(careful=False)
        if self.ready is not None:
            self.ready.record()

    def prepare(self) -> None:
        """Relate the rows of each chunk, while it is walked."""
        r, work, cut = self.r, self.work, self.work.cut
        shape = (r.batch, r.heads, self.padded, cut.chunk)
        self.seen, self.met = (
            torch.empty(shape, dtype=work.dtype, device=r.v.device) if asked else self.final
            for asked in (work.outputs, work.measure)
        )
        if not (work.outputs or work.measure):
            return
        self.work.launch(
            "prepare", (self.chunks, r.heads, r.batch),
            (*_rows(r.q), *_rows(r.k), *self._scalars()[:8], *self.of_rows[4:], self.seen, self.met,
             *self.sizes),
            {**work.shape, **work.exact, "BS": cut.slice, "ERASES": r.erases,
             "HAS_SCALE": r.write_scale is not None, "OUTPUTS": work.outputs, "MEASURE": work.measure},
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def _invert(self, careful: bool) -> None:
        r, work, cut = self.r, self.work, self.work.cut
        self.work.launch(
            "invert", (self.chunks, r.heads, r.batch),
            (*_rows(r.k), *self._scalars()[4:], self.system, self.inverse, self.spoiled, *self.sizes),
            {**work.shape, **work.exact, "PART": PART, "BS": cut.slice, "CAREFUL": careful},
            num_warps=cut.warps, num_stages=1, **ALIKE,
        )  # fmt: skip

    def walk(self) -> None:
        """Find the states that enter chunks, beside whatever else is done meanwhile."""
        if self.work.side is None:
            self._walk_all()
            return
        assert self.ready is not None
        self.work.side.wait_event(self.ready)
        with torch.cuda.stream(self.work.side):
            self._walk_all()
            self.ready.record()

    def _walk_all(self) -> None:
        self._walk(careful=False)
        if self.r.erases:
            self._invert(careful=True)
            self._walk(careful=True)

    def _walk(self, careful: bool) -> None:
        r, work, cut = self.r, self.work, self.work.cut
        initial = self.final if r.initial_state is None else r.initial_state
        work.launch(
            "walk", (r.heads * work.blocks * work.across, r.batch),
            (*_rows(r.k), *_rows(r.v), *self.of_rows[:4], self.inverse, initial, self.final, self.states,
             self.values, self.energy, self.walked_sums, self.entered, self.written, self.slots, self.spoiled,
             *self.sizes),
            {**work.shape, **work.exact, "VALUE": r.value, "BK": cut.walked_keys, "BV": cut.walked,
             "STAGES": cut.walk_stages, "ERASES": r.erases, "HAS_INITIAL": r.initial_state is not None,
             "STORE": work.outputs or work.measure, "MEASURE": work.measure, "KEEP": bool(self.held),
             "CAREFUL": careful},
            num_warps=cut.walk_warps, **ALIKE,
        )  # fmt: skip

    def finish(self) -> dict[int, Tensor]:
        """Read and measure, and return the states after the positions asked for."""
        if self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)
        if self.work.outputs or self.work.measure:
            self._read(careful=False)
            self._read(careful=True)
        if self.work.measure:
            self._measure()
        return dict(zip(self.positions, map(self._state_after, self.relative), strict=True))

    def _read(self, careful: bool) -> None:
        r, work, cut = self.r, self.work, self.work.cut
        u = (self.values, *_strides(self.values.transpose(1, 2))) if r.erases else _rows(r.v)
        y = self.final if work.y is None else work.y[:, self.first : self.stop]
        work.launch(
            "read", (self.chunks * work.pieces, r.heads, r.batch),
            (*_rows(r.q), *_rows(r.k), *u, *_rows(r.v), self.of_rows[0], self.seen, self.met, self.states,
             self.spoiled, self.final if r.skip is None else r.skip, y, y.stride(0), *self._read_sums(),
             *self.sizes),
            {**work.shape, **work.exact, "VALUE": r.value, "BS": cut.read_slice, "BV": cut.columns,
             "ERASES": r.erases, "HAS_SKIP": r.skip is not None, "OUTPUTS": work.outputs,
             "MEASURE": work.measure, "CAREFUL": careful},
            num_warps=cut.read_warps, num_stages=cut.read_stages, **ALIKE,
        )  # fmt: skip

    def _measure(self) -> None:
        r, work = self.r, self.work
        assert work.found is not None
        found = work.found[:, :, self.first : self.stop]
        crossed, square, total = self._read_sums()
        sums = (square, square, total)
        if r.erases:
            square, removed, total, _ = self.walked_sums.unbind(-1)
            sums = (square, removed, total)
        work.launch(
            "measure", (self.chunks * r.heads, r.batch),
            (*self._scalars(), *self.of_rows[4:], *sums, crossed, self.energy, found, *found.stride()[:2],
             *self.sizes),
            {**work.shape, "VALUE": r.value, "BE": ENTRIES, "BLOCKS": work.blocks, "SUMS": sums[0].shape[0],
             "STEP": sums[0].stride(-1), "PIECES": work.pieces, "ERASES": r.erases,
             "HAS_SCALE": r.write_scale is not None},
            num_warps=1,
        )  # fmt: skip

    def _read_sums(self) -> tuple[Tensor, ...]:
        return self.read_sums.unbind() if self.work.measure else (self.final,) * 3

    def _scalars(self) -> tuple[Any, ...]:
        r = self.r
        found = (r.log_decay if r.write_scale is None else r.write_scale, r.log_decay,
                 r.log_decay if r.a is None else r.a)  # fmt: skip
        return tuple(argument for x in found for argument in _rows(x))

    def _slots(self) -> Tensor:
        """Where the states that enter chunks are kept, -1 if nowhere."""
        slots = torch.full((self.chunks,), -1, dtype=torch.int32)
        slots[self.held] = torch.arange(len(self.held), dtype=torch.int32)
        # From pinned memory, so that the host does not wait for the device.
        return slots.pin_memory().to(self.r.v.device, non_blocking=True) if self.r.v.is_cuda else slots

    def _state_after(self, position: int) -> Tensor:
        """The state after one token, from that which entered its chunk."""
        r, chunk = self.r, position // self.work.cut.chunk
        first, slot = chunk * self.work.cut.chunk, self.held.index(chunk)
        past = slice(first, position + 1)
        # Of the tokens in between alone: from each on, what comes after it.
        remaining = r.log_decay[:, past].float().flip(1).cumsum(1).flip(1)
        survives = torch.cat([remaining[:, 1:], torch.zeros_like(remaining[:, :1])], 1).exp()
        keys = r.k[:, past].float().repeat_interleave(r.heads // r.groups, 2) * survives[..., None]
        if r.erases:
            u = self.written[slot, :, :, : position + 1 - first]
        else:
            u = r.v[:, past].float()
            u = (u if r.write_scale is None else u * r.write_scale[:, past, :, None]).transpose(1, 2)
        return remaining[:, 0].exp()[..., None, None] * self.entered[slot] + keys.permute(0, 2, 3, 1) @ u


def _rows(x: Tensor) -> tuple[Any, ...]:
    return x, *_strides(x)


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]
