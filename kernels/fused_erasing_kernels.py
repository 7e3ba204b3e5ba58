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
    """A float32 as two bfloat16, the first cut off after its bits."""
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
def _put(x, x_low, at, plane, mask, SPLIT: tl.constexpr):
    """Store a tile of :func:`_split`, with SPLIT its two halves in planes one after the other."""
    tl.store(at, x, mask=mask)
    if SPLIT:
        tl.store(at + plane, x_low, mask=mask)


@triton.jit
def _take(at, plane, mask, SPLIT: tl.constexpr):
    """Load what :func:`_put` stored."""
    x = tl.load(at, mask=mask, other=0.0)
    x_low = x
    if SPLIT:
        x_low = tl.load(at + plane, mask=mask, other=0.0)
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
def _halfway(g, L: tl.constexpr):
    """What each key forgets in the first half of the rows, and in all."""
    first = tl.where((tl.arange(0, L) < L // 2)[:, None], g, 0.0)
    return tl.sum(first, 0)[None, :], tl.sum(g, 0)[None, :]


@triton.jit
def _too_far(halfway, total):
    """Whether some key forgets more than :data:`RANGE` in either half, or what is no number.

    The factors of rows are counted from half of all that is forgotten, as far from 1 either way.
    """
    near = (halfway >= -RANGE) & (total - halfway >= -RANGE) & (total < float("inf"))
    return tl.min(near.to(tl.int32)) == 0


@triton.jit
def _inverse(system, down, across, L: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    r"""Invert :math:`I - M` for a strictly lower :math:`M`, rows ``down`` and ``across`` (:func:`_unknown`).

    Of diagonal blocks of two the inverse is :math:`I + M`; then blocks two by two, :math:`D + D M_{10} D`.
    """
    found = tl.where(down // 2 == across // 2, system, 0.0) + tl.where(down == across, 1.0, 0.0)
    found = _joined(found, system, down, across, 2, SPLIT, PRECISION)
    found = _joined(found, system, down, across, 4, SPLIT, PRECISION)
    found = _joined(found, system, down, across, 8, SPLIT, PRECISION)
    if L > 16:
        found = _joined(found, system, down, across, 16, SPLIT, PRECISION)
    if L > 32:
        found = _joined(found, system, down, across, 32, SPLIT, PRECISION)
    return found


@triton.jit
def _joined(found, system, down, across, SIZE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Join inverses of diagonal blocks of a size two by two."""
    pairs = (down // (2 * SIZE) == across // (2 * SIZE)) & (down // SIZE > across // SIZE)
    below = tl.where(pairs, system, 0.0)
    below = _exact(below, found, tl.zeros_like(found), SPLIT, PRECISION)
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
def _keys(k, k_t, tokens, asked, keys, KEY: tl.constexpr):
    """Keys, or queries, as they are given."""
    inside = asked[:, None] & (keys < KEY)[None, :]
    return tl.load(k + tokens[:, None] * k_t + keys[None, :], mask=inside, other=0.0)


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
    return tl.where(good, x, 0.0).to(x.dtype), tl.min(good.to(tl.int32), 1)


@triton.jit
def _halves_of_input(a, a_low, b, c, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of a tile of :func:`_split` with an input, which in bfloat16 is its own first half."""
    if SPLIT and b.dtype == tl.bfloat16:
        found = tl.dot(a, b, tl.dot(a_low, b, c))
    else:
        b, b_low = _split(b.to(tl.float32), SPLIT)
        found = _by_halves(a, a_low, b, b_low, c, SPLIT, PRECISION)
    return found


@triton.jit
def _of_inputs(a, b, c, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a product of two inputs that feeds back."""
    if SPLIT and a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        found = tl.dot(a, b, c)
    else:
        found = _exact(a.to(tl.float32), b.to(tl.float32), c, SPLIT, PRECISION)
    return found


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
def _inverted(system, rate, down, across, L: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Invert I - M, M being ``system`` times ``rate``: NaN from the first row on that is not finite."""
    found, fine = _finite(system)
    found *= rate[:, None]
    fine = tl.where(tl.abs(rate) < float("inf"), fine, 0)
    mark = _since_bad(fine == 0)[:, None]
    found = tl.where((down > across) & (mark == mark), found, 0.0)
    return _inverse(found, down, across, L, SPLIT, PRECISION) + mark


@triton.jit(do_not_specialize=SIZES)
def prepare(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h, log_decay, g_b, g_t, g_h, g_k,
    b, b_b, b_t, b_h, a, a_b, a_t, a_h,
    remaining, kept, through, values, hard,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Find what each chunk does to whatever state enters it, all chunks at once.

    With :math:`T = (I - M)^{-1}`, where :math:`M_{tj}` is what row ``t`` erases of the write of row ``j``,

    .. math:: U = T W V + T X S_{in}, \qquad S_{out} = \operatorname{diag}(e^{G_L}) S_{in} + K_{rem}^\top U .

    ``values`` is :math:`T W V`, ``through`` :math:`T X`, ``remaining`` :math:`K_{rem}`, the keys decayed to
    the chunk's end, and ``kept`` :math:`G_L`, base 2. Under the delta rule :math:`X` is the key, decayed up
    to the row's own token, times ``a``; otherwise ``b``, decayed up to the token before. Where nothing is
    erased, U is W V: W is taken into ``remaining``. Without KEYED ``remaining`` is what survives of each row,
    one number (batch, head, row), and ``kept`` is of all keys.

    With KEYED, ``hard`` (batch, head, chunk) is 1 where a key forgets too much to relate all rows of a chunk
    at once, or a key or rate is not finite: such a chunk is left to launches of its own
    (:mod:`statescope.kernels.fused_hard_kernels`). Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    of_chunk = (batch * HEADS + head) * CHUNKS + chunk
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, tl.minimum(ROWS - chunk * L, L).to(tl.int32), PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    row = (batch * HEADS + head) * PADDED + chunk * L
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    v += batch * v_b + first * v_t + head * v_h
    a += batch * a_b + first * a_t + head * a_h
    b += batch * b_b + first * b_t + head * b_h
    log_decay += batch * g_b + first * g_t + head * g_h
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    down, across = _unknown(L, ROWS, PADDED)
    past = down >= across
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + first * w_t + head * w_h
        weight = tl.load(scale + tokens * w_t, mask=ends, other=0.0).to(tl.float32)
    rate = tl.full((L,), 1.0, tl.float32)
    if ERASES and not PAIRS:
        rate = tl.load(a + rows * a_t, mask=decays, other=0.0).to(tl.float32)
    erased = tl.zeros((L, L), tl.float32)
    if KEYED:
        far = 0
        for start in range(0, KEY, BS):
            keys = start + tl.arange(0, BS)
            kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
            g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
            local = tl.cumsum(g, 0)
            halfway, total = _halfway(g, L)
            far = tl.maximum(far, _too_far(halfway, total).to(tl.int32))
            inside = (keys < KEY)[None, :] & (rows < L)[:, None]
            of_rows = (row + rows)[:, None] * KEY + keys[None, :]
            tl.store(kept + of_chunk * KEY + keys, tl.sum(total, 0), mask=keys < KEY)
            if ERASES:
                middle = 0.5 * total
                early = kt * tl.exp2(middle - local)
                left = early * tl.exp2(middle)
                xt, at = kt, local
                if PAIRS:
                    asked = decays[:, None] & (keys < KEY)[None, :]
                    xt = tl.load(b + tokens[:, None] * b_t + keys[None, :], mask=asked, other=0.0)
                    xt, at = xt.to(tl.float32), local - g
                xt, xt_low = _split(xt * tl.exp2(at - middle), SPLIT)
                _put(xt, xt_low, through + of_rows, plane, inside, SPLIT)
                early, early_low = _split(early, SPLIT)
                early, early_low = tl.trans(early), tl.trans(early_low)
                erased = _by_halves(xt, xt_low, early, early_low, erased, SPLIT, PRECISION)
            else:
                left = kt * tl.exp2(total - local) * weight[:, None]
                spoilt = ~(tl.abs(tl.sum(left, 0)) < float("inf"))
                far = tl.maximum(far, tl.max(spoilt.to(tl.int32)))
            left, left_low = _split(left, SPLIT)
            _put(left, left_low, remaining + of_rows, plane, inside, SPLIT)
        if ERASES:
            erased = tl.where(past, erased, 0.0)
            fine = (tl.abs(erased) < float("inf")) & (tl.abs(rate * weight) < float("inf"))[:, None]
            far = tl.maximum(far, 1 - tl.min(fine.to(tl.int32)))
        tl.store(hard + of_chunk, far)
        if far > 0:
            return
    else:
        pace, run = _decay_of_rows(log_decay, g_t, tokens, decays)
        survives = tl.exp2(tl.cumsum(pace, 0, reverse=True) - pace)
        if not ERASES:
            survives *= weight
        tl.store(remaining + row + rows, survives)
        tl.store(kept + of_chunk, tl.sum(pace, 0))
    if ERASES:
        if KEYED:
            system = tl.where(down > across, erased * rate[:, None], 0.0)
            inverse = _inverse(system, down, across, L, SPLIT, PRECISION)
            mark = tl.zeros((L, 1), tl.float32)
        else:
            for start in range(0, KEY, BS):
                kt = _keys(k, k_t, tokens, ends, start + tl.arange(0, BS), KEY)
                erased = _of_inputs(kt, tl.trans(kt), erased, SPLIT, PRECISION)
            erased = tl.where(past, erased * _between(run, rows), 0.0)
            inverse = _inverted(erased, rate, down, across, L, SPLIT, PRECISION)
            rate *= tl.exp2(run)
            rate = tl.where(tl.abs(rate) < float("inf"), rate, 0.0)
            usable = tl.abs(weight) < float("inf")
            mark = _since_bad(~usable)[:, None]
            weight = tl.where(usable, weight, 0.0)
        to_keys, to_keys_low = _split(inverse * rate[None, :], SPLIT)
        tl.debug_barrier()
        for start in range(0, KEY, BS):
            keys = start + tl.arange(0, BS)
            inside = (keys < KEY)[None, :] & (rows < L)[:, None]
            at = through + (row + rows)[:, None] * KEY + keys[None, :]
            found = tl.zeros((L, BS), tl.float32)
            if KEYED:
                xt, xt_low = _take(at, plane, inside, SPLIT)
                found = _by_halves(to_keys, to_keys_low, xt, xt_low, found, SPLIT, PRECISION)
                total = tl.load(kept + of_chunk * KEY + keys, mask=keys < KEY, other=0.0)
                found *= tl.exp2(0.5 * total)[None, :]
            else:
                kt = _finite(_keys(k, k_t, tokens, ends, keys, KEY))[0]
                found = _halves_of_input(to_keys, to_keys_low, kt, found, SPLIT, PRECISION)
            found, found_low = _split(found, SPLIT)
            _put(found, found_low, at, plane, inside, SPLIT)
        to_values, to_values_low = _split(inverse * weight[None, :], SPLIT)
        for start in range(0, VALUE, BV):
            columns = start + tl.arange(0, BV)
            shown = ends[:, None] & (columns < VALUE)[None, :]
            u = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=shown, other=0.0)
            u, bad_from = _marked(u)
            u = _halves_of_input(to_values, to_values_low, u, bad_from + mark, SPLIT, PRECISION)
            own_values = (columns < VALUE)[None, :] & (rows < L)[:, None]
            tl.store(values + (row + rows[:, None]) * VALUE + columns[None, :], u, mask=own_values)


@triton.jit(do_not_specialize=SIZES)
def walk(
    k, k_b, k_t, k_g, remaining, kept, through, u, u_b, u_t, u_h, values, initial, final, states, energy,
    entered, slots,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, KEYED: tl.constexpr,
    ERASES: tl.constexpr, HAS_INITIAL: tl.constexpr, STORE: tl.constexpr, MEASURE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Walk all chunks with a block of the state in registers: some columns, and some keys if none erases.

    ``values`` is given what each chunk writes, where ``u`` is not that already. ``states`` (batch, head,
    chunk, key, value) is the state that enters each, and ``energy`` (2, batch, head, chunk, block, key) the
    energy of each of its rows in these columns, and the sum of its entries; without KEYED of all of the
    block's rows, (2, batch, head, chunk, block). With KEEP ``entered`` (kept, batch, head, key, value) is
    the state that enters each chunk whose entry of ``slots`` is not -1.
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
    own_keys = (keys < KEY)[None, :] & (rows < L)[:, None]
    shown = (columns < VALUE)[None, :] & (rows < L)[:, None]
    if HAS_INITIAL:
        state = tl.load(initial + own * (KEY * VALUE) + of_state, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    plane = (tl.zeros((), tl.int64) + BATCH) * HEADS * PADDED * KEY
    through += own * PADDED * KEY
    values += own * PADDED * VALUE
    u += batch * u_b + head * u_h
    states += own * CHUNKS * (KEY * VALUE)
    entries = (tl.zeros((), tl.int64) + BATCH) * HEADS * CHUNKS * (BLOCKS * (KEY if KEYED else across))
    if KEYED:
        remaining += own * PADDED * KEY
        kept += own * CHUNKS * KEY
        energy += (own * CHUNKS * BLOCKS + block) * KEY
    else:
        remaining += own * PADDED
        kept += own * CHUNKS
        energy += own * CHUNKS * (BLOCKS * across) + block * across + part
        k += batch * k_b + (head // (HEADS // GROUPS)) * k_g
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        if KEEP:
            slot = tl.load(slots + chunk)
            if slot >= 0:
                at = entered + (slot.to(tl.int64) * BATCH * HEADS + own) * (KEY * VALUE)
                tl.store(at + of_state, state, mask=inside)
        if STORE:
            tl.store(states + of_state, state.to(states.dtype.element_ty), mask=inside)
        if MEASURE:
            if KEYED:
                tl.store(energy + keys, tl.sum(state * state, 1), mask=keys < KEY)
                tl.store(energy + entries + keys, tl.sum(state, 1), mask=keys < KEY)
            else:
                tl.store(energy, tl.sum(state * state))
                tl.store(energy + entries, tl.sum(state))
        there = (rows < ROWS - chunk * L)[:, None]
        if ERASES:
            written = tl.load(values + of_values, mask=shown, other=0.0)
        else:
            asked = there & (columns < VALUE)[None, :]
            written = tl.load(u + rows[:, None] * u_t + columns[None, :], mask=asked, other=0.0)
        if KEYED:
            keep = tl.exp2(tl.load(kept + keys, mask=keys < KEY, other=0.0))[:, None]
            kt = tl.load(remaining + of_keys, mask=own_keys, other=0.0)
            if SPLIT:
                kt_low = tl.load(remaining + plane + of_keys, mask=own_keys, other=0.0)
        else:
            keep = tl.exp2(tl.load(kept))
            asked = there & (keys < KEY)[None, :]
            kt = tl.load(k + rows[:, None] * k_t + keys[None, :], mask=asked, other=0.0)
            survives = tl.load(remaining + rows)[:, None]
        if ERASES:
            xt = tl.load(through + of_keys, mask=own_keys, other=0.0)
            if SPLIT:
                xt_low = tl.load(through + plane + of_keys, mask=own_keys, other=0.0)
                high, low = _halves(state)
                written = tl.dot(xt, high, tl.dot(xt, low, tl.dot(xt_low, high, written)))
            else:
                written = tl.dot(xt, state, written, input_precision=PRECISION)
            tl.store(values + of_values, written, mask=shown)
        state *= keep
        if not KEYED:
            written = written.to(tl.float32) * survives
        if KEYED and SPLIT:
            if ERASES:
                high, low = _halves(written)
                state = tl.dot(tl.trans(kt), low, state)
                state = tl.dot(tl.trans(kt_low), high, state)
                state = tl.dot(tl.trans(kt), high, state)
            else:
                state = tl.dot(tl.trans(kt_low), written, state)
                state = tl.dot(tl.trans(kt), written, state)
        elif KEYED:
            state = tl.dot(tl.trans(kt), written.to(tl.float32), state, input_precision=PRECISION)
        elif SPLIT and kt.dtype == tl.bfloat16:
            state = _first_exact(tl.trans(kt), written, state, SPLIT, PRECISION)
        else:
            state = _exact(tl.trans(kt.to(tl.float32)), written, state, SPLIT, PRECISION)
        through += L * KEY
        values += L * VALUE
        u += L * u_t
        k += L * k_t
        states += KEY * VALUE
        remaining += L * KEY if KEYED else L
        kept += KEY if KEYED else 1
        energy += BLOCKS * KEY if KEYED else BLOCKS * across
    tl.store(final + own * (KEY * VALUE) + of_state, state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def read(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h,
    kept, states, energy, seen, hard, skip, y, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    KEYED: tl.constexpr, PAIRS: tl.constexpr, DELTA: tl.constexpr, ERASES: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
    OUTPUTS: tl.constexpr, MEASURE: tl.constexpr, RELATED: tl.constexpr,
):  # fmt: skip
    r"""Read each chunk with its queries; without KEYED bring what is written and what is stored together.

    ``found`` is (field, piece, batch, row, head), all sums over the columns of a piece: the energy of the
    state once it has decayed, before the write; :math:`|U_t|^2`; :math:`\langle D_t, U_t \rangle`; the sum
    of the state's entries after the write; nothing; under the delta rule the energy of what is erased, and
    the share of it along the key (:class:`statescope.kernels.interface.ScanOutput`).

    ``u`` is what is written, without ERASES before it is scaled. Chunks that are ``hard`` (:func:`prepare`)
    are left to a second launch, with RELATED, which takes from ``seen`` what queries read of their chunk.
    Programs that read and such that measure are neighbours, as they load the same.
    Grid: (chunks * pieces * (OUTPUTS + MEASURE), heads, batch).
    """
    pieces: tl.constexpr = (VALUE + BV - 1) // BV
    roles: tl.constexpr = 2 if OUTPUTS and MEASURE else 1
    chunk = (tl.program_id(0) // (pieces * roles)).to(tl.int64)
    piece = tl.program_id(0) // roles % pieces
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    if KEYED:
        if (tl.load(hard + own * CHUNKS + chunk) != 0) != RELATED:
            return
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, left, PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    columns = piece * BV + tl.arange(0, BV)
    q += batch * q_b + first * q_t + (head // (HEADS // GROUPS)) * q_g
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + first * a_t + head * a_h
    v += batch * v_b + first * v_t + head * v_h
    log_decay += batch * g_b + first * g_t + head * g_h
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    u += batch * u_b + chunk * L * u_t + head * u_h
    kept += (own * CHUNKS + chunk) * KEY
    shown = (columns < VALUE)[None, :] & (rows < left)[:, None]
    ut = tl.load(u + rows[:, None] * u_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + first * w_t + head * w_h
        weight = tl.load(scale + tokens * w_t, mask=ends, other=0.0).to(tl.float32)
        if not ERASES:
            ut *= weight[:, None]
    there = ends[:, None] & (columns < VALUE)[None, :]
    reads = OUTPUTS
    if roles == 2:
        reads = tl.program_id(0) % 2 == 0
    if reads:
        out = tl.zeros((L, BV), tl.float32)
        read_of = tl.zeros((L, L), tl.float32)
        known = tl.full((L,), 1, tl.int32)
        for start in range(0, KEY, BS):
            keys = start + tl.arange(0, BS)
            inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
            state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
            qt = _keys(q, q_t, tokens, ends, keys, KEY)
            if RELATED:
                g, fine = _finite(_decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY))
                known = tl.minimum(known, fine)
                out = _dot(qt.to(tl.float32) * tl.exp2(tl.cumsum(g, 0)), state, out, SPLIT, PRECISION)
            elif KEYED:
                g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
                middle = 0.5 * tl.load(kept + keys, mask=keys < KEY, other=0.0)[None, :]
                since = tl.cumsum(g, 0) - middle
                qt = qt.to(tl.float32) * tl.exp2(since)
                kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
                read_of = _dot(qt, tl.trans(kt * tl.exp2(-since)), read_of, SPLIT, PRECISION)
                out = _dot(qt * tl.exp2(middle), state, out, SPLIT, PRECISION)
            else:
                kt = _keys(k, k_t, tokens, ends, keys, KEY)
                if not SPLIT:
                    qt, kt = qt.to(tl.float32), kt.to(tl.float32)
                read_of = _dot(qt, tl.trans(kt), read_of, SPLIT, PRECISION)
                out = _dot(qt, state, out, SPLIT, PRECISION)
        if RELATED:
            out += _since_bad(known == 0)[:, None]
        elif not KEYED:
            run = _decay_of_rows(log_decay, g_t, tokens, decays)[1]
            read_of *= _between(run, rows)
            out *= tl.exp2(run)[:, None]
        if RELATED:
            read_of = tl.load(seen + (own * PADDED + chunk * L + rows)[:, None] * L + rows[None, :])
        else:
            down, across = _unknown(L, ROWS, PADDED)
            read_of = tl.where(down >= across, read_of, 0.0)
        good, marks = _marked(ut)
        out = _dot(read_of, good, out, SPLIT, PRECISION) + marks
        if HAS_SKIP:
            skipped = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
            out += tl.load(skip + head).to(tl.float32) * skipped.to(tl.float32)
        time = ROWS // 2 if PAIRS else ROWS
        of_y = ((batch * time + first + tokens[:, None]) * HEADS + head) * VALUE + columns[None, :]
        tl.store(y + of_y, out.to(y.dtype.element_ty), mask=there)
    else:
        before = rows[:, None] > rows[None, :]
        squares = _along(ut * ut)
        total = _along(ut)
        whole = tl.abs(squares) < float("inf")
        ut = tl.where(whole, ut, 0.0)
        squares, total = tl.where(whole, squares, 0.0), tl.where(whole, total, 0.0)
        gram = _dot(ut, tl.trans(ut), tl.zeros((L, L), tl.float32), SPLIT, PRECISION)
        removed = tl.zeros((L, 1), tl.float32)
        if DELTA:
            vt = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
            if SPLIT:  # as it was multiplied, so that nothing is removed where nothing is there
                high, low = _halves(weight)
                weight = high.to(tl.float32) + low.to(tl.float32)
            vt = vt.to(tl.float32) * weight[:, None]
            removed = _along((ut - vt) * (ut - vt))
        gram = tl.where(before, gram, 0.0)
        key_squares = tl.zeros((L, 1), tl.float32)
        key_sums = tl.zeros((L, 1), tl.float32)
        chunks = (tl.zeros((), tl.int64) + BATCH) * HEADS * CHUNKS
        plane = chunks * (pieces * BLOCKS)
        energy += ((own * CHUNKS + chunk) * pieces + piece) * BLOCKS
        of_keys = tl.zeros((L, L), tl.float32)
        of_state = tl.zeros((L, BV), tl.float32)
        for start in range(0, KEY, BS):
            keys = start + tl.arange(0, BS)
            inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
            state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
            kt = _keys(k, k_t, tokens, ends, keys, KEY)
            if not SPLIT:
                kt = kt.to(tl.float32)
            of_keys = _dot(kt, tl.trans(kt), of_keys, SPLIT, PRECISION)
            of_state = _dot(kt, state, of_state, SPLIT, PRECISION)
            kt = kt.to(tl.float32)
            key_squares += _along(kt * kt)
            key_sums += _along(kt)
        local = _decay_of_rows(log_decay, g_t, tokens, decays)[1]
        between = _between(local, rows)
        since = tl.exp2(local)[:, None]
        crossed = _along(ut * of_state) * since
        crossed += _along(tl.where(before, gram * of_keys * between, 0.0))
        gained = tl.trans(2 * crossed + key_squares * squares)
        added = tl.trans(key_sums * total)
        of_rows = 0.0
        sums = 0.0
        for block in tl.static_range(BLOCKS):
            of_rows += tl.load(energy + block)
            sums += tl.load(energy + plane + block)
        decayed = since * since * of_rows + _along(tl.where(before, between * between * gained, 0.0))
        past = rows[:, None] >= rows[None, :]
        entries = since * sums + _along(tl.where(past, between * added, 0.0))
        mark = _since_bad(tl.sum(tl.where(whole, 0.0, 1.0), 1) > 0)[:, None]
        decayed, crossed, entries = decayed + mark, crossed + mark, entries + mark
        field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
        at = piece * field + (batch * ROWS + chunk * L + rows)[:, None] * HEADS + head
        field *= pieces
        here = (rows < left)[:, None]
        tl.store(found + at, decayed, mask=here)
        tl.store(found + field + at, key_squares * squares + mark, mask=here)
        tl.store(found + 2 * field + at, crossed, mask=here)
        tl.store(found + 3 * field + at, entries, mask=here)
        if DELTA:
            rate = tl.load(a + rows * a_t, mask=rows < left, other=0.0).to(tl.float32)[:, None]
            tl.store(found + 5 * field + at, key_squares * removed, mask=here)
            tl.store(found + 6 * field + at, -rate * key_squares, mask=here)


@triton.jit(do_not_specialize=SIZES)
def measure(
    k, k_b, k_t, k_g, u, u_b, u_t, u_h, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, a, a_b, a_t, a_h, kept, states, gained, hard, found,
    ROWS, PADDED, CHUNKS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    PAIRS: tl.constexpr, DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Bring what is written and what is stored together, where keys decay each at its own rate.

    ``found`` is as :func:`read` has it, in one piece, but for what :func:`tally` follows row by row, of which
    it is given the sum of the value that is written; ``gained`` (batch, head, row, key) is what the write
    adds to the energy of each row of the state. With PAIRS the second row of each token leaves the first out
    of its product with the state, and what the two have in common is a field of its own. Chunks that are
    ``hard`` are left out (:mod:`statescope.kernels.fused_hard_kernels`). Grid: (chunks, heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    own = batch * HEADS + head
    if tl.load(hard + own * CHUNKS + chunk) != 0:
        return
    left = tl.minimum(ROWS - chunk * L, L).to(tl.int32)
    rows = tl.arange(0, L)
    tokens, decays, ends = _tokens(rows, left, PAIRS)
    first = chunk * (L // 2) if PAIRS else chunk * L
    k += batch * k_b + first * k_t + (head // (HEADS // GROUPS)) * k_g
    a += batch * a_b + first * a_t + head * a_h
    v += batch * v_b + first * v_t + head * v_h
    log_decay += batch * g_b + first * g_t + head * g_h
    states += (own * CHUNKS + chunk) * (KEY * VALUE)
    u += batch * u_b + chunk * L * u_t + head * u_h
    kept += (own * CHUNKS + chunk) * KEY
    gained += (own * PADDED + chunk * L) * KEY
    weight = tl.full((L,), 1.0, tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + first * w_t + head * w_h
        weight = tl.load(scale + tokens * w_t, mask=ends, other=0.0).to(tl.float32)
    gram = tl.zeros((L, L), tl.float32)
    squares = tl.zeros((L, 1), tl.float32)
    total = tl.zeros((L, 1), tl.float32)
    removed = tl.zeros((L, 1), tl.float32)
    beside = tl.zeros((L, 1), tl.float32)
    for start in range(0, VALUE, BV):
        columns = start + tl.arange(0, BV)
        shown = (columns < VALUE)[None, :] & (rows < left)[:, None]
        at = rows[:, None] * u_t + columns[None, :]
        ut = tl.load(u + at, mask=shown, other=0.0).to(tl.float32)
        if HAS_SCALE and not ERASES:
            ut *= weight[:, None]
        gram = _dot(ut, tl.trans(ut), gram, SPLIT, PRECISION)
        squares += _along(ut * ut)
        total += _along(ut)
        if PAIRS:
            there = ends[:, None] & (columns < VALUE)[None, :]
            beside += _along(ut * tl.load(u + at - u_t, mask=there, other=0.0))
        if DELTA:
            there = ends[:, None] & (columns < VALUE)[None, :]
            vt = tl.load(v + tokens[:, None] * v_t + columns[None, :], mask=there, other=0.0)
            multiplied = weight
            if SPLIT:  # as it was multiplied, so that nothing is removed where nothing is there
                high, low = _halves(weight)
                multiplied = high.to(tl.float32) + low.to(tl.float32)
            vt = vt.to(tl.float32) * multiplied[:, None]
            removed += _along((ut - vt) * (ut - vt))
    down, across = _unknown(L, ROWS, PADDED)
    apart = down > across
    if PAIRS:
        apart = apart & ~(ends[:, None] & (down == across + 1))
    gram = tl.where(apart, gram, 0.0)
    key_squares = tl.zeros((L, 1), tl.float32)
    pair_products = tl.zeros((L, 1), tl.float32)
    crossed = tl.zeros((L, 1), tl.float32)
    for start in range(0, KEY, BS):
        keys = start + tl.arange(0, BS)
        stored = tl.zeros((L, BS), tl.float32)
        for block in range(0, VALUE, BV):
            columns = block + tl.arange(0, BV)
            shown = (columns < VALUE)[None, :] & (rows < left)[:, None]
            ut = tl.load(u + rows[:, None] * u_t + columns[None, :], mask=shown, other=0.0).to(tl.float32)
            if HAS_SCALE and not ERASES:
                ut *= weight[:, None]
            inside = (keys < KEY)[:, None] & (columns < VALUE)[None, :]
            state = tl.load(states + keys[:, None] * VALUE + columns[None, :], mask=inside, other=0.0)
            stored = _dot(ut, tl.trans(state), stored, SPLIT, PRECISION)
        g = _decays_of_keys(log_decay, g_t, g_k, tokens, decays, keys, KEY)
        middle = 0.5 * tl.load(kept + keys, mask=keys < KEY, other=0.0)[None, :]
        kt = _written_keys(k, k_t, a, a_t, tokens, decays, ends, keys, KEY, PAIRS)
        since = tl.cumsum(g, 0) - middle
        early = kt * tl.exp2(-since)
        stored = _dot(gram, early, stored * tl.exp2(middle), SPLIT, PRECISION) * tl.exp2(since) * kt
        crossed += _along(stored)
        key_squares += _along(kt * kt)
        energy = 2 * stored + kt * kt * squares
        if PAIRS:
            asked = ends[:, None] & (keys < KEY)[None, :]
            pair = tl.load(a + tokens[:, None] * a_t + keys[None, :], mask=asked, other=0.0)
            pair = kt * pair.to(tl.float32)
            pair_products += _along(pair)
            energy += 2 * pair * beside
        at = rows[:, None] * KEY + keys[None, :]
        tl.store(gained + at, energy, mask=(keys < KEY)[None, :] & (rows < L)[:, None])
    field = (tl.zeros((), tl.int64) + BATCH) * ROWS * HEADS
    at = (batch * ROWS + chunk * L + rows)[:, None] * HEADS + head
    here = (rows < left)[:, None]
    tl.store(found + field + at, key_squares * squares, mask=here)
    tl.store(found + 2 * field + at, crossed, mask=here)
    tl.store(found + 3 * field + at, total, mask=here)
    if PAIRS:
        tl.store(found + 5 * field + at, beside * pair_products, mask=here)
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
    L: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Follow energy and sum of every row of the state through each chunk, row of the text by row.

    Of the fields of ``found`` it fills those that :func:`measure` leaves. Grid: (chunks, heads, batch).
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
        token = row // 2 if PAIRS else row
        decays = row % 2 == 0 if PAIRS else row >= 0
        inside = (keys < KEY) & decays
        at = found + row * HEADS
        g = tl.load(log_decay + token * g_t + keys * g_k, mask=inside, other=0.0).to(tl.float32)
        tl.store(at + 4 * field, tl.sum(g) / KEY)
        fall = tl.exp2(_bounded(g))
        squares *= fall * fall
        tl.store(at, tl.sum(squares))
        squares += tl.load(gained + row * KEY + keys, mask=keys < KEY, other=0.0)
        if PAIRS:
            kt = tl.load(k + token * k_t + keys, mask=(keys < KEY) & (row % 2 == 1), other=0.0).to(tl.float32)
            kt += tl.load(a + token * a_t + keys, mask=inside, other=0.0).to(tl.float32)
        else:
            kt = tl.load(k + token * k_t + keys, mask=keys < KEY, other=0.0).to(tl.float32)
        entries = entries * fall + kt * tl.load(at + 3 * field)
        tl.store(at + 3 * field, tl.sum(entries))
