"""What every kernel takes and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from statescope.recurrence import Recurrence


@dataclass(frozen=True, eq=False)
class Steps:
    r"""One number per token and head, each of shape (batch, time, heads).

    With :math:`D_t = \operatorname{diag}(e^{g_t}) S_{t-1}` the decayed state and
    :math:`U_t = S_t - D_t` what the token adds to it, the erase term included (under the delta rule the
    correction :math:`k_t u_t^\top` and not the value that is asked for):

    ========================= ============================================== ============
    ``log_decay``             :math:`g_t`, mean over keys and values         nat
    ``write_norm``            :math:`|U_t|_F`                                state units
    ``state_norm``            :math:`|S_t|_F`                                state units
    ``state_mean``            mean of the entries of :math:`S_t`             state units
    ``write_overlap``         :math:`\langle D_t, U_t\rangle/(|D_t||U_t|)`,  cosine
                              0 where either is zero
    ========================= ============================================== ============

    Where keys or entries decay at their own rates, ``log_decay`` is what they forget on average; what the
    state as a whole forgets, :math:`|D_t| / |S_{t-1}|`, depends on where its energy sits, and follows from
    the norms. An erase term is no part of ``log_decay``: what it takes away is in :math:`U_t`, whose
    overlap with the decayed state is negative then. What a single write is worth at a probe, erasing by
    later tokens included, is :func:`statescope.kernels.reference.probe`.
    """

    log_decay: Tensor
    write_norm: Tensor
    state_norm: Tensor
    state_mean: Tensor
    write_overlap: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Steps]) -> Steps:
        """Join consecutive stretches of time."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts], 1) for f in fields(cls)))


@dataclass(frozen=True, eq=False)
class ScanOutput:
    """What a scan yields.

    Attributes
    ----------
    y : Tensor or None, (batch, time, heads, value)
        The outputs; None where they were not asked for.
    steps : Steps or None
        The measurements of every token; None where they were not asked for.
    states : Tensor, (batch, position, heads, key, value)
        The state after each requested position, in the order they were given.
    final_state : Tensor, (batch, heads, key, value)
        The state after the last token.
    """

    y: Tensor | None
    steps: Steps | None
    states: Tensor
    final_state: Tensor


class Kernel(Protocol):
    """A module that serves a scan."""

    def supports(self, recurrence: Recurrence) -> str | None:
        """Return None if the kernel serves this recurrence, else the reason why not."""
        ...

    def scan(
        self,
        recurrence: Recurrence,
        *,
        outputs: bool = True,
        measure: bool = True,
        positions: Sequence[int] = (),
    ) -> ScanOutput:
        """Run the recurrence."""
        ...
