"""Keys, queries and values as the kernels in torch take them: of every head, and scaled.

:mod:`statescope.kernels.reference` has its own, since it judges the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statescope.recurrence import Recurrence


def of_heads(r: Recurrence, shared: Tensor) -> Tensor:
    """Keys or queries of every head, (batch, time, heads, key), from those that its group shares."""
    return shared.repeat_interleave(r.heads // r.groups, 2)


def scaled(r: Recurrence, dtype: torch.dtype) -> Tensor:
    """Values as they are written, times their scale, (batch, time, heads, value)."""
    v = r.v.to(dtype)
    return v if r.write_scale is None else v * r.write_scale.to(dtype)[..., None]
