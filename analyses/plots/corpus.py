"""The figure of a corpus: how its texts differ, and which heads are overloaded in most of them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from statescope.analyses.overload import OVERLOADED
from statescope.analyses.plots.style import BOUND, SEQUENTIAL, TRAIN_LENGTH, sheet

SIGNS = {"overloaded": ("X", "black"), "retains": ("o", "0.45"), "forgets": (".", "0.65")}


def corpus_figure(judged: xr.Dataset) -> Figure:
    """Show every text by its length and its worst head, and every head by the texts that overload it.

    Parameters
    ----------
    judged : Dataset
        From :func:`statescope.analyses.corpus`.
    """
    layers, heads = judged.sizes["layer"], judged.sizes["head"]
    tall = min(7.0, max(3.2, 1.2 + 0.16 * layers))
    wide = min(6.0, 2.4 + 0.18 * heads)
    with sheet(1, 2, 5.0 + wide, tall, width_ratios=(5.0, wide)) as (figure, axes):
        _draw_texts(axes[0, 0], judged)
        _draw_heads(axes[0, 1], judged)
    return figure


def _draw_texts(ax: Axes, judged: xr.Dataset) -> None:
    ratio, length = judged["worst_ratio"].values, judged["length"].values
    for verdict, (mark, color) in SIGNS.items():
        here = (judged["verdict"].values == verdict) & np.isfinite(ratio)
        if here.any():
            label = f"{verdict} ({here.sum():,})"
            ax.plot(length[here], ratio[here], mark, color=color, markersize=4, linestyle="none", label=label)
    unjudged = int((~np.isfinite(ratio)).sum())
    if unjudged:
        ax.plot([], [], " ", label=f"too short to judge ({unjudged:,})")
    ax.axhline(OVERLOADED, **BOUND)
    ax.axvline(judged.attrs["train_length"], **TRAIN_LENGTH)
    ax.set(xscale="log", xlabel="length of the text (token)", ylabel="overload ratio of its worst head")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(0, max(1.1 * OVERLOADED, 1.08 * float(np.nanmax(ratio))) if np.isfinite(ratio).any() else 2)
    ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)


def _draw_heads(ax: Axes, judged: xr.Dataset) -> None:
    share = judged["overloaded_share"].transpose("layer", "head")
    ax.set_facecolor("0.97")
    image = ax.imshow(share.values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, format=PercentFormatter(1.0))
    bar.set_label("texts in which it is overloaded")
    for axis, dim in ((ax.xaxis, "head"), (ax.yaxis, "layer")):
        names = share[dim].values
        every = -(-len(names) // 16)
        axis.set_ticks(np.arange(0, len(names), every), [str(n) for n in names[::every]])
    ax.set(xlabel="head", ylabel="layer")
