"""The device code of :mod:`statescope.kernels.fused_keyed`; importing it needs triton.

Shapes and base-2 logarithms as in :mod:`statescope.kernels.fused_kernels`. A chunk is 16 tokens, the fewest
that a matrix unit takes: between two of them the decay of every key is computed as it is, so that no
exponent is positive.
"""

import triton
import triton.language as tl

from .fused_kernels import _bounded

L = tl.constexpr(16)
"""Tokens of a chunk."""


@triton.jit
def _compose(decay, amount, later_decay, later_amount):
    """Two stretches of a linear recurrence as one."""
    return decay * later_decay, amount * later_decay + later_amount


@triton.jit
def relate(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h,
    run, seen, inverse,
    TIME, PADDED,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, BK: tl.constexpr,
    OUTPUTS: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    r"""Relate the tokens of each chunk to one another.

    ``run`` (batch, head, time, key) is the running sum of the log decay in the chunk, base 2, ``seen``
    (batch, head, time, 16) what the query reads of each write,

    .. math:: A_{tj} = \sum_k e^{G_{tk} - G_{jk}}\, q_{tk} k_{jk} \quad (j \le t) ,

    and ``inverse``, alike, that of :math:`I - M` with :math:`M_{tj} = a_t \sum_k e^{G_{tk} - G_{jk}} k_{tk}
    k_{jk}` for :math:`j < t`, substituted row by row. Grid: (chunks, heads, batch).
    """
    first = tl.program_id(0).to(tl.int64) * L
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (HEADS // GROUPS)
    left = tl.minimum(TIME - first, L).to(tl.int32)
    rows = tl.arange(0, L)
    keys = tl.arange(0, BK)
    there = (rows < left)[:, None] & (keys < KEY)[None, :]
    q += batch * q_b + first * q_t + group * q_g
    k += batch * k_b + first * k_t + group * k_g
    log_decay += batch * g_b + first * g_t + head * g_h
    g = tl.load(log_decay + rows[:, None] * g_t + keys[None, :] * g_k, mask=there, other=0.0)
    total = tl.cumsum(_bounded(g), 0)
    row = (batch * HEADS + head) * PADDED + first
    tl.store(run + (row + rows)[:, None] * KEY + keys[None, :], total, mask=(keys < KEY)[None, :])
    tl.debug_barrier()  # rows of it are read again, by other threads
    kt = tl.load(k + rows[:, None] * k_t + keys[None, :], mask=there, other=0.0).to(tl.float32)
    qt = kt
    if OUTPUTS:
        qt = tl.load(q + rows[:, None] * q_t + keys[None, :], mask=there, other=0.0).to(tl.float32)
    of_query = tl.zeros((L, L), tl.float32)
    of_key = tl.zeros((L, L), tl.float32)
    for j in range(left):
        own = tl.load(run + (row + j) * KEY + keys, mask=keys < KEY, other=0.0)
        write = tl.load(k + j * k_t + keys, mask=keys < KEY, other=0.0).to(tl.float32)
        past = tl.where((rows >= j)[:, None], tl.exp2(total - own[None, :]) * write[None, :], 0.0)
        column = (rows == j)[None, :] & (rows >= j)[:, None]
        if OUTPUTS:
            of_query = tl.where(column, tl.sum(qt * past, 1)[:, None], of_query)
        if DELTA:
            of_key = tl.where(column, tl.sum(kt * past, 1)[:, None], of_key)
    at = (row + rows)[:, None] * L + rows[None, :]
    if OUTPUTS:
        tl.store(seen + at, of_query)
    if DELTA:
        rate = tl.load(a + batch * a_b + (first + rows) * a_t + head * a_h, mask=rows < left, other=0.0)
        system = tl.where(rows[:, None] > rows[None, :], of_key * rate.to(tl.float32)[:, None], 0.0)
        solved = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
        for t in range(1, L):
            weights = tl.sum(tl.where(rows[:, None] == t, system, 0.0), 0)  # of the rows above
            found = tl.sum(tl.where((rows < t)[:, None], weights[:, None] * solved, 0.0), 0)
            solved += tl.where(rows[:, None] == t, found[None, :], 0.0)
        tl.store(inverse + at, solved)


@triton.jit
def walk(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, a, a_b, a_t, a_h,
    run, seen, inverse, initial, skip, slots,
    y, values, final, entered, decayed, written, cross, total,
    TIME, PADDED, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr, MEASURE: tl.constexpr, DELTA: tl.constexpr, KEEP: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    r"""Walk all chunks with some columns of the state in registers.

    What is written is :math:`U = T (W V + \operatorname{diag}(a_t)\, (K \circ e^G) S_{in})`. ``decayed``,
    ``written``, ``cross`` and ``total`` are (block, batch, time, head): of these columns
    :math:`|D_t|^2`, :math:`|U_t|^2`, :math:`\langle D_t, U_t \rangle` and the sum of the entries. With KEEP
    ``values`` (batch, time, head, value) holds :math:`u_t`, and ``entered`` (kept, batch, head, key, value)
    the state that enters each chunk whose entry of ``slots`` is not -1.

    The state is cut into slices of its keys: each warp multiplies its own, and holds few operands.
    No product over tokens is shown a NaN or an infinity, as it would reach earlier ones (0 * NaN is NaN):
    later tokens of the same column are marked instead. Grid: (head * blocks of columns, batch).
    """
    slices: tl.constexpr = BK // SLICE
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = head // (HEADS // GROUPS)
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, L)
    columns = block * BV + tl.arange(0, BV)
    lanes = tl.arange(0, SLICE)
    of_slice = tl.arange(0, slices)[:, None, None] * SLICE
    keys = of_slice + lanes[None, None, :]  # slice, 1, key: to stand beside tokens
    down = of_slice + lanes[None, :, None]  # slice, key, 1: rows of the state
    tokens = rows[None, :, None]
    inside = (down < KEY) & (columns < VALUE)[None, None, :]
    of_state = (batch * HEADS + head) * (KEY * VALUE) + down * VALUE + columns[None, None, :]
    if HAS_INITIAL:
        state = tl.load(initial + of_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((slices, SLICE, BV), tl.float32)
    q += batch * q_b + group * q_g
    k += batch * k_b + group * k_g
    v += batch * v_b + head * v_h
    scale += batch * w_b + head * w_h
    a += batch * a_b + head * a_h
    run += (batch * HEADS + head) * PADDED * KEY
    near = rows[:, None] * L + rows[None, :]
    seen += (batch * HEADS + head) * PADDED * L
    inverse += (batch * HEADS + head) * PADDED * L
    of_values = rows[:, None] * (HEADS * VALUE) + columns[None, :]
    y += (batch * TIME * HEADS + head) * VALUE
    values += (batch * TIME * HEADS + head) * VALUE
    of_tokens = rows * HEADS
    origin = (block * BATCH + batch) * TIME * HEADS + head
    own_total = total + (tl.zeros((), tl.int64) + BATCH) * blocks * TIME * HEADS
    if HAS_SKIP:
        bypass = tl.load(skip + head).to(tl.float32)
    left = tl.zeros((), tl.int32) + TIME
    for chunk in range(tl.cdiv(TIME, L)):
        there = (tokens < left) & (keys < KEY)
        shown = (rows < left)[:, None] & (columns < VALUE)[None, :]
        if KEEP:
            slot = tl.load(slots + chunk)
            if slot >= 0:
                at = entered + slot.to(tl.int64) * BATCH * HEADS * (KEY * VALUE)
                tl.store(at + of_state, state, mask=inside)
        g = tl.load(run + tokens * KEY + keys, mask=keys < KEY, other=0.0)
        kt = tl.load(k + tokens * k_t + keys, mask=there, other=0.0).to(tl.float32)
        since = tl.exp2(g)
        vt = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
        u = vt
        if HAS_SCALE:
            u = u * tl.load(scale + rows * w_t, mask=rows < left, other=0.0).to(tl.float32)[:, None]
        if DELTA:
            read = tl.sum(tl.dot(kt * since, state, input_precision=PRECISION), 0)
            u += read * tl.load(a + rows * a_t, mask=rows < left, other=0.0).to(tl.float32)[:, None]
        spoiled = tl.cumsum(tl.where(tl.abs(u) < float("inf"), 0.0, float("nan")), 0)
        u = tl.where(tl.abs(u) < float("inf"), u, 0.0)
        if DELTA:
            u = tl.dot(tl.load(inverse + near), u, input_precision=PRECISION) + spoiled
            spoiled = tl.cumsum(tl.where(tl.abs(u) < float("inf"), 0.0, float("nan")), 0)
            u = tl.where(tl.abs(u) < float("inf"), u, 0.0)
        if OUTPUTS:
            qt = tl.load(q + tokens * q_t + keys, mask=there, other=0.0).to(tl.float32)
            out = tl.sum(tl.dot(qt * since, state, input_precision=PRECISION), 0)
            out += tl.dot(tl.load(seen + near), u, input_precision=PRECISION)
            if HAS_SKIP:
                out += bypass * vt
            tl.store(y + of_values, (out + spoiled).to(y.dtype.element_ty), mask=shown)
        u += spoiled
        if KEEP:
            tl.store(values + of_values, u, mask=shown)
        written_by_all = tl.broadcast_to(u[None, :, :], (slices, L, BV))
        if MEASURE:
            gram = tl.dot(u, tl.trans(u), input_precision=PRECISION)
            stored = tl.dot(written_by_all, tl.permute(state, (0, 2, 1)), input_precision=PRECISION) * since
            for j in range(tl.minimum(left, L)):
                own = tl.load(run + j * KEY + keys, mask=keys < KEY, other=0.0)
                write = tl.load(k + j * k_t + keys, mask=keys < KEY, other=0.0).to(tl.float32)
                weight = tl.sum(tl.where((rows == j)[None, :], gram, 0.0), 1)[None, :, None]
                stored += tl.where(tokens > j, tl.exp2(g - own) * write * weight, 0.0)
            crossed = stored * kt
            squares, sums = tl.sum(u * u, 1), tl.sum(u, 1)
            # Shifted by one token, so that what a token finds is summed without what it adds.
            ahead = (tokens + 1 < left) & (tokens + 1 < L) & (keys < KEY)
            g1 = tl.load(run + (tokens + 1) * KEY + keys, mask=ahead, other=0.0)
            fall = tl.where(ahead, tl.exp2(g1 - g), 0.0)
            until = tl.where(ahead, tl.exp2(g1), 0.0)
            first = tl.where(keys < KEY, tl.exp2(tl.load(run + keys, mask=keys < KEY, other=0.0)), 0.0)
            next_there = (rows + 1 < left) & (rows + 1 < L)
            energy = tl.sum(state * state, 2)[:, None, :]
            gained = fall * fall * (2 * crossed + kt * kt * squares[None, :, None])
            _, gained = tl.associative_scan((fall * fall, gained), 1, _compose)
            found = tl.sum(tl.sum(until * until * energy + gained, 2), 0)
            tl.store(decayed + origin + HEADS + of_tokens, found, mask=next_there)
            tl.store(decayed + origin, tl.sum(first * first * energy))
            entries = tl.sum(state, 2)[:, None, :]
            _, added = tl.associative_scan((fall, fall * kt * sums[None, :, None]), 1, _compose)
            found = tl.sum(tl.sum(until * entries + added, 2), 0)
            tl.store(total + origin + HEADS + of_tokens, found, mask=next_there)
            tl.store(total + origin, tl.sum(first * entries))
            there_too = rows < left
            tl.store(own_total + origin + of_tokens, tl.sum(tl.sum(kt, 2), 0) * sums, mask=there_too)
            tl.store(written + origin + of_tokens, tl.sum(tl.sum(kt * kt, 2), 0) * squares, mask=there_too)
            tl.store(cross + origin + of_tokens, tl.sum(tl.sum(crossed, 2), 0), mask=there_too)
        last = tl.load(run + (L - 1) * KEY + keys, mask=keys < KEY, other=0.0)
        kt *= tl.exp2(last - g)
        fallen = tl.exp2(tl.load(run + (L - 1) * KEY + down, mask=down < KEY, other=0.0))
        state = tl.dot(tl.permute(kt, (0, 2, 1)), written_by_all, state * fallen, input_precision=PRECISION)
        left -= L
        q += L * q_t
        k += L * k_t
        v += L * v_t
        scale += L * w_t
        a += L * a_t
        run += L * KEY
        seen += L * L
        inverse += L * L
        y += L * HEADS * VALUE
        values += L * HEADS * VALUE
        origin += L * HEADS
    tl.store(final + of_state, state, mask=inside)
