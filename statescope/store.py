"""The record on disk: laid out whole at the start, filled in shard by shard, committed marker last.

A record is a Zarr group (format 3). Every write is a whole shard, except at the end of the text, so a
shard is written once; then what a resumed run needs to go on (the *carry*); then the root attribute
``committed``. A process killed at any instant leaves a record that opens and whose committed prefix is
exact. A shard holds all sequences and as many layers as fit over a stretch of tokens: few enough files for
a million tokens, and a shard can be written as soon as its layers are read.
"""

from __future__ import annotations

import errno
import shutil
from asyncio import gather
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.api.asynchronous import create_group
from zarr.core.sync import sync

from statescope.layout import SHARD_BYTES, Layout
from statescope.schema import COORDINATES, Variable
from statescope.shards import COMPRESSOR, Shards, whole

StoreLike = str | Path | Store

CARRY = "carry"


class RecordWriter:
    """Fills a record in; see the module's docstring for the order of writes."""

    def __init__(
        self, store: StoreLike, root: zarr.Group, layout: Layout, former: Path | None = None
    ) -> None:
        self._store, self._root, self.layout = store, root, layout
        self._former = former
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._shards = Shards()

    @classmethod
    def create(
        cls,
        store: StoreLike,
        layout: Layout,
        attributes: Mapping[str, Any],
        token_id: NDArray[np.int64],
    ) -> RecordWriter:
        """Lay a record out; on a file system it appears whole or not at all.

        Whatever record was at that place is replaced (:func:`statescope.claims.claim` has decided that it may
        be), but removed only at the first commit: until then :meth:`discard_if_empty` puts it back.

        Raises
        ------
        OSError
            If the place cannot be written; names ``store``.
        """
        start = {**attributes, "committed": 0, "complete": False}
        known = {"tokens/token_id": token_id}
        if not isinstance(store, str | Path):
            laid_out, _ = sync(_lay_out(store, layout, start, known, CARRY, overwrite=True))
            return cls(store, zarr.Group(laid_out), layout)
        place = Path(store).resolve()
        draft, former = _beside(place)
        with _named_errors(store):
            _remove(draft, former)
            try:
                sync(_lay_out(draft, layout, start, known, CARRY))
                replaces = place.exists()
                if replaces:
                    place.rename(former)
                draft.rename(place)
            finally:
                _remove(draft)
        root = zarr.open_group(store, mode="r+")
        return cls(store, root, layout, former if replaces else None)

    @classmethod
    def resume(cls, store: StoreLike, root: zarr.Group, layout: Layout) -> RecordWriter:
        """Go on with an interrupted record, which :func:`statescope.claims.claim` has found."""
        if isinstance(store, str | Path):
            _remove(*_beside(Path(store).resolve()))
        return cls(store, root, layout)

    def write(self, name: str, values: NDArray[Any], **at: slice) -> None:
        """Write a block of one variable: whole shards by :mod:`statescope.shards`, parts of them by zarr.

        Parameters
        ----------
        name : str
            ``group/variable``.
        values : array
            The block.
        **at : slice
            Where it goes, by dimension; dimensions not named are written whole.
        """
        group, variable = name.split("/")
        dims = self.layout.variables(group)[variable].dims
        with _named_errors(self._store, self.committed):
            array = self._array(name)
            where = tuple(at.get(d, slice(None)) for d in dims)
            spans = [range(*s.indices(n)) for s, n in zip(where, array.shape, strict=True)]
            if whole(array, spans):
                self._shards.write(array, spans, values)
            else:
                array[where] = values

    @property
    def committed(self) -> int:
        """Tokens safely written."""
        return int(self._root.attrs["committed"])  # type: ignore[arg-type]

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes."""
        return dict(self._root.attrs)

    def commit(self, tokens: int, carry: bytes | None, **attributes: Any) -> None:
        """Declare tokens safely written.

        Parameters
        ----------
        tokens : int
            How many, from the start of the text.
        carry : bytes or None
            What a resumed run needs to go on; None completes the record.
        **attributes
            Root attributes that change with this commit.
        """
        with _named_errors(self._store, self.committed):
            keep = f"at_{tokens}"
            if carry is not None:
                data = np.frombuffer(carry, dtype=np.uint8)
                chunk = (min(max(1, data.size), SHARD_BYTES),)
                self._root.create_array(
                    f"{CARRY}/{keep}", data=data, chunks=chunk, compressors=None, overwrite=True
                )
            self._root.update_attributes({**attributes, "committed": tokens, "complete": carry is None})
            if self._former is not None:
                _remove(self._former)
                self._former = None
            if carry is None:
                del self._root[CARRY]
            else:
                self._forget_carry_but(keep)

    def discard_if_empty(self) -> None:
        """Remove a record in which nothing is committed yet, and put back the one it was to replace."""
        if isinstance(self._store, str | Path) and self.committed == 0:
            shutil.rmtree(self._store, ignore_errors=True)
            if self._former is not None:
                self._former.rename(Path(self._store).resolve())

    def read_carry(self) -> bytes | None:
        """Return what was kept at the last commit; None if nothing is committed yet."""
        if self.committed == 0:
            return None
        return np.asarray(self._array(f"{CARRY}/at_{self.committed}")[:]).tobytes()

    def _forget_carry_but(self, keep: str) -> None:
        group = self._root[CARRY]
        assert isinstance(group, zarr.Group)
        for name in [n for n in group.array_keys() if n != keep]:
            del group[name]

    def _array(self, name: str) -> zarr.Array[Any]:
        if name.startswith(CARRY) or name not in self._arrays:
            array = self._root[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]


def write_whole(
    store: Store, layout: Layout, attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write a record that is known whole, for a store that nobody else sees yet.

    It is what :class:`RecordWriter` leaves, and takes at most a third of the time: all arrays are laid out
    side by side, then filled as they come from there, without a turn of zarr's thread for every chunk.

    Parameters
    ----------
    store : zarr store
        Where to write, such as a store in memory.
    layout : Layout
        The shape of the record.
    attributes : mapping
        Root attributes, ``first_nonfinite`` included.
    arrays : mapping
        Every variable, by ``group/variable``.
    """
    end = {**attributes, "committed": layout.tokens, "complete": True}
    (_, laid_out), shards = sync(_lay_out(store, layout, end, {}, overwrite=True)), Shards()
    for name, values in arrays.items():
        array = zarr.Array(laid_out[name])
        shards.write(array, [range(n) for n in array.shape], values)


