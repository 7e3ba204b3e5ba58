r"""Gated linear attention (arXiv 2312.06635, eq. 3) and HGRN-2 (arXiv 2404.07904, eq. 8), as fla runs them.

.. math::

    S_t = \operatorname{diag}(\alpha_t)\, S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t / \sqrt{d_k}

In the terms of :class:`~statescope.recurrence.Recurrence`: :math:`g = \log \alpha`, one number per key, and
the scale of the output in :math:`q`. In HGRN-2, :math:`k = 1 - \alpha`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from statescope.adapters.interface import Adapter, Call, refuse_packed
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence


def read_gla(
    _: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    **rest: Any,
) -> Call:
    """Read ``chunk_gla`` (log decay ``g``) or ``fused_recurrent_gla`` (``gk``): a stretch of tokens, or one.

    Shapes as fla passes them: ``q``, ``k`` and the log decay (batch, time, heads, key), ``v`` (batch, time,
    heads, value), the state (batch, heads, key, value), or with ``state_v_first`` its transpose.
    """
    refuse_packed(rest)
    if gv is not None:
        raise ValueError(
            "the model's scan decays every value at a rate of its own (gv), which is not supported"
        )
    log_decay = g if gk is None else gk
    assert log_decay is not None
    return plain_call(q, k, v, log_decay, scale, initial_state, output_final_state, state_v_first)


def plain_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    **erase: Tensor,
) -> Call:
    """Make the call of a scan that answers as fla's do: outputs, and the state if asked to."""
    state = initial_state
    if state is not None and state_v_first:
        state = state.transpose(-2, -1)
    recurrence = Recurrence(
        q=q * (q.shape[-1] ** -0.5 if scale is None else scale),
        k=k,
        v=v,
        log_decay=log_decay.float(),
        initial_state=state,
        **erase,
    )

    def answer(output: ScanOutput) -> tuple[Tensor, Tensor | None]:
        assert output.y is not None
        last = output.final_state.float()
        last = last.transpose(-2, -1).contiguous() if state_v_first else last
        return output.y.to(v.dtype), last if output_final_state else None

    return Call(recurrence, answer)


_KIND = ("Gated linear attention of fla", ("GLA", "HGRN2"), "decay per key", read_gla)

CHUNK_GLA = Adapter("chunk_gla", *_KIND)
RECURRENT_GLA = Adapter("fused_recurrent_gla", *_KIND)
