"""The device code of :mod:`statescope.kernels.loss`; importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_rows(logits, stride, targets, loss, VOCABULARY, BLOCK: tl.constexpr):  # fmt: skip
    """Walk a row once, with the largest logit so far and the sum below it kept per lane. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < VOCABULARY, other=float("-inf"))
        x = x.to(tl.float32)
        now = tl.where(x > largest, x, largest)  # a NaN is not larger, and spoils the sum instead
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = now
    peak = tl.max(largest, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    summed = tl.sum(total * tl.exp(largest - shift), 0)
    wanted = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(loss + row, tl.log(summed) + shift - wanted)
