"""The device code of :mod:`statescope.kernels.fused`; importing it needs triton.

Shapes are written (batch, time, ...) as in :class:`statescope.Recurrence`. Time is cut into chunks of
``L`` tokens; a *span* is a run of chunks that one program walks with the state in registers. A program
owns ``BV`` columns of one head's state; every number it reports is a sum over columns, so the blocks of
columns of a wide head only have to be added.

Decays are kept as base-2 logarithms, because ``exp2`` is what the hardware computes. Pointers advance
by one chunk in 64 bits; only offsets inside a chunk are 32 bits wide.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

LENGTHS = ["TIME", "CHUNKS", "LENGTH", "SPANS", "BATCH"]
"""Arguments for whose special values (1, multiples of 16) no kernel is compiled: texts are of any length."""

SMALLEST_LOG = tl.constexpr(-150.0)
"""exp2 of it is 0 in float32, so clamping there changes nothing and keeps -inf - (-inf) out."""


@triton.jit
def _tile(
    x, x_b, x_t, x_h, batch, token, head, column, rows, time, stop,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Load one head's (rows, columns) from a token and column on, zero from ``stop`` and the width on.

    With BULK, ``x`` is a descriptor of (batch * time, heads * width), for the bulk copy engine.
    """
    if BULK:
        tile = x.load([(batch * time + token).to(tl.int32), head * WIDTH + column])
    else:
        columns = column + tl.arange(0, BLOCK)
        mask = (rows < stop - token)[:, None]
        if WIDTH % BLOCK != 0:
            mask = mask & (columns < WIDTH)[None, :]
        x += batch * x_b + token * x_t + head * x_h
        tile = tl.load(x + rows[:, None] * x_t + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _bounded(log_decay):
    """Clamp in base 2 what is 0 in any case; not by maximum(), which may drop a NaN."""
    g = log_decay.to(tl.float32) * LOG2E
    return tl.where(g < SMALLEST_LOG, SMALLEST_LOG, g)


@triton.jit(do_not_specialize=LENGTHS)
def lay_rows(x, x_b, x_d, y, TIME, WIDTH, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Copy (batch, width, time), contiguous in time, to (batch, time, width), contiguous in width.

    Grid: (blocks of time, blocks of width, batch).
    """
    times = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    batch = tl.program_id(2).to(tl.int64)
    inside = (columns < WIDTH)[:, None] & (times < TIME)[None, :]
    tile = tl.load(x + batch * x_b + columns.to(tl.int64)[:, None] * x_d + times[None, :], mask=inside)
    y += (batch * TIME + times.to(tl.int64)[:, None]) * WIDTH + columns[None, :]
    tl.store(y, tl.trans(tile), mask=tl.trans(inside))


@triton.jit(do_not_specialize=LENGTHS)
def prepare(
    log_decay, g_b, g_t, g_h, scale, w_b, w_t, w_h, k, k_b, k_t, k_g,
    run, weight, key_square, key_sum,
    TIME, PADDED,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr,
    L: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    HAS_SCALE: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Sum the log decay inside each chunk and lay it out (batch, head, time); sum each key.

    Padding gets no decay and no write. Grid: (chunks, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, L)
    left = tl.minimum(TIME - chunk * L, L).to(tl.int32)
    first = chunk * L
    for h in range(0, HEADS, BH):
        heads = h + tl.arange(0, BH)
        mask = (rows < left)[:, None] & (heads < HEADS)[None, :]
        at = rows[:, None] * g_t + heads[None, :] * g_h
        g = tl.load(log_decay + batch * g_b + first * g_t + at, mask=mask, other=0.0)
        total = tl.cumsum(_bounded(g), 0)
        if HAS_SCALE:
            at = rows[:, None] * w_t + heads[None, :] * w_h
            w = tl.load(scale + batch * w_b + first * w_t + at, mask=mask, other=0.0).to(tl.float32)
        else:
            w = tl.where(mask, 1.0, 0.0)
        at = (batch * HEADS + heads[None, :]) * PADDED + first + rows[:, None]
        tl.store(run + at, total, mask=(heads < HEADS)[None, :])
        tl.store(weight + at, w, mask=(heads < HEADS)[None, :])
    if MEASURE:
        for group in range(GROUPS):
            tile = _tile(k, k_b, k_t, k_g, batch, first, group, 0, rows, TIME, TIME, KEY, BK, False)
            tile = tile.to(tl.float32)
            at = (batch * GROUPS + group) * PADDED + first + rows
            tl.store(key_square + at, tl.sum(tile * tile, 1))
            tl.store(key_sum + at, tl.sum(tile, 1))


@triton.jit(do_not_specialize=LENGTHS)
def write_spans(
    k, k_b, k_t, k_g, v, v_b, v_t, v_h, run, weight, key_sum, ends,
    written, decay, value_square, value_sum, chunk_total, chunk_decay,
    TIME, PADDED, CHUNKS, LENGTH, SPANS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    BF16: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
    CUT: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Sum up what the tokens of a span leave behind, starting from nothing, and how much they forget.

    A span is ``LENGTH`` chunks or, with CUT, ends after the token ``ends`` names. ``written`` is (batch,
    head, span, key, value) and ``decay`` (batch, head, span) the sum of the log decay, base 2. Both are
    also followed chunk by chunk:
    ``chunk_total`` (block, batch, chunk, head) is the sum of the entries of what was written before the
    chunk, ``chunk_decay`` (batch, chunk, head) the log decay up to it.
    Grid: (head * blocks of columns, span, batch).
    """
    operand: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    span = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if CUT:
        stop = tl.load(ends + span) + 1
        start = (stop - 1) // (LENGTH * L) * LENGTH
    else:
        start = span * LENGTH
        stop = tl.minimum((start + LENGTH) * L, TIME)
    first = start * L
    rows = tl.arange(0, L)
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    group = head // (HEADS // GROUPS)
    run += (batch * HEADS + head) * PADDED + first
    weight += (batch * HEADS + head) * PADDED + first
    key_sum += (batch * GROUPS + group) * PADDED + first
    row = ((block * BATCH + batch) * TIME + first) * HEADS + head
    boundary = (batch * CHUNKS + start) * HEADS + head
    state = tl.zeros((BK, BV), tl.float32)
    forgotten = 0.0
    entries = 0.0
    for _ in tl.range(0, tl.cdiv(stop - first, L).to(tl.int32), num_stages=STAGES):
        left = tl.minimum(stop - first, L).to(tl.int32)
        kt = _tile(k, k_b, k_t, k_g, batch, first, group, 0, rows, TIME, stop, KEY, BK, BULK)
        vt = _tile(v, v_b, v_t, v_h, batch, first, head, block * BV, rows, TIME, stop, VALUE, BV, BULK)
        vt = vt.to(tl.float32)
        last = tl.load(run + left - 1)
        remaining = tl.exp2(last - tl.load(run + rows)) * tl.load(weight + rows)
        remaining = tl.where(rows < left, remaining, 0.0)
        if MEASURE:
            tl.store(chunk_total + block * BATCH * CHUNKS * HEADS + boundary, entries)
            tl.store(chunk_decay + boundary, forgotten)
            sums = tl.sum(vt, 1)
            entries = entries * tl.exp2(last) + tl.sum(remaining * tl.load(key_sum + rows) * sums)
            tl.store(value_square + row + rows * HEADS, tl.sum(vt * vt, 1), mask=rows < left)
            tl.store(value_sum + row + rows * HEADS, sums, mask=rows < left)
        scaled = vt * remaining[:, None]
        kt = tl.trans(kt.to(operand))
        state *= tl.exp2(last)
        if BF16:
            # In two halves of its bits: these states are kept, and energies restart from them.
            high = (scaled.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            state = tl.dot(kt, high.to(operand), state)
            state = tl.dot(kt, (scaled - high).to(operand), state)
        else:
            state = tl.dot(kt, scaled, state, input_precision=PRECISION)
        forgotten += last
        first += L
        run += L
        weight += L
        key_sum += L
        row += L * HEADS
        boundary += HEADS
    at = (batch * HEADS + head) * SPANS + span
    inside = (keys < KEY)[:, None] & (values < VALUE)[None, :]
    tl.store(written + at * (KEY * VALUE) + keys[:, None] * VALUE + values[None, :], state, mask=inside)
    if block == 0:
        tl.store(decay + at, forgotten)


@triton.jit(do_not_specialize=LENGTHS)
def pass_states(
    states, decay, initial, final, spoiled, energy, total, SPANS,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Turn what each span wrote into the state that enters it, in place, and keep the last one.

    ``states`` is (batch * head, span, key * value), ``initial`` and ``final`` (batch * head, key * value).
    ``spoiled`` (batch * head, block, span) says in which span a finite entry stopped being finite;
    ``energy`` and ``total``, alike, are the sums of the squares and of the entries of the state.
    Grid: (blocks, batch * head).
    """
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    entries = block * BLOCK + tl.arange(0, BLOCK)
    mask = entries < SIZE
    if HAS_INITIAL:
        state = tl.load(initial + row * SIZE + entries, mask=mask, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    at = states + row * SPANS * SIZE
    decay += row * SPANS
    part = (row * tl.num_programs(0) + block) * SPANS
    for span in tl.range(0, SPANS, num_stages=STAGES):
        wrote = tl.load(at + entries, mask=mask, other=0.0)
        tl.store(at + entries, state, mask=mask)
        tl.store(energy + part + span, tl.sum(state * state))
        tl.store(total + part + span, tl.sum(state))
        after = state * tl.exp2(tl.load(decay + span)) + wrote
        bad = (tl.abs(state) < float("inf")) & ~(tl.abs(after) < float("inf"))
        tl.store(spoiled + part + span, tl.max(bad.to(tl.int32), 0))
        state = after
        at += SIZE
    tl.store(final + row * SIZE + entries, state, mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def read_spans(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, v, v_b, v_t, v_h, run, weight, states, skip,
    y, cross, written,
    TIME, PADDED, CHUNKS, LENGTH, SPANS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    BF16: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr, MEASURE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    r"""Walk a span once, reading the past with the query and with the key.

    .. math::

        y_i &= e^{G_i} S_{in}^\top q_i + \sum_{j \le i} e^{G_i - G_j} w_j (q_i \cdot k_j) v_j + d v_i \\
        \langle D_i, U_i \rangle &= w_i \Bigl( e^{G_i} v_i \cdot S_{in}^\top k_i
            + \sum_{j < i} e^{G_i - G_j} w_j (k_i \cdot k_j) (v_i \cdot v_j) \Bigr)

    The second sum is an elementwise product of two Gram matrices: products of the inputs as they are,
    weighted in float32, with the future masked after the product, so nothing later can leak in.
    ``cross`` is (block, batch, time, head). ``written`` (block, batch, chunk, head) is what the span has
    added to :math:`|S|^2`, decayed, before each chunk: with :math:`r_i = e^{G_L - G_i} w_i`,

    .. math:: |S_{out}|^2 = e^{2 G_L} |S_{in}|^2 + \sum_i r_i^2 |k_i|^2 |v_i|^2
        + 2 \sum_i e^{2 (G_L - G_i)} \langle D_i, U_i \rangle,

    so that no rounded state enters an energy. ``LENGTH`` is chunks in a span.
    Grid: (head * blocks of columns, span, batch).
    """
    operand: tl.constexpr = tl.bfloat16 if BF16 else tl.float32
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = head // (HEADS // GROUPS)
    span = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = span * LENGTH
    stop = tl.minimum(start + LENGTH, CHUNKS)
    first = start * L
    rows = tl.arange(0, L)
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    run += (batch * HEADS + head) * PADDED + first
    weight += (batch * HEADS + head) * PADDED + first
    row = ((block * BATCH + batch) * TIME + first) * HEADS + head
    boundary = ((block * BATCH + batch) * CHUNKS + start) * HEADS + head
    states += ((batch * HEADS + head) * SPANS + span) * (KEY * VALUE)
    inside = (keys < KEY)[:, None] & (values < VALUE)[None, :]
    state = tl.load(states + keys[:, None] * VALUE + values[None, :], mask=inside, other=0.0)
    if HAS_SKIP:
        bypass = tl.load(skip + head).to(tl.float32)
    gained = 0.0
    for _ in tl.range(0, (stop - start).to(tl.int32), num_stages=STAGES):
        left = tl.minimum(TIME - first, L).to(tl.int32)
        kt = _tile(k, k_b, k_t, k_g, batch, first, group, 0, rows, TIME, TIME, KEY, BK, BULK).to(operand)
        vt = _tile(v, v_b, v_t, v_h, batch, first, head, block * BV, rows, TIME, TIME, VALUE, BV, BULK)
        vt = vt.to(operand)
        g = tl.load(run + rows)
        w = tl.load(weight + rows)
        last = tl.load(run + L - 1)
        decay = tl.exp2(g)
        remaining = tl.exp2(last - g)
        scaled = (vt.to(tl.float32) * (remaining * w)[:, None]).to(operand)
        entering = state.to(operand)
        state = state * tl.exp2(last) + tl.dot(tl.trans(kt), scaled, input_precision=PRECISION)
        past = tl.exp2(g[:, None] - g[None, :]) * w[None, :]
        if MEASURE:
            across = tl.sum(tl.dot(kt, entering, input_precision=PRECISION) * vt.to(tl.float32), 1)
            gram = tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
            gram *= tl.dot(vt, tl.trans(vt), input_precision=PRECISION)
            within = tl.sum(tl.where(rows[:, None] > rows[None, :], gram * past, 0.0), 1)
            itself = tl.sum(tl.where(rows[:, None] == rows[None, :], gram, 0.0), 1)
            overlap = w * (decay * across + within)
            tl.store(cross + row + rows * HEADS, overlap, mask=rows < left)
            tl.store(written + boundary, gained)
            gained *= tl.exp2(2 * last)
            gained += tl.sum(remaining * remaining * (2 * overlap + w * w * itself))
        if OUTPUTS:
            qt = _tile(q, q_b, q_t, q_g, batch, first, group, 0, rows, TIME, TIME, KEY, BK, BULK).to(operand)
            seen = tl.dot(qt, tl.trans(kt), input_precision=PRECISION) * past
            seen = tl.where(rows[:, None] >= rows[None, :], seen, 0.0)
            if HAS_SKIP:
                seen += tl.where(rows[:, None] == rows[None, :], bypass, 0.0)
            out = tl.dot(qt, entering, input_precision=PRECISION) * decay[:, None]
            out = tl.dot(seen.to(operand), vt, out, input_precision=PRECISION)
            if BULK:
                y.store([(batch * TIME + first).to(tl.int32), head * VALUE + block * BV], out.to(tl.bfloat16))
            else:
                at = ((batch * TIME + first) * HEADS + head) * VALUE
                inner = rows[:, None] * (HEADS * VALUE) + values[None, :]
                there = (rows < left)[:, None] & (values < VALUE)[None, :]
                tl.store(y + at + inner, out.to(y.dtype.element_ty), mask=there)
        first += L
        run += L
        weight += L
        row += L * HEADS
        boundary += HEADS


@triton.jit(do_not_specialize=LENGTHS)
def step_spoiled(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, v, v_b, v_t, v_h, log_decay, g_b, g_t, g_h, scale, w_b, w_t, w_h,
    states, spoiled, skip, y,
    TIME, LENGTH, SPANS, TILES,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Step through the spans where a state stopped being finite, and write their outputs again.

    A matrix product spreads a NaN to earlier tokens of its chunk (0 * NaN is NaN); stepping does not.
    Every other span returns at once. ``LENGTH`` is tokens in a span.
    Grid: (head * blocks of columns, span, batch).
    """
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = head // (HEADS // GROUPS)
    span = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    tiles = tl.arange(0, BT)
    flags = spoiled + ((batch * HEADS + head) * TILES + tiles) * SPANS + span
    if tl.max(tl.load(flags, mask=tiles < TILES, other=0), 0) != 0:
        first = span * LENGTH
        keys = tl.arange(0, BK)
        values = block * BV + tl.arange(0, BV)
        k += batch * k_b + first * k_t + group * k_g
        q += batch * q_b + first * q_t + group * q_g
        v += batch * v_b + first * v_t + head * v_h
        log_decay += batch * g_b + first * g_t + head * g_h
        if HAS_SCALE:
            scale += batch * w_b + first * w_t + head * w_h
        y += ((batch * TIME + first) * HEADS + head) * VALUE
        states += ((batch * HEADS + head) * SPANS + span) * (KEY * VALUE)
        inside = (keys < KEY)[:, None] & (values < VALUE)[None, :]
        state = tl.load(states + keys[:, None] * VALUE + values[None, :], mask=inside, other=0.0)
        for _ in range(tl.minimum(TIME - first, LENGTH).to(tl.int32)):
            kt = tl.load(k + keys, mask=keys < KEY, other=0.0).to(tl.float32)
            qt = tl.load(q + keys, mask=keys < KEY, other=0.0).to(tl.float32)
            vt = tl.load(v + values, mask=values < VALUE, other=0.0).to(tl.float32)
            write = kt
            if HAS_SCALE:
                write = kt * tl.load(scale).to(tl.float32)
                scale += w_t
            state = state * tl.exp2(_bounded(tl.load(log_decay)))
            state += tl.where(inside, write[:, None] * vt[None, :], 0.0)
            out = tl.sum(state * qt[:, None], 0)
            if HAS_SKIP:
                out += tl.load(skip + head).to(tl.float32) * vt
            tl.store(y + values, out.to(y.dtype.element_ty), mask=values < VALUE)
            k += k_t
            q += q_t
            v += v_t
            log_decay += g_t
            y += HEADS * VALUE


@triton.jit(do_not_specialize=LENGTHS)
def measure_steps(
    log_decay, g_b, g_t, g_h, scale, w_b, w_t, w_h,
    key_square, key_sum, value_square, value_sum, cross,
    energy, total, written, chunk_total, chunk_decay,
    write_norm, state_norm, state_mean, write_overlap,
    TIME, PADDED, CHUNKS, LENGTH, SPANS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    L: tl.constexpr, BH: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    r"""Run the scalar recurrences of a chunk, all heads side by side.

    .. math::

        |S_t|^2 &= e^{2 g_t} |S_{t-1}|^2 + 2 \langle D_t, U_t \rangle + |U_t|^2, \qquad
        |U_t| = |w_t| |k_t| |v_t| \\
        \Sigma S_t &= e^{g_t} \Sigma S_{t-1} + w_t (\Sigma k_t) (\Sigma v_t)

    The results may be written over ``value_square``, ``value_sum`` and ``cross``: each token's are read
    before they are written. Grid: (chunks, blocks of heads, batch).
    """
    chunk = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    mask = heads < HEADS
    groups = heads // (HEADS // GROUPS)
    squares = tl.zeros((BH,), tl.float32)
    entries = tl.zeros((BH,), tl.float32)
    for tile in range(TILES):
        at = ((batch * HEADS + heads) * TILES + tile) * SPANS + chunk // LENGTH
        squares += tl.load(energy + at, mask=mask, other=0.0)
        entries += tl.load(total + at, mask=mask, other=0.0)
    at = (batch * CHUNKS + chunk) * HEADS + heads
    kept = tl.exp2(tl.load(chunk_decay + at, mask=mask, other=0.0))
    squares *= kept * kept
    entries *= kept
    for block in tl.static_range(BLOCKS):
        part = at + block * BATCH * CHUNKS * HEADS
        squares += tl.load(written + part, mask=mask, other=0.0)
        entries += tl.load(chunk_total + part, mask=mask, other=0.0)
    squares = tl.where(squares < 0, 0.0, squares)
    first = chunk * L
    log_decay += batch * g_b + first * g_t
    if HAS_SCALE:
        scale += batch * w_b + first * w_t
    for i in range(tl.minimum(TIME - first, L).to(tl.int32)):
        at = (batch * TIME + first + i) * HEADS + heads
        decay = tl.exp2(_bounded(tl.load(log_decay + i * g_t + heads * g_h, mask=mask, other=0.0)))
        vv = tl.load(value_square + at, mask=mask, other=0.0)
        v1 = tl.load(value_sum + at, mask=mask, other=0.0)
        both = tl.load(cross + at, mask=mask, other=0.0)
        for block in tl.static_range(1, BLOCKS):
            part = at + block * BATCH * TIME * HEADS
            vv += tl.load(value_square + part, mask=mask, other=0.0)
            v1 += tl.load(value_sum + part, mask=mask, other=0.0)
            both += tl.load(cross + part, mask=mask, other=0.0)
        key = (batch * GROUPS + groups) * PADDED + first + i
        write = tl.sqrt(vv * tl.load(key_square + key, mask=mask, other=0.0))
        added = v1 * tl.load(key_sum + key, mask=mask, other=0.0)
        if HAS_SCALE:
            w = tl.load(scale + i * w_t + heads * w_h, mask=mask, other=0.0).to(tl.float32)
            write *= tl.abs(w)
            added *= w
        scaled = tl.sqrt(squares) * decay * write
        squares = squares * decay * decay + (2 * both + write * write)
        squares = tl.where(squares < 0, 0.0, squares)  # keeps a NaN, which maximum() may not
        entries = entries * decay + added
        overlap = both / tl.where(scaled == 0, 1.0, scaled)
        overlap = tl.where(overlap > 1, 1.0, tl.where(overlap < -1, -1.0, overlap))
        tl.store(write_norm + at, write, mask=mask)
        tl.store(state_norm + at, tl.sqrt(squares), mask=mask)
        tl.store(state_mean + at, entries / SIZE, mask=mask)
        tl.store(write_overlap + at, tl.where(scaled == 0, 0.0, overlap), mask=mask)
