"""From measurements to shards, beside the reading.

Each layer's measurements leave a GPU on a stream of their own, straight into the pinned buffers of the
shards they belong to; a buffer that is full is compressed and written by a background thread. Nothing
waits for the device, and at most :data:`IN_FLIGHT` buffers are on their way, so that memory does not grow
with the text; an error of a thread is raised where the reading goes on.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statescope.reader import LOSS, Field, Measured, place_of_nonfinite
from statescope.schema import group_variables
from statescope.store import Layout
from statescope.watch import Watch

WRITERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that compress and write."""

IN_FLIGHT = 2 * WRITERS
"""Buffers on their way; each holds one variable's shard."""


class Writer(Protocol):
    """What takes a record: a store, or memory."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes."""
        ...

    def write(self, name: str, values: NDArray[Any], **at: slice | int) -> None:
        """Write a block of one variable."""
        ...

    def commit(self, tokens: int, carry: bytes | None, **attributes: Any) -> None:
        """Declare tokens safely written."""
        ...

    def discard_if_empty(self) -> None:
        """Remove a record in which nothing is committed yet."""
        ...


@dataclass
class _Interval:
    """What lies between two commits."""

    start: int
    stop: int
    fields: dict[Field, slice]  # entries of each field that fall into the interval
    loss: Tensor
    open: dict[int, dict[Field, Tensor]] = field(default_factory=dict)  # by group of layers: the buffers
    states: dict[int, list[Tensor]] = field(default_factory=dict)  # by position, then layer
    share_before: dict[int, list[Tensor]] = field(default_factory=dict)  # by probe, then layer
    nonfinite: list[tuple[int, int, Tensor]] = field(default_factory=list)  # first token, layer's row, ...
    writes: list[Future[None]] = field(default_factory=list)


