"""The device code of :mod:`statescope.kernels.fused_alike`; importing it needs triton.

Base-2 logarithms as in :mod:`statescope.kernels.fused_kernels`. Buffers between the launches are (..., batch,
head, padded row, ...), where padding decays nothing and writes nothing. With SPLIT operands are bfloat16, and
what feeds back is multiplied in halves; otherwise all is float32. In a loop whose loads run ahead, no tile is
both an operand and read by registers: triton 3.6 would overwrite it while products that read it are pending.

A product over rows takes a NaN or an infinity to earlier ones (0 * NaN is NaN). Whatever is not finite stays
in the state for good, so the last state tells which heads have to be walked and read again with CAREFUL: rows
from the first such one on are then marked instead, column by column.
"""

import triton
import triton.language as tl

from .fused_kernels import _bounded
from .fused_tiles import (
    SIZES,
    _by_halves,
    _halves,
    _invert,
    _marked,
    _put,
    _split,
    _state,
    _tile,
)


@triton.jit
def _decay_of_rows(log_decay, g_t, tokens, decays):
    """Log decay of rows that is the same for all keys, base 2, and its sums up to each."""
    g = _bounded(tl.load(log_decay + tokens * g_t, mask=decays, other=0.0))
    return g, tl.cumsum(g, 0)


@triton.jit
def _between(local, rows):
    """What survives from each earlier row, across, to each row, down; 1 where it is not earlier."""
    past = rows[:, None] >= rows[None, :]
    return tl.exp2(tl.where(past, local[:, None] - local[None, :], 0.0))


