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

from statescope.adapters.interface import Adapter, Call
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

MODELS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")

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
    cu_seqlens: Tensor | None = None,
    **_rest: Any,
) -> Call:
    """Read ``torch_chunk_gated_delta_rule``, or ``torch_recurrent_gated_delta_rule`` of one token.

    Shapes as transformers passes them: ``query`` and ``key`` (batch, time, key heads, key), ``value`` (batch,
    time, heads, value), ``g`` (the log decay) and ``beta`` (batch, time, heads), ``initial_state`` (batch,
    heads, key, value). Both work in float32 whatever the model's dtype, and scale the output by one over the
    root of the key's size unless told otherwise.
    """
    if cu_seqlens is not None:
        raise ValueError("the model was called with packed sequences (cu_seqlens); trace them one by one")
    q, k, beta, g = query.float(), key.float(), beta.float(), g.float()
    if use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(k)
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


_KIND = ("Gated DeltaNet", MODELS, "decay per head, delta rule", read_gated_delta_rule)

CHUNK_RULE = Adapter("torch_chunk_gated_delta_rule", *_KIND)
RECURRENT_RULE = Adapter("torch_recurrent_gated_delta_rule", *_KIND)
