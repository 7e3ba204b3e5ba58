"""A trace killed at any instant leaves a record that opens, is exact, and is gone on from."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from crashing import SCENARIOS, TEXT, TOKENS
from tiny import EVERY_FAMILY, Collected, assert_identical, build, ids
from torch import nn
from zarr.storage import MemoryStore

import statescope
from statescope import layout, recorder
from statescope.anatomy import survey
from statescope.capture import mixers
from statescope.carry import AHEAD, Carry
from statescope.reader import Reader
from statescope.store import RecordWriter
from statescope.watch import Watch


class Zygote:
    """Starts traces in processes that can be killed; see crashing.py."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crashing.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)

    def _say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def run(self, scenario: str, store: Path, kill_after: float | None = None, **order: Any) -> Run:
        """Trace; kill it some seconds after it began."""
        log = store.with_name(f"log-{time.monotonic_ns()}")
        self._say(json.dumps({"scenario": scenario, "store": str(store), "log": str(log), **order}))
        if kill_after is not None:
            while not (log.exists() and "begin" in log.read_text()):
                time.sleep(0.002)
            time.sleep(kill_after)
        self._say("wait" if kill_after is None else "kill")
        status = int(self._answer())
        return Run(log.read_text(), os.WIFSIGNALED(status))


class Run:
    """What a process said before it ended."""

    def __init__(self, log: str, killed: bool) -> None:
        lines = [line.split(maxsplit=2) for line in log.splitlines()]
        self.killed = killed
        self.reads = [int(words[1]) for words in lines if words[0] == "read"]
        self.ahead = [int(words[1]) for words in lines if words[0] == "read_ahead"]
        self.error = next((words[1:] for words in lines if words[0] == "error"), None)
        self.finished = lines[-1][0] == "end"
        self.operations = [words[2] for words in lines if words[0] == "operation"]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """Start one process for all crashes."""
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[xr.DataTree, float, Path]]:
    """Trace every scenario unbroken; the record, the seconds it took and its place."""
    records = {}
    for scenario in SCENARIOS:
        place = tmp_path_factory.mktemp("whole") / "run.zarr"
        began = time.monotonic()
        assert zygote.run(scenario, place).finished
        records[scenario] = (statescope.open(place), time.monotonic() - began, place)
    return records


def committed_prefix(place: Path, whole: xr.DataTree) -> int:
    """Demand that a record is absent or opens and equals the whole one as far as it goes."""
    if not place.exists():
        return 0
    part = statescope.open(place)
    committed: int = part.attrs["committed"]
    assert sorted(part.children) == sorted(whole.children)
    for name in part.children:
        expected = whole[name].to_dataset()
        for dim in {"token", "position", "probe"} & set(expected.dims):
            expected = expected.isel({dim: (expected[dim] < committed).values})
        xr.testing.assert_identical(part[name].to_dataset().load(), expected.load())
    assert part["tokens"].token.size == committed
    return committed


def finish(zygote: Zygote, scenario: str, place: Path, whole: xr.DataTree) -> None:
    """Demand that the same call goes on from what is committed and ends in the whole record."""
    committed = committed_prefix(place, whole)
    again = zygote.run(scenario, place)
    if committed == TOKENS:
        assert again.error is not None and again.error[0] == "FileExistsError"
        assert "finished" in again.error[1]
        assert not again.reads
    else:
        assert again.finished, again.error
        assert again.reads[0] == committed, "it began elsewhere than at what is committed"
        assert committed == 0 or not again.ahead, "it read ahead once more"
    assert_identical(statescope.open(place), whole)
    left = {p.name for p in place.parent.iterdir() if not p.name.startswith("log")}
    assert left == {place.name}


def test_unbroken_run(zygote: Zygote, whole: dict[str, Any]) -> None:
    """The scenarios read ahead, commit often and are deterministic."""
    for scenario, (record, _, place) in whole.items():
        assert record.attrs["complete"] and record.attrs["committed"] == TOKENS
        assert (record["tokens"].token_id.values[0] == TEXT).all()
        assert not (place / "carry").exists()
        again = place.with_name("again.zarr")
        run = zygote.run(scenario, again)
        assert run.ahead and len(run.reads) >= 2
        assert_identical(statescope.open(again), record)


@pytest.mark.parametrize("scenario", ["every token", "windows"])
@pytest.mark.parametrize("seed", range(4))
def test_killed_once(scenario: str, seed: int, zygote: Zygote, whole: dict[str, Any], tmp_path: Path) -> None:
    """One kill anywhere in a run; the next run ends it."""
    record, seconds, _ = whole[scenario]
    place = tmp_path / "run.zarr"
    delay = (seed + random.Random(f"{scenario}{seed}").random()) / 4 * seconds
    zygote.run(scenario, place, kill_after=delay)
    finish(zygote, scenario, place, record)


