"""Find the recurrent layers of a live model and intercept their scan calls.

transformers routes every scan of a family through one module-level function. While a capture is active
that name is bound to a wrapper which asks, per call, whose scan this is: a hook on each mixer says so.
Calls from anything but the captured model go straight through, and the name is restored at the end,
also after an exception.

Where mamba_ssm's own models are to go on from an earlier segment, the hook also knows from what, and the
scan and the convolution are given it (:mod:`statescope.inference`). Where transformers' scan is not told of
the state in the model's cache, what it adds is added to the scan's own output. Where a layer scans its heads
in several calls, they are joined (:mod:`statescope.joined`); where it keeps its state on itself, it is lent
that of the cache (:mod:`statescope.lent`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

from torch import Tensor, nn

from statescope.adapters import ADAPTERS, Adapter, Call
from statescope.inference import Entering, InferenceCache
from statescope.joined import OWN, Parts, copied, join, parts_of
from statescope.layers import is_fused, mixers, scans
from statescope.lent import keeps_itself, lent

__all__ = ["Handler", "capture", "mixers"]

Handler = Callable[[int, Call, Callable[[], Any]], Any]
"""``handler(layer, call, run_own)`` returns what the model goes on with; ``run_own()`` is its own scan."""

CONVOLUTION = "causal_conv1d_fn"
"""Name under which mamba_ssm's modules call a fused convolution; None where there is none."""


@dataclass
class _Current:
    """Whose calls are being made."""

    handler: Handler
    layer: int
    entering: Entering | None
    cache: Any
    called: bool = False
    parts: Parts | None = None


_current: ContextVar[_Current | None] = ContextVar("statescope_current_layer", default=None)
_lock = threading.Lock()
_installed: dict[tuple[int, str], int] = {}


