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

from statescope.layout import Layout
from statescope.measured import ATTRIBUTED, LOSS, OF_PROBE, Field, Measured, Suspect, place_of_nonfinite
from statescope.watch import Watch

WRITERS = max(2, min(8, os.cpu_count() or 1))
"""Threads that compress and write."""

IN_FLIGHT = 4 * WRITERS
"""Writes on their way; each is one variable's shard."""

AHEAD = 0.75
"""Part of a segment's layers that are launched before the record is opened: a device has work enough by then
not to run dry meanwhile, and what is measured so far can be written while it computes the rest."""


class Writer(Protocol):
    """What takes a record: a store, or memory."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes."""
        ...

    def write(self, name: str, values: NDArray[Any], **at: slice) -> None:
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
    of_probe: dict[int, list[Tensor]] = field(default_factory=dict)  # by probe, then layer
    suspects: list[tuple[int, int, Suspect]] = field(default_factory=list)  # first token, layer's row, ...
    writes: list[Future[None]] = field(default_factory=list)


class Recorder:
    """Takes measurements layer by layer and commits them interval by interval; a context manager.

    Parameters
    ----------
    open_writer : callable
        Opens what the record goes to. It takes a while, so it is called when the device has work waiting
        (:data:`AHEAD`); a thread of its own would only take turns with the launching.
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
        complete = False
        try:
            if kind is None:
                self._wait(0)
                complete = True
        finally:
            never_opened = self._opened.cancel()  # or threads would wait for it
            self._pool.shutdown(cancel_futures=not complete)
            if not complete and not never_opened:
                self.writer.discard_if_empty()

    @property
    def writer(self) -> Writer:
        """What the record goes to; a thread waits until it is open."""
        return self._opened.result()

    def begin(self, start: int, stop: int) -> None:
        """Open the interval whose tokens the next commit will declare written."""
        window = self._watch.window
        fields: dict[Field, slice] = {("steps", None): slice(start // window, -(-stop // window))}
        for p in self._watch.probes:
            reach = slice(max(start, self._watch.probe_start(p)), min(stop, p + 1))
            if reach.start < reach.stop:
                fields["probes", p] = reach
        self._now = _Interval(start, stop, fields, self._buffer(self._layout.sequences, stop - start))

    def take(self, row: int, measured: Measured) -> None:
        """Take what the watched layer number ``row`` yielded in one segment."""
        now = self._now
        group, place = divmod(row, self._height)
        layers = min(self._height, len(self._watch.layers) - group * self._height)
        if group not in now.open:
            now.open[group] = {name: self._shard(name, layers) for name in now.fields}
        with self._beside():
            for name, (first, values) in measured.fields.items():
                begin = first - now.fields[name].start
                self._copy(now.open[group][name][place, :, :, begin : begin + values.shape[2]], values)
            for p, state in measured.states.items():
                now.states.setdefault(p, []).append(self._to_host(state))
            for p, values in measured.of_probe.items():
                now.of_probe.setdefault(p, []).append(self._to_host(values))
        now.suspects.append((measured.start, row, measured.suspect))
        if measured.stop == now.stop and place == layers - 1:
            self._write(group, self._arrival())
        if row + 1 >= AHEAD * len(self._watch.layers):
            self._open()

    def take_loss(self, start: int, loss: Tensor, suspect: Suspect) -> None:
        """Take the loss of every token of one segment."""
        begin = start - self._now.start
        with self._beside():
            self._copy(self._now.loss[:, begin : begin + loss.shape[1]], loss)
        self._now.suspects.append((start, LOSS, suspect))
        if begin + loss.shape[1] == len(self._now.loss[0]):
            at = {"token": slice(self._now.start, self._now.stop)}
            self._write_later("tokens/loss", self._now.loss.numpy(), at, self._arrival())

    def commit(self, carry: Callable[[], bytes] | None) -> None:
        """Commit the interval; ``carry`` is None at the end of the text."""
        now, former = self._now, self._last_commit
        waiting = [*now.writes] if former is None else [former, *now.writes]
        now.suspects = self._suspects_to_host(now.suspects)
        arrived = self._arrival()

        def work() -> None:
            for write in waiting:  # all were submitted, and so begun, before this
                write.result()
            arrived()
            self._commit(now, carry)

        self._last_commit = self._submit(work)

    def _write(self, group: int, arrived: Callable[[], None]) -> None:
        """Send the buffers of some layers on their way."""
        first = group * self._height
        for (kind, probe), buffer in self._now.open.pop(group).items():
            at = {"token": self._now.fields[kind, probe], "layer": slice(first, first + len(buffer))}
            variables = buffer.numpy().transpose(1, 2, 0, 3, 4)
            if probe is not None:
                index = self._watch.probes.index(probe)
                at["probe"], variables = slice(index, index + 1), variables[:, :, :, None]
            for name, values in zip(self._variables(kind), variables, strict=True):
                self._write_later(f"{kind}/{name}", values, at, arrived)

    def _write_later(
        self, name: str, values: NDArray[Any], at: Mapping[str, slice], arrived: Callable[[], None]
    ) -> None:
        def work() -> None:
            arrived()
            self.writer.write(name, values, **at)

        self._now.writes.append(self._submit(work))

    def _commit(self, now: _Interval, carry: Callable[[], bytes] | None) -> None:
        if now.states:
            first = self._watch.snapshots.index(min(now.states))
            states = np.stack([_by_layer(now.states[p]) for p in sorted(now.states)], axis=2)
            self.writer.write("snapshots/state", states, position=slice(first, first + len(now.states)))
        for p, layers in now.of_probe.items():
            index = self._watch.probes.index(p)
            for i, name in enumerate(OF_PROBE):
                values = _by_layer([x[i] for x in layers])[:, :, None]
                self.writer.write(f"probes/{name}", values, probe=slice(index, index + 1))
        before = self._nonfinite or self.writer.attributes["first_nonfinite"]
        self._nonfinite = before or place_of_nonfinite(now.suspects, self._watch)
        with self._beside():
            data = None if carry is None else carry()
        self.writer.commit(now.stop, data, first_nonfinite=self._nonfinite)

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        self._wait(IN_FLIGHT - 1)
        self._waiting.append(self._pool.submit(work))
        return self._waiting[-1]

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._open()  # nothing more is launched for now, and the device is busy
            self._waiting.popleft().result()

    def _open(self) -> None:
        if not self._opened.done():
            self._opened.set_result(self._open_writer())

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
        if self._stream is not None:
            source.record_stream(self._stream)
        self._copy_parts(target, source.contiguous())

    def _copy_parts(self, target: Tensor, source: Tensor) -> None:
        if target.is_contiguous():  # or the copy would wait for the device
            target.copy_(source, non_blocking=True)
        else:
            for part, x in zip(target, source, strict=True):
                self._copy_parts(part, x)

    def _to_host(self, source: Tensor) -> Tensor:
        target = self._buffer(*source.shape, dtype=source.dtype)
        self._copy(target, source)
        return target

    def _suspects_to_host(self, found: list[tuple[int, int, Suspect]]) -> list[tuple[int, int, Suspect]]:
        joined = (
            torch.stack([x.token for _, _, x in found]),
            torch.cat([x.values.flatten() for _, _, x in found]),
        )
        with self._beside():  # joined before: what is joined is freed in the order of the computation
            tokens, values = map(self._to_host, joined)
        split = values.split([x.values.numel() for _, _, x in found])
        return [
            (start, row, Suspect(token, part.view(x.values.shape)))
            for (start, row, x), token, part in zip(found, tokens, split, strict=True)
        ]

    def _variables(self, kind: str) -> Sequence[str]:
        return ATTRIBUTED if kind == "probes" else [*self._layout.variables(kind)]

    def _shard(self, name: Field, layers: int) -> Tensor:
        at, variables = self._now.fields[name], len(self._variables(name[0]))
        size = (layers, variables, self._layout.sequences, at.stop - at.start, len(self._watch.heads))
        return self._buffer(*size)

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
