"""What the figures share: their frame, the training length, many heads in one panel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from statescope.analyses.blocks import Array, group
from statescope.analyses.blocks import train_length as resolve

TRAIN_LENGTH: dict[str, Any] = {"color": "tab:red", "linestyle": "--", "linewidth": 1.2}
"""How the training length is drawn, in every figure."""

BOUND: dict[str, Any] = {"color": "0.35", "linestyle": (0, (1, 1.5)), "linewidth": 1.0}
"""How a threshold is drawn."""

NAMED: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-", "linewidth": 1.5},
    {"color": "tab:blue", "linestyle": "-.", "linewidth": 1.3},
    {"color": "tab:purple", "linestyle": (0, (1, 1)), "linewidth": 1.5},
    {"color": "tab:green", "linestyle": (0, (5, 2, 1, 2, 1, 2)), "linewidth": 1.3},
)
"""How the heads that are named are drawn."""

MARKS = ("o", "s", "^", "D", "v", "P")

FEW = 8
"""So many heads are drawn one by one; more are drawn as bands of quantiles."""

SEQUENTIAL, DIVERGING, ACCURACY = "rocket_r", "RdBu_r", "mako"
"""Colour maps; the first and last are even in lightness."""


@contextmanager
def sheet(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Make a figure of panels, (rows, columns); size in inches."""
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options
        )
        plt.close(figure)  # it is returned: pyplot need neither keep it nor show it a second time
        yield figure, axes
        sns.despine(figure)


def log_axis(ax: Axes) -> None:
    """Make the vertical axis logarithmic, with few labels that can be read, however narrow its range."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    narrow = high < 30 * low
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6))
    if narrow:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def known_length(record: xr.DataTree, given: int | None = None) -> int | None:
    """Training length in tokens: given, or the record's own; None if neither says."""
    unknown = given is None and record.attrs.get("train_length") is None
    return None if unknown else resolve(record, given)


def mark_training(ax: Axes, length: int | None, label: bool = False) -> None:
    """Draw the training length as a dashed red line."""
    if length is not None:
        ax.axvline(length, **TRAIN_LENGTH, label="training length" if label else None)


def title(variable: xr.DataArray) -> str:
    """Long name and units, as axes say them."""
    units = variable.attrs.get("units", "1")
    name = str(variable.attrs.get("long_name", variable.name))
    return name if units == "1" else f"{name} ({units})"


def choose_layers(record: xr.DataTree, layers: Iterable[int] | None, most: int) -> list[int]:
    """Layers to draw: those asked for, or up to ``most``, evenly over the depth.

    Raises
    ------
    ValueError
        If a layer is not in the record; names it.
    """
    present = [int(n) for n in group(record, "steps")["layer"].values]
    if layers is not None:
        wanted = [int(n) for n in layers]
        unknown = [n for n in wanted if n not in present]
        if unknown or not wanted:
            what = f"layer {unknown[0]}" if unknown else "none"
            raise ValueError(f"layers names {what}; the record has {', '.join(map(str, present))}")
        return wanted
    at = np.unique(np.linspace(0, len(present) - 1, min(most, len(present))).round().astype(int))
    return [present[i] for i in at]


def one_of(name: str, given: int, present: xr.DataArray) -> int:
    """Return a coordinate that is there.

    Raises
    ------
    ValueError
        If it is not; names it and those that are.
    """
    if given not in present.values:
        some = ", ".join(str(n) for n in present.values[:12])
        raise ValueError(f"{name}={given}; the record has {some}{', ...' if present.size > 12 else ''}")
    return int(given)


def note_layers(figure: Figure, record: xr.DataTree, drawn: Sequence[int]) -> None:
    """Say so where not all layers are drawn."""
    total = group(record, "steps").sizes["layer"]
    if len(drawn) < total:
        figure.suptitle(f"{len(drawn)} of {total} layers", fontsize="small", x=0.01, ha="left")


def extremes(values: Array, most: int = 3, smallest: bool = False) -> list[int]:
    """Places of the few largest (or smallest) finite values."""
    known = np.where(np.isfinite(values), -values if smallest else values, -np.inf)
    order = np.argsort(-known, kind="stable")[:most]
    return [int(i) for i in order if np.isfinite(known[i])]


def draw_heads(
    ax: Axes,
    x: Array,
    curves: Array,
    named: Sequence[int],
    labels: Sequence[str],
    marker: str = "",
    say: bool = True,
) -> None:
    """Draw (token, head) curves: all thin, or where there are many their quantiles; the named ones heavy."""
    lone = "o" if len(x) == 1 else marker
    if curves.shape[1] > FEW:
        with np.errstate(invalid="ignore"):
            known = np.isfinite(curves).any(1)
            q = np.full((5, len(x)), np.nan)
            q[:, known] = np.nanquantile(curves[known], (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
        ax.fill_between(x, q[0], q[4], color="0.9", linewidth=0, label="5 to 95 %" if say else None)
        ax.fill_between(x, q[1], q[3], color="0.75", linewidth=0, label="25 to 75 %" if say else None)
        ax.plot(
            x, q[2], color="0.45", linewidth=1, marker=lone, markersize=3, label="median" if say else None
        )
    else:
        ax.plot(x, curves, color="0.78", linewidth=0.8, marker=lone, markersize=3)
    for i, style, mark in zip(named, NAMED, MARKS, strict=False):
        shape: dict[str, Any] = {"marker": mark, "markersize": 3.5} if lone else {}
        ax.plot(x, curves[:, i], **style, **shape, label=labels[i])


def below(figure: Figure, ax: Axes, leave: Sequence[str] = (), columns: int = 4) -> None:
    """Put one legend of what the panels share under all of them."""
    handles, labels = ax.get_legend_handles_labels()
    found = {a: b for a, b in zip(labels, handles, strict=True) if a not in leave}
    if found:
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=min(columns, len(found)),
            frameon=False, fontsize="small",
        )  # fmt: skip


def beside(ax: Axes, **options: Any) -> None:
    """Put a legend to the right of a panel."""
    handles, _ = ax.get_legend_handles_labels()
    if handles:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.05), fontsize="small", **options)


def above(ax: Axes, wanted: Sequence[str]) -> None:
    """Put a legend of some labels on the line of the panel's title, at the right."""
    handles, labels = ax.get_legend_handles_labels()
    chosen = [(a, b) for a, b in zip(handles, labels, strict=True) if b in wanted]
    if chosen:
        ax.legend(
            *zip(*chosen, strict=True),
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1.02, 0.97),
            ncols=len(chosen),
            fontsize="x-small",
            handlelength=1.6,
            columnspacing=0.8,
            borderaxespad=0.1,
        )