class Recorder:
    """Takes measurements layer by layer and commits them interval by interval; a context manager.

    Parameters
    ----------
    open_writer : callable
        Opens what the record goes to. It takes a while, so it is called when the device has work waiting.
    by_shards : bool
        Whether a write should be a whole shard; else it is a layer.
    layout : Layout
        The shape of the record.
    watch : Watch
        What is kept.
    device : torch.device
        Where the measurements come from.
    """

    def __init__(
        self,
        open_writer: Callable[[], Writer],
        by_shards: bool,
        layout: Layout,
        watch: Watch,
        device: torch.device,
    ) -> None:
        self._layout, self._watch = layout, watch
        self._height = layout.layers_per_shard if by_shards else 1  # layers of one write
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="statescope-recorder")
        self._open_writer, self._opened = open_writer, Future[Writer]()
        self._nonfinite: Mapping[str, Any] | None = None
        self._waiting: deque[Future[None]] = deque()
        self._last_commit: Future[None] | None = None
        self._now: _Interval

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._wait(0)
        finally:
            never_opened = self._opened.cancel()  # or threads would wait for it
            self._pool.shutdown(cancel_futures=kind is not None)
            if kind is not None and not never_opened:
                self.writer.discard_if_empty()

    @property
    def writer(self) -> Writer:
        """What the record goes to; a thread waits until it is open."""
        return self._opened.result()

    def begin(self, start: int, stop: int) -> None:
        """Open the interval whose tokens the next commit will declare written."""
        window = self._watch.window
        entries = slice(start // window, -(-stop // window))
        fields: dict[Field, slice] = {
            (f"steps/{name}", None): entries for name in group_variables("steps", window)
        }
        for p in self._watch.probes:
            reach = slice(max(start, self._watch.probe_start(p)), min(stop, p + 1))
            if reach.start < reach.stop:
                fields |= {(f"probes/{name}", p): reach for name in ("contribution", "share")}
        self._now = _Interval(start, stop, fields, self._buffer(self._layout.sequences, stop - start))

    def take(self, row: int, measured: Measured) -> None:
        """Take what the watched layer number ``row`` yielded in one segment."""
        now, height = self._now, self._height
        group, place = divmod(row, height)
        if group not in now.open:
            layers = min(height, len(self._watch.layers) - group * height)
            now.open[group] = {key: self._shard(layers, at) for key, at in now.fields.items()}
        with self._beside():
            for key, (first, values) in measured.fields.items():
                begin = first - now.fields[key].start
                for buffer, x in zip(now.open[group][key], values, strict=True):
                    self._copy(buffer[place, begin : begin + len(x)], x)
            for p, state in measured.states.items():
                now.states.setdefault(p, []).append(self._to_host(state))
            for p, share in measured.share_before.items():
                now.share_before.setdefault(p, []).append(self._to_host(share))
            now.nonfinite.append((measured.start, row, self._to_host(measured.nonfinite)))
        if measured.stop == now.stop and place == len(next(iter(now.open[group].values()))[0]) - 1:
            self._write(group, self._arrival())

    def take_loss(self, start: int, loss: Tensor, nonfinite: Tensor) -> None:
        """Take the loss of every token of one segment."""
        begin = start - self._now.start
        with self._beside():
            for buffer, x in zip(self._now.loss, loss, strict=True):
                self._copy(buffer[begin : begin + len(x)], x)
            self._now.nonfinite.append((start, LOSS, self._to_host(nonfinite)))

    def commit(self, carry: Callable[[], bytes] | None) -> None:
        """Commit the interval; ``carry`` is None at the end of the text."""
        now, arrived, former = self._now, self._arrival(), self._last_commit
        waiting = [*now.writes] if former is None else [former, *now.writes]

        def work() -> None:
            for write in waiting:  # all were submitted, and so begun, before this
                write.result()
            arrived()
            self._commit(now, carry)

        self._last_commit = self._submit(work)

    def _write(self, group: int, arrived: Callable[[], None]) -> None:
        """Send the buffers of some layers on their way."""
        first = group * self._height
        for (name, probe), buffer in self._now.open.pop(group).items():
            at = {"token": self._now.fields[name, probe], "layer": slice(first, first + buffer.shape[1])}
            values = buffer.numpy()
            if probe is not None:
                index = self._watch.probes.index(probe)
                at["probe"], values = slice(index, index + 1), values[:, :, None]

            def work(name: str = name, values: NDArray[Any] = values, at: dict[str, slice] = at) -> None:
                arrived()
                self.writer.write(name, values, **at)

            self._now.writes.append(self._submit(work))

    def _commit(self, now: _Interval, carry: Callable[[], bytes] | None) -> None:
        self.writer.write("tokens/loss", now.loss.numpy(), token=slice(now.start, now.stop))
        if now.states:
            first = self._watch.snapshots.index(min(now.states))
            states = np.stack([_by_layer(now.states[p]) for p in sorted(now.states)], axis=2)
            self.writer.write("snapshots/state", states, position=slice(first, first + len(now.states)))
        for p, shares in now.share_before.items():
            index = self._watch.probes.index(p)
            values = _by_layer(shares)[:, :, None]
            self.writer.write("probes/share_before", values, probe=slice(index, index + 1))
        before = self._nonfinite or self.writer.attributes["first_nonfinite"]
        self._nonfinite = before or place_of_nonfinite(now.nonfinite, self._watch, self._layout.sequences)
        with self._beside():
            data = None if carry is None else carry()
        self.writer.commit(now.stop, data, first_nonfinite=self._nonfinite)

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        if not self._opened.done():
            self._opened.set_result(self._open_writer())
        self._wait(IN_FLIGHT - 1)
        self._waiting.append(self._pool.submit(work))
        return self._waiting[-1]

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Work on the stream of the copies, after what the device has been asked to compute so far."""
        if self._stream is None:
            yield
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                yield

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source.contiguous(), non_blocking=True)
        if self._stream is not None:
            source.record_stream(self._stream)

    def _to_host(self, source: Tensor) -> Tensor:
        target = self._buffer(*source.shape, dtype=source.dtype)
        self._copy(target, source)
        return target

    def _shard(self, layers: int, at: slice) -> Tensor:
        return self._buffer(self._layout.sequences, layers, at.stop - at.start, len(self._watch.heads))

    def _buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def _arrival(self) -> Callable[[], None]:
        """Return what waits until all that was copied so far has arrived."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.synchronize


def _by_layer(layers: Sequence[Tensor]) -> NDArray[Any]:
    return np.stack([x.numpy() for x in layers], axis=1)
