"""Runs the parts of the benchmark; saves after every entry, so that no failure costs another's result."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from statescope.experiments.bench import accuracy, batch, families, forward, scans, stream
from statescope.experiments.bench.apart import reason
from statescope.experiments.bench.settings import Settings
from statescope.plan import versions

MODULES: dict[str, Any] = {
    "accuracy": accuracy,
    "scan": scans,
    "forward": forward,
    "stream": stream,
    "families": families,
    "batch": batch,
}


def run(settings: Settings, output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure part by part; print, save, and return everything, with device, versions, date and command.

    Parameters
    ----------
    settings : Settings
        What to measure.
    output : Path
        Result file, written anew after every entry.
    say : callable
        Takes each line that is printed.

    Returns
    -------
    dict
        A list of entries for each part; ``failed`` names parts that broke off and kernels that were wrong.
    """
    threads = f"{_processor()}, {torch.get_num_threads()} threads"
    result: dict[str, Any] = {
        "command": settings.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if settings.gpu else threads,
        "dtype": settings.dtype,
        "versions": versions(),
        "failed": [],
        **{part: [] for part in settings.parts},
    }
    save(result, output)
    say(f"{result['device']}, {result['dtype']}")
    for part in settings.parts:
        say("")
        try:
            for entry in MODULES[part].measure(settings):
                _add(result, part, entry)
                save(result, output)
                for line in MODULES[part].describe(entry):
                    say(line)
        except Exception as error:  # the other parts are still worth having
            result["failed"].append({"part": part, "reason": reason(error)})
            save(result, output)
            say(f"{part} broke off: {reason(error)}")
    return result


def _processor() -> str:
    """Name the processor, as the system knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.split(':', 1)[1].strip()}"
    return "CPU"


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result file, whole or not at all; what is not finite becomes a word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _add(result: dict[str, Any], part: str, entry: dict[str, Any]) -> None:
    if "rates" in entry:  # of the machine, not of any shape
        result.update(entry["rates"])
        return
    result[part].append(entry)
    if "refused" in entry:
        result["failed"].append({"part": part, "shape": entry["shape"], "reason": entry["refused"]})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
