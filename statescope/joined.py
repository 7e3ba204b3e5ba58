"""Layers that scan their heads in several calls, as one.

zamba's mixer calls Mamba-1's scan once for every group of its heads, one after the other, where a record and
an edit know one recurrence per layer. So the layer is rehearsed: it runs once with a copy of its cache, its
calls are noted and answered with zeros, and what they ask for is joined. Then it runs in earnest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from statescope.adapters import Call
from statescope.kernels.interface import ScanOutput
from statescope.recurrence import Recurrence

OWN = object()
"""Stands for the answers of the model's own scan."""


def parts_of(layer: nn.Module, counted_by: str) -> int:
    """In how many calls a layer scans its heads; ``counted_by`` names the attribute that says so."""
    return int(getattr(layer, counted_by, 1)) if counted_by else 1


def copied(cache: Any, layer: int) -> Any:
    """Copy a cache as far as one layer may write into it."""
    if cache is None:
        return None
    twin = copy.copy(cache)
    twin.layers = [*cache.layers]
    twin.layers[layer] = copy.deepcopy(cache.layers[layer])
    return twin


@dataclass
class Parts:
    """The calls of one pass through a layer.

    Attributes
    ----------
    answers : list of ScanOutput, or OWN
        What to answer each call with; :data:`OWN` leaves it to the model's own scan, and None, in a
        rehearsal, to zeros.
    calls : list of Call
        What a rehearsal was asked for.
    made : int
        Calls so far.
    """

    answers: Any = None
    calls: list[Call] = field(default_factory=list)
    made: int = 0

    def take(self, call: Call, run_own: Callable[[], Any]) -> Any:
        """Answer one call."""
        at, self.made = self.made, self.made + 1
        if self.answers is OWN:
            return run_own()
        if self.answers is not None:
            return call.answer(self.answers[at])
        state = call.recurrence.initial_state  # about to be overwritten where it is updated in place
        kept = {} if state is None else {"initial_state": state.clone()}
        self.calls.append(Call(call.recurrence.replace(**kept), call.answer))
        return call.answer(_silence(call.recurrence))


def _silence(recurrence: Recurrence) -> ScanOutput:
    """Zeros in the shapes of an output."""
    y = torch.zeros(recurrence.v.shape, device=recurrence.v.device)
    state = torch.zeros_like(recurrence.start_state(torch.float32))
    return ScanOutput(y, None, state[:, None][:, :0], state)


def join(calls: Sequence[Call]) -> Call:
    """Put the heads of several calls side by side; the answer is a list with the part of each."""
    recurrences = [call.recurrence for call in calls]
    first = recurrences[0].tensors()
    axes = {name: {"initial_state": 1, "skip": 0}.get(name, 2) for name in first}
    joined = {name: torch.cat([r.tensors()[name] for r in recurrences], axis) for name, axis in axes.items()}
    heads = [r.heads for r in recurrences]

    def answer(output: ScanOutput) -> list[ScanOutput]:
        assert output.y is not None
        pairs = zip(output.y.split(heads, 2), output.final_state.split(heads, 1), strict=True)
        return [ScanOutput(y, None, output.states[:, :0], state) for y, state in pairs]

    return Call(Recurrence(**joined), answer)
