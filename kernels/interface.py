"""What every kernel takes and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

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
    r"""What a scan yields.

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
    erased : Tensor or None, (2, batch, time, heads)
        Under the delta rule, where it was measured: the norm of what every token erases,
        :math:`|a_t k_t k_t^\top D_t|_F`, and the part of what its key reads that this is,
        :math:`-a_t |k_t|^2`.
    """

    y: Tensor | None
    steps: Steps | None
    states: Tensor
    final_state: Tensor
    erased: Tensor | None = None


class Attribution(NamedTuple):
    r"""What the state :math:`S` at a probe, and what its query reads there, are made of.

    With :math:`R_i` what survives at the probe of the write of token :math:`i`, :math:`q` the query there,
    :math:`y = S^\top q` (the output without the skip term, which is no part of the state) and
    :math:`y_i = R_i^\top q` the token's part of it. Of shape (batch, time, heads):

    ======================== ============================================== ==============
    ``contribution``         :math:`|R_i|_F`                                state units
    ``share``                :math:`\langle S, R_i\rangle/|S|^2`            signed
    ``attention``            :math:`M_i`, of which :math:`y_i = M_i v_i`    signed
    ``output_contribution``  :math:`|y_i|`                                  output units
    ``output_share``         :math:`\langle y, y_i\rangle/|y|^2`            signed
    ======================== ============================================== ==============

    and of shape (batch, heads) ``share_before`` and ``output_share_before``, the shares of the initial state,
    with which either kind sums to 1, and ``output_norm``, :math:`|y|`. Where every entry of the state decays
    at its own rate, :math:`y_i` is no multiple of :math:`v_i`; there :math:`M_i = \langle y_i, v_i\rangle /
    |v_i|^2`, the multiple that lies nearest, 0 for a value of 0.
    """

    contribution: Tensor
    share: Tensor
    attention: Tensor
    output_contribution: Tensor
    output_share: Tensor
    share_before: Tensor
    output_share_before: Tensor
    output_norm: Tensor


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
