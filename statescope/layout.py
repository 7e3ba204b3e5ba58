"""The shape of a record: its dimensions, and how they are cut into chunks and shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from statescope.schema import Variable, group_variables

SHARD_BYTES = 64 * 2**20
"""Upper bound of one variable's shard, uncompressed."""

PARTS, SMALL_SHARD_BYTES = 6, 2**20
"""Writes over which a record is spread, by layers where it has fewer commits, and the size not split further:
what is written before the end is written beside the reading."""

SHARD_TOKENS = 16384
"""Upper bound of the tokens between two commits."""

CHUNK_BYTES = 2**20
"""Aimed size of what a reader must decompress at once."""


@dataclass(frozen=True)
class Layout:
    """The shape of a record."""

    sequences: int
    tokens: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    key: int
    value: int
    window: int
    snapshots: tuple[int, ...]
    probes: tuple[int, ...]
    shard: int  # tokens between two commits, a multiple of the window
    erases: bool = False  # by the delta rule

    def variables(self, group: str) -> dict[str, Variable]:
        """Variables of a group."""
        return group_variables(group, self.window, self.erases)

    @property
    def entries(self) -> int:
        """Entries of ``/steps``: one for every window."""
        return -(-self.tokens // self.window)

    def coordinate(self, group: str, dim: str) -> NDArray[np.int64]:
        """Values of a dimension's coordinate."""
        if dim == "token" and group == "steps":
            ends = np.arange(self.window - 1, self.entries * self.window, self.window)
            return np.minimum(ends, self.tokens - 1)
        named = {"layer": self.layers, "head": self.heads, "probe": self.probes, "position": self.snapshots}
        values = named[dim] if dim in named else np.arange(self.size(group, dim))
        return np.asarray(values, dtype=np.int64)

    def size(self, group: str, dim: str) -> int:
        """Length of a dimension."""
        lengths = {
            "sequence": self.sequences,
            "layer": len(self.layers),
            "token": self.entries if group == "steps" else self.tokens,
            "head": len(self.heads),
            "probe": len(self.probes),
            "position": len(self.snapshots),
            "key": self.key,
            "value": self.value,
        }
        return lengths[dim]

    def groups(self) -> list[str]:
        """Groups this record has."""
        optional = {"snapshots": self.snapshots, "probes": self.probes}
        return ["tokens", "steps", *(name for name, wanted in optional.items() if wanted)]

    @property
    def layers_per_shard(self) -> int:
        """How many layers one shard of ``/steps`` or ``/probes`` holds."""
        width = self.shard if self.probes else -(-self.shard // self.window)
        layer = 4 * self.sequences * len(self.heads) * width
        parts = -(-PARTS // -(-self.tokens // self.shard))
        part = max(-(-len(self.layers) // parts), -(-SMALL_SHARD_BYTES // layer))
        return max(1, min(len(self.layers), part, SHARD_BYTES // layer))

    def shards(self, group: str, variable: Variable) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Chunk and shard shapes of a variable."""
        size = {d: max(1, self.size(group, d)) for d in variable.dims}
        chunk, shard = dict(size), dict(size)
        if len(size) > 2:
            chunk |= {d: 1 for d in ("sequence", "layer")}
        if "token" in size:
            row = 4 * size.get("head", 1)
            width = -(-self.shard // self.window) if group == "steps" else self.shard
            chunk["token"], shard["token"] = _cut(
                width, max(1, CHUNK_BYTES // row), self.shard >= self.tokens
            )
            if "layer" in size:
                shard["layer"] = self.layers_per_shard
                chunk["layer"], _ = _cut(shard["layer"], max(1, CHUNK_BYTES // (row * chunk["token"])), False)
        if "position" in size:
            state = 4 * int(np.prod([n for d, n in size.items() if d != "position"]))
            shard["position"] = max(1, min(size["position"], SHARD_BYTES // state))
            chunk["position"] = 1
        if "probe" in size:
            chunk["probe"] = shard["probe"] = 1
        return tuple(chunk[d] for d in variable.dims), tuple(shard[d] for d in variable.dims)


def shard_tokens(bytes_per_token: int, segment: int) -> int:
    """Tokens between two commits: whole segments, within the bounds on a shard.

    Parameters
    ----------
    bytes_per_token : int
        Of one variable of ``/steps``, all sequences, layers and heads.
    segment : int
        Tokens of one forward pass.
    """
    return segment * max(1, min(SHARD_TOKENS, SHARD_BYTES // bytes_per_token) // segment)


def _cut(length: int, at_most: int, may_grow: bool) -> tuple[int, int]:
    """Cut a shard into equal chunks; one that nothing comes after may grow to be cut evenly."""
    if may_grow:
        pieces = -(-length // at_most)
        chunk = -(-length // pieces)
        return chunk, pieces * chunk
    return next(d for d in range(min(length, at_most), 0, -1) if length % d == 0), length
