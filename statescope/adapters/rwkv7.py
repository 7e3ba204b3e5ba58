r"""RWKV-7 (arXiv 2503.14456, eq. 17), as fla runs it: decay per key, and an erase term of its own.

.. math::

    S_t = \operatorname{diag}(e^{w_t})\, S_{t-1} - (\alpha_t \circ \kappa_t)(\kappa_t^\top S_{t-1})
    + k_t v_t^\top, \qquad y_t = S_t^\top r_t

In the terms of :class:`~statescope.recurrence.Recurrence`: :math:`g = w`, one number per key,
:math:`a = \alpha \circ \kappa` and :math:`b = -\kappa`. The paper's state is the transpose of this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from statescope.adapters.gla import plain_call
from statescope.adapters.interface import Adapter, Call, refuse_packed


def read_rwkv7(
    _: bool,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **rest: Any,
) -> Call:
    """Read ``chunk_rwkv7``, in whose terms ``a`` reads the state and ``b`` says where that is written.

    Shapes as fla passes them: all but ``v`` (batch, time, heads, value) are (batch, time, heads, key), the
    state (batch, heads, key, value).
    """
    refuse_packed(rest)
    return plain_call(r, k, v, w, scale, initial_state, output_final_state, False, a=b, b=a)


def read_fused_rwkv7(
    _: bool, r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, **rest: Any
) -> Call:
    """Read ``fused_mul_recurrent_rwkv7``, which is given the erased key and its rate apart."""
    return read_rwkv7(False, r, w, k, v, -kk, kk * a, **rest)


_KIND = ("RWKV-7 of fla", ("RWKV7",), "decay per key, erase term")

CHUNK_RWKV7 = Adapter("chunk_rwkv7", *_KIND, read_rwkv7)
RECURRENT_RWKV7 = Adapter("fused_mul_recurrent_rwkv7", *_KIND, read_fused_rwkv7)
