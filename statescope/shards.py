"""Whole shards, compressed on all cores and put in place at once.

Zarr passes each chunk from thread to thread, by way of the one that all its work shares: where shards are
small, or Python is busy launching a model, that takes longer than to compress them. The pipeline of ``zarrs``
is fast, but writes files in place, where a kill leaves half of one; its errors are no ``OSError``; and in a
forked process it waits for ever. So a shard that is written whole is put together here, as the format has it:
the chunks, then where each begins and how long it is, then the CRC-32C of that. Whatever reads Zarr reads it.

Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from statescope.zipped import Files

COMPRESSOR = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
"""As it stands in the record."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_BLOSC = Blosc(cname=COMPRESSOR.cname.value, clevel=COMPRESSOR.clevel, shuffle=Blosc.BITSHUFFLE)
_ABSENT = 2**64 - 1


class Shards:
    """Writes whole shards; threads may share it."""

    def __init__(self) -> None:
        # Has no threads before a shard of several chunks is written, and none once this object is gone.
        self._pool = ThreadPoolExecutor(CORES, thread_name_prefix="statescope-shards")

    def write(self, array: zarr.Array[Any], spans: Sequence[range], values: NDArray[Any]) -> None:
        """Write a block that :func:`whole` says yes to.

        Parameters
        ----------
        array : zarr.Array
            Sharded, and compressed by :data:`COMPRESSOR`.
        spans : sequence of range
            Where the block goes, by dimension.
        values : array
            The block.

        Raises
        ------
        OSError
            If the store cannot be written; what was at that place is then as before.
        """
        assert array.shards is not None and values.shape == tuple(map(len, spans))
        values = values.astype(array.dtype, copy=False)
        grid = [range(s.start // n, -(-s.stop // n)) for s, n in zip(spans, array.shards, strict=True)]
        for place in product(*grid):
            first = [i * n - s.start for i, n, s in zip(place, array.shards, spans, strict=True)]
            part = values[tuple(slice(i, i + n) for i, n in zip(first, array.shards, strict=True))]
            _put(array, array.metadata.encode_chunk_key(place), self._encode(array, part))

    def _encode(self, array: zarr.Array[Any], values: NDArray[Any]) -> list[bytes]:
        """Return a shard in pieces. Chunks that lie outside the array are left out."""
        assert array.shards is not None
        places = [*product(*(range(-(-n // c)) for n, c in zip(values.shape, array.chunks, strict=True)))]

        def compressed(place: tuple[int, ...]) -> bytes:
            return _BLOSC.encode(_chunk(values, place, array.chunks, array.fill_value))

        found = [*(map if len(places) == 1 else self._pool.map)(compressed, places)]
        shape = [s // c for s, c in zip(array.shards, array.chunks, strict=True)]
        index = np.full((*shape, 2), _ABSENT, "u8")
        offset = 0
        for place, chunk in zip(places, found, strict=True):
            index[place] = offset, len(chunk)
            offset += len(chunk)
        where = index.tobytes()
        return [*found, where, google_crc32c.value(where).to_bytes(4, "little")]


def whole(array: zarr.Array[Any], spans: Sequence[range]) -> bool:
    """Say whether a block consists of whole shards, or of all that a shard has inside the array."""
    return array.shards is not None and all(
        s.start % n == 0 and (s.stop % n == 0 or s.stop == size)
        for s, n, size in zip(spans, array.shards, array.shape, strict=True)
    )


def _chunk(values: NDArray[Any], place: tuple[int, ...], shape: tuple[int, ...], fill: Any) -> NDArray[Any]:
    part = values[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, shape, strict=True))]
    if part.shape == shape:
        return np.ascontiguousarray(part)
    filled = np.full(shape, fill, values.dtype)
    filled[tuple(map(slice, part.shape))] = part
    return filled


def _put(array: zarr.Array[Any], key: str, pieces: Sequence[bytes]) -> None:
    place = array.store_path / key
    if type(place.store) is LocalStore:
        _put_file(place.store.root / place.path, pieces)
        return
    content = default_buffer_prototype().buffer.from_bytes(b"".join(pieces))
    if isinstance(place.store, Files) and not place.store.read_only:
        place.store.files[place.path] = content
    else:
        sync(place.set(content))


def _put_file(path: Path, pieces: Sequence[bytes]) -> None:
    """Write a file beside its place, then move it there: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with part.open("wb") as file:
            file.writelines(pieces)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
