"""How each kind of model carries its state from one forward pass to the next.

transformers' models fill a ``DynamicCache``, but for rwkv and xlstm, which write into tensors they are handed
(:class:`StateTensors`); mamba_ssm's an ``InferenceParams``, for which
:class:`~statescope.inference.InferenceCache` stands.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from statescope.capture import mixers
from statescope.inference import InferenceCache


@dataclass(eq=False)
class StateTensors:
    """States that a model is handed as tensors and writes into, by name; empty before the first token."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    closed: bool = False  # a token was read without them, and nothing can follow


Cache = DynamicCache | InferenceCache | StateTensors

OF_ALL_LAYERS = ("linear_cache", "position_ids")
"""Where caches keep what belongs to no layer alone: MiniMax's states; qwen4_exp's positions, until 5.17."""

BY_SINGLE_TOKENS = {"fla.layers.mamba", "fla.layers.mamba3"}
"""Modules whose layers refuse to go on by several tokens."""

KEYWORDS = ("cache_params", "past_key_values", "inference_params", "state")
"""Names under which models take their cache; the last but one is mamba_ssm's, the last rwkv's."""


def keyword(model: nn.Module) -> str:
    """Name of the model's cache argument.

    Raises
    ------
    ValueError
        If the model takes none, so that a text cannot be read in segments.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in KEYWORDS:
        if name in parameters:
            return name
    raise ValueError(f"model is a {type(model).__name__}, which takes no cache ({' or '.join(KEYWORDS)})")


def fresh(model: nn.Module) -> Cache:
    """Make the cache with which a text begins."""
    if keyword(model) == "inference_params":
        return InferenceCache()
    config: Any = model.config
    if type(model).__module__.startswith("fla."):
        of_fla: DynamicCache = sys.modules["fla.models.cache_utils"].Cache()
        return of_fla
    if getattr(config, "model_type", None) in ("rwkv", "xlstm"):
        return StateTensors()
    cache = DynamicCache(config=config)
    own: Any = getattr(sys.modules[type(model).__module__], "MiniMaxCache", None)
    return cache if own is None else _cache_of_minimax(own(), cache)


def _cache_of_minimax(own: Any, typical: DynamicCache) -> DynamicCache:
    """Tell MiniMax's cache from the start which of its layers attend.

    It takes the first layer for one that does; where that has a state instead, transformers would mask the
    attention of all segments but the first as if nothing came before.
    """
    own.layers, own.linear_cache = typical.layers, [None] * len(typical.layers)
    made: DynamicCache = own
    return made


def inputs(model: nn.Module, cache: Cache, start: int, ids: Tensor) -> dict[str, Any]:
    """Arguments of the forward pass that reads ``ids``, (batch, time), from token ``start`` on."""
    name, stop = keyword(model), start + ids.shape[1]
    if isinstance(cache, InferenceCache):
        cache.max_seqlen = stop
        return {name: cache}
    if isinstance(cache, StateTensors):
        of = _inputs_of_rwkv if name == "state" else _inputs_of_xlstm
        return of(model, cache, ids)
    given: dict[str, Any] = {name: cache, "use_cache": True}
    takes = inspect.signature(model.forward).parameters
    if name == "past_key_values" and "position_ids" in takes:  # attention layers must know where they are
        given["position_ids"] = torch.arange(start, stop, device=ids.device).expand(ids.shape)
    return given


def _inputs_of_rwkv(model: Any, cache: StateTensors, ids: Tensor) -> dict[str, Any]:
    """Hand the five states over: last inputs of both mixers, numerator, denominator and frame.

    transformers takes the last inputs of several sequences for several tokens where one token is read.
    """
    settings, table = model.config, model.get_input_embeddings().weight
    if ids.shape[1] == 1 and len(ids) > 1:
        if cache.tensors or cache.closed:
            raise ValueError(
                f"model is a {type(model).__name__}, which cannot go on by one token of several sequences;"
                " pass the sequences one by one"
            )
        cache.closed = True
        return {"use_cache": False}  # a text of one token
    if cache.closed:
        raise ValueError("segment: the first has one token of several sequences; make it longer")
    if not cache.tensors:
        shape, empty = (len(ids), settings.hidden_size, settings.num_hidden_layers), (0, 0, 0, 0, -1e30)
        kinds = (table.dtype, table.dtype, torch.float32, torch.float32, torch.float32)
        cache.tensors = {
            str(i): torch.full(shape, start, dtype=kind, device=ids.device)
            for i, (start, kind) in enumerate(zip(empty, kinds, strict=True))
        }
    return {"state": [cache.tensors[str(i)] for i in range(5)], "use_cache": True}


def _inputs_of_xlstm(model: Any, cache: StateTensors, ids: Tensor) -> dict[str, Any]:
    """Hand over, for every layer, memory, normaliser and frame."""
    settings, longest = model.config, model.config.max_inference_chunksize
    if ids.shape[1] > longest:
        raise ValueError(
            f"segment: the model reads at most {longest} tokens at once (its max_inference_chunksize);"
            f" pass segment={longest} or less"
        )
    if not cache.tensors:
        heads = (len(ids), settings.num_heads)
        shapes = ((settings.qk_head_dim, settings.v_head_dim), (settings.qk_head_dim,), (1,))
        kind = model.get_input_embeddings().weight.dtype  # in no other the model multiplies them
        cache.tensors = {
            f"{layer}/{i}": torch.zeros(*heads, *shape, device=ids.device, dtype=kind)
            for layer in range(settings.num_hidden_layers)
            for i, shape in enumerate(shapes)
        }
    states = {
        layer: tuple(cache.tensors[f"{layer}/{i}"] for i in range(3))
        for layer in range(settings.num_hidden_layers)
    }
    offset = torch.zeros(1, dtype=torch.int64, device=ids.device)
    return {"cache_params": SimpleNamespace(rnn_state=states, seqlen_offset=offset), "use_cache": True}


def only_last(model: nn.Module) -> dict[str, int]:
    """Arguments that ask for the logits of the last token only."""
    return {"num_last_tokens" if keyword(model) == "inference_params" else "logits_to_keep": 1}


def inputs_alone(model: nn.Module) -> dict[str, Any]:
    """Arguments of a forward pass with nothing before or after it.

    mamba_ssm's mixers call their scan by its name only where states are to be kept.
    """
    names = inspect.signature(model.forward).parameters
    return {"inference_params": InferenceCache()} if "inference_params" in names else {"use_cache": False}


def longest_pass(model: nn.Module) -> int:
    """Tokens of one segment that a model takes in one pass, one more included; xlstm cuts longer ones."""
    return int(getattr(model.config, "max_inference_chunksize", sys.maxsize)) - 1


def refuse_segments(model: nn.Module) -> None:
    """Refuse a model that can only read a text in one pass.

    Raises
    ------
    ValueError
        If it has attention layers of mamba_ssm: these go on by single tokens, and in torch's attention not
        even then with a mask that fits; or layers of fla that call mamba_ssm's scans, and go on by single
        tokens too. Names ``segment``.
    """
    reason = None
    if {type(mixer).__module__ for mixer in mixers(model).values()} & BY_SINGLE_TOKENS:
        reason = "layers that go on from an earlier segment by single tokens only"
    elif keyword(model) == "inference_params":
        depths = {int(m.layer_idx) for m in model.modules() if hasattr(m, "layer_idx")}  # type: ignore[arg-type]
        others = sorted(depths - set(mixers(model)))
        reason = (
            f"attention at layers {others}, which cannot go on from an earlier segment" if others else None
        )
    if reason is not None:
        raise ValueError(
            f"model is a {type(model).__name__} with {reason}; pass segment= the length of the text, so that"
            " it is read in one"
        )


def unpack(cache: Cache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take a cache apart: its tensors by path, and by layer all else as JSON can hold it."""
    tensors: dict[str, Tensor] = {}
    if isinstance(cache, InferenceCache):
        for depth, kept in cache.key_value_memory_dict.items():
            tensors |= {f"{depth}/{i}": x for i, x in enumerate(kept)}
        return tensors, {}
    if isinstance(cache, StateTensors):
        return dict(cache.tensors), {}
    layers = [_take_apart(vars(layer), f"{i}", tensors) for i, layer in enumerate(cache.layers)]
    shared = {name: getattr(cache, name) for name in OF_ALL_LAYERS if hasattr(cache, name)}
    return tensors, {"layers": layers, "shared": _take_apart(shared, "shared", tensors)}


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of nested containers aside, by path; return all else as JSON can hold it."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[k, _take_apart(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_take_apart(v, f"{path}/{k}", tensors) for k, v in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    return {"device": value.type} if isinstance(value, torch.device) else value


def _put_together(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {k: _put_together(v, tensors, device) for k, v in held}
    if kind in ("tuple", "list"):
        parts = [_put_together(v, tensors, device) for v in held]
        return tuple(parts) if kind == "tuple" else parts
    return device if kind == "device" else getattr(torch, held)


def restore(cache: Cache, tensors: dict[str, Tensor], plain: dict[str, Any], device: torch.device) -> None:
    """Fill a fresh cache with what :func:`unpack` gave; the tensors are on the device already."""
    if isinstance(cache, InferenceCache):
        for path in sorted(tensors, key=lambda path: [int(part) for part in path.split("/")]):
            depth, kept = int(path.split("/")[0]), cache.key_value_memory_dict
            kept[depth] = (*kept.get(depth, ()), tensors[path])
        return
    if isinstance(cache, StateTensors):
        cache.tensors = dict(tensors)
        return
    layers: list[Any] = cache.layers
    while len(layers) < len(plain["layers"]):  # fla's cache makes them when they are first written
        layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    for layer, described in zip(layers, plain["layers"], strict=True):
        vars(layer).update(_put_together(described, tensors, device))
    vars(cache).update(_put_together(plain["shared"], tensors, device))
