"""A record that lacks something says what; what is no record does not open as one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusing import change_root, listing, occupied, refused

import statescope

DAMAGE: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    ("newer", lambda p: change_root(p, schema_version=99), ("schema_version 99", "upgrade")),
    ("version as text", lambda p: change_root(p, schema_version="1"), ("schema_version",)),
    ("no version", lambda p: change_root(p, schema_version=...), ("no record", "schema_version is missing")),
    ("no watch", lambda p: change_root(p, watch=...), ("lacks the root attributes watch", "damaged")),
    ("no root", lambda p: (p / "zarr.json").unlink(), ("no Zarr group",)),
    ("half a root", lambda p: (p / "zarr.json").write_text('{"zarr'), ("no Zarr group",)),
    ("no group", lambda p: shutil.rmtree(p / "steps"), ("lacks steps/", "damaged", "again")),
    ("no group to watch", lambda p: shutil.rmtree(p / "probes"), ("lacks probes/", "damaged", "again")),
    ("group unnamed", lambda p: (p / "steps/zarr.json").unlink(), ("lacks steps/", "damaged", "again")),
    ("no array", lambda p: shutil.rmtree(p / "steps/state_norm"), ("lacks steps/state_norm", "again")),
    ("array unnamed", lambda p: (p / "steps/state_norm/zarr.json").unlink(), ("lacks steps/state_norm",)),
    (
        "half an array",
        lambda p: (p / "steps/state_norm/zarr.json").write_text("{"),
        ("lacks steps/state_norm",),
    ),
    ("no maximum", lambda p: shutil.rmtree(p / "steps/state_norm_max"), ("lacks steps/state_norm_max",)),
    ("no coordinate", lambda p: (p / "steps/token/zarr.json").unlink(), ("lacks steps/token", "damaged")),
    ("no snapshot", lambda p: shutil.rmtree(p / "snapshots/state"), ("lacks snapshots/state", "damaged")),
]


@pytest.mark.parametrize(("damage", "words"), [c[1:] for c in DAMAGE], ids=[c[0] for c in DAMAGE])
def test_damaged_record(
    damage: Callable[[Path], Any], words: tuple[str, ...], finished: Path, tmp_path: Path
) -> None:
    """A record that lacks something says what, and is not changed by the attempt."""
    place = tmp_path / "run.zarr"
    shutil.copytree(finished, place)
    damage(place)
    before = listing(tmp_path)
    refused(lambda: statescope.open(place), ValueError, f"store='{place}'", *words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "group", "array", "format 2"])
def test_open_foreign(kind: str, finished: Path, tmp_path: Path) -> None:
    """What is no record does not open as one."""
    place = tmp_path / "run.zarr"
    occupied(kind, place, finished)
    before = listing(tmp_path)
    refused(lambda: statescope.open(place), ValueError, f"store='{place}'", "no record")
    assert listing(tmp_path) == before


def test_open_nothing(tmp_path: Path) -> None:
    """A path that does not exist is named, and not made."""
    place = tmp_path / "nothing.zarr"
    refused(lambda: statescope.open(place), FileNotFoundError, f"store='{place}'", "does not exist")
    assert not place.exists()
