r"""Decay per key on a GPU (Triton), with or without the delta rule: GLA, HGRN-2, RWKV-6, KDA.

The algebra is that of :mod:`statescope.kernels.keyed` and :mod:`statescope.kernels.erasing`. All launches
but ``walk`` do all chunks at once:

1. ``relate``: what the rows of each chunk have to do with one another, with the state that enters it, and
   with that which leaves. Chunks of which a key forgets more than float32 holds that way are *hard*, and left
   to ``relate_parts``.
2. ``solve``: the triangular system of what is erased.
3. ``walk``: over all chunks for each head and block of the state, which stays in registers; all it computes
   for a chunk are two products, or one where nothing is erased.
4. ``read``: ``y``.
5. ``measure`` and ``tally``: what is written beside what is stored, and energy and sum of each row of the
   state, token by token inside the chunks; for hard chunks ``measure_parts``.

What feeds back into later writes is computed by three products of halves for each, in tf32 or, where
:func:`halves` says so, in bfloat16, which is then also the precision of what is only read. Nothing waits for
the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import launches
from .interface import ScanOutput, Steps
from .keyed import Measured
from .launches import Launcher

ROWS = 2**21
"""Tokens times heads times sequences worked on at once: bounds the memory whatever the length."""

PROGRAMS = 1024
"""Of the launches for hard chunks, which share these out."""

PART = 16
"""Rows that are related to earlier ones at once where keys forget much."""

SOLVED = 16
"""Rows of a block that is inverted row by row."""

FIELDS = 7
"""Of what is measured."""


@dataclass(frozen=True)
class Tiling:
    """How a shape is cut up: rows of a chunk, and keys and columns of every launch.

    ``relate`` has ``related`` keys at once, ``solve`` ``solved`` keys and columns, ``walk`` ``walked_keys``
    of ``walked`` columns of the state, ``read`` ``read_keys`` of ``read_columns``, ``measure`` ``measured``
    of ``measured_columns``, ``tally`` all ``keys``, and what goes part by part ``part`` keys and columns.

    ptxas 12.8, which comes with triton 3.6, may err in products of 32 columns whose first operand lies in
    registers (by 13.0 they are right). So ``solved`` and ``measured`` are 64, and ``walk`` has stages.
    """

    chunk: int
    keys: int
    related: int
    solved: int
    walked_keys: int
    walked: int
    read_keys: int
    read_columns: int
    measured: int
    measured_columns: int
    part: int
    walk_stages: int = 1
    stages: int = 1
    measure_stages: int = 1
    part_stages: int = 1
    warps: int = 4
    part_warps: int = 2
    solve_registers: int | None = None


def halves(recurrence: Recurrence) -> bool:
    """Whether products that feed back take three products of bfloat16 halves, in chunks of 64."""
    r = recurrence
    return r.v.dtype == torch.bfloat16 and 32 < r.key <= (128 if r.erases else 256) and r.value > 32


def tiling(recurrence: Recurrence, half: bool, modern: bool) -> Tiling:
    """Choose tiles.

    Parameters
    ----------
    recurrence : Recurrence
        What is to be run.
    half : bool
        As :func:`halves`.
    modern : bool
        Whether matrix units read shared memory by themselves (compute capability 9 and 10).
    """
    r = recurrence
    keys, values = (max(16, 1 << (n - 1).bit_length()) for n in (r.key, r.value))
    if half and modern:
        across, narrow = keys if r.erases else 64, r.erases and keys <= 64
        return Tiling(64, keys, 32, 64, across, 16 if narrow else 32, 64, 64, 64, min(values, 128), 32,
                      walk_stages=3 if r.erases and keys > 64 else 4, stages=3, measure_stages=2,
                      part_stages=2, solve_registers=168)  # fmt: skip
    some, columns = min(keys, 32), min(values, 32)
    across = keys if r.erases else some
    return Tiling(32 if keys <= 128 else 16, keys, some, min(some, columns), across, min(columns, 16), some,
                  columns, some, columns, min(some, columns))  # fmt: skip


def scan(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: bool,
    measure: bool,
    positions: Sequence[int],
    modern: bool,
    kind: type[Scan] | None = None,
    cut: Tiling | None = None,
) -> ScanOutput:
    """Run a recurrence with decay per key or head, and no erase term or the delta rule's.

    Parameters
    ----------
    recurrence : Recurrence
        What to run.
    q, k, v : Tensor
        Its queries, keys and values, with contiguous rows.
    outputs, measure, positions
        As :func:`statescope.kernels.fused.scan`.
    modern : bool
        As :func:`tiling`.
    kind : type, optional
        What launches the kernels, if not :class:`Scan`.
    cut : Tiling, optional
        How it is cut up, if not by :func:`tiling`.
    """
    r = recurrence.replace(q=q, k=k, v=v)
    half = halves(r)
    cut = cut or tiling(r, half, modern)
    block = cut.chunk * max(1, ROWS // (r.batch * r.heads * cut.chunk))
    found, state = [], r.initial_state
    for first in range(0, r.time, block):
        stop = min(first + block, r.time)
        here = [p - first for p in positions if first <= p < stop]
        part = r if block >= r.time else r.between(first, stop, state)
        found.append((kind or Scan)(part, cut, outputs, measure, half).run(here))
        state = found[-1].final_state
    if len(found) == 1 and list(positions) == sorted(positions):
        return found[0]
    kept = {p: x for o, ps in zip(found, _by_block(positions, block, len(found)), strict=True)
            for p, x in zip(ps, o.states.unbind(1), strict=True)}  # fmt: skip
    erased = [o.erased for o in found if o.erased is not None]
    steps = [o.steps for o in found if o.steps is not None]
    return ScanOutput(
        torch.cat([o.y for o in found if o.y is not None], 1) if outputs else None,
        Steps.concatenate(steps) if measure else None,
        torch.stack([kept[p] for p in positions], 1) if positions else found[0].states,
        found[-1].final_state,
        torch.cat(erased, 2) if erased else None,
    )


def _by_block(positions: Sequence[int], block: int, count: int) -> list[list[int]]:
    return [[p for p in positions if p // block == i] for i in range(count)]


class Scan:
    """One scan: the launches and the buffers between them."""

    def __init__(self, r: Recurrence, cut: Tiling, outputs: bool, measure: bool, half: bool) -> None:
        self.kernels, self.careful = self._kernels()
        self.r, self.cut, self.outputs, self.measure = r, cut, outputs, measure
        self.chunks = -(-r.time // cut.chunk)
        self.padded = self.chunks * cut.chunk
        self.pieces, self.across = -(-r.value // cut.walked), -(-r.key // cut.walked_keys)
        self.split = half and launches.multiplies_bfloat16(r.v)
        self.sizes = (r.time, self.padded, self.chunks, r.batch)
        self.grid = (self.chunks, r.heads, r.batch)
        self.few = (PROGRAMS if r.v.is_cuda else 1,)
        self._arguments()
        self._constants()
        self._buffers()

    def _kernels(self) -> tuple[Any, Any]:
        """The device code, and that for hard chunks."""
        from . import fused_hard_kernels, fused_keyed_kernels

        return fused_keyed_kernels, fused_hard_kernels

    def _arguments(self) -> None:
        """Tensors, each with its strides; where there is none, one that is not read."""
        r = self.r
        scale = r.log_decay if r.write_scale is None else r.write_scale
        a = r.log_decay if r.a is None else r.a if r.a.stride(-1) == 1 or r.delta_rule else r.a.contiguous()
        b = r.log_decay if r.b is None else r.b if r.b.stride(-1) == 1 else r.b.contiguous()
        q, k, v, weight, erase, along = ((x, *x.stride()[:3]) for x in (r.q, r.k, r.v, scale, a, b))
        decay = (r.log_decay, *r.log_decay.stride()[:3], 0 if r.scalar_decay else r.log_decay.stride(3))
        self.q, self.k, self.v, self.weight, self.decay, self.erase = q, k, v, weight, decay, erase
        self.given, self.along = (*q, *k, *weight, *decay), along

    def _constants(self) -> None:
        r, cut = self.r, self.cut
        exact = {"PRECISION": "tf32x3" if torch.version.cuda else "ieee", "SPLIT": self.split}
        self.keyed = {"HEADS": r.heads, "KEY": r.key, "L": cut.chunk, **exact}
        self.whole = self.keyed | {"VALUE": r.value}
        self.scaled = {"HAS_SCALE": r.write_scale is not None}
        self.kinds = {"ERASES": r.erases, **self.scaled}
        self.part = {"PART": PART, "BS": cut.part}
        self.usual: dict[str, Any] = {"num_warps": cut.warps, "num_stages": cut.stages}
        self.solving = dict(self.usual)
        if cut.solve_registers and r.v.is_cuda and torch.version.cuda:
            self.solving["maxnreg"] = cut.solve_registers
        self.few_warps: dict[str, Any] = {"num_warps": cut.part_warps, "num_stages": cut.part_stages}

    def _buffers(self) -> None:
        r, heads = self.r, (self.r.batch, self.r.heads)
        rounded = torch.bfloat16 if self.split else torch.float32
        self.final = self._empty(*heads, r.key, r.value)
        self.hard = self._empty(*heads, self.chunks, dtype=torch.int32)
        self.listed = torch.zeros(1 + self.hard.numel(), dtype=torch.int32, device=r.v.device)
        self.kept, self.halves = (self._empty(*heads, self.chunks, r.key) for _ in range(2))
        self.remaining = self._of_keys()
        self.through, self.system, self.values = self.final, self.kept, r.v
        self.u: tuple[Any, ...] = self.v
        if r.erases:
            self.through = self._of_keys()
            self.system = self._empty(*heads, self.padded, self.cut.chunk)
            self.values = self._empty(*heads, self.padded, r.value)
            self.u = (self.values, *(self.values.stride(i) for i in (0, 2, 1)))
        self.asked, self.seen, self.states, self.energy = self.kept, self.kept, self.final, self.kept
        if self.outputs:
            self.asked = self._empty(*heads, self.padded, r.key, dtype=rounded)
            self.seen = self._empty(*heads, self.padded, self.cut.chunk, dtype=rounded)
        if self.outputs or self.measure:
            self.states = self._empty(*heads, self.chunks, r.key, r.value, dtype=rounded)
        if self.measure:
            self.energy = self._empty(2, *heads, self.chunks, self.pieces, r.key)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.r.v.device)

    def _of_keys(self) -> Tensor:
        """A float32 for each row and key, or two bfloat16 in its place."""
        found = self._empty(self.r.batch, self.r.heads, self.padded, self.r.key)
        return found.view(torch.bfloat16).view(2, -1) if self.split else found

    def run(self, positions: Sequence[int]) -> ScanOutput:
        """Launch all; ``positions`` as of :func:`scan`."""
        r = self.r
        held = sorted({p // self.cut.chunk for p in positions})
        choices = (self.outputs, self.measure, self.split, bool(held))
        tensors = (r.q, r.k, r.v, r.log_decay, r.write_scale, r.a, r.b, r.initial_state, r.skip)
        self.launch = Launcher.of((__name__, self.cut, *choices), *tensors)
        self._relate()
        if r.erases:
            self._solve()
        entered = self._walk(held)
        y = self._read() if self.outputs else None
        steps, erased = self._measure() if self.measure else (None, None)
        at = [self._after(entered[held.index(p // self.cut.chunk)], p) for p in positions]
        states = torch.stack(at, 1) if at else self._empty(r.batch, 0, r.heads, r.key, r.value)
        return ScanOutput(y, steps, states, self.final, erased)

    def _relate(self) -> None:
        constants = self.keyed | self.kinds | {"GROUPS": self.r.groups, "OUTPUTS": self.outputs}
        found = (self.remaining, self.kept)
        related = (self.through, self.asked, self.system, self.seen)
        for wide in (False, True):
            self.launch(
                self.kernels.relate, self.grid,
                (*self.given, *self.erase, *found, self.halves, *related, self.hard, self.listed,
                 *self.sizes),
                constants | {"BS": self.cut.related, "WIDE": wide}, wide, **self.usual,
            )  # fmt: skip
        self.launch(
            self.careful.relate_parts, self.few,
            (*self.given, *self.along, *self.erase, *found, *related, self.listed, *self.sizes),
            constants | self.part | {"KEY_GROUPS": self.r.groups, "BEFORE": False}, **self.few_warps,
        )  # fmt: skip

    def _solve(self) -> None:
        part = min(SOLVED, self.cut.chunk)
        constants = self.whole | self.scaled
        constants |= {"PART": part, "BS": self.cut.solved, "BV": self.cut.solved}
        found = (self.system, self.through, self.values, self.hard, *self.sizes)
        self.launch(
            self.kernels.solve,
            self.grid,
            (*self.v, *self.weight, *self.erase, *found),
            constants,
            **self.solving,
        )

    def _walk(self, held: list[int]) -> Tensor:
        """Return the states that enter the chunks held, (chunk, batch, head, key, value)."""
        r, cut = self.r, self.cut
        entered, slots = self._kept(held)
        initial = self.final if r.initial_state is None else r.initial_state.contiguous()
        self.launch(
            self.kernels.walk, (r.heads * self.pieces * self.across, r.batch),
            (self.remaining, self.kept, self.through, *self.u, self.values, initial, self.final, self.states,
             self.energy, entered, slots, *self.sizes),
            self.whole | {
                "ERASES": r.erases, "BK": cut.walked_keys, "BV": cut.walked, "BLOCKS": self.pieces,
                "STAGES": cut.walk_stages, "HAS_INITIAL": r.initial_state is not None,
                "STORE": self.outputs or self.measure, "MEASURE": self.measure, "KEEP": bool(held),
            },
            num_warps=cut.warps,
        )  # fmt: skip
        return entered

    def _kept(self, held: list[int]) -> tuple[Tensor, Tensor]:
        """Room for the states that enter the chunks held, and where that of each chunk is, -1 if nowhere."""
        if not held:
            return self.final, self.kept
        r = self.r
        slot = torch.full((self.chunks,), -1, dtype=torch.int32)
        slot[held] = torch.arange(len(held), dtype=torch.int32)
        return self._empty(len(held), r.batch, r.heads, r.key, r.value), _to(slot, r.v)

    def _read(self) -> Tensor:
        r, cut = self.r, self.cut
        y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device)
        self.launch(
            self.kernels.read, (self.chunks * -(-r.value // cut.read_columns), r.heads, r.batch),
            (*self.u, *self.v, *self.weight, self.asked, self.states, self.seen,
             self.kept if r.skip is None else r.skip, y, *self.sizes),
            self.whole | self.kinds
            | {"BS": cut.read_keys, "BV": cut.read_columns, "HAS_SKIP": r.skip is not None},
            **self.usual,
        )  # fmt: skip
        return y

    def _measure(self) -> tuple[Steps, Tensor | None]:
        r = self.r
        written = (*self.k, *self.u, *self.v, *self.weight, *self.decay, *self.erase)
        constants = self.whole | self.kinds | {"GROUPS": r.groups, "DELTA": r.delta_rule}
        found = self._fields(FIELDS, written, constants, self.careful.measure_parts)
        decayed, energy, cross, total, pace, both, along = found
        erased = torch.stack([both.sqrt(), along]) if r.delta_rule else None
        measured = Measured(decayed, energy, cross, total / (r.key * r.value))
        return measured.steps(pace), erased

    def _fields(
        self, fields: int, written: tuple[Any, ...], constants: dict[str, Any], parts: Any, **tallied: int
    ) -> Tensor:
        """Launch what measures: (field, batch, token, head)."""
        r, cut = self.r, self.cut
        found = self._empty(fields, r.batch, r.time, r.heads)
        gained = self._empty(r.batch, r.heads, self.padded, r.key)
        for wide in (False, True):
            self.launch(
                self.kernels.measure, self.grid,
                (*written, self.kept, self.halves, self.states, gained, self.hard, found, *self.sizes),
                constants | {"BS": cut.measured, "BV": cut.measured_columns, "WIDE": wide}, wide,
                num_warps=cut.warps, num_stages=cut.measure_stages,
            )  # fmt: skip
        self.launch(
            parts, self.few,
            (*written, self.states, gained, self.listed, found, *self.sizes),
            constants | self.part | {"BV": cut.part}, **self.few_warps,
        )  # fmt: skip
        self.launch(
            self.kernels.tally, self.grid,
            (*self.k, *self.decay, *self.erase, self.energy, gained, found, *self.sizes),
            {"HEADS": r.heads, "GROUPS": r.groups, "KEY": r.key, "L": cut.chunk, "BK": cut.keys,
             "BLOCKS": self.pieces, **tallied},
            num_warps=1,
        )  # fmt: skip
        return found

    def _after(self, entering: Tensor, position: int) -> Tensor:
        """The state after one token, from that which entered its chunk."""
        r = self.r
        past = slice(position // self.cut.chunk * self.cut.chunk, position + 1)
        log_decay = r.log_decay[:, past].float()
        log_decay = log_decay[..., None] if r.scalar_decay else log_decay
        # Of the tokens in between alone: from each on, what comes after it.
        remaining = log_decay.flip(1).cumsum(1).flip(1)
        survives = torch.cat([remaining[:, 1:], torch.zeros_like(remaining[:, :1])], 1).exp()
        state = remaining[:, 0].exp()[..., None] * entering
        for keys, u in self._written(past):
            state = state + (keys * survives).permute(0, 2, 3, 1) @ u
        return state

    def _written(self, past: slice) -> list[tuple[Tensor, Tensor]]:
        """Keys, (batch, token, head, key), and values, (batch, head, token, value), that tokens write."""
        r = self.r
        keys = r.k[:, past].float().repeat_interleave(r.heads // r.groups, 2)
        if r.delta_rule:
            return [(keys, self.values[:, :, past])]
        scale = 1.0 if r.write_scale is None else r.write_scale[:, past, :, None]
        return [(keys, (r.v[:, past] * scale).float().transpose(1, 2))]


def _to(x: Tensor, like: Tensor) -> Tensor:
    """Bring to the device from pinned memory, so that the host does not wait."""
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x
