"""A record as one file: a Zarr store in a zip, written whole, read piece by piece, from a disk or a URL."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore, ZipStore

SUFFIX = ".zip"


class Files(MemoryStore):
    """A store in memory whose files are at hand: zarr itself gives and takes them by a turn of its thread.

    Parameters
    ----------
    store_dict : dict, optional
        Its files by name, which stay this very object.
    read_only : bool
        As of any store.
    """

    def __init__(
        self, store_dict: MutableMapping[str, Buffer] | None = None, *, read_only: bool = False
    ) -> None:
        self.files = {} if store_dict is None else store_dict
        super().__init__(self.files, read_only=read_only)


class RemoteZip(ZipStore):
    """A zip behind an fsspec URL; only what is asked for is fetched."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(Path(url.rsplit("/", 1)[-1]), mode="r")

    def _sync_open(self) -> None:
        from fsspec.core import url_to_fs

        self._lock = threading.RLock()
        # What describes the record stands at the end of the file: one request fetches all of it.
        files, path = url_to_fs(self.url)
        self._zf = zipfile.ZipFile(files.open(path, "rb", block_size=2**20))
        self._is_open = True

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteZip) and self.url == other.url

    __hash__ = object.__hash__


def readable(store: Any) -> Any:
    """Return the zarr store in a zip if that is what a place names, else the place as it is."""
    if not isinstance(store, str | Path) or not str(store).endswith(SUFFIX):
        return store
    if "://" in str(store):
        return RemoteZip(str(store))
    return ZipStore(Path(store), mode="r") if Path(store).is_file() else store


def pack(store: Files | Path, target: Path) -> int:
    """Put a store, in memory or a folder, into a zip; what describes it comes last.

    Returns
    -------
    int
        Bytes of the file, which is on the disk when this returns.
    """
    files: dict[str, Path | Buffer]
    if isinstance(store, Path):
        files = {p.relative_to(store).as_posix(): p for p in store.rglob("*") if p.is_file()}
    else:
        files = {**store.files}
    with target.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # what is in it is compressed
            for name in sorted(files, key=lambda n: (n.endswith("zarr.json"), n)):
                content = files[name]
                if isinstance(content, Buffer):
                    archive.writestr(name, content.to_bytes())
                else:
                    archive.write(content, name)
        file.flush()
        os.fsync(file.fileno())
    return target.stat().st_size
