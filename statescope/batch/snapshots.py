"""Versions of a collection: all records of a run in an Icechunk repository, each commit of which is a whole.

A record is put in its place at once, but a collection grows while a run lasts, and a text that changes
replaces its record. Who wants to name what was there at a time commits it: one commit holds every text that
was done, and stays readable as it was. Only what is new is copied. A commit for every text, by the workers,
would not do: each lists all arrays again, so that their sum grows with the square of the number of texts,
and Icechunk's storage on a local disk is not safe for commits at the same time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import ZipStore

from statescope.batch.collection import counts_of, rows_of
from statescope.batch.places import TEXTS, Dumps
from statescope.zipped import readable

BRANCH = "main"


def commit(dumps: str | Path, repository: Any) -> str:
    """Commit what is done to a repository; what is there already is not copied again.

    Parameters
    ----------
    dumps : str or Path
        Folder or URL of ``statescope batch``.
    repository : str, Path or icechunk.Repository
        A folder, or a repository on any storage that Icechunk has. It is created if need be.

    Returns
    -------
    str
        The snapshot's id: of a new one, or of the newest, if nothing has changed.

    Raises
    ------
    ValueError
        If Icechunk is not installed, or there is no finished text.
    """
    place, repo = Dumps.at(dumps), _repository(repository)
    texts, settings = rows_of(place)
    done = {t["place"].removesuffix(".zip"): t for t in texts if t["status"] == "done"}
    if not done:
        raise ValueError(f"dumps={place.url!r} has no finished text, so nothing to commit")
    session = repo.writable_session(BRANCH)
    root = zarr.open_group(session.store, mode="a", zarr_format=3)
    known = json.loads(str(root.attrs.get("texts", "[]")))
    if known == texts:
        return str(session.snapshot_id)
    former = {t["place"].removesuffix(".zip"): t["updated"] for t in known if t["status"] == "done"}
    new = {name: t for name, t in done.items() if former.get(name) != t["updated"]}
    for name in former.keys() - (done.keys() - new.keys()):
        del root[name]
    for name, text in new.items():
        sync(_copy(readable(place.address(f"{TEXTS}/{text['place']}")), session.store, name))
    root.update_attributes({"texts": json.dumps(texts), "settings": json.dumps(settings)})
    counts = {k: v for k, v in counts_of(dumps).items() if k != "reasons"}
    return str(session.commit(f"{len(new)} of {len(done)} texts are new", metadata=counts))


def installed() -> Any:
    """Return Icechunk.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        import icechunk
    except ModuleNotFoundError as error:
        raise ValueError("commit needs Icechunk: pip install 'statescope-ssm[icechunk]'") from error
    return icechunk


def _repository(given: Any) -> Any:
    icechunk = installed()
    if isinstance(given, icechunk.Repository):
        return given
    icechunk.set_logs_filter("error")  # it warns of concurrent commits, which nobody makes here
    return icechunk.Repository.open_or_create(icechunk.local_filesystem_storage(str(given)))


async def _copy(record: ZipStore, store: Any, name: str) -> None:
    """Copy a record as it is, compressed; what describes an array goes before its chunks."""
    await record._open()
    try:
        keys = [key async for key in record.list()]
        for key in sorted(keys, key=lambda k: (not k.endswith("zarr.json"), k.count("/"))):
            content = await record.get(key, default_buffer_prototype())
            assert content is not None
            await store.set(f"{name}/{key}", content)
    finally:
        record.close()
