"""What kernels do with tiles of the rows of a chunk; importing it needs triton.

Base-2 logarithms as in :mod:`statescope.kernels.fused_kernels`. A chunk is ``L`` tokens, here also called
rows. Buffers between the launches are (batch, head, padded row, ...), where padding decays nothing and
writes nothing.

No product over rows is shown a NaN or an infinity, as it would reach earlier ones (0 * NaN is NaN): later
rows of the same column are marked instead.
"""

import triton
import triton.language as tl

from .fused_kernels import _bounded

SIZES = ["ROWS", "PADDED", "CHUNKS", "BATCH"]
"""Arguments for whose values nothing is compiled anew: texts differ in length."""

RANGE = tl.constexpr(90.0)
"""Most that a factor of rows which are related by a product may differ from 1, base 2: 2^37 is left for what
it multiplies."""


@triton.jit
def _halves(x):
    """A float32 as two bfloat16, the first cut off after its bits: rounded, each would be converted alone."""
    bits = x.to(tl.int32, bitcast=True)
    rest = x - (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), rest.to(tl.bfloat16)


@triton.jit
def _split(x, SPLIT: tl.constexpr):
    """With SPLIT the halves of a tile, otherwise the tile twice."""
    if SPLIT:
        high, low = _halves(x)
    else:
        high, low = x, x
    return high, low


@triton.jit
def _by_halves(a, a_low, b, b_low, c, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of two tiles of :func:`_split`, to 16 bits or more."""
    if SPLIT:
        found = tl.dot(a, b, tl.dot(a, b_low, tl.dot(a_low, b, c)))
    else:
        found = tl.dot(a, b, c, input_precision=PRECISION)
    return found


@triton.jit
def _dot(a, b, c, BF16: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of what is only read."""
    if BF16:
        found = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)
    else:
        found = tl.dot(a, b, c, input_precision=PRECISION)
    return found


