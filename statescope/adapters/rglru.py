r"""RG-LRU of Griffin (arXiv 2402.19427, eq. 1-4), a gated average for every channel.

.. math::

    h_t = \alpha_t \circ h_{t-1} + \sqrt{1 - \alpha_t^2} \circ (i_t \circ x_t), \qquad
    \alpha_t = e^{-8\, r_t\, \mathrm{softplus}(\Lambda)}, \qquad y_t = h_t

All are vectors over the channels; :data:`~statescope.adapters.mamba1.CHANNELS` of them, side by side, make a
head. In the terms of :class:`~statescope.recurrence.Recurrence`: a state of (key = 1, value = channels),
:math:`g = \log \alpha`, one number per entry, :math:`k = q = 1`, and :math:`v` the gated and scaled input.

transformers keeps the state on the layer itself (:mod:`statescope.lent`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from statescope.adapters.interface import Adapter, Call
from statescope.adapters.mamba1 import channels_of_a_head
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence


def read_rnn_scan(
    _: bool,
    _module: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> Call:
    r"""Read ``RecurrentGemmaRglru._rnn_scan``: a stretch of tokens, or one.

    Shapes as transformers passes them: ``hidden_states`` (already gated and scaled) and ``recurrent_gate``
    (:math:`\alpha`) (batch, time, channel), ``reset`` (batch, time, 1), true where a text begins,
    ``recurrent_states`` (batch, channel). A reset in the middle forgets all but 1e-38 of the state.
    """
    heads = (-1, channels_of_a_head(hidden_states.shape[-1]))
    least = torch.finfo(torch.float32).tiny
    gate = recurrent_gate.float().clamp(min=least)
    later = reset.clone()
    later[:, 0] = False  # what the state before the first token is says the state itself
    state = None
    if recurrent_states is not None:
        state = (recurrent_states.to(acc_dtype) * ~reset[:, 0]).unflatten(1, heads)[:, :, None]
    one = torch.ones(*hidden_states.shape[:2], 1, 1, device=hidden_states.device)
    recurrence = Recurrence(
        q=one,
        k=one,
        v=hidden_states.unflatten(2, heads),
        log_decay=gate.masked_fill(later, least).log().unflatten(2, heads)[:, :, :, None],
        initial_state=state,
    )

    def answer(output: ScanOutput) -> tuple[Tensor, Tensor]:
        assert output.y is not None
        return output.y.flatten(2).to(hidden_states.dtype), output.final_state.flatten(1).to(acc_dtype)

    return Call(recurrence, answer)


RNN_SCAN = Adapter(
    "rg_lru._rnn_scan",
    "RG-LRU",
    ("recurrent_gemma",),
    "decay per entry",
    read_rnn_scan,
    owner="RecurrentGemmaRecurrentBlock",
    note="convolution repaired between segments; the layers' own states are put back",
)
