r"""Mamba-2 (:mod:`statescope.adapters.mamba2`) as fla's layer runs it.

fla's layer scans inside one of two methods, in torch, or with the kernels of mamba_ssm where there are any,
between its convolution and its norm: projection and convolution are run once more here, by the layer's own
weights. Where a text goes on, both methods read a single token. Several are given to them one by one; our own
scan (``backend="chunked"``) reads them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from statescope.adapters.interface import Adapter, Call
from statescope.adapters.mamba2 import read_chunk_scan
from statescope.kernels.interface import ScanOutput

States = dict[str, Tensor]
"""``conv_state``, (batch, channel, d_conv), and ``recurrent_state``, (batch, heads, head_dim, d_state)."""

Answer = tuple[Tensor, Tensor | None, Tensor]
"""Output of the layer, last inputs of the convolution, state."""


def read_layer(
    in_torch: bool,
    _: bool,
    layer: Any,
    hidden_states: Tensor,
    last_state: States | None = None,
    use_cache: bool = False,
    attention_mask: Tensor | None = None,
) -> Call:
    """Read ``Mamba2.torch_forward`` or ``cuda_kernels_forward``: a stretch of tokens, or one.

    ``hidden_states`` is (batch, time, hidden).
    """
    if attention_mask is not None:
        raise ValueError("the model was called with an attention_mask; trace texts without padding")
    if in_torch and 1 < layer.n_groups < layer.num_heads:
        raise ValueError(
            f"the model's Mamba-2 has n_groups={layer.n_groups}, which fla's torch code deals out to heads in"
            " one order where a text begins and in another where it goes on; it needs a GPU with mamba_ssm"
        )
    widths = [layer.intermediate_size, layer.conv_dim, layer.num_heads]
    gate, inputs, dt = layer.in_proj(hidden_states).split(widths, -1)
    before = inputs.new_zeros(len(inputs), layer.conv_dim, layer.conv_kernel_size)
    if last_state is not None:
        before = last_state["conv_state"].to(inputs.dtype)
    inputs = torch.cat([before, inputs.transpose(1, 2)], -1)
    x, scan = _scan(layer, in_torch, inputs[..., 1:], dt, last_state)

    def answer(output: ScanOutput) -> Answer:
        y, state = scan.answer(output)
        if layer.D_has_hdim:
            y = y + (layer.D.unflatten(0, (-1, layer.head_dim)) * x).to(y.dtype)
        y = y.flatten(2)
        y = layer.norm(y, gate) if layer.rmsnorm else y * layer.act(gate)
        kept = inputs[..., -layer.conv_kernel_size :] if use_cache or last_state is not None else None
        return layer.out_proj(y.to(hidden_states.dtype)), kept, state

    goes_on = last_state is not None and hidden_states.shape[1] > 1
    one_by_one = partial(_one_by_one, hidden_states, last_state, use_cache)
    return Call(scan.recurrence, answer, own=one_by_one if goes_on else None)


def _scan(
    layer: Any, in_torch: bool, inputs: Tensor, dt: Tensor, last_state: States | None
) -> tuple[Tensor, Call]:
    """Convolve, and make of it values and the call of a scan; a skip for every channel is no part of it."""
    mixed = conv1d(inputs, layer.conv1d.weight, layer.conv1d.bias, groups=layer.conv_dim)
    shared = layer.n_groups * layer.ssm_state_size
    x, B, C = layer.act(mixed).transpose(1, 2).split([layer.intermediate_size, shared, shared], -1)
    x = x.unflatten(-1, (-1, layer.head_dim))
    return x, read_chunk_scan(
        in_torch,
        x,
        dt,
        -layer.A_log.float().exp(),
        B.unflatten(-1, (layer.n_groups, -1)),
        C.unflatten(-1, (layer.n_groups, -1)),
        layer.chunk_size,
        D=None if layer.D_has_hdim else layer.D,
        dt_bias=layer.dt_bias,
        initial_states=None if last_state is None else last_state["recurrent_state"],
        dt_softplus=True,
        dt_limit=layer.dt_limit,
        return_final_states=True,
    )


def _one_by_one(
    hidden_states: Tensor, last: States | None, use_cache: bool, own: Callable[..., Answer]
) -> Answer:
    parts = []
    for token in hidden_states.split(1, 1):
        y, inputs, state = own(token, last, use_cache, None)
        assert inputs is not None
        last = {"conv_state": inputs, "recurrent_state": state}
        parts.append(y)
    return torch.cat(parts, 1), inputs, state


_KIND = ("Mamba-2 of fla", ("Mamba2",), "decay per head")
_OWNER = "fla.layers.mamba2.Mamba2"
_NOTE = "the model's own scan goes on token by token"

IN_TORCH = Adapter("torch_forward", *_KIND, partial(read_layer, True), owner=_OWNER, note=_NOTE)
IN_KERNELS = Adapter("cuda_kernels_forward", *_KIND, partial(read_layer, False), owner=_OWNER, note=_NOTE)
