"""The device code of :mod:`statescope.kernels.fused_keyed`; importing it needs triton.

What a chunk is, and how tiles of its rows are multiplied, is in :mod:`statescope.kernels.fused_tiles`.
"""

import triton
import triton.language as tl

from .fused_kernels import _bounded
from .fused_tiles import (
    RANGE,
    SIZES,
    _along,
    _by_halves,
    _decays_of_keys,
    _dot,
    _exact,
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
    a, a_b, a_t, a_h,
    remaining, kept, halves, through, asked, system, seen, hard, listed,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, L: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, ERASES: tl.constexpr,
    HAS_SCALE: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r"""Relate the rows of each chunk to one another, to the state that enters it, and to that which leaves.

    ``remaining`` are the keys that rows write with, decayed to the chunk's end; where nothing erases, times
    the write's scale. ``through`` is what erases, under the delta rule the key, and ``asked`` are the
    queries, both decayed since the chunk began. ``kept`` is what all of the chunk forgets, ``halves`` what
    its first half does, base 2.

    ``seen`` (batch, head, row, earlier row) is :math:`\sum_k e^{run_t - run_j} q_t k_j` for :math:`j \le t`,
    and ``system`` likewise what each row erases of the writes of earlier ones, times ``a``.

    Two factors for each row stand for what is forgotten between any two. They are counted from half of all
    that is forgotten, as far from 1 either way; where that is too far, in a second launch, WIDE, in two
    products from half of what is forgotten in each half of the rows. Where that is too far too, or something
    is not finite, the chunk is left to launches of its own (:mod:`statescope.kernels.fused_hard_kernels`).
    ``hard`` (batch, head, chunk) is 0, 1 or 2 for these three; ``listed`` is the number of the last, and
    which they are. Grid: (chunks, heads, batch).
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
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    remaining += row * KEY
    through += row * KEY
    asked += row * KEY
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
    upper = (rows < L // 2)[:, None]
    erased = tl.zeros((L, L), tl.float32)
    read_of = tl.zeros((L, L), tl.float32)
    spoilt = tl.zeros((1, BS), tl.float32)
    within = tl.full((1, BS), 1, tl.int32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        kt = _tile(k, k_t, rows, there, keys, KEY, BS).to(tl.float32)
        g = _decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS)
        local = tl.cumsum(g, 0)
        total = tl.sum(g, 0)[None, :]
        at_rows = rows[:, None] * KEY + keys[None, :]
        if WIDE:
            halfway = tl.sum(tl.where(upper, g, 0.0), 0)[None, :]
            within = tl.minimum(within, _within(halfway, total, 2 * RANGE))
            tl.store(halves + of_chunk * KEY + keys, tl.sum(halfway, 0), mask=keys < KEY)
            middle, second = 0.5 * halfway, 0.5 * (halfway + total)
            early = kt * tl.exp2(tl.where(upper, middle, second) - local)
            left = kt * tl.exp2(total - local)
        else:
            middle = 0.5 * total
            early = kt * tl.exp2(middle - local)
            left = early * tl.exp2(middle)
            within = tl.minimum(within, _within(middle, total, RANGE))
            if not ERASES and not OUTPUTS:
                spoilt += tl.sum(kt, 0)[None, :] * 0.0
            tl.store(kept + of_chunk * KEY + keys, tl.sum(total, 0), mask=keys < KEY)
        if not ERASES:
            left *= weight[:, None]
        left, left_low = _split(left, SPLIT)
        _put(left, left_low, remaining + at_rows, plane, keys, KEY, BS, SPLIT)
        if WIDE:
            late = tl.where(upper, 0.0, early)
            early = tl.where(upper, early, 0.0)
        if OUTPUTS:
            qt = _tile(q, q_t, rows, there, keys, KEY, BS).to(tl.float32)
            x = qt * tl.exp2(local - middle)
            read_of = _dot(x, tl.trans(early), read_of, SPLIT, PRECISION)
            if WIDE:
                lower = qt * tl.exp2(tl.where(upper, 0.0, local - second))
                read_of = _dot(lower, tl.trans(late), read_of, SPLIT, PRECISION)
                x = qt * tl.exp2(local)
            else:
                x *= tl.exp2(middle)
            _store(asked + at_rows, x.to(asked.dtype.element_ty), keys, KEY, BS)
        if ERASES:
            x = kt * tl.exp2(local - middle)
            erased = _exact(x, tl.trans(early), erased, SPLIT, PRECISION)
            if WIDE:
                lower = kt * tl.exp2(tl.where(upper, 0.0, local - second))
                erased = _exact(lower, tl.trans(late), erased, SPLIT, PRECISION)
                x = kt * tl.exp2(local)
            else:
                x *= tl.exp2(middle)
            high, low = _split(x, SPLIT)
            _put(high, low, through + at_rows, plane, keys, KEY, BS, SPLIT)
    rate = tl.full((L,), 1.0, tl.float32)
    if ERASES:
        rate = tl.load(a + rows * a_t, mask=there, other=0.0).to(tl.float32)
    known = tl.sum(weight * rate * 0.0) + tl.sum(spoilt)  # NaN, or 0
    past = rows[:, None] >= rows[None, :]
    erased, read_of = tl.where(past, erased * rate[:, None], 0.0), tl.where(past, read_of, 0.0)
    fine = ((tl.abs(erased) < float("inf")) & (tl.abs(read_of) < float("inf"))).to(tl.int32)
    done = (tl.min(within) == 1) & (tl.min(fine) == 1) & (known == 0)
    tl.store(hard + of_chunk, tl.where(done, WIDE, WIDE + 1))
    if done:
        at_rows = rows[:, None] * L + rows[None, :]
        if ERASES:
            erased = tl.where(rows[:, None] > rows[None, :], erased, 0.0)
            tl.store(system + row * L + at_rows, erased)
        if OUTPUTS:
            tl.store(seen + row * L + at_rows, read_of.to(seen.dtype.element_ty))
    elif WIDE:
        tl.store(listed + 1 + tl.atomic_add(listed, 1), of_chunk.to(tl.int32))


@triton.jit(do_not_specialize=SIZES)
def solve(
    v, v_b, v_t, v_h, scale, w_b, w_t, w_h, a, a_b, a_t, a_h, system, through, values, hard,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Find what each chunk writes, whatever state enters it, all chunks at once.

    With :math:`T = (I - M)^{-1}`, where :math:`M` is ``system`` (:func:`relate`), and :math:`X`, which is
    ``through`` times ``a``,

    .. math:: U = T W V + T X S_{in}, \qquad S_{out} = \operatorname{diag}(e^{G_L}) S_{in} + K_{rem}^\top U .

    ``values`` is :math:`T W V`; :math:`T X` takes the place of ``through``, and T that of ``system``.
    Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    there = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    row = (batch * HEADS + head) * PADDED + chunk * L
    v += batch * v_b + chunk * L * v_t + head * v_h
    a += batch * a_b + chunk * L * a_t + head * a_h
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    through += row * KEY
    values += row * VALUE
    system += row * L
    square = rows[:, None] * L + rows[None, :]
    rate = tl.load(a + rows * a_t, mask=there, other=0.0).to(tl.float32)
    usable = tl.abs(rate) < float("inf")
    rate = tl.where(usable, rate, 0.0)
    mark = _since_bad(~usable)[:, None]
    if tl.load(hard + (batch * HEADS + head) * CHUNKS + chunk) == 2:
        mark += _without_bad(system + square, (rows < L)[:, None])
    _invert(system, L, PART, SPLIT, PRECISION, False)
    inverse = tl.load(system + square) + mark
    to_keys, to_keys_low = _split(inverse * rate[None, :], SPLIT)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        at = through + rows[:, None] * KEY + keys[None, :]
        xt, xt_low = _take(at, plane, keys, KEY, BS, SPLIT)
        found = tl.zeros((L, BS), tl.float32)
        found = _by_halves(to_keys, to_keys_low, xt, xt_low, found, SPLIT, PRECISION)
        found, found_low = _split(found, SPLIT)
        _put(found, found_low, at, plane, keys, KEY, BS, SPLIT)
    mark = tl.zeros((L, 1), tl.float32)  # that of rates is in the inverse
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
        usable = tl.abs(weight) < float("inf")
        mark = _since_bad(~usable)[:, None]
        inverse *= tl.where(usable, weight, 0.0)[None, :]
    to_values, to_values_low = _split(inverse, SPLIT)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        shown = _shown(there, columns, VALUE, BV)
        u = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
        u, bad_from = _marked(u)
        u = _halves_of_input(to_values, to_values_low, u, bad_from + mark, SPLIT, PRECISION)
        _store(values + rows[:, None] * VALUE + columns[None, :], u, columns, VALUE, BV)


@triton.jit(do_not_specialize=SIZES)
def walk(
    remaining, kept, through, u, u_b, u_t, u_h, values, initial, final, states, energy,
    entered, slots,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ERASES: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, MEASURE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Walk all chunks with a block of the state in registers: some columns, and some keys if none erases.

    ``values`` is given what each chunk writes, where ``u`` is not that already. ``states`` (batch, head,
    chunk, key, value) is the state that enters each, and ``energy`` (2, batch, head, chunk, block, key) the
    energy of each of its rows in these columns, and the sum of its entries. With KEEP ``entered`` (kept,
    batch, head, key, value) is the state that enters each chunk whose entry of ``slots`` is not -1.
    Grid: (head * blocks of columns and keys, batch).
    """
    across: tl.constexpr = (KEY + BK - 1) // BK
    head = tl.program_id(0) // (BLOCKS * across)
    block = tl.program_id(0) // across % BLOCKS
    part = tl.program_id(0) % across
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, L)
    keys = part * BK + tl.arange(0, BK)
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
    through += own * PADDED * KEY
    values += own * PADDED * VALUE
    u += batch * u_b + head * u_h
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
        if ERASES:
            written = _load(values + of_values, columns, VALUE, BV)
        else:
            shown = _shown(rows < ROWS - chunk * L, columns, VALUE, BV)
            written = tl.load(u + rows[:, None] * u_t + columns[None, :], mask=shown, other=0.0)
        keep = tl.exp2(tl.load(kept + keys, mask=keys < KEY, other=0.0))[:, None]
        kt, kt_low = _take(remaining + of_keys, plane, keys, KEY, BK, SPLIT)
        if ERASES:
            xt, xt_low = _take(through + of_keys, plane, keys, KEY, BK, SPLIT)
            if SPLIT:
                high, low = _halves(state)
                written = tl.dot(xt, high, tl.dot(xt, low, tl.dot(xt_low, high, written)))
            else:
                written = tl.dot(xt, state, written, input_precision=PRECISION)
            _store(values + of_values, written, columns, VALUE, BV)
        state *= keep
        if SPLIT and ERASES:
            high, low = _halves(written)
            state = tl.dot(tl.trans(kt), low, state)
            state = tl.dot(tl.trans(kt_low), high, state)
            state = tl.dot(tl.trans(kt), high, state)
        elif SPLIT:
            state = tl.dot(tl.trans(kt_low), written, state)
            state = tl.dot(tl.trans(kt), written, state)
        else:
            state = tl.dot(tl.trans(kt), written.to(tl.float32), state, input_precision=PRECISION)
        through += L * KEY
        values += L * VALUE
        u += L * u_t
        states += KEY * VALUE
        remaining += L * KEY
        kept += KEY
        energy += BLOCKS * KEY
    tl.store(final + own * (KEY * VALUE) + of_state, state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def read(
    u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, asked, states, seen, skip, y,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ERASES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Read each chunk with its queries: the state that entered it, and what it wrote itself.

    ``u`` is what is written, without ERASES before it is scaled; ``asked`` and ``seen`` are as :func:`relate`
    has them. Grid: (chunks * pieces, heads, batch).
    """
    pieces: tl.constexpr = (VALUE + BV - 1) // BV
    chunk = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    there = rows < left
    columns = piece * BV + tl.arange(0, BV)
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    asked += (own * PADDED + chunk * L) * KEY
    u += batch * u_b + chunk * L * u_t + head * u_h
    v += batch * v_b + chunk * L * v_t + head * v_h
    out = tl.zeros((L, BV), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        state = _state(states, keys, columns, KEY, VALUE, BS, BV)
        qt = _load(asked + rows[:, None] * KEY + keys[None, :], keys, KEY, BS)
        out = _dot(qt, state, out, SPLIT, PRECISION)
    shown = _shown(rows < left, columns, VALUE, BV)
    ut = tl.load(u + rows[:, None] * u_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
    if HAS_SCALE and not ERASES:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        ut *= tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)[:, None]
    good, marks = _marked(ut)
    seen += (own * PADDED + chunk * L) * L
    read_of = tl.load(seen + rows[:, None] * L + rows[None, :])
    out = _dot(read_of, good, out, SPLIT, PRECISION) + marks
    if HAS_SKIP:
        skipped = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
        out += tl.load(skip + head).to(tl.float32) * skipped.to(tl.float32)
    y += ((batch * ROWS + chunk * L) * HEADS + head) * VALUE
    tl.store(y + rows[:, None] * (HEADS * VALUE) + columns[None, :], out.to(y.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=SIZES)
def measure(
    k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h, kept, halves, states, gained, hard, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    r"""Bring what is written and what is stored together.

    ``found`` is (field, batch, row, head): second :math:`|U_t|^2`, third :math:`\langle D_t, U_t \rangle`,
    fourth, for :func:`tally`, the sum of the value that is written, and under the delta rule sixth the energy
    of what is erased, and the share of it along the key (:class:`statescope.kernels.interface.ScanOutput`).
    ``gained`` (batch, head, row, key) is what the write adds to the energy of each row of the state. It takes
    two launches, as :func:`relate` does. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    if tl.load(hard + own * CHUNKS + chunk) != WIDE:
        return
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    there = rows < left
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + chunk * L * a_t + head * a_h
    v += batch * v_b + chunk * L * v_t + head * v_h
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    u += batch * u_b + chunk * L * u_t + head * u_h
    kept += (own * CHUNKS + chunk) * KEY
    halves += (own * CHUNKS + chunk) * KEY
    upper = (rows < L // 2)[:, None]
    gained += (own * PADDED + chunk * L) * KEY
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + chunk * L * w_t + head * w_h
        weight = tl.load(scale + rows * w_t, mask=there, other=0.0).to(tl.float32)
    gram = tl.zeros((L, L), tl.float32)
    squares = tl.zeros((L, 1), tl.float32)
    total = tl.zeros((L, 1), tl.float32)
    removed = tl.zeros((L, 1), tl.float32)
    ut = tl.zeros((L, BV), tl.float32)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        shown = _shown(rows < left, columns, VALUE, BV)
        at = rows[:, None] * u_t + columns[None, :]
        ut = tl.load(u + at, mask=shown, other=0.0).to(tl.float32)
        if HAS_SCALE and not ERASES:
            ut *= weight[:, None]
        gram = _dot(ut, tl.trans(ut), gram, SPLIT, PRECISION)
        squares += _along(ut * ut)
        total += _along(ut)
        if DELTA:
            vt = tl.load(v + rows[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
            multiplied = weight
            if SPLIT:  # as it was multiplied, so that nothing is removed where nothing is there
                high, low = _halves(weight)
                multiplied = high.to(tl.float32) + low.to(tl.float32)
            vt = vt.to(tl.float32) * multiplied[:, None]
            removed += _along((ut - vt) * (ut - vt))
    down, across = _unknown(L, ROWS, PADDED)
    gram = tl.where(down > across, gram, 0.0)
    key_squares = tl.zeros((L, 1), tl.float32)
    crossed = tl.zeros((L, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        stored = tl.zeros((L, BS), tl.float32)
        for block in range(0, VALUE, BV):
            columns = block + tl.arange(0, BV)
            if VALUE > BV:
                shown = _shown(rows < left, columns, VALUE, BV)
                ut = tl.load(u + rows[:, None] * u_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
                if HAS_SCALE and not ERASES:
                    ut *= weight[:, None]
            state = _state(states, keys, columns, KEY, VALUE, BS, BV)
            stored = _dot(ut, tl.trans(state), stored, SPLIT, PRECISION)
        g = _decays_of_keys(log_decay, g_t, g_k, rows, there, keys, KEY, BS)
        forgets = tl.load(kept + keys, mask=keys < KEY, other=0.0)[None, :]
        kt = _tile(k, k_t, rows, there, keys, KEY, BS).to(tl.float32)
        local = tl.cumsum(g, 0)
        if WIDE:
            halfway = tl.load(halves + keys, mask=keys < KEY, other=0.0)[None, :]
            middle, second = 0.5 * halfway, 0.5 * (halfway + forgets)
            early = kt * tl.exp2(tl.where(upper, middle, second) - local)
            stored *= tl.exp2(local)
            none = tl.zeros_like(stored)
            found_of = _dot(gram, tl.where(upper, early, 0.0), none, SPLIT, PRECISION)
            stored += found_of * tl.exp2(local - middle)
            found_of = _dot(gram, tl.where(upper, 0.0, early), none, SPLIT, PRECISION)
            stored += found_of * tl.exp2(tl.where(upper, 0.0, local - second))
        else:
            middle = 0.5 * forgets
            early = kt * tl.exp2(middle - local)
            stored = _dot(gram, early, stored * tl.exp2(middle), SPLIT, PRECISION) * tl.exp2(local - middle)
        stored *= kt
        crossed += _along(stored)
        key_squares += _along(kt * kt)
        energy = 2 * stored + kt * kt * squares
        _store(gained + rows[:, None] * KEY + keys[None, :], energy, keys, KEY, BS)
    field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    found += (batch * ROWS + chunk * L) * HEADS + head
    at = rows[:, None] * HEADS
    here = (rows < left)[:, None]
    tl.store(found + field + at, key_squares * squares, mask=here)
    tl.store(found + 2 * field + at, crossed, mask=here)
    tl.store(found + 3 * field + at, total, mask=here)
    if DELTA:
        rate = tl.load(a + rows * a_t, mask=rows < left, other=0.0).to(tl.float32)[:, None]
        tl.store(found + 5 * field + at, key_squares * removed, mask=here)
        tl.store(found + 6 * field + at, -rate * key_squares, mask=here)


@triton.jit(do_not_specialize=SIZES)
def tally(
    k, k_b, k_t, k_g, log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h,
    energy, gained, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Follow energy and sum of every row of the state through each chunk, row of the text by row.

    Of the fields of ``found`` it fills those that :func:`measure` leaves: the energy of the state once it has
    decayed, before the write, the sum of its entries after the write, and the mean log decay.
    Grid: (chunks, heads, batch).
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
    squares = tl.zeros((BK,), tl.float32)
    entries = tl.zeros((BK,), tl.float32)
    for block in range(BLOCKS):
        squares += tl.load(energy + block * KEY + keys, mask=keys < KEY, other=0.0)
        entries += tl.load(energy + plane + block * KEY + keys, mask=keys < KEY, other=0.0)
    for row in range(tl.minimum(ROWS - chunk * L, L).to(tl.int32)):
        at = found + row * HEADS
        g = tl.load(log_decay + row * g_t + keys * g_k, mask=keys < KEY, other=0.0).to(tl.float32)
        tl.store(at + 4 * field, tl.sum(g) / KEY)
        fall = tl.exp2(_bounded(g))
        squares *= fall * fall
        tl.store(at, tl.sum(squares))
        squares += tl.load(gained + row * KEY + keys, mask=keys < KEY, other=0.0)
        kt = tl.load(k + row * k_t + keys, mask=keys < KEY, other=0.0).to(tl.float32)
        entries = entries * fall + kt * tl.load(at + 3 * field)
        tl.store(at + 3 * field, tl.sum(entries))
