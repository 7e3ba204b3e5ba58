"""What the tests share."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
