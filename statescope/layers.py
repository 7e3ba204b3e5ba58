"""Which layers of a model have a recurrent state, and through what their scans are called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from statescope.adapters import ADAPTERS


def mixers(model: nn.Module) -> dict[int, nn.Module]:
    """Find the recurrent mixers of a model.

    Parameters
    ----------
    model : nn.Module
        A live model.

    Returns
    -------
    dict of int to nn.Module
        Mixers by depth in the model, in order; attention layers leave gaps.

    Raises
    ------
    ValueError
        If there is none; lists the supported families.
    """
    found = {depth(name, m): m for name, m in model.named_modules() if scans(m)}
    if not found:
        names = dict.fromkeys(name for adapter in ADAPTERS.values() for name in adapter.models)
        raise ValueError(
            f"model is a {type(model).__name__}, in which no recurrent state was found;"
            f" supported are {', '.join(names)} (see 'statescope models')"
        )
    return dict(sorted(found.items()))


def depth(name: str, module: nn.Module) -> int:
    """Layer of a module: its own word, or the first number in its name."""
    own = getattr(module, "layer_idx", None)
    return int(own if own is not None else next((part for part in name.split(".") if part.isdigit()), 0))


def scans(module: nn.Module) -> tuple[ModuleType, list[str]] | None:
    """The modeling module whose scans this module's class (or a base of it) calls or has, and which."""
    kind: Any = type(module)
    return _scans_of(kind)


@cache
def _scans_of(kind: type) -> tuple[ModuleType, list[str]] | None:
    for cls in kind.__mro__:
        home = sys.modules.get(cls.__module__)
        if home is None:
            continue
        known = (cls.__name__, f"{cls.__module__}.{cls.__name__}")
        names = [name for name, adapter in ADAPTERS.items() if adapter.owner in known]
        if not names:
            called = {name for member in vars(cls).values() for name in _names_used(member)}
            names = [name for name in ADAPTERS if name in called and callable(vars(home).get(name))]
        if names:
            return home, names
    return None


def _names_used(member: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
    return code.co_names if isinstance(code, CodeType) else ()


def is_fused(function: Callable[..., Any]) -> bool:
    """Whether transformers bound this name to mamba_ssm's kernel instead of its own torch code."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    names = code.co_freevars if isinstance(code, CodeType) else ()
    bound = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    return bool(bound.get("is_new_implementation", False))
