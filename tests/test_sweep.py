"""Sweeps: what is finished is kept and never done again, whatever happens; the CLI; what comes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import statescope
from statescope.analyses.runs import final, read_runs, recall
from statescope.cli import app
from statescope.experiments.training.cell import Effort
from statescope.experiments.training.config import Config
from statescope.experiments.training_length import Sweep, run

BASE = Config(
    row=32,
    rows=2,
    width=16,
    head_size=8,
    chunk=16,
    train_length=16,
    steps=20,
    warmup=2,
    keys=30,
    values=4,
    dtype="float32",
    checkpoints=1,
)
EFFORT = Effort(beyond=64, rows=1, seconds=0.0, traced=64)
GRID = Sweep(BASE, [4, 8], [16, 32], [0])


def without_times(rows: list[dict[str, object]]) -> dict[object, object]:
    return {(r["run"], r["step"]): {k: v for k, v in r.items() if k != "made"} for r in rows}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    run(GRID, folder, effort=EFFORT, progress=False)
    return folder


def lines(folder: Path) -> list[dict[str, object]]:
    data = (folder / "table.jsonl").read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()][1:]


def test_every_run_is_a_row_with_checkpoint_and_measures(unbroken: Path) -> None:
    rows = lines(unbroken)
    steps = {(r["run"], r["step"]) for r in rows}
    assert len(rows) == len(steps) == 8 and len({name for name, _ in steps}) == 4
    assert not (unbroken / "cells").exists() or not list((unbroken / "cells").iterdir())
    table = read_runs(unbroken / "table.jsonl")
    assert (table["asked"].sum(("position", "lag")) > 0).all()
    assert table["inside_retention"].notnull().all() and (table["inside_live_memories"] > 0).all()
    assert final(table).sizes["run"] == 4 and recall(table, far=32)["far"].max() <= 1
    model = statescope.load(unbroken / str(rows[0]["checkpoint"]), device="cpu")
    assert model.config.train_length == rows[0]["config"]["train_length"]  # type: ignore[index]


def test_finished_runs_are_not_trained_again(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (unbroken / "table.jsonl").read_bytes()
    monkeypatch.setattr("statescope.experiments.training_length.train_cell", None)
    run(GRID, unbroken, effort=EFFORT, progress=False)
    assert (unbroken / "table.jsonl").read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_sweep import EFFORT, GRID
from statescope.experiments import training_length
from statescope.experiments.training import cell, ensemble

ticks = 0
train = ensemble.Ensemble.train

def counted(self, until, tick=None, every=50):
    def dying(steps, loss):
        global ticks
        tick(steps, loss)
        ticks += 1
        if ticks == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
    train(self, until, dying if tick else None, every=5)

ensemble.Ensemble.train = counted
training_length.run(GRID, {folder!r}, effort=EFFORT, progress=False)
"""


@pytest.mark.parametrize("after", [7])
def test_a_killed_sweep_loses_no_finished_run(unbroken: Path, tmp_path: Path, after: int) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = lines(tmp_path)
    assert 0 < len(kept) < 8 and list((tmp_path / "cells").rglob("state.safetensors"))
    with (tmp_path / "table.jsonl").open("ab") as file:
        file.write(b'{"run": "half a li')  # what a kill in the middle of a write leaves
    run(GRID, tmp_path, effort=EFFORT, progress=False)
    rows = lines(tmp_path)
    assert rows[: len(kept)] == kept
    ours, theirs = without_times(rows), without_times(lines(unbroken))  # type: ignore[arg-type]
    assert ours == theirs and len(rows) == len(theirs)


def test_cells_run_side_by_side_in_processes(unbroken: Path, tmp_path: Path) -> None:
    """Two devices (here twice the CPU), each with a process; tracing in another."""
    small = Sweep(BASE, [4, 8], [16], [0], [20])
    run(small, tmp_path, effort=EFFORT, devices=["cpu", "cpu"], workers=0, progress=False)
    rows, reference = without_times(lines(tmp_path)), without_times(lines(unbroken))  # type: ignore[arg-type]
    assert len(rows) == 4
    for key, row in rows.items():
        assert row["inside"] == reference[key]["inside"]  # type: ignore[index]
        np.testing.assert_allclose(
            row["states"]["inside"]["retention"],  # type: ignore[index]
            reference[key]["states"]["inside"]["retention"],  # type: ignore[index]
            rtol=1e-3,
        )


