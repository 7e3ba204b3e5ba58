r"""Mamba-2 (arXiv 2405.21060, eq. 1-2, with the discretisation of its listing 1).

.. math::

    h_t = e^{\Delta_t A} h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = h_t C_t + D x_t

In the terms of :class:`~statescope.recurrence.Recurrence`: :math:`g = \Delta A`, :math:`w = \Delta`,
:math:`k = B`, :math:`v = x`, :math:`q = C`, :math:`d = D`. The models keep ``h`` as (head_dim,
d_state); it is transposed here, once, to (key = d_state, value = head_dim).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from statescope.adapters.interface import Adapter, Call
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

MODELS = ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2")


def read_chunk_scan(
    mirror_dtype: bool,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    z: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Call:
    """Read ``mamba2_chunk_scan``: a stretch of tokens.

    Shapes as transformers passes them: ``hidden_states`` (batch, time, heads, head_dim), ``dt``
    (batch, time, heads), ``A``, ``D``, ``dt_bias`` (heads,), ``B``, ``C`` (batch, time, groups, d_state),
    ``initial_states`` (batch, heads, head_dim, d_state).
    """
    if seq_idx is not None:
        raise ValueError("the model was called with packed sequences (seq_idx); trace them one by one")
    step = _step_size(dt, dt_bias, dt_softplus, dt_limit, mirror_dtype)
    recurrence = Recurrence(
        q=C,
        k=B,
        v=hidden_states,
        log_decay=step * A.float(),
        write_scale=step,
        initial_state=None if initial_states is None else initial_states.transpose(-2, -1),
        skip=None if D is None else D.float(),
    )

    def answer(output: ScanOutput) -> Any:
        assert output.y is not None
        y = output.y if z is None else output.y * silu(z.to(output.y.dtype))
        # transformers' torch scan answers in float32, the fused one in the model's dtype.
        y = y.to(torch.float32 if mirror_dtype else hidden_states.dtype)
        state = output.final_state.transpose(-2, -1).to(torch.float32, memory_format=torch.contiguous_format)
        return (y, state) if return_final_states else y

    return Call(recurrence, answer)


def read_chunk_scan_combined(
    _: bool,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Call:
    """Read ``mamba_chunk_scan_combined`` of mamba_ssm: a stretch of tokens.

    Shapes as for :func:`read_chunk_scan`; the gate ``z`` (batch, time, heads, head_dim); ``D`` (heads,) or
    (heads, head_dim). It always works in float32 and answers in the dtype of ``x``.
    """
    if cu_seqlens is not None or return_varlen_states:
        raise ValueError("the model was called with packed sequences (cu_seqlens); trace them one by one")
    per_channel = D is not None and D.ndim == 2
    call = read_chunk_scan(
        False,
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None if per_channel else D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        z=z,
        seq_idx=seq_idx,
    )
    return Call(call.recurrence, _refuse_answer) if per_channel else call


def _refuse_answer(_: ScanOutput) -> Any:
    raise ValueError(
        "model has a skip D for every channel (D_has_hdim), which our scan has not; let the model's own scan"
        " compute the outputs: backend='auto', no edit"
    )


def read_state_update(
    mirror_dtype: bool,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> Call:
    """Read ``mamba2_selective_state_update``: one token, the state updated in place.

    Shapes as transformers passes them: ``state`` (batch, heads, head_dim, d_state), ``hidden_states``
    and ``dt`` (batch, heads, head_dim), ``A`` (heads, head_dim, d_state), ``D`` and ``dt_bias``
    (heads, head_dim), ``B`` and ``C`` (batch, groups, d_state); all but ``hidden_states``, ``state``,
    ``B`` and ``C`` are one number per head, expanded.
    """
    bias = None if dt_bias is None else dt_bias[:, 0]
    step = _step_size(dt[:, None, :, 0], bias, dt_softplus, (0.0, math.inf), mirror_dtype)
    recurrence = Recurrence(
        q=C[:, None],
        k=B[:, None],
        v=hidden_states[:, None],
        log_decay=step * A[:, 0, 0].float(),
        write_scale=step,
        initial_state=state.transpose(-2, -1),
        skip=None if D is None else D[:, 0].float(),
    )

    def answer(output: ScanOutput) -> Tensor:
        assert output.y is not None
        state.copy_(output.final_state.transpose(-2, -1))
        y = output.y[:, 0].to(hidden_states.dtype)
        return y if z is None else y * silu(z)

    return Call(recurrence, answer)


def _step_size(
    dt: Tensor, bias: Tensor | None, use_softplus: bool, limit: tuple[float, float], mirror_dtype: bool
) -> Tensor:
    dt = dt if mirror_dtype else dt.float()
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = softplus(dt) if use_softplus else dt
    return dt if limit == (0.0, math.inf) and use_softplus else torch.clamp(dt, *limit)


CHUNK_SCAN_COMBINED = Adapter(
    "mamba_chunk_scan_combined",
    "Mamba-2 of mamba_ssm",
    ("MambaLMHeadModel with layer Mamba2",),
    "decay per head",
    read_chunk_scan_combined,
    note="with attention layers in one segment only",
)
_KIND = ("Mamba-2 of transformers", MODELS, "decay per head")

CHUNK_SCAN = Adapter("mamba2_chunk_scan", *_KIND, read_chunk_scan)
STATE_UPDATE = Adapter("mamba2_selective_state_update", *_KIND, read_state_update)
