"""Where a record cannot go, it does not go: what is there stays, and a full disk leaves an exact prefix."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import skip
from refusing import TEXT, listing, occupied, refused
from tiny import assert_identical, build, ids
from torch import nn
from zarr.storage import LocalStore, MemoryStore

import statescope
from statescope import layout


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount small file systems; they go away after the test."""
    mounted: list[Path] = []

    def make(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            skip("mounting a file system of its own is not allowed here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("file", ("is a file", "name a folder")),
        ("folder", ("no record", "name another place")),
        ("group", ("no record", "name another place")),
        ("array", ("no record", "name another place")),
        ("format 2", ("no record", "name another place")),
        ("broken", ("no record", "name another place")),
    ],
)
@pytest.mark.parametrize("form", [str, Path, LocalStore])
def test_foreign_place_kept(
    form: Any,
    kind: str,
    words: tuple[str, ...],
    overwrite: bool,
    model: nn.Module,
    finished: Path,
    tmp_path: Path,
) -> None:
    """What is no record is never written over, whatever overwrite says."""
    place = tmp_path / "run.zarr"
    occupied(kind, place, finished)
    before = listing(tmp_path)
    if kind == "file" and form is LocalStore:
        place = place.resolve()
        form = Path
    refused(
        lambda: statescope.trace(model, TEXT, store=form(place), overwrite=overwrite),
        FileExistsError,
        f"store='{place}'",
        *words,
    )
    assert listing(tmp_path) == before


def test_foreign_memory_store_kept(model: nn.Module) -> None:
    """A store in memory that holds something else is refused too."""
    place = MemoryStore()
    zarr.create_array(place, name="x", data=np.arange(3.0))
    refused(
        lambda: statescope.trace(model, TEXT, store=place, overwrite=True),
        FileExistsError,
        "store=",
        "no record",
    )
    np.testing.assert_array_equal(zarr.open_array(place, path="x")[:], np.arange(3.0))


@pytest.mark.parametrize(
    ("kind", "words"), [("finished", ("finished",)), ("newer", ("interrupted", "another"))]
)
def test_record_not_overwritten_unasked(
    kind: str, words: tuple[str, ...], model: nn.Module, finished: Path, tmp_path: Path
) -> None:
    """A record that is there stays, and the message says how to replace it."""
    place = tmp_path / "run.zarr"
    occupied(kind, place, finished)
    before = listing(tmp_path)
    refused(
        lambda: statescope.trace(model, TEXT, store=place),
        FileExistsError,
        "store=",
        "overwrite=True",
        *words,
    )
    assert listing(tmp_path) == before


def test_place_below_a_file(model: nn.Module, tmp_path: Path) -> None:
    """A path through a file is named as the store that cannot be written."""
    (tmp_path / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    place = tmp_path / "notes.txt" / "run.zarr"
    refused(
        lambda: statescope.trace(model, TEXT, store=place), NotADirectoryError, "store=", "choose a place"
    )
    assert listing(tmp_path) == before


def test_read_only_place(model: nn.Module, mount: Callable[..., Path]) -> None:
    """A read-only file system is named; records on it open, and are not resumed by accident."""
    place = mount("readonly", "size=4m")
    statescope.trace(model, TEXT, store=place / "done.zarr")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    before = listing(place)
    for overwrite in (False, True):
        refused(
            lambda overwrite=overwrite: statescope.trace(
                model, TEXT, store=place / "new" / "run.zarr", overwrite=overwrite
            ),
            OSError,
            "store=",
            os.strerror(errno.EROFS),
            "choose a place that can be written",
        )
    refused(
        lambda: statescope.trace(model, TEXT, store=place / "done.zarr", overwrite=True),
        OSError,
        "store=",
        "choose",
    )
    assert listing(place) == before
    assert statescope.open(place / "done.zarr").attrs["complete"]


def test_unwritable_system_folder(model: nn.Module) -> None:
    """A folder of the kernel's refuses even root."""
    if not Path("/proc/self").exists():
        skip("/proc is not mounted")
    with pytest.raises(OSError, match=re.escape("store='/proc/run.zarr' cannot be written")):
        statescope.trace(model, TEXT, store="/proc/run.zarr")


LONG = ids(2400)
SETTINGS: dict[str, Any] = {"segment": 200, "snapshots": [0, 1199, -1], "probes": 2100}


def test_full_disk(model: nn.Module, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk midway leaves an exact prefix; with more space the same call ends in the same record."""
    monkeypatch.setattr(layout, "SHARD_TOKENS", 200)
    whole = statescope.trace(model, LONG, **SETTINGS)
    place = mount("small", "size=600k") / "run.zarr"
    with pytest.raises(OSError, match=r"free some space; its first .* run the same call again") as caught:
        statescope.trace(model, LONG, store=place, **SETTINGS)
    assert caught.value.errno == errno.ENOSPC
    assert f"store='{place}'" in str(caught.value)
    assert not list(place.rglob("*.partial*")), "half a file is left"
    part = statescope.open(place)
    committed = part.attrs["committed"]
    assert 0 < committed < 2400
    assert f"first {committed} tokens" in str(caught.value)
    assert_prefix(part, whole, committed)
    subprocess.run(["mount", "-o", "remount,size=16m", str(place.parent)], check=True)
    assert_identical(statescope.trace(model, LONG, store=place, **SETTINGS), whole)


def assert_prefix(part: Any, whole: Any, committed: int) -> None:
    """Demand that what is committed equals the whole record bit for bit."""
    for group in ("tokens", "steps"):
        np.testing.assert_array_equal(part[group].token, np.arange(committed))
        expected = whole[group].to_dataset().isel(token=slice(0, committed)).load()
        assert part[group].to_dataset().load().identical(expected)


def test_full_disk_before_the_first_commit(model: nn.Module, mount: Callable[..., Path]) -> None:
    """Where not even the first commit fits, nothing is left to stand in the way."""
    place = mount("tiny", "size=160k") / "run.zarr"
    with pytest.raises(OSError, match=r"free some space$"):
        statescope.trace(model, LONG, store=place, **SETTINGS)
    assert listing(place.parent) == {}


def test_nothing_is_written_after_a_failure(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays are laid out side by side; where one fails, the others are not left to write on their own."""
    write = LocalStore.set

    async def slow(self: LocalStore, key: str, value: Any) -> None:
        if key.startswith("steps/log_decay"):
            raise OSError(errno.ENOSPC, "No space left on device")
        await asyncio.sleep(0.1)
        await write(self, key, value)

    monkeypatch.setattr(LocalStore, "set", slow)
    with pytest.raises(OSError, match=r"free some space$"):
        statescope.trace(model, TEXT, store=tmp_path / "run.zarr")
    time.sleep(0.5)
    assert listing(tmp_path) == {}


def test_file_size_limit(tmp_path: Path) -> None:
    """A limit on file sizes reads like a full disk: named, the prefix exact."""
    place = tmp_path / "run.zarr"
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import statescope
        from statescope import layout, store
        from tiny import build, ids

        layout.SHARD_TOKENS = 50
        commit = store.RecordWriter.commit

        def limited(self, tokens, carry, **attributes):
            commit(self, tokens, carry, **attributes)
            if tokens == 150:
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))

        store.RecordWriter.commit = limited
        try:
            statescope.trace(build("mamba2"), ids(400), store={str(place)!r}, segment=50)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print("refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout and "free some space; its first 150 tokens are safe" in done.stdout
    part = statescope.open(place)
    assert part.attrs["committed"] == 150
    assert_prefix(part, statescope.trace(build("mamba2"), ids(400), segment=50), 150)
