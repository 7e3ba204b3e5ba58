"""What the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

if not torch.cuda.is_available():  # before anything imports triton: kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(os.environ.get("STATESCOPE_SHARED", Path(__file__).parents[2] / "shared"))
"""Oracles, checkpoints and texts that are not part of the project."""

REQUIRE = os.environ.get("STATESCOPE_REQUIRE_ALL") == "1"
"""Turns skips for missing dependencies and data into failures."""


def skip(reason: str) -> None:
    """Skip, saying why; or fail where nothing may be missing."""
    if REQUIRE:
        pytest.fail(f"STATESCOPE_REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason, allow_module_level=True)


def needs(module: str) -> None:
    """Skip what follows where a module is not installed."""
    if find_spec(module) is None:
        skip(f"{module} is not installed")


torch.set_num_threads(1)  # tiny models gain nothing from threads, and lose much where cores are shared


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracles."""
    if not SHARED.is_dir():
        skip(f"{SHARED} is absent; set STATESCOPE_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def book(shared: Path) -> np.ndarray:
    """Book text as bytes, int64."""
    import tarfile

    path = shared / "data" / "corpus.tar.xz"
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and "heldout" in member.name:
                content = archive.extractfile(member).read()
                return np.frombuffer(content, dtype=np.uint8).astype(np.int64)[20_000:]
    raise FileNotFoundError(path)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny Mamba-2, where any model does."""
    from tiny import build

    return build("mamba2")


@pytest.fixture(scope="module")
def finished(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a finished record, to be copied."""
    from refusing import TEXT

    import statescope

    place = tmp_path_factory.mktemp("records") / "run.zarr"
    statescope.trace(model, TEXT, store=place, window=3, snapshots=5, probes=7)
    return place


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Run Dask in a thread of this process."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def batched(client: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Any]:
    """Batch a few texts, most of them shorter than a segment: where, of what, and the summary."""
    from batches import SETTINGS, texts, write

    from statescope.batch.command import batch

    folder = tmp_path_factory.mktemp("batch")
    rows = texts([1500, 300, 310, 290, 1, 2500, 305, 900])
    source = write(folder / "in.jsonl", rows)
    said: list[str] = []
    found = batch(source, folder / "dumps", SETTINGS, scheduler=client, say=said.append)
    assert said[0] == "texts: 8, of which 8 new, 0 changed"
    return folder / "dumps", rows, found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
