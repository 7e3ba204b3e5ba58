r"""The device code of :mod:`statescope.kernels.fused_pairs`; importing it needs triton.

A token of a chunk makes two writes, first :math:`a_t z_t^\top` and then :math:`k_t v_t^\top`. Buffers that
hold something for either hold that of all first ones, then that of all second ones.
"""

import triton
import triton.language as tl

from .fused_hard_kernels import _early, _factor, _halfway, _of_row, _place
from .fused_kernels import _bounded
from .fused_tiles import (
    RANGE,
    SIZES,
    _along,
    _by_halves,
    _decays_of_keys,
    _dot,
    _finite,
    _halves,
    _halves_of_input,
    _invert,
    _load,
    _marked,
    _put,
    _shown,
    _since_bad,
    _split,
    _state,
    _store,
    _take,
    _tile,
    _unknown,
    _within,
    _without_bad,
)


@triton.jit(do_not_specialize=SIZES)
def relate(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h,
    remaining, kept, halves, through, asked, system, seen, hard, listed,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, L: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SCALE: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r"""Relate the tokens of each chunk to one another, to the state that enters it, and to that which leaves.

    As :func:`statescope.kernels.fused_keyed_kernels.relate`, for two writes of each token. ``remaining`` are
    ``a`` and ``k``, the latter times the write's scale. ``through`` is ``b``, decayed since the chunk began
    up to the token before. ``system`` is what each token erases of the first writes of earlier ones and, not
    scaled, of the second; ``seen`` what its query reads of either. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    of_chunk = (batch * HEADS + head) * CHUNKS + chunk
    if WIDE:
        if tl.load(hard + of_chunk) != 1:
            return
    rows = tl.arange(0, L)
    there = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    row = (batch * HEADS + head) * PADDED + chunk * L
    q += batch * q_b + chunk * L * q_t + (head // (HEADS // GROUPS)) * q_g
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    b += batch * b_b + chunk * L * b_t + head * b_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    written = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED
    plane = written * KEY
    second = plane * 2 if SPLIT else plane
    remaining += row * KEY
    through += row * KEY
    asked += row * KEY
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
    upper = (rows < L // 2)[:, None]
    erased_a = tl.zeros((L, L), tl.float32)
    erased_k = tl.zeros((L, L), tl.float32)
    read_a = tl.zeros((L, L), tl.float32)
    read_k = tl.zeros((L, L), tl.float32)
    within = tl.full((1, BS), 1, tl.int32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        at_rows = rows[:, None] * KEY + keys[None, :]
        kt = _tile(k, k_t, rows, there, keys, KEY, BS).to(tl.float32)
        at = _tile(a, a_t, rows, there, keys, KEY, BS).to(tl.float32)
        g = _decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS)
        local = tl.cumsum(g, 0)
        total = tl.sum(g, 0)[None, :]
        if WIDE:
            halfway = tl.sum(tl.where(upper, g, 0.0), 0)[None, :]
            within = tl.minimum(within, _within(halfway, total, 2 * RANGE))
            tl.store(halves + of_chunk * KEY + keys, tl.sum(halfway, 0), mask=keys < KEY)
            middle, lower = 0.5 * halfway, 0.5 * (halfway + total)
            rise = tl.exp2(tl.where(upper, middle, lower) - local)
            left = tl.exp2(total - local)
            left_a, left_k = at * left, kt * left
            at, kt = at * rise, kt * rise
        else:
            middle, lower = 0.5 * total, total
            within = tl.minimum(within, _within(middle, total, RANGE))
            tl.store(kept + of_chunk * KEY + keys, tl.sum(total, 0), mask=keys < KEY)
            rise = tl.exp2(middle - local)
            at, kt = at * rise, kt * rise
            left_a, left_k = at * tl.exp2(middle), kt * tl.exp2(middle)
        high, low = _split(left_a, SPLIT)
        _put(high, low, remaining + at_rows, plane, keys, KEY, BS, SPLIT)
        high, low = _split(left_k * weight[:, None], SPLIT)
        _put(high, low, remaining + second + at_rows, plane, keys, KEY, BS, SPLIT)
        early_a, early_k = at, kt
        if WIDE:
            early_a, early_k = tl.where(upper, at, 0.0), tl.where(upper, kt, 0.0)
        xt = _tile(b, b_t, rows, there, keys, KEY, BS).to(tl.float32)
        x = xt * tl.exp2(local - g - middle)
        high, low = _split(x, SPLIT)
        a_high, a_low = _split(early_a, SPLIT)
        k_high, k_low = _split(early_k, SPLIT)
        erased_a = _by_halves(high, low, tl.trans(a_high), tl.trans(a_low), erased_a, SPLIT, PRECISION)
        erased_k = _by_halves(high, low, tl.trans(k_high), tl.trans(k_low), erased_k, SPLIT, PRECISION)
        if OUTPUTS:
            qt = _tile(q, q_t, rows, there, keys, KEY, BS).to(tl.float32)
            y = qt * tl.exp2(local - middle)
            read_a = _dot(y, tl.trans(early_a), read_a, SPLIT, PRECISION)
            read_k = _dot(y, tl.trans(early_k), read_k, SPLIT, PRECISION)
            y = qt * tl.exp2(local) if WIDE else y * tl.exp2(middle)
            _store(asked + at_rows, y.to(asked.dtype.element_ty), keys, KEY, BS)
        x = xt * tl.exp2(local - g) if WIDE else x * tl.exp2(middle)
        high, low = _split(x, SPLIT)
        _put(high, low, through + at_rows, plane, keys, KEY, BS, SPLIT)
        if WIDE:
            late_a, late_k = tl.where(upper, 0.0, at), tl.where(upper, 0.0, kt)
            high, low = _split(xt * tl.exp2(tl.where(upper, 0.0, local - g - lower)), SPLIT)
            a_high, a_low = _split(late_a, SPLIT)
            k_high, k_low = _split(late_k, SPLIT)
            erased_a = _by_halves(high, low, tl.trans(a_high), tl.trans(a_low), erased_a, SPLIT, PRECISION)
            erased_k = _by_halves(high, low, tl.trans(k_high), tl.trans(k_low), erased_k, SPLIT, PRECISION)
            if OUTPUTS:
                y = qt * tl.exp2(tl.where(upper, 0.0, local - lower))
                read_a = _dot(y, tl.trans(late_a), read_a, SPLIT, PRECISION)
                read_k = _dot(y, tl.trans(late_k), read_k, SPLIT, PRECISION)
    past = rows[:, None] >= rows[None, :]
    system += row * L
    seen += row * L
    at_rows = rows[:, None] * L + rows[None, :]
    erased_a, erased_k = tl.where(past, erased_a, 0.0), tl.where(past, erased_k, 0.0)
    spoilt = _spoilt(erased_a) + _spoilt(erased_k) + (tl.sum(weight * 0.0) != 0).to(tl.int32)
    if OUTPUTS:
        read_a, read_k = tl.where(past, read_a, 0.0), tl.where(past, read_k, 0.0)
        spoilt += _spoilt(read_a) + _spoilt(read_k)
    done = (tl.min(within) == 1) & (spoilt == 0)
    tl.store(hard + of_chunk, tl.where(done, WIDE, WIDE + 1))
    if done:
        strictly = rows[:, None] > rows[None, :]
        tl.store(system + at_rows, tl.where(strictly, erased_a, 0.0))
        tl.store(system + written * L + at_rows, tl.where(strictly, erased_k, 0.0))
        if OUTPUTS:
            tl.store(seen + at_rows, read_a.to(seen.dtype.element_ty))
            tl.store(seen + written * L + at_rows, read_k.to(seen.dtype.element_ty))
    elif WIDE:
        tl.store(listed + 1 + tl.atomic_add(listed, 1), of_chunk.to(tl.int32))


@triton.jit
def _spoilt(x):
    """1 if something of a tile is not finite, otherwise 0."""
    return 1 - tl.min((tl.abs(x) < float("inf")).to(tl.int32))


@triton.jit(do_not_specialize=SIZES)
def solve(
    v, v_b, v_t, v_h, scale, w_b, w_t, w_h, system, through, values, hard,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Find what erase terms write in each chunk, whatever state enters it, all chunks at once.

    With :math:`T = (I - M)^{-1}` and :math:`N`, where :math:`M` and :math:`N` are the first and the second
    half of ``system`` (:func:`relate`), and :math:`X`, which is ``through``,

    .. math:: Z = T N W V + T X S_{in}, \qquad
        S_{out} = \operatorname{diag}(e^{G_L}) S_{in} + A_{rem}^\top Z + K_{rem}^\top W V .

    ``values`` is :math:`T N W V`; :math:`T X` takes the place of ``through``, and T that of M.
    Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    there = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    row = (batch * HEADS + head) * PADDED + chunk * L
    v += batch * v_b + chunk * L * v_t + head * v_h
    written = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED
    plane = written * KEY
    through += row * KEY
    values += row * VALUE
    system += row * L
    square = rows[:, None] * L + rows[None, :]
    of_second = system + written * L + square
    mark = tl.zeros((L, 1), tl.float32)
    if tl.load(hard + (batch * HEADS + head) * CHUNKS + chunk) == 2:
        mark += _without_bad(system + square, (rows < L)[:, None])
        mark += _without_bad(of_second, (rows < L)[:, None])
    _invert(system, L, PART, SPLIT, PRECISION, False)
    inverse, inverse_low = _split(tl.load(system + square) + mark, SPLIT)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        at = through + rows[:, None] * KEY + keys[None, :]
        xt, xt_low = _take(at, plane, keys, KEY, BS, SPLIT)
        found = tl.zeros((L, BS), tl.float32)
        found = _by_halves(inverse, inverse_low, xt, xt_low, found, SPLIT, PRECISION)
        found, found_low = _split(found, SPLIT)
        _put(found, found_low, at, plane, keys, KEY, BS, SPLIT)
    erased = tl.load(of_second)
    mark = tl.zeros((L, 1), tl.float32)  # that of rows is in the inverse
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
        usable = tl.abs(weight) < float("inf")
        mark = _since_bad(~usable)[:, None]
        erased *= tl.where(usable, weight, 0.0)[None, :]
    erased, erased_low = _split(erased, SPLIT)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        shown = _shown(there, columns, VALUE, BV)
        u = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
        u, bad_from = _marked(u)
        u = _halves_of_input(erased, erased_low, u, tl.zeros((L, BV), tl.float32), SPLIT, PRECISION)
        u, u_low = _split(u, SPLIT)
        u = _by_halves(inverse, inverse_low, u, u_low, bad_from + mark, SPLIT, PRECISION)
        _store(values + rows[:, None] * VALUE + columns[None, :], u, columns, VALUE, BV)


@triton.jit(do_not_specialize=SIZES)
def walk(
    remaining, kept, through, v, v_b, v_t, v_h, values, initial, final, states, energy, entered, slots,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, MEASURE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Walk all chunks with some columns of the state in registers.

    ``values`` is given what erase terms write; all else is as
    :func:`statescope.kernels.fused_keyed_kernels.walk` has it. Grid: (head * blocks of columns, batch).
    """
    head = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, L)
    keys = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
    own = batch * HEADS + head
    of_state = keys[:, None] * VALUE + columns[None, :]
    of_keys = rows[:, None] * KEY + keys[None, :]
    of_values = rows[:, None] * VALUE + columns[None, :]
    if HAS_INITIAL:
        state = tl.load(initial + own * (KEY * VALUE) + of_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    second = plane * 2 if SPLIT else plane
    through += own * PADDED * KEY
    values += own * PADDED * VALUE
    v += batch * v_b + head * v_h
    states += own * CHUNKS * (KEY * VALUE)
    entries = (tl.zeros((), tl.int64) + BATCH) * HEADS * CHUNKS * (BLOCKS * KEY)
    remaining += own * PADDED * KEY
    kept += own * CHUNKS * KEY
    energy += (own * CHUNKS * BLOCKS + block) * KEY
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        if KEEP:
            slot = tl.load(slots + chunk)
            if slot >= 0:
                at = entered + (slot.to(tl.int64) * BATCH * HEADS + own) * (KEY * VALUE)
                tl.store(at + of_state, state, mask=inside)
        if STORE:
            tl.store(states + of_state, state.to(states.dtype.element_ty), mask=inside)
        if MEASURE:
            tl.store(energy + keys, tl.sum(state * state, 1), mask=keys < KEY)
            tl.store(energy + entries + keys, tl.sum(state, 1), mask=keys < KEY)
        written = _load(values + of_values, columns, VALUE, BV)
        shown = _shown(rows < ROWS - chunk * L, columns, VALUE, BV)
        vt = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
        keep = tl.exp2(tl.load(kept + keys, mask=keys < KEY, other=0.0))[:, None]
        at, at_low = _take(remaining + of_keys, plane, keys, KEY, BK, SPLIT)
        kt, kt_low = _take(remaining + second + of_keys, plane, keys, KEY, BK, SPLIT)
        xt, xt_low = _take(through + of_keys, plane, keys, KEY, BK, SPLIT)
        if SPLIT:
            high, low = _halves(state)
            written = tl.dot(xt, high, tl.dot(xt, low, tl.dot(xt_low, high, written)))
        else:
            written = tl.dot(xt, state, written, input_precision=PRECISION)
        _store(values + of_values, written, columns, VALUE, BV)
        state *= keep
        if SPLIT:
            state = tl.dot(tl.trans(kt), vt, tl.dot(tl.trans(kt_low), vt, state))
            high, low = _halves(written)
            state = tl.dot(tl.trans(at), low, state)
            state = tl.dot(tl.trans(at_low), high, state)
            state = tl.dot(tl.trans(at), high, state)
        else:
            state = tl.dot(tl.trans(kt), vt.to(tl.float32), state, input_precision=PRECISION)
            state = tl.dot(tl.trans(at), written, state, input_precision=PRECISION)
        through += L * KEY
        values += L * VALUE
        v += L * v_t
        states += KEY * VALUE
        remaining += L * KEY
        kept += KEY
        energy += BLOCKS * KEY
    tl.store(final + own * (KEY * VALUE) + of_state, state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def read(
    v, v_b, v_t, v_h, scale, w_b, w_t, w_h, asked, states, seen, values, skip, y,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Read each chunk with its queries: the state that entered it, and what it wrote itself.

    Grid: (chunks * pieces, heads, batch).
    """
    pieces: tl.constexpr = (VALUE + BV - 1) // BV
    chunk = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    rows = tl.arange(0, L)
    there = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    columns = piece * BV + tl.arange(0, BV)
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    asked += (own * PADDED + chunk * L) * KEY
    values += (own * PADDED + chunk * L) * VALUE
    seen += (own * PADDED + chunk * L) * L + rows[:, None] * L + rows[None, :]
    v += batch * v_b + chunk * L * v_t + head * v_h
    out = tl.zeros((L, BV), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        state = _state(states, keys, columns, KEY, VALUE, BS, BV)
        qt = _load(asked + rows[:, None] * KEY + keys[None, :], keys, KEY, BS)
        out = _dot(qt, state, out, SPLIT, PRECISION)
    shown = _shown(there, columns, VALUE, BV)
    erased = tl.load(values + rows[:, None] * VALUE + columns[None, :], mask=shown, other=0.0)
    erased, marks = _marked(erased)
    out = _dot(tl.load(seen), erased, out, SPLIT, PRECISION) + marks
    vt = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
    written = vt
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        written *= tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)[:, None]
    written, marks = _marked(written)
    of_second = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * L
    out = _dot(tl.load(seen + of_second), written, out, SPLIT, PRECISION) + marks
    if HAS_SKIP:
        out += tl.load(skip + head).to(tl.float32) * vt
    y += ((batch * ROWS + chunk * L) * HEADS + head) * VALUE
    at = y + rows[:, None] * (HEADS * VALUE) + columns[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=shown)


@triton.jit
def _written(
    values, v, v_t, weight, rows, there, columns, VALUE: tl.constexpr, BV: tl.constexpr, SECOND: tl.constexpr
):  # fmt: skip
    """The values of tokens' first writes, or with SECOND of their second ones."""
    shown = _shown(there, columns, VALUE, BV)
    if SECOND:
        x = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
        x = x.to(tl.float32) * weight[:, None]
    else:
        x = tl.load(values + rows[:, None] * VALUE + columns[None, :], mask=shown, other=0.0)
    return x


@triton.jit
def _products(
    values, v, v_t, weight, own, own_there, own_weight, rows, there, states, keys,
    KEY: tl.constexpr, VALUE: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Products of what own tokens write, first or SECOND, with the state, and with all first and second."""
    stored = tl.zeros((own.shape[0], BS), tl.float32)
    with_first = tl.zeros((own.shape[0], rows.shape[0]), tl.float32)
    with_second = tl.zeros((own.shape[0], rows.shape[0]), tl.float32)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        ut = _written(values, v, v_t, own_weight, own, own_there, columns, VALUE, BV, SECOND)
        first = _written(values, v, v_t, weight, rows, there, columns, VALUE, BV, False)
        second = _written(values, v, v_t, weight, rows, there, columns, VALUE, BV, True)
        state = _state(states, keys, columns, KEY, VALUE, BS, BV)
        stored = _dot(ut, tl.trans(state), stored, SPLIT, PRECISION)
        with_first = _dot(ut, tl.trans(first), with_first, SPLIT, PRECISION)
        with_second = _dot(ut, tl.trans(second), with_second, SPLIT, PRECISION)
    return stored, with_first, with_second


@triton.jit
def _sums(values, v, v_t, weight, rows, there, VALUE: tl.constexpr, BV: tl.constexpr):
    """Energies of what tokens write first and second, their product, and the sums of both."""
    squares_a = tl.zeros((rows.shape[0], 1), tl.float32)
    squares_k = tl.zeros((rows.shape[0], 1), tl.float32)
    beside = tl.zeros((rows.shape[0], 1), tl.float32)
    total_a = tl.zeros((rows.shape[0], 1), tl.float32)
    total_k = tl.zeros((rows.shape[0], 1), tl.float32)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        first = _written(values, v, v_t, weight, rows, there, columns, VALUE, BV, False)
        second = _written(values, v, v_t, weight, rows, there, columns, VALUE, BV, True)
        squares_a += _along(first * first)
        squares_k += _along(second * second)
        beside += _along(first * second)
        total_a += _along(first)
        total_k += _along(second)
    return squares_a, squares_k, beside, total_a, total_k


@triton.jit
def _gains(at, kt, squares_a, squares_k, beside):
    """The energy of what is written, for each token and key."""
    return at * at * squares_a + kt * kt * squares_k + 2 * (at * kt) * beside


@triton.jit(do_not_specialize=SIZES)
def measure(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    a, a_b, a_t, a_h, values, kept, halves, states, gained, hard, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r"""Bring what is written and what is stored together.

    ``found`` is (field, batch, token, head): second :math:`|U_t|^2`, third :math:`\langle D_t, U_t \rangle`,
    for :func:`tally` fourth and sixth the sums of the values that are written. ``gained`` (batch, head,
    token, key) is what a token's writes add to the energy of each row of the state. It takes two launches,
    as :func:`relate` does. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    if tl.load(hard + own * CHUNKS + chunk) != WIDE:
        return
    rows = tl.arange(0, L)
    there = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    v += batch * v_b + chunk * L * v_t + head * v_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    values += (own * PADDED + chunk * L) * VALUE
    gained += (own * PADDED + chunk * L) * KEY
    kept += (own * CHUNKS + chunk) * KEY
    halves += (own * CHUNKS + chunk) * KEY
    upper = (rows < L // 2)[:, None]
    down, across = _unknown(L, ROWS, PADDED)
    apart = down > across
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
    squares_a, squares_k, beside, total_a, total_k = _sums(
        values, v, v_t, weight, rows, there, VALUE, BV
    )  # fmt: skip
    crossed = tl.zeros((L, 1), tl.float32)
    energy = tl.zeros((L, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        g = _decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS)
        local = tl.cumsum(g, 0)
        forgets = tl.load(kept + keys, mask=keys < KEY, other=0.0)[None, :]
        at = _tile(a, a_t, rows, there, keys, KEY, BS).to(tl.float32)
        kt = _tile(k, k_t, rows, there, keys, KEY, BS).to(tl.float32)
        gain = _gains(at, kt, squares_a, squares_k, beside)
        energy += _along(gain)
        for second in tl.static_range(2):
            stored, with_first, with_second = _products(
                values, v, v_t, weight, rows, there, weight, rows, there, states, keys,
                KEY, VALUE, BS, BV, SPLIT, PRECISION, second == 1,
            )  # fmt: skip
            with_first = tl.where(apart, with_first, 0.0)
            with_second = tl.where(apart, with_second, 0.0)
            if WIDE:
                halfway = tl.load(halves + keys, mask=keys < KEY, other=0.0)[None, :]
                middle, lower = 0.5 * halfway, 0.5 * (halfway + forgets)
                rise = tl.exp2(tl.where(upper, middle, lower) - local)
                early_a, early_k = at * rise, kt * rise
                none = tl.zeros_like(stored)
                met = _dot(with_first, tl.where(upper, early_a, 0.0), none, SPLIT, PRECISION)
                met = _dot(with_second, tl.where(upper, early_k, 0.0), met, SPLIT, PRECISION)
                stored = stored * tl.exp2(local) + met * tl.exp2(local - middle)
                met = _dot(with_first, tl.where(upper, 0.0, early_a), none, SPLIT, PRECISION)
                met = _dot(with_second, tl.where(upper, 0.0, early_k), met, SPLIT, PRECISION)
                stored += met * tl.exp2(tl.where(upper, 0.0, local - lower))
            else:
                middle = 0.5 * forgets
                rise = tl.exp2(middle - local)
                stored *= tl.exp2(middle)
                stored = _dot(with_first, at * rise, stored, SPLIT, PRECISION)
                stored = _dot(with_second, kt * rise, stored, SPLIT, PRECISION)
                stored *= tl.exp2(local - middle)
            stored *= kt if second == 1 else at
            crossed += _along(stored)
            gain += 2 * stored
        _store(gained + rows[:, None] * KEY + keys[None, :], gain, keys, KEY, BS)
    field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    at = found + (batch * ROWS + chunk * L) * HEADS + head + rows[:, None] * HEADS
    here = there[:, None]
    tl.store(at + field, energy, mask=here)
    tl.store(at + 2 * field, crossed, mask=here)
    tl.store(at + 3 * field, total_a, mask=here)
    tl.store(at + 5 * field, total_k, mask=here)


@triton.jit(do_not_specialize=SIZES)
def tally(
    k, k_b, k_t, k_g, log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h,
    energy, gained, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Follow energy and sum of every row of the state through each chunk, token by token.

    As :func:`statescope.kernels.fused_keyed_kernels.tally`, for two writes of each token; AHEAD tokens are
    loaded at once. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, BK)
    own = batch * HEADS + head
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    gained += (own * PADDED + chunk * L) * KEY
    field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    found += (batch * ROWS + chunk * L) * HEADS + head
    energy += (own * CHUNKS + chunk) * (BLOCKS * KEY)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * CHUNKS * (BLOCKS * KEY)
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    squares = tl.zeros((BK,), tl.float32)
    entries = tl.zeros((BK,), tl.float32)
    for block in range(BLOCKS):
        squares += tl.load(energy + block * KEY + keys, mask=keys < KEY, other=0.0)
        entries += tl.load(energy + plane + block * KEY + keys, mask=keys < KEY, other=0.0)
    for first in range(0, left, AHEAD):
        loaded = ()
        for ahead in tl.static_range(AHEAD):
            row = first + ahead
            inside = (keys < KEY) & (keys * 0 + row < left)
            at = found + tl.minimum(row, left - 1) * HEADS
            g = tl.load(log_decay + row * g_t + keys * g_k, mask=inside, other=0.0).to(tl.float32)
            gain = tl.load(gained + row * KEY + keys, mask=inside, other=0.0)
            written = tl.load(a + row * a_t + keys, mask=inside, other=0.0).to(tl.float32)
            written *= tl.load(at + 3 * field)
            kt = tl.load(k + row * k_t + keys, mask=inside, other=0.0).to(tl.float32)
            written += kt * tl.load(at + 5 * field)
            loaded = loaded + ((g, gain, written),)  # noqa: RUF005 - triton has no other way
        for ahead in tl.static_range(AHEAD):
            g, gain, written = loaded[ahead]
            fall = tl.exp2(_bounded(g))
            squares *= fall * fall
            entries = entries * fall + written
            if first + ahead < left:
                at = found + (first + ahead) * HEADS
                tl.store(at, tl.sum(squares))
                tl.store(at + 3 * field, tl.sum(entries))
                tl.store(at + 4 * field, tl.sum(g) / KEY)
            squares += gain


@triton.jit
def _measure_part(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    a, a_b, a_t, a_h, values, states, gained, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, HAS_SCALE: tl.constexpr,
    chunk, begin, head, batch,
):  # fmt: skip
    own_head = batch * HEADS + head
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    own = begin + tl.arange(0, PART)
    there = rows < tl.minimum(left, begin + PART)
    own_there = own < left
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    v += batch * v_b + chunk * L * v_t + head * v_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    states += (own_head * CHUNKS + chunk) * (KEY * VALUE)
    values += (own_head * PADDED + chunk * L) * VALUE
    gained += (own_head * PADDED + chunk * L) * KEY
    weight = tl.full((L,), 1.0, tl.float32)
    own_weight = tl.full((PART,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
        own_weight = tl.load(scale + own * w_t, mask=own_there, other=0.0).to(tl.float32)
    squares_a, squares_k, beside, total_a, total_k = _sums(
        values, v, v_t, own_weight, own, own_there, VALUE, BV
    )  # fmt: skip
    apart = (own + tl.minimum(ROWS, 0))[:, None] > (rows + tl.minimum(PADDED, 0))[None, :]
    crossed = tl.zeros((PART, 1), tl.float32)
    energy = tl.zeros((PART, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        g = _finite(_decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS))[0]
        own_g = _finite(_decays_of_keys(log_decay, g_t, g_k, own, own_there, keys, KEY, BS))[0]
        local = tl.cumsum(own_g, 0)
        halfway, all_of = _halfway(own_g, PART)
        far, middle = tl.min(_within(halfway, all_of, RANGE)) == 0, 0.5 * all_of
        middle = tl.where(far, 0.0, middle)
        since = _early(g, rows, begin, middle)
        if far:
            since = tl.where((rows < begin)[:, None], since, 0.0)
        entered = tl.exp2(tl.sum(tl.where((rows < begin)[:, None], g, 0.0), 0)[None, :])
        early_a = _finite(_tile(a, a_t, rows, there, keys, KEY, BS).to(tl.float32))[0] * since
        early_k = _finite(_tile(k, k_t, rows, there, keys, KEY, BS).to(tl.float32))[0] * since
        at = _tile(a, a_t, own, own_there, keys, KEY, BS).to(tl.float32)
        kt = _tile(k, k_t, own, own_there, keys, KEY, BS).to(tl.float32)
        gain = _gains(at, kt, squares_a, squares_k, beside)
        energy += _along(gain)
        for second in tl.static_range(2):
            stored, with_first, with_second = _products(
                values, v, v_t, weight, own, own_there, own_weight, rows, there, states, keys,
                KEY, VALUE, BS, BV, SPLIT, PRECISION, second == 1,
            )  # fmt: skip
            with_first = tl.where(apart, with_first, 0.0)
            with_second = tl.where(apart, with_second, 0.0)
            stored *= entered * tl.exp2(local)
            met = _dot(with_first, early_a, tl.zeros_like(stored), SPLIT, PRECISION)
            met = _dot(with_second, early_k, met, SPLIT, PRECISION)
            stored += met * _factor(local - middle)
            if far:
                for j in range(PART):
                    of_row = (rows == begin + j)[None, :]
                    met = _along(tl.where(of_row, with_first, 0.0)) * _of_row(_finite(at)[0], j)[None, :]
                    met += _along(tl.where(of_row, with_second, 0.0)) * _of_row(_finite(kt)[0], j)[None, :]
                    past = tl.exp2(tl.minimum(local - _of_row(local, j)[None, :], 0.0))
                    stored += met * tl.where((own > begin + j)[:, None], past, 0.0)
            stored *= kt if second == 1 else at
            crossed += _along(stored)
            gain += 2 * stored
        _store(gained + own[:, None] * KEY + keys[None, :], gain, keys, KEY, BS)
    field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    here = own_there[:, None]
    at = found + (batch * ROWS + chunk * L + own)[:, None] * HEADS + head
    tl.store(at + field, energy, mask=here)
    tl.store(at + 2 * field, crossed, mask=here)
    tl.store(at + 3 * field, total_a, mask=here)
    tl.store(at + 5 * field, total_k, mask=here)


@triton.jit(do_not_specialize=SIZES)
def measure_parts(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    a, a_b, a_t, a_h, values, states, gained, listed, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """What :func:`measure` finds of other chunks, part by part. Grid: any number of programs."""
    parts: tl.constexpr = L // PART
    for item in range(tl.program_id(0), tl.load(listed) * parts, tl.num_programs(0)):
        chunk, head, batch = _place(tl.load(listed + 1 + item // parts), CHUNKS, HEADS)
        begin = item % parts * PART
        _measure_part(
            k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
            a, a_b, a_t, a_h, values, states, gained, found, ROWS, PADDED, CHUNKS, BATCH, HEADS, GROUPS,
            KEY, VALUE, L, PART, BS, BV, SPLIT, PRECISION, HAS_SCALE, chunk, begin, head, batch,
        )  # fmt: skip
