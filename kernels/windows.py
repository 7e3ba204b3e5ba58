r"""Measurements of every token thinned to one entry for a window of tokens, where they were made.

Over the tokens :math:`t` of a window: :math:`\sum \log\alpha_t` (so that retention stays exact);
``state_norm`` and ``state_mean`` at the last token; ``state_norm_max``; ``write_norm``
:math:`= \sqrt{\sum |U_t|^2}`; ``write_overlap`` :math:`= \sum |U_t|^2 c_t / \sum |U_t|^2`, the mean
cosine :math:`c_t` weighted by energy. Sums are taken in float64.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

ENTRIES = ("log_decay", "write_norm", "state_norm", "state_mean", "write_overlap", "state_norm_max")
"""What a window has: the fields of :class:`~statescope.kernels.interface.Steps`, in order, and one more."""


def thin(steps: Tensor, window: int) -> Tensor:
    """Keep one entry for every ``window`` tokens; see :mod:`statescope.kernels.windows` for which.

    Parameters
    ----------
    steps : Tensor, (5, batch, time, heads), float32
        The fields of :class:`~statescope.kernels.interface.Steps`, in order, for consecutive tokens that
        begin at a window's first.
    window : int
        Tokens of one entry. A last window may be shorter.

    Returns
    -------
    Tensor, (6, batch, ceil(time / window), heads), float32
        By :data:`ENTRIES`; NaN in an entry if a token's value that goes into it is NaN.
    """
    if steps.is_cuda and steps.is_contiguous() and importlib.util.find_spec("triton") is not None:
        return in_one_pass(steps, window)
    log_decay, write_norm, overlap = (_windows(steps[i], window) for i in (0, 1, 4))
    energy = write_norm.double().square()
    total, weighted = energy.sum(2), (energy * overlap).sum(2)
    entries = (
        log_decay.sum(2, dtype=torch.float64),
        total.sqrt(),
        _last(steps[2], window),
        _last(steps[3], window),
        torch.where(total == 0, torch.zeros_like(total), weighted / total),
        _windows(steps[2], window, -torch.inf).amax(2),
    )
    return torch.stack([x.float() for x in entries])


def in_one_pass(steps: Tensor, window: int) -> Tensor:
    """Compute :func:`thin` with the kernel; ``steps`` must be contiguous."""
    from . import window_kernels

    _, batch, time, heads = steps.shape
    count = -(-time // window)
    out = torch.empty((len(ENTRIES), batch, count, heads), dtype=torch.float32, device=steps.device)
    kernel: Any = window_kernels.thin_windows
    columns = min(32, 1 << (heads - 1).bit_length())
    rows = min(64, 1 << (window - 1).bit_length())
    with torch.cuda.device(steps.device) if steps.is_cuda else contextlib.nullcontext():
        kernel[(count, -(-heads // columns), batch)](
            steps, out, time, heads, window, ROWS=rows, COLUMNS=columns, num_warps=4
        )
    return out


def _windows(x: Tensor, window: int, fill: float = 0.0) -> Tensor:
    """(batch, time, heads) to (batch, window, token, heads), the last one filled up."""
    return pad(x, (0, 0, 0, -x.shape[1] % window), value=fill).unflatten(1, (-1, window))


def _last(x: Tensor, window: int) -> Tensor:
    time = x.shape[1]
    return x[:, torch.arange(window - 1, time + window - 1, window, device=x.device).clamp(max=time - 1)]


def thin_erased(erased: Tensor, window: int, lengths: Tensor | None = None) -> Tensor:
    r"""Keep one entry for every ``window`` tokens of what the delta rule erases.

    Over the tokens of a window: ``erase_norm`` :math:`= \sqrt{\sum |E_t|^2}`; ``erase_strength``, the mean.

    Parameters
    ----------
    erased : Tensor, (2, batch, time, heads)
        See :class:`statescope.kernels.interface.ScanOutput`.
    window : int
        Tokens of one entry; 1 keeps everything.
    lengths : Tensor, (batch,), optional
        Tokens before the padding, which counts for nothing.
    """
    if window == 1:
        return erased
    counted = torch.ones_like(erased[0], dtype=torch.float64)
    if lengths is not None:
        counted = counted.masked_fill(_padding(counted, lengths), 0)
    norm, strength = (_windows(x.double() * counted, window) for x in erased)
    count = _windows(counted, window).sum(2).clamp(min=1)
    return torch.stack([norm.square().sum(2).sqrt(), strength.sum(2) / count]).to(erased.dtype)


def at_rest(steps: Tensor, lengths: Tensor) -> Tensor:
    """Let nothing happen after the end of each sequence, so that windows close as if it ended there.

    Parameters
    ----------
    steps : Tensor, (5, batch, time, heads)
        Measurements from the first token on, as :func:`thin` takes them.
    lengths : Tensor, (batch,)
        Tokens before the padding.
    """
    padding = _padding(steps[0], lengths)
    last = (lengths - 1)[:, None, None].expand(-1, 1, steps.shape[3])
    norm, mean = (torch.where(padding, x.gather(1, last), x) for x in steps[2:4])
    log_decay, write_norm, overlap = (x.masked_fill(padding, 0) for x in (steps[0], steps[1], steps[4]))
    return torch.stack([log_decay, write_norm, norm, mean, overlap])


def _padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Which tokens of (batch, time, heads) lie after the end of their sequence."""
    return (torch.arange(x.shape[1], device=x.device)[None] >= lengths[:, None])[..., None]
