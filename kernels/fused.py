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

This is for one decay per head. The delta rule is brought to this form by
:mod:`statescope.kernels.fused_delta`; decay per key, with it or without, is for
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
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import fused_delta, fused_keyed
from .interface import ScanOutput, Steps

PROGRAMS = 1584
"""Most spans times heads: twelve on each of 132 multiprocessors, six rounds of two or four of three."""

WIDEST = 256
"""Largest number of keys or values whose tiles fit."""


def supports(recurrence: Recurrence) -> str | None:
    """Return None if the kernel serves this recurrence, else the reason why not."""
    if not _installed():
        return "triton is not installed"
    if recurrence.log_decay.ndim == 5:
        return "the decay is per entry"
    if recurrence.erases and not recurrence.delta_rule:
        return "the recurrence has an erase term other than the delta rule's"
    if not (recurrence.v.is_cuda or _interpreted()):
        return f"the tensors are on {recurrence.v.device}, not on a GPU"
    for name, tensor in recurrence.tensors().items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{name} is {tensor.dtype}; bfloat16, float16 and float32 are served"
    for name, size in (("key", recurrence.key), ("value", recurrence.value)):
        if not 1 <= size <= WIDEST:
            return f"{name} has size {size}; 1 to {WIDEST} are served"
    if recurrence.time == 0 or recurrence.batch == 0:
        return "there is no token"
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
        if not recurrence.scalar_decay:
            q, k, v = (_by_rows(x) for x in (recurrence.q, recurrence.k, recurrence.v))
            return fused_keyed.scan(recurrence, q, k, v, outputs, measure, positions)
        if recurrence.delta_rule:
            return _erasing(recurrence, outputs, measure, positions)
        return _Scan(recurrence).run(outputs, measure, positions)


def _erasing(r: Recurrence, outputs: bool, measure: bool, positions: Sequence[int]) -> ScanOutput:
    """Find what is written, in float32; what is left erases nothing."""
    values = fused_delta.written_values(r, _by_rows(r.k), _by_rows(r.v))
    plain = r.replace(v=values, write_scale=None, a=None, skip=None)
    found = _Scan(plain).run(outputs, measure, positions)
    y = found.y
    if y is not None:
        if r.skip is not None:
            y.addcmul_(r.v.to(y.dtype), r.skip.to(y.dtype)[:, None])
        y = y.to(r.v.dtype)
    return ScanOutput(y, found.steps, found.states, found.final_state)


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


