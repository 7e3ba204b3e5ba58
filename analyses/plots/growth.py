"""Figures of runs beside the paper's laws: growth of the loss beyond training, and passkeys recalled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from statescope.analyses.growth import crossings, loss_growth
from statescope.analyses.laws import LAWS, fit_laws
from statescope.analyses.paper import FORGET, paper_forget, paper_points, paper_recall
from statescope.analyses.plots.laws import DASHES, SHADES, choose, short_number
from statescope.analyses.plots.style import BOUND, MARKS, sheet
from statescope.analyses.runs import FAR
from statescope.analyses.thresholds import LOSS_FACTOR, answers_passkeys, passkey_lengths


def growth_figure(table: xr.Dataset, far: int = FAR, level: float = LOSS_FACTOR) -> Figure:
    """Show how the loss grows beyond the training length, where that falls to a level, and the paper's law.

    Left: the growth against the training length, one curve a state size (geometric mean over seeds, its band
    their range), of the runs trained longest. Middle: the training length at which it falls to ``level``,
    with its interval, and two laws fitted; of smaller budgets, hollow, where it is known. Right: the same
    beside the paper's law.

    Parameters
    ----------
    table : Dataset
        Finished runs of one kind of data.
    far, level
        See :func:`statescope.analyses.growth.loss_growth` and :func:`~statescope.analyses.growth.crossings`.
    """
    steps: list[int] = np.unique(table["steps"].values)[::-1].tolist()
    growth = [loss_growth(table.isel(run=(table["steps"] == n).values), far) for n in steps]
    found = [crossings(of, "entries", level) for of in growth]
    with sheet(1, 3, 10.2, 3.4) as (figure, axes):
        left, middle, right = axes[0]
        _draw_growth(left, growth[0], level)
        _draw_crossings(middle, found, steps)
        _draw_beside(right, found[0], "threshold", "forget_length", f"here, {steps[0]:,} steps")
        left.set_title(f"growth of the loss, {steps[0]:,} steps")
        middle.set(title=f"where it falls to {level:g}", ylabel="training length (tokens)")
        for ax in axes[0, 1:]:
            ax.set_xlabel("numbers in the state")
        right.set(title="beside the paper's law", ylabel="training length (tokens)")
        for ax in [ax for ax in axes[0] if ax.get_legend_handles_labels()[0]]:
            ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    return figure


def passkey_length_figure(table: xr.Dataset, most: int = 6) -> Figure:
    """Show the passkeys recalled by length of the prompt, one panel a state size; and the longest prompt.

    A curve is a training length (mean over seeds and depths), the mark on it stands at that length. Runs that
    have not learned to answer are left out, and counted in the title. The last panel has the longest prompt
    recalled at every depth, by state size and training length (mean over seeds), beside the paper's law.

    Parameters
    ----------
    table : Dataset
        Runs of text, asked for passkeys.
    most : int
        At most so many state sizes and training lengths are drawn.
    """
    lengths = passkey_lengths(table)
    asked = table.isel(run=answers_passkeys(table).notnull().values)
    table = table.isel(run=lengths.notnull().values)
    sizes, trained = (choose(np.unique(table[n].values), most) for n in ("state_size", "train_length"))
    with sheet(2, -(-(len(sizes) + 1) // 2), 1.4 + 2.2 * -(-(len(sizes) + 1) // 2), 4.6) as (figure, axes):
        for ax, size in zip(axes.flat, sizes, strict=False):
            for i, length in enumerate(trained):
                here = ((table["state_size"] == size) & (table["train_length"] == length)).values
                _draw_recalled(ax, table["passkeys"].isel(run=here), int(length), i)
            learned, every = (int((of["state_size"] == size).sum()) for of in (table, asked))
            title = f"N = {size}" + (f" ({learned} of {every} runs)" if learned < every else "")
            ax.set(title=title, ylim=(-0.03, 1.03), xlabel="prompt (tokens)", ylabel="recalled")
        for ax in axes.flat[len(sizes) : -1]:
            ax.set_visible(False)
        ax = axes.flat[-1]
        for i, length in enumerate(trained):
            _draw_lengths(ax, lengths.isel(run=(lengths["train_length"] == length).values), i)
        _draw_paper(ax, "recall_length")
        ax.set(title="longest prompt recalled", xlabel="numbers in the state", ylabel="tokens")
        ax.legend(frameon=False, fontsize="x-small", loc="upper left")
        panels = [ax.get_legend_handles_labels() for ax in axes.flat[:-1]]
        by_label = {t: h for h, t in sorted((p for of in panels for p in zip(*of, strict=True)), key=_length)}
        place: dict[str, Any] = {"loc": "outside right upper", "title": "trained on\n(tokens)"}
        figure.legend(by_label.values(), by_label.keys(), frameon=False, fontsize="small", **place)
    return figure


def _length(drawn: tuple[Any, str]) -> int:
    return int(drawn[1].replace(",", ""))


def _draw_lengths(ax: Axes, lengths: xr.DataArray, i: int) -> None:
    """The longest prompt by state size, of one training length: geometric mean over seeds."""
    known = lengths.isel(run=(lengths > 0).values)
    x = np.unique(known["entries"].values)
    y = [np.exp(np.log(known.values[known["entries"].values == n]).mean()) for n in x]
    style: dict[str, Any] = {"color": SHADES[(i + 1) % len(SHADES)], "linestyle": DASHES[i % len(DASHES)]}
    ax.plot(x, y, marker=MARKS[i % len(MARKS)], markersize=3.5, linewidth=1.1, **style)


def _draw_growth(ax: Axes, growth: xr.DataArray, level: float) -> None:
    for i, size in enumerate(choose(np.unique(growth["state_size"].values), 6)):
        of_size = growth.isel(run=((growth["state_size"] == size) & growth.notnull()).values)
        x = np.unique(of_size["train_length"].values)
        cells = [np.log(of_size.values[of_size["train_length"].values == length]) for length in x]
        low, middle, high = (np.exp([f(c) for c in cells]) for f in (np.min, np.mean, np.max))
        style: dict[str, Any] = {"color": SHADES[i % len(SHADES)], "linestyle": DASHES[i % len(DASHES)]}
        ax.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        ax.plot(x, middle, marker=MARKS[i % len(MARKS)], markersize=3.5, label=f"N = {size}", **style)
    ax.axhline(level, **BOUND)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    lengths = np.unique(growth["train_length"].values)
    ax.set_xticks(lengths, [short_number(v, 1024) for v in lengths])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
    ax.set(xlabel="training length (tokens)", ylabel="loss far beyond / at its end")


def _draw_crossings(ax: Axes, all_found: list[xr.Dataset], steps: Sequence[int]) -> None:
    """Thresholds of every budget, the largest first, and laws fitted to that."""
    found, *others = all_found
    known = _known(found, "threshold")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    lengths = found["train_length"].values
    _draw_points(ax, known, "threshold", (lengths[0], lengths[-1]), f"{steps[0]:,} steps")
    _draw_above(ax, found, float(lengths[-1]))
    for one, n in zip(others, steps[1:], strict=True):
        hollow = {"color": "0.4", "markerfacecolor": "white"}
        ends = (lengths[0], lengths[-1])
        _draw_points(ax, _known(one, "threshold"), "threshold", ends, f"{n:,} steps", **hollow)
    x, y = known["entries"].values.astype(float), known["threshold"].values
    if len(x) >= 3 and np.ptp(y) > 0:
        fits = fit_laws(x, y)
        grid = np.geomspace(x.min(), x.max(), 100)
        for name, style in (("linear", ":"), ("power", "-")):
            p = fits["value"].sel(law=name).values[: LAWS[name].parameters]
            label = "linear" if name == "linear" else f"power, exponent {p[1]:.2f}"
            fitted = LAWS[name].predict(p, grid)
            ax.plot(
                grid, np.where(fitted > 0, fitted, np.nan), style, color="0.3", linewidth=1.1, label=label
            )
    if found.sizes["entries"]:
        ax.set_xticks(found["entries"].values, [short_number(v) for v in found["entries"].values])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v, 1024)))


def _draw_above(ax: Axes, found: xr.Dataset, longest: float) -> None:
    """Arrows from the low end upwards, of the sizes whose threshold is not reached by the longest length."""
    above = found.isel(entries=np.isposinf(found["threshold"].values))
    if above.sizes["entries"]:
        y = np.clip(above["low"].values, None, longest)
        reach = [np.zeros_like(y), longest - y]
        ax.errorbar(above["entries"], y, reach, fmt="none", ecolor="tab:red", capsize=0, zorder=4)
        ax.plot(above["entries"], np.full_like(y, longest), "^", color="tab:red", label="above all")


def _known(found: xr.Dataset, name: str) -> xr.Dataset:
    values = found[name].values
    return found.isel(entries=np.isfinite(values) & (values > 0))


def _draw_points(
    ax: Axes, known: xr.Dataset, name: str, bounds: tuple[float, float], label: str, **how: Any
) -> None:
    if not known.sizes["entries"]:
        return
    y = known[name].values
    low, high = np.clip(known["low"].values, bounds[0], y), np.clip(known["high"].values, y, bounds[1])
    style: dict[str, Any] = {
        "color": "tab:red",
        "markersize": 4.5,
        "capsize": 3,
        "zorder": 4,
        "label": label,
    } | how
    ax.errorbar(known["entries"].values, y, [y - low, high - y], fmt="s", **style)


def _draw_beside(ax: Axes, found: xr.Dataset, name: str, of_paper: str, label: str = "here") -> None:
    """Points of ours and, far to the right, the paper's with its law."""
    known = _known(found, name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _draw_points(ax, known, name, (1, np.inf), label)
    _draw_paper(ax, of_paper)


def _draw_paper(ax: Axes, of_paper: str) -> None:
    """Points and law of the paper, on logarithmic axes."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    points = paper_points()
    points = points.isel(model=(points[of_paper] > 0).values)
    for trained, face, label in ((1, "black", "the paper's models"), (0, "white", "its prediction")):
        some = points.isel(model=(points["measured"] == trained).values)
        style: dict[str, Any] = {"color": "black", "markerfacecolor": face, "markersize": 4.5}
        ax.plot(some["entries"], some[of_paper], "D", label=label, **style)
    law = paper_forget if of_paper == "forget_length" else paper_recall
    zero = -FORGET["intercept"] / FORGET["slope"] * 1e6
    grid = np.geomspace(1.001 * zero if law is paper_forget else 5e5, 2.5e7, 200)
    ax.plot(grid, law(grid)[0], color="black", linewidth=1, label="the paper's law")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v)))
        axis.set_minor_formatter(NullFormatter())


def _draw_recalled(ax: Axes, passkeys: xr.DataArray, length: int, i: int) -> None:
    if not passkeys.sizes["run"]:
        return
    curve = passkeys.mean(("run", "depth")).dropna("length")
    style: dict[str, Any] = {"color": SHADES[(i + 1) % len(SHADES)], "linestyle": DASHES[i % len(DASHES)]}
    ax.plot(curve["length"], curve, linewidth=1.3, label=f"{length:,}", **style)
    if length in curve["length"]:
        mark = {"markersize": 4.5, "markeredgecolor": "white", "color": style["color"]}
        ax.plot(length, float(curve.sel(length=length)), MARKS[i % len(MARKS)], **mark)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_number(v, 1024)))