@pytest.mark.parametrize("scenario", ["every token", "windows"])
def test_killed_again_and_again(scenario: str, zygote: Zygote, whole: dict[str, Any], tmp_path: Path) -> None:
    """Many kills over the life of one record, none of which loses what was committed."""
    record, seconds, _ = whole[scenario]
    place = tmp_path / "run.zarr"
    draw, before, kills = random.Random(scenario), 0, 0
    for _ in range(20):
        run = zygote.run(scenario, place, kill_after=draw.uniform(0.1, 0.5) * seconds)
        kills += run.killed
        if run.reads:
            assert run.reads[0] == before
        committed = committed_prefix(place, record)
        assert committed >= before
        before = committed
        if committed == TOKENS and kills < 2:  # it was faster than the one that was timed
            shutil.rmtree(place)
            before, seconds = 0, seconds / 2
        elif kills == 4 or committed == TOKENS:
            break
    assert kills >= 2
    finish(zygote, scenario, place, record)


def test_killed_before_any_change_of_a_file(zygote: Zygote, whole: dict[str, Any], tmp_path: Path) -> None:
    """Kills right before chosen file operations: all of the last commit's, and some of each other phase's."""
    scenario = "few writes"
    record, *_ = whole[scenario]
    (tmp_path / "count").mkdir()
    total = len(zygote.run(scenario, tmp_path / "count" / "run.zarr", operation=-1).operations)
    assert total > 60
    chosen = {1, *random.Random(0).sample(range(2, total - 4), 3), *range(total - 4, total + 1)}
    for operation in sorted(chosen):
        place = tmp_path / f"at-{operation}" / "run.zarr"
        place.parent.mkdir()
        assert zygote.run(scenario, place, operation=operation).killed
        finish(zygote, scenario, place, record)


def test_killed_while_replacing(zygote: Zygote, whole: dict[str, Any], tmp_path: Path) -> None:
    """Killed while it replaces a record, there is the old one, none or a new one, never half of one."""
    scenario = "few writes"
    record, _, old = whole[scenario]

    def replaced(name: str, operation: int) -> tuple[Path, Run]:
        place = tmp_path / name / "run.zarr"
        shutil.copytree(old, place)
        return place, zygote.run(scenario, place, operation=operation, overwrite=True)

    operations = replaced("count", -1)[1].operations
    renames = [i for i, name in enumerate(operations, 1) if name == "rename"]
    assert len(renames) == 2
    found = []
    for operation in (renames[0] - 10, *renames, renames[1] + 1, renames[1] + 20):
        place, run = replaced(f"at-{operation}", operation)
        assert run.killed
        if not place.exists():
            found.append("none")
            finish(zygote, scenario, place, record)
        elif statescope.open(place).attrs["complete"]:
            found.append("old")
            assert_identical(statescope.open(place), record, ignore=())
        else:
            found.append("new")
            finish(zygote, scenario, place, record)
    assert found == ["old", "old", "none", "new", "new"]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Interrupt traces after so many tokens; small shards."""
    monkeypatch.setattr(layout, "SHARD_TOKENS", 32)
    commit = RecordWriter.commit

    def arm(tokens: int | None) -> None:
        def interrupted(self: RecordWriter, at: int, *rest: Any, **attributes: Any) -> None:
            commit(self, at, *rest, **attributes)
            if at == tokens:
                raise KeyboardInterrupt

        monkeypatch.setattr(RecordWriter, "commit", interrupted)

    yield arm


def test_a_commit_does_not_wait_for_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much may be on its way, what was read is soon safe."""
    monkeypatch.setattr(recorder, "IN_FLIGHT", 1000)
    monkeypatch.setattr(layout, "SHARD_TOKENS", 32)
    model, place = build("mamba2"), tmp_path / "run.zarr"

    def press_stop(reader: Reader, carry: Carry, *rest: Any) -> None:
        until = time.monotonic() + 60
        while carry.position == 64 and time.monotonic() < until:
            time.sleep(0.01)
            if place.exists() and statescope.open(place).attrs["committed"] == 64:
                raise KeyboardInterrupt
        read(reader, carry, *rest)

    read = Reader.read
    monkeypatch.setattr(Reader, "read", press_stop)
    with pytest.raises(KeyboardInterrupt):
        statescope.trace(model, ids(96), store=place, segment=16)


SETTINGS: dict[str, Any] = {"segment": 16, "snapshots": [10, 40], "probes": 50, "window": 2}


