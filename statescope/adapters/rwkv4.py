r"""RWKV-4 (arXiv 2305.13048, eq. 16 and its stable form, appendix D): an average that forgets, per channel.

.. math::

    a_t = e^{-w} a_{t-1} + e^{k_t} v_t, \qquad b_t = e^{-w} b_{t-1} + e^{k_t}, \qquad
    y_t = \frac{a_{t-1} + e^{u + k_t} v_t}{b_{t-1} + e^{u + k_t}}

Everything is one number per channel: the value, and beside it a one that counts what is averaged. The bonus
:math:`u` belongs to the output only.

:math:`a` and :math:`b` themselves leave the range of floats, and mean nothing apart. As the model does, the
state is kept in the frame of its loudest surviving write, :math:`e^{-m_t} (a_t, b_t)` with
:math:`m_t = \max(m_{t-1} - w, k_t)`: that write counts 1, and the denominator is how many such writes the
average is made of. The frame depends on nothing but the tokens read so far, and is carried with the state, so
that it is the same wherever a text is cut. In the terms of :class:`~statescope.recurrence.Recurrence`:
:data:`~statescope.adapters.mamba1.CHANNELS` channels make a head with a state of (key = 1, value = channels
of :math:`a`, then the same of :math:`b`), :math:`g = m_{t-1} - w - m_t` for either (a louder write makes all
before it smaller; the first token has nothing before it, and :math:`-w`), :math:`k = 1` and
:math:`v = e^{k_t - m_t} (v_t, 1)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statescope.adapters.interface import Adapter, Call
from statescope.adapters.mamba1 import channels_of_a_head
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

EMPTY = -1e29
"""The frame of an empty state is below this: transformers begins at -1e30 or -1e38."""


def read_linear_attention(
    _: bool,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,
    return_state: bool = False,
) -> Call:
    """Read ``rwkv_linear_attention``: a stretch of tokens, or one.

    Shapes as transformers passes them: ``key`` and ``value`` (batch, time, channel), ``time_decay`` (the log
    of :math:`w`) and ``time_first`` (:math:`u`) (channel,), ``state`` the three tensors numerator,
    denominator and frame, each (batch, channel) in float32.
    """
    keys, rate = key.double(), -time_decay.double().exp()
    entering = None if state is None else state[2].double()
    before, frame = _frames(keys, rate, entering)
    scale = (keys - frame).exp()
    written = torch.stack([scale * value.double(), scale], 2)  # batch, time, (a, b), channel
    size = channels_of_a_head(key.shape[-1])

    def to_heads(x: Tensor) -> Tensor:
        """(..., (a, b), channel) to (..., head, value)."""
        return x.unflatten(-1, (-1, size)).transpose(-3, -2).flatten(-2).float()

    def to_channels(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.unflatten(-1, (2, size)).transpose(-3, -2).flatten(-2).unbind(-2)
        return a, b

    initial = None if state is None else to_heads(torch.stack(list(state[:2]), 1))[:, :, None]
    one = torch.ones(*key.shape[:2], 1, 1, device=key.device)
    decay = before + rate - frame
    recurrence = Recurrence(
        q=one,
        k=one,
        v=to_heads(written),
        log_decay=to_heads(torch.stack([decay, decay], 2))[:, :, :, None],
        initial_state=initial,
    )

    def answer(output: ScanOutput) -> Any:
        assert output.y is not None
        start = recurrence.start_state(output.y.dtype)[:, :, 0]
        a, b = to_channels(torch.cat([start[:, None], output.y[:, :-1]], 1))  # the states before each token
        own = keys + time_first.double()
        loudest = torch.maximum(before, own)
        old, new = (before - loudest).exp(), (own - loudest).exp()
        y = ((old * a + new * value) / (old * b + new)).to(key.dtype)
        if not return_state and state is None:
            return y, None
        return y, [x.float() for x in (*to_channels(output.final_state[:, :, 0]), frame[:, -1])]

    return Call(recurrence, answer)


def _frames(keys: Tensor, rate: Tensor, entering: Tensor | None) -> tuple[Tensor, Tensor]:
    """The frame before and after every token, (batch, time, channel); ``rate`` is the log decay."""
    start = keys[:, 0] if entering is None else torch.where(entering < EMPTY, keys[:, 0], entering)
    tokens = torch.arange(keys.shape[1], device=keys.device, dtype=keys.dtype)[:, None]
    fallen = rate * (tokens + 1)  # what a frame loses from before the first token until after each
    loudest = torch.maximum((keys - fallen).cummax(1).values, start[:, None])
    frames = loudest + fallen
    return torch.cat([start[:, None], frames[:, :-1]], 1), frames


LINEAR_ATTENTION = Adapter(
    "rwkv_linear_attention",
    "RWKV-4",
    ("rwkv",),
    "decay per entry",
    read_linear_attention,
    note="state in the frame of its loudest surviving write; single tokens of one sequence only",
)
