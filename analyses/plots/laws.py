"""Figures of training runs: recall by position, and the training length from which a state forgets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from statescope.analyses.laws import LAWS, fit_laws
from statescope.analyses.paper import FORGET, paper_forget, paper_points
from statescope.analyses.plots.style import BOUND, MARKS, sheet
from statescope.analyses.runs import FAR, RECENT, recall_by_position
from statescope.analyses.thresholds import WITHIN, learned_to_forget, thresholds

SHADES = ("0.72", "tab:cyan", "tab:blue", "tab:purple", "tab:red", "black")
DASHES: tuple[Any, ...] = ((0, (1, 1)), "-.", "--", (0, (5, 2, 1, 2, 1, 2)), (0, (7, 2)), "-")


def position_figure(
    table: xr.Dataset, quantity: str = "recall", recent: int = RECENT, most: int = 6
) -> Figure:
    """Show recall (or loss) of recent pairs by position, one panel a state size, one curve a training length.

    A curve is the median over runs, its band their range. The mark on it stands at the training length. The
    loss has a logarithmic axis, on which a factor is a height.

    Parameters
    ----------
    table : Dataset
        Runs of one budget and one kind of data.
    quantity : str
        ``"recall"`` or ``"loss"``.
    recent : int
        Lags below count, in pairs.
    most : int
        At most so many state sizes and training lengths are drawn.
    """
    if quantity not in ("recall", "loss"):
        raise ValueError(f"quantity={quantity!r}; expected 'recall' or 'loss'")
    sizes, lengths = (choose(np.unique(table[n].values), most) for n in ("state_size", "train_length"))
    columns = min(3, len(sizes))
    rows = -(-len(sizes) // columns)
    curves = recall_by_position(table, recent)[quantity]
    with sheet(rows, columns, 1.2 + 2.5 * columns, 0.9 + 2.0 * rows, sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for ax, size in zip(axes.flat, sizes, strict=False):
            for i, length in enumerate(lengths):
                here = (table["state_size"] == size) & (table["train_length"] == length)
                _draw_curve(ax, curves.isel(run=here.values), int(length), i, quantity)
            ax.set_title(f"N = {size}", fontsize="medium")
            _log_tokens(ax)
            if quantity == "loss":
                ax.set_yscale("log")
        for ax in axes.flat[len(sizes) :]:
            ax.set_visible(False)
        for ax in axes.flat[max(0, len(sizes) - columns) : len(sizes)]:  # the lowest of every column
            ax.set_xlabel("position (tokens)")
            ax.tick_params(labelbottom=True)
        for ax in axes[:, 0]:
            ax.set_ylabel("recall of recent pairs" if quantity == "recall" else "loss (nat)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside right upper",
            frameon=False,
            fontsize="small",
            title="trained on\n(tokens)",
        )
    return figure


def _draw_curve(ax: Axes, values: xr.DataArray, length: int, i: int, quantity: str) -> None:
    known = (values.where(values > 0) if quantity == "loss" else values).dropna("position", how="all")
    if not known.sizes["run"] or not known.sizes["position"]:
        return
    starts = known["position"].values.astype(float)
    x = np.where(starts > 0, starts * np.sqrt(2), 8.0)  # middles of bins that double
    low, middle, high = np.nanquantile(known.transpose("run", "position").values, (0, 0.5, 1), axis=0)
    color, dash = SHADES[i % len(SHADES)], DASHES[i % len(DASHES)]
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    ax.plot(x, middle, color=color, linestyle=dash, linewidth=1.3, label=f"{length:,}")
    middle = np.log(middle) if (is_log := quantity == "loss") else middle
    at = float(np.interp(np.log(length), np.log(x), middle))
    at = float(np.exp(at)) if is_log else at
    ax.plot(length, at, MARKS[i % len(MARKS)], color=color, markersize=4.5, markeredgecolor="white")


def threshold_figure(
    table: xr.Dataset,
    far: int = FAR,
    within: float = WITHIN,
    paper: bool = True,
    law: str | None = None,
    criterion: str = "recall",
) -> Figure:
    """Show which runs forget, by state size and training length; the threshold with its law; the paper's.

    Left: the share of runs that forget in every cell (a filled disc: all, an empty one: none), and the
    threshold between them with its interval. Right: the same threshold over the numbers of the state
    beside the paper's, whose points are its law at the sizes it trained.

    Parameters
    ----------
    table : Dataset
        Runs of one budget and one kind of data.
    far, within, criterion
        See :func:`statescope.analyses.thresholds.learned_to_forget`.
    paper : bool
        Draw the paper's law beside.
    law : str, optional
        Which of :data:`statescope.analyses.laws.LAWS` to draw. Default: the one of the least held-out error.
    """
    found = thresholds(
        learned_to_forget(table, within, far, criterion=criterion),
        size="entries" if "entries" in table.coords else "state_numbers",
    )
    size = str(next(iter(found["threshold"].dims)))
    with sheet(1, 2 if paper else 1, 8.4 if paper else 4.6, 3.5) as (figure, axes):
        ax = axes[0, 0]
        _draw_cells(ax, found, size)
        _draw_thresholds(ax, found, size, law)
        lengths = found["train_length"].values
        ax.set_ylim(lengths[0] / 1.6, lengths[-1] * 1.6)
        ax.set(xlabel="numbers in the state", ylabel="training length (tokens)", title="runs that forget")
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
        if paper:
            _draw_paper(axes[0, 1], found, size)
    return figure


def _draw_cells(ax: Axes, found: xr.Dataset, size: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    cells = found["fraction"].stack(cell=(size, "train_length")).dropna("cell")
    x, y = cells[size].values, cells["train_length"].values
    ax.scatter(
        x, y, c=cells.values, cmap="Greys", vmin=0, vmax=1, s=70, edgecolors="0.3", linewidths=0.8, zorder=2
    )
    ax.scatter([], [], c="black", s=50, edgecolors="0.3", label="all forget")
    ax.scatter([], [], c="white", s=50, edgecolors="0.3", label="none forgets")
    for axis, name, thousand in ((ax.xaxis, size, 1000), (ax.yaxis, "train_length", 1024)):
        values = choose(found[name].values, 8)
        axis.set_ticks(values, [short_number(v, thousand) for v in values])
        axis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.1)


def _draw_thresholds(ax: Axes, found: xr.Dataset, size: str, law: str | None) -> None:
    known = found.isel({size: np.isfinite(found["threshold"].values)})
    if not known.sizes[size]:
        return
    x, y = known[size].values.astype(float), known["threshold"].values
    lengths = found["train_length"].values
    bounds = [np.clip(known[end].values, lengths[0] / 2, 2 * lengths[-1]) for end in ("low", "high")]
    ends = [y - bounds[0], bounds[1] - y]
    ax.errorbar(x, y, ends, fmt="s", color="tab:red", markersize=5, capsize=3, zorder=4, label="threshold")
    if len(x) < 3:
        return
    fits = fit_laws(x, y)
    name = law or fits.attrs["best"] or "power"
    p = fits["value"].sel(law=name).values[: LAWS[name].parameters]
    grid = np.geomspace(x.min(), x.max(), 100)
    fitted = LAWS[name].predict(p, grid)
    ax.plot(grid, np.where(fitted > 0, fitted, np.nan), color="tab:red", linewidth=1.2, label=f"{name} law")


def _draw_paper(ax: Axes, found: xr.Dataset, size: str) -> None:
    points = paper_points()
    ax.set_xscale("log")
    ax.set_yscale("log")
    drawn = points.isel(model=(points["clamped"] == 0).values)
    for trained, face, label in ((1, "black", "the paper's models"), (0, "white", "its prediction")):
        some = drawn.isel(model=(drawn["measured"] == trained).values)
        style: dict[str, Any] = {"color": "black", "markerfacecolor": face, "markersize": 5}
        ax.plot(some["entries"], some["forget_length"], "D", label=label, **style)
    grid = np.geomspace(1000 * -FORGET["intercept"] / FORGET["slope"] * 1001, 2.5e7, 200)
    ax.plot(grid, paper_forget(grid)[0], color="black", linewidth=1, label="the paper's law")
    zero = -FORGET["intercept"] / FORGET["slope"] * 1e6
    ax.axvline(zero, **BOUND, label="its zero: nothing is said below")
    known = found.isel({size: np.isfinite(found["threshold"].values)})
    if known.sizes[size]:
        ax.plot(known[size], known["threshold"], "s", color="tab:red", markersize=5, label="here")
    ax.set(xlabel="numbers in the state", title="beside the paper's")
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
        axis.set_minor_formatter(NullFormatter())


def _log_tokens(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v, 1024)))


def short_number(value: float, thousand: float = 1e3) -> str:
    """Write a number with K or M."""
    for unit, factor in (("M", thousand**2), ("K", thousand)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:g}"


def choose(values: Any, most: int) -> Any:
    """At most so many of the values, evenly spread, the ends among them."""
    at: Iterable[int] = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
    return values[list(at)]
