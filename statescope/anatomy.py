"""What there is to record of a model: how many recurrent layers, of which shape and structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from statescope import caches
from statescope.adapters import Call
from statescope.capture import capture, mixers
from statescope.scan import choose


class Anatomy(NamedTuple):
    """The recurrent layers of a model, all of one shape."""

    layers: tuple[int, ...]
    heads: int
    key: int
    value: int
    structure: str
    backend: str


_surveyed: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Anatomy]] = WeakKeyDictionary()
"""What :func:`survey` found: many texts are read with one model."""


def survey(model: nn.Module, ids: Tensor, backend: str) -> Anatomy:
    """Find what there is to record by reading one token.

    Parameters
    ----------
    model : nn.Module
        The model.
    ids : Tensor, (batch, time)
        A text it can read; the first token of it is read.
    backend : str
        As given to ``trace``; the kernel it leads to is part of the answer.

    Raises
    ------
    ValueError
        If there is no recurrent layer, or the layers differ in shape.
    """
    expected = mixers(model)
    first = next(model.parameters())
    asked = (backend, first.device, first.dtype, tuple(map(id, expected.values())))
    known = _surveyed.setdefault(model, {})
    if asked in known:
        return known[asked]
    found: dict[int, tuple[int, int, int, str, str]] = {}

    def note(layer: int, call: Call, run_own: Callable[[], Any]) -> Any:
        r = call.recurrence
        kernel = choose(r, "auto" if backend == "model" else backend)
        found[layer] = (r.heads, r.key, r.value, r.structure, kernel)
        return run_own()

    with torch.no_grad(), capture(model, note):
        output = model(ids[:1, :1], **caches.inputs_alone(model))
    if not hasattr(output, "logits"):
        raise ValueError(
            f"model is a {type(model).__name__}, which gives no logits; pass the whole causal language model"
        )
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"model: layers {missing} did not call their scan; is it in evaluation mode?")
    if len(set(found.values())) > 1:
        raise ValueError(f"model: its recurrent layers differ in (heads, key, value): {found}; choose layers")
    known[asked] = Anatomy(tuple(expected), *next(iter(found.values())))
    return known[asked]