def test_text_runs_are_asked_for_passkeys(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 400, encoding="utf-8")
    base = BASE.but(stream="text", corpus=str(text), row=128, rows=1, train_length=128, steps=2, warmup=1)
    effort = Effort(beyond=256, rows=1, traced=128, passkeys=(128, 256), trials=2)
    table = run(Sweep(base.but(checkpoints=0), [4], [128]), tmp_path / "s", effort=effort, progress=False)
    asked = read_runs(table)["passkeys"]
    assert dict(asked.sizes) == {"run": 1, "length": 2, "depth": 5} and asked.notnull().all()
    (row,) = lines(tmp_path / "s")
    assert row["passkeys"]["trials"] == 2  # type: ignore[index]
    with pytest.raises(ValueError, match="passkeys="):
        Effort(passkeys=(256, 128))
    with pytest.raises(ValueError, match="beyond=100"):
        Effort(beyond=100)


def test_a_bad_grid_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_length=24"):
        Sweep(BASE, [4], [16, 24])
    with pytest.raises(ValueError, match="seed has no values"):
        Sweep(BASE, [4], [16], [])
    code = ["sweep", "-o", str(tmp_path / "x"), "--lengths", "16,24", "--devices", "cpu"]
    done = CliRunner().invoke(app, code)
    assert done.exit_code == 2 and "train_length=24" in done.output and not list(tmp_path.iterdir())


def test_cli_sweep_and_train(tmp_path: Path) -> None:
    pytest.importorskip("seaborn")
    tiny = [x for s in ("width=16", "head_size=8", "rows=2", "values=4") for x in ("--set", s)]
    tiny += ["--set", "checkpoints=1"]
    arguments = ["sweep", "-o", str(tmp_path / "s"), "--states", "4", "--lengths", "16,32", "--seeds", "1"]
    done = CliRunner().invoke(
        app, [*arguments, "--steps", "30", "--beyond", "128", "--evaluated", "1", "--devices", "cpu", *tiny]
    )
    assert done.exit_code == 0, done.output
    assert "recall at short lags" in done.output and "threshold" in done.output
    assert len(list((tmp_path / "s").glob("*.png"))) == 6
    said = json.loads((tmp_path / "s" / "findings.json").read_text())
    assert said[0]["runs"] == 2 and said[0]["forget"]["points"]["dims"]["train_length"] == 2
    again = ["laws", str(tmp_path / "s" / "table.jsonl"), "-o", str(tmp_path / "l"), "--far", "64"]
    done = CliRunner().invoke(app, again)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "l" / "findings.json").read_text()) == said
    done = CliRunner().invoke(app, [*again[:-1], "4096"])
    assert done.exit_code == 2 and "far=4096" in done.output
    text = tmp_path / "book.txt"
    text.write_text("The grass is green. The sky is blue. " * 300, encoding="utf-8")
    arguments = ["train", "-o", str(tmp_path / "t"), "--stream", "text", "--corpus", str(text)]
    sizes = [x for s in ("width=16", "head_size=8", "rows=1", "row=256") for x in ("--set", s)]
    done = CliRunner().invoke(
        app,
        [*arguments, "--steps", "4", "--train-length", "128", "--beyond", "256", "--device", "cpu", *sizes],
    )
    assert done.exit_code == 0, done.output
    folder = next((tmp_path / "t" / "runs").iterdir())
    table = read_runs(tmp_path / "t" / "table.jsonl")
    assert table["lag"].values.tolist() == [0] and float(table["asked"].sum()) > 500
    record = statescope.trace(folder, "The grass is green.", device="cpu", progress=False)
    assert record["tokens"].sizes["token"] == 19 and record.attrs["predicts_next_token"]
    assert record["tokens"]["loss"][0, 1:].notnull().all()
    done = CliRunner().invoke(app, ["train", "-o", str(tmp_path / "u"), "--set", "momentum=1"])
    assert done.exit_code == 2 and "momentum" in done.output and not (tmp_path / "u").exists()
