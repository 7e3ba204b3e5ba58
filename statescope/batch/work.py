"""What a worker does: read texts of similar length together, and put each record in its place.

Texts that fit into one forward pass are padded on the right to one length. A causal model computes nothing of
a token from those after it, so that padding reaches no number; but matrix products of another size may round
otherwise. Longer texts are read alone, as :func:`statescope.trace` reads them, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from statescope.batch import held
from statescope.batch.drafts import Draft, mean, too_large
from statescope.batch.manifest import Outcome
from statescope.batch.places import TEXTS, Dumps, drafts, without_secrets
from statescope.batch.settings import Facts, Settings, Text
from statescope.caches import longest_pass
from statescope.live import digest, resolve
from statescope.memory import MemoryRecord
from statescope.plan import Plan
from statescope.store import write_whole
from statescope.tokens import find_tokenizer, to_token_ids
from statescope.tracing import prepare, run, usual_segment
from statescope.watch import Probes
from statescope.zipped import Files, pack

PADDING = 0.2
"""Part of a pass that may be padding."""

TEXTS_OF_A_PASS = 16
"""At most: to lay a record out takes a while, however short its text, and the next pass goes on meanwhile."""

ROW = 64
"""Tokens of which a row is a multiple on a GPU: the fused kernels then copy its tiles in bulk."""

Drafted = Callable[[], tuple[Draft, float]]
"""Puts a text's record together, if that is not done; returns it and the mean loss."""

Later = Callable[[Text, Plan, Drafted, float, int], "Future[Outcome]"]
"""Puts what was read of a text in its place, in time."""


@lru_cache(maxsize=1)
def _loaded(model: str, device: str | None, dtype: str | None) -> tuple[nn.Module, str, str]:
    live, name = resolve(model, device, dtype)
    return live, name, digest(live)()


@lru_cache(maxsize=1)
def _tokenizer(name: str | None, model: nn.Module) -> Any:
    return find_tokenizer(name, model)


def look(settings: Settings) -> Facts:
    """Load the model, and refuse at once what would fail for every text.

    Raises
    ------
    ValueError, TypeError
        As :func:`statescope.trace`.
    """
    model, name, weights = _loaded(settings.model, settings.device, settings.dtype)
    positions = [*(settings.snapshots or ()), *(settings.probes or ()), 0]
    longest = max(max(positions) + 1, -min(positions), 1)
    _plan(settings, model, name, torch.zeros(1, longest, dtype=torch.int64))
    if settings.tokenizer is not None:
        _tokenizer(settings.tokenizer, model)
    device = next(model.parameters()).device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    usual = min(usual_segment(device), longest_pass(model))
    return Facts(settings.segment or usual, weights, kind)


def work(texts: Sequence[Text], settings: Settings, facts: Facts, dumps: Dumps, label: str) -> list[Outcome]:
    """Read texts and write their records; what goes wrong with one is that one's outcome.

    Parameters
    ----------
    texts : sequence of Text
        Best of similar length.
    settings : Settings
        How to read them.
    facts : Facts
        What :func:`look` found, on another worker perhaps.
    dumps : Dumps
        Where records go.
    label : str
        Name of the run, for its drafts.

    Raises
    ------
    ValueError
        If the model that is loaded here has other weights.
    """
    model, name, weights = _loaded(settings.model, settings.device, settings.dtype)
    if weights != facts.weights:
        raise ValueError(f"model={settings.model!r} has other weights on this worker than on the first one")
    held.keep()
    outcomes, plans = [], []
    for text in texts:
        try:
            plans.append((text, _plan(settings, model, name, _ids(text, settings, model))))
        except Exception as error:
            outcomes.append(_failed(text, error))
    about = {"weights": weights, "settings": settings.digest()}
    try:
        with drafts(dumps, label) as folder, ThreadPoolExecutor(1) as beside:

            def later(text: Text, *read: Any) -> Future[Outcome]:
                return beside.submit(_place, text, dumps, folder, *read)

            former: list[Future[Outcome]] = []
            for group in _groups(plans, 0 if settings.alone else facts.segment):
                latter = _read(group, dumps, folder, later, about)
                outcomes += [placed.result() for placed in former]  # no more than two groups are in memory
                former = latter
            outcomes += [placed.result() for placed in former]
    except OSError as error:
        known = {outcome.id for outcome in outcomes}
        outcomes += [Outcome(t.id, "unplaced", _reason(error)) for t in texts if t.id not in known]
    held.hand_back()
    return outcomes


def _ids(text: Text, settings: Settings, model: nn.Module) -> torch.Tensor:
    if isinstance(text.content, str):
        return to_token_ids(text.content, _tokenizer(settings.tokenizer, model), model)
    return to_token_ids(text.content, None, model)


def _plan(settings: Settings, model: nn.Module, name: str, ids: torch.Tensor) -> Plan:
    s = settings
    probes = None if s.probes is None else Probes(s.probes, s.reach)
    return prepare(
        model, name, ids, layers=s.layers, heads=s.heads, snapshots=s.snapshots, probes=probes,
        window=s.window, segment=s.segment, backend=s.backend, train_length=s.train_length,
    )  # fmt: skip


