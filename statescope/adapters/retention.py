r"""Retention of RetNet (arXiv 2307.08621, eq. 6), as fla runs it: one fixed decay per head.

.. math::

    S_t = \gamma_h S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t / \sqrt{d_k}, \qquad
    \gamma_h = 1 - 2^{-5-h}

In the terms of :class:`~statescope.recurrence.Recurrence`: :math:`g = \log \gamma_h`, and the scale of the
output in :math:`q`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescope.adapters.gla import plain_call
from statescope.adapters.interface import Adapter, Call, refuse_packed


def read_retention(
    _: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Call:
    """Read ``chunk_retention``, ``fused_chunk_retention`` or ``fused_recurrent_retention``.

    Shapes as fla passes them: ``q`` and ``k`` (batch, time, heads, key), ``v`` (batch, time, heads, value),
    the state (batch, heads, key, value).
    """
    refuse_packed(rest)
    heads = torch.arange(v.shape[2], device=v.device, dtype=torch.float64)
    log_decay = torch.log1p(-(2 ** (-5 - heads))).float().expand(v.shape[:3])
    return plain_call(q, k, v, log_decay, scale, initial_state, output_final_state, state_v_first)


def refuse_parallel(*_: Any, **__: Any) -> Call:
    """Refuse ``parallel_retention``, which has no state."""
    raise ValueError(
        "the model runs its retention in parallel, without a state; set config.attn_mode='chunk'"
    )


_KIND = ("Retention of fla", ("RetNet",), "decay per head")

CHUNK_RETENTION = Adapter("chunk_retention", *_KIND, read_retention)
FUSED_RETENTION = Adapter("fused_chunk_retention", *_KIND, read_retention)
RECURRENT_RETENTION = Adapter("fused_recurrent_retention", *_KIND, read_retention)
PARALLEL_RETENTION = Adapter("parallel_retention", *_KIND, refuse_parallel)
