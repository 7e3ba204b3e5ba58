r"""Any erase term but the delta rule's on a GPU (Triton): RWKV-7.

Each token makes two writes, of which the second decays nothing: :math:`a_t z_t^\top`, where :math:`z_t =
S_{t-1}^\top b_t`, and :math:`k_t v_t^\top`. The launches are those of :mod:`statescope.kernels.fused_keyed`,
with relations of every row to either kind of write; the first kind is solved for, the second is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statescope.recurrence import Recurrence

from . import fused_keyed
from .fused_keyed import SOLVED, Tiling
from .interface import ScanOutput, Steps
from .keyed import Measured

FIELDS = 6
"""Of what is measured."""

AHEAD = 8
"""Tokens that are loaded at once where energies are followed token by token."""


def tiling(recurrence: Recurrence, half: bool, modern: bool) -> Tiling:
    """Choose tiles; parameters as :func:`statescope.kernels.fused_keyed.tiling`."""
    r = recurrence
    keys, values = (max(16, 1 << (n - 1).bit_length()) for n in (r.key, r.value))
    if half and modern:
        narrow = keys <= 64
        return Tiling(64, keys, 64 if narrow else 32, 64, keys, 16 if narrow else 32, 64, 64, 64, 64, 32,
                      walk_stages=3 if narrow else 2, part_stages=2, solve_registers=168)  # fmt: skip
    some, columns = min(keys, 32), min(values, 32)
    return Tiling(16, keys, some, min(some, columns), keys, min(columns, 16), some, columns, some, columns,
                  min(some, columns))  # fmt: skip


def scan(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: bool,
    measure: bool,
    positions: Sequence[int],
    modern: bool,
) -> ScanOutput:
    """Run a recurrence with an erase term that is not the delta rule's.

    Parameters as :func:`statescope.kernels.fused_keyed.scan`.
    """
    cut = tiling(recurrence, fused_keyed.halves(recurrence), modern)
    return fused_keyed.scan(recurrence, q, k, v, outputs, measure, positions, modern, _Scan, cut)


class _Scan(fused_keyed.Scan):
    """One scan, with buffers for either kind of write."""

    def _kernels(self) -> tuple[Any, Any]:
        from . import fused_hard_kernels, fused_pairs_kernels

        return fused_pairs_kernels, fused_hard_kernels

    def _buffers(self) -> None:
        r, heads = self.r, (self.r.batch, self.r.heads)
        rounded = torch.bfloat16 if self.split else torch.float32
        square = (2, *heads, self.padded, self.cut.chunk)
        self.final = self._empty(*heads, r.key, r.value)
        self.hard = self._empty(*heads, self.chunks, dtype=torch.int32)
        self.listed = torch.zeros(1 + self.hard.numel(), dtype=torch.int32, device=r.v.device)
        self.kept, self.halves = (self._empty(*heads, self.chunks, r.key) for _ in range(2))
        self.remaining = self._empty(2, *heads, self.padded, r.key)
        if self.split:
            self.remaining = self.remaining.view(torch.bfloat16).view(2, 2, -1)
        self.through = self._of_keys()
        self.system = self._empty(*square)
        self.values = self._empty(*heads, self.padded, r.value)
        self.asked, self.seen, self.states, self.energy = self.kept, self.kept[None], self.final, self.kept
        if self.outputs:
            self.asked = self._empty(*heads, self.padded, r.key, dtype=rounded)
            self.seen = self._empty(*square, dtype=rounded)
        if self.outputs or self.measure:
            self.states = self._empty(*heads, self.chunks, r.key, r.value, dtype=rounded)
        if self.measure:
            self.energy = self._empty(2, *heads, self.chunks, self.pieces, r.key)

    def _relate(self) -> None:
        r, chosen = self.r, {"OUTPUTS": self.outputs}
        given = (*self.given, *self.along, *self.erase)
        for wide in (False, True):
            self.launch(
                self.kernels.relate, self.grid,
                (*given, self.remaining, self.kept, self.halves, self.through, self.asked, self.system,
                 self.seen[0], self.hard, self.listed, *self.sizes),
                self.keyed | self.scaled | chosen
                | {"GROUPS": r.groups, "BS": self.cut.related, "WIDE": wide}, wide, **self.usual,
            )  # fmt: skip
        query, others = given[: len(self.q)], given[len(self.q) + len(self.k) :]
        for second in (False, True):  # hard chunks: what is related to a, then what is to k
            self.launch(
                self.careful.relate_parts, self.few,
                (*query, *(self.k if second else self.erase), *others, self.remaining[int(second)], self.kept,
                 self.through, self.asked, self.system[int(second)], self.seen[-int(second)], self.listed,
                 *self.sizes),
                self.keyed | self.part | chosen
                | {"GROUPS": r.groups, "KEY_GROUPS": r.groups if second else r.heads, "BEFORE": True,
                   "ERASES": True, "HAS_SCALE": second and r.write_scale is not None},
                second, **self.few_warps,
            )  # fmt: skip

    def _solve(self) -> None:
        constants = self.whole | self.scaled
        constants |= {"PART": min(SOLVED, self.cut.chunk), "BS": self.cut.solved, "BV": self.cut.solved}
        self.launch(
            self.kernels.solve, self.grid,
            (*self.v, *self.weight, self.system, self.through, self.values, self.hard, *self.sizes),
            constants, **self.solving,
        )  # fmt: skip

    def _walk(self, held: list[int]) -> Tensor:
        r, cut = self.r, self.cut
        entered, slots = self._kept(held)
        initial = self.final if r.initial_state is None else r.initial_state.contiguous()
        self.launch(
            self.kernels.walk, (r.heads * self.pieces, r.batch),
            (self.remaining, self.kept, self.through, *self.v, self.values, initial, self.final, self.states,
             self.energy, entered, slots, *self.sizes),
            self.whole | {
                "BK": cut.walked_keys, "BV": cut.walked, "BLOCKS": self.pieces, "STAGES": cut.walk_stages,
                "HAS_INITIAL": r.initial_state is not None, "STORE": self.outputs or self.measure,
                "MEASURE": self.measure, "KEEP": bool(held),
            },
            num_warps=cut.warps,
        )  # fmt: skip
        return entered

    def _read(self) -> Tensor:
        r, cut = self.r, self.cut
        y = torch.empty(r.v.shape, dtype=r.v.dtype, device=r.v.device)
        self.launch(
            self.kernels.read, (self.chunks * -(-r.value // cut.read_columns), r.heads, r.batch),
            (*self.v, *self.weight, self.asked, self.states, self.seen[0], self.values,
             self.kept if r.skip is None else r.skip, y, *self.sizes),
            self.whole | self.scaled
            | {"BS": cut.read_keys, "BV": cut.read_columns, "HAS_SKIP": r.skip is not None},
            **self.usual,
        )  # fmt: skip
        return y

    def _measure(self) -> tuple[Steps, Tensor | None]:
        r = self.r
        written = (*self.k, *self.v, *self.weight, *self.decay, *self.erase, self.values)
        constants = self.whole | self.scaled | {"GROUPS": r.groups}
        found = self._fields(FIELDS, written, constants, self.kernels.measure_parts, AHEAD=AHEAD)
        decayed, energy, cross, total, pace, _ = found
        written_energy = energy.clamp(min=0)
        return Measured(decayed, written_energy, cross, total / (r.key * r.value)).steps(pace), None

    def _written(self, past: slice) -> list[tuple[Tensor, Tensor]]:
        r = self.r
        assert r.a is not None
        erased = r.a[:, past].float(), self.values[:, :, past]
        return [erased, *super()._written(past)]
