r"""What a model is trained with: our scan in torch, or mamba_ssm's kernels; which of them, and why.

mamba_ssm's ``mamba_chunk_scan_combined`` is of one model: it decays a head by :math:`e^{\Delta_t A}`, with
:math:`A` alike for the whole batch. Runs stacked as rows of the batch have an :math:`A` each, and sequences
that begin elsewhere. It serves them all the same, for the recurrence is linear in what is written:

.. math::

    S_t = e^{-a \Delta_t} S_{t-1} + \Delta_t B_t x_t^\top
    \quad\Longleftrightarrow\quad
    a S_t = e^{-(a \Delta_t)} a S_{t-1} + (a \Delta_t) B_t x_t^\top .

So it is given :math:`a \Delta_t` with :math:`A = -1`, and what it reads is divided by :math:`a`. The number
of each sequence, ``seq_idx``, empties the state where one begins. The gradient of :math:`a` is then a
difference of sums that nearly cancel, and what is lost in rounding outputs to bfloat16 shows in it: 1 or 2 %
in random data. No size was found that its kernels refuse: states of 1 to 512 keys, heads of 4 to 256 values,
chunks of 1 to 512 tokens ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor

from statescope.experiments.training.config import Config
from statescope.experiments.training.model import Scan, scan_in_torch

PEER = "mamba_ssm.ops.triton.ssd_combined"
"""Where mamba_ssm keeps its scan."""


@dataclass(frozen=True)
class Kernels:
    """What scans, by name and version, why, and the function."""

    name: str
    why: str
    scan: Scan

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose(config: Config, device: torch.device) -> Kernels:
    """Choose what to train with, by ``config.kernels``.

    ``"auto"`` takes mamba_ssm's kernels where they can be imported and do what is asked, else ours; the
    reason is kept.

    Raises
    ------
    ValueError
        If mamba_ssm's are asked for and cannot be had; says why.
    """
    if config.kernels == "torch":
        return Kernels("torch", "asked for", scan_in_torch)
    against = _unfit(config, device) or _absent()
    if against is None:
        why = "asked for" if config.kernels == "mamba_ssm" else "auto"
        scan: Scan = torch.compiler.disable(scan_in_mamba_ssm)  # its kernels are compiled already
        return Kernels(f"mamba_ssm {version('mamba-ssm')}", why, scan)
    if config.kernels == "mamba_ssm":
        raise ValueError(f"kernels='mamba_ssm', but {against}; kernels='torch' or 'auto' trains all the same")
    return Kernels("torch", f"auto: {against}", scan_in_torch)


def _unfit(config: Config, device: torch.device) -> str | None:
    """What speaks against mamba_ssm's kernels, whether or not they are there."""
    if device.type != "cuda":
        return f"device={str(device)!r} is no GPU"
    if config.dtype != "bfloat16":
        return f"dtype={config.dtype!r} would be rounded to TF32 in its products; it serves bfloat16"
    return None


def _absent() -> str | None:
    try:
        import_module(PEER)
    except ImportError as error:
        return f"mamba_ssm cannot be imported: {error}"
    return None


def scan_in_mamba_ssm(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, position: Tensor, chunk: int
) -> Tensor:
    """Scan with mamba_ssm's kernels; as :func:`~statescope.experiments.training.model.scan_in_torch`."""
    combined: Callable[..., Tensor] = import_module(PEER).mamba_chunk_scan_combined
    rate = rate[:, None, None]
    sequence = (position == 0).cumsum(-1, dtype=torch.int32) - 1
    stacked, step, B, C, sequence = (a.flatten(0, 1) for a in (x, dt * rate, B, C, sequence))
    A = -torch.ones(x.shape[3], device=x.device)
    y = combined(stacked, step, A, B[:, :, None], C[:, :, None], chunk, seq_idx=sequence)
    return y.unflatten(0, x.shape[:2]) / rate[..., None]
