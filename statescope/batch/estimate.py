"""A dry run: what is left to do, and what it takes, from a sample that is measured here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from statescope.batch.engine import BYTES_PER_TOKEN, Waiting, pieces
from statescope.batch.inputs import read
from statescope.batch.manifest import Manifest, place_of
from statescope.batch.places import Dumps
from statescope.batch.shelf import Shelf

SAMPLES = 5
"""Pieces of work that are measured, evenly spaced from the longest texts to the shortest."""

SECONDS = 30.0
"""After which no further piece is begun."""


@dataclass(frozen=True)
class Estimate:
    """What a run would come to; seconds are those of the workers at work, without their start."""

    texts: int
    known: int
    unreadable: tuple[str, ...]
    seconds: float
    bytes: float
    tokens: float
    sampled: int
    workers: int

    def lines(self) -> Iterator[str]:
        """Put it into words."""
        count = len(self.unreadable)
        yield f"to read: {self.texts:,} texts; done already: {self.known:,}; unreadable: {count:,}"
        for reason in self.unreadable[:5]:
            yield f"  {reason}"
        if self.sampled:
            yield (
                f"about {self.tokens:,.0f} tokens, {self.bytes / 1e9:,.3f} GB, {self.seconds:,.0f} s with"
                f" {self.workers} workers like this process (measured on {self.sampled} texts); nothing was"
                " written"
            )


def estimate(
    inputs: str | Path,
    dumps: str | Path,
    settings: Any,
    *,
    text: str = "text",
    id: str | None = None,
    pattern: str = "**/*.txt",
    limit: int | None = None,
    shard: str | None = None,
    retry_failed: bool = False,
    workers: int | None = None,
) -> Estimate:
    """Measure a sample of what is left and extend it by the sizes of the texts; arguments as of ``batch``.

    The sample is read by this process, into a temporary folder; each sampled piece of work stands for those
    of sizes like its own.
    """
    from statescope.batch.cluster import gpus
    from statescope.batch.command import belongs, manifest_name, reached, shard_of, waiting
    from statescope.batch.settings import Text
    from statescope.batch.work import look, work

    place, share = Dumps.at(dumps), shard_of(shard)
    rows = read(inputs, text=text, id=id, pattern=pattern)
    with (
        closing(Shelf(row for row in rows if belongs(row.id, share))) as shelf,
        TemporaryDirectory(prefix="statescope-") as folder,
    ):
        scratch, name = Path(folder), manifest_name(shard)
        if name in reached(place, place.manifests):
            place.get(name, scratch / name)
        with Manifest(scratch / name) as manifest:
            manifest.agree({**settings.written(), "settings": settings.digest()})
            manifest.register(shelf)
            todo = waiting(manifest, shelf, retry_failed)[:limit]
            known = manifest.totals().get("done", (0, 0, 0))[0]
        unreadable = tuple(f"{row.id}: {row.reason}" for row, _ in shelf if row.reason)
        count = workers or len(gpus()) or 1
        if not todo:
            return Estimate(0, known, unreadable, 0.0, 0.0, 0.0, 0, count)
        facts = look(settings)
        whole = list(pieces(todo, BYTES_PER_TOKEN * facts.segment, count))
        target = Dumps.at(scratch / "dumps")

        def measured(piece: list[Waiting]) -> tuple[int, int, float, int, int]:
            texts = [Text(w.id, w.sha256, place_of(w.id), shelf.content(w.id)) for w in piece]
            start = time.monotonic()
            outcomes = work(texts, settings, facts, target, "sample")
            seconds = time.monotonic() - start
            sizes = (sum(o.bytes or 0 for o in outcomes), sum(o.tokens or 0 for o in outcomes))
            return sum(w.size for w in piece), len(piece), seconds, *sizes

        measured(whole[-1])  # the first reading builds what all later ones use
        found, began = [], time.monotonic()
        for piece in _spread(whole):
            found.append(measured(piece))
            if time.monotonic() - began > SECONDS:
                break
    seconds, size, tokens = _extended(whole, found)
    sampled = sum(n for _, n, *_ in found)
    return Estimate(len(todo), known, unreadable, seconds / count, size, tokens, sampled, count)


def _spread(whole: list[list[Waiting]]) -> list[list[Waiting]]:
    """Pick pieces evenly, from the middle of equal parts."""
    number = min(SAMPLES, len(whole))
    return [whole[(2 * i + 1) * len(whole) // (2 * number)] for i in range(number)]


def _extended(
    whole: list[list[Waiting]], found: list[tuple[int, int, float, int, int]]
) -> tuple[float, float, float]:
    """Let each piece cost, by the byte, what the sampled piece of the nearest size did."""
    totals = [0.0, 0.0, 0.0]
    for piece in whole:
        size = sum(w.size for w in piece)
        nearest = min(found, key=lambda f: abs(f[0] / f[1] - size / len(piece)))
        for i, measured in enumerate(nearest[2:]):
            totals[i] += measured * size / nearest[0]
    seconds, written, tokens = totals
    return seconds, written, tokens
