"""Figures of states along the text: their size, and how many directions they use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from statescope.analyses.blocks import Array, Block, group, state_shape
from statescope.analyses.plots.bins import binned, scale_tokens
from statescope.analyses.plots.style import (
    beside,
    choose_layers,
    draw_heads,
    extremes,
    known_length,
    log_axis,
    mark_training,
    note_layers,
    sheet,
    title,
)
from statescope.analyses.snapshots import state_outliers, state_rank

ROWS = 6
"""Layers in one figure."""


def state_figure(
    record: xr.DataTree, train_length: int | None = None, layers: Iterable[int] | None = None
) -> Figure:
    r"""Show size, mean and variance of every head's state along the text, one row a layer.

    Curves are means over sequences and short stretches of tokens. The heads named are those whose norm has
    grown most from the training length (or the first half of the text) to the end.

    Parameters
    ----------
    record : DataTree
        A record.
    train_length : int, optional
        In tokens. Default: the record's own; without one no line is drawn.
    layers : iterable of int, optional
        Layers to draw. Default: up to six, evenly over the depth.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), figure 6.
    """
    length = known_length(record, train_length)
    chosen = choose_layers(record, layers, ROWS)
    key, value = state_shape(record)

    def statistics(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        norm, mean = block["state_norm"], block["state_mean"]
        return (norm, mean, np.maximum(norm**2 / (key * value) - mean**2, 0)), None

    labels = {
        "norm": ("norm of the state", "1"),
        "mean": ("mean of its entries", "1"),
        "variance": ("variance of its entries", "1"),
    }
    part = record.sel(layer=chosen)
    found = binned(part, ("state_norm", "state_mean"), statistics, labels, length)
    growth = _growth(found["norm"], length)
    figure = _by_layer(record, found, growth, length, {"norm": "log", "variance": "log"})
    note_layers(figure, record, chosen)
    return figure


def rank_figure(
    record: xr.DataTree, train_length: int | None = None, layers: Iterable[int] | None = None
) -> Figure:
    """Show how many directions the kept states use, and how far few channels outweigh the rest.

    Means over sequences. The heads named are those with the largest share in one row or column at the end.

    Parameters
    ----------
    record : DataTree
        A record with snapshots.
    train_length : int, optional
        In tokens. Default: the record's own; without one no line is drawn.
    layers : iterable of int, optional
        Layers to draw. Default: up to six, evenly over the depth.

    Notes
    -----
    Sources: arXiv 2602.04852 (rank utilisation); *Stuffed Mamba*, figure 6 (outlier channels).
    """
    length = known_length(record, train_length)
    if not group(record, "snapshots").sizes["position"]:
        raise ValueError("record has no snapshots yet: the first was not reached")
    chosen = choose_layers(record, layers, ROWS)
    part = record.sel(layer=chosen)
    ranks, outliers = state_rank(part), state_outliers(part)
    names = {"utilisation": "utilisation: rank over min(key, value)"}
    found = xr.Dataset(
        {
            "utilisation": ranks["utilisation"],
            "stable_rank": ranks["stable_rank"],
            "key_share": outliers["key_share"],
            "value_share": outliers["value_share"],
        }
    )
    labels = {n: names.get(str(n), found[n].attrs["long_name"]) for n in found}
    labels |= {"key_share": "energy in the largest row", "value_share": "energy in the largest column"}
    found = found.mean("sequence").rename(position="token")
    for name, label in labels.items():
        found[name].attrs = {"long_name": label, "units": "1"}
    share = found[["key_share", "value_share"]].to_array().max("variable").isel(token=-1)
    figure = _by_layer(record, found, share, length, {}, "o" if found.sizes["token"] <= 12 else "")
    for row in figure.axes[:: len(found)]:
        row.set_ylim(-0.03, 1.05)
    note_layers(figure, record, chosen)
    return figure


def _growth(norm: xr.DataArray, length: int | None) -> xr.DataArray:
    """Norm in the last tenth of the text over the largest before the training length, (layer, head)."""
    tokens = norm["token"].values
    split = tokens[-1] / 2 if length is None or length > tokens[-1] else length
    inside = norm.isel(token=slice(0, max(1, int((tokens < split).sum())))).max("token")
    late = norm.isel(token=slice(int(0.9 * len(tokens)), None)).mean("token")
    return late / inside.where(inside > 0)


def _by_layer(
    record: xr.DataTree,
    found: xr.Dataset,
    worth_naming: xr.DataArray,
    length: int | None,
    scales: Mapping[str, str],
    marker: str = "",
) -> Figure:
    """Draw variables of (layer, token, head): a row a layer, a column a variable."""
    layers, names = found["layer"].values, [str(n) for n in found]
    heads = [f"head {h}" for h in found["head"].values]
    size = (0.9 + 2.7 * len(names), 0.7 + 1.5 * len(layers))
    with sheet(len(layers), len(names), *size, sharex=True) as (figure, axes):
        for row, layer in zip(axes, layers, strict=True):
            first = layer == layers[0]
            named = extremes(worth_naming.sel(layer=layer).values, 2)
            for ax, name in zip(row, names, strict=True):
                curves = found[name].sel(layer=layer).transpose("token", "head").values
                scale = scales.get(name, "linear")
                if scale == "log":
                    curves = np.where(curves > 0, curves, np.nan)
                draw_heads(ax, found["token"].values, curves, named, heads, marker, say=first)
                if scale == "log" and np.isfinite(curves).any():
                    log_axis(ax)
                mark_training(ax, length, label=first)
            row[0].set_ylabel(f"layer {layer}")
            beside(row[-1])
        for ax, name in zip(axes[0], names, strict=True):
            ax.set_title(title(found[name]))
        for ax in axes[-1]:
            scale_tokens(ax, record, length)
    return figure
