"""Many texts: ``statescope batch`` on 1, 2, ... all workers, and a plain loop over ``trace``.

On a CPU they take turns, and there is a second loop, held to one core: the first has all cores by the threads
of torch.
"""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statescope.batch.cluster import gpus
from statescope.batch.cluster import workers as workers_of
from statescope.batch.command import batch
from statescope.batch.manifest import NAME
from statescope.batch.places import Dumps
from statescope.batch.settings import Settings as Reading
from statescope.batch.settings import Text
from statescope.batch.work import look, work
from statescope.experiments.bench.apart import Apart, Lost, stage
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import SHAPES, build, vocabulary
from statescope.experiments.bench.timing import is_gpu
from statescope.models import as_dtype, load
from statescope.tracing import trace

LENGTHS = (200, 20_000)
"""Tokens of the shortest and the longest text; in between they are spread evenly in their log."""

LOOPED = 128
"""Texts that the loop reads at most; they are in no order."""

Contestant = tuple[int, int | None]
"""Workers, or none for a loop; the cores that a loop is held to, or None for all."""

WARM = 8
"""Texts read beforehand, by the loop and by each worker, from the shortest to the longest."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield an entry for every number of workers, then one for the loop."""
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder, Apart() as apart:
        given: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype, "folder": folder}
        given |= {"texts": settings.texts}
        about: dict[str, Any] = {
            "model": settings.model,
            "texts": settings.texts,
            "window": settings.windows[0],
        }
        try:
            model = apart.call(f"{__name__}.draw", model=settings.model, **given)
        except Lost as lost:
            yield about | {"skipped": str(lost)}
            return
        given |= {"model": model, "window": about["window"]}
        found: dict[Contestant, list[dict[str, Any]]] = {one: [] for one in _contestants(settings.gpu)}
        # On a GPU workers take a minute to start. The last round begins with them: loops need their rates.
        for left in reversed(range(1 if settings.gpu else settings.rounds)):
            for workers, cores in [*found][:: -1 if left % 2 else 1]:
                job = f"{__name__}.{'many' if workers else 'loop'}"
                try:
                    entry = apart.call(
                        job, **given, **({"workers": workers} if workers else {"cores": cores})
                    )
                except Lost as lost:
                    entry = {"skipped": str(lost)}
                found[workers, cores].append(entry)
                if not left:
                    yield about | {"workers": workers} | _joined((workers, cores), found)


def _contestants(gpu: bool) -> list[Contestant]:
    held = [] if gpu or not hasattr(os, "sched_setaffinity") else [(0, 1)]
    return [*((n, None) for n in _numbers()), (0, None), *held]


def _joined(one: Contestant, found: dict[Contestant, list[dict[str, Any]]]) -> dict[str, Any]:
    """Take the round in the middle of one contestant's, with the rates of all and their ratios to others."""
    rounds, (workers, cores) = found[one], one
    known = sorted((r for r in rounds if "skipped" not in r), key=lambda r: r["tokens_per_s"])
    if len(known) < len(rounds):
        return next(r for r in rounds if "skipped" in r)
    entry = known[len(known) // 2] | {"tokens_per_s_of_rounds": [r["tokens_per_s"] for r in rounds]}

    def over(other: Contestant, this: Contestant) -> list[float]:
        pairs = zip(found[other], found[this], strict=True)
        return [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs if "skipped" not in {**a, **b}]

    if workers > 1 and (ratios := over(one, (1, None))):
        entry["over_one_worker"] = statistics.median(ratios)
    if not workers:
        entry["cores"] = cores
        entry["workers_over_loop_of_rounds"] = {str(n): over((n, c), one) for n, c in found if n}
        of_all = entry["workers_over_loop_of_rounds"].items()
        entry["workers_over_loop"] = {n: statistics.median(ratios) for n, ratios in of_all if ratios}
    return entry


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    workers = entry.get("workers", 0)
    title = f"batch, {entry['model']}, {entry['texts']} texts, window={entry['window']}, "
    title += f"{workers} workers" if workers else f"{entry.get('texts_read', 0)} in a loop over trace"
    title += " on one core" if entry.get("cores") else ""
    if "skipped" in entry:
        yield f"{title}: skipped: {entry['skipped']}"
        return
    more = f", {entry['over_one_worker']:.2f} of one worker" if "over_one_worker" in entry else ""
    for number, ratio in entry.get("workers_over_loop", {}).items():
        rounds = entry["workers_over_loop_of_rounds"][number]
        more += f"; {number} workers: {ratio:.2f} of it"
        more += f" ({min(rounds):.2f} to {max(rounds):.2f})" if len(rounds) > 1 else ""
    if workers:
        more += f"; {entry['start_seconds']:.0f} s to start; memory of a worker, last quarter over first:"
        more += f" {entry['memory_growth']:.3f}"
    yield f"{title}: {entry['texts_per_s']:,.2f} texts/s, {entry['tokens_per_s']:,.0f} tokens/s{more}"


def _numbers() -> list[int]:
    """Numbers of workers: the powers of two up to all GPUs, or up to two processes on a CPU."""
    most = len(gpus()) or 2
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def draw(model: str, device: str, dtype: str, folder: str, texts: int) -> str:
    """Write the texts, and the weights of a shape; return what to call the model."""
    short, long = LENGTHS
    place = Path(folder)
    stage(f"draw {model} and {texts} texts of {short:,} to {long:,} tokens")
    if model in SHAPES:
        subject = build(model, device, as_dtype(dtype))
        subject.save_pretrained(place / "model")  # type: ignore[operator]
        words, model = vocabulary(subject), str(place / "model")
    else:
        words = vocabulary(load(model, device=device))
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(short), np.log(long), texts)).astype(int)
    with (place / "texts.jsonl").open("w", encoding="utf-8") as file:
        for i, n in enumerate(lengths):
            row = {"id": str(i), "text": rng.integers(0, words, n).tolist()}
            file.write(json.dumps(row) + "\n")
    return model


