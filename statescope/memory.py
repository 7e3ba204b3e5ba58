"""A record that stays in memory: the arrays of the record as they are, without a store around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from statescope.layout import Layout
from statescope.schema import COORDINATES, PER_PROBE, Variable


class MemoryRecord:
    """Fills a record in, as :class:`statescope.store.RecordWriter` does on disk.

    Parameters
    ----------
    layout : Layout
        The shape of the record.
    attributes : mapping
        The root attributes.
    token_id : array, (sequence, token)
        The text.
    """

    def __init__(self, layout: Layout, attributes: Mapping[str, Any], token_id: NDArray[np.int64]) -> None:
        self._layout = layout
        self._attributes = {**attributes, "committed": 0, "complete": False}
        self._arrays: dict[str, NDArray[Any]] = {}
        for group in layout.groups():
            for name, variable in layout.variables(group).items():
                shape = tuple(layout.size(group, d) for d in variable.dims)
                partly = variable.dims == PER_PROBE  # tokens out of a probe's reach are not written
                self._arrays[f"{group}/{name}"] = (
                    np.full(shape, np.nan, variable.dtype) if partly else np.empty(shape, variable.dtype)
                )
        self._arrays["tokens/token_id"][:] = token_id

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes."""
        return dict(self._attributes)

    def write(self, name: str, values: NDArray[Any], **at: slice) -> None:
        """Write a block of one variable; see :meth:`statescope.store.RecordWriter.write`."""
        group, variable = name.split("/")
        dims = self._layout.variables(group)[variable].dims
        self._arrays[name][tuple(at.get(d, slice(None)) for d in dims)] = values

    def commit(self, tokens: int, carry: bytes | None, **attributes: Any) -> None:
        """Declare tokens written."""
        self._attributes |= {**attributes, "committed": tokens, "complete": carry is None}

    def discard_if_empty(self) -> None:
        """Nothing is left behind in memory."""

    def tree(self) -> xr.DataTree:
        """Hand out the record; see :func:`statescope.open`."""
        groups = {f"/{group}": self._dataset(group) for group in self._layout.groups()}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=self.attributes), **groups})

    def of_one(self, sequence: int, layout: Layout) -> dict[str, NDArray[Any]]:
        """Cut one sequence out, to the length that ``layout`` has: every variable, by ``group/variable``."""
        found = {}
        for group in self._layout.groups():
            for name, variable in self._layout.variables(group).items():
                cut = {"sequence": slice(sequence, sequence + 1)}
                if "token" in variable.dims:
                    cut["token"] = slice(0, layout.size(group, "token"))
                at = tuple(cut.get(d, slice(None)) for d in variable.dims)
                found[f"{group}/{name}"] = self._arrays[f"{group}/{name}"][at]
        return found

    def _dataset(self, group: str) -> xr.Dataset:
        variables = self._layout.variables(group)
        dims = dict.fromkeys(d for v in variables.values() for d in v.dims)
        coordinates = {d: _variable(COORDINATES[d], self._layout.coordinate(group, d)) for d in dims}
        data = {name: _variable(v, self._arrays[f"{group}/{name}"]) for name, v in variables.items()}
        return xr.Dataset(data, coordinates)


def _variable(described: Variable, values: NDArray[Any]) -> xr.Variable:
    attributes = {"long_name": described.long_name, "units": described.units}
    return xr.Variable(described.dims, values, attributes)
