r"""RWKV-6 (arXiv 2404.05892, eq. 19), as fla runs it: decay per key, and an output that reads first.

.. math::

    S_t = \operatorname{diag}(e^{w_t})\, S_{t-1} + k_t v_t^\top, \qquad
    y_t = (S_{t-1} + \operatorname{diag}(u)\, k_t v_t^\top)^\top r_t

The output of a token reads the state before it, so the query of a token here is the receptance of the next;
the bonus :math:`u` belongs to the output only. In the terms of
:class:`~statescope.recurrence.Recurrence`: :math:`g = w`, one number per key, and :math:`q_t = r_{t+1}`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescope.adapters.interface import Adapter, Call, refuse_packed
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence


def read_rwkv6(
    _: bool,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Call:
    """Read ``chunk_rwkv6`` or ``fused_recurrent_rwkv6``: a stretch of tokens, or one.

    Shapes as fla passes them: ``r``, ``k`` and the log decay ``w`` (batch, time, heads, key), ``v`` (batch,
    time, heads, value), ``u`` (heads, key), the state (batch, heads, key, value).
    """
    refuse_packed(rest)
    query = r * (r.shape[-1] ** -0.5 if scale is None else scale)
    recurrence = Recurrence(
        q=torch.cat([query[:, 1:], query[:, :1]], 1),
        k=k,
        v=v,
        log_decay=w.float(),
        initial_state=initial_state,
    )

    def answer(output: ScanOutput) -> tuple[Tensor, Tensor | None]:
        assert output.y is not None
        entering = recurrence.start_state(output.y.dtype)
        first = (query[:, 0, :, None].to(entering.dtype) @ entering)[:, None, :, 0]
        bonus = (query * u.to(query.dtype) * k).sum(-1, keepdim=True) * v
        y = torch.cat([first, output.y[:, :-1]], 1) + bonus
        return y.to(v.dtype), output.final_state.float() if output_final_state else None

    return Call(recurrence, answer)


_KIND = ("RWKV-6 of fla", ("RWKV6",), "decay per key", read_rwkv6)

CHUNK_RWKV6 = Adapter("chunk_rwkv6", *_KIND)
RECURRENT_RWKV6 = Adapter("fused_recurrent_rwkv6", *_KIND)
