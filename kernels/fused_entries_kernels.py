"""The device code of :mod:`statescope.kernels.fused_entries`; importing it needs triton.

Time is cut into *spans* of ``LENGTH`` tokens. A program is one warp; it owns ``BV`` columns of one head's
state, keeps their entries in registers and takes token after token of a span. Entries meet in sums over those
of one token only, so that nothing can reach an earlier one.
"""

import triton
import triton.language as tl

from .fused_kernels import LENGTHS, LOG2E


@triton.jit
def _decayed(x, g):
    """Return e^g x. What is forgotten slowly takes the series of e^g - 1: errors of e^g would add up."""
    less = g * (1.0 + g * (1 / 2 + g * (1 / 6 + g * (1 / 24))))
    return tl.where(tl.abs(g) < 1 / 16, x + x * less, x * tl.exp2(g * LOG2E))


@triton.jit(do_not_specialize=LENGTHS)
def walk(
    q, q_b, q_t, q_g, k, k_b, k_t, k_g, v, v_b, v_t, v_h, scale, w_b, w_t, w_h,
    log_decay, g_b, g_t, g_h, g_k, g_v, rate, skip, states, ends, left, forgotten, y, y_b, sums,
    TIME, LENGTH, SPANS, BATCH,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, RATED: tl.constexpr, FRESH: tl.constexpr, CUT: tl.constexpr,
    OUTPUTS: tl.constexpr, MEASURE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SKIP: tl.constexpr,
):  # fmt: skip
    """Step through the tokens of a span.

    The state that enters it is read from ``states`` (batch, head, span, key, value) or, with FRESH, is zero.
    With FRESH or CUT the one it ends with goes to ``left``, alike, and with FRESH the sum of the log decay to
    ``forgotten``. With CUT a span ends after the token that ``ends`` names.
    ``log_decay`` is one number per entry or, with RATED, a step per column, which ``rate`` (head, key, value)
    multiplies. ``sums`` is (6, block, batch, head, time): over the entries of the log decay, the squares of
    the decayed state and of the write, their product, the squares of the state, and the state.
    Grid: (head * blocks of columns, span, batch).
    """
    blocks: tl.constexpr = (VALUE + BV - 1) // BV
    whole: tl.constexpr = KEY == BK and VALUE % BV == 0
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = head // (HEADS // GROUPS)
    slot = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if CUT:
        stop = tl.load(ends + slot) + 1
        span = (stop - 1) // LENGTH
    else:
        span = slot
        stop = tl.minimum((span + 1) * LENGTH, TIME)
    first = span * LENGTH
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    rows = keys < KEY
    columns = values < VALUE
    inside = rows[:, None] & columns[None, :]
    entries = keys[:, None] * VALUE + values[None, :]
    if FRESH:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        at = ((batch * HEADS + head) * SPANS + span) * (KEY * VALUE)
        state = tl.load(states + at + entries, mask=inside, other=0.0)
    if RATED:
        rates = tl.load(rate + head * (KEY * VALUE) + entries, mask=inside, other=0.0).to(tl.float32)
        log_decay += values[None, :]
        within = columns[None, :]
        total = tl.zeros((1, BV), tl.float32)
    else:
        log_decay += keys.to(tl.int64)[:, None] * g_k + values.to(tl.int64)[None, :] * g_v
        within = inside
        total = tl.zeros((BK, BV), tl.float32)
    if HAS_SKIP:
        bypass = tl.load(skip + head).to(tl.float32)
    if HAS_SCALE:
        scale += batch * w_b + first * w_t + head * w_h
    log_decay += batch * g_b + first * g_t + head * g_h
    q += batch * q_b + first * q_t + group * q_g + keys
    k += batch * k_b + first * k_t + group * k_g + keys
    v += batch * v_b + first * v_t + head * v_h + values
    y += batch * y_b + (first * HEADS + head) * VALUE + values
    sums += ((block * BATCH + batch) * HEADS + head) * TIME + first
    plane = blocks * HEADS * BATCH.to(tl.int64) * TIME
    for _ in range((stop - first).to(tl.int32)):
        steps = tl.load(log_decay, mask=within, other=0.0).to(tl.float32)
        kt = tl.load(k, mask=rows, other=0.0).to(tl.float32)
        vt = tl.load(v, mask=columns, other=0.0).to(tl.float32)
        g = steps * rates if RATED else steps
        scaled = vt
        if HAS_SCALE:
            scaled = vt * tl.load(scale).to(tl.float32)
            scale += w_t
        write = kt[:, None] * scaled[None, :]
        if not whole:  # an infinity times a padding of 0 is a NaN
            g = tl.where(inside, g, 0.0)
            write = tl.where(inside, write, 0.0)
        decayed = _decayed(state, g)
        state = decayed + write
        if FRESH:
            total += steps
        if OUTPUTS:
            out = tl.sum(state * tl.load(q, mask=rows, other=0.0).to(tl.float32)[:, None], 0)
            if HAS_SKIP:
                out += bypass * vt
            tl.store(y, out.to(y.dtype.element_ty), mask=columns)
        if MEASURE:
            tl.store(sums, tl.sum(g))
            tl.store(sums + plane, tl.sum(decayed * decayed))
            tl.store(sums + 2 * plane, tl.sum(kt * kt) * tl.sum(scaled * scaled))
            tl.store(sums + 3 * plane, tl.sum(decayed * write))
            tl.store(sums + 4 * plane, tl.sum(state * state))
            tl.store(sums + 5 * plane, tl.sum(state))
        q += q_t
        k += k_t
        v += v_t
        log_decay += g_t
        y += HEADS * VALUE
        sums += 1
    if FRESH or CUT:
        at = ((batch * HEADS + head) * tl.num_programs(1) + slot) * (KEY * VALUE)
        tl.store(left + at + entries, state, mask=inside)
        if FRESH:
            tl.store(forgotten + at + entries, total * rates if RATED else total, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def pass_states(
    states, forgotten, initial, final, SPANS,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Turn what each span wrote into the state that enters it, in place, and keep the last one.

    ``states`` and ``forgotten``, their log decay, are (batch * head, span, key * value), ``initial`` and
    ``final`` (batch * head, key * value). Grid: (batch * head, blocks of entries).
    """
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < SIZE
    if HAS_INITIAL:
        state = tl.load(initial + row * SIZE + entries, mask=mask, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    states += row * SPANS * SIZE + entries
    forgotten += row * SPANS * SIZE + entries
    for _ in tl.range(0, SPANS, num_stages=STAGES):
        wrote = tl.load(states, mask=mask, other=0.0)
        tl.store(states, state, mask=mask)
        state = _decayed(state, tl.load(forgotten, mask=mask, other=0.0)) + wrote
        states += SIZE
        forgotten += SIZE
    tl.store(final + row * SIZE + entries, state, mask=mask)
