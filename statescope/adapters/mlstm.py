r"""mLSTM of xLSTM (arXiv 2405.04517, eq. 19-27), a matrix memory with exponential gates and a normaliser.

.. math::

    C_t = f_t C_{t-1} + i_t\, k_t v_t^\top, \quad n_t = f_t n_{t-1} + i_t\, k_t, \quad
    y_t = \frac{C_t^\top q_t}{\max(|n_t^\top q_t|, 1)}, \qquad f_t = \sigma(\tilde f_t),\ i_t = e^{\tilde i_t}

The normaliser is one more column of the state, whose value is always one. In the terms of
:class:`~statescope.recurrence.Recurrence`: :math:`g = \log f_t`, :math:`w = i_t`, :math:`v = (v_t, 1)`, and
the scale of the output in :math:`q`.

The model keeps its state in a frame, :math:`e^{-m_t} (C_t, n_t)` with :math:`m_t = \max(m_{t-1} + \log f_t,
\tilde i_t)`, whose own decay hides what is forgotten. Here the state is that of the equation: the models cap
:math:`\tilde i` (at 15), so that it stays well within the range of floats, and the 1 in the output's
denominator says what is large.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from statescope.adapters.interface import Adapter, Call
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

CAP = 40.0
"""Largest cap of the gates with which the square of a state is a float."""


def read_mlstm(
    _: bool,
    backend: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool | None = None,
    mode: str | None = None,
) -> Call:
    """Read ``xLSTMBackend.forward``: a stretch of tokens, or one.

    Shapes as transformers passes them: ``query`` and ``key`` (batch, heads, time, key), ``value`` (batch,
    heads, time, value), the gates before their activation (batch, heads, time); the three states (batch,
    heads, key, value), (batch, heads, key) and (batch, heads, 1).
    """
    if "train" in (mode or backend.config.mode):
        raise ValueError("model: its config.mode is for training; set config.mode='inference'")
    if (cap := backend.config.gate_soft_cap or math.inf) > CAP:
        raise ValueError(f"model: its config.gate_soft_cap is {cap}; only up to {CAP} its states are floats")
    write, forget = igate.transpose(1, 2).double(), logsigmoid(fgate.transpose(1, 2).double())
    start = torch.zeros_like(write[:, 0]) if m_initial is None else m_initial[..., 0].double()
    state = None
    if c_initial is not None and n_initial is not None:
        state = (torch.cat([c_initial, n_initial[..., None]], 3) * start.exp()[..., None, None]).float()
    recurrence = Recurrence(
        q=query.transpose(1, 2) * query.shape[-1] ** -0.5,
        k=key.transpose(1, 2),
        v=pad(value.transpose(1, 2), (0, 1), value=1.0),
        log_decay=forget.float(),
        write_scale=write.exp().float(),
        initial_state=state,
    )

    def answer(output: ScanOutput) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert output.y is not None
        read, normaliser = output.y[..., :-1], output.y[..., -1:]
        fallen = forget.cumsum(1)
        frames = torch.maximum((write - fallen).cummax(1).values, start[:, None]) + fallen
        y = read / (normaliser.abs().clamp(min=1) + backend.config.eps * frames[..., None].exp())
        last = frames[:, -1, :, None]
        memory = output.final_state * (-last[..., None]).exp()
        states = memory[..., :-1], memory[..., -1], last
        return y.transpose(1, 2).to(value.dtype), tuple(x.float() for x in states)

    return Call(recurrence, answer)


MLSTM = Adapter(
    "mlstm_backend.forward",
    "mLSTM",
    ("xlstm",),
    "decay per head",
    read_mlstm,
    owner="xLSTMLayer",
    note="normaliser as one more column; segments up to max_inference_chunksize",
)
