"""Read a text through a model, segment by segment, and measure every scan on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from statescope import caches
from statescope.adapters import Call
from statescope.capture import capture, mixers
from statescope.carry import Carry
from statescope.recurrence import Recurrence
from statescope.scan import ScanOutput, Steps, choose, probe, scan
from statescope.watch import Watch, thin

Edit = Callable[[int, Recurrence], Recurrence]
"""``edit(layer, recurrence)`` returns the recurrence to run instead."""

LOGIT_ROWS = 1024
"""Tokens whose logits are held in float32 at once for the loss."""


class Anatomy(NamedTuple):
    """The recurrent layers of a model, all of one shape."""

    layers: tuple[int, ...]
    heads: int
    key: int
    value: int
    backend: str


@dataclass
class Block:
    """What one segment yields; a tensor's first axis is the sequence, its second the layer."""

    steps: dict[str, Tensor]
    loss: Tensor  # (batch, time)
    states: dict[int, Tensor]  # by position: (batch, layer, head, key, value)
    contribution: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # by probe: first token,
    share: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # ... (batch, layer, time, head)
    share_before: dict[int, Tensor] = field(default_factory=dict)  # by probe: (batch, layer, head)
    nonfinite: Tensor = field(default_factory=lambda: torch.empty(0))  # (layers + 1, 2), the last: the loss


def survey(model: nn.Module, ids: Tensor, backend: str) -> Anatomy:
    """Find what there is to record by reading one token.

    Parameters
    ----------
    model : nn.Module
        The model.
    ids : Tensor, (batch, time)
        A text it can read; the first token of it is read.
    backend : str
        As given to ``trace``; the kernel it leads to is part of the answer.

    Raises
    ------
    ValueError
        If there is no recurrent layer, or the layers differ in shape.
    """
    found: dict[int, tuple[int, int, int, str]] = {}

    def note(layer: int, call: Call, run_own: Callable[[], Any]) -> Any:
        r = call.recurrence
        found[layer] = (r.heads, r.key, r.value, choose(r, "auto" if backend == "model" else backend))
        return run_own()

    expected = tuple(mixers(model))
    with torch.no_grad(), capture(model, note):
        output = model(ids[:1, :1], **caches.inputs_alone(model))
    if not hasattr(output, "logits"):
        raise ValueError(
            f"model is a {type(model).__name__}, which gives no logits; pass the whole causal language model"
        )
    if set(found) != set(expected):
        missing = sorted(set(expected) - set(found))
        raise ValueError(f"model: layers {missing} did not call their scan; is it in evaluation mode?")
    if len(set(found.values())) > 1:
        raise ValueError(f"model: its recurrent layers differ in (heads, key, value): {found}; choose layers")
    return Anatomy(expected, *found[expected[0]])


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
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        watch: Watch,
        backend: str,
        own_outputs: bool,
        edit: Edit | None = None,
    ) -> None:
        self.model, self.ids, self.watch = model, ids, watch
        self.backend, self.own_outputs, self.edit = backend, own_outputs, edit
        self.device = next(model.parameters()).device

    def read(self, carry: Carry, stop: int) -> Block:
        """Read from where the carry stands to ``stop``, and move the carry there."""
        segment = _Segment(self, carry, carry.position, stop)
        logits = self._forward(carry, stop, segment.on_scan)
        loss = self._loss(logits, carry, stop)
        carry.position = stop
        return segment.block(loss)

    def read_ahead(self, carry: Carry, stop: int) -> None:
        """Read without measuring: keep only the states at the probes and the decay up to them."""
        segment = _Segment(self, carry, carry.position, stop)
        self._forward(carry, stop, segment.on_scan_ahead)
        carry.position = stop

    def _forward(self, carry: Carry, stop: int, handler: Callable[..., Any]) -> Tensor:
        ids = self.ids[:, carry.position : stop].to(self.device)
        inputs = caches.inputs(self.model, carry.cache, carry.position, ids)
        with torch.no_grad(), capture(self.model, handler):
            output = self.model(ids, **inputs)
        logits: Tensor = output.logits
        return logits

    def _loss(self, logits: Tensor, carry: Carry, stop: int) -> Tensor:
        """Loss of every token of the segment; that of the token after it waits in the carry."""
        targets = self.ids[:, carry.position + 1 : stop + 1].to(self.device)
        rows = logits[:, : targets.shape[1]].flatten(0, 1).split(LOGIT_ROWS)
        losses = [
            cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(rows, targets.flatten().split(LOGIT_ROWS), strict=True)
        ]
        predicted = torch.cat(losses).view(targets.shape)
        first = carry.pending_loss
        if first is None:
            first = torch.full((len(self.ids),), torch.nan, device=self.device)
        known = torch.cat([first[:, None], predicted], 1)
        length = stop - carry.position
        carry.pending_loss = known[:, length] if known.shape[1] > length else None
        return known[:, :length]


