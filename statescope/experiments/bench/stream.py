"""Long texts traced to disk, each in a process of its own: time, size, and memory that must not grow."""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from statescope.experiments.bench.apart import Apart, Lost
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import build, vocabulary
from statescope.experiments.bench.timing import is_gpu
from statescope.models import as_dtype
from statescope.tracing import trace

WARM = {"cpu": 4096, "cuda": 32768}
"""Tokens traced in memory beforehand, by device: enough that every kernel is built."""

FLAT = ("peak_gpu_bytes", "peak_host_bytes", "seconds_per_token")
"""What must not grow with the length of a text."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield an entry for each window and length, then the ratios of the longest to the shortest."""
    for window in settings.windows:
        found = []
        for tokens in settings.stream:
            about = {"model": settings.model, "tokens": tokens, "window": window}
            with Apart() as work:  # a peak of memory is a process's for life
                try:
                    entry = work.call(
                        f"{__name__}.one", **about, device=settings.device, dtype=settings.dtype,
                        scratch=None if settings.scratch is None else str(settings.scratch),
                    )  # fmt: skip
                except Lost as lost:
                    entry = {"skipped": str(lost)}
            yield about | entry
            found += [entry] if "skipped" not in entry else []
        if len(found) > 1:
            first, last = found[0], found[-1]
            yield {
                "model": settings.model,
                "window": window,
                "flatness": {name: last[name] / first[name] for name in FLAT if first.get(name)},
                "between": [first["tokens_read"], last["tokens_read"]],
            }


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    title = f"stream, {entry['model']}, window={entry['window']}"
    if "flatness" in entry:
        short, long = entry["between"]
        ratios = ", ".join(f"{name} {value:.3f}" for name, value in entry["flatness"].items())
        yield f"{title}, {long:,} over {short:,} tokens: {ratios}"
        return
    title += f", {entry['tokens']:,} tokens"
    if "skipped" in entry:
        yield f"{title}: skipped: {entry['skipped']}"
        return
    gpu = f"{entry['peak_gpu_bytes'] / 2**30:.2f} GiB on the GPU, " if entry["peak_gpu_bytes"] else ""
    yield (
        f"{title}: {entry['seconds']:.1f} s, {entry['tokens_per_s']:,.0f} tokens/s,"
        f" {entry['store_bytes'] / 1e6:,.1f} MB in {entry['store_files']} files;"
        f" peaks: {gpu}{entry['peak_host_bytes'] / 2**30:.2f} GiB on the host"
    )


def one(model: str, tokens: int, window: int, device: str, dtype: str, scratch: str | None) -> dict[str, Any]:
    """Trace a random text to disk once, after a short one that warms up.

    Raises
    ------
    OSError
        If the disk has less room than the record takes uncompressed.
    """
    subject = build(model, device, as_dtype(dtype))
    ids = torch.randint(0, vocabulary(subject), (1, tokens), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {
        "window": window, "progress": False, "backend": "fused" if is_gpu(device) else "chunked"
    }  # fmt: skip
    short = min(tokens, WARM["cuda" if is_gpu(device) else "cpu"])
    warm = trace(subject, ids[:, :short], **how)
    raw = sum(group.nbytes for group in (warm[name].to_dataset() for name in warm.children)) * tokens // short
    del warm
    before = peak_host_bytes()
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * raw:
            raise OSError(f"{folder} has {free / 1e9:.0f} GB free; the record may take {raw / 1e9:.0f} GB")
        store = Path(folder) / "run.zarr"
        start = time.perf_counter()
        trace(subject, ids, store=store, **how)
        seconds = time.perf_counter() - start
        sizes = [p.stat().st_size for p in store.rglob("*") if p.is_file()]
    return {
        "tokens_read": tokens,
        "seconds": seconds,
        "seconds_per_token": seconds / tokens,
        "tokens_per_s": tokens / seconds,
        "raw_bytes": raw,
        "store_bytes": sum(sizes),
        "store_files": len(sizes),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if is_gpu(device) else 0,
        "peak_host_bytes": peak_host_bytes(),
        "peak_host_bytes_before": before,
    }


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux's ``ru_maxrss`` begins with that of the parent process; the kernel's account of this one does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
