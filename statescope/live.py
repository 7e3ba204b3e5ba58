"""A model at hand: checked before it is traced, named, and told from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statescope.models import as_device, as_dtype, load


def resolve(model: Any, device: Any = None, dtype: Any = None) -> tuple[nn.Module, str]:
    """Load a model that is given by name, check one that is live; return it and what to call it.

    Raises
    ------
    TypeError, ValueError
        For what is no model, one in training mode, or one elsewhere than asked for; names the argument.
    """
    if isinstance(model, str | Path):
        return load(model, device=device, dtype=dtype), str(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a transformers model (or mamba_ssm's),"
            " a name or a folder"
        )
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")
    places = sorted({str(p.device) for p in model.parameters()})
    if len(places) > 1 or places == ["meta"]:  # "meta": offloaded, or never loaded
        raise ValueError(
            f"model has its weights on {' and '.join(places)}; expected one device that holds them all:"
            " load it without device_map, on a device with room for it, or pass its name and device="
        )
    first = next(model.parameters())
    if device is not None and as_device(device).type != first.device.type:
        raise ValueError(
            f"device={device!r}, but the model is on {first.device}; move the model, or pass its name"
        )
    if dtype is not None and as_dtype(dtype) != first.dtype:
        raise ValueError(f"dtype={dtype!r}, but the model is in {first.dtype}; convert it, or pass its name")
    return model, str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's state; torch's quantised layers pack theirs."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield name, value.dequantize() if value.is_quantized else value
        elif isinstance(value, tuple | list):
            yield from _tensors({f"{name}.{i}": part for i, part in enumerate(value)})


def digest(model: nn.Module) -> Callable[[], str]:
    """Begin to hash a sample of every weight, with one transfer from the device, and return what ends it."""
    weights = dict(_tensors(model.state_dict()))
    samples: dict[torch.dtype, list[Tensor]] = {}
    for w in weights.values():
        samples.setdefault(w.dtype, []).append(w.detach().flatten()[:: max(1, w.numel() // 64)])
    sampled = torch.cat([torch.cat(parts).double() for parts in samples.values()])
    host = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=sampled.is_cuda)
    host.copy_(sampled, non_blocking=True)
    arrived = torch.cuda.Event() if sampled.is_cuda else None
    if arrived is not None:
        arrived.record()

    def end() -> str:
        if arrived is not None:
            arrived.synchronize()
        hashed = hashlib.sha256(host.numpy().tobytes())
        hashed.update(repr([(name, tuple(w.shape), w.dtype) for name, w in weights.items()]).encode())
        return hashed.hexdigest()

    return end


def settings_of(model: nn.Module) -> str:
    """Write a live model's configuration as JSON: transformers' own, or mamba_ssm's dataclass."""
    config: Any = model.config
    if hasattr(config, "to_json_string"):
        return str(config.to_json_string())
    return json.dumps(vars(config), sort_keys=True, default=str)
