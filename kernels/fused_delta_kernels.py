"""The device code of :mod:`statescope.kernels.fused_delta`; importing it needs triton.

Shapes, clamping and base-2 logarithms as in :mod:`statescope.kernels.fused_kernels`. A chunk is two blocks
of 16 tokens: the smallest that a matrix unit takes, and few enough rows to substitute one by one.
"""

import triton
import triton.language as tl

from .fused_kernels import _bounded, _tile

SLICE = tl.constexpr(32)
"""Keys multiplied at once."""


@triton.jit
def _pair(
    k, k_t, run, i, j, stop, a,
    KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What block ``i`` of a chunk reads, with its keys, of what block ``j`` before it wrote."""
    rows = tl.arange(0, 16)
    late, early = i * 16 + rows, j * 16 + rows
    gram = tl.zeros((16, 16), tl.float32)
    for first in range(0, KEY, SLICE):
        keys = first + tl.arange(0, SLICE)
        inside = (keys < KEY)[None, :]
        at, under = late[:, None] * k_t + keys[None, :], early[:, None] * k_t + keys[None, :]
        upper = tl.load(k + at, mask=(late < stop)[:, None] & inside, other=0.0).to(tl.float32)
        lower = tl.load(k + under, mask=(early < stop)[:, None] & inside, other=0.0).to(tl.float32)
        gram = tl.dot(upper, tl.trans(lower), gram, input_precision=PRECISION)
    past = tl.exp2(tl.load(run + late)[:, None] - tl.load(run + early)[None, :])
    return gram * past * a[:, None]


@triton.jit
def _own(k, k_t, run, i, stop, a, KEY: tl.constexpr, PRECISION: tl.constexpr):
    """Invert the diagonal block ``i`` of ``I - M``, row by row."""
    rows = tl.arange(0, 16)
    gram = _pair(k, k_t, run, i, i, stop, a, KEY, PRECISION)
    system = tl.where(rows[:, None] > rows[None, :], gram, 0.0)
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for row in range(1, 16):
        weights = tl.sum(tl.where(rows[:, None] == row, system, 0.0), 0)  # of the rows above
        found = tl.sum(weights[:, None] * inverse, 0)
        inverse += tl.where(rows[:, None] == row, found[None, :], 0.0)
    return inverse


@triton.jit
def _put(inverse, i, j, block, L: tl.constexpr):
    rows = tl.arange(0, 16)
    tl.store(inverse + (i * 16 + rows)[:, None] * L + (j * 16 + rows)[None, :], block)


@triton.jit
def invert(
    k, k_b, k_t, k_g, a, a_b, a_t, a_h, run, inverse,
    TIME, PADDED,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r"""Invert the triangular system of each chunk.

    .. math:: T = (I - M)^{-1}, \qquad M_{tj} = a_t e^{G_t - G_j} (k_t \cdot k_j) \quad (j < t)

    Rows of a block are substituted one by one; between the two, :math:`T_{10} = T_{11} M_{10} T_{00}`.
    ``inverse`` is (batch, head, time, L). Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = chunk * L
    stop = tl.minimum(TIME - first, L).to(tl.int32)
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + first * a_t + head * a_h
    run += (batch * HEADS + head) * PADDED + first
    inverse += ((batch * HEADS + head) * PADDED + first) * L
    rows = tl.arange(0, 16)
    a0 = tl.load(a + rows * a_t, mask=rows < stop, other=0.0).to(tl.float32)
    a1 = tl.load(a + (rows + 16) * a_t, mask=rows + 16 < stop, other=0.0).to(tl.float32)
    t00 = _own(k, k_t, run, 0, stop, a0, KEY, PRECISION)
    t11 = _own(k, k_t, run, 1, stop, a1, KEY, PRECISION)
    m10 = _pair(k, k_t, run, 1, 0, stop, a1, KEY, PRECISION)
    t10 = tl.dot(t11, tl.dot(m10, t00, input_precision=PRECISION), input_precision=PRECISION)
    nothing = tl.zeros((16, 16), tl.float32)
    _put(inverse, 0, 0, t00, L)
    _put(inverse, 0, 1, nothing, L)
    _put(inverse, 1, 0, t10, L)
    _put(inverse, 1, 1, t11, L)


@triton.jit
def correct(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, a, a_b, a_t, a_h, run, weight, inverse, initial,
    values, spoiled, entered,
    TIME, PADDED,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    r"""Walk all chunks with the state in registers, and write what each token writes.

    .. math:: U = T \bigl(W V + \operatorname{diag}(a_t e^{G_t})\, K S_{in}\bigr), \qquad
              S_{out} = e^{G_L} S_{in} + K^\top \operatorname{diag}(e^{G_L - G_t})\, U

    ``values`` is (batch, time, head, value). ``spoiled`` (batch, head, block) is the first token of the chunk
    in which an entry of the state stopped being finite, ``TIME`` if none did, and ``entered`` (batch, head,
    key, value) the state that entered it. Grid: (head * blocks of columns, batch).
    """
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = head // (HEADS // GROUPS)
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, L)
    keys = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
    at = (batch * HEADS + head) * (KEY * VALUE) + keys[:, None] * VALUE + columns[None, :]
    if HAS_INITIAL:
        state = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    run += (batch * HEADS + head) * PADDED
    weight += (batch * HEADS + head) * PADDED
    inverse += (batch * HEADS + head) * PADDED * L
    a += batch * a_b + head * a_h
    values += (batch * TIME * HEADS + head) * VALUE
    # A state that enters with a NaN in it is stepped from the start.
    found = tl.zeros((), tl.int32) + TIME
    if tl.min((tl.abs(state) < float("inf")).to(tl.int32)) == 0:
        found = tl.zeros((), tl.int32)
        tl.store(entered + at, state, mask=inside)
    first = tl.zeros((), tl.int64)
    for _ in tl.range(0, tl.cdiv(TIME, L), num_stages=STAGES):
        left = tl.minimum(TIME - first, L).to(tl.int32)
        kt = _tile(k, k_b, k_t, k_g, batch, first, group, 0, rows, TIME, TIME, KEY, BK, False).to(tl.float32)
        vt = _tile(v, v_b, v_t, v_h, batch, first, head, block * BV, rows, TIME, TIME, VALUE, BV, False)
        g = tl.load(run + rows)
        last = tl.load(run + L - 1)
        rate = tl.load(a + first * a_t + rows * a_t, mask=rows < left, other=0.0).to(tl.float32) * tl.exp2(g)
        read = tl.dot(kt, state, input_precision=PRECISION) * rate[:, None]
        read += vt.to(tl.float32) * tl.load(weight + rows)[:, None]
        solved = tl.load(inverse + rows[:, None] * L + rows[None, :])
        u = tl.dot(solved, read, input_precision=PRECISION)
        there = (rows < left)[:, None] & (columns < VALUE)[None, :]
        tl.store(values + (first + rows[:, None]) * (HEADS * VALUE) + columns[None, :], u, mask=there)
        kt *= tl.exp2(last - g)[:, None]
        after = tl.dot(tl.trans(kt), u, state * tl.exp2(last), input_precision=PRECISION)
        if found == TIME:
            if tl.min((tl.abs(after) < float("inf")).to(tl.int32)) == 0:
                found = first.to(tl.int32)
                tl.store(entered + at, state, mask=inside)
        state = after
        first += L
        run += L
        weight += L
        inverse += L * L
    tl.store(spoiled + (batch * HEADS + head) * blocks + block, found)


@triton.jit
def step_spoiled(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, log_decay, g_b, g_t, g_h, scale, w_b, w_t, w_h, a, a_b, a_t, a_h,
    values, spoiled, entered,
    TIME,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Step on from the chunk where a state stopped being finite, so that no earlier token sees it.

    Every other program returns at once. Grid: (head * blocks of columns, batch).
    """
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = head // (HEADS // GROUPS)
    batch = tl.program_id(1).to(tl.int64)
    first = tl.load(spoiled + (batch * HEADS + head) * blocks + block)
    if first < TIME:
        start = first.to(tl.int64)
        keys = tl.arange(0, BK)
        columns = block * BV + tl.arange(0, BV)
        k += batch * k_b + start * k_t + group * k_g
        v += batch * v_b + start * v_t + head * v_h
        log_decay += batch * g_b + start * g_t + head * g_h
        scale += batch * w_b + start * w_t + head * w_h
        a += batch * a_b + start * a_t + head * a_h
        values += ((batch * TIME + start) * HEADS + head) * VALUE
        inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
        at = (batch * HEADS + head) * (KEY * VALUE) + keys[:, None] * VALUE + columns[None, :]
        state = tl.load(entered + at, mask=inside, other=0.0)
        for _ in range(TIME - first):
            kt = tl.load(k + keys, mask=keys < KEY, other=0.0).to(tl.float32)
            u = tl.load(v + columns, mask=columns < VALUE, other=0.0).to(tl.float32)
            if HAS_SCALE:
                u *= tl.load(scale).to(tl.float32)
                scale += w_t
            state = state * tl.exp2(_bounded(tl.load(log_decay)))
            u += tl.load(a).to(tl.float32) * tl.sum(state * kt[:, None], 0)
            state += tl.where(inside, kt[:, None] * u[None, :], 0.0)
            tl.store(values + columns, u, mask=columns < VALUE)
            k += k_t
            v += v_t
            log_decay += g_t
            a += a_t
            values += HEADS * VALUE
