r"""Lightning Attention (arXiv 2401.04658, eq. 3-4), linear attention with one fixed decay per head.

.. math::

    S_t = \lambda S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t

In the terms of :class:`~statescope.recurrence.Recurrence`: :math:`g = \log \lambda = -` the head's slope, and
nothing else. transformers' MiniMax computes this inside the layer's ``forward``, between its projections:
query, key and value are projected once more here, by the layer's own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescope.adapters.interface import Adapter, Call
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence


def read_lightning_attention(
    _: bool,
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_rest: Any,
) -> Call:
    """Read ``MiniMaxLightningAttention.forward``: a stretch of tokens, or one.

    ``hidden_states`` is (batch, time, hidden), ``attention_mask`` (batch, time) or None; the cache holds a
    state (batch, heads, key, value) per layer.
    """
    projected = layer.act_fn(layer.qkv_proj(hidden_states))
    if attention_mask is not None:
        projected = (projected * attention_mask[:, :, None]).to(projected.dtype)
    q, k, v = projected.unflatten(2, (layer.num_attention_heads, -1)).split(layer.head_dim, 3)
    state = None if past_key_values is None else past_key_values.get_linear_cache(layer.layer_idx)
    recurrence = Recurrence(
        q=q,
        k=k,
        v=v,
        log_decay=-layer.slope_rate.float().flatten().expand(v.shape[:3]),
        initial_state=state,
    )

    def answer(output: ScanOutput) -> tuple[Tensor, Tensor]:
        assert output.y is not None
        y = layer.norm(output.y.to(v.dtype).flatten(2))
        y = layer.out_proj(torch.sigmoid(layer.output_gate(hidden_states)) * y)
        last = output.final_state.to(v.dtype)
        if past_key_values is not None:
            past_key_values.set_linear_cache(layer.layer_idx, last)
        return y, last

    return Call(recurrence, answer)


LIGHTNING = Adapter(
    "forward",
    "Lightning Attention",
    ("minimax",),
    "decay per head",
    read_lightning_attention,
    owner="MiniMaxLightningAttention",
    note="attention repaired between segments where layer 0 has a state",
)
