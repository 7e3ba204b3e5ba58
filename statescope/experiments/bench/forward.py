"""A whole model's traced forward beside its plain one, and the rate at which its record reaches the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from statescope.experiments.bench.apart import Apart, Lost, reason, workplace
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.subjects import build, mamba_ssm_model, vocabulary
from statescope.experiments.bench.timing import Timing, is_gpu, rows, table, take_turns
from statescope.models import as_dtype
from statescope.tracing import trace

PLAIN = ("transformers", "mamba_ssm")
"""Baselines of the ratios: plain forwards of the same weights."""

PLACES = ((1, "in memory"), (64, "in memory"), (64, "to disk"), (1, "to disk"))
"""Windows and places of the traces that are timed."""

TO_DISK = "traced, our scan, window=1, to disk"
ZARR = "plain zarr, the same arrays"

ZARRS = f"{ZARR}, zarrs"
"""By the codec pipeline that anybody may have zarr use instead of its own; ours is neither."""

RIVALS = {"disk": ZARR, "disk, zarrs": ZARRS}
"""What the rate at which a trace reaches the disk is divided by, by the entry's key."""

ON_CPU = (
    "traced, its own scan, window=1, in memory",
    "traced, our scan, window=1, in memory",
    "traced, our scan, window=64, to disk",
    TO_DISK,
)
"""Traces that are timed on a CPU too, where each takes seconds."""

IN_TORCH = (8192, 4096, 2048)
"""Lengths for which the torch scan of transformers is tried, until one fits in memory."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield an entry with every kind of trace, then one for transformers without mamba_ssm."""
    about = {"model": settings.model, "tokens": settings.forward}
    job: dict[str, Any] = {
        "model": settings.model, "rounds": settings.rounds,
        "device": settings.device, "dtype": settings.dtype,
        "scratch": None if settings.scratch is None else str(settings.scratch),
    }  # fmt: skip
    with workplace(settings.gpu) as work:
        try:
            yield about | work.call(f"{__name__}.whole", tokens=settings.forward, **job)
        except Lost as lost:
            yield about | {"skipped": str(lost)}
    about |= {"without": "mamba_ssm"}
    if not settings.gpu or find_spec("mamba_ssm") is None:
        yield about | {"skipped": "mamba_ssm was not in use above either"}
        return
    with Apart(without=["mamba_ssm"]) as work:
        for tokens in [n for n in IN_TORCH if n <= settings.forward]:
            try:
                entry = work.call(f"{__name__}.in_torch", tokens=tokens, **job)
            except Lost as lost:
                entry = {"skipped": str(lost)}
            yield about | {"tokens": tokens} | entry
            if "rows" in entry and "skipped" not in entry["rows"][0]:
                return


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    title = f"forward, {entry['model']}, {entry['tokens']:,} tokens"
    title += f", without {entry['without']}" if "without" in entry else ""
    if "rows" not in entry:
        yield f"{title}: skipped: {entry['skipped']}"
        return
    yield from table(f"{title}, segments of {entry['segment']:,}", entry["rows"])
    for key in [key for key in entry if key.startswith("disk")]:
        d = entry[key]
        yield (
            f"{key}: {d['bytes'] / 1e6:,.0f} MB with {d['cores']} cores: {RIVALS[key]}"
            f" {d['plain_zarr_bytes_per_s'] / 1e6:,.1f} MB/s, our trace at window=1"
            f" {d['trace_bytes_per_s'] / 1e6:,.1f} MB/s, {d['ratio']:.2f} of that"
        )


def whole(
    model: str, tokens: int, rounds: int, device: str, dtype: str, scratch: str | None
) -> dict[str, Any]:
    """Time plain forwards and every kind of trace of a model in turns, and plain zarr on the same arrays."""
    subject = build(model, device, as_dtype(dtype))
    ids = _draw_ids(subject, tokens)
    contestants: dict[str, Callable[[], Any]] = {"transformers": _plain(subject, ids, device)}
    skipped: list[Timing] = []
    try:
        peer = mamba_ssm_model(subject)
    except Exception as error:  # whatever keeps the peer from being built is its own row
        skipped.append(Timing("mamba_ssm", skipped=reason(error)))
    else:
        contestants["mamba_ssm"] = _plain(peer, ids, device)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        store, again = Path(folder) / "run.zarr", Path(folder) / "again.zarr"
        for name, work in _traces(subject, ids, device, store).items():
            if is_gpu(device) or name in ON_CPU:
                contestants[name] = work
            else:
                skipped.append(Timing(name, skipped="left out on a CPU, to save time"))
        if "mamba_ssm" in contestants:
            peers = _traces(peer, ids, device, store).items()
            contestants |= {f"mamba_ssm {name}": work for name, work in peers}
        contestants[TO_DISK]()
        arrays = Arrays(store)
        contestants[ZARR] = lambda: arrays.write(again)
        if find_spec("zarrs") is None:
            skipped.append(Timing(ZARRS, skipped="zarrs is not installed"))
        else:
            contestants[ZARRS] = lambda: arrays.write(again, "zarrs.ZarrsCodecPipeline")
        timings = take_turns(contestants, rounds, device, warm=1, prepare=lambda: _clear(store, again))
    found = rows([*timings, *skipped], PLAIN)
    disk = {key: _disk(found, arrays.bytes, rival) for key, rival in RIVALS.items()}
    return {"segment": arrays.segment, "rows": found, **{key: rates for key, rates in disk.items() if rates}}


