"""The device code of :mod:`statescope.kernels.fused_keyed` for hard chunks; importing it needs triton.

:mod:`statescope.kernels.fused_pairs` relates either kind of its writes by it.

A chunk is hard where some key forgets too much for two factors for each row, or something is not finite
(:func:`statescope.kernels.fused_keyed_kernels.relate`). Here rows are related part by part, and within a part
pair by pair where even that is too much, and a NaN reaches no earlier row.
"""

import triton
import triton.language as tl

from .fused_tiles import (
    RANGE,
    SIZES,
    _along,
    _decays_of_keys,
    _dot,
    _exact,
    _finite,
    _halves,
    _put,
    _split,
    _store,
    _tile,
    _within,
)


@triton.jit
def _halfway(g, L: tl.constexpr):
    """What each key forgets in the first half of the rows, and in all."""
    first = tl.where((tl.arange(0, L) < L // 2)[:, None], g, 0.0)
    return tl.sum(first, 0)[None, :], tl.sum(g, 0)[None, :]


@triton.jit
def _of_row(x, row):
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == row)[:, None], x, 0.0), 0)


@triton.jit
def _early(g, rows, begin, middle):
    """What survives from each row on to the row ``begin``, where its part begins, and on to its middle."""
    past = tl.where((rows < begin)[:, None], g, 0.0)
    within = tl.where((rows >= begin)[:, None], g, 0.0)
    earlier = tl.cumsum(past, 0, reverse=True) - past
    return _factor(middle + tl.where((rows < begin)[:, None], earlier, -tl.cumsum(within, 0)))


@triton.jit
def _factor(x):
    """A power of two that stays finite; not by minimum(), which may drop a NaN."""
    return tl.exp2(tl.where(x > RANGE, RANGE, x))


@triton.jit
def _one_by_one(x, at, k, local, begin, rows, PART: tl.constexpr):
    r"""What rows of a part read of one another, :math:`\sum_k e^{at_t - local_j} x_t k_j`, pair by pair."""
    found = tl.zeros((x.shape[0], rows.shape[0]), tl.float32)
    for j in range(PART):
        past = tl.exp2(tl.minimum(at - _of_row(local, j)[None, :], 0.0)) * _of_row(k, j)[None, :]
        found = tl.where((rows == begin + j)[None, :], _along(x * past), found)
    return found


