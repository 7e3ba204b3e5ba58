"""Rows as the fused kernels read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def by_rows(x: Tensor) -> Tensor:
    """Copy (batch, time, heads, width) where its rows are not contiguous, or lie too far apart.

    That is where the offsets inside a chunk would need 64 bits.
    """
    if x.stride(-1) == 1 and x.stride(1) < 2**23:
        return x
    batch, time, heads, width = x.shape
    if x.stride(1) != 1 or (heads > 1 and x.stride(2) != width * x.stride(3)):
        return x.contiguous()
    from . import fused_kernels

    rows = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # a convolution in torch leaves columns
    lay_rows: Any = fused_kernels.lay_rows
    grid = (-(-time // 64), -(-heads * width // 64), batch)
    lay_rows[grid](x, x.stride(0), x.stride(3), rows, time, heads * width, BT=64, BD=64, num_warps=4)
    return rows
