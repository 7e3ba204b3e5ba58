"""The table of training runs as arrays: recall and loss by position and lag, states, passkeys.

A row of the table is one run at one step: its settings, what it recalled ``inside`` its training length
and far ``beyond``, the measures of its states. :mod:`statescope.experiments.training_length` writes it.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

FORMAT, FORMAT_VERSION = "statescope_runs", 1
"""Name and value that open a table of runs."""

SETTINGS = ("state_size", "train_length", "seed", "steps", "learning_rate", "uniform", "stream")
"""Settings that become coordinates of every run."""

RECENT, FAR = 4, 8192
"""Lags below are recent (pairs); positions from here on are far beyond (tokens)."""

Row = dict[str, Any]


def read_lines(path: Path) -> tuple[list[Row], int]:
    """Read a table, as it is or packed (``.xz``).

    Returns its rows, and the bytes of its whole lines (a kill can leave half a line).

    Raises
    ------
    ValueError
        If the file is something else, or damaged; says where.
    """
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    whole = data.rfind(b"\n") + 1
    rows: list[Row] = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no table of runs, or damaged in line {number}: {error}") from error
    if rows and rows[0].get(FORMAT) != FORMAT_VERSION:
        raise ValueError(f"{path} is no table of runs (format {FORMAT_VERSION}); name another file")
    if not rows and not f'{{"{FORMAT}'.encode().startswith(data[:9]):
        raise ValueError(f"{path} is no table of runs (format {FORMAT_VERSION}); name another file")
    return rows[1:], whole


def read_runs(*paths: str | Path) -> xr.Dataset:
    """Open tables of runs, finished or not.

    Parameters
    ----------
    *paths : str or Path
        What ``statescope sweep`` wrote; rows of several tables are joined.

    Returns
    -------
    Dataset, (run, ...)
        See :func:`tabulate`.

    Raises
    ------
    ValueError
        If there are no rows, or a file is something else.
    """
    rows = [row for path in paths for row in read_lines(Path(path))[0]]
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))} holds no runs yet")
    return tabulate(rows)


def tabulate(rows: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    """Arrange the rows of one or more tables.

    Returns
    -------
    Dataset
        By ``run`` (with the coordinates ``name``, ``step``, ``state_numbers`` and the settings) and by first
        token of the bin of ``position`` and first pair of the bin of ``lag``: ``asked``, ``right`` and
        ``loss`` (summed, nat), with ``part`` "inside" or "beyond"; and by ``layer`` and ``head`` the states'
        measures, ``inside_...`` and ``beyond_...``; where passkeys were asked their share recalled,
        ``passkeys``, by ``length`` and ``depth``. Rows may differ in sizes; what one has not is NaN.
    """
    positions = sorted({p for row in rows for part in ("inside", "beyond") for p in row[part]["position"]})
    lags = sorted({g for row in rows for part in ("inside", "beyond") for g in row[part]["lag"]})
    counts = {
        name: np.zeros((len(rows), 2, len(positions), len(lags))) for name in ("asked", "right", "loss")
    }
    for i, row in enumerate(rows):
        for j, part in enumerate(("inside", "beyond")):
            at = np.ix_(
                np.searchsorted(positions, row[part]["position"]), np.searchsorted(lags, row[part]["lag"])
            )
            for name, values in counts.items():
                values[i, j][at] = row[part][name]
    dims = ("run", "part", "position", "lag")
    labels = {
        "asked": ("answers asked for", "1"),
        "right": ("answers right", "1"),
        "loss": ("summed loss", "nat"),
    }
    coords: dict[str, Any] = {"part": ["inside", "beyond"], "position": positions, "lag": lags}
    for name in SETTINGS:
        coords[name] = ("run", [row["config"][name] for row in rows])
    for name in ("run", "step", "state_numbers", "entries"):
        coords["name" if name == "run" else name] = ("run", [row[name] for row in rows])
    table = xr.Dataset(
        {n: (dims, v, dict(zip(("long_name", "units"), labels[n], strict=True))) for n, v in counts.items()},
        coords,
    )
    return table.assign(_states(rows) | _passkeys(rows))


def _passkeys(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of passkeys recalled, by prompt length and depth; NaN where none was asked."""
    given = [row.get("passkeys") for row in rows]
    known = [g for g in given if g]
    if not known:
        return {}
    lengths, depths = (sorted({v for g in known for v in g[name]}) for name in ("length", "depth"))
    out = np.full((len(rows), len(lengths), len(depths)), np.nan)
    for i, g in enumerate(given):
        if g:
            at = np.ix_(np.searchsorted(lengths, g["length"]), np.searchsorted(depths, g["depth"]))
            out[i][at] = np.array(g["right"]) / g["trials"]
    return {
        "passkeys": xr.DataArray(
            out,
            {"length": lengths, "depth": depths},
            ("run", "length", "depth"),
            attrs={"long_name": "passkeys recalled", "units": "1"},
        )
    }


