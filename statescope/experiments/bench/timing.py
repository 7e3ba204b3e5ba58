"""Contestants take turns, so that a machine whose speed drifts is unfair to none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from statescope.experiments.bench.apart import reason

SLEEP = 20_000_000
"""Cycles for which the GPU is held before device time is taken: time for the host to queue every launch."""


@dataclass
class Timing:
    """One contestant's rounds: seconds on the host's clock and, where taken, on the device's."""

    name: str
    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    note: str = ""
    skipped: str = ""

    def row(self, baselines: Mapping[str, float]) -> dict[str, Any]:
        """Median, spread, and ratios to the medians of the baselines; or why there is none."""
        if not self.seconds:
            return {"name": self.name, "skipped": self.skipped or "not run"}
        median = statistics.median(self.seconds)
        row: dict[str, Any] = {
            "name": self.name,
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "ratios": {name: median / seconds for name, seconds in baselines.items()},
        }
        if self.device_seconds:
            row["device_median_ms"] = 1e3 * statistics.median(self.device_seconds)
            row["device_min_ms"] = 1e3 * min(self.device_seconds)
            row["device_max_ms"] = 1e3 * max(self.device_seconds)
        return row | ({"note": self.note} if self.note else {})


def rows(timings: Sequence[Timing], baselines: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of contestants, with ratios to those of the baselines that were timed."""
    medians = {t.name: statistics.median(t.seconds) for t in timings if t.seconds}
    chosen = {name: medians[name] for name in baselines if name in medians}
    return [t.row(chosen) for t in timings]


def take_turns(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
    *,
    warm: int = 2,
    on_device: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time contestants round by round; one that raises is out, with its reason, and the rest go on.

    Parameters
    ----------
    contestants : mapping of str to callable
        What to run. A result is let go after the clock has stopped.
    rounds, warm : int
        Rounds that count, and rounds before them that do not.
    device : str
        Whose work is waited for.
    on_device : bool
        Whether to take the device's own time too, with all launches queued beforehand (GPU only).
    prepare : callable
        Run before every contestant, untimed.

    Raises
    ------
    RuntimeError
        If a contestant's error has ended all work on the GPU.
    """
    timings = [Timing(name) for name in contestants]
    turns = list(zip(timings, contestants.values(), strict=True))
    for round_ in range(warm + rounds):
        first = round_ % len(turns)  # none comes always after the same one
        for timing, work in turns[first:] + turns[:first]:
            if timing.skipped:
                continue
            try:
                prepare()
                seconds = host_seconds(work, device)
                busy = device_seconds(work) if on_device and is_gpu(device) else None
            except Exception as error:  # whatever a peer raises costs its own row only
                timing.skipped, timing.seconds, timing.device_seconds = reason(error), [], []
            else:
                if round_ >= warm:
                    timing.seconds.append(seconds)
                    timing.device_seconds.extend([] if busy is None else [busy])
            if timing.skipped and is_gpu(device):
                torch.cuda.synchronize()  # raises if the device is lost: nothing after that can be timed
                torch.cuda.empty_cache()
    return timings


def host_seconds(work: Callable[[], Any], device: str) -> float:
    """Seconds from the call until its work is done."""
    if is_gpu(device):
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if is_gpu(device):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def device_seconds(work: Callable[[], Any]) -> float:
    """Seconds between two events on the GPU, which is held until the host has queued what lies between."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    start.record()
    result = work()
    stop.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3


def is_gpu(device: str) -> bool:
    """Whether a device is a GPU."""
    return device.startswith("cuda")


def table(title: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lay rows out for reading: medians and spread in milliseconds, ratios to each baseline."""
    timed = [row for row in found if "skipped" not in row]
    baselines = list(dict.fromkeys(name for row in timed for name in row["ratios"]))
    device = any("device_median_ms" in row for row in timed)
    width = max([len(row["name"]) for row in found], default=0) + 2
    heads = ["median ms", "min", "max", *(["on device"] if device else []), *(f"/ {b}" for b in baselines)]
    sizes = [max(10, len(h) + 2) for h in heads]
    yield title
    yield " " * width + "".join(f"{h:>{s}}" for h, s in zip(heads, sizes, strict=True))
    for row in found:
        if "skipped" in row:
            yield f"{row['name']:{width}}skipped: {row['skipped']}"
            continue
        keys = ["median_ms", "min_ms", "max_ms", *(["device_median_ms"] if device else [])]
        cells = [f"{row[k]:.3f}" if k in row else "" for k in keys]
        cells += [f"{row['ratios'][b]:.3f}" for b in baselines]
        line = "".join(f"{c:>{s}}" for c, s in zip(cells, sizes, strict=True))
        yield f"{row['name']:{width}}{line}  {row.get('note', '')}".rstrip()