def halve(layer: int, recurrence: Any) -> Any:
    return recurrence.replace(v=recurrence.v / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": ids(64, seed=1)},
        {"text": ids(63)},
        {"text": ids(64, sequences=2)},
        {"model": lambda: build("mamba2", seed=1)},
        {"model": lambda: build("mamba2").to(torch.bfloat16)},
        {"model": lambda: build("mamba2", time_step_limit=(0.0, 0.5))},
        {"layers": [0]},
        {"heads": [0]},
        {"snapshots": [10]},
        {"probes": statescope.Probes([50], reach=3)},
        {"window": 1},
        {"segment": 32},
        {"backend": "chunked"},
        {"edit": halve},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_request_is_refused(changes: dict[str, Any], interrupt: Any) -> None:
    """An interrupted record is gone on from by the same request only, and overwritten when asked."""
    request: dict[str, Any] = {"model": build("mamba2"), "text": ids(64), **SETTINGS}
    place = MemoryStore()
    interrupt(32)
    with pytest.raises(KeyboardInterrupt):
        statescope.trace(**request, store=place)
    interrupt(None)
    other = {**request, **{k: v() if k == "model" else v for k, v in changes.items()}}
    with pytest.raises(FileExistsError, match=r"interrupted record of another.*overwrite=True"):
        statescope.trace(**other, store=place)
    assert statescope.open(place).attrs["committed"] == 32
    assert statescope.trace(**request, store=place).attrs["complete"]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_interrupted_family(family: str, interrupt: Any) -> None:
    """Every family's cache, attention layers and all, survives an interruption exactly."""
    request = {"model": build(family), "text": ids(80, sequences=2), **SETTINGS}
    whole, place = statescope.trace(**request), MemoryStore()
    for stop in (32, 64):
        interrupt(stop)
        with pytest.raises(KeyboardInterrupt):
            statescope.trace(**request, store=place)
        assert statescope.open(place).attrs["committed"] == stop
    interrupt(None)
    assert_identical(statescope.trace(**request, store=place), whole)


def test_leftovers_do_not_disturb(tmp_path: Path) -> None:
    """What a killed process left beside the store is ignored and cleared away."""
    model, text, place = build("mamba2"), ids(40), tmp_path / "run.zarr"
    for kind in ("draft", "former"):
        folder = tmp_path / f".run.zarr.{kind}"
        (folder / "steps").mkdir(parents=True)
        (folder / "zarr.json").write_text('{"zarr')
    record = statescope.trace(model, text, store=place)
    assert_identical(record, statescope.trace(model, text))
    assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]
    (place / "steps" / "state_norm" / "c.0123.partial").write_bytes(b"half")
    assert_identical(statescope.open(place), record)


def reader_of(model: nn.Module, text: torch.Tensor) -> Reader:
    watch = Watch.resolve(
        tokens=text.shape[1],
        model_layers=tuple(mixers(model)),
        model_heads=survey(model, text, "chunked").heads,
        snapshots=[60],
        probes=[20, 60],
    )
    return Reader(model, text, watch, "chunked", own_outputs=True)


def content(data: bytes) -> tuple[Any, dict[str, Any]]:
    """Unpack a carry, in whatever order it was packed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    plain = json.loads(header.pop("__metadata__")["plain"])
    tensors = {}
    for name, about in header.items():
        start, stop = (8 + size + at for at in about.pop("data_offsets"))
        tensors[name] = (about, data[start:stop])
    return plain, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", [0, 1, 17, 40])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_carry_round_trip(family: str, position: int, dtype: torch.dtype) -> None:
    """What is read back from bytes goes on exactly like what was written."""
    sequences = 1 if family == "rwkv" else 2  # it reads single tokens of one sequence only
    model, text = build(family).to(dtype), ids(70, sequences=sequences)
    reader, carry = reader_of(model, text), Carry.fresh(model)
    ahead = Carry.fresh(model)
    with reader.attached():
        reader.read_ahead(ahead, 70)
    for name in AHEAD:
        setattr(carry, name, getattr(ahead, name))
    if position:
        with reader.attached():
            reader.read(carry, position, Collected())
    data = carry.to_bytes()
    back = Carry.from_bytes(data, model, torch.device("cpu"))
    assert content(back.to_bytes()) == content(data)
    assert back.position == position
    for stop in (position + 1, 70):
        expected, found = Collected(), Collected()
        with reader.attached():
            reader.read(carry, stop, expected)
            reader.read(back, stop, found)
        assert expected.keys() == found.keys()
        for name, x in expected.items():
            assert torch.equal(x.nan_to_num(9.0), found[name].nan_to_num(9.0)), name
            assert x.dtype == found[name].dtype
    assert content(back.to_bytes()) == content(carry.to_bytes())
