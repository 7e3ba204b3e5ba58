"""The parts of a batch by themselves: pieces of work, manifest, memory, estimate and benchmark."""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from batches import MODEL, SETTINGS, outcomes, texts, write
from conftest import needs

from statescope.batch import held
from statescope.batch.engine import Waiting, pieces
from statescope.batch.estimate import estimate
from statescope.batch.held import resident
from statescope.batch.inputs import Row
from statescope.batch.manifest import Manifest, place_of
from statescope.batch.places import Dumps, without_secrets
from statescope.batch.settings import Facts, Text
from statescope.batch.work import work
from statescope.carry import Carry
from statescope.experiments.bench.settings import Settings as BenchSettings
from statescope.memory import MemoryRecord

needs("distributed")


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked")
def test_idle_memory_is_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a piece of work, what the C library keeps of what was freed goes back, if it is much."""
    rows = texts([100])
    monkeypatch.setattr(held, "_usual", None)
    held._glibc().malloc_trim(0)  # of what other tests left idle
    outcomes(rows, tmp_path)
    before = resident()
    idle = [np.ones(60_000, np.uint8) for _ in range(max(2500, before // 240_000))]
    pinned = idle[::50]  # or the end of the heap would go back by itself
    idle.clear()
    assert resident() > before + 100e6 and len(pinned) >= 50
    (found,) = outcomes(rows, tmp_path)
    assert resident() < before + 50e6 and (found.memory or 0) > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked")
def test_memory_is_handed_back_when_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after every piece of work: a tenth more than after the first one since the last time."""
    asked, now = [], [0]
    library = SimpleNamespace(malloc_trim=lambda _: asked.append(now[0]))
    monkeypatch.setattr(held, "_usual", None)
    monkeypatch.setattr(held, "_glibc", lambda: library)
    monkeypatch.setattr(held, "resident", lambda: now[0])
    for now[0] in (1000, 1090, 900, 1101, 1150, 1200, 1265, 1266, 800, 881):
        held.hand_back()
    assert asked == [1101, 1266, 881]


def test_what_a_pass_holds_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of all its texts and their record wait for no collector, which comes every fifty texts."""
    held_by, fresh, init = [], Carry.fresh, MemoryRecord.__init__

    def watched(model: Any) -> Carry:
        held_by.append(weakref.ref(carry := fresh(model)))
        return carry

    def noted(self: MemoryRecord, *given: Any) -> None:
        held_by.append(weakref.ref(self))
        init(self, *given)

    monkeypatch.setattr(Carry, "fresh", watched)
    monkeypatch.setattr(MemoryRecord, "__init__", noted)
    gc.disable()
    try:
        found = outcomes(texts([2200, 300, 290, 280]), tmp_path)  # alone in two segments, and together
        left = [ref() for ref in held_by]
    finally:
        gc.enable()
    assert [o.together for o in found] == [1, 3, 3, 3] and left == [None] * 4


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    """The estimate of bytes is close to what a run writes; nothing is there afterwards."""
    rows = [*texts([600, 500, 100, 90, 80]), {"id": "bad", "text": ""}]
    source, dumps = write(tmp_path / "in.jsonl", rows), tmp_path / "dumps"
    found = estimate(source, dumps, SETTINGS, workers=2)
    assert (found.texts, found.known, len(found.unreadable)) == (5, 0, 1) and not dumps.exists()
    written = sum(o.bytes or 0 for o in outcomes(rows[:5], dumps))
    assert 0.7 * written < found.bytes < 1.4 * written
    assert found.tokens == pytest.approx(1370, rel=0.2) and found.seconds > 0


def test_bench(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are timed once they are warm, and held against a loop over the same texts."""
    from statescope.experiments.bench import apart
    from statescope.experiments.bench import batch as timed

    monkeypatch.setattr(timed, "Apart", apart.Here)
    monkeypatch.setattr(timed, "LENGTHS", (20, 60))
    monkeypatch.setattr(timed, "_numbers", lambda: [1])
    monkeypatch.setattr(timed, "workers_of", lambda *_: nullcontext((client, False)))
    allowed = os.sched_getaffinity(0)
    one, loop, held = timed.measure(BenchSettings.of(False, ("batch",), model=MODEL, texts=5, rounds=2))
    assert (one["workers"], len(one["devices"]), loop["workers"], loop["texts_read"]) == (1, 1, 0, 5)
    assert (loop["cores"], held["cores"], held["threads"]) == (None, 1, 1)
    assert os.sched_getaffinity(0) == allowed
    for slow in (loop, held):
        rates = zip(one["tokens_per_s_of_rounds"], slow["tokens_per_s_of_rounds"], strict=True)
        ratios = [a / b for a, b in rates]
        assert slow["workers_over_loop_of_rounds"] == {"1": ratios}
        assert slow["workers_over_loop"] == {"1": sum(ratios) / 2}
    for entry in (one, loop, held):
        assert entry["texts_per_s"] * entry["seconds"] == pytest.approx(5)
        assert 100 < entry["tokens_per_s"] * entry["seconds"] < 300
    said = [line for entry in (one, loop, held) for line in timed.describe(entry)]
    assert "1 workers: " in said[0] and "5 in a loop over trace: " in said[1] and "on one core: " in said[2]


@pytest.mark.parametrize(("workers", "passes"), [(1, 8), (10, 4), (100, 1)])
def test_pieces_are_of_similar_sizes(workers: int, passes: int) -> None:
    """The fewer the workers, the more forward passes (8,192 bytes) a piece has, up to eight; one at last."""
    sizes = np.random.default_rng(0).integers(1, 5000, 300)
    found = list(pieces([Waiting(str(i), "", "", int(n)) for i, n in enumerate(sizes)], 8192, workers))
    assert sorted(w.id for p in found for w in p) == sorted(str(i) for i in range(300))
    held = [sum(w.size for w in p) for p in found]
    assert all(n <= passes * 8192 or len(p) == 1 for n, p in zip(held, found, strict=True))
    assert max(held) > 0.8 * passes * 8192 and max(held[-2 * workers :]) <= 8192
    edges = [(p[0].size, p[-1].size) for p in found]
    assert all(a[1] >= b[0] for a, b in pairwise(edges))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    asked = [Text("a", "0", place_of("a"), "text")]
    with pytest.raises(ValueError, match="other weights on this worker"):
        work(asked, SETTINGS, Facts(2048, "others", "cpu"), Dumps.at(tmp_path), "test")


def test_manifest_is_all_or_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[Row, str | None]]:
        yield Row(0, "a", "text"), "hash"
        raise KeyboardInterrupt

    with Manifest(tmp_path / "m.sqlite") as manifest:
        with pytest.raises(KeyboardInterrupt):
            manifest.register(rows())
        assert not list(manifest.texts())
    (tmp_path / "m.sqlite").write_text("no database, but long enough to look like one" * 9)
    with pytest.raises(ValueError, match="no manifest"):
        Manifest(tmp_path / "m.sqlite")
    assert sqlite3.sqlite_version_info > (3, 24)


def test_secrets_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcSECRETdef")
    said = without_secrets("no abcSECRETdef at https://user:pass@host/x")
    assert said == "no *** at https://***@host/x"
