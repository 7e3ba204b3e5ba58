"""Jobs that fail in their own ways, for the tests of the benchmark."""

from __future__ import annotations

import os
import signal

from statescope.experiments.bench.apart import stage


def raises() -> None:
    raise ValueError("not like this\nand more")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def works(number: int) -> dict[str, object]:
    print("other output is passed over")
    stage(f"double {number}")
    return {"twice": 2 * number, "seen": os.environ.get("STATESCOPE_BENCH_TEST")}


def imports() -> None:
    import colorsys  # noqa: F401
