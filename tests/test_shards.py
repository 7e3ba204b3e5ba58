"""Shards put together by us are those of the format: zarr finds in them what it would have written."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from statescope import shards
from statescope.shards import COMPRESSOR, Shards, whole
from statescope.zipped import Files

SPECIAL = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], "f4")


def create(store: Any, shape: Any, chunks: Any, shard: Any, name: str = "x") -> zarr.Array[Any]:
    return zarr.create_array(
        store,
        name=name,
        shape=shape,
        dtype="f4",
        chunks=chunks,
        shards=shard,
        compressors=COMPRESSOR,
        fill_value=np.nan,
        config={"write_empty_chunks": True},
    )


def draw_values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), rng.standard_normal(shape, "f4"))


def content(store: Files, name: str) -> dict[str, bytes]:
    """Shards of an array by their keys."""
    found = store.files.items()
    return {key.removeprefix(name): b.to_bytes() for key, b in found if key.startswith(f"{name}/c")}


def chunks_of(shard: bytes, count: int) -> list[bytes | None]:
    """Take a shard apart, by the specification; chunks in the order of the index."""
    index = np.frombuffer(shard[-16 * count - 4 : -4], "<u8").reshape(count, 2)
    absent = np.iinfo("u8").max
    return [None if at == absent else shard[int(at) : int(at + size)] for at, size in index]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[range]]:
    """Shape, chunks and shards of an array, and a block of it made of whole shards."""
    shape, chunks, shard, spans = [], [], [], []
    for _ in range(draw(st.integers(1, 4))):
        chunk, per, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 14))
        width = chunk * per
        first = draw(st.integers(0, (size - 1) // width))
        last = draw(st.integers(first + 1, -(-size // width)))
        shape.append(size)
        chunks.append(chunk)
        shard.append(width)
        spans.append(range(first * width, min(last * width, size)))
    return tuple(shape), tuple(chunks), tuple(shard), spans


@settings(max_examples=60, deadline=None)
@given(cut=cuts(), seed=st.integers(0, 2**31))
def test_same_chunks_as_zarr(cut: Any, seed: int) -> None:
    """The same files with the same chunks in them, byte for byte, whatever the cut; zarr reads its values."""
    shape, chunks, shard, spans = cut
    store, values = Files(), draw_values(tuple(map(len, spans)), seed)
    ours, zarrs = (create(store, shape, chunks, shard, name) for name in ("ours", "zarrs"))
    assert whole(ours, spans)
    Shards().write(ours, spans, values)
    where = tuple(slice(s.start, s.stop) for s in spans)
    zarrs[where] = values
    np.testing.assert_array_equal(ours[...], zarrs[...])
    found, expected = content(store, "ours"), content(store, "zarrs")
    assert found.keys() == expected.keys() and found
    count = int(np.prod([s // c for s, c in zip(shard, chunks, strict=True)]))
    for key, data in found.items():
        assert len(data) == len(expected[key])
        assert chunks_of(data, count) == chunks_of(expected[key], count)


def test_parts_of_shards_are_not_whole() -> None:
    array = create(MemoryStore(), (2, 10), (1, 2), (1, 4))
    rows = range(2)
    assert all(
        whole(array, [rows, r]) for r in (range(10), range(0, 4), range(4, 8), range(4, 10), range(8, 10))
    )
    assert not any(whole(array, [rows, r]) for r in (range(0, 3), range(2, 4), range(1, 10), range(8, 9)))
    unsharded = zarr.create_array(MemoryStore(), shape=(4,), chunks=(4,), dtype="f4")
    assert not whole(unsharded, [range(4)])


@pytest.mark.parametrize("kind", ["folder", "memory", "files", "fsspec", "icechunk"])
def test_every_store(kind: str, tmp_path: Path) -> None:
    """Strided values, several shards, the edge of an array; on another store as on a disk."""
    folder = tmp_path / "x.zarr"
    kinds = {"folder": lambda: LocalStore(folder), "memory": MemoryStore, "files": Files}
    store: Any = kinds.get(kind, lambda: 0)()
    if kind == "fsspec":
        store = FsspecStore.from_url("memory://shards")
    elif kind == "icechunk":
        needs("icechunk")
        import icechunk

        icechunk.set_logs_filter("error")
        store = icechunk.Repository.create(icechunk.in_memory_storage()).writable_session("main").store
    array = create(store, (7, 50, 3), (1, 10, 3), (4, 20, 3))
    values = draw_values((3, 7, 50)).transpose(1, 2, 0)
    Shards().write(array, [range(7), range(50), range(3)], values)
    np.testing.assert_array_equal(zarr.open_group(store, mode="r")["x"][...], values)
    if kind == "folder":
        assert len([p for p in tmp_path.rglob("c/*/*/*") if p.is_file()]) == 6


def test_another_reader(tmp_path: Path) -> None:
    """An implementation in another language reads what zarr's reads."""
    needs("zarrs")
    values = draw_values((7, 50, 3))
    Shards().write(
        create(tmp_path, *((7, 50, 3), (1, 10, 3), (4, 20, 3))), [range(7), range(50), range(3)], values
    )
    with zarr.config.set({"codec_pipeline": {"path": "zarrs.ZarrsCodecPipeline", "strict": True}}):
        np.testing.assert_array_equal(zarr.open_array(tmp_path / "x", mode="r")[...], values)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, spans = create(tmp_path, (8,), (2,), (4,)), [range(8)]
    former = draw_values((8,))
    Shards().write(array, spans, former)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        Shards().write(array, spans, former + 1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_error_of_a_chunk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def encode(self, values: Any) -> bytes:
            raise MemoryError("of one chunk")

    monkeypatch.setattr(shards, "_BLOSC", Failing())
    with pytest.raises(MemoryError, match="of one chunk"):
        Shards().write(create(tmp_path, (8,), (2,), (4,)), [range(8)], draw_values((8,)))
    assert not [*tmp_path.rglob("c/*")]


def test_in_a_forked_process(tmp_path: Path) -> None:
    """A process that has written may fork, and both go on writing; nothing of zarr's settings is changed."""
    script = f"""
        import os, sys, warnings
        import numpy as np, zarr
        from statescope.shards import COMPRESSOR, Shards
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, from Python 3.12 on

        def write(name):
            array = zarr.create_array({str(tmp_path)!r}, name=name, shape=(64,), chunks=(4,), shards=(32,),
                                      dtype="f4", compressors=COMPRESSOR, fill_value=np.nan)
            Shards().write(array, [range(64)], np.arange(64, dtype="f4"))
            assert (array[:] == np.arange(64)).all()

        config = repr(zarr.config.config)
        write("before")
        child = os.fork()
        write("child" if child == 0 else "parent")
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and repr(zarr.config.config) == config
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], check=True, timeout=60)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"before", "child", "parent"}