def _states(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    given = [row.get("states") or {} for row in rows]
    names = sorted({(part, n) for g in given for part in ("inside", "beyond") for n in g.get(part, {})})
    found: dict[str, Any] = {}
    for part, name in names:
        values = [np.array(g[part][name]) if name in g.get(part, {}) else np.empty((0, 0)) for g in given]
        size = tuple(max(v.shape[axis] for v in values) for axis in (0, 1))
        out: NDArray[Any] = np.full((len(rows), *size), np.nan)
        for i, v in enumerate(values):
            out[i, : v.shape[0], : v.shape[1]] = v
        found[f"{part}_{name}"] = (
            ("run", "layer", "head"),
            out,
            {"long_name": f"{name}, {part}", "units": "1"},
        )
    return found


def farthest(table: xr.Dataset) -> int:
    """First token of the last bin of positions beyond the training length at which anything was asked."""
    asked = table["asked"].sel(part="beyond").sum(("run", "lag"))
    known = table["position"].values[(asked > 0).values]
    if not known.size:
        raise ValueError("table was asked nothing beyond its training lengths")
    return int(known[-1])


def final(table: xr.Dataset) -> xr.Dataset:
    """Leave out what was measured before the last step of a run."""
    return table.isel(run=(table["step"] == table["steps"]).values)


def recall(table: xr.Dataset, far: int = FAR) -> xr.Dataset:
    """Share of answers that are right, by lag, within the training length and far beyond it.

    Parameters
    ----------
    table : Dataset
        Runs.
    far : int
        Tokens from which on positions count as far beyond; a bin's beginning.

    Returns
    -------
    Dataset, (run, lag)
        ``inside`` and ``far``; NaN where nothing was asked.
    """
    beyond = _part(table, "beyond").isel(position=(table["position"] >= far).values)
    if not (beyond["asked"] > 0).any():
        longest = int(table["position"][-1])
        raise ValueError(f"far={far}, but the last bin of positions begins at {longest}; name that or less")
    parts = {"inside": _part(table, "inside"), "far": beyond}
    return xr.Dataset({name: _share(part.sum("position"), f"recall, {name}") for name, part in parts.items()})


def recall_by_position(table: xr.Dataset, recent: int = RECENT) -> xr.Dataset:
    """Recall and loss of recent pairs by position, far beyond the training length.

    Parameters
    ----------
    table : Dataset
        Runs.
    recent : int
        Lags below count, in pairs; a bin's beginning. Of text everything counts.

    Returns
    -------
    Dataset, (run, position)
        ``recall``, ``loss`` (mean, nat) and ``asked``; ``position`` is the first token of a bin, and the
        next one's that of the next bin.
    """
    counted = _part(table, "beyond").isel(lag=(table["lag"] < recent).values).sum("lag")
    loss = counted["loss"] / counted["asked"].where(counted["asked"] > 0)
    found = {"recall": _share(counted, "recall of recent pairs"), "asked": counted["asked"]}
    return xr.Dataset(
        {**found, "loss": loss.assign_attrs(long_name="mean loss of recent pairs", units="nat")}
    )


def _part(table: xr.Dataset, part: str) -> xr.Dataset:
    return table[["asked", "right", "loss"]].sel(part=part).drop_vars("part")


def _share(counted: xr.Dataset, long_name: str) -> xr.DataArray:
    share: xr.DataArray = counted["right"] / counted["asked"].where(counted["asked"] > 0)
    return share.assign_attrs(long_name=long_name, units="1")