def _beside(place: Path) -> tuple[Path, Path]:
    """Where a record is laid out before it appears, and where the one it replaces waits to be removed."""
    return place.with_name(f".{place.name}.draft"), place.with_name(f".{place.name}.former")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


async def _lay_out(
    store: StoreLike,
    layout: Layout,
    attributes: Mapping[str, Any],
    known: Mapping[str, NDArray[Any]],
    *more: str,
    overwrite: bool = False,
) -> tuple[zarr.AsyncGroup, dict[str, zarr.AsyncArray[Any]]]:
    """Create all groups, arrays and what is known of them side by side: in turn takes twice as long."""
    root = await create_group(store=store, zarr_format=3, overwrite=overwrite, attributes=dict(attributes))
    laid_out = _all(*(_lay_out_group(root, name, layout, known) for name in layout.groups()))
    groups, _ = await _all(laid_out, _all(*(root.create_group(name) for name in more)))
    return root, {name: array for group in groups for name, array in group.items()}


async def _all(*work: Awaitable[Any]) -> list[Any]:
    """Do work side by side, to its end even if some of it fails, or it would write into a removed draft."""
    results = await gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def _lay_out_group(
    root: zarr.AsyncGroup, group: str, layout: Layout, known: Mapping[str, NDArray[Any]]
) -> dict[str, zarr.AsyncArray[Any]]:
    """Return the variables by ``group/variable``."""
    target = await root.create_group(group)
    variables = layout.variables(group)
    values = {d: layout.coordinate(group, d) for v in variables.values() for d in v.dims}
    coordinates = [_create(target, d, COORDINATES[d], v.shape, v.shape, None, v) for d, v in values.items()]
    arrays = []
    for name, variable in variables.items():
        shape = tuple(layout.size(group, d) for d in variable.dims)
        given = known.get(f"{group}/{name}")
        arrays.append(_create(target, name, variable, shape, *layout.shards(group, variable), given))
    found = await _all(*arrays, *coordinates)
    return dict(zip((f"{group}/{name}" for name in variables), found, strict=False))


async def _create(
    group: zarr.AsyncGroup,
    name: str,
    variable: Variable,
    shape: Sequence[int],
    chunks: Sequence[int],
    shards: Sequence[int] | None,
    values: NDArray[Any] | None,
) -> zarr.AsyncArray[Any]:
    array = await group.create_array(
        name,
        shape=tuple(shape),
        dtype=variable.dtype,
        chunks=tuple(max(1, c) for c in chunks),
        shards=None if shards is None else tuple(shards),
        compressors=COMPRESSOR,
        fill_value=np.nan if variable.dtype.startswith("float") else 0,
        dimension_names=variable.dims,
        attributes={"long_name": variable.long_name, "units": variable.units},
        config={"write_empty_chunks": True},  # to look for them costs more than to write them
    )
    if values is not None:
        await array.setitem(slice(None), values)
    return array


@contextmanager
def _named_errors(store: StoreLike, committed: int | None = None) -> Iterator[None]:
    """Say which argument an operating-system error is about, and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "choose a place that can be written"
        if committed:
            remedy += f"; its first {committed} tokens are safe: run the same call again to go on from there"
        raise OSError(
            error.errno, f"store={str(store)!r} cannot be written ({error.strerror}): {remedy}"
        ) from error
