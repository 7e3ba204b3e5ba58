"""The figure of what a probe reads: its implicit attention, head by head, along the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from statescope.analyses.attention import RECENT, implicit_attention, mean_distance, recency_ratio
from statescope.analyses.blocks import Array
from statescope.analyses.plots.bins import BINS
from statescope.analyses.plots.style import (
    SEQUENTIAL,
    TRAIN_LENGTH,
    choose_layers,
    known_length,
    note_layers,
    one_of,
    sheet,
)

PANELS = 6

FAINTEST = 0.01
"""Attention below this part of a head's whole, in percent, is left white."""


DIAMOND: dict[str, Any] = {
    "marker": "D",
    "linestyle": "none",
    "markersize": 4,
    "color": "white",
    "markeredgecolor": "black",
    "markeredgewidth": 0.9,
    "clip_on": False,
    "zorder": 3,
}


def attention_figure(
    record: xr.DataTree,
    probe: int = -1,
    train_length: int | None = None,
    layers: Iterable[int] | None = None,
    *,
    recent: int = RECENT,
    sequence: int = 0,
) -> Figure:
    r"""Show which tokens a probe reads in every head, and how far back.

    Left: a row a head; the darker, the more of its attention :math:`|M_{ti}|` lies on a stretch of the text.
    The diamond stands at the mean distance before the probe. Right: the part on the most recent tokens.
    Where a text is so long that one stretch would hold all of these, stretches grow with their distance from
    the probe, on a logarithmic axis.

    Parameters
    ----------
    record : DataTree
        A record with probes.
    probe : int
        One of the record's probes; negative ones count from the text's end.
    train_length : int, optional
        In tokens: a line so far before the probe. Default: the record's own; without one no line is drawn.
    layers : iterable of int, optional
        Layers to draw. Default: up to six, evenly over the depth.
    recent : int
        How many tokens count as recent.
    sequence : int
        Which text.

    Raises
    ------
    ValueError
        If there is no such probe, layer or sequence, or the record was made before it held attention.

    Notes
    -----
    To the left of the dashed line lies what is further back than training could show. Where the probe does
    not reach back to the start, what lies before is not drawn, and there is no diamond and no bar. Sources:
    as for :func:`statescope.analyses.implicit_attention`.
    """
    rows, total = implicit_attention(record), int(record.attrs["tokens"])
    at = one_of("probe", probe + total if probe < 0 else probe, rows["probe"])
    here = {"probe": at, "sequence": one_of("sequence", sequence, rows["sequence"])}
    chosen = choose_layers(record, layers, PANELS)
    size: xr.DataArray = abs(rows.sel(here).isel(token=slice(0, at + 1)))
    distance, near = (x.sel(here) for x in (mean_distance(record), recency_ratio(record, recent)))
    length = known_length(record, train_length)
    heads = size.sizes["head"]
    height = 0.75 + len(chosen) * min(2.6, max(0.9, 0.35 + 0.14 * heads))
    shades = LogNorm(FAINTEST, 100)
    ratios = {"width_ratios": (6, 1)}
    far = at + 1 > BINS * recent
    with sheet(len(chosen), 2, 9.0, height, sharex="col", sharey="row", **ratios) as (figure, axes):
        for (left, right), layer in zip(axes, chosen, strict=True):
            back = distance.sel(layer=layer)
            _draw_rows(left, size.sel(layer=layer), at if far else None, shades)
            left.plot(1 + back if far else at - back, np.arange(heads), **DIAMOND, label="mean distance")
            if length is not None and length <= at:
                where = 1 + length if far else at - length
                left.axvline(where, **TRAIN_LENGTH, label="training length back")
            right.barh(np.arange(heads), 100 * near.sel(layer=layer), 0.7, color="0.65", edgecolor="0.3")
            left.set_title(f"layer {layer}", loc="left", fontsize="medium")
            _tick_heads(left, size["head"].values)
        axes[-1, 0].set_xlabel(
            f"tokens back from the probe at {at:,}, which is 1"
            if far
            else f"token, up to the probe at {at:,}"
        )
        axes[-1, 1].set(xlabel=f"on the last\n{recent} tokens (%)", xlim=(0, 100))
        bar = figure.colorbar(
            ScalarMappable(shades, SEQUENTIAL), ax=axes, location="right", pad=0.01, aspect=30, extend="min"
        )
        bar.set_label("attention of a head (%)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper right",
            ncols=2,
            frameon=False,
            fontsize="small",
            handlelength=1.6,
        )
    note_layers(figure, record, chosen)
    return figure


def _draw_rows(ax: Axes, size: xr.DataArray, probe: int | None, shades: LogNorm) -> None:
    """Draw how a layer's attention is spread, a row a head, summed over stretches of tokens.

    Stretches are of one length, by token; where the probe is given, they are by distance from it, growing.
    """
    size = size.transpose("head", "token").astype(np.float64)
    known = np.isfinite(size.values).all(0)
    token, values = size["token"].values[known], size.values[:, known]
    count = min(BINS, len(token))
    if probe is None:
        cuts = np.unique(np.arange(count) * len(token) // count)
    else:
        token, values = probe - token[::-1] + 1, values[:, ::-1]
        cuts = np.unique(np.geomspace(1, len(token) + 1, count + 1).astype(int))[:-1] - 1
        ax.set_xscale("log")
    edges = np.append(token[cuts], token[-1] + 1) - 0.5
    whole = values.sum(1, keepdims=True)
    part = 100 * np.add.reduceat(values, cuts, axis=1) / np.where(whole > 0, whole, 1)
    rows = np.arange(len(part) + 1) - 0.5
    mesh = ax.pcolormesh(edges, rows, np.where(part > FAINTEST, part, np.nan), cmap=SEQUENTIAL, norm=shades)
    mesh.set_rasterized(True)
    ax.set(xlim=(edges[0], edges[-1]) if probe is None else (edges[-1], edges[0]), ylim=(rows[-1], rows[0]))


def _tick_heads(ax: Axes, heads: Array) -> None:
    every = -(-len(heads) // 8)
    ax.set_yticks(np.arange(0, len(heads), every), [str(h) for h in heads[::every]])
    ax.set_ylabel("head")
