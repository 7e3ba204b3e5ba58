r"""The loss of every token, from the logits before it.

.. math:: -\log p(x) = \log \sum_j e^{l_j} - l_x

On a GPU one pass over the logits as they are (a log-softmax would read and write them several times in
float32, which costs more than a layer of the model).
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROWS = 1024
"""Rows whose logits are held in float32 at once, without the kernel."""

BLOCK = 4096
"""Logits of a row that the kernel reads at once."""


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross entropy of every row, in float32.

    Parameters
    ----------
    logits : Tensor, (row, vocabulary)
        Unnormalised log probabilities.
    targets : Tensor, (row,), int64
        What came.

    Returns
    -------
    Tensor, (row,), float32
        In nat; NaN where a logit is.
    """
    if logits.is_cuda and logits.stride(1) == 1 and importlib.util.find_spec("triton") is not None:
        return in_one_pass(logits, targets)
    parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts])


def in_one_pass(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute :func:`token_loss` with the kernel; rows must be contiguous."""
    from . import loss_kernels

    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        kernel: Any = loss_kernels.cross_entropy_rows
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            kernel[(len(logits),)](
                logits,
                logits.stride(0),
                targets.contiguous(),
                loss,
                logits.shape[1],
                BLOCK=BLOCK,
                num_warps=8,
            )
    return loss
