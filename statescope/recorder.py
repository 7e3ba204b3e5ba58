"""From the blocks of a reading to shards on disk, beside the reading.

Measurements leave a GPU through pinned memory without waiting for it; one background thread waits,
gathers them into whole shards, compresses and writes. At most :data:`IN_FLIGHT` segments are on their
way, so that memory does not grow with the text; an error of the thread is raised where the reading goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statescope.reader import Block, place_of_nonfinite
from statescope.schema import group_variables
from statescope.store import RecordWriter
from statescope.watch import Watch

IN_FLIGHT = 2
"""Segments measured but not yet written or gathered."""


class Recorder:
    """Takes blocks in order and commits them shard by shard; a context manager.

    Parameters
    ----------
    writer : RecordWriter
        Where to.
    watch : Watch
        What is kept.
    start : int
        Tokens that are committed already.
    """

    def __init__(self, writer: RecordWriter, watch: Watch, start: int) -> None:
        self._writer, self._watch, self._start = writer, watch, start
        self._blocks: list[Block] = []
        self._nonfinite: Mapping[str, Any] | None = writer.attributes["first_nonfinite"]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="statescope-recorder")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=kind is not None)

    def add(self, block: Block) -> None:
        """Take the next block."""
        on_host, arrived = _to_host(block)
        self._submit(lambda: self._gather(on_host, arrived))

    def commit(self, stop: int, carry: Callable[[], bytes] | None) -> None:
        """Write what was taken as whole shards and commit it; ``carry`` is None at the end of the text."""
        self._submit(lambda: self._commit(stop, carry))

    def _submit(self, work: Callable[[], None]) -> None:
        self._wait(IN_FLIGHT - 1)
        self._waiting.append(self._pool.submit(work))

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    def _gather(self, block: Block, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        start = self._start + sum(b.loss.shape[1] for b in self._blocks)
        self._nonfinite = self._nonfinite or place_of_nonfinite(block, self._watch, start)
        self._blocks.append(block)

    def _commit(self, stop: int, carry: Callable[[], bytes] | None) -> None:
        window = self._watch.window
        entries = slice(self._start // window, -(-stop // window))
        for name in group_variables("steps", window):
            self._writer.write(
                f"steps/{name}", _joined([b.steps[name] for b in self._blocks], 2), token=entries
            )
        loss = _joined([b.loss for b in self._blocks], 1)
        self._writer.write("tokens/loss", loss, token=slice(self._start, stop))
        states = {p: x for b in self._blocks for p, x in b.states.items()}
        if states:
            first = self._watch.snapshots.index(min(states))
            stacked = np.stack([states[p].numpy() for p in sorted(states)], axis=2)
            self._writer.write("snapshots/state", stacked, position=slice(first, first + len(states)))
        for i, p in enumerate(self._watch.probes):
            self._write_probe(slice(i, i + 1), p)
        data = None if carry is None else carry()
        self._writer.commit(stop, data, first_nonfinite=self._nonfinite)
        self._start, self._blocks = stop, []

    def _write_probe(self, at: slice, p: int) -> None:
        for name in ("contribution", "share"):
            parts = [getattr(b, name)[p] for b in self._blocks if p in getattr(b, name)]
            if parts:
                values = _joined([x for _, x in parts], 2)[:, :, None]
                token = slice(parts[0][0], parts[0][0] + values.shape[3])
                self._writer.write(f"probes/{name}", values, probe=at, token=token)
        for block in self._blocks:
            if p in block.share_before:
                self._writer.write("probes/share_before", block.share_before[p].numpy()[:, :, None], probe=at)


def _to_host(block: Block) -> tuple[Block, torch.cuda.Event | None]:
    """Start copying to pinned memory; the event says when everything has arrived."""

    def move(x: Tensor) -> Tensor:
        return x.to(torch.float32).to("cpu", non_blocking=True)

    moved = Block(
        steps={name: move(x) for name, x in block.steps.items()},
        loss=move(block.loss),
        states={p: move(x) for p, x in block.states.items()},
        contribution={p: (at, move(x)) for p, (at, x) in block.contribution.items()},
        share={p: (at, move(x)) for p, (at, x) in block.share.items()},
        share_before={p: move(x) for p, x in block.share_before.items()},
        nonfinite=block.nonfinite.to("cpu", non_blocking=True),
    )
    if block.loss.device.type != "cuda":
        return moved, None
    arrived = torch.cuda.Event()
    arrived.record()
    return moved, arrived


def _joined(parts: list[Tensor], axis: int) -> NDArray[np.float32]:
    return parts[0].numpy() if len(parts) == 1 else np.concatenate([x.numpy() for x in parts], axis=axis)
