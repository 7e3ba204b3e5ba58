"""Read a text through a model, segment by segment, and measure every scan on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from statescope import caches
from statescope.adapters import Call
from statescope.capture import Handler, capture
from statescope.carry import Carry
from statescope.measured import ATTRIBUTED, OF_PROBE, STEPS, Measured, Sink, suspect
from statescope.recurrence import Recurrence
from statescope.scan import (
    ScanOutput,
    at_rest,
    probe,
    scan,
    thin,
    thin_erased,
    token_loss,
    transition,
    written_out,
)
from statescope.watch import Watch

Edit = Callable[[int, Recurrence], Recurrence]
"""``edit(layer, recurrence)`` returns the recurrence to run instead."""


class Reader:
    """Reads segments with the model's own cache carried across them.

    Parameters
    ----------
    model : nn.Module
        The model, in evaluation mode.
    ids : Tensor, (batch, time)
        The text, on the CPU.
    watch : Watch
        What to keep.
    backend : str
        The kernel that measures.
    own_outputs : bool
        Whether the model's own scan computes the outputs (else the kernel does).
    edit : callable, optional
        See :data:`Edit`; needs ``own_outputs=False``.
    erases : bool
        Whether to keep what the delta rule erases.
    lengths : sequence of int, optional
        Of every sequence, where shorter ones are padded on the right; for texts of one segment.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        watch: Watch,
        backend: str,
        own_outputs: bool,
        edit: Edit | None = None,
        erases: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.model, self.ids, self.watch = model, ids, watch
        self.backend, self.own_outputs, self.edit, self.erases = backend, own_outputs, edit, erases
        self.device = next(model.parameters()).device
        self.heads = torch.tensor(watch.heads, device=self.device)
        self.lengths = None if lengths is None else torch.tensor(lengths, device=self.device)
        self._handler: Handler | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Intercept the model's scans for as long as segments are read."""
        with capture(self.model, lambda *call: self._handler(*call)):  # type: ignore[misc]
            yield

    def read(self, carry: Carry, stop: int, sink: Sink) -> None:
        """Read from where the carry stands to ``stop``, measure, and move the carry there."""
        segment = _Segment(self, carry, carry.position, stop, sink)
        logits, targets = self._forward(carry, stop, segment.on_scan)
        loss = self._loss(logits, targets, carry, stop)
        known = loss if segment.start else torch.cat([torch.zeros_like(loss[:, :1]), loss[:, 1:]], 1)
        if not predicts_next_token(self.model):
            known = torch.zeros_like(loss)  # missing on purpose, which is no reason to warn
        sink.take_loss(segment.start, loss, suspect(known[None, ..., None]))
        carry.position = stop

    def read_ahead(self, carry: Carry, stop: int) -> None:
        """Read without measuring: keep only the states at the probes and the decay up to them."""
        self._forward(carry, stop, _Segment(self, carry, carry.position, stop).on_scan_ahead)
        carry.position = stop

    def _forward(self, carry: Carry, stop: int, handler: Handler) -> tuple[Tensor, Tensor]:
        """Return logits and what they predict, the token after the segment included if there is one."""
        # The targets come along now: fetched later, they would wait for the device.
        ids = self.ids[:, carry.position : stop + 1].to(self.device)
        read = ids[:, : stop - carry.position]
        inputs = caches.inputs(self.model, carry.cache, carry.position, read)
        self._handler = handler
        try:
            with torch.no_grad():
                output = self.model(read, **inputs)
        finally:  # it knows the reader: kept, both and all states would wait for the collector
            self._handler = None
        return output.logits, ids[:, 1:]

    def _loss(self, logits: Tensor, targets: Tensor, carry: Carry, stop: int) -> Tensor:
        """Loss of every token of the segment; that of the token after it waits in the carry."""
        if not predicts_next_token(self.model):
            return torch.full((len(self.ids), stop - carry.position), torch.nan, device=self.device)
        known_of = zip(logits[:, : targets.shape[1]], targets, strict=True)
        predicted = torch.stack([token_loss(*rows) for rows in known_of])  # flattened, logits would be copied
        first = carry.pending_loss
        if first is None:
            first = torch.full((len(self.ids),), torch.nan, device=self.device)
        known = torch.cat([first[:, None], predicted], 1)
        length = stop - carry.position
        carry.pending_loss = known[:, length] if known.shape[1] > length else None
        return known[:, :length]


def predicts_next_token(model: nn.Module) -> bool:
    """Say whether a model's logits predict the next token; where its checkpoint says no, there is no loss."""
    return bool(getattr(model.config, "predicts_next_token", True))


