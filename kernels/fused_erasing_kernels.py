"""The device code of :mod:`statescope.kernels.fused_erasing`; importing it needs triton.

Base-2 logarithms as in :mod:`statescope.kernels.fused_kernels`. A chunk is ``L`` rows, each one write of
rank one: a token, or with PAIRS every other token's erase term and write in turn. Buffers between the
launches are (batch, head, padded row, ...), where padding decays nothing and writes nothing.

No product over rows is shown a NaN or an infinity, as it would reach earlier ones (0 * NaN is NaN): later
rows of the same column are marked instead.
"""

import triton
import triton.language as tl

from .fused_kernels import _bounded

SIZES = ["ROWS", "PADDED", "CHUNKS", "BATCH"]
"""Arguments for whose values nothing is compiled anew: texts differ in length."""

RANGE = tl.constexpr(80.0)
"""Most that a key may forget for one product of related rows, base 2: its factors stay below 2^80, which
leaves 2^47 for what they multiply."""


@triton.jit
def _halves(x):
    """A float32 as two bfloat16, the first its rounding."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


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
    if SPLIT:
        a_high, a_low = _halves(a)
        b_high, b_low = _halves(b)
        found = tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high, c)))
    else:
        found = tl.dot(a, b, c, input_precision=PRECISION)
    return found


@triton.jit
def _put(x, at, plane, mask, SPLIT: tl.constexpr):
    """Store a tile; with SPLIT its two halves, one plane after the other."""
    if SPLIT:
        high, low = _halves(x)
        tl.store(at, high, mask=mask)
        tl.store(at + plane, low, mask=mask)
    else:
        tl.store(at, x, mask=mask)


@triton.jit
def _since_bad(bad):
    """NaN from the first row on that is bad, 0 before."""
    return tl.cumsum(tl.where(bad, float("nan"), 0.0), 0)


@triton.jit
def _marked(x):
    """What is finite of rows, and NaN in every column from its first entry on that is not."""
    bad = ~(tl.abs(x) < float("inf"))
    mark = tl.zeros_like(x)
    if tl.max(bad.to(tl.int32)) > 0:
        mark = _since_bad(bad)
    return tl.where(bad, 0.0, x), mark


@triton.jit
def _of_row(x, row):
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, x.shape[0]) == row)[:, None], x, 0.0), 0)


@triton.jit
def _running(g, KEYED: tl.constexpr, BACK: tl.constexpr):
    """Sums of all rows up to each, or from each on."""
    if KEYED:
        found = tl.cumsum(g, 0, reverse=BACK)
    else:
        found = tl.cumsum(tl.sum(g, 1), 0, reverse=BACK)[:, None]
    return found


@triton.jit
def _early(g, rows, begin, KEYED: tl.constexpr):
    """What survives from each row on to the row ``begin``, where its part begins; one over it within."""
    past = tl.where((rows < begin)[:, None], g, 0.0)
    within = tl.where((rows >= begin)[:, None], g, 0.0)
    found = tl.where(
        (rows < begin)[:, None], _running(past, KEYED, True) - past, -_running(within, KEYED, False)
    )
    return _factor(found)


@triton.jit
def _factor(x):
    """A power of two that stays finite; not by minimum(), which may drop a NaN."""
    return tl.exp2(tl.where(x > RANGE, RANGE, x))


@triton.jit
def _too_far(local):
    """Whether some key forgets more than :data:`RANGE`."""
    return tl.max((local < -RANGE).to(tl.int32)) > 0


@triton.jit
def _one_by_one(x, at, k, local, begin, rows, PART: tl.constexpr):
    r"""What rows of a part read of one another, :math:`\sum_k e^{at_t - local_j} x_t k_j`, pair by pair."""
    found = tl.zeros((x.shape[0], rows.shape[0]), tl.float32)
    for j in range(PART):
        past = tl.exp2(tl.minimum(at - _of_row(local, j)[None, :], 0.0)) * _of_row(k, j)[None, :]
        found = tl.where((rows == begin + j)[None, :], _along(x * past), found)
    return found


@triton.jit
def _inverse(system, L: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    r"""Invert :math:`I - M` for a strictly lower :math:`M`.

    Diagonal blocks of 16 row by row, all at once; then blocks two by two, :math:`D + D M_{10} D`.
    """
    blocks: tl.constexpr = L // 16
    rows = tl.arange(0, L)
    down, across = rows[:, None], rows[None, :]
    own = tl.where(down // 16 == across // 16, system, 0.0)
    own = tl.sum(tl.reshape(own, (blocks, 16, blocks, 16)), 2)
    place = tl.arange(0, 16)
    solved = (
        tl.zeros((blocks, 16, 16), tl.float32) + tl.where(place[:, None] == place[None, :], 1.0, 0.0)[None]
    )
    for row in range(1, 16):
        chosen = (place == row)[None, :, None]
        weights = tl.sum(tl.where(chosen, own, 0.0), 1)  # of the rows above, in every block
        solved += tl.where(chosen, tl.sum(weights[:, :, None] * solved, 1)[:, None, :], 0.0)
    same = (tl.arange(0, blocks)[:, None] == tl.arange(0, blocks)[None, :])[:, None, :, None]
    found = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (L, L))
    if L > 16:
        between = tl.where((down // 32 == across // 32) & (down // 16 > across // 16), system, 0.0)
        found = _joined(found, between, L, SPLIT, PRECISION)
    if L > 32:
        between = tl.where((down // 64 == across // 64) & (down // 32 > across // 32), system, 0.0)
        found = _joined(found, between, L, SPLIT, PRECISION)
    return found


@triton.jit
def _joined(found, between, L: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    below = _exact(between, found, tl.zeros((L, L), tl.float32), SPLIT, PRECISION)
    return _exact(found, below, found, SPLIT, PRECISION)


@triton.jit
def _tokens(rows, left, PAIRS: tl.constexpr):
    """Tokens of rows; whether a row decays the state before it writes; whether it is its token's last."""
    if PAIRS:
        tokens = rows // 2
        decays = (rows % 2 == 0) & (rows < left)
        last = (rows % 2 == 1) & (rows < left)
    else:
        tokens = rows
        decays = rows < left
        last = decays
    return tokens, decays, last


