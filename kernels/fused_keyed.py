r"""Decay per key on a GPU (Triton), and the delta rule with it: GLA, RWKV-6, HGRN-2, Kimi Delta Attention.

The algebra is that of :mod:`statescope.kernels.keyed`, in chunks of 16 tokens. Launches:

1. ``relate``: what the tokens of each chunk have to do with one another, all chunks at once.
2. ``walk``: one walk over all chunks for each head and block of columns, with the state in registers: what
   is written, ``y``, and the sums of which :func:`statescope.kernels.keyed.Measured.steps` makes the
   measurements.

Products are float32 (three tf32 products for each on a GPU that has them). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import delta
from .interface import ScanOutput
from .keyed import Measured

CHUNK, SLICE, COLUMNS = 16, 32, 16
"""Tokens of a chunk; keys of a state that a warp multiplies, and columns that a program walks with."""


def scan(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: bool,
    measure: bool,
    positions: Sequence[int],
) -> ScanOutput:
    """Run a recurrence whose keys decay; an erase term must be the delta rule's.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    q, k, v : Tensor
        Its queries, keys and values, with contiguous rows.
    outputs, measure, positions
        As :func:`statescope.kernels.fused.scan`.
    """
    from . import fused_keyed_kernels

    kernels: Any = fused_keyed_kernels
    r = recurrence
    chunks = -(-r.time // CHUNK)
    padded = chunks * CHUNK
    keys = max(16, 1 << (r.key - 1).bit_length())
    blocks, wide = -(-r.value // COLUMNS), keys > 128

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=r.v.device)

    rows, states = r.batch * r.heads * padded, (r.batch, r.heads, r.key, r.value)
    run, final = empty(rows, r.key), empty(*states)
    seen = empty(rows, CHUNK) if outputs else run
    inverse = empty(rows, CHUNK) if r.erases else run
    a = run if r.a is None else r.a
    erase = (a, *(a.stride() if r.erases else (0, 0, 0)))
    reads = (q, *q.stride()[:3], k, *k.stride()[:3])
    sizes = {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "BK": keys}
    asked = {"OUTPUTS": outputs, "DELTA": r.erases}
    kernels.relate[(chunks, r.heads, r.batch)](
        *reads, r.log_decay, *r.log_decay.stride(), *erase, run, seen, inverse, r.time, padded,
        **sizes, **asked, num_warps=4 if wide else 2,
    )  # fmt: skip
    scale = r.v[..., 0] if r.write_scale is None else r.write_scale
    held = sorted({p // CHUNK for p in positions})
    keep = bool(held) or (measure and r.erases)  # of every chunk what is written, of some what enters them
    entered, slots = run, run
    if keep:
        slot = torch.full((chunks,), -1, dtype=torch.int32)
        slot[held] = torch.arange(len(held), dtype=torch.int32)
        slots = _to(slot, r.v)
        entered = empty(max(1, len(held)), *states)
    y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
    values = empty(*r.v.shape) if keep else run
    parts = [empty(blocks, r.batch, r.time, r.heads) for _ in range(3)] if measure else [run] * 3
    total = empty(2, blocks, r.batch, r.time, r.heads) if measure else run
    initial = final if r.initial_state is None else r.initial_state.contiguous()
    kernels.walk[(r.heads * blocks, r.batch)](
        *reads, v, *v.stride()[:3], scale, *scale.stride(), *erase,
        run, seen, inverse, initial, run if r.skip is None else r.skip, slots,
        run if y is None else y, values, final, entered, *parts, total,
        r.time, padded, r.batch,
        **sizes, **asked, VALUE=r.value, BV=COLUMNS, SLICE=min(SLICE, keys),
        PRECISION="tf32x3" if torch.version.cuda else "ieee", MEASURE=measure,
        KEEP=keep, HAS_INITIAL=r.initial_state is not None,
        HAS_SCALE=r.write_scale is not None, HAS_SKIP=r.skip is not None,
        num_warps=8 if wide else 4,
    )  # fmt: skip
    steps = None
    if measure:
        decayed, written, cross = (x.sum(0) for x in parts)
        mean = total.sum((0, 1)) / (r.key * r.value)
        steps = Measured(decayed, written, cross, mean).steps(r.log_decay.float().mean(-1))
    kept = empty(r.batch, 0, *states[1:])
    if held:
        at = [_after(r, k, values, entered[held.index(p // CHUNK)], p) for p in positions]
        kept = torch.stack(at, 1)
    erased = delta.erased(r, values) if measure and r.erases else None
    return ScanOutput(y, steps, kept, final, erased)


def _after(r: Recurrence, k: Tensor, values: Tensor, entering: Tensor, position: int) -> Tensor:
    """The state after one token, from that which entered its chunk."""
    first = position // CHUNK * CHUNK
    past = slice(first, position + 1)
    # Of the tokens in between alone: from each on, what comes after it.
    log_decay = r.log_decay[:, past].float()
    remaining = log_decay.flip(1).cumsum(1).flip(1)
    survives = torch.cat([remaining[:, 1:], torch.zeros_like(remaining[:, :1])], 1).exp()
    keys = k[:, past].float().repeat_interleave(r.heads // r.groups, 2) * survives
    added = keys.permute(0, 2, 3, 1) @ values[:, past].transpose(1, 2)
    return remaining[:, 0].exp()[..., None] * entering + added


def _to(x: Tensor, like: Tensor) -> Tensor:
    """Bring to the device from pinned memory, so that the host does not wait."""
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x
