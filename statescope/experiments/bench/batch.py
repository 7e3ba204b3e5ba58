"""Many texts: a plain loop over ``trace``, then ``statescope batch`` on 1, 2, ... all workers."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statescope.batch.cluster import gpus
from statescope.batch.command import batch
from statescope.batch.manifest import NAME
from statescope.batch.settings import Settings as Reading
from statescope.experiments.bench.apart import Apart, Lost
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import SHAPES, build, vocabulary
from statescope.experiments.bench.timing import is_gpu
from statescope.models import as_dtype, load
from statescope.tracing import trace

LENGTHS = {"cpu": (200, 2000), "cuda": (200, 20_000)}
"""Tokens of the shortest and the longest text, by device; in between they are spread evenly in their log."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield an entry for the loop, then one for every number of workers."""
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder, Apart() as apart:
        given = {"model": settings.model, "device": settings.device, "dtype": settings.dtype}
        about = {"model": settings.model, "texts": settings.texts, "window": settings.windows[0]}
        drawn = {**given, "folder": folder, "texts": settings.texts}
        try:
            model = apart.call(f"{__name__}.draw", **drawn)
            loop = apart.call(f"{__name__}.loop", **{**drawn, "model": model, "window": about["window"]})
        except Lost as lost:
            yield about | {"skipped": str(lost)}
            return
        yield about | loop
        for number in _numbers():
            arguments = {**drawn, "model": model, "window": about["window"], "workers": number}
            try:
                entry = apart.call(f"{__name__}.many", **arguments)
            except Lost as lost:
                entry = {"skipped": str(lost), "workers": number}
            if "texts_per_s" in entry:
                entry["over_loop"] = entry["texts_per_s"] / loop["texts_per_s"]
            yield about | entry


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    workers = entry.get("workers", 0)
    title = f"batch, {entry['model']}, {entry['texts']} texts, window={entry['window']}, "
    title += f"{workers} workers" if workers else "a loop over trace"
    if "skipped" in entry:
        yield f"{title}: skipped: {entry['skipped']}"
        return
    more = f", {entry['over_loop']:.2f} of the loop" if workers else ""
    if "memory_growth" in entry:
        more += f"; memory of a worker, last quarter over first: {entry['memory_growth']:.3f}"
    yield f"{title}: {entry['texts_per_s']:,.2f} texts/s, {entry['tokens_per_s']:,.0f} tokens/s{more}"


def _numbers() -> list[int]:
    """Numbers of workers: the powers of two up to all GPUs, or up to two processes on a CPU."""
    most = len(gpus()) or 2
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def draw(model: str, device: str, dtype: str, folder: str, texts: int) -> str:
    """Write the texts, and the weights of a shape; return what to call the model."""
    short, long = LENGTHS["cuda" if is_gpu(device) else "cpu"]
    place = Path(folder)
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


def loop(model: str, device: str, dtype: str, folder: str, texts: int, window: int) -> dict[str, Any]:
    """Trace one text after the other to disk, as a user would; the first one twice, as it builds kernels."""
    live = load(model, device=device, dtype=dtype)
    rows = [json.loads(line)["text"] for line in (Path(folder) / "texts.jsonl").open(encoding="utf-8")]
    how: dict[str, Any] = {"window": window, "progress": False, "backend": _backend(device)}
    trace(live, rows[0], **how)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as dumps:
        for i, row in enumerate(rows):
            trace(live, row, store=Path(dumps) / f"{i}.zarr", **how)
        seconds = time.perf_counter() - start
    del live
    if is_gpu(device):
        torch.cuda.empty_cache()
    tokens = sum(map(len, rows))
    return {"seconds": seconds, "texts_per_s": texts / seconds, "tokens_per_s": tokens / seconds}


def many(
    model: str, device: str, dtype: str, folder: str, texts: int, window: int, workers: int
) -> dict[str, Any]:
    """Let workers trace them; rates are those from the first outcome on, ``seconds`` is all of it.

    Raises
    ------
    RuntimeError
        If a text was not read.
    """
    how = Reading(model, device=device, dtype=dtype, window=window, backend=_backend(device))
    with tempfile.TemporaryDirectory(dir=folder) as dumps:
        found = batch(Path(folder) / "texts.jsonl", dumps, how, workers=workers)
        if found.done != texts:
            raise RuntimeError(f"{found.failed} texts failed, {found.pending} are left: {found.reasons}")
        with closing(sqlite3.connect(Path(dumps) / NAME.format(""))) as manifest:
            rows = manifest.execute("SELECT updated, tokens, memory FROM text ORDER BY updated").fetchall()
    when, tokens, memory = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    later = when > when[0] + 0.1  # texts of one piece of work come back at once
    span = max(1e-9, when[-1] - when[0])
    quarter = max(1, texts // 4)
    return {
        "workers": workers,
        "seconds": found.seconds,
        "bytes": found.bytes,
        "texts_per_s": float(later.sum() / span),
        "tokens_per_s": float(tokens[later].sum() / span),
        "worker_bytes": float(np.median(memory[-quarter:])),
        "memory_growth": float(np.median(memory[-quarter:]) / np.median(memory[:quarter])),
    }


def _backend(device: str) -> str:
    return "fused" if is_gpu(device) else "chunked"