@triton.jit
def _first_exact(a, b, c, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of what feeds back, of which the first loses nothing in bfloat16."""
    if SPLIT:
        a = a.to(tl.bfloat16)
        high, low = _halves(b)
        found = tl.dot(a, high, tl.dot(a, low, c))
    else:
        found = tl.dot(a, b, c, input_precision=PRECISION)
    return found


@triton.jit
def _operand(x, SPLIT: tl.constexpr):
    """An input, or what is only read, as products take it."""
    return x.to(tl.bfloat16 if SPLIT else tl.float32)


@triton.jit(do_not_specialize=SIZES)
def pace(
    scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, a, a_b, a_t, a_h, since, survives, rate, weight,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, L: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Find what each chunk forgets, all chunks at once: all that walking needs of the decays.

    With :math:`G_t` the running sum of the log decay, ``since`` is :math:`e^{G_t}` and ``survives``
    :math:`e^{G_L - G_t}`. Where nothing is erased the writes' scale is in that; under the delta rule it is
    ``weight``, and ``rate`` is :math:`a_t e^{G_t}`. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    here = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    row = (batch * HEADS + head) * PADDED + chunk * L + rows
    g, run = _decay_of_rows(log_decay + batch * g_b + chunk * L * g_t + head * g_h, g_t, rows, here)
    left = tl.exp2(tl.cumsum(g, 0, reverse=True) - g)
    scaled = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scaled = tl.load(scale + batch * w_b + (chunk * L + rows) * w_t + head * w_h, mask=here, other=0.0)
        scaled = scaled.to(tl.float32)
    if ERASES:
        erases = tl.load(a + batch * a_b + (chunk * L + rows) * a_t + head * a_h, mask=here, other=0.0)
        tl.store(rate + row, erases.to(tl.float32) * tl.exp2(run))
        tl.store(weight + row, scaled)
    else:
        left *= scaled
    tl.store(since + row, tl.exp2(run))
    tl.store(survives + row, left)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h,
    key_square, key_sum, seen, met,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ERASES: tl.constexpr, HAS_SCALE: tl.constexpr, OUTPUTS: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    r"""Relate the rows of each chunk, all chunks at once; nothing here depends on values or states.

    ``seen`` and ``met``, (row, earlier row), are what the query and the key of a row read of an earlier
    write, :math:`e^{G_t - G_j} q_t \cdot k_j` for :math:`j \le t` and :math:`e^{G_t - G_j} k_t \cdot k_j` for
    :math:`j < t`, where nothing is erased with the write's scale in it. ``key_square`` and ``key_sum`` are
    sums over each key. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    here = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    row = (batch * HEADS + head) * PADDED + chunk * L
    q += batch * q_b + chunk * L * q_t + (head // (HEADS // GROUPS)) * q_g
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    log_decay += batch * g_b + chunk * L * g_t + head * g_h
    run = _decay_of_rows(log_decay, g_t, rows, here)[1]
    read_of = tl.zeros((L, L), tl.float32)
    of_keys = tl.zeros((L, L), tl.float32)
    sums = tl.zeros((L, 16), tl.float32)
    ones = _operand(tl.full((BS, 16), 1.0, tl.float32), SPLIT)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        kt = _operand(_tile(k, k_t, rows, here, keys, KEY, BS), SPLIT)
        if OUTPUTS:
            qt = _operand(_tile(q, q_t, rows, here, keys, KEY, BS), SPLIT)
            read_of = tl.dot(qt, tl.trans(kt), read_of, input_precision=PRECISION)
        if MEASURE:  # sums, too, by a product: see above
            of_keys = tl.dot(kt, tl.trans(kt), of_keys, input_precision=PRECISION)
            sums = tl.dot(kt, ones, sums, input_precision=PRECISION)
    between = _between(run, rows)
    if HAS_SCALE and not ERASES:
        scaled = tl.load(scale + batch * w_b + (chunk * L + rows) * w_t + head * w_h, mask=here, other=0.0)
        between *= scaled.to(tl.float32)[None, :]
    square = (row + rows)[:, None] * L + rows[None, :]
    if OUTPUTS:
        read_of = tl.where(rows[:, None] >= rows[None, :], read_of * between, 0.0)
        tl.store(seen + square, read_of.to(seen.dtype.element_ty))
    if MEASURE:
        read_of = tl.where(rows[:, None] > rows[None, :], of_keys * between, 0.0)
        tl.store(met + square, read_of.to(met.dtype.element_ty))
        squares = tl.where(rows[:, None] == rows[None, :], of_keys, 0.0)
        tl.store(key_square + row + rows, tl.sum(squares, 1))
        tl.store(key_sum + row + rows, tl.sum(sums, 1) / 16)


@triton.jit(do_not_specialize=SIZES)
def invert(
    k, k_b, k_t, k_g, log_decay, g_b, g_t, g_h, a, a_b, a_t, a_h, system, inverse, spoiled,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    r"""Find :math:`(I - M)^{-1} - I` for each chunk, all at once.

    Under the delta rule row ``t`` erases :math:`M_{tj} = a_t e^{G_t - G_j} k_t \cdot k_j` of the write of row
    ``j``. Blocks of ``PART`` rows on the diagonal are inverted row by row, then joined two by two: the one
    below is :math:`D_1 M_{10} D_0`. ``inverse`` is (row, earlier row), and so is ``system``, where the work
    is done. With CAREFUL heads that are ``spoiled`` are done again. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if CAREFUL:
        if tl.load(spoiled + batch * HEADS + head) == 0:
            return
    rows = tl.arange(0, L)
    here = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    own = ((batch * HEADS + head) * PADDED + chunk * L) * L
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    run = _decay_of_rows(log_decay + batch * g_b + chunk * L * g_t + head * g_h, g_t, rows, here)[1]
    rate = tl.load(a + batch * a_b + (chunk * L + rows) * a_t + head * a_h, mask=here, other=0.0)
    erased = tl.zeros((L, L), tl.float32)
    for start in range(0, KEY, BS):
        kt = _operand(_tile(k, k_t, rows, here, start + tl.arange(0, BS), KEY, BS), SPLIT)
        erased = tl.dot(kt, tl.trans(kt), erased, input_precision=PRECISION)
    erased *= _between(run, rows) * rate.to(tl.float32)[:, None]
    past = rows[:, None] > rows[None, :]
    at = rows[:, None] * L + rows[None, :]
    system += own
    tl.store(system + at, tl.where(past, erased, 0.0))
    tl.debug_barrier()
    _invert(system, L, PART, SPLIT, PRECISION, CAREFUL)
    found, found_low = _split(tl.where(past, tl.load(system + at), 0.0), SPLIT)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * L
    _put(found, found_low, inverse + own + at, plane, rows, L, L, SPLIT)


@triton.jit(do_not_specialize=SIZES)
def walk(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, since, survives, rate, weight, inverse, initial, final, states,
    values, energy, sums, entered, written, slots, spoiled,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ERASES: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, MEASURE: tl.constexpr,
    KEEP: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    r"""Walk all chunks with a block of the state in registers: some columns, and some keys if none erases.

    With :math:`R_t = a_t e^{G_t} S_{in}^\top k_t`, what is erased is :math:`Z = R + ((I - M)^{-1} - I)(W V +
    R)`, and what is written :math:`U = W V + Z`. ``values`` is U, as reading takes it; ``sums`` (block,
    batch, head, row, 4) are those of :math:`U^2`, :math:`Z^2` and U over columns, the last one twice.
    ``states`` (batch, head, chunk, key, value) is the state that enters each chunk, and ``energy`` (batch,
    head, chunk, block, key, 2) the energy of each of its rows in these columns, and the sum of its entries.
    With KEEP ``entered`` (kept, batch, head, key, value) and ``written`` (kept, batch, head, row, value) are
    states and U, in float32, of chunks whose entry of ``slots`` is not -1.

    ``spoiled`` (batch, head) is set where the last state is not finite; with CAREFUL those heads are walked
    again. Grid: (head * blocks of columns and keys, batch).
    """
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    across: tl.constexpr = (KEY + BK - 1) // BK
    head = tl.program_id(0) // (blocks * across)
    block = tl.program_id(0) // across % blocks
    part = tl.program_id(0) % across
    batch = tl.program_id(1).to(tl.int64)
    own = batch * HEADS + head
    if CAREFUL:
        if tl.load(spoiled + own) == 0:
            return
    rows = tl.arange(0, L)
    keys = part * BK + tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
    shown = (columns < VALUE)[None, :] & (rows < L)[:, None]
    of_state = keys[:, None] * VALUE + columns[None, :]
    of_values = rows[:, None] * VALUE + columns[None, :]
    square_of = rows[:, None] * L + rows[None, :]
    if HAS_INITIAL:
        state = tl.load(initial + own * (KEY * VALUE) + of_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    k += batch * k_b + (head // (HEADS // GROUPS)) * k_g
    v += batch * v_b + head * v_h
    since += own * PADDED
    survives += own * PADDED
    rate += own * PADDED
    weight += own * PADDED
    inverse += own * PADDED * L
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * L
    states += own * CHUNKS * (KEY * VALUE)
    values += own * PADDED * VALUE
    energy += (own * CHUNKS * blocks + block) * (2 * KEY)
    sums += ((tl.zeros((), tl.int64) + block) * BATCH * HEADS + own) * (4 * PADDED)
    pair = tl.arange(0, 2)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        if KEEP:
            slot = tl.load(slots + chunk).to(tl.int64) * BATCH * HEADS + own
            kept = tl.load(slots + chunk) >= 0
            if kept:
                tl.store(entered + slot * (KEY * VALUE) + of_state, state, mask=inside)
        if STORE:
            tl.store(states + of_state, state.to(states.dtype.element_ty), mask=inside)
        if MEASURE:
            both = tl.join(tl.sum(state * state, 1), tl.sum(state, 1))  # one store: each waits for all warps
            tl.store(energy + keys[:, None] * 2 + pair[None, :], both, mask=(keys < KEY)[:, None])
        there = rows < ROWS - chunk * L
        kt = _operand(_tile(k, k_t, rows, there, keys, KEY, BK), SPLIT)
        u = _tile(v, v_t, rows, there, columns, VALUE, BV).to(tl.float32)
        if ERASES:
            u *= tl.load(weight + rows)[:, None]
            erased = _first_exact(kt, state, tl.zeros((L, BV), tl.float32), SPLIT, PRECISION)
            erased *= tl.load(rate + rows)[:, None]
            asked = u + erased
            if CAREFUL:
                asked, mark = _marked(asked)
                erased += mark
            asked, asked_low = _split(asked, SPLIT)
            inverted = tl.load(inverse + square_of)
            inverted_low = inverted
            if SPLIT:
                inverted_low = tl.load(inverse + plane + square_of)
            erased = _by_halves(inverted, inverted_low, asked, asked_low, erased, SPLIT, PRECISION)
            u += erased
            if STORE:
                tl.store(values + of_values, u.to(values.dtype.element_ty), mask=shown)
            if KEEP:
                if kept:
                    tl.store(written + slot * (L * VALUE) + of_values, u, mask=shown)
            if MEASURE:
                total = tl.sum(u, 1)
                both = tl.join(tl.join(tl.sum(u * u, 1), total), tl.join(tl.sum(erased * erased, 1), total))
                at = rows[:, None, None] * 4 + pair[None, :, None] * 2 + pair[None, None, :]
                tl.store(sums + at, both)
        state *= tl.load(since + L - 1)
        u *= tl.load(survives + rows)[:, None]
        state = _first_exact(tl.trans(kt), u, state, SPLIT, PRECISION)
        k += L * k_t
        v += L * v_t
        since += L
        survives += L
        rate += L
        weight += L
        inverse += L * L
        states += KEY * VALUE
        values += L * VALUE
        energy += blocks * (2 * KEY)
        sums += 4 * L
    tl.store(final + own * (KEY * VALUE) + of_state, state, mask=inside)
    if not CAREFUL:
        bad = ~(tl.abs(state) < float("inf"))
        tl.atomic_max(spoiled + own, tl.max(tl.max(bad.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=SIZES)
def read(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h,
    since, seen, met, states, spoiled, skip, y, y_b, crossed, square, total,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ERASES: tl.constexpr, HAS_SKIP: tl.constexpr, OUTPUTS: tl.constexpr, MEASURE: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    r"""Read each chunk with its queries and, before the row's own write, with its keys.

    .. math:: y_t = e^{G_t} S_{in}^\top q_t + \sum_{j \le t} P_{tj} u_j + d v_t, \qquad
        D_t^\top k_t = e^{G_t} S_{in}^\top k_t + \sum_{j < t} Q_{tj} u_j,

    where P is ``seen`` and Q ``met`` (:func:`prepare`). ``crossed`` (piece, batch, head, row) is the product
    of the latter with :math:`u_t`, whose columns ``square`` and ``total``, alike, sum up where nothing is
    erased. Grid: (chunks * pieces of columns, heads, batch).
    """
    pieces: tl.constexpr = (VALUE + BV - 1) // BV
    chunk = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    if CAREFUL:
        if tl.load(spoiled + own) == 0:
            return
    rows = tl.arange(0, L)
    here = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    columns = piece * BV + tl.arange(0, BV)
    row = own * PADDED + chunk * L
    q += batch * q_b + chunk * L * q_t + (head // (HEADS // GROUPS)) * q_g
    k += batch * k_b + chunk * L * k_t + (head // (HEADS // GROUPS)) * k_g
    v += batch * v_b + chunk * L * v_t + head * v_h
    u += batch * u_b + chunk * L * u_t + head * u_h
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    out = tl.zeros((L, BV), tl.float32)
    stored = tl.zeros((L, BV), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        state = _state(states, keys, columns, KEY, VALUE, BS, BV)
        if OUTPUTS:
            qt = _operand(_tile(q, q_t, rows, here, keys, KEY, BS), SPLIT)
            out = tl.dot(qt, state, out, input_precision=PRECISION)
        if MEASURE:
            kt = _operand(_tile(k, k_t, rows, here, keys, KEY, BS), SPLIT)
            stored = tl.dot(kt, state, stored, input_precision=PRECISION)
    of_rows = tl.load(since + row + rows)[:, None]
    ut = _operand(_tile(u, u_t, rows, here, columns, VALUE, BV), SPLIT)
    known = ut
    if CAREFUL:
        known, mark = _marked(ut)
    of_square = (row + rows)[:, None] * L + rows[None, :]
    if OUTPUTS:
        out = tl.dot(tl.load(seen + of_square), known, out * of_rows, input_precision=PRECISION)
        if CAREFUL:
            out += mark
        if HAS_SKIP:
            vt = _tile(v, v_t, rows, here, columns, VALUE, BV).to(tl.float32)
            out += tl.load(skip + head).to(tl.float32) * vt
        y += batch * y_b + (chunk * L * HEADS + head) * VALUE
        at = rows[:, None] * (HEADS * VALUE) + columns[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=here[:, None] & (columns < VALUE)[None, :])
    if MEASURE:
        stored = tl.dot(tl.load(met + of_square), known, stored * of_rows, input_precision=PRECISION)
        if CAREFUL:
            stored += mark
        ut = ut.to(tl.float32)
        at = ((tl.zeros((), tl.int64) + piece) * BATCH * HEADS) * PADDED + row + rows
        tl.store(crossed + at, tl.sum(stored * ut, 1))
        if not ERASES:
            tl.store(square + at, tl.sum(ut * ut, 1))
            tl.store(total + at, tl.sum(ut, 1))


@triton.jit
def _sum_of(x, at, plane, COUNT: tl.constexpr):
    """Add up what lies in planes one after the other."""
    found = tl.load(x + at)
    for i in tl.static_range(1, COUNT):
        found += tl.load(x + i * plane + at)
    return found


@triton.jit
def _positive(x):
    """Raise to 0 what rounding has left below; not by maximum(), which may drop a NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _after_both(first_decay, first, second_decay, second):
    return first_decay * second_decay, second_decay * first + second


@triton.jit
def _follow(entering, decay, added, rows):
    """Run x' = decay x + added row by row; return x as it was before each row."""
    decay, added = tl.associative_scan((decay, added), 0, _after_both)
    found = decay * entering + added
    return tl.where(rows == 0, entering, tl.gather(found, tl.where(rows == 0, 0, rows - 1), 0))


@triton.jit(do_not_specialize=SIZES)
def measure(
    scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, a, a_b, a_t, a_h,
    key_square, key_sum, square, removed, total, crossed, energy, found, found_f, found_b,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BE: tl.constexpr, BLOCKS: tl.constexpr, SUMS: tl.constexpr, STEP: tl.constexpr,
    PIECES: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Follow energy and sum of the state through each chunk.

    .. math::

        |S_t|^2 &= e^{2 g_t} |S_{t-1}|^2 + 2 \langle D_t, U_t \rangle + |U_t|^2, \qquad
        |U_t| = |k_t| |u_t| \\
        \Sigma S_t &= e^{g_t} \Sigma S_{t-1} + (\Sigma k_t) (\Sigma u_t)

    ``energy`` is what :func:`walk` found in ``BLOCKS`` blocks; the sums over columns lie in ``SUMS`` parts,
    ``STEP`` apart, and ``crossed`` in ``PIECES``. ``found`` is (field, batch, row, head): the norms of write
    and state, the mean, the overlap and, under the delta rule, the two of
    :attr:`statescope.kernels.interface.ScanOutput.erased`. Heads of a chunk, whose results are neighbours,
    are done side by side. Grid: (chunks * heads, batch).
    """
    chunk = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    batch = tl.program_id(1).to(tl.int64)
    own = batch * HEADS + head
    rows = tl.arange(0, L)
    here = rows < tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED
    row = own * PADDED + chunk * L + rows
    pace = _decay_of_rows(log_decay + batch * g_b + chunk * L * g_t + head * g_h, g_t, rows, here)[0]
    decay = tl.exp2(pace)
    cross = _sum_of(crossed, row, plane, PIECES)
    squares = _sum_of(square, row * STEP, plane * STEP, SUMS)
    sums = _sum_of(total, row * STEP, plane * STEP, SUMS)
    if HAS_SCALE and not ERASES:
        weight = tl.load(scale + batch * w_b + (chunk * L + rows) * w_t + head * w_h, mask=here, other=0.0)
        weight = weight.to(tl.float32)
        cross *= weight
        squares *= weight * weight
        sums *= weight
    key_squares = tl.load(key_square + row)
    written = key_squares * squares
    gained = 2 * cross + written
    added = tl.load(key_sum + row) * sums
    squares = tl.zeros((BE,), tl.float32)
    sums = tl.zeros((BE,), tl.float32)
    energy += (own * CHUNKS + chunk) * (2 * BLOCKS * KEY)
    for start in range(0, BLOCKS * KEY, BE):
        place = start + tl.arange(0, BE)
        at = energy + place[:, None] * 2 + tl.arange(0, 2)[None, :]
        both = tl.load(at, mask=(place < BLOCKS * KEY)[:, None], other=0.0)
        of_energy, of_entries = tl.split(both)
        squares += of_energy
        sums += of_entries
    decayed = decay * decay * _follow(tl.sum(squares, 0), decay * decay, gained, rows)
    decayed = _positive(decayed)
    mean = (decay * _follow(tl.sum(sums, 0), decay, added, rows) + added) / (KEY * VALUE)
    write = tl.sqrt(written)
    scaled = tl.sqrt(decayed) * write
    overlap = cross / tl.where(scaled == 0, 1.0, scaled)
    overlap = tl.where(overlap > 1, 1.0, tl.where(overlap < -1, -1.0, overlap))
    at = found + batch * found_b + (chunk * L + rows) * HEADS + head
    tl.store(at, write, mask=here)
    tl.store(at + found_f, tl.sqrt(_positive(decayed + gained)), mask=here)
    tl.store(at + 2 * found_f, mean, mask=here)
    tl.store(at + 3 * found_f, tl.where(scaled == 0, 0.0, overlap), mask=here)
    if ERASES:
        erases = tl.load(a + batch * a_b + (chunk * L + rows) * a_t + head * a_h, mask=here, other=0.0)
        taken = key_squares * _sum_of(removed, row * STEP, plane * STEP, SUMS)
        tl.store(at + 4 * found_f, tl.sqrt(taken), mask=here)
        tl.store(at + 5 * found_f, -erases.to(tl.float32) * key_squares, mask=here)
