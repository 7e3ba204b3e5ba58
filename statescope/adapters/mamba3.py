r"""Mamba-3 with one input and output a head (arXiv 2603.15569, section 3), as mamba_ssm runs it.

The trapezoidal rule writes twice for every token, for itself and once more for the token before it, and
keys and queries are turned by angles that add up:

.. math::

    h_t = \alpha_t h_{t-1} + \alpha_t \Delta_t (1 - \lambda_t)\, k_{t-1} v_{t-1}^\top
          + \Delta_t \lambda_t\, k_t v_t^\top, \qquad y_t = h_t^\top q_t + D v_t, \qquad
    k_t = R(\theta_t)(B_t + \beta_k), \quad q_t = R(\theta_t)(C_t + \beta_q), \quad
    \theta_t = \theta_{t-1} + \pi \Delta_t \tanh(\omega_t)

with :math:`\alpha_t = e^{\Delta_t A_t}`. The rotation is no part of the state: keys and queries come turned.
The earlier value is: it is kept as one more row of the state,

.. math:: S_t = \begin{pmatrix} h_t \\ \epsilon\, v_t^\top \end{pmatrix}, \qquad b = (0, 1), \quad
    a_t = \bigl(\alpha_t \Delta_t (1 - \lambda_t)\, k_{t-1} / \epsilon,\; -\alpha_t\bigr), \quad
    (\Delta_t \lambda_t\, k_t,\; \epsilon)\, v_t^\top

with which this is the equation of :class:`~statescope.recurrence.Recurrence`: the erase term takes the
earlier value out of its row and writes it under its key. Nothing is approximated: :data:`EPSILON` is a power
of two, which changes no digit of :math:`h`, and so small that the row adds nothing to norms and overlaps.
``state_norm`` is that of the model's cached state, ``write_norm`` that of both writes of a token together,
and at a probe a token's contribution is what survives of its value, whenever that was written.
``state_mean`` is a mean over one row more, :math:`n / (n + 1)` of that of :math:`h`; in snapshots that row
is the last.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from statescope.adapters.interface import Adapter, Call, refuse_packed
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

EPSILON = 2.0**-32
"""By what the row of the earlier value is scaled."""

States = tuple[Tensor, Tensor, Tensor, Tensor]
"""Angle, state, and the last token's key and value."""


def read_mamba3(
    _: bool,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: States | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    **rest: Any,
) -> Call:
    r"""Read ``mamba3_siso_combined``: a stretch of tokens.

    Shapes as mamba_ssm passes them: ``Q`` and ``K`` (batch, time, groups, d_state), ``V`` and the gate ``Z``
    (batch, time, heads, head_dim), ``ADT``, ``DT`` and ``Trap`` (:math:`\lambda` before its sigmoid) (batch,
    heads, time), the biases (heads, d_state), ``Angles`` (:math:`\omega`) (batch, time, heads, at most half
    of d_state), ``D`` (heads,); the states (batch, heads, angle), (batch, heads, head_dim, d_state), (batch,
    heads, d_state) and (batch, heads, head_dim). What a token brings is rounded to bfloat16 first, as there.
    """
    refuse_packed(rest)
    q, k, v, trap, omega = (x.bfloat16().float() for x in (Q, K, V, Trap, Angles))
    angles = _angles(omega, DT, Input_States, chunk_size)
    q, k = (
        _turned(x.repeat_interleave(len(bias) // x.shape[2], 2) + bias.float(), angles.bfloat16().float())
        for x, bias in ((q, Q_bias), (k, K_bias))
    )
    log_decay, step, share = (x.float().transpose(1, 2) for x in (ADT, DT, trap.sigmoid()))
    recurrence = _recurrence(q, k, v, log_decay, step, share, Input_States)
    if D is not None:
        recurrence = recurrence.replace(skip=D.float())

    def answer(output: ScanOutput) -> Any:
        assert output.y is not None
        y = output.y if Z is None else output.y * silu(Z.bfloat16().to(output.y.dtype))
        y = y.bfloat16()
        if not return_final_states:
            return y
        last = output.final_state[:, :, :-1].transpose(-2, -1).float().contiguous()
        return y, angles[:, -1], last, k[:, -1], v[:, -1].bfloat16()

    def complete(own: Any) -> Any:
        y, _, *others = own
        return y, angles[:, -1], *others

    return Call(recurrence, answer, complete if return_final_states else None)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, step: Tensor, share: Tensor, states: States | None
) -> Recurrence:
    """Put the earlier value into a row of its own; ``log_decay`` to ``share`` are (batch, time, heads)."""
    initial, last_key = None, torch.zeros_like(k[:, :1])
    if states is not None:
        _, state, key, value = (x.float() for x in states)
        initial = torch.cat([state.transpose(-2, -1), EPSILON * value[:, :, None]], 2)
        last_key = key[:, None]
    kept = log_decay.exp()[..., None]
    earlier = kept * (step * (1 - share))[..., None] * torch.cat([last_key, k[:, :-1]], 1)
    return Recurrence(
        q=pad(q, (0, 1)),
        k=pad((step * share)[..., None] * k, (0, 1), value=EPSILON),
        v=v,
        log_decay=log_decay,
        a=torch.cat([earlier / EPSILON, -kept], -1),
        b=pad(torch.zeros_like(k), (0, 1), value=1.0),
        initial_state=initial,
    )


def _angles(omega: Tensor, DT: Tensor, states: States | None, chunk_size: int) -> Tensor:
    r"""Angles up to every token, (batch, time, heads, angle), in :math:`[0, 2\pi)`.

    mamba_ssm turns by them rounded to bfloat16, and would go on from the last one so rounded: from another
    angle wherever a segment happens to end. On a GPU its own kernel adds them up, whose tangent is good to
    three digits only.
    """
    before = None if states is None else states[0].float()
    if omega.is_cuda:
        own = sys.modules["mamba_ssm.ops.triton.mamba3.angle_dt"].angle_dt_fwd
        angles: Tensor = own(omega, DT, init_state=before, chunk_size=chunk_size)
        return angles
    turned = (omega.double().tanh() * math.pi * DT.transpose(1, 2)[..., None]).cumsum(1)
    total = turned if before is None else turned + before[:, None]
    return (total % (2 * math.pi)).float()


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbours in the last axis, as many pairs as there are angles."""
    pairs, still = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], -1)
    first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([turned.flatten(-2), still], -1)


def told_states(kept: tuple[Tensor, ...]) -> dict[str, Any]:
    """Arguments with which ``mamba3_siso_combined`` goes on; the key is kept with a rank, here 1."""
    angle, state, key, value = kept
    return {"Input_States": (angle, state, key[:, 0], value)}


def refuse_mimo(*_: Any, **__: Any) -> Call:
    """Refuse ``mamba3_mimo``, which writes several times for every token."""
    raise ValueError(
        "the model's Mamba-3 has several inputs and outputs a head (is_mimo), each token of which writes a"
        " matrix of rank mimo_rank; only is_mimo=False is supported"
    )


_KIND = ("Mamba-3 of mamba_ssm", ("models of modules Mamba3",), "decay per head, erase term")
_NOTE = "is_mimo=False only; earlier value as one more row; with attention layers in one segment only"

SISO = Adapter("mamba3_siso_combined", *_KIND, read_mamba3, told=told_states, note=_NOTE)
MIMO = Adapter("mamba3_mimo_combined", *_KIND, refuse_mimo, note=_NOTE)
