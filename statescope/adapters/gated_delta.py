r"""Gated DeltaNet (arXiv 2412.06464, eq. 10).

.. math::

    S_t = \alpha_t\, (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top,
    \qquad y_t = S_t^\top q_t / \sqrt{d_k}

In the terms of :class:`~statescope.recurrence.Recurrence`: :math:`g = \log \alpha`, :math:`w = \beta`,
:math:`a = -\beta` along the key, and the scale of the output in :math:`q`. The paper's state is
the transpose of this one; the models keep (key, value), as we do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from statescope.adapters.interface import Adapter, Call, refuse_packed
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

MODELS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "qwen4_exp_text")

L2_EPSILON = 1e-6
"""Added to the squared norm of queries and keys, by transformers and fla alike."""


def read_gated_delta_rule(
    _: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **rest: Any,
) -> Call:
    """Read ``torch_chunk_gated_delta_rule``, or ``torch_recurrent_gated_delta_rule`` of one token.

    Shapes as transformers passes them: ``query`` and ``key`` (batch, time, key heads, key), ``value`` (batch,
    time, heads, value), ``g`` (the log decay) and ``beta`` (batch, time, heads), ``initial_state`` (batch,
    heads, key, value). Both work in float32 whatever the model's dtype, and scale the output by one over the
    root of the key's size unless told otherwise.
    """
    refuse_packed(rest)
    q, k, beta, g = query.float(), key, beta.float(), g.float()
    if use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(key.float())
    recurrence = Recurrence(
        q=q * (q.shape[-1] ** -0.5 if scale is None else scale),
        k=k,
        v=value,
        log_decay=g,
        write_scale=beta,
        a=-beta,
        initial_state=initial_state,
    )

    def answer(output: ScanOutput) -> tuple[Tensor, Tensor | None]:
        assert output.y is not None
        state = output.final_state.to(torch.float32) if output_final_state else None
        return output.y.to(query.dtype), state

    return Call(recurrence, answer)


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON)


def read_delta_rule(
    _: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    **rest: Any,
) -> Call:
    """Read ``chunk_delta_rule`` or ``fused_recurrent_delta_rule`` of fla: the same without a gate.

    Shapes as for :func:`read_gated_delta_rule`.
    """
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if beta.ndim == 4:
        raise ValueError("the model's delta rule has a rate for every value (beta), which is not supported")
    return read_gated_delta_rule(False, q, k, v, torch.zeros_like(v[..., 0]), beta, **rest)


def read_gated_delta_rule_of_fla(
    _: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    initial_state: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    lower_bound: float | None = None,
    **rest: Any,
) -> Call:
    """Read ``chunk_gated_delta_rule`` or ``fused_recurrent_gated_delta_rule`` of fla, or the same of KDA.

    Shapes as for :func:`read_gated_delta_rule`; with ``state_v_first`` the state is (batch, heads, value,
    key). Gate and rate may come before their activations; KDA's gate has a number for every key.
    """
    if gk is not None or gv is not None:
        raise ValueError("the model's delta rule has gates gk or gv, which are not supported")
    if use_gate_in_kernel:
        assert A_log is not None
        rate = A_log.float().exp().reshape(-1, *[1] * (g.ndim - 3))
        g = g.float() if dt_bias is None else g.float() + dt_bias.float().reshape(g.shape[2:])
        g = -rate * softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    state = initial_state
    if state is not None and state_v_first:
        state = state.transpose(-2, -1)
    call = read_gated_delta_rule(False, q, k, v, g, beta, initial_state=state, **rest)
    if not state_v_first:
        return call

    def answer(output: ScanOutput) -> tuple[Tensor, Tensor | None]:
        y, last = call.answer(output)
        return y, None if last is None else last.transpose(-2, -1).contiguous()

    return Call(call.recurrence, answer)


_KIND = ("Gated DeltaNet", MODELS, "decay per head, delta rule", read_gated_delta_rule)

CHUNK_RULE = Adapter("torch_chunk_gated_delta_rule", *_KIND)
RECURRENT_RULE = Adapter("torch_recurrent_gated_delta_rule", *_KIND)

_OF_FLA = ("Gated DeltaNet of fla", ("GatedDeltaNet",), "decay per head, delta rule")
_PLAIN = ("DeltaNet of fla", ("DeltaNet",), "decay per head, delta rule", read_delta_rule)

CHUNK_GATED = Adapter("chunk_gated_delta_rule", *_OF_FLA, read_gated_delta_rule_of_fla)
RECURRENT_GATED = Adapter("fused_recurrent_gated_delta_rule", *_OF_FLA, read_gated_delta_rule_of_fla)
_KDA = ("Kimi Delta Attention of fla", ("KDA",), "decay per key, delta rule")

CHUNK_KDA_OF_FLA = Adapter("chunk_kda", *_KDA, read_gated_delta_rule_of_fla)
RECURRENT_KDA_OF_FLA = Adapter("fused_recurrent_kda", *_KDA, read_gated_delta_rule_of_fla)
CHUNK_DELTA = Adapter("chunk_delta_rule", *_PLAIN)
RECURRENT_DELTA = Adapter("fused_recurrent_delta_rule", *_PLAIN)
