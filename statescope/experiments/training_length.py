"""State size against training length: a grid of runs, trained side by side, each a row of one table.

Source of the question: *Stuffed Mamba* (arXiv 2410.07145), section 4: up to which training length does a
state of a given size not learn to forget, and from how far back does it recall?
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from statescope.experiments.training.cell import Effort, Row, forget, train_cell
from statescope.experiments.training.config import Config
from statescope.experiments.training.states import state_measures
from statescope.experiments.training.table import Table
from statescope.models import as_device

TABLE = "table.jsonl"

States = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A grid of runs around one configuration.

    Attributes
    ----------
    base : Config
        What all runs share.
    state_sizes, train_lengths, seeds, steps, uniforms : sequence
        The axes: every combination is a run.
    together : int
        At most so many runs are trained as one.

    Raises
    ------
    ValueError
        If an axis is empty, or a run makes no sense; names it. Nothing has been run then.
    """

    base: Config
    state_sizes: Sequence[int]
    train_lengths: Sequence[int]
    seeds: Sequence[int] = (0,)
    steps: Sequence[int] = ()
    uniforms: Sequence[float] = ()
    together: int = 64
    runs: list[Config] = field(init=False)

    def __post_init__(self) -> None:
        axes = {
            "state_size": self.state_sizes,
            "steps": self.steps or (self.base.steps,),
            "uniform": self.uniforms or (self.base.uniform,),
            "train_length": self.train_lengths,
            "seed": self.seeds,
        }
        for name, values in axes.items():
            if not values:
                raise ValueError(f"{name} has no values; name at least one")
        if self.together < 1:
            raise ValueError(f"together={self.together}; expected 1 or more")
        grid = [self.base.but(**dict(zip(axes, cell, strict=True))) for cell in product(*axes.values())]
        object.__setattr__(self, "runs", list(dict.fromkeys(grid)))

    def cells(self, done: Iterable[str] = ()) -> list[list[Config]]:
        """Runs that are trained as one, those left out that are done; small budgets first, then long work."""
        finished, shapes = set(done), dict[str, list[Config]]()
        for run in self.runs:
            shapes.setdefault(run.shape(), []).append(run)
        cells = [
            missing
            for runs in shapes.values()
            for i in range(0, len(runs), self.together)
            if (missing := [r for r in runs[i : i + self.together] if r.name() not in finished])
        ]

        def work(cell: list[Config]) -> tuple[int, int]:
            first = cell[0]
            return first.steps, -len(cell) * first.tokens * (first.state_size + 2 * first.width)

        return sorted(cells, key=work)


def run(
    sweep: Sweep,
    folder: str | Path,
    *,
    effort: Effort | None = None,
    devices: Sequence[str] | None = None,
    workers: int | None = None,
    progress: bool | None = None,
    finished: Callable[[list[Row]], None] | None = None,
) -> Path:
    """Train all runs of a sweep that are not finished yet.

    A cell, runs of one shape, is trained as one on one device; cells run side by side on all of them. A
    finished run is a row of the table, with its checkpoint; an interrupted cell goes on where its state was
    last kept.

    Parameters
    ----------
    sweep : Sweep
        The runs.
    folder : str or Path
        Gets the table, ``runs/`` with the checkpoints, and while it works ``cells/``.
    effort : Effort, optional
        How runs are evaluated.
    devices : sequence of str, optional
        Default: every GPU, or the CPU.
    workers : int, optional
        Processes that trace checkpoints on the CPU meanwhile; 0 does it in this one. Default: 0 on a CPU,
        else what the cores allow.
    progress : bool, optional
        Show progress bars. Default: on a terminal.
    finished : callable, optional
        Is told the rows of every cell as they are written.

    Returns
    -------
    Path
        The table; see :func:`statescope.analyses.runs.read_runs`.
    """
    folder, effort = Path(folder), effort or Effort()
    places = list(devices or _devices())
    for place in places:
        as_device(place)
    table = Table(folder / TABLE)
    cells = sweep.cells(table.done())
    usual = 0 if places == ["cpu"] else max(1, (os.cpu_count() or 1) - 2 * len(places))
    waiting: list[tuple[list[Config], list[Row], list[Future[States]]]] = []

    def keep(cell: list[Config], rows: list[Row], found: list[Future[States]]) -> None:
        for row, states in zip(rows, found, strict=True):
            row["states"] = states.result()
        known = {(r["run"], r["step"]) for r in table.rows}
        table.add([r for r in rows if (r["run"], r["step"]) not in known])
        forget(cell, folder)
        if finished is not None:
            finished(rows)

    with _tracers(usual if workers is None else workers) as tracers:
        for cell, rows in _trained(cells, folder, places, effort, progress):
            waiting.append((cell, rows, [_measure(folder / r["checkpoint"], effort, tracers) for r in rows]))
            while waiting and all(f.done() for f in waiting[0][2]):  # the next cell is trained meanwhile
                keep(*waiting.pop(0))
        for done in waiting:
            keep(*done)
    return table.path


def _devices() -> list[str]:
    gpus = torch.cuda.device_count()
    return [f"cuda:{i}" for i in range(gpus)] or ["cpu"]


def _trained(
    cells: list[list[Config]], folder: Path, places: list[str], effort: Effort, progress: bool | None
) -> Iterator[tuple[list[Config], list[Row]]]:
    """Cells and their rows as they are finished; on one device in this process, else in one for each."""
    if len(places) == 1:
        for cell in cells:
            yield cell, _train(cell, folder, places[0], effort, progress, 0)
        return
    context = get_context("spawn")
    free = context.Queue()
    for i, place in enumerate(places):
        free.put((i, place))
    with ProcessPoolExecutor(len(places), context, _take_device, (free,)) as pool:
        pending = {pool.submit(_train_here, cell, folder, effort, progress): cell for cell in cells}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_HERE: tuple[int, str] = (0, "cpu")
"""Number and name of the device of this process."""


def _take_device(free: Any) -> None:
    global _HERE
    _HERE = free.get()


def _train_here(cell: list[Config], folder: Path, effort: Effort, progress: bool | None) -> list[Row]:
    number, place = _HERE
    return _train(cell, folder, place, effort, progress, number)


def _train(
    cell: list[Config], folder: Path, place: str, effort: Effort, progress: bool | None, line: int
) -> list[Row]:
    first, device = cell[0], torch.device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    label = f"{place} N={first.state_size} {len(cell)} runs"
    disable = None if progress is None else not progress
    with tqdm(total=first.steps, desc=label, position=line, unit="step", disable=disable, leave=False) as bar:

        def tick(steps: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(steps)

        return train_cell(cell, folder, device, effort, tick)


@contextmanager
def _tracers(workers: int) -> Iterator[Executor | None]:
    if not workers:
        yield None
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield pool


def _measure(checkpoint: Path, effort: Effort, tracers: Executor | None) -> Future[States]:
    """What the states of a checkpoint do; at once where nobody else traces."""
    if tracers is not None:
        return tracers.submit(state_measures, checkpoint, effort.traced)
    found: Future[States] = Future()
    found.set_result(state_measures(checkpoint, effort.traced))
    return found
