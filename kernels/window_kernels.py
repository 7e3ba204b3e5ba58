"""The device code of :mod:`statescope.kernels.windows`; importing it needs triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["TIME"])
def thin_windows(
    steps, out, TIME, HEADS, WINDOW, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Walk the tokens of one window, ``ROWS`` at a time, ``COLUMNS`` heads side by side.

    ``steps`` is (5, batch, time, head), ``out`` (6, batch, window, head).
    Grid: (windows, blocks of heads, batch).
    """
    entry = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    first = entry * WINDOW
    length = tl.minimum(TIME - first, WINDOW).to(tl.int32)
    field = tl.num_programs(2).to(tl.int64) * TIME * HEADS
    steps += (batch * TIME + first) * HEADS
    forgotten = tl.zeros((COLUMNS,), tl.float64)
    energy = tl.zeros((COLUMNS,), tl.float64)
    weighted = tl.zeros((COLUMNS,), tl.float64)
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    unknown = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, length, ROWS):
        here = start + rows
        at = here[:, None] * HEADS + heads[None, :]
        mask = (here < length)[:, None] & (heads < HEADS)[None, :]
        write = tl.load(steps + field + at, mask=mask, other=0.0).to(tl.float64)
        overlap = tl.load(steps + 4 * field + at, mask=mask, other=0.0).to(tl.float64)
        norm = tl.load(steps + 2 * field + at, mask=mask, other=float("-inf"))
        forgotten += tl.sum(tl.load(steps + at, mask=mask, other=0.0).to(tl.float64), 0)
        energy += tl.sum(write * write, 0)
        weighted += tl.sum(write * write * overlap, 0)
        largest = tl.maximum(largest, tl.max(tl.where(norm == norm, norm, float("-inf")), 0))
        unknown += tl.sum((norm != norm).to(tl.int32), 0)
    there = heads < HEADS
    last = (length - 1).to(tl.int64) * HEADS + heads
    mean = weighted / tl.where(energy == 0.0, 1.0, energy)
    field_out = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * HEADS
    out += (batch * tl.num_programs(0) + entry) * HEADS + heads
    tl.store(out, forgotten.to(tl.float32), mask=there)
    tl.store(out + field_out, tl.sqrt(energy).to(tl.float32), mask=there)
    tl.store(out + 2 * field_out, tl.load(steps + 2 * field + last, mask=there), mask=there)
    tl.store(out + 3 * field_out, tl.load(steps + 3 * field + last, mask=there), mask=there)
    tl.store(out + 4 * field_out, mean.to(tl.float32), mask=there)
    tl.store(out + 5 * field_out, tl.where(unknown > 0, float("nan"), largest), mask=there)
