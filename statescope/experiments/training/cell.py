"""Train one cell, runs of one shape as one, and say what became of each."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from statescope.experiments.passkey import passkey
from statescope.experiments.training.config import Config
from statescope.experiments.training.ensemble import Ensemble
from statescope.experiments.training.evaluate import evaluate
from statescope.experiments.training.states import quietly
from statescope.experiments.training.streams import held_out, read_corpus
from statescope.models import load

Row = dict[str, Any]
Tick = Callable[[int, float], None]

STATE, MADE = "state.safetensors", "made.json"

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where passkeys are hidden: 0 at the start, 1 right before the question."""


@dataclass(frozen=True)
class Effort:
    """How runs are evaluated, and how often a cell's state is kept.

    Attributes
    ----------
    beyond : int
        Tokens of the long sequences of the evaluation; a power of two.
    rows : int
        How many of them each run reads.
    seconds : float
        The state of an unfinished cell is kept about this often.
    fuse : bool
        Fuse with ``torch.compile``; worth its minute on a GPU.
    record : bool
        On a GPU, record a training step as a graph and replay it.
    traced : int
        Tokens over which the states of every run are measured.
    passkeys : tuple of int
        Lengths of the passkey prompts, for text; () asks none.
    trials : int
        Passkeys of each length and depth.
    """

    beyond: int = 16384
    rows: int = 8
    seconds: float = 60.0
    fuse: bool = False
    record: bool = True
    traced: int = 4096
    passkeys: tuple[int, ...] = ()
    trials: int = 16

    def __post_init__(self) -> None:
        for name in ("beyond", "rows", "traced", "trials"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; expected a whole number, 1 or more")
        if any(n < 128 for n in self.passkeys) or list(self.passkeys) != sorted(set(self.passkeys)):
            raise ValueError(f"passkeys={self.passkeys}; expected lengths of 128 or more, in order")
        if self.beyond & (self.beyond - 1):
            raise ValueError(f"beyond={self.beyond}; expected a power of two")


def train_cell(
    configs: list[Config], folder: Path, device: torch.device, effort: Effort, tick: Tick | None = None
) -> list[Row]:
    """Train runs as one; go on where an interrupted call was.

    Checkpoints are written to ``folder/runs/NAME`` (those before the last step to ``NAME/step-N``), each with
    ``made.json``: how it was made, and with which kernels. The state that training goes on from is in
    ``folder/cells``, and stays until :func:`forget` removes it.

    Returns
    -------
    list of dict
        A row for every run and checkpoint, states not measured yet.
    """
    ensemble = Ensemble(configs, device, effort.fuse, effort.record)
    place = state_path(configs, folder)
    if place.exists():
        ensemble.resume(place)
    rows: list[Row] = []
    seconds, kept = 0.0, time.monotonic()
    if tick is not None:
        tick(int(ensemble.step), float("nan"))

    def report(steps: int, loss: float) -> None:
        nonlocal kept
        if tick is not None:
            tick(steps, loss)
        if time.monotonic() - kept > effort.seconds:
            ensemble.save(place)
            kept = time.monotonic()

    for mark in configs[0].marks():
        begun = time.monotonic()
        past = mark <= int(ensemble.step) and mark != configs[0].steps
        if past:
            rows += _read_rows(place, mark)
            continue
        ensemble.train(mark, report)
        seconds += time.monotonic() - begun
        made = _rows(ensemble, folder, mark, effort, seconds)
        rows += made
        if mark != configs[0].steps:
            _write_rows(place, mark, made)
    ensemble.save(place)
    return rows


def state_path(configs: list[Config], folder: Path) -> Path:
    """Where the state of a cell is kept while it is trained."""
    names = hashlib.sha256("\n".join(c.name() for c in configs).encode()).hexdigest()[:16]
    return folder / "cells" / names / STATE


def forget(configs: list[Config], folder: Path) -> None:
    """Remove what a finished cell would have gone on from."""
    shutil.rmtree(state_path(configs, folder).parent, ignore_errors=True)


def _rows(ensemble: Ensemble, folder: Path, step: int, effort: Effort, seconds: float) -> list[Row]:
    found = evaluate(ensemble, effort.beyond, effort.rows)
    losses = ensemble.loss.tolist()
    rows = []
    for run, config in enumerate(ensemble.configs):
        name = config.name()
        at = Path("runs") / name / ("" if step == config.steps else f"step-{step}")
        ensemble.export(run, folder / at)
        asked = _passkeys(config, folder / at, ensemble.device, effort)
        row = {"run": name, "step": step, "config": config.to_json(), "state_numbers": config.state_numbers}
        row |= {"entries": config.entries, "train_loss": losses[run], "checkpoint": str(at), **found[run]}
        made = _made(ensemble, seconds)
        (folder / at / MADE).write_text(json.dumps(made, indent=1), encoding="utf-8")
        rows.append(row | asked | {"made": made})
    return rows


def _passkeys(config: Config, folder: Path, device: torch.device, effort: Effort) -> Row:
    """Ask a run for passkeys hidden in text it was not trained on."""
    if not effort.passkeys or config.stream != "text":
        return {}
    hay = bytes(held_out(read_corpus(config.corpus))[1].tolist()).decode("utf-8", errors="ignore")
    with quietly():
        model = load(folder, device=device)
    found = passkey(model, effort.passkeys, DEPTHS, effort.trials, haystack=hay, progress=False)
    right = found["correct"].sum("trial").astype(int)
    about = {"length": list(effort.passkeys), "depth": list(DEPTHS), "trials": effort.trials}
    return {"passkeys": about | {"right": right.transpose("length", "depth").values.tolist()}}


def _made(ensemble: Ensemble, seconds: float) -> Row:
    gpu = ensemble.device.type == "cuda"
    program = Path(sys.argv[0]).name.replace("__main__.py", "statescope")
    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(ensemble.device) if gpu else "CPU",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "statescope": version("statescope-ssm"),
        "kernels": str(ensemble.kernels),
        "runs_together": len(ensemble.configs),
        "train_seconds": round(seconds, 2),
    }


def _write_rows(place: Path, mark: int, rows: list[Row]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"rows-{mark}.part")
    part.write_text(json.dumps(rows), encoding="utf-8")
    part.replace(place.with_name(f"rows-{mark}.json"))


def _read_rows(place: Path, mark: int) -> list[Row]:
    path = place.with_name(f"rows-{mark}.json")
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return found
