"""Layers that keep their state on themselves are lent that of the cache they are called with.

transformers' recurrent_gemma keeps the last inputs of its convolution and the recurrent state as attributes
of every layer, whoever's text it was that was read last, and where it reads on by more than one token, its
convolution starts from zeros as at the start of a text. While a capture is active, every pass begins with
what the cache holds for the layer and ends there, the convolution reads what came before, and the layer's
own attributes are put back as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Visit:
    """One forward pass through a layer."""

    kept: dict[str, Tensor]  # what the cache's layer holds for us
    own: tuple[Tensor | None, Tensor | None]  # the layer's attributes, to be put back
    inputs: Tensor | None  # of the convolution, from before; None at the start of a text
    last: Tensor | None = None  # the same from before the next pass, once the convolution ran


def keeps_itself(layer: nn.Module) -> bool:
    """Whether a layer keeps its state on itself."""
    return hasattr(layer, "rg_lru") and hasattr(layer, "conv1d_state")


@contextmanager
def lent(layer: Any, index: int) -> Iterator[None]:
    """While active, a layer's states are those of the cache it is called with.

    Parameters
    ----------
    layer : nn.Module
        A layer that :func:`keeps_itself`.
    index : int
        Its place in the cache.
    """
    visits: list[_Visit] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        kept: dict[str, Tensor] = {}
        if cache is not None and kwargs.get("use_cache"):  # whatever kind of layer the cache has there
            kept = vars(cache.layers[index]).setdefault("lent", kept)
        own = (layer.conv1d_state, layer.rg_lru.recurrent_states)
        inputs, state = kept.get("inputs"), kept.get("state")
        visits.append(_Visit(kept, own, inputs))
        layer.conv1d_state, layer.rg_lru.recurrent_states = inputs, state

    def leave(*_: Any) -> None:
        visit = visits.pop()
        visit.kept["inputs"] = layer.conv1d_state if visit.last is None else visit.last
        visit.kept["state"] = layer.rg_lru.recurrent_states
        layer.conv1d_state, layer.rg_lru.recurrent_states = visit.own

    def extend(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not visits or visits[-1].inputs is None:
            return None
        joined = torch.cat([visits[-1].inputs.to(args[0].dtype), args[0]], -1)
        visits[-1].last = joined[..., -visits[-1].inputs.shape[-1] :]
        return (joined, *args[1:])

    def drop(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        before = visits[-1].inputs if visits else None
        return None if before is None else output[..., before.shape[-1] :]

    hooks = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave, always_call=True),
        layer.conv_1d.register_forward_pre_hook(extend),
        layer.conv_1d.register_forward_hook(drop),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while visits:  # an interrupt passes by the hooks
            leave()
