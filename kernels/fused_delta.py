r"""The delta rule on a GPU (Triton): what each token writes, once the past is erased.

The algebra is that of :mod:`statescope.kernels.delta`: a triangular system in every chunk gives the values
:math:`u_t`, with which nothing is left to erase. Launches:

1. ``prepare`` of :mod:`statescope.kernels.fused_kernels`: sums of the log decay inside each chunk.
2. ``invert``: the inverse of every chunk's system, all chunks at once.
3. ``correct``: one walk over all chunks for each head and block of columns, with the state in registers.
4. ``step_spoiled``: returns at once, unless a NaN or an infinity entered a state.

Everything is float32 (three tf32 products for each on a GPU that has them): an error in :math:`u` is fed
back by every later correction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

CHUNK, COLUMNS, WARPS = 32, 16, 4
"""Tokens of one triangular system; columns of a state that a program walks with, and its warps."""


def written_values(recurrence: Recurrence, k: Tensor, v: Tensor) -> Tensor:
    """Return the value every token writes, :math:`u_t`, (batch, time, heads, value), float32.

    Parameters
    ----------
    recurrence : Recurrence
        With one decay per head and the delta rule's erase term.
    k, v : Tensor
        Its keys and values, with contiguous rows.
    """
    from . import fused_delta_kernels, fused_kernels

    solver: Any = fused_delta_kernels
    common: Any = fused_kernels
    r = recurrence
    assert r.a is not None
    chunks = -(-r.time // CHUNK)
    padded = chunks * CHUNK
    keys, columns = (max(16, 1 << (size - 1).bit_length()) for size in (r.key, min(r.value, COLUMNS)))
    blocks = -(-r.value // columns)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=r.v.device)

    run, weight = empty(r.batch * r.heads, padded), empty(r.batch * r.heads, padded)
    inverse, values = empty(r.batch * r.heads, padded, CHUNK), empty(*r.v.shape)
    spoiled, entered = (
        empty(r.batch, r.heads, blocks, dtype=torch.int32),
        empty(r.batch, r.heads, r.key, r.value),
    )
    scale = r.log_decay if r.write_scale is None else r.write_scale
    decays = (r.log_decay, *r.log_decay.stride(), scale, *scale.stride())
    erase = (r.a, *r.a.stride())
    sizes = {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key}
    precision = {"PRECISION": "tf32x3" if torch.version.cuda else "ieee"}
    common.prepare[(chunks, r.batch)](
        *decays, k, *k.stride()[:3], run, weight, weight, weight,
        r.time, padded, r.heads, r.groups, r.key, CHUNK, min(32, max(2, 1 << (r.heads - 1).bit_length())),
        keys, r.write_scale is not None, False,
    )  # fmt: skip
    solver.invert[(chunks, r.heads, r.batch)](
        k, *k.stride()[:3], *erase, run, inverse, r.time, padded, **sizes, L=CHUNK, **precision, num_warps=1
    )
    initial = entered if r.initial_state is None else r.initial_state.contiguous()
    tiles = {"BK": keys, "BV": columns}
    solver.correct[(r.heads * blocks, r.batch)](
        k, *k.stride()[:3], v, *v.stride()[:3], *erase, run, weight, inverse, initial,
        values, spoiled, entered, r.time, padded,
        **sizes, VALUE=r.value, L=CHUNK, **tiles, STAGES=1, **precision,
        HAS_INITIAL=r.initial_state is not None, num_warps=WARPS,
    )  # fmt: skip
    solver.step_spoiled[(r.heads * blocks, r.batch)](
        k, *k.stride()[:3], v, *v.stride()[:3], *decays, *erase, values, spoiled, entered, r.time,
        **sizes, VALUE=r.value, **tiles, HAS_SCALE=r.write_scale is not None, num_warps=4,
    )  # fmt: skip
    return values