class _Segment:
    """Measures the scans of one forward pass."""

    def __init__(self, reader: Reader, carry: Carry, start: int, stop: int, sink: Sink | None = None) -> None:
        self.reader, self.watch, self.carry, self.sink = reader, reader.watch, carry, sink
        self.start, self.stop = start, stop

    def on_scan(self, layer: int, call: Call, run_own: Callable[[], Any]) -> Any:
        watched = layer in self.watch.layers
        if self.reader.own_outputs and not watched:
            return run_own()
        recurrence = self._edited(layer, call)
        positions = self._positions() if watched else []
        output = scan(
            recurrence,
            backend=self.reader.backend,
            outputs=not self.reader.own_outputs,
            measure=watched,
            positions=[p - self.start for p in positions],
        )
        if watched:
            states = dict(zip(positions, output.states.unbind(1), strict=True))
            self._collect(layer, recurrence, output, states)
        return run_own() if self.reader.own_outputs else call.answer(output)

    def on_scan_ahead(self, layer: int, call: Call, run_own: Callable[[], Any]) -> Any:
        recurrence = self._edited(layer, call)
        probes = [p for p in self.watch.probes if self.start <= p < self.stop]
        answer = run_own
        if probes or not self.reader.own_outputs:
            output = scan(
                recurrence,
                backend=self.reader.backend,
                outputs=not self.reader.own_outputs,
                measure=False,
                positions=[p - self.start for p in probes],
            )
            for p, state in zip(probes, output.states.unbind(1), strict=True):
                self.carry.probe_states[layer, p] = state
                self.carry.probe_queries[layer, p] = recurrence.q[:, p - self.start].clone()
                if recurrence.erases:
                    until = recurrence.between(0, p + 1 - self.start, None)
                    self.carry.probe_maps[layer, p] = transition(until)
                else:
                    self.carry.probe_decays[layer, p] = self._decay_until(layer, recurrence, p + 1)
            if not self.reader.own_outputs:
                answer = lambda: call.answer(output)  # noqa: E731
        if recurrence.erases:
            self.carry.maps[layer, self.start] = transition(recurrence)
        else:
            self.carry.log_decay[layer] = self._decay_until(layer, recurrence, self.stop)
        return answer()

    def _edited(self, layer: int, call: Call) -> Recurrence:
        if self.reader.edit is None:
            return call.recurrence
        edited = self.reader.edit(layer, written_out(call.recurrence))
        if not isinstance(edited, Recurrence):
            raise TypeError(f"edit returned {type(edited).__name__} at layer {layer}; expected a Recurrence")
        shapes = [(*r.v.shape, r.key) for r in (edited, call.recurrence)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"edit returned a recurrence of another shape at layer {layer}: {shapes[0]};"
                f" expected (batch, time, heads, value, key) {shapes[1]}, as it was given"
            )
        return edited

    def _positions(self) -> list[int]:
        """Tokens of this segment whose state is needed: snapshots, probes, and where a reach begins."""
        watch = self.watch
        wanted = {*watch.snapshots, *watch.probes, *(watch.probe_start(p) - 1 for p in watch.probes)}
        return sorted(p for p in wanted if self.start <= p < self.stop)

    def _collect(
        self, layer: int, recurrence: Recurrence, output: ScanOutput, states: dict[int, Tensor]
    ) -> None:
        assert output.steps is not None and self.sink is not None
        every = torch.stack([self._of_heads(getattr(output.steps, name)) for name in STEPS])
        if self.reader.lengths is not None:
            every = at_rest(every, self.reader.lengths)
        window = self.watch.window
        kept = every if window == 1 else thin(every, window)
        if self.reader.erases:
            erased = every.new_zeros(2, *every.shape[1:]) if output.erased is None else output.erased
            kept = torch.cat([kept, thin_erased(self._of_heads(erased), window, self.reader.lengths)])
        measured = Measured(
            self.start,
            self.stop,
            fields={("steps", None): (self.start // window, kept)},
            states={p: self._of_heads(states[p], 1) for p in self.watch.snapshots if p in states},
            suspect=suspect(every),
        )
        for p in self.watch.probes:
            if self.watch.probe_start(p) < self.stop and p >= self.start:
                self._attribute(layer, recurrence, p, states, measured)
        if self.watch.probes and not recurrence.erases:
            self.carry.log_decay[layer] = self._decay_until(layer, recurrence, self.stop)
        self.sink.take(self.watch.layers.index(layer), measured)

    def _attribute(
        self, layer: int, r: Recurrence, p: int, states: dict[int, Tensor], measured: Measured
    ) -> None:
        """Attribute the state at a probe to the tokens of this segment within its reach."""
        reach_start = self.watch.probe_start(p)
        first, last = max(self.start, reach_start), min(self.stop, p + 1)
        entering = r.initial_state if first == self.start else states[first - 1]
        part = r.between(first - self.start, last - self.start, entering)
        inside = p < self.stop
        after = None if inside else self._until_probe(layer, r, p)
        state = states[p] if inside else self.carry.probe_states[layer, p]
        query = r.q[:, p - self.start] if inside else self.carry.probe_queries[layer, p]
        found = probe(part, state, query, after)._asdict()
        stacked = [torch.stack([self._of_heads(found[n]) for n in names]) for names in (ATTRIBUTED, OF_PROBE)]
        measured.fields["probes", p] = (first, stacked[0])
        if first == reach_start:
            measured.of_probe[p] = stacked[1]

    def _until_probe(self, layer: int, r: Recurrence, p: int) -> Tensor:
        """What happens from the end of this segment to a later probe; see :func:`statescope.scan.probe`."""
        if not r.erases:
            return self.carry.probe_decays[layer, p] - self._decay_until(layer, r, self.stop)
        starts = sorted(start for at, start in self.carry.maps if at == layer and start <= p)
        after = self.carry.probe_maps[layer, p]  # from the start of its own segment, the last of these
        for start in reversed(starts[:-1]):
            after = after @ self.carry.maps[layer, start] if start >= self.stop else after
        return after

    def _of_heads(self, x: Tensor, axis: int = -1) -> Tensor:
        """Pick the watched heads, as float32."""
        watched = x.shape[axis] == len(self.watch.heads)
        return (x if watched else x.index_select(axis, self.reader.heads)).to(torch.float32)

    def _decay_until(self, layer: int, r: Recurrence, stop: int) -> Tensor:
        total = r.log_decay[:, : stop - self.start].sum(1, dtype=torch.float64)
        return total + self.carry.log_decay[layer] if layer in self.carry.log_decay else total
