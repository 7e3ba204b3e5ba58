"""Figures of forgetting: what is left of one token, and how fast states decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from statescope.analyses.blocks import Array, Block, steps
from statescope.analyses.plots.bins import binned, scale_tokens
from statescope.analyses.plots.style import (
    BOUND,
    SEQUENTIAL,
    TRAIN_LENGTH,
    above,
    below,
    choose_layers,
    draw_heads,
    extremes,
    known_length,
    mark_training,
    note_layers,
    sheet,
)
from statescope.analyses.retention import KEPT, time_scales

PANELS, COLUMNS = 12, 4

OUTLINE = [withStroke(linewidth=3, foreground="white")]
"""Sets text and lines off from what is behind them."""

FLOOR = 1e-6
"""Retention below this is not drawn."""


def retention_figure(
    record: xr.DataTree,
    token: int = 0,
    train_length: int | None = None,
    layers: Iterable[int] | None = None,
) -> Figure:
    r"""Show how much of what a token wrote is left, per head, along the text.

    Geometric means over sequences and short stretches of tokens. The heads named are those that keep most
    at the end; the dotted line is 1/e.

    Parameters
    ----------
    record : DataTree
        A record.
    token : int
        The writing token. With ``window=w``, the end of its window stands for it.
    train_length : int, optional
        In tokens. Default: the record's own; without one no line is drawn.
    layers : iterable of int, optional
        Layers to draw. Default: up to twelve, evenly over the depth.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), figure 3.
    """
    length = known_length(record, train_length)
    last = steps(record)["token"].values
    if not 0 <= token <= last[-1]:
        raise ValueError(f"token={token}; expected 0 to {last[-1]}")
    written = int(last[np.searchsorted(last, token)])

    def kept(block: Block, carry: Any) -> tuple[tuple[Array, ...], Any]:
        later = (block["last"] > written)[:, None]
        total = np.cumsum(np.where(later, block["log_decay"], 0.0), axis=2)
        total = total if carry is None else total + carry
        return (np.where((block["last"] >= written)[:, None], total, np.nan),), total[:, :, -1:]

    chosen = choose_layers(record, layers, PANELS)
    labels = {"log_retention": (f"retention of token {written}", "1")}
    found = binned(record.sel(layer=chosen), ("log_decay",), kept, labels, length)["log_retention"]
    found = found.isel(token=found.notnull().any(("layer", "head")).values)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    names = [f"head {h}" for h in found["head"].values]
    size = (0.8 + 2.6 * columns, 0.5 + 2.0 * rows)
    with sheet(rows, columns, *size, sharex=True, sharey=True) as (figure, axes):
        for ax, layer in zip(axes.flat, chosen, strict=False):
            logs = found.sel(layer=layer).transpose("token", "head").values
            named = extremes(np.nan_to_num(logs[-1], nan=-np.inf), 2)
            curves = np.exp(np.maximum(logs, np.log(FLOOR) - 5))
            draw_heads(ax, found["token"].values, curves, named, names)
            above(ax, names)
            ax.set_title(f"layer {layer}", loc="left", fontsize="medium")
            ax.axhline(KEPT, **BOUND, label="1/e")
            mark_training(ax, length, label=True)
            ax.set(yscale="log", ylim=(FLOOR, 1.6))
        for ax in axes.flat[len(chosen) :]:
            ax.set_visible(False)
        for i in range(columns):
            lowest = axes[(len(chosen) - 1 - i) // columns, i]
            scale_tokens(lowest, record, length)
            lowest.tick_params(labelbottom=True)
        for row in axes:
            row[0].set_ylabel(found.attrs["long_name"])
        below(figure, axes[0, 0], leave=names)
    note_layers(figure, record, chosen)
    return figure


def decay_figure(record: xr.DataTree, train_length: int | None = None) -> Figure:
    r"""Show how fast every layer decays: time scales of all tokens, and the half-life of every head.

    Left: the distribution of :math:`1/(1 - \alpha_t)` over heads and tokens, a column a layer. Right: the
    half-life at the mean log decay, a mark a head; the longest are named.

    Parameters
    ----------
    record : DataTree
        A record; with ``window=w``, decays are means over windows.
    train_length : int, optional
        In tokens. Default: the record's own; without one no line is drawn.

    Notes
    -----
    Above the dashed line, a head decays more slowly than training could show it.
    """
    length = known_length(record, train_length)
    found = time_scales(record)
    width = min(11.0, 6.5 + 0.12 * found.sizes["layer"])
    with sheet(1, 2, width, 3.4, sharey=True) as (figure, axes):
        _draw_distribution(axes[0, 0], found)
        _draw_half_lives(axes[0, 1], found)
        for ax in axes[0]:
            if length is not None:
                ax.axhline(length, **TRAIN_LENGTH, label="training length", path_effects=OUTLINE, zorder=1.9)
            ax.set_xlabel("layer")
            ax.set_yscale("log")
            ax.tick_params(labelleft=True)
        below(figure, axes[0, 1])
    return figure


def _draw_distribution(ax: Axes, found: xr.Dataset) -> None:
    count = found["count"].sum(("sequence", "head"))
    # The record's bins are fine (2.5 %); eight to a decade are enough for the eye.
    tau = found["tau"].values
    used = count.sum("layer").values > 0
    low, high = np.log10(tau[used][[0, -1]]) if used.any() else (0, 1)
    edges = 10.0 ** (np.arange(np.floor(8 * low), np.ceil(8 * high) + 2) / 8)
    place = np.clip(np.searchsorted(edges, tau) - 1, 0, len(edges) - 2)
    share = np.zeros((len(edges) - 1, found.sizes["layer"]))
    np.add.at(share, place, count.transpose("tau", "layer").values)
    share = 100 * share / np.maximum(share.sum(0), 1)
    x = np.arange(found.sizes["layer"] + 1) - 0.5
    norm = LogNorm(0.1, 100)
    mesh = ax.pcolormesh(x, edges, np.where(share > 0.05, share, np.nan), cmap=SEQUENTIAL, norm=norm)
    mesh.set_edgecolor("face")
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.set_label("heads and tokens (%)")
    ax.set_title("time scale of the decay")
    ax.set_ylabel("1 / (1 - decay) (token)")
    _tick_layers(ax, found)


def _draw_half_lives(ax: Axes, found: xr.Dataset) -> None:
    half_life = found["half_life"].mean("sequence").transpose("layer", "head").values
    heads = half_life.shape[1]
    spread = np.linspace(-0.3, 0.3, heads) if heads > 1 else np.zeros(1)
    x = np.arange(len(half_life))[:, None] + spread
    ax.plot(
        x.ravel(),
        half_life.ravel(),
        "o",
        color="0.4",
        markersize=3.5 if half_life.size <= 200 else 1.8,
        markeredgewidth=0,
        path_effects=OUTLINE if half_life.size <= 200 else None,  # not to be lost in the dashed line
        zorder=2.1,
        label="one head",
    )
    middle, place = np.nanmedian(half_life, axis=1), np.arange(len(half_life))
    ax.hlines(middle, place - 0.38, place + 0.38, color="black", zorder=2.2, label="median of the layer")
    for i in extremes(half_life.ravel()):
        layer, head = np.unravel_index(i, half_life.shape)
        ax.annotate(
            f"head {int(found['head'][head])}",
            (x[layer, head], half_life[layer, head]),
            xytext=(4, 0),
            va="center",
            textcoords="offset points",
            fontsize="small",
            path_effects=OUTLINE,
        )
    ax.set_title("half-life per head")
    ax.set_ylabel("half-life (token)")
    _tick_layers(ax, found)


def _tick_layers(ax: Axes, found: xr.Dataset) -> None:
    layers = found["layer"].values
    every = -(-len(layers) // 12)
    ax.set_xticks(np.arange(0, len(layers), every), [str(n) for n in layers[::every]])
    ax.set_xlim(-0.6, len(layers) - 0.4)
