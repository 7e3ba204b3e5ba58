"""Work through a record block by block, so that a text of any length fits in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from statescope.schema import PER_STEP

Array = NDArray[Any]

Block = dict[str, Array]
"""Variables of ``/steps`` over a stretch of tokens, (sequence, layer, token, head), float64; and, (token,),
``last``: the last token of every entry, ``width``: how many tokens it stands for."""

BLOCK_NUMBERS = 2**20
"""Numbers of one variable that are worked on at once."""

Labels = Mapping[str, tuple[str, str]]
"""What a function gives, by name: long name and units."""


def group(record: xr.DataTree, name: str) -> xr.Dataset:
    """Return a group of a record, lazily.

    Raises
    ------
    TypeError, ValueError
        If ``record`` is no record, or has no such group; says how to get one.
    """
    if not isinstance(record, xr.DataTree):
        raise TypeError(f"record is a {type(record).__name__}; expected what statescope.open returns")
    if "collection" in record.attrs:
        raise ValueError(
            f"record is a collection of {record.attrs['texts']} texts; see analyses.by_text and corpus"
        )
    if name not in record.children:
        optional = name in ("snapshots", "probes")
        remedy = f"pass {name}= to statescope.trace" if optional else "open it with statescope.open"
        raise ValueError(f"record has no /{name}: {remedy}")
    return record[name].to_dataset()


def steps(record: xr.DataTree) -> xr.Dataset:
    """Return ``/steps``, with the extents of its entries as coordinates ``first`` and ``width``.

    Raises
    ------
    ValueError
        If there is no entry, or the first is missing: what runs along tokens must begin at the beginning.
    """
    found = group(record, "steps")
    last = found["token"].values
    if not last.size:
        raise ValueError("record has no tokens yet: nothing is committed")
    if last[0] + 1 != min(window(record), int(record.attrs["tokens"])):
        raise ValueError(f"record begins with the entry of token {last[0]}; expected all from the first on")
    return found.assign_coords(width=("token", np.diff(last, prepend=-1)))


def window(record: xr.DataTree) -> int:
    """Tokens of an entry of ``/steps``."""
    return int(json.loads(record.attrs["watch"])["window"])


def train_length(record: xr.DataTree, given: int | None = None) -> int:
    """Return the training length in tokens: the one that is given, else the record's own."""
    length = record.attrs.get("train_length") if given is None else given
    if length is None:
        raise ValueError("train_length is not in the record; pass it")
    if isinstance(length, bool) or int(length) != length or length < 1:
        raise ValueError(f"train_length={length!r}; expected a number of tokens, 1 or more")
    return int(length)