def _by_rows(x: Tensor) -> Tensor:
    """Copy only where a row is not contiguous or the offsets inside a chunk would need 64 bits."""
    if x.stride(-1) == 1 and x.stride(1) < 2**23:
        return x
    batch, time, heads, width = x.shape
    if x.stride(1) != 1 or (heads > 1 and x.stride(2) != width * x.stride(3)):
        return x.contiguous()
    from . import fused_kernels

    rows = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # a convolution in torch leaves columns
    lay_rows: Any = fused_kernels.lay_rows
    grid = (-(-time // 64), -(-heads * width // 64), batch)
    lay_rows[grid](x, x.stride(0), x.stride(3), rows, time, heads * width, BT=64, BD=64, num_warps=4)
    return rows


class _Scan:
    """One scan: the launches and the buffers between them."""

    def __init__(self, r: Recurrence) -> None:
        from . import fused_kernels

        self.kernels: Any = fused_kernels
        self.r = r
        self.tiling = tiling = _tiling(r.key, r.value, _half(r), _interpreted() or _bulk_copies(r.v))
        self.q, self.k, self.v = (_by_rows(x) for x in (r.q, r.k, r.v))
        self.chunks = -(-r.time // tiling.chunk)
        self.blocks = -(-r.value // tiling.values)
        rows = r.batch * r.heads
        spans = min(self.chunks, max(1, PROGRAMS // (rows * self.blocks)))
        self.length = -(-self.chunks // spans)  # chunks in a span
        self.spans = -(-self.chunks // self.length)
        self.padded = self.chunks * tiling.chunk
        self.run_sum, self.weight = self.empty(rows, self.padded), self.empty(rows, self.padded)
        self.sizes = {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "VALUE": r.value}
        self.tiles = {"L": tiling.chunk, "BK": tiling.keys, "BV": tiling.values}
        # The interpreter truncates bfloat16 and cannot multiply it: it is shown float32.
        self.arithmetic = {
            "BF16": _half(r) and not _interpreted(),
            "PRECISION": "tf32x3" if torch.version.cuda else "ieee",
        }
        self.bulk = _half(r) and _bulk_copies(r.v) and all(self._packed(x) for x in (self.q, self.k, self.v))

    def run(self, outputs: bool, measure: bool, positions: Sequence[int]) -> ScanOutput:
        r = self.r
        parts = _Parts.allocate(self) if measure else None
        self._prepare(parts)
        states, decay = self._write_spans(self.spans, parts)
        final, spoiled, sums = self._pass_states(states, decay)
        y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
        if outputs or measure:
            self._read_spans(states, y, parts)
        if y is not None:
            self._step_spoiled(states, spoiled, y)
        return ScanOutput(
            y=y,
            steps=None if parts is None else self._measure_steps(parts, sums),
            states=self._states_after(positions, states),
            final_state=final,
        )

    def _prepare(self, parts: _Parts | None) -> None:
        r = self.r
        self.kernels.prepare[(self.chunks, r.batch)](
            *self._decays(), self.k, *self.k.stride()[:3], self.run_sum, self.weight,
            *((self.weight, self.weight) if parts is None else (parts.key_square, parts.key_sum)),
            r.time, self.padded, r.heads, r.groups, r.key,
            self.tiling.chunk, min(32, max(2, 1 << (r.heads - 1).bit_length())), self.tiling.keys,
            r.write_scale is not None, parts is not None,
        )  # fmt: skip

    def _write_spans(
        self, spans: int, parts: _Parts | None, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what each span writes, (batch, head, span, key, value), and its log decay."""
        r, t, unused = self.r, self.tiling, self.weight
        bulk = self.bulk and ends is None  # a span cut short masks its tokens
        written = self.empty(r.batch, r.heads, spans, r.key, r.value)
        decay = self.empty(r.batch, r.heads, spans)
        self.kernels.write_spans[(r.heads * self.blocks, spans, r.batch)](
            *self._rows(self.k, t.keys, bulk), *self._rows(self.v, t.values, bulk), self.run_sum, self.weight,
            unused if parts is None else parts.key_sum, unused if ends is None else ends, written, decay,
            *((unused,) * 4 if parts is None else parts.of_values()),
            r.time, self.padded, self.chunks, self.length, spans, r.batch,
            **self.sizes, **self.tiles, **self.arithmetic,
            BULK=bulk, STAGES=t.write_stages, CUT=ends is not None, MEASURE=parts is not None,
            num_warps=t.write_warps, **self._at_most(t.write_registers),
        )  # fmt: skip
        return written, decay

    def _pass_states(self, states: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = self.r
        size, block = r.key * r.value, 1024
        tiles = -(-size // block)
        final = self.empty(r.batch, r.heads, r.key, r.value)
        spoiled = torch.empty((r.batch, r.heads, tiles, self.spans), dtype=torch.int32, device=r.v.device)
        sums = self.empty(2, r.batch, r.heads, tiles, self.spans)
        initial = None if r.initial_state is None else r.initial_state.contiguous()
        self.kernels.pass_states[(tiles, r.batch * r.heads)](
            states, decay, final if initial is None else initial, final, spoiled, sums[0], sums[1],
            self.spans,
            SIZE=size, BLOCK=block, STAGES=3, HAS_INITIAL=initial is not None, num_warps=4,
        )  # fmt: skip
        return final, spoiled, sums

    def _read_spans(self, states: Tensor, y: Tensor | None, parts: _Parts | None) -> None:
        r, t, unused = self.r, self.tiling, self.weight
        target = unused if y is None else self._rows(y, t.values, self.bulk)[0]
        measured = (unused, unused) if parts is None else (parts.cross, parts.written)
        self.kernels.read_spans[(r.heads * self.blocks, self.spans, r.batch)](
            *self._rows(self.q, t.keys, self.bulk), *self._rows(self.k, t.keys, self.bulk),
            *self._rows(self.v, t.values, self.bulk),
            self.run_sum, self.weight, states, unused if r.skip is None else r.skip, target, *measured,
            r.time, self.padded, self.chunks, self.length, self.spans, r.batch,
            **self.sizes, **self.tiles, **self.arithmetic, STAGES=t.read_stages, BULK=self.bulk,
            OUTPUTS=y is not None, MEASURE=parts is not None, HAS_SKIP=r.skip is not None,
            num_warps=t.read_warps,
        )  # fmt: skip

    def _step_spoiled(self, states: Tensor, spoiled: Tensor, y: Tensor) -> None:
        r, t = self.r, self.tiling
        tiles = spoiled.shape[2]
        values = min(t.values, 32)
        self.kernels.step_spoiled[(r.heads * -(-r.value // values), self.spans, r.batch)](
            self.q, *self.q.stride()[:3], self.k, *self.k.stride()[:3], self.v, *self.v.stride()[:3],
            *self._decays(), states, spoiled, self.weight if r.skip is None else r.skip, y,
            r.time, self.length * t.chunk, self.spans, tiles,
            **self.sizes, BK=t.keys, BV=values, BT=1 << (tiles - 1).bit_length(),
            HAS_SCALE=r.write_scale is not None, HAS_SKIP=r.skip is not None, num_warps=4,
        )  # fmt: skip

    def _measure_steps(self, parts: _Parts, sums: Tensor) -> Steps:
        r = self.r
        norm = self.empty(r.batch, r.time, r.heads)
        # The results take the place of what they are made from, unless that has several blocks.
        sources = (parts.value_square, parts.value_sum, parts.cross)
        write, mean, overlap = (p[0] if self.blocks == 1 else torch.empty_like(norm) for p in sources)
        block = min(32, max(2, 1 << (r.heads - 1).bit_length()))
        self.kernels.measure_steps[(self.chunks, -(-r.heads // block), r.batch)](
            *self._decays(), parts.key_square, parts.key_sum, *sources,
            sums[0], sums[1], parts.written, parts.chunk_total, parts.chunk_decay,
            write, norm, mean, overlap,
            r.time, self.padded, self.chunks, self.length, self.spans, r.batch,
            r.heads, r.groups, r.key * r.value, self.blocks, sums.shape[3],
            self.tiling.chunk, block, r.write_scale is not None, num_warps=1,
        )  # fmt: skip
        return Steps(r.log_decay.to(torch.float32), write, norm, mean, overlap)

    def _states_after(self, positions: Sequence[int], states: Tensor) -> Tensor:
        """Return the states after some tokens: each from the span that holds it, cut short there."""
        r = self.r
        if not positions:
            return self.empty(r.batch, 0, r.heads, r.key, r.value)
        # From pinned memory, so that the host does not wait for the device.
        ends = torch.tensor(positions, pin_memory=r.v.is_cuda).to(r.v.device, non_blocking=True)
        written, decay = self._write_spans(len(positions), None, ends)
        spans = ends.div(self.length * self.tiling.chunk, rounding_mode="floor")
        entering = states.index_select(2, spans)
        return torch.addcmul(written, entering, decay.exp2()[..., None, None]).transpose(1, 2).contiguous()

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

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised float32 on the device of the scan."""
        return torch.empty(shape, dtype=torch.float32, device=self.r.v.device)


@dataclass(frozen=True, eq=False)
class _Parts:
    """What the walks leave for the scalar recurrences; see the kernels for shapes."""

    key_square: Tensor
    key_sum: Tensor
    value_square: Tensor
    value_sum: Tensor
    cross: Tensor
    written: Tensor
    chunk_total: Tensor
    chunk_decay: Tensor

    @classmethod
    def allocate(cls, scan: _Scan) -> _Parts:
        r = scan.r
        keys = (r.batch, r.groups, scan.padded)
        tokens = (scan.blocks, r.batch, r.time, r.heads)
        chunks = (scan.blocks, r.batch, scan.chunks, r.heads)
        return cls(
            *(scan.empty(*s) for s in (keys, keys, tokens, tokens, tokens, chunks, chunks, chunks[1:]))
        )

    def of_values(self) -> tuple[Tensor, ...]:
        """Return what the first walk writes."""
        return self.value_square, self.value_sum, self.chunk_total, self.chunk_decay
