"""A process that traces in children of its own, so that they start at once and can be killed.

It reads one JSON object a line: ``{"scenario", "store", "log", ...}``; forks a child that traces; answers
with how it ended. In between comes a line that says ``kill``, at once, or ``wait``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch

import statescope
from statescope import anatomy, layout, tracing
from statescope.reader import Reader

MODEL = "mamba2-byte-n16-t512"
TOKENS = 500

TEXT = np.random.default_rng(0).integers(32, 127, TOKENS)

SCENARIOS: dict[str, dict[str, Any]] = {
    "every token": {"segment": 32, "snapshots": [0, 31, 300, -1], "probes": [40, 400], "shard": 64},
    "windows": {
        "segment": 40,
        "window": 7,
        "snapshots": [99, 100],
        "probes": statescope.Probes([300, 499], reach=130),
        "shard": 90,
        "heads": [1, 6],
    },
    "few writes": {"segment": 250, "snapshots": 450, "probes": 400, "shard": 250},
}
"""How a text is traced; shards are small, so that commits are many."""


def trace(scenario: str, place: str, overwrite: bool = False) -> Any:
    """Trace as a scenario says."""
    settings = dict(SCENARIOS[scenario])
    layout.SHARD_TOKENS = settings.pop("shard")
    return statescope.trace(MODEL, TEXT, store=place, overwrite=overwrite, progress=False, **settings)


def report(log: str) -> Any:
    """Write a line at once, and say what is read from where."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(*words: Any) -> None:
        os.write(file, (" ".join(map(str, words)) + "\n").encode())

    for name in ("read", "read_ahead"):

        def spied(self: Any, carry: Any, stop: int, *sink: Any, own: Any, name: str) -> Any:
            say(name, carry.position, stop)
            return own(self, carry, stop, *sink)

        setattr(Reader, name, partialmethod(spied, own=getattr(Reader, name), name=name))
    return say


def die_at(operation: int, say: Any) -> None:
    """Count what changes the file system, and die right before one of them."""
    count = 0

    def counted(own: Any, name: str) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            say("operation", count, name)
            return own(*args, **kwargs)

        return wrapper

    for owner, names in ((Path, ("replace", "rename")), (os, ("rmdir",))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name), name))


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)  # a child has no threads but its own
    model = statescope.load(MODEL, device="cpu")
    anatomy.survey(model, torch.from_numpy(TEXT[None, :1]), "auto")  # imports what a trace imports
    assert tracing.trace is statescope.trace
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            say = report(order["log"])
            if "operation" in order:
                die_at(order["operation"], say)
            say("begin")
            try:
                trace(order["scenario"], order["store"], order.get("overwrite", False))
            except BaseException as error:
                say("error", type(error).__name__, error)
                os._exit(1)
            say("end")
            os._exit(0)
        if sys.stdin.readline().strip() == "kill":
            os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still this child's
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
