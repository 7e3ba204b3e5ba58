"""What a run says of itself while it lasts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from statescope.batch.engine import Waiting
from statescope.batch.manifest import Outcome

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts outcomes: a bar on a terminal, lines elsewhere; time left goes by the bytes of the texts."""

    def __init__(self, todo: Sequence[Waiting], say: Callable[[str], None]) -> None:
        self._sizes = {w.id: w.size for w in todo}
        self._say, self._began, self._said = say, time.monotonic(), time.monotonic()
        self.read = self.failed = self.tokens = self.bytes = self.passed = 0
        self._bar: Any = tqdm(
            total=sum(self._sizes.values()),
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left{postfix}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tell(self, outcomes: list[Outcome]) -> None:
        """Take what came back."""
        for outcome in outcomes:
            self.read += outcome.status == "done"
            self.failed += outcome.status == "failed"
            self.tokens += outcome.tokens or 0
            self.bytes += outcome.bytes or 0
            self.passed += self._sizes[outcome.id]
            self._bar.update(self._sizes[outcome.id])
        self._bar.set_postfix_str(self.line())
        if self._bar.disable and time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            left = (
                (sum(self._sizes.values()) - self.passed) / max(1, self.passed) * (self._said - self._began)
            )
            self._say(f"{self.line()}, about {left:,.0f} s left")

    def line(self) -> str:
        """Say how far it is."""
        rate = self.tokens / max(1e-9, time.monotonic() - self._began)
        return (
            f"{self.read:,} of {len(self._sizes):,} texts done, {self.failed:,} failed,"
            f" {rate:,.0f} tokens/s, {self.bytes / 1e6:,.1f} MB"
        )