def state_shape(record: xr.DataTree, given: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return key and value size of a head's state: given, of the record's attributes, or of its snapshots."""
    group(record, "steps")
    if given is None and "state_shape" in record.attrs:
        given = tuple(record.attrs["state_shape"])
    if given is None and "snapshots" in record.children:
        sizes = record["snapshots"].sizes
        given = (sizes["key"], sizes["value"])
    if given is None:
        raise ValueError("state_shape is not in this record (an early one); pass (key, value)")
    key, value = (int(n) for n in given)
    return key, value


def caveat(record: xr.DataTree) -> str:
    """Say what measures of the decay leave out, by how this record's model forgets; nothing for Mamba-2."""
    kind = str(record.attrs.get("structure", ""))
    said = []
    for each, many in (("key", "keys"), ("entry", "entries")):
        if kind.startswith(f"decay per {each}"):
            said.append(f"The decay is the mean over a head's {many}, some of which keep for longer.")
    if "," in kind:
        said.append("Erasing is left out: memories may be gone sooner.")
    return " ".join(said)


def until(dataset: xr.Dataset, token: int) -> xr.Dataset:
    """Keep the entries that end before a token."""
    return dataset.isel(token=slice(0, int((dataset["token"].values < token).sum())))


def blocks(dataset: xr.Dataset, names: tuple[str, ...]) -> Iterator[Block]:
    """Load variables of ``/steps`` stretch by stretch, in order."""
    per_token = int(np.prod([n for d, n in dataset[names[0]].sizes.items() if d != "token"]))
    size = max(1, BLOCK_NUMBERS // max(1, per_token))
    stored = dict(zip(PER_STEP, dataset[names[0]].encoding.get("chunks") or (), strict=False)).get("token", 1)
    size = max(1, size // stored) * stored if size >= stored else size
    for start in range(0, dataset.sizes["token"], size):
        part = dataset[list(names)].isel(token=slice(start, start + size))
        block = {n: part[n].transpose(*PER_STEP).values.astype(np.float64) for n in names}
        yield block | {"last": part["token"].values, "width": part["width"].values}


def by_layer(dataset: xr.Dataset) -> Iterator[xr.Dataset]:
    """Take the layers one by one, each still with its dimension."""
    for i in range(dataset.sizes["layer"]):
        yield dataset.isel(layer=slice(i, i + 1))


def map_tokens(
    dataset: xr.Dataset,
    names: tuple[str, ...],
    function: Callable[[Block, Any], tuple[tuple[Array, ...], Any]],
    labels: Labels,
) -> xr.Dataset:
    """Apply a function to the blocks of ``/steps`` in order, handing on its carry.

    Parameters
    ----------
    dataset : Dataset
        What :func:`steps` returns.
    names : tuple of str
        Variables the function needs.
    function : callable
        ``function(block, carry)`` returns a tuple of arrays, (sequence, layer, token, head), and the carry
        for the next block; the first gets None.
    labels : mapping
        Names, long names and units of the arrays.

    Returns
    -------
    Dataset, (sequence, layer, token, head), float32
        Of dask arrays, nothing computed yet, if the variables are such; else of numpy arrays.
    """
    arrays = [dataset[n].transpose(*PER_STEP) for n in names]
    work = _lazily if any(x.chunks is not None for x in arrays) else _at_once
    results = work(dataset, names, function, len(labels))
    coords = {d: dataset[d] for d in PER_STEP}
    return xr.Dataset(
        {
            name: xr.DataArray(data, coords, PER_STEP, attrs={"long_name": long_name, "units": units})
            for (name, (long_name, units)), data in zip(labels.items(), results, strict=True)
        }
    )


def _at_once(dataset: xr.Dataset, names: tuple[str, ...], function: Any, outputs: int) -> list[Any]:
    shape = tuple(dataset.sizes[d] for d in PER_STEP)
    results = [np.empty(shape, np.float32) for _ in range(outputs)]
    for i, layer in enumerate(by_layer(dataset)):
        carry, start = None, 0
        for block in blocks(layer, names):
            parts, carry = function(block, carry)
            stop = start + len(block["last"])
            for result, part in zip(results, parts, strict=True):
                with np.errstate(over="ignore"):
                    result[:, i : i + 1, start:stop] = part
            start = stop
    return results


def _lazily(dataset: xr.Dataset, names: tuple[str, ...], function: Any, outputs: int) -> list[Any]:
    """Build the graph: one task a block, which waits for the carry of the block before."""
    dask, da = import_module("dask"), import_module("dask.array")
    variables = dataset[list(names)].transpose(*PER_STEP, ...).unify_chunks()
    sizes = [variables.chunksizes[d] for d in PER_STEP]
    stored = [variables[n].data.to_delayed() for n in names]
    stops = np.cumsum(sizes[2])
    task = dask.delayed(_one_block, nout=2, pure=False)
    results = [np.empty([len(s) for s in sizes], dtype=object) for _ in range(outputs)]
    for i, j, k in np.ndindex(len(sizes[0]), len(sizes[1]), len(sizes[3])):
        carry = None
        for t, stop in enumerate(stops):
            at = slice(stop - sizes[2][t], stop)
            extents = {n: dataset[n].values[at] for n in ("token", "width")}
            parts, carry = task(function, names, [x[i, j, t, k] for x in stored], extents, carry)
            shape = (sizes[0][i], sizes[1][j], sizes[2][t], sizes[3][k])
            for n, result in enumerate(results):
                result[i, j, t, k] = da.from_delayed(parts[n], shape, np.float32)
    return [da.block(result.tolist()) for result in results]


def _one_block(function: Any, names: tuple[str, ...], arrays: list[Any], extents: Any, carry: Any) -> Any:
    block = {n: np.asarray(x, np.float64) for n, x in zip(names, arrays, strict=True)}
    parts, carry = function(block | {"last": extents["token"], "width": extents["width"]}, carry)
    with np.errstate(over="ignore"):
        return tuple(p.astype(np.float32) for p in parts), carry
