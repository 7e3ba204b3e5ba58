"""The only door to the kernels: choose one, say which, run it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from statescope.kernels.interface import Attribution, Kernel, ScanOutput, Steps
from statescope.kernels.loss import token_loss
from statescope.kernels.rates import written_out
from statescope.kernels.windows import at_rest, thin, thin_erased
from statescope.recurrence import Recurrence

__all__ = [
    "Attribution",
    "BACKENDS",
    "Kernel",
    "ScanOutput",
    "Steps",
    "at_rest",
    "choose",
    "on_gpu",
    "probe",
    "scan",
    "thin",
    "thin_erased",
    "token_loss",
    "transition",
    "written_out",
]

BACKENDS = ("fused", "chunked", "reference")
"""Kernels by name, the preferred first: Triton on a GPU, torch, float64 token by token."""


def choose(recurrence: Recurrence, backend: str = "auto") -> str:
    """Name the kernel that will serve a recurrence.

    Parameters
    ----------
    recurrence : Recurrence
        What is to be run.
    backend : str
        ``"auto"`` for the first of :data:`BACKENDS` that serves it, or one of them by name. ``"fused"`` is
        chosen on a GPU only.

    Raises
    ------
    ValueError
        If the name is unknown or the named kernel does not serve this recurrence; says why.
    """
    if backend == "auto":
        names = BACKENDS if recurrence.v.is_cuda else BACKENDS[1:]
        return next(name for name in names if _kernel(name).supports(recurrence) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of: auto, {', '.join(BACKENDS)}")
    reason = _kernel(backend).supports(recurrence)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve this recurrence: {reason}; use backend='auto'")
    return backend


def on_gpu(recurrence: Recurrence) -> str:
    """Name the kernel that serves a recurrence of this structure where there is a GPU."""
    from statescope.kernels import fused

    refused = fused.supports(recurrence) or ""
    return BACKENDS[bool(refused) and not refused.startswith("the tensors are on")]


def scan(
    recurrence: Recurrence,
    *,
    backend: str = "auto",
    outputs: bool = True,
    measure: bool = True,
    positions: Sequence[int] = (),
) -> ScanOutput:
    """Run a recurrence on the chosen kernel.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    backend : str
        See :func:`choose`.
    outputs, measure : bool
        Whether to compute ``y`` and ``steps``.
    positions : sequence of int
        Tokens, counted in this recurrence, after which the state is kept.
    """
    kernel = _kernel(choose(recurrence, backend))
    return kernel.scan(recurrence, outputs=outputs, measure=measure, positions=positions)


def probe(recurrence: Recurrence, state: Tensor, query: Tensor, after: Tensor | None = None) -> Attribution:
    """Attribute a probe's state and output to writes; see :func:`statescope.kernels.chunked.probe`."""
    from statescope.kernels import chunked

    return chunked.probe(recurrence, state, query, after)


def transition(recurrence: Recurrence) -> Tensor:
    """How a recurrence that erases maps the state; see :func:`statescope.kernels.chunked.transition`."""
    from statescope.kernels import chunked

    return chunked.transition(recurrence)


def _kernel(name: str) -> Kernel:
    return cast(Kernel, importlib.import_module(f"statescope.kernels.{name}"))
