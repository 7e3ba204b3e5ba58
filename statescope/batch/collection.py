"""All records of a run as one labelled object, of which only what is asked for is read."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.abc.store import Store
from zarr.storage import StorePath

from statescope import record
from statescope.batch.manifest import Manifest
from statescope.batch.places import TEXTS, Dumps
from statescope.schema import COORDINATES
from statescope.zipped import readable

OF_ONE_TEXT = (
    "text_id",
    "text_sha256",
    "texts_together",
    "first_nonfinite",
    "created_at",
    "device",
    "segment",
)
"""Root attributes that a collection does not have."""

ENDS = {"snapshots": "position", "probes": "probe"}


def is_collection(place: Any) -> bool:
    """Whether a place holds what ``statescope batch`` wrote."""
    return isinstance(place, str | Path) and bool(str(place)) and bool(Dumps.at(place).manifests())


def open_collection(dumps: str | Path | Store, *, chunks: Any = None) -> xr.DataTree:
    """Open the finished records of ``statescope batch`` as one object, lazily.

    Its groups and variables are those of a record. Along ``sequence``, labelled by the ids, lie the texts, in
    the order of the inputs; after the end of a text there is NaN (of ``token_id``, -1), which takes no space.

    Parameters
    ----------
    dumps : str, Path or zarr store
        Folder or URL; or the store of an Icechunk session on what :func:`statescope.batch.snapshots.commit`
        committed.
    chunks : optional
        As for :func:`xarray.open_zarr`: None for numpy arrays read on access, ``{}`` for dask arrays.

    Returns
    -------
    xarray.DataTree
        With the coordinates ``length`` (tokens), ``mean_loss`` (nat) and the inputs' other columns. The root
        attributes ``failed`` and ``pending`` count the texts that are missing. In windows the last entry of a
        text may stand for fewer tokens than ``token`` says. ``/snapshots`` and ``/probes`` are labelled as
        they were asked for, so that -1 is each text's last token; left out if some were counted from the
        start and others from the end. For one text see :func:`statescope.analyses.text_of`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no manifest, or no text is done yet.
    """
    place = dumps if isinstance(dumps, Store) else Dumps.at(dumps)
    texts, settings, counts = _texts(place)
    if not texts:
        raise ValueError(f"dumps={_name(place)!r} has no finished text yet: {counts}")
    first = record.open(_address(place, texts[0]))
    window = int(json.loads(first.attrs["watch"])["window"])
    coordinates = _coordinates(texts)
    groups = {}
    for name in first.children:
        labels = _labels(first[name].to_dataset(), name, settings)
        if labels is None:
            continue
        groups[f"/{name}"] = _group(place, texts, name, first[name].to_dataset(), labels, window)
        groups[f"/{name}"] = groups[f"/{name}"].assign_coords(coordinates)
    if chunks is not None:
        groups = {name: group.chunk({"sequence": 1, **chunks}) for name, group in groups.items()}
    attributes = {k: v for k, v in first.attrs.items() if k not in OF_ONE_TEXT}
    longest = max(t["tokens"] for t in texts)
    attributes |= {"collection": _name(place), "texts": len(texts), "tokens": longest, "committed": longest}
    attributes.update(counts)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), **groups})


def counts_of(dumps: str | Path) -> dict[str, Any]:
    """Say what became of a run's texts: counts by status, tokens, bytes, and the reasons of what failed."""
    texts = rows_of(Dumps.at(dumps))[0]
    done = [t for t in texts if t["status"] == "done"]
    return {
        **{status: sum(t["status"] == status for t in texts) for status in ("done", "failed", "pending")},
        "tokens": sum(t["tokens"] for t in done),
        "bytes": sum(t["bytes"] for t in done),
        "reasons": {t["id"]: t["error"] for t in texts if t["status"] == "failed"},
    }