def loop(
    model: str, device: str, dtype: str, folder: str, texts: int, window: int, cores: int | None
) -> dict[str, Any]:
    """Trace one text after the other to disk, as a user would, once everything is loaded and built."""
    with _held_to(cores):
        return _loop(model, device, dtype, folder, window)


def _loop(model: str, device: str, dtype: str, folder: str, window: int) -> dict[str, Any]:
    stage("loop: load the model and read a few texts")
    live = load(model, device=device, dtype=dtype)
    rows = [row["text"] for row in _read(folder)][:LOOPED]
    how: dict[str, Any] = {"window": window, "progress": False, "backend": _backend(device)}
    for row in _spread(rows):
        trace(live, row, **how)
    stage(f"loop: read {len(rows)} texts, one after the other")
    used, start = _processor_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as dumps:
        for i, row in enumerate(rows):
            trace(live, row, store=Path(dumps) / f"{i}.zarr", **how)
        seconds = time.perf_counter() - start
    processor = _processor_seconds() - used
    del live
    if is_gpu(device):
        torch.cuda.empty_cache()
    about = {"texts_read": len(rows), "threads": torch.get_num_threads(), "processor_seconds": processor}
    return about | _rates(rows, seconds)


@contextmanager
def _held_to(cores: int | None) -> Iterator[None]:
    """Hold this process to some cores, all its threads of now and those to come; None leaves it as it is."""
    if cores is None:
        yield
        return
    threads, allowed = torch.get_num_threads(), os.sched_getaffinity(0)

    def hold(which: Iterable[int]) -> None:
        for task in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), which)

    try:
        torch.set_num_threads(cores)
        hold(sorted(allowed)[:cores])
        yield
    finally:
        torch.set_num_threads(threads)
        hold(allowed)


def many(
    model: str, device: str, dtype: str, folder: str, texts: int, window: int, workers: int
) -> dict[str, Any]:
    """Let workers trace them, once they have loaded the model and read a few; ``start_seconds`` is that.

    Raises
    ------
    RuntimeError
        If a text was not read.
    """
    how = Reading(model, device=device, dtype=dtype, window=window, backend=_backend(device))
    rows, began = [row["text"] for row in _read(folder)], time.perf_counter()
    stage(f"{workers} workers: start them")
    with tempfile.TemporaryDirectory(dir=folder) as dumps, workers_of(None, workers) as (client, _):
        devices = _warmed(client, how, _spread(rows), lambda said: stage(f"{workers} workers: {said}"))
        stage(f"{workers} workers: read {texts} texts")
        used, start = _processor_seconds(client), time.perf_counter()
        found = batch(Path(folder) / "texts.jsonl", dumps, how, scheduler=client, say=stage)
        seconds, processor = time.perf_counter() - start, _processor_seconds(client) - used
        if found.done != texts:
            raise RuntimeError(f"{found.failed} texts failed, {found.pending} are left: {found.reasons}")
        with closing(sqlite3.connect(Path(dumps) / NAME.format(""))) as manifest:
            memory = [m for (m,) in manifest.execute("SELECT memory FROM text ORDER BY updated")]
    parts = [float(np.median(part)) for part in np.array_split(np.array(memory, dtype=float), 4)]
    return {
        "workers": workers,
        "devices": devices,
        "start_seconds": start - began,
        "bytes": found.bytes,
        "worker_bytes": parts,
        "memory_growth": parts[-1] / parts[0],
        "processor_seconds": processor,
    } | _rates(rows, seconds)


def _warmed(client: Any, how: Reading, rows: list[list[int]], say: Callable[[str], None]) -> list[str]:
    """Let every worker load the model and read a few texts, which builds kernels; say what they run on."""
    addresses = list(client.scheduler_info(n_workers=-1)["workers"])

    def everywhere(function: Callable[..., Any], **given: Any) -> list[Any]:
        asked = [client.submit(function, settings=how, workers=[a], pure=False, **given) for a in addresses]
        found: list[Any] = client.gather(asked)
        return found

    say("load the model")
    everywhere(look)
    for row in rows:
        say(f"warm, a text of {len(row):,} tokens")
        devices = everywhere(warm, row=row)
    return devices


def warm(settings: Reading, row: list[int]) -> str:
    """Let a worker read a text, alone and together with its like; say what it runs on."""
    facts = look(settings)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            texts = [Text(str(i), "", f"{i}.zip", row) for i in range(count)]
            work(texts, settings, facts, Dumps.at(folder), "warm")
    return f"{facts.device} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}".strip()


def _read(folder: str) -> Iterator[dict[str, Any]]:
    with (Path(folder) / "texts.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _spread(rows: list[list[int]]) -> list[list[int]]:
    ranks = np.linspace(0, len(rows) - 1, min(WARM, len(rows))).round().astype(int)
    return [sorted(rows, key=len)[i] for i in ranks]


def _rates(rows: list[list[int]], seconds: float) -> dict[str, float]:
    tokens = sum(map(len, rows))
    return {"seconds": seconds, "texts_per_s": len(rows) / seconds, "tokens_per_s": tokens / seconds}


def _processor_seconds(client: Any = None) -> float:
    """Seconds that the processors have spent on this process, and on a client's workers."""
    elsewhere = client.run(time.process_time).values() if client is not None else ()
    return time.process_time() + sum(elsewhere)


def _backend(device: str) -> str:
    return "fused" if is_gpu(device) else "chunked"
