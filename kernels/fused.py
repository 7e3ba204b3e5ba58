r"""The recurrence in fused matrix products (Triton), and the door to those for other structures.

The algebra is that of :mod:`statescope.kernels.chunked`. What differs is where things live: a program
walks a *span* of chunks with the state in registers, so only the states between spans pass through
memory, and one pass reads the past with the query and with the key. Launches (``lay_rows`` before them where
the inputs lie column by column):

1. ``prepare``: sums of the log decay inside each chunk, laid out by head.
2. ``write_spans``: what each span writes, and the square and sum of every value.
3. ``pass_states``: the state that enters each span, float32.
4. ``read_spans``: ``y``, and the overlap of each write with the decayed state.
5. ``step_spoiled``: returns at once, unless a NaN or an infinity entered a span (see Notes of :func:`scan`).
6. ``measure_steps``: norms and means by scalar recurrences inside each chunk, from what the walks carried to
   it; the walks start from the states of step 3, so that no error builds up from span to span.

This is for one decay per head and no erase term; with the delta rule's, and where a state has many keys, that
is for :mod:`statescope.kernels.fused_alike`, decay per entry for :mod:`statescope.kernels.fused_entries`,
any other erase term for :mod:`statescope.kernels.fused_pairs`, and all else that is served for
:mod:`statescope.kernels.fused_keyed`.

With ``h`` heads of ``k`` keys and ``v`` values in bfloat16, a token moves ``6 h v`` bytes of values and
outputs (values are read twice) and about ``60 h`` of scalars, and costs ``2 h (5 k v + 64 (2 k + 2 v))``
operations on the matrix units: five products with a state, one of them in two halves so that kept
states and energies carry no rounding of their inputs, and four Gram-sized products in a chunk of 64.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import fused_alike, fused_entries, fused_keyed, fused_pairs, launches
from .interface import ScanOutput, Steps
from .launches import Launcher
from .rates import Rated
from .rows import by_rows

PROGRAMS = 1584
"""Most spans times heads: twelve on each of 132 multiprocessors, six rounds of two or four of three."""

BULK_ROWS = 2**18
"""Fewest tokens times heads times sequences whose tiles are copied in bulk, which the host must set up."""

STATE_TILE = 1024
"""Entries of a state that one program passes on."""

WIDEST = 256
"""Largest number of keys whose tiles fit; values are cut into columns."""


def supports(recurrence: Recurrence) -> str | None:
    """Return None if the kernel serves this recurrence, else the reason why not."""
    if not _installed():
        return "triton is not installed"
    if recurrence.log_decay.ndim == 5 and recurrence.erases:
        return "the decay is per entry, with an erase term"
    for name, tensor in recurrence.tensors().items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{name} is {tensor.dtype}; bfloat16, float16 and float32 are served"
    if not 1 <= recurrence.key <= WIDEST or recurrence.value == 0:
        return (
            f"a state is {recurrence.key} x {recurrence.value}; 1 to {WIDEST} keys and any values are served"
        )
    if recurrence.time == 0 or recurrence.batch == 0:
        return "there is no token"
    if not (recurrence.v.is_cuda or _interpreted()):
        return f"the tensors are on {recurrence.v.device}, not on a GPU"
    return None


def scan(
    recurrence: Recurrence,
    *,
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
) -> ScanOutput:
    """Run the recurrence on the GPU: products in the inputs' precision, sums and state in float32.

    Parameters
    ----------
    recurrence : Recurrence
        What to run; :func:`supports` must return None for it.
    outputs, measure : bool
        Whether to compute ``y``, in the dtype of ``v``, and ``steps``, in float32. Measuring alone skips
        every product with the query.
    positions : sequence of int
        Tokens after which the state is kept.

    Notes
    -----
    Nothing waits for the device. A NaN or an infinity reaches no earlier token: the measurements mask the
    future after the product, and ``y`` is computed again token by token for the spans, and only those,
    in which an entry of the state stopped being finite. Results do not depend on the order in which
    programs run. ``steps.log_decay`` shares memory with a float32 ``log_decay``.
    """
    reason = supports(recurrence)
    if reason is not None:
        raise ValueError(f"the fused kernel does not serve this recurrence: {reason}")
    if not all(0 <= p < recurrence.time for p in positions):
        raise ValueError(f"positions {list(positions)} do not all lie in 0 to {recurrence.time - 1}")
    with torch.cuda.device(recurrence.v.device) if recurrence.v.is_cuda else contextlib.nullcontext():
        modern = _interpreted() or _bulk_copies(recurrence.v)
        alike = recurrence.scalar_decay and (recurrence.delta_rule or not recurrence.erases)
        if alike and not recurrence.erases and not fused_alike.wins(recurrence, modern):
            return _Scan(recurrence, outputs, measure).run(positions)
        q, k, v = (by_rows(x) for x in (recurrence.q, recurrence.k, recurrence.v))
        if (g := recurrence.log_decay).ndim == 5:
            g = Rated(by_rows(g.step), g.rate.contiguous()) if isinstance(g, Rated) else g
            r = recurrence.replace(q=q, k=k, v=v, log_decay=g)
            return fused_entries.scan(r, outputs, measure, positions)
        paired = recurrence.erases and not recurrence.delta_rule
        serves = fused_alike if alike else fused_pairs if paired else fused_keyed
        return serves.scan(recurrence, q, k, v, outputs, measure, positions, modern)


@dataclass(frozen=True)
class Tiling:
    """How a shape is cut up: sizes of tiles, and warps, stages and registers of the two walking kernels."""

    chunk: int
    keys: int
    values: int
    write_warps: int = 4
    write_stages: int = 3
    write_registers: int | None = None
    read_warps: int = 4
    read_stages: int = 2


def _tiling(key: int, value: int, half: bool, modern: bool) -> Tiling:
    """Choose the largest tiles whose accumulators stay in registers.

    ``half`` is for bfloat16 products, ``modern`` for matrix units that read shared memory by themselves
    (compute capability 9 and 10); elsewhere operands take registers too.
    """
    keys, values = (max(16, 1 << (size - 1).bit_length()) for size in (key, value))
    columns = 64 if keys <= 128 else 32
    if not half:  # three products for each, of operands twice as wide
        return Tiling(16, keys, min(values, columns // 2), 4, 1, None, 4, 1)
    if not modern:
        return Tiling(32, keys, min(values, columns), 8, 2, None, 8, 2)
    return Tiling(64, keys, min(values, columns), write_registers=168)


def _half(r: Recurrence) -> bool:
    """Whether the products take bfloat16 operands; float16 has too small a range to hold the state."""
    return all(x.dtype == torch.bfloat16 for x in (r.q, r.k, r.v))


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _bulk_copies(x: Tensor) -> bool:
    """Whether this GPU copies tiles in bulk and has the shared memory for them; desktop parts have not."""
    if _interpreted() or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10)


class _Scan:
    """One scan: the launches and the buffers between them."""

    def __init__(self, r: Recurrence, outputs: bool, measure: bool) -> None:
        from . import fused_kernels

        self.kernels: Any = fused_kernels
        self.r, self.outputs, self.measure = r, outputs, measure
        self.tiling = tiling = _tiling(r.key, r.value, _half(r), _interpreted() or _bulk_copies(r.v))
        self.q, self.k, self.v = (by_rows(x) for x in (r.q, r.k, r.v))
        self.initial = None if r.initial_state is None else r.initial_state.contiguous()
        self.chunks = -(-r.time // tiling.chunk)
        self.blocks = -(-r.value // tiling.values)
        spans = min(self.chunks, max(1, PROGRAMS // (r.batch * r.heads * self.blocks)))
        self.length = -(-self.chunks // spans)  # chunks in a span
        self.spans = -(-self.chunks // self.length)
        self.padded = self.chunks * tiling.chunk
        self.tiles = -(-r.key * r.value // STATE_TILE)
        self.sizes = {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "VALUE": r.value}
        self.walk: dict[str, Any] = self.sizes | {
            "L": tiling.chunk, "BK": tiling.keys, "BV": tiling.values,
            "BF16": _half(r) and launches.multiplies_bfloat16(r.v),
            "PRECISION": "tf32x3" if torch.version.cuda else "ieee",
        }  # fmt: skip
        self.bulk = (
            _half(r)
            and r.batch * r.time * r.heads >= BULK_ROWS
            and _bulk_copies(r.v)
            and all(self._packed(x) for x in (self.q, self.k, self.v))
        )
        self.launch = Launcher.of((outputs, measure, self.bulk, self.length), *self._tensors())
        self.buffers = _Buffers.allocate(self)

    def run(self, positions: Sequence[int]) -> ScanOutput:
        r = self.r
        self._prepare()
        self._write_spans()
        final = self._pass_states()
        y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if self.outputs else None
        if self.outputs or self.measure:
            self._read_spans(y)
        if y is not None:
            self._step_spoiled(y)
        return ScanOutput(
            y=y,
            steps=self._measure_steps() if self.measure else None,
            states=self._states_after(positions),
            final_state=final,
        )

    def _prepare(self) -> None:
        r, b = self.r, self.buffers
        self.launch(
            self.kernels.prepare, (self.chunks, r.batch, 1),
            (*self._decays(), self.k, *self.k.stride()[:3], b.run_sum, b.weight, b.key_square, b.key_sum,
             r.time, self.padded),
            {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "L": self.tiling.chunk,
             "BH": self._heads_at_once(), "BK": self.tiling.keys,
             "HAS_SCALE": r.write_scale is not None, "MEASURE": self.measure},
        )  # fmt: skip

    def _write_spans(self) -> None:
        b = self.buffers
        self._write(b.states, b.decay, self.spans)

    def _write(self, written: Tensor, decay: Tensor, spans: int, ends: Tensor | None = None) -> None:
        """Sum up what each span writes, (batch, head, span, key, value), and its log decay."""
        r, t, b = self.r, self.tiling, self.buffers
        bulk = self.bulk and ends is None  # a span cut short masks its tokens
        self.launch(
            self.kernels.write_spans, (r.heads * self.blocks, spans, r.batch),
            (*self._rows(self.k, t.keys, bulk), *self._rows(self.v, t.values, bulk), b.run_sum, b.weight,
             b.key_sum, b.weight if ends is None else ends, written, decay,
             b.value_square, b.value_sum, b.chunk_total, b.chunk_decay,
             r.time, self.padded, self.chunks, self.length, spans, r.batch),
            {**self.walk, "BULK": bulk, "STAGES": t.write_stages,
             "CUT": ends is not None, "MEASURE": self.measure and ends is None},
            keep=ends is None, num_warps=t.write_warps, **self._at_most(t.write_registers),
        )  # fmt: skip

    def _pass_states(self) -> Tensor:
        r, b = self.r, self.buffers
        final = torch.empty((r.batch, r.heads, r.key, r.value), dtype=torch.float32, device=r.v.device)
        self.launch(
            self.kernels.pass_states, (self.tiles, r.batch * r.heads, 1),
            (b.states, b.decay, final if self.initial is None else self.initial, final,
             b.spoiled, b.energy, b.total, self.spans),
            {"SIZE": r.key * r.value, "BLOCK": STATE_TILE, "STAGES": 3,
             "HAS_INITIAL": self.initial is not None},
            num_warps=4,
        )  # fmt: skip
        return final

    def _read_spans(self, y: Tensor | None) -> None:
        r, t, b = self.r, self.tiling, self.buffers
        self.launch(
            self.kernels.read_spans, (r.heads * self.blocks, self.spans, r.batch),
            (*self._rows(self.q, t.keys, self.bulk), *self._rows(self.k, t.keys, self.bulk),
             *self._rows(self.v, t.values, self.bulk), b.run_sum, b.weight, b.states,
             b.weight if r.skip is None else r.skip,
             b.weight if y is None else self._rows(y, t.values, self.bulk)[0], b.cross, b.written,
             r.time, self.padded, self.chunks, self.length, self.spans, r.batch),
            {**self.walk, "STAGES": t.read_stages, "BULK": self.bulk,
             "OUTPUTS": y is not None, "MEASURE": self.measure, "HAS_SKIP": r.skip is not None},
            num_warps=t.read_warps,
        )  # fmt: skip

    def _step_spoiled(self, y: Tensor) -> None:
        r, t, b = self.r, self.tiling, self.buffers
        values = min(t.values, 32)
        self.launch(
            self.kernels.step_spoiled, (r.heads * -(-r.value // values), self.spans, r.batch),
            (self.q, *self.q.stride()[:3], self.k, *self.k.stride()[:3], self.v, *self.v.stride()[:3],
             *self._decays(), b.states, b.spoiled, b.weight if r.skip is None else r.skip, y,
             r.time, self.length * t.chunk, self.spans, self.tiles),
            {**self.sizes, "BK": t.keys, "BV": values, "BT": 1 << (self.tiles - 1).bit_length(),
             "HAS_SCALE": r.write_scale is not None, "HAS_SKIP": r.skip is not None},
            num_warps=4,
        )  # fmt: skip

    def _measure_steps(self) -> Steps:
        r, b = self.r, self.buffers
        norm = torch.empty((r.batch, r.time, r.heads), dtype=torch.float32, device=r.v.device)
        # The results take the place of what they are made from, unless that has several blocks.
        sources = (b.value_square, b.value_sum, b.cross)
        write, mean, overlap = (x[0] if self.blocks == 1 else torch.empty_like(norm) for x in sources)
        block = self._heads_at_once()
        self.launch(
            self.kernels.measure_steps, (self.chunks, -(-r.heads // block), r.batch),
            (*self._decays(), b.key_square, b.key_sum, *sources,
             b.energy, b.total, b.written, b.chunk_total, b.chunk_decay, write, norm, mean, overlap,
             r.time, self.padded, self.chunks, self.length, self.spans, r.batch),
            {"HEADS": r.heads, "GROUPS": r.groups, "SIZE": r.key * r.value, "BLOCKS": self.blocks,
             "TILES": self.tiles, "L": self.tiling.chunk, "BH": block,
             "HAS_SCALE": r.write_scale is not None},
            num_warps=1,
        )  # fmt: skip
        return Steps(r.log_decay.to(torch.float32), write, norm, mean, overlap)

    def _states_after(self, positions: Sequence[int]) -> Tensor:
        """Return the states after some tokens: each from the span that holds it, cut short there."""
        r, count = self.r, len(positions)
        shape = (r.batch, r.heads, count, r.key, r.value)
        written = torch.empty(shape, dtype=torch.float32, device=r.v.device)
        if not positions:
            return written.transpose(1, 2)
        decay = torch.empty(shape[:3], dtype=torch.float32, device=r.v.device)
        # From pinned memory, so that the host does not wait for the device.
        ends = torch.tensor(positions, pin_memory=r.v.is_cuda).to(r.v.device, non_blocking=True)
        self._write(written, decay, count, ends)
        entered = (r.batch, r.heads, self.spans, r.key, r.value)
        states = self.buffers.states[: math.prod(entered)].view(entered)
        spans = ends.div(self.length * self.tiling.chunk, rounding_mode="floor")
        entering = states.index_select(2, spans)
        return torch.addcmul(written, entering, decay.exp2()[..., None, None]).transpose(1, 2).contiguous()

    def _heads_at_once(self) -> int:
        return min(32, max(2, 1 << (self.r.heads - 1).bit_length()))

    def _packed(self, x: Tensor) -> bool:
        """Whether x is one matrix of aligned rows, (batch * time, heads * width), that tiles cut evenly."""
        batch, time, heads, width = x.shape
        tile = self.tiling.values if x is self.v else self.tiling.keys
        return (
            width % tile == 0
            and (heads == 1 or x.stride(2) == width)
            and (batch == 1 or (x.stride(0) == time * x.stride(1) and time % self.tiling.chunk == 0))
            and x.stride(1) % 8 == 0
            and x.data_ptr() % 16 == 0
            and batch * time < 2**31
        )

    def _rows(self, x: Tensor, width: int, bulk: bool) -> tuple[Any, ...]:
        """Pass a tensor and its strides, or the descriptor the bulk copy engine takes."""
        if not bulk:
            return x, *x.stride()[:3]
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]]
        return TensorDescriptor(x, shape, [x.stride(1), 1], [self.tiling.chunk, width]), *x.stride()[:3]

    def _at_most(self, registers: int | None) -> dict[str, int]:
        """Ask for few enough registers that one more program fits a multiprocessor."""
        return {"maxnreg": registers} if self.bulk and registers is not None else {}

    def _decays(self) -> tuple[Any, ...]:
        r = self.r
        scale = r.log_decay if r.write_scale is None else r.write_scale
        return r.log_decay, *r.log_decay.stride(), scale, *scale.stride()

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernels are given; all else follows from it."""
        r = self.r
        return self.q, self.k, self.v, r.log_decay, r.write_scale, self.initial, r.skip


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What lies between the launches, float32 but for ``spoiled``; see the kernels for shapes."""

    run_sum: Tensor
    weight: Tensor
    states: Tensor
    decay: Tensor
    energy: Tensor
    total: Tensor
    spoiled: Tensor  # int32
    key_square: Tensor
    key_sum: Tensor
    written: Tensor
    chunk_total: Tensor
    chunk_decay: Tensor
    value_square: Tensor  # the last three have the shape of what takes their place
    value_sum: Tensor
    cross: Tensor

    @classmethod
    def allocate(cls, scan: _Scan) -> _Buffers:
        r, rows = scan.r, scan.r.batch * scan.r.heads
        tiles, chunks = rows * scan.tiles * scan.spans, rows * scan.chunks
        sizes = [
            rows * scan.padded, rows * scan.padded, rows * scan.spans * r.key * r.value, rows * scan.spans,
            tiles, tiles, tiles,
        ]  # fmt: skip
        if scan.measure:
            keys = r.batch * r.groups * scan.padded
            sizes += [keys, keys, scan.blocks * chunks, scan.blocks * chunks, chunks]
        aligned = [-(-size // 32) * 32 for size in sizes]
        whole = torch.empty(
            sum(aligned), dtype=torch.float32, device=r.v.device
        )  # one for all: each takes time
        pieces = list(whole.split(aligned))
        pieces[6] = pieces[6].view(torch.int32)
        if not scan.measure:  # never touched
            return cls(*pieces, *[pieces[0]] * 8)
        tokens = (scan.blocks, r.batch, r.time, r.heads)
        results = (torch.empty(tokens, dtype=torch.float32, device=r.v.device) for _ in range(3))
        return cls(*pieces, *results)