@triton.jit
def _written_keys(k, k_t, a, a_t, tokens, decays, last, keys, KEY: tl.constexpr, PAIRS: tl.constexpr):
    """The keys that rows write with: with PAIRS ``a`` and ``k`` in turn."""
    inside = (keys < KEY)[None, :]
    found = tl.load(k + tokens[:, None] * k_t + keys[None, :], mask=last[:, None] & inside, other=0.0)
    found = found.to(tl.float32)
    if PAIRS:
        at = a + tokens[:, None] * a_t + keys[None, :]
        found += tl.load(at, mask=decays[:, None] & inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY: tl.constexpr):
    """The log decay of rows, of every key, base 2."""
    inside = decays[:, None] & (keys < KEY)[None, :]
    return _bounded(tl.load(log_decay + tokens[:, None] * g_t + keys[None, :] * g_k, mask=inside, other=0.0))


@triton.jit
def _along(x):
    """Sum along rows, kept as a column: so triton 3.6 does not try to move the sum out of a loop."""
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _finite(x):
    """What is finite of rows, 0 elsewhere; and whether a row is finite whole."""
    good = tl.abs(x) < float("inf")
    return tl.where(good, x, 0.0), tl.min(good.to(tl.int32), 1)


@triton.jit(do_not_specialize=SIZES)
def relate(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h, system, seen, fast,
    ROWS, PADDED, CHUNKS,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, ERASES: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    r"""Relate the rows of each chunk: what they erase, and what their queries read, of earlier writes.

    ``system`` and ``seen`` are (batch, head, row, earlier row), :math:`\sum_k e^{at_t - run_j} x_t k_j` for
    :math:`j \le t`, where x is what erases (:func:`solve`), or the query. The decay between two rows is split
    where the later one's part begins, with WHOLE the chunk. Where a key forgets too much for that, ``fast``
    (batch, head, chunk) is 1, and the chunk is for a second launch. Grid: (chunks * parts, heads, batch).
    """
    parts: tl.constexpr = L // PART
    chunk = (tl.program_id(0) // parts).to(tl.int64)
    begin = tl.program_id(0) % parts * PART
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    fast += (batch * HEADS + head) * CHUNKS + chunk
    if not WHOLE:
        if tl.load(fast) == 0:
            return
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    own = begin + tl.arange(0, PART)
    tokens, decays, ends = _tokens(rows, tl.minimum(left, begin + PART), PAIRS)
    own_tokens, own_decays, own_ends = _tokens(own, left, PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    q += batch * q_b + first * q_t + (head // (HEADS // GROUPS)) * q_g
    a += batch * a_b + first * a_t + head * a_h
    b += batch * b_b + first * b_t + head * b_h
    log_decay += batch * g_b + first * g_t + head * g_h
    erased = tl.zeros((PART, L), tl.float32)
    read = tl.zeros((PART, L), tl.float32)
    too_far = 0
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        paces = start + tl.arange(0, BS if KEYED else 1)
        g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, paces, KEY)
        early = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
        kt = early
        if WHOLE:
            local = _running(g, KEYED, False)
            early *= _factor(-local)
            far = _too_far(local)
            too_far = tl.maximum(too_far, far.to(tl.int32))
        else:
            early *= _early(g, rows, begin, KEYED)
            g = _decays_of_keys(log_decay, g_t, g_k, own_tokens, own_decays, paces, KEY)
            kt = _written_keys(k, k_t, a, a_t, own_tokens, own_decays, own_ends, keys, KEY, PAIRS)
            local = _running(g, KEYED, False)
            far = _too_far(local)
            if far:
                early = tl.where((rows < begin)[:, None], early, 0.0)
        if ERASES:
            xt, at = kt, local
            if PAIRS:
                asked = own_decays[:, None] & (keys < KEY)[None, :]
                xt = tl.load(b + own_tokens[:, None] * b_t + keys[None, :], mask=asked, other=0.0)
                xt, at = xt.to(tl.float32), local - g
            erased = _exact(xt * tl.exp2(at), tl.trans(early), erased, SPLIT, PRECISION)
            if not WHOLE:
                if far:
                    erased += _one_by_one(xt, at, kt, local, begin, rows, PART)
        if OUTPUTS:
            asked = own_ends[:, None] & (keys < KEY)[None, :]
            qt = tl.load(q + own_tokens[:, None] * q_t + keys[None, :], mask=asked, other=0.0)
            qt = qt.to(tl.float32)
            read = _dot(qt * tl.exp2(local), tl.trans(early), read, SPLIT, PRECISION)
            if not WHOLE:
                if far:
                    read += _one_by_one(qt, local, kt, local, begin, rows, PART)
    if WHOLE:
        tl.store(fast, too_far)
    related = own[:, None] >= rows[None, :]
    at = (((batch * HEADS + head) * PADDED + chunk * L) + own)[:, None] * L + rows[None, :]
    if ERASES:
        tl.store(system + at, tl.where(related, erased, 0.0))
    if OUTPUTS:
        tl.store(seen + at, tl.where(related, read, 0.0).to(seen.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def invert(
    system, a, a_b, a_t, a_h,
    ROWS, PADDED,
    HEADS: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    r"""Invert :math:`I - M` of each chunk, in place of :math:`M`, which is ``system`` times ``a``.

    From the first row on that a NaN or an infinity reaches, the inverse is NaN; nothing above feels it.
    Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    system += ((batch * HEADS + head) * PADDED + chunk * L) * L
    at = rows[:, None] * L + rows[None, :]
    found, fine = _finite(tl.load(system + at))
    if not PAIRS:
        rate = tl.load(
            a + batch * a_b + (chunk * L + rows) * a_t + head * a_h, mask=chunk * L + rows < ROWS, other=0.0
        ).to(tl.float32)
        found *= rate[:, None]
        fine = tl.where(tl.abs(rate) < float("inf"), fine, 0)
    mark = _since_bad(fine == 0)[:, None]
    found = tl.where((rows[:, None] > rows[None, :]) & (mark == mark), found, 0.0)
    tl.store(system + at, _inverse(found, L, SPLIT, PRECISION) + mark)


@triton.jit(do_not_specialize=SIZES)
def solve(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h,
    system, remaining, kept, through, values,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Find what each chunk does to whatever state enters it, all chunks at once.

    With :math:`T = (I - M)^{-1}`, where :math:`M_{tj}` is what row ``t`` erases of the write of row ``j``,

    .. math:: U = T W V + T X S_{in}, \qquad S_{out} = \operatorname{diag}(e^{G_L}) S_{in} + K_{rem}^\top U .

    ``values`` is :math:`T W V`, ``through`` :math:`T X`, ``remaining`` :math:`K_{rem}`, the keys decayed to
    the chunk's end, and ``kept`` :math:`e^{G_L}`. Under the delta rule :math:`X` is the key, decayed up to
    the row's own token, times ``a``; otherwise ``b``, decayed up to the token before.
    Grid: (chunks * (slices of keys + blocks of values), heads, batch).
    """
    slices: tl.constexpr = (KEY + BS - 1) // BS
    pieces: tl.constexpr = slices + (VALUE + BV - 1) // BV
    chunk = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, tl.minimum(ROWS - chunk * L, L).to(tl.int32), PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    row = (batch * HEADS + head) * PADDED + chunk * L
    if ERASES:
        inverse = tl.load(system + (row + rows)[:, None] * L + rows[None, :])
    if piece < slices:
        k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
        a += batch * a_b + first * a_t + head * a_h
        log_decay += batch * g_b + first * g_t + head * g_h
        kept += ((batch * HEADS + head) * CHUNKS + chunk) * KEY
        keys = piece * BS + tl.arange(0, BS)
        paces = piece * BS + tl.arange(0, BS if KEYED else 1)
        g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, paces, KEY)
        spoilt = tl.sum(g * 0.0, 0)[None, :]  # NaN, or 0: of what leaves the chunk
        g = _finite(g)[0]
        kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
        inside = (keys < KEY)[None, :] & (rows < L)[:, None]
        of_rows = (row + rows)[:, None] * KEY + keys[None, :]
        plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
        _put(kt * tl.exp2(_running(g, KEYED, True) - g) + spoilt, remaining + of_rows, plane, inside, SPLIT)
        of_chunk = tl.exp2(tl.sum(g, 0)[None, :]) + spoilt + tl.zeros((1, BS), tl.float32)
        tl.store(kept + keys, tl.sum(of_chunk, 0), mask=keys < KEY)
        if ERASES:
            before = _running(g, KEYED, False)
            if PAIRS:
                b += batch * b_b + first * b_t + head * b_h
                asked = decays[:, None] & (keys < KEY)[None, :]
                xt = tl.load(b + tokens[:, None] * b_t + keys[None, :], mask=asked, other=0.0).to(tl.float32)
                before -= g
            else:
                xt = kt * tl.load(a + rows * a_t, mask=decays, other=0.0).to(tl.float32)[:, None]
            xt = _finite(xt)[0] * tl.exp2(before)
            found = _exact(inverse, xt, tl.zeros((L, BS), tl.float32), SPLIT, PRECISION)
            _put(found, through + of_rows, plane, inside, SPLIT)
    else:
        v += batch * v_b + first * v_t + head * v_h
        columns = (piece - slices) * BV + tl.arange(0, BV)
        shown = ends[:, None] & (columns < VALUE)[None, :]
        u = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
        if HAS_SCALE:
            scale += batch * w_b + first * w_t + head * w_h
            u *= tl.load(scale + tokens * w_t, mask=ends, other=0.0).to(tl.float32)[:, None]
        if ERASES:
            u, bad_from = _marked(u)
            u = _exact(inverse, u, tl.zeros((L, BV), tl.float32), SPLIT, PRECISION)
            u += bad_from
        own_values = (columns < VALUE)[None, :] & (rows < L)[:, None]
        tl.store(values + (row + rows[:, None]) * VALUE + columns[None, :], u, mask=own_values)


@triton.jit(do_not_specialize=SIZES)
def walk(
    remaining, kept, through, values, initial, final, states, energy, entered, slots,
    PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ERASES: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, MEASURE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Walk all chunks with some columns of the state in registers.

    ``values`` is given what each chunk writes. ``states`` (batch, head, chunk, key, value) is the state that
    enters each, and ``energy`` (2, batch, head, chunk, block, key) the energy of each of its rows in these
    columns, and the sum of its entries. With KEEP ``entered`` (kept, batch, head, key, value) is the state
    that enters each chunk whose entry of ``slots`` is not -1. Grid: (head * blocks of columns, batch).
    """
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, L)
    keys = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
    own = batch * HEADS + head
    of_state = keys[:, None] * VALUE + columns[None, :]
    of_keys = rows[:, None] * KEY + keys[None, :]
    of_values = rows[:, None] * VALUE + columns[None, :]
    own_keys = (keys < KEY)[None, :] & (rows < L)[:, None]
    shown = (columns < VALUE)[None, :] & (rows < L)[:, None]
    if HAS_INITIAL:
        state = tl.load(initial + own * (KEY * VALUE) + of_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    remaining += own * PADDED * KEY
    through += own * PADDED * KEY
    values += own * PADDED * VALUE
    kept += own * CHUNKS * KEY
    states += own * CHUNKS * (KEY * VALUE)
    energy += (own * CHUNKS * blocks + block) * KEY
    entries = (tl.zeros((), tl.int64) + BATCH) * HEADS * CHUNKS * (blocks * KEY)
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
        u = tl.load(values + of_values, mask=shown, other=0.0)
        keep = tl.load(kept + keys, mask=keys < KEY, other=0.0)[:, None]
        if SPLIT:
            kt = tl.load(remaining + of_keys, mask=own_keys, other=0.0)
            kt_low = tl.load(remaining + plane + of_keys, mask=own_keys, other=0.0)
            if ERASES:
                xt = tl.load(through + of_keys, mask=own_keys, other=0.0)
                xt_low = tl.load(through + plane + of_keys, mask=own_keys, other=0.0)
                high, low = _halves(state)
                u = tl.dot(xt, high, tl.dot(xt, low, tl.dot(xt_low, high, u)))
            high, low = _halves(u)
            state *= keep
            state = tl.dot(tl.trans(kt), low, tl.dot(tl.trans(kt_low), high, state))
            state = tl.dot(tl.trans(kt), high, state)
        else:
            kt = tl.load(remaining + of_keys, mask=own_keys, other=0.0)
            if ERASES:
                xt = tl.load(through + of_keys, mask=own_keys, other=0.0)
                u = tl.dot(xt, state, u, input_precision=PRECISION)
            state = tl.dot(tl.trans(kt), u, state * keep, input_precision=PRECISION)
        if ERASES:
            tl.store(values + of_values, u, mask=shown)
        remaining += L * KEY
        through += L * KEY
        values += L * VALUE
        kept += KEY
        states += KEY * VALUE
        energy += blocks * KEY
    tl.store(final + own * (KEY * VALUE) + of_state, state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def read(
    q, q_b, q_t, q_g, v, v_b, v_t, v_h, log_decay, g_b, g_t, g_h, g_k, values, states, seen, skip, y,
    ROWS, PADDED, CHUNKS,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Read each chunk with its queries, all at once. Grid: (chunks * blocks of values, heads, batch)."""
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, tl.minimum(ROWS - chunk * L, L).to(tl.int32), PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    own = batch * HEADS + head
    q += batch * q_b + first * q_t + (head // (HEADS // GROUPS)) * q_g
    log_decay += batch * g_b + first * g_t + head * g_h
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    out = tl.zeros((L, BV), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        paces = start + tl.arange(0, BS if KEYED else 1)
        asked = ends[:, None] & (keys < KEY)[None, :]
        qt = tl.load(q + tokens[:, None] * q_t + keys[None, :], mask=asked, other=0.0).to(tl.float32)
        qt *= tl.exp2(
            _running(_decays_of_keys(log_decay, g_t, g_k, tokens, decays, paces, KEY), KEYED, False)
        )
        inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
        state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
        out = _dot(qt, state, out, SPLIT, PRECISION)
    row = own * PADDED + chunk * L
    shown = (columns < VALUE)[None, :] & (rows < L)[:, None]
    u = tl.load(values + (row + rows)[:, None] * VALUE + columns[None, :], mask=shown, other=0.0)
    u, spoilt = _marked(u)
    related = tl.load(seen + (row + rows)[:, None] * L + rows[None, :])
    out = _dot(related, u, out, SPLIT, PRECISION) + spoilt
    there = ends[:, None] & (columns < VALUE)[None, :]
    if HAS_SKIP:
        v += batch * v_b + first * v_t + head * v_h
        vt = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
        out += tl.load(skip + head).to(tl.float32) * vt.to(tl.float32)
    time = ROWS // 2 if PAIRS else ROWS
    at = ((batch * time + first + tokens[:, None]) * HEADS + head) * VALUE + columns[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def measure(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    a, a_b, a_t, a_h, values, states, fast, gained, sums, written, cross, added, both, erased,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, DELTA: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Bring what is written and what is stored together, all chunks at once.

    ``written``, ``cross`` and ``added`` are (batch, row, head): :math:`|U_t|^2`,
    :math:`\langle D_t, U_t \rangle` and the sum of the entries of :math:`U_t`; ``gained`` (batch, head, row,
    key) is what the write adds to the energy of each row of the state, and ``sums`` (batch, row, head) the
    sum of the value that is written. With PAIRS the second row of each leaves the first out of its
    ``cross``, and ``both`` (batch, row, head) is the product of the two writes. Under the delta rule
    ``erased`` (2, batch, row, head) is what :class:`statescope.kernels.interface.ScanOutput` calls so.
    With WHOLE it is for chunks that are not ``fast`` (:func:`relate`). Grid: (chunks * parts, heads, batch).
    """
    parts: tl.constexpr = L // PART
    chunk = (tl.program_id(0) // parts).to(tl.int64)
    begin = tl.program_id(0) % parts * PART
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if (tl.load(fast + (batch * HEADS + head) * CHUNKS + chunk) == 0) != WHOLE:
        return
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    own = begin + tl.arange(0, PART)
    tokens, decays, ends = _tokens(rows, tl.minimum(left, begin + PART), PAIRS)
    own_tokens, own_decays, own_ends = _tokens(own, left, PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + first * a_t + head * a_h
    log_decay += batch * g_b + first * g_t + head * g_h
    row = (batch * HEADS + head) * PADDED + chunk * L
    values += row * VALUE
    states += ((batch * HEADS + head) * CHUNKS + chunk) * (KEY * VALUE)
    gram = tl.zeros((PART, L), tl.float32)
    squares = tl.zeros((PART, 1), tl.float32)
    total = tl.zeros((PART, 1), tl.float32)
    removed = tl.zeros((PART, 1), tl.float32)
    beside = tl.zeros((PART, 1), tl.float32)
    if DELTA:
        v += batch * v_b + first * v_t + head * v_h
        weight = tl.full((PART,), 1.0, tl.float32)
        if HAS_SCALE:
            scale += batch * w_b + first * w_t + head * w_h
            weight = tl.load(scale + own_tokens * w_t, mask=own_ends, other=0.0).to(tl.float32)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        inside = (columns < VALUE)[None, :]
        at = rows[:, None] * VALUE + columns[None, :]
        earlier = tl.load(values + at, mask=inside & (rows < begin + PART)[:, None], other=0.0)
        at = own[:, None] * VALUE + columns[None, :]
        u = earlier
        if not WHOLE:
            u = tl.load(values + at, mask=inside & (own < L)[:, None], other=0.0)
        gram = _dot(u, tl.trans(earlier), gram, SPLIT, PRECISION)
        squares += _along(u * u)
        total += _along(u)
        if PAIRS:
            beside += _along(u * tl.load(values + at - VALUE, mask=inside & own_ends[:, None], other=0.0))
        if DELTA:
            there = own_ends[:, None] & inside
            vt = tl.load(v + own_tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
            vt = vt.to(tl.float32) * weight[:, None]
            if SPLIT:  # as it was multiplied, so that nothing is removed where nothing is there
                high, low = _halves(vt)
                vt = high.to(tl.float32) + low.to(tl.float32)
            removed += _along((u - vt) * (u - vt))
    apart = own[:, None] > rows[None, :]
    if PAIRS:
        apart = apart & ~(own_ends[:, None] & (own[:, None] == rows[None, :] + 1))
    gram = tl.where(apart, gram, 0.0)
    key_squares = tl.zeros((PART, 1), tl.float32)
    key_sums = tl.zeros((PART, 1), tl.float32)
    pair_products = tl.zeros((PART, 1), tl.float32)
    crossed = tl.zeros((PART, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        paces = start + tl.arange(0, BS if KEYED else 1)
        g = _finite(_decays_of_keys(log_decay, g_t, g_k, tokens, decays, paces, KEY))[0]
        kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
        early = _finite(kt)[0]
        stored = tl.zeros((PART, BS), tl.float32)
        for block in range(0, VALUE, BV):
            columns = block + tl.arange(0, BV)
            at = own[:, None] * VALUE + columns[None, :]
            u = tl.load(values + at, mask=(columns < VALUE)[None, :] & (own < L)[:, None], other=0.0)
            inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
            state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
            stored = _dot(u, tl.trans(state), stored, SPLIT, PRECISION)
        if WHOLE:
            local = _running(g, KEYED, False)
            stored = _dot(gram, early * _factor(-local), stored, SPLIT, PRECISION) * tl.exp2(local)
        else:
            early *= _early(g, rows, begin, KEYED)
            stored *= tl.exp2(tl.sum(tl.where((rows < begin)[:, None], g, 0.0), 0)[None, :])
            g = _finite(_decays_of_keys(log_decay, g_t, g_k, own_tokens, own_decays, paces, KEY))[0]
            kt = _written_keys(k, k_t, a, a_t, own_tokens, own_decays, own_ends, keys, KEY, PAIRS)
            local = _running(g, KEYED, False)
            far = _too_far(local)
            if far:
                early = tl.where((rows < begin)[:, None], early, 0.0)
            stored = _dot(gram, early, stored, SPLIT, PRECISION) * tl.exp2(local)
            if far:
                fine = _finite(kt)[0]
                for j in range(PART):
                    weights = _along(tl.where((rows == begin + j)[None, :], gram, 0.0))
                    past = tl.exp2(tl.minimum(local - _of_row(local, j)[None, :], 0.0))
                    past = tl.where((own > begin + j)[:, None], past, 0.0)
                    stored += weights * past * _of_row(fine, j)[None, :]
        stored *= kt
        crossed += _along(stored)
        key_squares += _along(kt * kt)
        key_sums += _along(kt)
        energy = 2 * stored + kt * kt * squares
        if PAIRS:
            own_pair = own_ends[:, None] & (keys < KEY)[None, :]
            pair = tl.load(a + own_tokens[:, None] * a_t + keys[None, :], mask=own_pair, other=0.0)
            pair = kt * pair.to(tl.float32)
            pair_products += _along(pair)
            energy += 2 * pair * beside
        at = (row + own)[:, None] * KEY + keys[None, :]
        tl.store(gained + at, energy, mask=(keys < KEY)[None, :] & (own < L)[:, None])
    here = (own < left)[:, None]
    at = (batch * ROWS + chunk * L + own)[:, None] * HEADS + head
    whole = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    tl.store(sums + at, total, mask=here)
    tl.store(written + at, key_squares * squares, mask=here)
    tl.store(cross + at, crossed, mask=here)
    tl.store(added + at, key_sums * total, mask=here)
    if PAIRS:
        tl.store(both + at, beside * pair_products, mask=here)
    if DELTA:
        rate = tl.load(a + own * a_t, mask=own < left, other=0.0).to(tl.float32)[:, None]
        tl.store(erased + at, tl.sqrt(key_squares * removed), mask=here)
        tl.store(erased + whole + at, -rate * key_squares, mask=here)


@triton.jit(do_not_specialize=SIZES)
def tally(
    k, k_b, k_t, k_g, log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h,
    energy, gained, sums, decayed, total, pace,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Follow energy and sum of every row of the state through each chunk, row of the text by row.

    ``decayed`` and ``total`` (batch, row, head) are what the whole state has of both once it has decayed,
    before the write; ``pace`` is the mean log decay. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, BK)
    own = batch * HEADS + head
    first = chunk * (L // 2) if PAIRS else chunk * L
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + first * a_t + head * a_h
    log_decay += batch * g_b + first * g_t + head * g_h
    gained += (own * PADDED + chunk * L) * KEY
    at = (batch * ROWS + chunk * L) * HEADS + head
    energy += (own * CHUNKS + chunk) * (BLOCKS * KEY)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * CHUNKS * (BLOCKS * KEY)
    squares = tl.zeros((BK,), tl.float32)
    entries = tl.zeros((BK,), tl.float32)
    for block in range(BLOCKS):
        squares += tl.load(energy + block * KEY + keys, mask=keys < KEY, other=0.0)
        entries += tl.load(energy + plane + block * KEY + keys, mask=keys < KEY, other=0.0)
    for row in range(tl.minimum(ROWS - chunk * L, L).to(tl.int32)):
        token = row // 2 if PAIRS else row
        decays = row % 2 == 0 if PAIRS else row >= 0
        inside = (keys < KEY) & decays
        g = tl.load(log_decay + token * g_t + keys * g_k, mask=inside, other=0.0).to(tl.float32)
        tl.store(pace + at + row * HEADS, tl.sum(g) / KEY)
        fall = tl.exp2(_bounded(g))
        squares *= fall * fall
        entries *= fall
        tl.store(decayed + at + row * HEADS, tl.sum(squares))
        tl.store(total + at + row * HEADS, tl.sum(entries))
        squares += tl.load(gained + row * KEY + keys, mask=keys < KEY, other=0.0)
        if PAIRS:
            kt = tl.load(k + token * k_t + keys, mask=(keys < KEY) & (row % 2 == 1), other=0.0).to(tl.float32)
            kt += tl.load(a + token * a_t + keys, mask=inside, other=0.0).to(tl.float32)
        else:
            kt = tl.load(k + token * k_t + keys, mask=keys < KEY, other=0.0).to(tl.float32)
        entries += kt * tl.load(sums + at + row * HEADS)
