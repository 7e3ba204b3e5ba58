"""What an adapter is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence


@dataclass(frozen=True, eq=False)
class Call:
    """One intercepted scan call.

    Attributes
    ----------
    recurrence : Recurrence
        What the call asks for.
    answer : callable
        Turns the output of our scan into what the model's function would have returned, side effects
        (a state updated in place) included.
    complete : callable, optional
        Adds what an initial state does to what the model's function returned, where the function is not
        told of it (:attr:`Adapter.forgets`); None where there is nothing to add.
    own : callable, optional
        Given the model's function, calls it in the ways in which it can be called, and joins what it returns;
        None where it can be called as it was.
    """

    recurrence: Recurrence
    answer: Callable[[ScanOutput], Any]
    complete: Callable[[Any], Any] | None = None
    own: Callable[[Callable[..., Any]], Any] | None = None


@dataclass(frozen=True)
class Adapter:
    """How to read one scan signature.

    Attributes
    ----------
    function : str
        The name under which modeling modules call it; with an ``owner``, the method's name (after those of
        submodules, with dots).
    signature : str
        The family's name, as users know it, and the library's.
    models : tuple of str
        The models that call it: transformers model types, or classes.
    structure : str
        Which case of the equation it is, as :attr:`statescope.recurrence.Recurrence.structure` says it.
    read : callable
        ``read(mirror_dtype, *args, **kwargs) -> Call``. ``mirror_dtype`` tells that the model's own
        scan does its elementwise arithmetic in the model's dtype (transformers' torch path) rather
        than in float32 (fused kernels).
    forgets : bool
        Whether the function begins with an empty state even where the model's cache holds one; ``read`` is
        then given that state as ``entering``.
    owner : str
        The layer's class, where the scan is a method and no function of its module, behind the name of that
        module where there are others of its name; ``read`` is then given the object whose method it is
        before the arguments.
    parts : str
        The layer's attribute that says in how many calls it scans its heads, where it may be several.
    told : callable
        What tells the function of the states from before that :class:`statescope.inference.InferenceCache`
        kept of a mixer of mamba_ssm: keyword arguments, made of these states.
    note : str
        What a user should know of these models: what is repaired, what is refused.
    """

    function: str
    signature: str
    models: tuple[str, ...]
    structure: str
    read: Callable[..., Call]
    forgets: bool = False
    owner: str = ""
    parts: str = ""
    told: Callable[[tuple[Tensor, ...]], dict[str, Any]] = lambda kept: {"initial_states": kept[1]}
    note: str = ""

    @property
    def name(self) -> str:
        """What sets it apart from all others."""
        return f"{self.owner}.{self.function}" if self.owner else self.function

    def place(self, layer: nn.Module) -> tuple[nn.Module, str]:
        """Where the method of an ``owner`` is found: an object and the method's name."""
        path, _, name = self.function.rpartition(".")
        return layer.get_submodule(path), name


def refuse_packed(arguments: Mapping[str, Any]) -> None:
    """Refuse a call for several texts behind one another."""
    for name in ("cu_seqlens", "cp_context"):
        if arguments.get(name) is not None:
            raise ValueError(f"the model was called with packed sequences ({name}); trace them one by one")