@triton.jit
def _exact(a, b, c, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of what feeds back, to 16 bits or more: with SPLIT three of its halves."""
    a, a_low = _split(a, SPLIT)
    b, b_low = _split(b, SPLIT)
    return _by_halves(a, a_low, b, b_low, c, SPLIT, PRECISION)


@triton.jit
def _shown(rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of a tile of which some rows are shown; columns are not asked where all are inside."""
    mask = rows[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def _load(at, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile of whose columns some may be outside."""
    if WIDTH % BLOCK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def _state(
    states, keys, columns, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Load some keys and columns of a state."""
    at = states + keys[:, None] * VALUE + columns[None, :]
    if KEY % BLOCK == 0:
        x = _load(at, columns, VALUE, WIDTH)
    else:
        x = tl.load(at, mask=_shown(keys < KEY, columns, VALUE, WIDTH), other=0.0)
    return x


@triton.jit
def _store(at, x, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile of whose columns some may be outside."""
    if WIDTH % BLOCK == 0:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(columns < WIDTH)[None, :])


@triton.jit
def _put(x, x_low, at, plane, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """Store a tile of :func:`_split`, with SPLIT its two halves in planes one after the other."""
    _store(at, x, columns, WIDTH, BLOCK)
    if SPLIT:
        _store(at + plane, x_low, columns, WIDTH, BLOCK)


@triton.jit
def _take(at, plane, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """Load what :func:`_put` stored."""
    x = _load(at, columns, WIDTH, BLOCK)
    x_low = x
    if SPLIT:
        x_low = _load(at + plane, columns, WIDTH, BLOCK)
    return x, x_low


@triton.jit
def _unknown(L: tl.constexpr, SIZE, OTHER):
    """Rows of a chunk, down and across, neither of them known to the compiler.

    ptxas errs in products whose first operand it knows in part to be 0. So what is 0 of such an operand is
    decided by these, to which a program's arguments add the 0 that is the least of any size and 0.
    """
    rows = tl.arange(0, L)
    return (rows + tl.minimum(SIZE, 0))[:, None], (rows + tl.minimum(OTHER, 0))[None, :]


@triton.jit
def _since_bad(bad):
    """NaN from the first row on that is bad, 0 before."""
    return tl.cumsum(tl.where(bad, float("nan"), 0.0), 0)


@triton.jit
def _marked(x):
    """What is finite of rows, and NaN in every column from its first entry on that is not."""
    bad = ~(tl.abs(x) < float("inf"))
    mark = tl.zeros(x.shape, tl.float32)
    if tl.max(bad.to(tl.int32)) > 0:
        mark = _since_bad(bad)
    return tl.where(bad, 0.0, x).to(x.dtype), mark


@triton.jit
def _within(halfway, total, MOST: tl.constexpr):
    """1 for each key that forgets no more than that in either half; 0 also for what is no number."""
    return ((halfway >= -MOST) & (total - halfway >= -MOST) & (total < float("inf"))).to(tl.int32)


@triton.jit
def _invert_blocks(blocks, L: tl.constexpr, PART: tl.constexpr):
    """Invert I - M in place, in blocks of PART rows; ``blocks`` is where that of each column begins."""
    column = tl.arange(0, blocks.shape[0]) % PART
    found = ()
    for row in tl.static_range(PART):
        entry = tl.where(column == row, 1.0, 0.0)
        for earlier in tl.static_range(row):
            entry = tl.fma(tl.load(blocks + (row * L + earlier)), found[earlier], entry)
        found = found + (entry,)  # noqa: RUF005 - triton has no other way
    tl.debug_barrier()
    for row in tl.static_range(PART):
        tl.store(blocks + (row * L + column), found[row])
    tl.debug_barrier()


@triton.jit
def _join(
    system, SIZE: tl.constexpr, L: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    r"""Below two blocks on the diagonal that are inverted, find the inverse :math:`D_1 M_{10} D_0`."""
    part = tl.arange(0, SIZE)
    at = system + (part[:, None] * L + part[None, :])
    below = tl.load(at + SIZE * L)
    below = _exact(below, tl.load(at), tl.zeros((SIZE, SIZE), tl.float32), SPLIT, PRECISION)
    mark = tl.zeros((SIZE, SIZE), tl.float32)
    if CAREFUL:
        below, mark = _marked(below)
    below = _exact(tl.load(at + SIZE * (L + 1)), below, mark, SPLIT, PRECISION)
    tl.debug_barrier()
    tl.store(at + SIZE * L, below)


@triton.jit
def _invert(
    system, L: tl.constexpr, PART: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Invert I - M in place for a strictly lower M: blocks on the diagonal row by row, then two by two."""
    lanes = tl.arange(0, L)
    _invert_blocks(system + lanes // PART * (PART * L + PART), L, PART)
    for first in tl.static_range(0, L - PART, 2 * PART):
        _join(system + first * (L + 1), PART, L, SPLIT, PRECISION, CAREFUL)
    tl.debug_barrier()
    if L > 2 * PART:
        _join(system, 2 * PART, L, SPLIT, PRECISION, CAREFUL)
        tl.debug_barrier()


@triton.jit
def _tile(x, x_t, rows, there, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block of columns of rows that are there, zero elsewhere."""
    mask = _shown(there, columns, WIDTH, BLOCK)
    return tl.load(x + rows[:, None] * x_t + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY: tl.constexpr, BLOCK: tl.constexpr):
    """The log decay of rows, of every key, base 2."""
    mask = _shown(decays, keys, KEY, BLOCK)
    return _bounded(tl.load(log_decay + tokens[:, None] * g_t + keys[None, :] * g_k, mask=mask, other=0.0))


@triton.jit
def _along(x):
    """Sum along rows, kept as a column: so triton 3.6 does not try to move the sum out of a loop."""
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _finite(x):
    """What is finite of rows, 0 elsewhere; and whether a row is finite whole."""
    good = tl.abs(x) < float("inf")
    return tl.where(good, x, 0.0).to(x.dtype), tl.min(good.to(tl.int32), 1)


@triton.jit
def _without_bad(at, mask):
    """Put 0 where something is not finite; return NaN for rows from the first such one on."""
    found, fine = _finite(tl.load(at, mask=mask, other=0.0))
    tl.debug_barrier()
    tl.store(at, found, mask=mask)
    tl.debug_barrier()
    return _since_bad(fine == 0)[:, None]


@triton.jit
def _halves_of_input(a, a_low, b, c, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of a tile of :func:`_split` with an input, which in bfloat16 is its own first half."""
    if SPLIT and b.dtype == tl.bfloat16:
        found = tl.dot(a, b, tl.dot(a_low, b, c))
    else:
        b, b_low = _split(b.to(tl.float32), SPLIT)
        found = _by_halves(a, a_low, b, b_low, c, SPLIT, PRECISION)
    return found