def _groups(plans: Sequence[tuple[Text, Plan]], at_most: int) -> Iterator[list[tuple[Text, Plan]]]:
    """Cut into what one forward pass reads: no more tokens than a segment, few texts, and little padding.

    Snapshots and probes must stand at the same tokens of all texts of a pass.
    """
    group: list[tuple[Text, Plan]] = []
    for text, plan in sorted(plans, key=lambda x: (x[1].watch.snapshots, x[1].watch.probes, -_length(x[1]))):
        if group:
            first = group[0][1]
            same = (first.watch.snapshots, first.watch.probes) == (plan.watch.snapshots, plan.watch.probes)
            longest, several = _length(first), len(group) + 1
            fits = longest * several <= at_most and several <= TEXTS_OF_A_PASS
            little = sum(_length(p) for _, p in group) + _length(plan) >= (1 - PADDING) * longest * several
            if not (same and fits and little):
                yield group
                group = []
        group.append((text, plan))
    if group:
        yield group


def _length(plan: Plan) -> int:
    return int(plan.ids.shape[1])


def _read(
    group: Sequence[tuple[Text, Plan]], dumps: Dumps, folder: Path, later: Later, about: Mapping[str, str]
) -> list[Future[Outcome]]:
    """Read a group together; if that fails, one by one, so that a poisoned text fails alone.

    Records are put together and in their places by a thread, beside the reading of the next group: for a
    short text that takes a GPU as long as to read it; a disk takes its time to be sure of a file, an object
    store more.
    """
    began = time.perf_counter()
    try:
        if len(group) == 1 and too_large(group[0][1]):
            text, plan = group[0]
            draft = Draft.of(plan, text, dumps, folder)
            loss = draft.read(plan, _about(text, 1, about))
            return [later(text, plan, lambda: (draft, loss), time.perf_counter() - began, 1)]
        records, first_nonfinite = _together([plan for _, plan in group])
        seconds = (time.perf_counter() - began) / len(group)
        placed, together = [], len(group)
        for (text, plan), arrays in zip(group, records, strict=True):
            more = {"first_nonfinite": first_nonfinite, **_about(text, together, about)}
            drafted = partial(_drafted, plan, arrays, more)
            placed.append(later(text, plan, drafted, seconds, together))
        return placed
    except OSError as error:
        return [_known(Outcome(text.id, "unplaced", _reason(error))) for text, _ in group]
    except Exception as error:
        if len(group) == 1:
            return [_known(_failed(group[0][0], error))]
    return [outcome for one in group for outcome in _read([one], dumps, folder, later, about)]


def _known(outcome: Outcome) -> Future[Outcome]:
    found: Future[Outcome] = Future()
    found.set_result(outcome)
    return found


def _about(text: Text, together: int, more: Mapping[str, str]) -> dict[str, Any]:
    return {"text_id": text.id, "text_sha256": text.sha256, "texts_together": together, **more}


def _together(plans: Sequence[Plan]) -> tuple[list[dict[str, NDArray[Any]]], Any]:
    """Read texts in one pass, or one as ``trace`` does; take the arrays of each, and what is not finite.

    Raises
    ------
    FloatingPointError
        If a value is not finite in texts read together: read alone, a text's record says where.
    """
    joint = plans[0] if len(plans) == 1 else _joint(plans)
    memory = MemoryRecord(joint.layout, joint.attributes(), joint.ids.numpy())
    first_nonfinite = run(joint, lambda: memory, progress=False)["first_nonfinite"]
    if first_nonfinite and len(plans) > 1:
        raise FloatingPointError("a value is not finite")
    return [memory.of_one(i, plan.layout) for i, plan in enumerate(plans)], first_nonfinite


def _joint(plans: Sequence[Plan]) -> Plan:
    """Put texts into rows of one pass, padded on the right."""
    lengths = tuple(_length(plan) for plan in plans)
    longest = max(plans, key=_length)
    width = _width(lengths, next(longest.model.parameters()).device)
    window, ids = longest.watch.window, torch.zeros(len(plans), width, dtype=torch.int64)
    for row, plan in zip(ids, plans, strict=True):
        row[: _length(plan)] = plan.ids[0]
    return replace(longest, ids=ids, segment=-(-width // window) * window, lengths=lengths)


def _width(lengths: Sequence[int], device: torch.device) -> int:
    """Tokens of every row of a pass."""
    multiple = ROW if device.type == "cuda" else 1
    return -(-max(lengths) // multiple) * multiple


def _drafted(plan: Plan, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> tuple[Draft, float]:
    store = Files()
    write_whole(store, plan.layout, {**plan.attributes(), **about}, arrays)
    return Draft(store), mean(arrays["tokens/loss"])


def _place(
    text: Text, dumps: Dumps, folder: Path, plan: Plan, drafted: Drafted, seconds: float, together: int
) -> Outcome:
    file = folder / f"{uuid4().hex}.zip"
    try:
        draft, loss = drafted()
    except Exception as error:
        return _failed(text, error)
    try:
        size = pack(draft.store, file)
        dumps.put(file, f"{TEXTS}/{text.place}")
        draft.close()
    except Exception as error:  # of whatever kind a file system's are
        return Outcome(text.id, "unplaced", _reason(error))
    known = None if np.isnan(loss) else loss
    return Outcome(text.id, "done", None, _length(plan), known, seconds, size, together, held.resident())


def _failed(text: Text, error: Exception) -> Outcome:
    return Outcome(text.id, "failed", _reason(error))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    said = lines[0] if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {lines[0]}"
    return without_secrets(said[:500] or type(error).__name__)
