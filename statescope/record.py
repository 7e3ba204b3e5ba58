"""Open a record: validate it, trim it to what is committed, hand it out lazily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xarray as xr
import zarr

from statescope.schema import (
    COORDINATES,
    ERASED,
    GROUPS,
    READ_BY_QUERY,
    ROOT_ATTRIBUTES,
    SCHEMA_VERSION,
    Variable,
    group_variables,
)
from statescope.zipped import readable

REQUIRED = ("tokens", "steps")

DAMAGED = "it is damaged: trace the text again"


def open(store: Any, *, chunks: Any = None) -> xr.DataTree:
    """Open a record lazily, trimmed to what was safely written.

    Parameters
    ----------
    store : str, Path or zarr store
        What ``trace`` wrote, or one file of what ``statescope batch`` wrote.
    chunks : optional
        As for :func:`xarray.open_zarr`: None for numpy arrays read on access, ``{}`` for dask arrays.

    Returns
    -------
    xarray.DataTree
        Groups ``/tokens``, ``/steps`` and, where they were asked for, ``/snapshots`` and ``/probes``. An
        interrupted record has fewer tokens than its root attribute ``tokens`` says.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is no record, a newer one, or a damaged one; says what is missing.
    """
    store = readable(store)
    attributes: dict[str, Any] = dict(_validated(store).attrs)
    return assemble(open_groups(store, chunks=chunks), attributes)


def open_groups(store: Any, *, chunks: Any = None) -> dict[str, xr.Dataset]:
    """Open the groups of a record as they are laid out, written or not; see :func:`open`."""
    root = _validated(store)
    watch = json.loads(str(root.attrs["watch"]))
    datasets = {}
    for name in [g for g in GROUPS if g in REQUIRED or watch[g]]:
        variables = _expected(root, name, watch["window"])
        _check_group(root, name, variables, store)
        dataset = xr.open_zarr(store, group=name, consolidated=False, chunks=chunks)
        datasets[name] = dataset[list(variables)]
    return datasets


def assemble(groups: dict[str, xr.Dataset], attributes: dict[str, Any]) -> xr.DataTree:
    """Join groups to a record, trimmed to what is committed."""
    committed = int(attributes["committed"])
    trimmed = {f"/{name}": _trim(dataset, committed) for name, dataset in groups.items()}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attributes), **trimmed})


def _validated(store: Any) -> zarr.Group:
    if isinstance(store, str | Path) and not Path(store).exists() and "://" not in str(store):
        raise FileNotFoundError(f"store={str(store)!r} does not exist")
    try:
        root = zarr.open_group(store, mode="r", zarr_format=3)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ValueError(f"store={str(store)!r} is no Zarr group, so no record") from error
    attributes = dict(root.attrs)
    version = attributes.get("schema_version")
    if version is None:
        raise ValueError(f"store={str(store)!r} is a Zarr group but no record: schema_version is missing")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"store={str(store)!r} has schema_version {version}; this statescope reads up to"
            f" {SCHEMA_VERSION}: upgrade it"
        )
    missing = [name for name in ROOT_ATTRIBUTES if name not in attributes]
    if missing:
        raise ValueError(f"store={str(store)!r} lacks the root attributes {', '.join(missing)}; {DAMAGED}")
    return root


def _expected(root: zarr.Group, group: str, window: int) -> dict[str, Variable]:
    """Variables a group must have: those that came later all together, or none of them."""
    variables = group_variables(group, window, erases=True)
    for later in (READ_BY_QUERY, tuple(ERASED)):
        added = [name for name in later if name in variables]
        if not any(f"{group}/{name}" in root for name in added):
            variables = {name: v for name, v in variables.items() if name not in added}
    return variables


def _check_group(root: zarr.Group, group: str, variables: dict[str, Variable], store: Any) -> None:
    """Demand every array of a group: xarray leaves out what it does not find."""
    wanted = variables | {d: COORDINATES[d] for v in variables.values() for d in v.dims}
    try:
        found: Any = root[group]
    except (KeyError, ValueError):
        found = {}  # which lacks all that is wanted
    for name, variable in wanted.items():
        try:
            array = found[name]
        except (KeyError, ValueError) as error:
            raise ValueError(f"store={str(store)!r} lacks {group}/{name}; {DAMAGED}") from error
        dims = getattr(array.metadata, "dimension_names", None)
        if dims != variable.dims:
            raise ValueError(
                f"store={str(store)!r} has {group}/{name} with dimensions {dims}; expected {variable.dims}"
            )


def _trim(dataset: xr.Dataset, committed: int) -> xr.Dataset:
    """Drop everything about tokens that were not safely written."""
    for dim in ("token", "position", "probe"):
        if (
            dim in dataset.dims
            and (kept := int((dataset[dim].values < committed).sum())) < dataset.sizes[dim]
        ):
            dataset = dataset.isel({dim: slice(0, kept)})
    return dataset
