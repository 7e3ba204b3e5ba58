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

PART = tl.constexpr(16)
"""Rows that one product with factors about their middle relates; the fewest that a matrix unit takes."""

RANGE = tl.constexpr(80.0)
"""Most that the keys of a part may forget for that, base 2: its factors stay between 2^-40 and 2^40."""


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
def _middles(at, run, L: tl.constexpr, BK: tl.constexpr):
    """Of every part, between what its rows remember first and last; and the widest range of any."""
    parts: tl.constexpr = L // PART
    top = tl.max(tl.reshape(at, (parts, PART, BK)), 1)
    bottom = tl.min(tl.reshape(run, (parts, PART, BK)), 1)
    return (top + bottom) * 0.5, tl.max(top - bottom)


@triton.jit
def _of_row(x, row, L: tl.constexpr):
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, L) == row)[:, None], x, 0.0), 0)


@triton.jit
def _related(
    x, at, k, run,
    L: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r"""What rows read of one another, :math:`\sum_k e^{at_t - run_j} x_t k_j`; right where :math:`j \le t`.

    Part by part, by factors about its middle; one by one where a part forgets more than their range.
    """
    parts: tl.constexpr = L // PART
    rows = tl.arange(0, L)
    middles, widest = _middles(at, run, L, BK)
    found = tl.zeros((L, L), tl.float32)
    if widest <= RANGE:
        for part in range(parts):
            middle = _of_row(middles, part, parts)[None, :]
            late = tl.where((rows // PART == part)[:, None], x * tl.exp2(at - middle), 0.0)
            early = k * tl.exp2(tl.minimum(middle - run, RANGE))
            if EXACT:
                found = _exact(late, tl.trans(early), found, HALF, PRECISION)
            else:
                found = _dot(late, tl.trans(early), found, HALF, PRECISION)
    else:
        for j in range(L):
            past = tl.exp2(tl.minimum(at - _of_row(run, j, L)[None, :], 0.0)) * _of_row(k, j, L)[None, :]
            found = tl.where((rows == j)[None, :], tl.sum(x * past, 1)[:, None], found)
    return found


@triton.jit
def _gathered(
    weights, k, run,
    L: tl.constexpr, BK: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r"""Sum over earlier rows of weight times decayed key, :math:`\sum_j e^{run_t - run_j} w_{tj} k_j`."""
    parts: tl.constexpr = L // PART
    rows = tl.arange(0, L)
    middles, widest = _middles(run, run, L, BK)
    found = tl.zeros((L, BK), tl.float32)
    if widest <= RANGE:
        late = tl.zeros((L, BK), tl.float32)
        for part in range(parts):
            middle = _of_row(middles, part, parts)[None, :]
            mine = (rows // PART == part)[:, None]
            early = k * tl.exp2(tl.minimum(middle - run, RANGE))
            late = tl.where(mine, tl.exp2(run - middle), late)
            found = _dot(tl.where(mine, weights, 0.0), early, found, BF16, PRECISION)
        found *= late
    else:
        for j in range(L):
            weight = tl.sum(tl.where((rows == j)[None, :], weights, 0.0), 1)
            past = tl.exp2(tl.minimum(run - _of_row(run, j, L)[None, :], 0.0)) * _of_row(k, j, L)[None, :]
            found += tl.where((rows > j)[:, None], weight[:, None] * past, 0.0)
    return found


@triton.jit
def _inverse(system, L: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    r"""Invert :math:`I - M` for a strictly lower :math:`M`.

    Diagonal blocks of 16 row by row, all at once; then blocks two by two, :math:`D + D M_{10} D`.
    """
    rows = tl.arange(0, L)
    down, across = rows[:, None], rows[None, :]
    own = tl.where(down // 16 == across // 16, system, 0.0)
    found = tl.where(down == across, 1.0, 0.0)
    for row in range(1, 16):
        chosen = down % 16 == row
        weights = tl.sum(tl.where(chosen, own, 0.0), 0)  # of the rows above, in every block
        solved = tl.sum(weights[:, None] * found, 0)
        found += tl.where(chosen & (down // 16 == across // 16), solved[None, :], 0.0)
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
def solve(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h,
    remaining, kept, through, values,
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
    Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, tl.minimum(ROWS - chunk * L, L).to(tl.int32), PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + first * a_t + head * a_h
    b += batch * b_b + first * b_t + head * b_h
    log_decay += batch * g_b + first * g_t + head * g_h
    row = (batch * HEADS + head) * PADDED + chunk * L
    of_rows = (row + rows)[:, None] * KEY
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    kept += ((batch * HEADS + head) * CHUNKS + chunk) * KEY
    good = tl.full((L,), 1, tl.int32)
    if not KEYED:
        g = _bounded(tl.load(log_decay + tokens * g_t, mask=decays, other=0.0))[:, None]
        spoilt = tl.sum(g * 0.0, 0)[None, :]  # NaN, or 0: of what leaves the chunk
        g, fine = _finite(g)
        good = tl.minimum(good, fine)
        run = tl.cumsum(tl.sum(g, 1), 0)[:, None]
        before = run - g if PAIRS else run
    system = tl.zeros((L, L), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
        if KEYED:
            g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
            spoilt = tl.sum(g * 0.0, 0)[None, :]
            g, fine = _finite(g)
            good = tl.minimum(good, fine)
            run = tl.cumsum(g, 0)
            before = run - g if PAIRS else run
        last = _of_row(run, L - 1, L)[None, :]
        inside = (keys < KEY)[None, :] & (rows < L)[:, None]
        _put(kt * tl.exp2(last - run) + spoilt, remaining + of_rows + keys[None, :], plane, inside, SPLIT)
        tl.store(
            kept + keys, tl.sum(tl.exp2(last) + spoilt + tl.zeros((1, BS), tl.float32), 0), mask=keys < KEY
        )
        if ERASES:
            kt, fine = _finite(kt)
            good = tl.minimum(good, fine)
            xt = kt
            if PAIRS:
                asked = decays[:, None] & (keys < KEY)[None, :]
                xt = tl.load(b + tokens[:, None] * b_t + keys[None, :], mask=asked, other=0.0).to(tl.float32)
                xt, fine = _finite(xt)
                good = tl.minimum(good, fine)
            if KEYED:
                system += _related(xt, before, kt, run, L, BS, True, SPLIT, PRECISION)
            else:
                system = _exact(xt, tl.trans(kt), system, SPLIT, PRECISION)
    if ERASES:
        rate = tl.full((L,), 1.0, tl.float32)
        if not PAIRS:
            rate = tl.load(a + rows * a_t, mask=decays, other=0.0).to(tl.float32)
        if not KEYED:
            system *= tl.exp2(tl.minimum(before - tl.trans(run), 0.0))
        system = tl.where(rows[:, None] > rows[None, :], system * rate[:, None], 0.0)
        system, fine = _finite(system)
        mark = _since_bad((tl.minimum(good, fine) == 0) | ~(tl.abs(rate) < float("inf")))
        system = tl.where((mark != mark)[:, None], 0.0, system)
        rate = tl.where(mark != mark, 0.0, rate)
        inverse = _inverse(system, L, SPLIT, PRECISION)
        for start in range(0, KEY, BS):
            keys = start + tl.arange(0, BS)
            if PAIRS:
                asked = decays[:, None] & (keys < KEY)[None, :]
                xt = tl.load(b + tokens[:, None] * b_t + keys[None, :], mask=asked, other=0.0).to(tl.float32)
            else:
                xt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
            xt = _finite(xt)[0]
            if KEYED:
                g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
                g = _finite(g)[0]
                before = tl.cumsum(g, 0) - g if PAIRS else tl.cumsum(g, 0)
            xt *= tl.exp2(before) * rate[:, None]
            found = _exact(inverse, xt, tl.zeros((L, BS), tl.float32), SPLIT, PRECISION)
            inside = (keys < KEY)[None, :] & (rows < L)[:, None]
            _put(found, through + of_rows + keys[None, :], plane, inside, SPLIT)
    v += batch * v_b + first * v_t + head * v_h
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + first * w_t + head * w_h
        weight = tl.load(scale + tokens * w_t, mask=ends, other=0.0).to(tl.float32)
    for block in range((VALUE + BV - 1) // BV):
        columns = block * BV + tl.arange(0, BV)
        shown = ends[:, None] & (columns < VALUE)[None, :]
        u = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
        u *= weight[:, None]
        if ERASES:
            u, bad_from = _marked(u)
            u = _exact(inverse, u, tl.zeros((L, BV), tl.float32), SPLIT, PRECISION)
            u += bad_from + mark[:, None]
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
    enters each, and ``energy`` (batch, head, chunk, block, key) the energy of each of its rows in these
    columns. With KEEP ``entered`` (kept, batch, head, key, value) is the state that enters each chunk whose
    entry of ``slots`` is not -1. Grid: (head * blocks of columns, batch).
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


@triton.jit
def _compose(decay, energy, entries, later_decay, later_energy, later_entries):
    """Two stretches of a linear recurrence as one: energies decay twice over."""
    return (
        decay * later_decay,
        energy * later_decay * later_decay + later_energy,
        entries * later_decay + later_entries,
    )


@triton.jit(do_not_specialize=SIZES)
def read(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h,
    values, states, energy, skip, y, decayed, written, cross, total, both, erased,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    BF16: tl.constexpr, PRECISION: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, DELTA: tl.constexpr,
    OUTPUTS: tl.constexpr, MEASURE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    r"""Read each chunk with its queries, and measure it, all chunks at once.

    ``decayed``, ``written`` and ``cross`` are (batch, row, head), :math:`|D_t|^2`, :math:`|U_t|^2` and
    :math:`\langle D_t, U_t \rangle`; ``total`` (2, batch, row, head) adds up to the sum of the entries of
    :math:`S_t`. With PAIRS the second row of each leaves the first out of its ``cross``, and ``both`` (batch,
    row, head) is the product of the two writes. Under the delta rule ``erased`` (2, batch, row, head) is what
    :class:`statescope.kernels.interface.ScanOutput` calls so. Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, left, PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    time = ROWS // 2 if PAIRS else ROWS
    own = batch * HEADS + head
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    q += batch * q_b + first * q_t + (head // (HEADS // GROUPS)) * q_g
    a += batch * a_b + first * a_t + head * a_h
    log_decay += batch * g_b + first * g_t + head * g_h
    earlier = rows[:, None] > rows[None, :]
    apart = earlier
    if PAIRS:
        apart = earlier & ~(ends[:, None] & (rows[:, None] == rows[None, :] + 1))
    good = tl.full((L,), 1, tl.int32)
    if not KEYED:
        g, good = _finite(_bounded(tl.load(log_decay + tokens * g_t, mask=decays, other=0.0))[:, None])
        run = tl.cumsum(tl.sum(g, 1), 0)
        since = tl.exp2(run)
        past = tl.exp2(tl.minimum(run[:, None] - run[None, :], 0.0))
        gram = tl.zeros((L, L), tl.float32)
    seen = tl.zeros((L, L), tl.float32)
    key_squares = tl.zeros((L, 1), tl.float32)
    key_sums = tl.zeros((L, 1), tl.float32)
    pair_products = tl.zeros((L, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
        kt, fine = _finite(kt)
        good = tl.minimum(good, fine)
        key_squares += _along(kt * kt)
        key_sums += _along(kt)
        own_query = ends[:, None] & (keys < KEY)[None, :]
        if MEASURE and PAIRS:
            pair = tl.load(a + tokens[:, None] * a_t + keys[None, :], mask=own_query, other=0.0)
            pair_products += _along(kt * pair.to(tl.float32))
        if KEYED:
            g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
            g, fine = _finite(g)
            good = tl.minimum(good, fine)
        if OUTPUTS:
            qt = tl.load(q + tokens[:, None] * q_t + keys[None, :], mask=own_query, other=0.0)
            qt = qt.to(tl.float32)
            if KEYED:
                run = tl.cumsum(g, 0)
                seen += _related(qt, run, kt, run, L, BS, False, BF16, PRECISION)
            else:
                seen = _dot(qt, tl.trans(kt), seen, BF16, PRECISION)
        if MEASURE and not KEYED:
            gram = _dot(kt, tl.trans(kt), gram, BF16, PRECISION)
    mark = _since_bad(good == 0)[:, None]
    if not KEYED:
        seen *= past
        gram = tl.where(apart, gram * past, 0.0)
    seen = tl.where(rows[:, None] >= rows[None, :], seen, 0.0)
    squares = tl.zeros((L, 1), tl.float32)
    sums = tl.zeros((L, 1), tl.float32)
    removed = tl.zeros((L, 1), tl.float32)
    beside = tl.zeros((L, 1), tl.float32)
    crossed = tl.zeros((L, 1), tl.float32)
    entries = tl.zeros((BS, 1), tl.float32)
    if KEYED:
        gram = tl.zeros((L, L), tl.float32)
    if DELTA and KEYED and HAS_SCALE:
        scale += batch * w_b + first * w_t + head * w_h
        weight = tl.load(scale + tokens * w_t, mask=ends, other=0.0).to(tl.float32)
    v += batch * v_b + first * v_t + head * v_h
    y += ((batch * time + first) * HEADS + head) * VALUE
    values += (own * PADDED + chunk * L) * VALUE
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    for block in range((VALUE + BV - 1) // BV):
        columns = block * BV + tl.arange(0, BV)
        shown = (columns < VALUE)[None, :] & (rows < L)[:, None]
        there = (columns < VALUE)[None, :] & ends[:, None]
        written_here = tl.load(values + rows[:, None] * VALUE + columns[None, :], mask=shown, other=0.0)
        u, spoilt = _marked(written_here)
        if OUTPUTS:
            out = tl.zeros((L, BV), tl.float32)
        if MEASURE and not KEYED:
            found = tl.zeros((L, BV), tl.float32)
        if OUTPUTS or not KEYED:
            for start in range(0, KEY, BS):
                keys = start + tl.arange(0, BS)
                inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
                state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
                if not BF16:
                    state = state.to(tl.float32)
                if OUTPUTS:
                    own_query = ends[:, None] & (keys < KEY)[None, :]
                    qt = tl.load(q + tokens[:, None] * q_t + keys[None, :], mask=own_query, other=0.0)
                    qt = qt.to(tl.float32)
                    if KEYED:
                        g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
                        qt *= tl.exp2(tl.cumsum(_finite(g)[0], 0))
                    out = _dot(qt, state, out, BF16, PRECISION)
                if MEASURE and not KEYED:
                    kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
                    found = _dot(_finite(kt)[0], state, found, BF16, PRECISION)
                    entries += _along(state.to(tl.float32))
        if OUTPUTS:
            if not KEYED:
                out *= since[:, None]
            out = _dot(seen, u, out, BF16, PRECISION) + (spoilt + mark)
            if HAS_SKIP:
                vt = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
                out += tl.load(skip + head).to(tl.float32) * vt.to(tl.float32)
            at = y + tokens[:, None] * (HEADS * VALUE) + columns[None, :]
            tl.store(at, out.to(y.dtype.element_ty), mask=there)
        if MEASURE:
            mark += _along(spoilt)
            squares += _along(u * u)
            sums += _along(u)
            if KEYED:
                gram = _dot(u, tl.trans(u), gram, BF16, PRECISION)
            else:
                found = _dot(gram, u, found * since[:, None], BF16, PRECISION)
                crossed += _along(u * found)
            if DELTA and KEYED:
                vt = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
                vt = vt.to(tl.float32)
                if HAS_SCALE:
                    vt *= weight[:, None]
                removed += _along((written_here - vt) * (written_here - vt))
            if DELTA and not KEYED:
                removed += _along(found * found)  # exactly nothing where there is nothing to erase
            if PAIRS:
                before = values + (rows[:, None] - 1) * VALUE + columns[None, :]
                beside += _along(u * tl.load(before, mask=there, other=0.0))
    if MEASURE:
        at = (batch * ROWS + chunk * L) * HEADS + head
        whole = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
        of_rows = rows * HEADS
        here = rows < left
        twice = beside * pair_products
        energy += (own * CHUNKS + chunk) * (BLOCKS * KEY)
        if KEYED:
            gram = tl.where(apart, gram, 0.0)
            # Shifted by one row, so that what a row finds is summed without what it adds.
            later, falls, _asked = _tokens(rows + 1, left, PAIRS)
            next_here = (rows + 1 < left) & (rows + 1 < L)
            falls = falls & next_here
            found = tl.zeros((L, 1), tl.float32)
            entering = tl.zeros((L, 1), tl.float32)
            first_energy = tl.zeros((BS,), tl.float32)
            first_entries = tl.zeros((BS,), tl.float32)
            for start in range(0, KEY, BS):
                keys = start + tl.arange(0, BS)
                own_energy = tl.zeros((BS,), tl.float32)
                for block in range(BLOCKS):
                    own_energy += tl.load(energy + block * KEY + keys, mask=keys < KEY, other=0.0)
                own_entries = tl.zeros((BS, 1), tl.float32)
                stored = tl.zeros((L, BS), tl.float32)
                for block in range((VALUE + BV - 1) // BV):
                    columns = block * BV + tl.arange(0, BV)
                    shown = (columns < VALUE)[None, :] & (rows < L)[:, None]
                    u = tl.load(values + rows[:, None] * VALUE + columns[None, :], mask=shown, other=0.0)
                    inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
                    state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
                    if not BF16:
                        state = state.to(tl.float32)
                    stored = _dot(_finite(u)[0], tl.trans(state), stored, BF16, PRECISION)
                    own_entries += _along(state.to(tl.float32))
                kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
                kt = _finite(kt)[0]
                g = _finite(_decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY))[0]
                run = tl.cumsum(g, 0)
                since = tl.exp2(run)
                stored = stored * since + _gathered(gram, kt, run, L, BS, BF16, PRECISION)
                stored *= kt
                crossed += _along(stored)
                gained = 2 * stored + kt * kt * squares
                if PAIRS:
                    own_pair = ends[:, None] & (keys < KEY)[None, :]
                    pair = tl.load(a + tokens[:, None] * a_t + keys[None, :], mask=own_pair, other=0.0)
                    gained += 2 * kt * pair.to(tl.float32) * beside
                fall = tl.exp2(_decays_of_keys(log_decay, g_t, g_k, later, falls, keys, KEY))
                fall = tl.where(next_here[:, None], fall, 0.0)
                _fallen, decayed_there, added = tl.associative_scan(
                    (fall, fall * fall * gained, fall * kt * sums), 0, _compose
                )
                since *= fall
                found += _along(decayed_there + since * since * own_energy[None, :])
                own_entries = tl.sum(own_entries, 1)
                entering += _along(added + since * own_entries[None, :])
                begin = tl.load(log_decay + keys * g_k, mask=keys < KEY, other=0.0)
                begin = tl.exp2(_bounded(begin))
                first_energy += begin * begin * own_energy
                first_entries += begin * own_entries
            tl.store(decayed + at + HEADS + of_rows, tl.sum(found + mark, 1), mask=next_here)
            tl.store(decayed + at, tl.sum(first_energy))
            tl.store(total + at + HEADS + of_rows, tl.sum(entering, 1), mask=next_here)
            tl.store(total + at, tl.sum(first_entries))
        else:
            own_energy = tl.zeros((BS,), tl.float32)
            for start in range(0, BLOCKS * KEY, BS):
                keys = start + tl.arange(0, BS)
                own_energy += tl.load(energy + keys, mask=keys < BLOCKS * KEY, other=0.0)
            gained = 2 * crossed + key_squares * squares + 2 * twice
            found = since * since * tl.sum(own_energy)
            found += tl.sum(tl.where(earlier, past * past * tl.trans(gained), 0.0), 1) + tl.sum(mark, 1)
            entering = since * tl.sum(entries)
            entering += tl.sum(tl.where(earlier, past * tl.trans(key_sums * sums), 0.0), 1)
            tl.store(decayed + at + of_rows, found, mask=here)
            tl.store(total + at + of_rows, entering, mask=here)
        tl.store(total + whole + at + of_rows, tl.sum(key_sums * sums + mark, 1), mask=here)
        tl.store(written + at + of_rows, tl.sum(key_squares * squares + mark, 1), mask=here)
        tl.store(cross + at + of_rows, tl.sum(crossed + mark, 1), mask=here)
        if PAIRS:
            tl.store(both + at + of_rows, tl.sum(twice, 1), mask=here)
        if DELTA:
            rate = tl.load(a + rows * a_t, mask=here, other=0.0).to(tl.float32)
            norm = tl.sum(tl.sqrt(key_squares * removed) + mark, 1)
            if not KEYED:
                norm *= tl.abs(rate)
            tl.store(erased + at + of_rows, norm, mask=here)
            tl.store(erased + whole + at + of_rows, -rate * tl.sum(key_squares, 1), mask=here)
