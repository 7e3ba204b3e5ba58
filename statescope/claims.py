"""Where a record is to go: what stands there, whether it may be replaced, whether it is to be continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from statescope.schema import SCHEMA_VERSION


def as_place(store: Any) -> Path | Store:
    """Turn what a user names as ``store`` into a folder, or a zarr store that is none."""
    if isinstance(store, Store):
        return store.root if isinstance(store, LocalStore) else store
    if not isinstance(store, str | Path):
        raise TypeError(f"store is a {type(store).__name__}; expected a folder or a zarr store")
    if not str(store) or "://" in str(store):
        raise ValueError(f"store={store!r} names no folder; name one, or pass an open zarr store")
    return Path(store)


def claim(store: Path | Store, fingerprint: Callable[[], str], overwrite: bool) -> zarr.Group | None:
    """Decide what to do with a place before anything is run.

    Parameters
    ----------
    store : Path or zarr store
        The place.
    fingerprint : callable
        Says what decides the numbers; it waits for the device, and is asked only where something is there.
    overwrite : bool
        Whether a record that is there may be replaced.

    Returns
    -------
    zarr.Group or None
        An interrupted record of the same request, to be continued; None if the place is free.

    Raises
    ------
    FileExistsError
        If something is there that must not be lost; says what it is and what to do.
    """
    if isinstance(store, Path) and store.is_file():
        raise FileExistsError(f"store={str(store)!r} is a file; name a folder that does not exist yet")
    try:
        root = zarr.open_group(store, mode="r+", zarr_format=3)
    except (FileNotFoundError, ValueError):  # nothing, or something else than a group
        root = None
    if root is None:
        if not _is_empty(store):
            raise FileExistsError(f"store={str(store)!r} holds files that are no record; name another place")
        return None
    attributes = dict(root.attrs)
    if "schema_version" not in attributes:
        raise FileExistsError(f"store={str(store)!r} is a Zarr group but no record; name another place")
    if overwrite:
        return None
    if attributes.get("complete"):
        raise FileExistsError(
            f"store={str(store)!r} holds a finished record; read it with statescope.open,"
            " name another place or pass overwrite=True"
        )
    if attributes.get("fingerprint") != fingerprint() or attributes["schema_version"] != SCHEMA_VERSION:
        raise FileExistsError(
            f"store={str(store)!r} holds an interrupted record of another model, text or choice of what to"
            " keep; repeat that call to finish it, name another place or pass overwrite=True"
        )
    return root


def _is_empty(store: Path | Store) -> bool:
    if isinstance(store, Path):
        return not store.exists() or not any(store.iterdir())
    return sync(store.is_empty(""))