@contextmanager
def capture(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Send every scan call of a model through a handler.

    Parameters
    ----------
    model : nn.Module
        The live model; only its own calls are intercepted.
    handler : callable
        ``handler(layer, call, run_own)``; see :data:`Handler`.
    """
    with ExitStack() as stack:
        stack.callback(_current.set, _current.get())  # an interrupt passes by the mixers' hooks
        for layer, mixer in mixers(model).items():
            stack.enter_context(_announced(mixer, layer, handler))
            if keeps_itself(mixer):
                stack.enter_context(lent(mixer, layer))
            home, names = scans(mixer)  # type: ignore[misc]
            adapters = [ADAPTERS[name] for name in names]
            if any(parts_of(mixer, a.parts) > 1 for a in adapters):
                stack.enter_context(_patched(mixer, "forward", _rehearsing))
            for adapter in adapters:
                holder, name = adapter.place(mixer) if adapter.owner else (home, adapter.function)
                stack.enter_context(_patched(holder, name, partial(_intercepting, adapter, holder)))
            kind: Any = type(mixer)
            convolution = getattr(mixer, "conv1d", None)
            if _takes_inference_params(kind) and convolution is not None:
                stack.enter_context(_extended(convolution))
                if getattr(home, CONVOLUTION, None) is not None:
                    stack.enter_context(_patched(home, CONVOLUTION, _extending))
        yield


@cache
def _takes_inference_params(kind: Any) -> bool:
    return "inference_params" in inspect.signature(kind.forward).parameters


@contextmanager
def _announced(mixer: nn.Module, layer: int, handler: Handler) -> Iterator[None]:
    """While the mixer runs, its calls belong to this handler and layer."""
    tokens: list[Any] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, entering = kwargs.get("inference_params"), None
        if isinstance(cache, InferenceCache):
            entering = cache.enter(layer, mixer, len(args[0]))
        given = kwargs.get("cache_params")
        tokens.append(_current.set(_Current(handler, layer, entering, given)))

    entered = mixer.register_forward_pre_hook(enter, with_kwargs=True)
    left = mixer.register_forward_hook(lambda *_: _current.reset(tokens.pop()), always_call=True)
    try:
        yield
    finally:
        entered.remove()
        left.remove()


@contextmanager
def _extended(convolution: nn.Module) -> Iterator[None]:
    """A convolution that pads with zeros reads what came before the segment instead."""

    def extend(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        entering = _entering()
        return None if entering is None else (entering.extend(args[0]), *args[1:])

    def drop(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        entering = _entering()
        return None if entering is None else output[..., entering.context :]

    hooks = convolution.register_forward_pre_hook(extend), convolution.register_forward_hook(drop)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _extending(own: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function."""

    @wraps(own)
    def extended(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        entering = _entering()
        if entering is None:
            return own(x, *args, **kwargs)
        return own(entering.extend(x), *args, **kwargs)[..., entering.context :]

    return extended


def _entering() -> Entering | None:
    current = _current.get()
    return None if current is None else current.entering


@contextmanager
def _patched(
    holder: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """A function of a modeling module, or a method of one layer, in its wrapper."""
    key = (id(holder), name)
    with _lock:
        _installed[key] = _installed.get(key, 0) + 1
        if _installed[key] == 1:
            own: Any = getattr(holder, name)
            replacement: Any = wrapper(own)
            replacement.__statescope_original__ = vars(holder).get(name)  # None: it is its class's
            setattr(holder, name, replacement)
    try:
        yield
    finally:
        with _lock:
            _installed[key] -= 1
            if _installed[key] == 0:
                del _installed[key]
                original = getattr(holder, name).__statescope_original__
                if original is None:
                    delattr(holder, name)
                else:
                    setattr(holder, name, original)


def _intercepting(adapter: Adapter, holder: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    fused, before = is_fused(own), (holder,) if adapter.owner else ()

    @wraps(own)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        current = _current.get()
        if current is None:
            return own(*args, **kwargs)
        parts = current.parts
        if current.called and parts is None:
            raise ValueError(
                f"model: layer {current.layer} scans its heads in several calls of {adapter.function};"
                " such models are not supported"
            )
        current.called = True
        if current.entering is not None and not adapter.forgets:
            kwargs |= adapter.told(current.entering.states)
        run, mirror_dtype = own, not fused
        if fused and _on_cpu(*args, *kwargs.values()):  # where mamba_ssm cannot run, and torch can
            run, mirror_dtype = own.__wrapped__, True  # type: ignore[attr-defined]
        untold = {"entering": _kept_state(current)} if adapter.forgets else {}
        call = adapter.read(mirror_dtype, *before, *args, **untold, **kwargs)

        def run_own() -> Any:
            result = call.own(run) if call.own else run(*args, **kwargs)
            return call.complete(result) if call.complete else result

        if parts is not None:
            return parts.take(call, run_own)
        return current.handler(current.layer, call, run_own)

    return intercepted


def _kept_state(current: _Current) -> Tensor | None:
    """The recurrent state that the model's cache holds; None at the start of a text."""
    if current.entering is not None:
        return current.entering.states[1]
    if current.cache is None or current.layer >= len(current.cache.layers):
        return None
    state: Tensor | None = current.cache.layers[current.layer].recurrent_states[0]
    return state if state is None or current.parts is None else state[:, current.parts.made]


def _rehearsing(own: Callable[..., Any]) -> Callable[..., Any]:
    """Run a layer twice: once to hear what its calls ask for together, once in earnest."""

    @wraps(own)
    def rehearsed(*args: Any, **kwargs: Any) -> Any:
        current = _current.get()
        if current is None:
            return own(*args, **kwargs)
        current.parts = heard = Parts()
        own(*args, **{**kwargs, "cache_params": copied(kwargs.get("cache_params"), current.layer)})
        current.parts = Parts(current.handler(current.layer, join(heard.calls), lambda: OWN))
        return own(*args, **kwargs)

    return rehearsed


def _on_cpu(*arguments: Any) -> bool:
    return next(x for x in arguments if isinstance(x, Tensor)).device.type == "cpu"