@triton.jit
def _place(item, CHUNKS, HEADS: tl.constexpr):
    """Chunk, head and sequence of an entry of (batch, head, chunk)."""
    own = item // CHUNKS
    return (item % CHUNKS).to(tl.int64), own % HEADS, (own // HEADS).to(tl.int64)


@triton.jit
def _relate_part(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h, remaining, kept, through, asked, system, seen,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    KEY_GROUPS: tl.constexpr, ERASES: tl.constexpr, BEFORE: tl.constexpr, HAS_SCALE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    chunk, begin, head, batch,
):  # fmt: skip
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    row = (batch * HEADS + head) * PADDED + chunk * L
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // KEY_GROUPS)) * k_g
    q += batch * q_b + chunk * L * q_t + (head // (HEADS // GROUPS)) * q_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    b += batch * b_b + chunk * L * b_t + head * b_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    remaining += row * KEY
    through += row * KEY
    asked += row * KEY
    system += row * L
    seen += row * L
    own = begin + tl.arange(0, PART)
    there, own_there = rows < left, own < left
    past = rows < begin + PART
    weight = tl.full((PART,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + own * w_t, mask=own_there, other=0.0).to(tl.float32)
    erased = tl.zeros((PART, L), tl.float32)
    read_of = tl.zeros((PART, L), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        at_rows = own[:, None] * KEY + keys[None, :]
        g = _decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS)
        spoilt = tl.sum(g * 0.0, 0)[None, :]  # NaN, or 0: of what leaves the chunk
        coming = tl.sum(tl.where(past[:, None], 0.0, _finite(g)[0]), 0)[None, :]
        total = tl.sum(_finite(g)[0], 0)[None, :] + spoilt
        tl.store(
            kept + ((batch * HEADS + head) * CHUNKS + chunk) * KEY + keys, tl.sum(total, 0), mask=keys < KEY
        )
        g = tl.where(past[:, None], g, 0.0)
        entered = tl.sum(tl.where((rows < begin)[:, None], g, 0.0), 0)[None, :]
        early = _tile(k, k_t, rows, there & past, keys, KEY, BS).to(tl.float32)
        own_g = _decays_of_keys(log_decay, g_t, g_k, own, own_there, keys, KEY, BS)
        known = _finite(own_g)[0]
        halfway, of_part = _halfway(known, PART)
        far, middle = tl.min(_within(halfway, of_part, RANGE)) == 0, 0.5 * of_part
        middle = tl.where(far, 0.0, middle)
        early *= _early(g, rows, begin, middle)
        kt = _tile(k, k_t, own, own_there, keys, KEY, BS).to(tl.float32)
        local = tl.cumsum(own_g, 0)
        stays = coming + (tl.cumsum(known, 0, reverse=True) - known)
        leaves = kt * tl.exp2(stays) + spoilt
        if BEFORE or not ERASES:
            leaves *= weight[:, None]
        leaves, leaves_low = _split(leaves, SPLIT)
        _put(leaves, leaves_low, remaining + at_rows, plane, keys, KEY, BS, SPLIT)
        if far:
            early = tl.where((rows < begin)[:, None], early, 0.0)
        if ERASES:
            xt, at = kt, local
            if BEFORE:
                xt = _tile(b, b_t, own, own_there, keys, KEY, BS).to(tl.float32)
                at = local - own_g
            erased = _exact(xt * _factor(at - middle), tl.trans(early), erased, SPLIT, PRECISION)
            if far:
                erased += _one_by_one(xt, at, kt, local, begin, rows, PART)
            x = _finite(xt)[0] * tl.exp2(_finite(entered + at)[0])
            x, x_low = _split(x, SPLIT)
            _put(x, x_low, through + at_rows, plane, keys, KEY, BS, SPLIT)
        if OUTPUTS:
            qt = _tile(q, q_t, own, own_there, keys, KEY, BS).to(tl.float32)
            read_of = _dot(qt * _factor(local - middle), tl.trans(early), read_of, SPLIT, PRECISION)
            if far:
                read_of += _one_by_one(qt, local, kt, local, begin, rows, PART)
            qt *= tl.exp2(entered + local)
            _store(asked + at_rows, qt.to(asked.dtype.element_ty), keys, KEY, BS)
    if ERASES:
        if not BEFORE:
            rate = tl.load(a + own * a_t, mask=own_there, other=0.0).to(tl.float32)
            erased *= rate[:, None]
        on_itself = tl.where(own[:, None] == rows[None, :], erased * 0.0, 0.0)  # 0, or NaN
        erased = tl.where(own[:, None] > rows[None, :], erased, on_itself)
        tl.store(system + own[:, None] * L + rows[None, :], erased)
    if OUTPUTS:
        read_of = tl.where(own[:, None] >= rows[None, :], read_of, 0.0)
        tl.store(seen + own[:, None] * L + rows[None, :], read_of.to(seen.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def relate_parts(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h, remaining, kept, through, asked, system, seen, listed,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    KEY_GROUPS: tl.constexpr, ERASES: tl.constexpr, BEFORE: tl.constexpr, HAS_SCALE: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Find what ``relate`` does of other chunks. Grid: any number of programs.

    With BEFORE ``b`` is what erases, of the state before it decays, and ``k`` has ``KEY_GROUPS``.

    The decay between two rows is split where the later one's part begins, and what a key forgets too much
    for within a part is found pair by pair.
    """
    parts: tl.constexpr = L // PART
    for item in range(tl.program_id(0), tl.load(listed) * parts, tl.num_programs(0)):
        chunk, head, batch = _place(tl.load(listed + 1 + item // parts), CHUNKS, HEADS)
        begin = item % parts * PART
        _relate_part(
            q, q_b, q_t, q_g, k, k_b, k_t, k_g, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k, b, b_b,
            b_t, b_h, a, a_b, a_t, a_h, remaining, kept, through, asked, system, seen, ROWS, PADDED, CHUNKS,
            BATCH, HEADS, GROUPS, KEY, L, PART, BS, PRECISION, SPLIT, KEY_GROUPS, ERASES, BEFORE,
            HAS_SCALE, OUTPUTS, chunk, begin, head, batch,
        )  # fmt: skip


@triton.jit
def _measure_part(
    k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h, states, gained, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
    chunk, begin, head, batch,
):  # fmt: skip
    own_head = batch * HEADS + head
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    v += batch * v_b + chunk * L * v_t + head * v_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    u += batch * u_b + chunk * L * u_t + head * u_h
    states += (own_head * CHUNKS + chunk) * (KEY * VALUE)
    gained += (own_head * PADDED + chunk * L) * KEY
    field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
    own = begin + tl.arange(0, PART)
    there, own_there = rows < tl.minimum(left, begin + PART), own < left
    gram = tl.zeros((PART, L), tl.float32)
    squares = tl.zeros((PART, 1), tl.float32)
    total = tl.zeros((PART, 1), tl.float32)
    removed = tl.zeros((PART, 1), tl.float32)
    early_weight = tl.full((L,), 1.0, tl.float32)
    weight = tl.full((PART,), 1.0, tl.float32)
    if HAS_SCALE:
        weight = tl.load(scale + own * w_t, mask=own_there, other=0.0).to(tl.float32)
        early_weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        inside = (columns < VALUE)[None, :]
        at = rows[:, None] * u_t + columns[None, :]
        earlier = tl.load(u + at, mask=inside & there[:, None], other=0.0)
        earlier = earlier.to(tl.float32)
        at = own[:, None] * u_t + columns[None, :]
        ut = tl.load(u + at, mask=inside & own_there[:, None], other=0.0).to(tl.float32)
        if HAS_SCALE and not ERASES:
            ut *= weight[:, None]
            earlier *= early_weight[:, None]
        gram = _dot(ut, tl.trans(earlier), gram, SPLIT, PRECISION)
        squares += _along(ut * ut)
        total += _along(ut)
        if DELTA:
            shown = inside & own_there[:, None]
            vt = tl.load(v + own[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
            multiplied = weight
            if SPLIT:
                high, low = _halves(weight)
                multiplied = high.to(tl.float32) + low.to(tl.float32)
            vt = vt.to(tl.float32) * multiplied[:, None]
            removed += _along((ut - vt) * (ut - vt))
    apart = (own + tl.minimum(ROWS, 0))[:, None] > (rows + tl.minimum(PADDED, 0))[None, :]
    gram = tl.where(apart, gram, 0.0)
    key_squares = tl.zeros((PART, 1), tl.float32)
    crossed = tl.zeros((PART, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        g = _finite(_decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS))[0]
        early = _finite(_tile(k, k_t, rows, there, keys, KEY, BS).to(tl.float32))[0]
        stored = tl.zeros((PART, BS), tl.float32)
        for block in range(0, VALUE, BV):
            columns = block + tl.arange(0, BV)
            at = own[:, None] * u_t + columns[None, :]
            shown = (columns < VALUE)[None, :] & own_there[:, None]
            ut = tl.load(u + at, mask=shown, other=0.0).to(tl.float32)
            if HAS_SCALE and not ERASES:
                ut *= weight[:, None]
            inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
            state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
            stored = _dot(ut, tl.trans(state), stored, SPLIT, PRECISION)
        own_g = _finite(_decays_of_keys(log_decay, g_t, g_k, own, own_there, keys, KEY, BS))[0]
        local = tl.cumsum(own_g, 0)
        halfway, all_of = _halfway(own_g, PART)
        far, middle = tl.min(_within(halfway, all_of, RANGE)) == 0, 0.5 * all_of
        middle = tl.where(far, 0.0, middle)
        early *= _early(g, rows, begin, middle)
        entered = tl.exp2(tl.sum(tl.where((rows < begin)[:, None], g, 0.0), 0)[None, :])
        kt = _tile(k, k_t, own, own_there, keys, KEY, BS).to(tl.float32)
        if far:
            early = tl.where((rows < begin)[:, None], early, 0.0)
        stored *= entered * tl.exp2(local)
        stored += _dot(gram, early, tl.zeros_like(stored), SPLIT, PRECISION) * _factor(local - middle)
        if far:
            fine = _finite(kt)[0]
            for j in range(PART):
                weights = _along(tl.where((rows == begin + j)[None, :], gram, 0.0))
                since = tl.exp2(tl.minimum(local - _of_row(local, j)[None, :], 0.0))
                since = tl.where((own > begin + j)[:, None], since, 0.0)
                stored += weights * since * _of_row(fine, j)[None, :]
        stored *= kt
        crossed += _along(stored)
        key_squares += _along(kt * kt)
        energy = 2 * stored + kt * kt * squares
        _store(gained + own[:, None] * KEY + keys[None, :], energy, keys, KEY, BS)
    here = own_there[:, None]
    at = (batch * ROWS + chunk * L + own)[:, None] * HEADS + head
    tl.store(found + field + at, key_squares * squares, mask=here)
    tl.store(found + 2 * field + at, crossed, mask=here)
    tl.store(found + 3 * field + at, total, mask=here)
    if DELTA:
        rate = tl.load(a + own * a_t, mask=own_there, other=0.0).to(tl.float32)[:, None]
        tl.store(found + 5 * field + at, key_squares * removed, mask=here)
        tl.store(found + 6 * field + at, -rate * key_squares, mask=here)


@triton.jit(do_not_specialize=SIZES)
def measure_parts(
    k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h, states, gained, listed, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """What ``measure`` finds of other chunks. Grid: any number of programs."""
    parts: tl.constexpr = L // PART
    for item in range(tl.program_id(0), tl.load(listed) * parts, tl.num_programs(0)):
        chunk, head, batch = _place(tl.load(listed + 1 + item // parts), CHUNKS, HEADS)
        begin = item % parts * PART
        _measure_part(
            k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t,
            g_h, g_k, a, a_b, a_t, a_h, states, gained, found, ROWS, PADDED, CHUNKS, BATCH, HEADS, GROUPS,
            KEY, VALUE, L, PART, BS, BV, SPLIT, PRECISION, DELTA, ERASES, HAS_SCALE, chunk, begin, head,
            batch,
        )  # fmt: skip
