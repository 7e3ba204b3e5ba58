"""The figure of overload: which states outgrow what they were trained with, from when on, by how much."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statescope.analyses.blocks import Array, Block, steps
from statescope.analyses.overload import OVERLOADED, VERDICTS, overload
from statescope.analyses.plots.bins import binned, scale_tokens
from statescope.analyses.plots.style import (
    BOUND,
    NAMED,
    SEQUENTIAL,
    draw_heads,
    extremes,
    mark_training,
    sheet,
    title,
)
from statescope.analyses.state import largest_inside

SIGNS = {"retains": "o", "overloaded": "X", "not finite": "*"}
"""Marks of the verdicts; heads that forget have none."""

READABLE = 24
"""Up to so many columns (or rows) of heads, their numbers are written into the map."""


def overload_figure(
    record: xr.DataTree, train_length: int | None = None, judged: xr.Dataset | None = None
) -> Figure:
    r"""Show the overload ratio of every head, along the text and on average, with verdict and onset.

    Left: the ratio of the norm to the largest inside the training length, mean over sequences; the heads
    with the largest mean beyond it are named, and a triangle marks from where on one stays overloaded.
    Right: that mean by layer and head, with the verdicts of :func:`statescope.analyses.overload`.

    Parameters
    ----------
    record : DataTree
        A record, best several training lengths long.
    train_length : int, optional
        In tokens. Default: the record's own.
    judged : Dataset, optional
        What :func:`statescope.analyses.overload` gave for this record, so that it need not be done again.
    """
    judged = overload(record, train_length) if judged is None else judged
    length = int(judged.attrs["train_length"])

    def norms(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        return (block["state_norm"],), None

    labels = {"ratio": ("state norm over the largest in training", "1")}
    largest = largest_inside(steps(record), length)
    curves = binned(record, ("state_norm",), norms, labels, length, largest)["ratio"]
    layers, heads = curves.sizes["layer"], curves.sizes["head"]
    tall = min(7.0, max(3.2, 1.2 + 0.16 * layers))
    wide = min(7.0, 2.2 + 0.2 * heads if heads <= READABLE else 5.0)
    with sheet(1, 2, 5.2 + wide, tall, width_ratios=(5.2, wide)) as (figure, axes):
        _draw_curves(axes[0, 0], record, curves, judged, length)
        _draw_map(axes[0, 1], judged)
    return figure


def _draw_curves(
    ax: Axes, record: xr.DataTree, curves: xr.DataArray, judged: xr.Dataset, length: int
) -> None:
    flat = curves.stack(at=("layer", "head")).transpose("token", "at")
    mean = judged["overload_ratio"].mean("sequence").stack(at=("layer", "head")).values
    onset = judged["onset"].median("sequence").stack(at=("layer", "head")).values
    named = extremes(mean)
    labels = [f"layer {a}, head {b}" for a, b in flat["at"].values]
    x = curves["token"].values
    draw_heads(ax, x, flat.values, named, labels)
    for i, style in zip(named, NAMED, strict=False):
        if np.isfinite(onset[i]):
            y = np.interp(onset[i], x, flat.values[:, i])
            ax.plot(onset[i], y, "v", color=style["color"], markersize=8, markeredgecolor="white")
    ax.axhline(OVERLOADED, **BOUND, label="overloaded above")
    mark_training(ax, length, label=True)
    top = np.nanmax(flat.values[:, named]) if named else 1.0
    ax.set(ylabel=title(curves), ylim=(0, None))
    if top > 20:
        ax.set(yscale="log", ylim=(0.05, None))
    elif top < OVERLOADED:
        ax.set_ylim(0, 1.1 * OVERLOADED)
    scale_tokens(ax, record, length)
    ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)


def _draw_map(ax: Axes, judged: xr.Dataset) -> None:
    ratio = judged["overload_ratio"].mean("sequence").transpose("layer", "head")
    verdict = judged["verdict"].transpose("sequence", "layer", "head").values
    worst = np.max([i * (verdict == name).any(0) for i, name in enumerate(VERDICTS)], axis=0)
    values = ratio.values
    known = values[np.isfinite(values)]
    top = max(2.0, float(known.max())) if known.size else 2.0
    ax.set_facecolor("0.97")
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("mean ratio beyond training")
    bar.ax.axhline(OVERLOADED, **{**BOUND, "color": "white"})
    size = float(np.clip(220 / max(values.shape), 2, 7))
    for name, sign in SIGNS.items():
        y, x = np.nonzero(worst == VERDICTS.index(name))
        dark = np.nan_to_num(values[y, x]) > 0.45 * top
        for shade, chosen in (("white", dark), ("black", ~dark)):
            face = "none" if sign == "o" else shade
            ax.plot(
                x[chosen],
                y[chosen],
                sign,
                markersize=size,
                markerfacecolor=face,
                markeredgecolor=shade,
                markeredgewidth=0.8,
                linestyle="none",
            )
        if len(x):
            count = f"{name} ({len(x)})"
            face = "none" if sign == "o" else "black"
            ax.plot(
                [], [], sign, markerfacecolor=face, markeredgecolor="black", linestyle="none", label=count
            )
    forgets = int((worst == 0).sum())
    if forgets:
        ax.plot([], [], " ", label=f"no mark: forgets ({forgets})")
    ax.legend(
        frameon=False,
        fontsize="small",
        loc="lower left",
        bbox_to_anchor=(-0.05, 1.0),
        ncols=2,
        handletextpad=0.2,
        columnspacing=1.0,
    )
    for axis, dim in ((ax.xaxis, "head"), (ax.yaxis, "layer")):
        names = ratio[dim].values
        every = -(-len(names) // 16)
        axis.set_ticks(np.arange(0, len(names), every), [str(n) for n in names[::every]])
    ax.set(xlabel="head", ylabel="layer")