def _traces(model: nn.Module, ids: Tensor, device: str, store: Path) -> dict[str, Callable[[], Any]]:
    """Name every kind of trace; those to disk with our scan only, which is the faster."""
    return {
        f"traced, {whose} scan, window={window}, {place}": _traced(
            model, ids, window, backend, store if place == "to disk" else None
        )
        for whose, backend in (("its own", "auto"), ("our", _kernel(device)))
        for window, place in PLACES
        if whose == "our" or place == "in memory"
    }


def in_torch(
    model: str, tokens: int, rounds: int, device: str, dtype: str, scratch: str | None
) -> dict[str, Any]:
    """Time the plain forward of transformers in torch beside traces in memory, where mamba_ssm is absent."""
    subject = build(model, device, as_dtype(dtype))
    ids = _draw_ids(subject, tokens)
    contestants: dict[str, Callable[[], Any]] = {"transformers": _plain(subject, ids, device)}
    for window in (1, 64):
        name = f"traced, our scan, window={window}, in memory"
        contestants[name] = _traced(subject, ids, window, _kernel(device), None)
    segment = int(contestants[name]().attrs["segment"])
    return {"segment": segment, "rows": rows(take_turns(contestants, rounds, device, warm=1), PLAIN)}


class Arrays:
    """The per-step arrays of a record, in memory, to be written again by zarr alone.

    Parameters
    ----------
    store : Path
        A record.
    """

    def __init__(self, store: Path) -> None:
        root = zarr.open_group(store, mode="r")
        self.segment = int(root.attrs["segment"])  # type: ignore[arg-type]
        group = root["steps"]
        assert isinstance(group, zarr.Group)
        self._like = {name: array for name, array in group.arrays() if array.ndim > 1}
        self._values = {name: np.asarray(array[...]) for name, array in self._like.items()}
        self._codecs = {name: array.compressors for name, array in self._like.items()}

    @property
    def bytes(self) -> int:
        """Their size, uncompressed."""
        return sum(v.nbytes for v in self._values.values())

    def write(self, store: Path, pipeline: str = "zarr.core.codec_pipeline.BatchedCodecPipeline") -> None:
        """Create arrays with the same chunks, shards and compressor, and assign the values."""
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            root = zarr.create_group(store, zarr_format=3)
            for name, values in self._values.items():
                like = self._like[name]
                target = root.create_array(
                    name, shape=values.shape, dtype=values.dtype, chunks=like.chunks, shards=like.shards,
                    compressors=self._codecs[name], fill_value=np.nan,
                )  # fmt: skip
                target[:] = values


def _disk(found: list[dict[str, Any]], size: int, rival: str) -> dict[str, Any]:
    taken = {row["name"]: row["median_ms"] / 1e3 for row in found if "skipped" not in row}
    if TO_DISK not in taken or rival not in taken:
        return {}
    plain, ours = size / taken[rival], size / taken[TO_DISK]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rates = {"plain_zarr_bytes_per_s": plain, "trace_bytes_per_s": ours, "ratio": ours / plain}
    return {"bytes": size, "cores": cores, **rates}


def _plain(model: nn.Module, ids: Tensor, device: str) -> Callable[[], Any]:
    on_device = ids.to(device)

    def work() -> Any:
        with torch.no_grad():
            return model(on_device)

    return work


def _traced(
    model: nn.Module, ids: Tensor, window: int, backend: str, store: Path | None
) -> Callable[[], Any]:
    return lambda: trace(model, ids, window=window, backend=backend, store=store, progress=False)


def _clear(*stores: Path) -> None:
    """Remove what the last contestant wrote, and let the disk come to rest."""
    for store in stores:
        if store.exists():
            shutil.rmtree(store)
            os.sync()


def _draw_ids(model: nn.Module, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary(model), (1, tokens), generator=generator)


def _kernel(device: str) -> str:
    return "fused" if is_gpu(device) else "chunked"
