r"""Decay per entry on a GPU (Triton): Mamba-1, RG-LRU, RWKV-4.

No product of matrices serves it (:mod:`statescope.kernels.stepped` says why), but the entries of a state do
not meet until they are read. So the text is cut into *spans*, all walked at once, token by token. Launches:

1. ``walk`` from a zero state: what each span writes, and how much it forgets.
2. ``pass_states``: the state that enters each span.
3. ``walk`` from there: ``y``, and the sums over entries that the measurements are made of.

A token of ``h`` heads of ``k`` keys and ``v`` values takes ``2 h k v`` exponentials and, with all measured,
about ``30 h k v`` other operations, and moves ``20 h v`` bytes of float32 values, steps and outputs (the
first two are read twice). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from .interface import ScanOutput, Steps
from .rates import Rated

LENGTH = 64
"""Tokens of a span. In a longer one errors of float32 would build up."""

ENTRIES = 512
"""Entries of a state that one program, a warp, keeps in registers."""

TILE = 256
"""Entries of a state that one program passes from span to span."""

STATES = 2**26
"""Entries of states kept at once: bounds the memory whatever the length."""

SPANS = 2**16 - 1
"""Spans walked at once: the most that this axis of a grid takes."""


def scan(recurrence: Recurrence, outputs: bool, measure: bool, positions: Sequence[int]) -> ScanOutput:
    """Run a recurrence with decay per entry and no erase term.

    Parameters
    ----------
    recurrence : Recurrence
        What to run. Rows of queries, keys and values are contiguous, and those of the steps where the log
        decay is :class:`~statescope.kernels.rates.Rated`.
    outputs, measure, positions
        As :func:`statescope.kernels.fused.scan`.
    """
    r, state = recurrence, recurrence.initial_state
    y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device) if outputs else None
    steps: list[Steps] = []
    kept: dict[int, Tensor] = {}
    block = LENGTH * max(1, min(SPANS, STATES // (r.batch * r.heads * r.key * r.value)))
    for first in range(0, r.time, block):
        stop = min(first + block, r.time)
        part = _Part(r.between(first, stop, state))
        state = part.final
        measured = part.read(None if y is None else y[:, first:stop], measure)
        steps += [] if measured is None else [measured]
        here = [p for p in positions if first <= p < stop]
        kept |= zip(here, part.states_after([p - first for p in here]).unbind(2), strict=True)
    assert state is not None
    states = torch.stack([kept[p] for p in positions], 1) if positions else state[:, None][:, :0]
    return ScanOutput(y, Steps.concatenate(steps) if measure else None, states, state)


class _Part:
    """A stretch of the text, of which every span is walked at once."""

    def __init__(self, r: Recurrence) -> None:
        self.r, self.spans = r, -(-r.time // LENGTH)
        self.keys, values = (1 << (size - 1).bit_length() for size in (r.key, r.value))  # of a tile
        self.columns = min(values, max(1, ENTRIES // self.keys))
        self.blocks = -(-r.value // self.columns)
        self.states, forgotten = (self._of_states(self.spans) for _ in range(2))
        self._walk(self.spans, left=self.states, forgotten=forgotten)
        self.final = self._pass_states(forgotten)

    def read(self, y: Tensor | None, measure: bool) -> Steps | None:
        """Write the outputs, and return what was measured on the way."""
        r = self.r
        shape = (6, self.blocks, r.batch, r.heads, r.time)
        sums = torch.empty(shape, dtype=torch.float32, device=r.v.device) if measure else None
        if y is not None or measure:
            self._walk(self.spans, y=y, sums=sums)
        if sums is None:
            return None
        log_decay, decayed, written, cross, energy, total = sums.sum(1).transpose(-2, -1)
        size, write = r.key * r.value, written.sqrt()
        scale = decayed.sqrt() * write
        overlap = torch.where(scale == 0, torch.zeros_like(scale), cross / scale).clamp(-1, 1)
        return Steps(log_decay / size, write, energy.sqrt(), total / size, overlap)

    def states_after(self, positions: Sequence[int]) -> Tensor:
        """Return the states after some tokens, (batch, heads, position, key, value)."""
        found, device = self._of_states(len(positions)), self.r.v.device
        if positions:  # from pinned memory, so that the host does not wait for the device
            ends = torch.tensor(positions, pin_memory=self.r.v.is_cuda).to(device, non_blocking=True)
            self._walk(len(positions), left=found, ends=ends)
        return found

    def _of_states(self, count: int) -> Tensor:
        r = self.r
        shape = (r.batch, r.heads, count, r.key, r.value)
        return torch.empty(shape, dtype=torch.float32, device=r.v.device)

    def _walk(self, count: int, **given: Tensor | None) -> None:
        """Walk spans; what there is no tensor for is not computed."""
        from . import fused_entries_kernels

        def pointer(name: str) -> Tensor:
            x = given.get(name)
            return self.states if x is None else x  # which is not touched

        r, g = self.r, self.r.log_decay
        decay = (g.step, *g.step.stride()[:3], 0, 0, g.rate) if isinstance(g, Rated) else (g, *g.stride(), g)
        scale = r.q if r.write_scale is None else r.write_scale
        walk: Any = fused_entries_kernels.walk
        walk[(r.heads * self.blocks, count, r.batch)](
            r.q, *r.q.stride()[:3], r.k, *r.k.stride()[:3], r.v, *r.v.stride()[:3],
            scale, *scale.stride()[:3], *decay, self.states if r.skip is None else r.skip, self.states,
            *map(pointer, ("ends", "left", "forgotten", "y")), pointer("y").stride(0), pointer("sums"),
            r.time, LENGTH, self.spans, r.batch,
            HEADS=r.heads, GROUPS=r.groups, KEY=r.key, VALUE=r.value, BK=self.keys, BV=self.columns,
            RATED=isinstance(g, Rated), FRESH="forgotten" in given, CUT="ends" in given,
            OUTPUTS=given.get("y") is not None, MEASURE=given.get("sums") is not None,
            HAS_SCALE=r.write_scale is not None, HAS_SKIP=r.skip is not None, num_warps=1,
        )  # fmt: skip

    def _pass_states(self, forgotten: Tensor) -> Tensor:
        """Turn what every span writes into the state that enters it, in place, and return the last one."""
        from . import fused_entries_kernels

        r = self.r
        final = torch.empty((r.batch, r.heads, r.key, r.value), dtype=torch.float32, device=r.v.device)
        size = r.key * r.value
        pass_states: Any = fused_entries_kernels.pass_states
        pass_states[(r.batch * r.heads, -(-size // TILE))](
            self.states, forgotten, final if r.initial_state is None else r.initial_state.contiguous(), final,
            self.spans, SIZE=size, BLOCK=TILE, STAGES=3, HAS_INITIAL=r.initial_state is not None, num_warps=4,
        )  # fmt: skip
        return final