class _Segment:
    """Collects what the scans of one forward pass yield."""

    def __init__(self, reader: Reader, carry: Carry, start: int, stop: int) -> None:
        self.reader, self.watch, self.carry = reader, reader.watch, carry
        self.start, self.stop = start, stop
        self.heads = torch.tensor(reader.watch.heads, device=reader.device)
        self.layers: dict[int, Block] = {}

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
                self.carry.probe_decays[layer, p] = self._decay_until(layer, recurrence, p + 1)
            if not self.reader.own_outputs:
                answer = lambda: call.answer(output)  # noqa: E731
        self.carry.log_decay[layer] = self._decay_until(layer, recurrence, self.stop)
        return answer()

    def block(self, loss: Tensor) -> Block:
        """Join the layers, in order of depth."""
        parts = [self.layers[layer] for layer in self.watch.layers]
        joined = Block(
            steps={name: torch.stack([p.steps[name] for p in parts], 1) for name in parts[0].steps},
            loss=loss,
            states={at: torch.stack([p.states[at] for p in parts], 1) for at in parts[0].states},
        )
        for p, (first, _) in parts[0].share.items():
            joined.share[p] = (first, torch.stack([part.share[p][1] for part in parts], 1))
            joined.contribution[p] = (first, torch.stack([part.contribution[p][1] for part in parts], 1))
        for p in parts[0].share_before:
            joined.share_before[p] = torch.stack([part.share_before[p] for part in parts], 1)
        known = loss.clone()
        if self.start == 0:
            known[:, 0] = 0  # there is nothing to predict it from
        joined.nonfinite = torch.stack([*(p.nonfinite for p in parts), _first_nonfinite([known[..., None]])])
        return joined

    def _edited(self, layer: int, call: Call) -> Recurrence:
        if self.reader.edit is None:
            return call.recurrence
        edited = self.reader.edit(layer, call.recurrence)
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
        entries = [self.watch.probe_start(p) - 1 for p in self.watch.probes]
        wanted = {*self.watch.snapshots, *self.watch.probes, *entries}
        return sorted(p for p in wanted if self.start <= p < self.stop)

    def _collect(
        self, layer: int, recurrence: Recurrence, output: ScanOutput, states: dict[int, Tensor]
    ) -> None:
        steps = output.steps
        assert steps is not None
        picked = Steps(*(getattr(steps, name)[..., self.heads] for name in Steps.__dataclass_fields__))
        block = Block(
            steps=thin(picked, self.watch.window),
            loss=torch.empty(0),
            states={p: states[p][:, self.heads] for p in self.watch.snapshots if p in states},
            nonfinite=_first_nonfinite([getattr(picked, name) for name in Steps.__dataclass_fields__]),
        )
        self.layers[layer] = block
        for p in self.watch.probes:
            if self.watch.probe_start(p) < self.stop and p >= self.start:
                self._attribute(layer, recurrence, p, states, block)
        if self.watch.probes:
            self.carry.log_decay[layer] = self._decay_until(layer, recurrence, self.stop)

    def _attribute(self, layer: int, r: Recurrence, p: int, states: dict[int, Tensor], block: Block) -> None:
        """Attribute the state at a probe to the tokens of this segment within its reach."""
        reach_start = self.watch.probe_start(p)
        first, last = max(self.start, reach_start), min(self.stop, p + 1)
        entering = r.initial_state if first == self.start else states[first - 1]
        part = r.between(first - self.start, last - self.start, entering)
        inside = p < self.stop
        after = None
        if not inside:
            after = self.carry.probe_decays[layer, p] - self._decay_until(layer, r, self.stop)
        state = states[p] if inside else self.carry.probe_states[layer, p]
        contribution, share, before = probe(part, state, after)
        block.contribution[p] = (first, contribution[..., self.heads])
        block.share[p] = (first, share[..., self.heads])
        if first == reach_start:
            block.share_before[p] = before[..., self.heads]

    def _decay_until(self, layer: int, r: Recurrence, stop: int) -> Tensor:
        total = r.log_decay[:, : stop - self.start].double().sum(1)
        return total + self.carry.log_decay[layer] if layer in self.carry.log_decay else total


def _first_nonfinite(values: Sequence[Tensor]) -> Tensor:
    """Find the first token at which a value is not finite, without waiting for the device.

    Parameters
    ----------
    values : sequence of Tensor, (batch, time, heads)
        Variables of one layer.

    Returns
    -------
    Tensor, (2,), int64
        The token (the number of tokens if there is none), and which of its values it is, in the order
        (variable, batch, head).
    """
    time = values[0].shape[1]
    spoilt = ~torch.isfinite(sum(values, torch.zeros_like(values[0]))).all(2).all(0)
    index = torch.arange(time, device=spoilt.device)
    token = torch.where(spoilt, index, time).amin(0, keepdim=True)
    there = torch.stack([v.index_select(1, token.clamp(max=time - 1)) for v in values]).flatten()
    place = torch.arange(there.numel(), device=there.device)
    which = torch.where(torch.isfinite(there), there.numel(), place).amin(0, keepdim=True)
    return torch.cat([token, which])


def place_of_nonfinite(block: Block, watch: Watch, start: int) -> dict[str, Any] | None:
    """Name the first value of a block, in token order, that is not finite; the block is on the host."""
    names = (*Steps.__dataclass_fields__,)
    token, row = min((int(token), row) for row, (token, _) in enumerate(block.nonfinite.tolist()))
    if token == block.loss.shape[1]:
        return None
    which = int(block.nonfinite[row, 1])
    if row == len(watch.layers):
        return {"variable": "loss", "sequence": which, "token": start + token}
    rest, head = divmod(which, len(watch.heads))
    variable, sequence = divmod(rest, block.loss.shape[0])
    place = {"sequence": sequence, "layer": watch.layers[row], "token": start + token}
    return {"variable": names[variable], **place, "head": watch.heads[head]}
