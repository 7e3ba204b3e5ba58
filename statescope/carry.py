"""What a trace carries from one segment to the next, and how it is kept at a commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from statescope import caches

AHEAD = ("probe_states", "probe_queries", "probe_decays", "maps", "probe_maps")
"""What a reading ahead finds."""


@dataclass
class Carry:
    """Everything the next segment needs from those before it.

    Attributes
    ----------
    cache : statescope.caches.Cache
        The model's cache: convolution and recurrent states, keys and values of attention layers.
    position : int
        Tokens read so far.
    pending_loss : Tensor or None, (batch,)
        Loss of predicting the next token, known before that token is read.
    log_decay : dict of int to Tensor, (batch, heads[, key[, value]]), float64
        By layer, the sum of the log decay so far.
    probe_states, probe_queries, probe_decays : dict of (int, int) to Tensor
        By layer and probe: the state there, the query (batch, groups, key) and the sum of the log decay up to
        it, from a reading ahead.
    maps, probe_maps : dict of (int, int) to Tensor, (batch, heads, key, key)
        In the place of decays where the recurrence erases, from a reading ahead: by layer and first token how
        a segment maps the state; by layer and probe how the tokens from its segment's first one do.
    """

    cache: caches.Cache
    position: int = 0
    pending_loss: Tensor | None = None
    log_decay: dict[int, Tensor] = field(default_factory=dict)
    probe_states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    probe_queries: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    probe_decays: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    probe_maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def fresh(cls, model: nn.Module) -> Carry:
        """Start before the first token."""
        return cls(cache=caches.fresh(model))

    def freeze(self) -> Callable[[], bytes]:
        """Copy what is there now; calling the result writes it as safetensors, exact and free of code."""
        held, described = caches.unpack(self.cache)
        tensors = {f"cache/{path}": t for path, t in held.items()}
        plain: dict[str, Any] = {"position": self.position, "cache": described}
        if self.pending_loss is not None:
            tensors["pending_loss"] = self.pending_loss
        tensors |= {f"log_decay/{layer}": t for layer, t in self.log_decay.items()}
        for name in AHEAD:
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
        held: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            kind, path = name.split("/", 1)
            if kind == "cache":
                held[path] = tensor
            elif kind == "log_decay":
                carry.log_decay[int(path)] = tensor
            else:
                layer, p = path.split("/")
                getattr(carry, kind)[int(layer), int(p)] = tensor
        caches.restore(carry.cache, held, plain["cache"], device)
        return carry
