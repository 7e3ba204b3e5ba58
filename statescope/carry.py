"""What a trace carries from one segment to the next, and how it is kept at a commit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from transformers import DynamicCache

CACHE_KEYWORDS = ("cache_params", "past_key_values")
"""Names under which transformers models take their cache."""


def cache_keyword(model: nn.Module) -> str:
    """Name of the model's cache argument.

    Raises
    ------
    ValueError
        If the model takes none, so that a text cannot be read in segments.
    """
    parameters = inspect.signature(model.forward).parameters
    for keyword in CACHE_KEYWORDS:
        if keyword in parameters:
            return keyword
    raise ValueError(
        f"model is a {type(model).__name__}, which takes no cache ({' or '.join(CACHE_KEYWORDS)})"
    )


@dataclass
class Carry:
    """Everything the next segment needs from those before it.

    Attributes
    ----------
    cache : DynamicCache
        The model's own cache: convolution and recurrent states, keys and values of attention layers.
    position : int
        Tokens read so far.
    pending_loss : Tensor or None, (batch,)
        Loss of predicting the next token, known before that token is read.
    log_decay : dict of int to Tensor, (batch, heads), float64
        By layer, the sum of the log decay so far.
    probe_states, probe_decays : dict of (int, int) to Tensor
        By layer and probe: the state there and the sum of the log decay up to it, from a reading ahead.
    """

    cache: DynamicCache
    position: int = 0
    pending_loss: Tensor | None = None
    log_decay: dict[int, Tensor] = field(default_factory=dict)
    probe_states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    probe_decays: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def fresh(cls, model: nn.Module) -> Carry:
        """Start before the first token."""
        config: Any = model.config
        return cls(cache=DynamicCache(config=config))

    def freeze(self) -> Callable[[], bytes]:
        """Copy what is there now; calling the result writes it as safetensors, exact and free of code."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {"position": self.position}
        for i, layer in enumerate(self.cache.layers):
            plain[f"cache/{i}"] = {}
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    tensors[f"cache/{i}/{name}"] = value
                elif isinstance(value, dict):
                    held = {k: v for k, v in value.items() if isinstance(v, Tensor)}
                    tensors |= {f"cache/{i}/{name}/{k}": v for k, v in held.items()}
                    plain[f"cache/{i}"][name] = {k: v for k, v in value.items() if k not in held}
                elif isinstance(value, torch.dtype):
                    plain[f"cache/{i}"][name] = {"torch": str(value).removeprefix("torch.")}
                elif isinstance(value, torch.device):
                    plain[f"cache/{i}"][name] = {"device": value.type}
                else:
                    plain[f"cache/{i}"][name] = value
        if self.pending_loss is not None:
            tensors["pending_loss"] = self.pending_loss
        tensors |= {f"log_decay/{layer}": t for layer, t in self.log_decay.items()}
        for name in ("probe_states", "probe_decays"):
            tensors |= {f"{name}/{layer}/{p}": t for (layer, p), t in getattr(self, name).items()}
        frozen = {
            name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
        }
        return lambda: save_safetensors(frozen, metadata={"plain": json.dumps(plain)})

    def to_bytes(self) -> bytes:
        """Write what is there now; see :meth:`freeze`."""
        return self.freeze()()

    @classmethod
    def from_bytes(cls, data: bytes, model: nn.Module, device: torch.device) -> Carry:
        """Read back what :meth:`to_bytes` wrote."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        plain = json.loads(header["__metadata__"]["plain"])
        tensors = {name: t.to(device) for name, t in load_safetensors(data).items()}
        carry = cls.fresh(model)
        carry.position = plain["position"]
        carry.pending_loss = tensors.pop("pending_loss", None)
        layers: list[Any] = carry.cache.layers
        for i, layer in enumerate(layers):
            for name, value in plain[f"cache/{i}"].items():
                setattr(layer, name, _plain(value, device))
        for name, tensor in tensors.items():
            kind, *path = name.split("/")
            if kind == "cache":
                _restore(layers[int(path[0])], path[1:], tensor)
            elif kind == "log_decay":
                carry.log_decay[int(path[0])] = tensor
            else:
                getattr(carry, kind)[int(path[0]), int(path[1])] = tensor
        return carry


def _restore(layer: Any, path: list[str], tensor: Tensor) -> None:
    if len(path) == 1:
        setattr(layer, path[0], tensor)
    else:
        getattr(layer, path[0])[int(path[1])] = tensor


def _plain(value: Any, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    if "device" in value:
        return device
    return getattr(torch, value["torch"]) if "torch" in value else {int(k): v for k, v in value.items()}