def rows_of(place: Dumps | Store) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read all manifests; of a text in several, the one that has it done counts, or the newest."""
    if isinstance(place, Store):
        attributes = zarr.open_group(place, mode="r").attrs
        return json.loads(str(attributes["texts"])), json.loads(str(attributes["settings"]))
    names = place.manifests()
    if not names:
        raise FileNotFoundError(
            f"dumps={place.url!r} has no manifest, so nothing that statescope batch wrote"
        )
    found: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="statescope-") as folder:
            copy = Path(folder) / name
            place.get(name, copy)
            with Manifest(copy) as manifest:
                mine = manifest.settings()
                different = [k for k in settings if settings[k] != mine.get(k, settings[k])]
                if different:
                    raise ValueError(f"dumps={place.url!r}: its manifests differ in {', '.join(different)}")
                settings |= mine
                for text in manifest.texts():
                    key = (text["status"] == "done", text["updated"])
                    known = found.get(text["id"])
                    if known is None or key > (known["status"] == "done", known["updated"]):
                        found[text["id"]] = text
    return sorted(found.values(), key=lambda t: (t["row"], t["id"])), settings


def _texts(place: Dumps | Store) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    rows, settings = rows_of(place)
    counts: dict[str, Any] = {
        status: sum(t["status"] == status for t in rows) for status in ("failed", "pending")
    }
    return [t for t in rows if t["status"] == "done"], settings, counts


class _Committed(StorePath):
    """A record in a repository."""

    def __hash__(self) -> int:
        return hash(self.path)


def _name(place: Dumps | Store) -> str:
    return str(place) if isinstance(place, Store) else place.url


def _address(place: Dumps | Store, text: dict[str, Any]) -> Any:
    if isinstance(place, Store):
        return _Committed(place, str(text["place"]).removesuffix(".zip"))
    return place.address(f"{TEXTS}/{text['place']}")


def _coordinates(texts: list[dict[str, Any]]) -> dict[str, Any]:
    length = np.array([t["tokens"] for t in texts], dtype=np.int64)
    loss = np.array([np.nan if t["loss"] is None else t["loss"] for t in texts])
    found: dict[str, Any] = {
        "sequence": ("sequence", np.array([t["id"] for t in texts]), {"long_name": "id of the text"}),
        "length": ("sequence", length, {"long_name": "length of the text", "units": "token"}),
        "mean_loss": ("sequence", loss, {"long_name": "mean loss", "units": "nat"}),
    }
    metadata = [json.loads(t["metadata"]) for t in texts]
    for name in dict.fromkeys(k for m in metadata for k in m):
        free = name if name not in {*COORDINATES, *found} else f"{name}_of_input"
        found[free] = ("sequence", _column([m.get(name) for m in metadata]))
    return found


def _column(values: list[Any]) -> NDArray[Any]:
    kinds = {type(v) for v in values}
    if kinds <= {int, float, type(None)}:
        numbers = np.array([np.nan if v is None else v for v in values], dtype=float)
        return numbers.astype(np.int64) if kinds == {int} and bool((abs(numbers) < 2**53).all()) else numbers
    return np.array(values) if kinds == {bool} else np.array(["" if v is None else str(v) for v in values])


def _labels(first: xr.Dataset, name: str, settings: dict[str, Any]) -> list[int] | None:
    """Positions as they were asked for; None if they do not lie in one order in all texts."""
    if name not in ENDS:
        return []
    asked = sorted(set(settings[name]))
    in_order = min(asked) >= 0 or max(asked) < 0
    return asked if in_order and len(asked) == first.sizes[ENDS[name]] else None


def _group(
    place: Dumps | Store,
    texts: list[dict[str, Any]],
    name: str,
    first: xr.Dataset,
    labels: list[int],
    window: int,
) -> xr.Dataset:
    width = window if name == "steps" else 1
    entries = np.array([-(-t["tokens"] // width) for t in texts])
    sources = tuple((_address(place, t), float(t["updated"])) for t in texts)
    variables = {}
    for variable, like in first.data_vars.items():
        path = f"{name}/{variable}"
        data = indexing.LazilyIndexedArray(_Ragged(sources, entries, path, like))
        variables[variable] = xr.Variable(like.dims, data, like.attrs)
    coords = {d: first[d] for d in first.dims if d in ("layer", "head", "key", "value")}
    if "token" in first.dims:
        last = np.arange(1, entries.max() + 1) * width - 1
        coords["token"] = xr.DataArray(last, dims="token", attrs=first["token"].attrs)
    if labels:
        dim = ENDS[name]
        coords[dim] = xr.DataArray(np.array(labels), dims=dim, attrs=first[dim].attrs)
    return xr.Dataset(variables, coords)


@lru_cache(maxsize=32)
def _opened(address: Any, updated: float) -> zarr.Group:
    return zarr.open_group(readable(address), mode="r")


class _Ragged(BackendArray):
    """One variable of all texts: as long as the longest, filled up after the end of the others."""

    def __init__(
        self, sources: tuple[tuple[Any, float], ...], entries: NDArray[Any], path: str, like: xr.DataArray
    ) -> None:
        self._sources, self._entries, self._path = sources, entries, path
        self._token = like.dims.index("token") if "token" in like.dims else None
        self.dtype = like.dtype
        shape = [len(sources), *like.shape[1:]]
        if self._token is not None:
            shape[self._token] = int(entries.max())
        self.shape = tuple(shape)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._take)

    def _take(self, key: tuple[Any, ...]) -> NDArray[Any]:
        wanted = [np.atleast_1d(np.arange(n)[k]) for n, k in zip(self.shape, key, strict=True)]
        fill = np.nan if self.dtype.kind == "f" else -1
        found = np.full([len(w) for w in wanted], fill, self.dtype)
        for row, sequence in zip(found, wanted[0], strict=True):
            chosen, inside = list(wanted[1:]), [slice(None)] * row.ndim
            if self._token is not None:
                axis = self._token - 1
                there = chosen[axis] < self._entries[sequence]
                chosen[axis], inside[axis] = chosen[axis][there], there
            if all(len(c) for c in chosen):
                array: Any = _opened(*self._sources[sequence])[self._path]
                row[tuple(inside)] = array.oindex[(0, *map(_as_slice, chosen))]
        return found[tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key)]


def _as_slice(wanted: NDArray[Any]) -> Any:
    """Neighbours as a slice, which is read faster."""
    run = bool((np.diff(wanted) == 1).all())
    return slice(int(wanted[0]), int(wanted[-1]) + 1) if run else wanted
