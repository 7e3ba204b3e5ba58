"""Figures of passkeys: which are recalled, and what the states hold of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from statescope.analyses.passkey import recall_length
from statescope.analyses.plots.style import ACCURACY, BOUND, TRAIN_LENGTH, below, sheet
from statescope.analyses.probes import share_of
from statescope.analyses.state import overload_ratio


@dataclass(frozen=True)
class PasskeyPanel:
    """One row of :func:`passkey_figure`: a record probed at the question, and what was asked."""

    title: str
    record: xr.DataTree
    sequence: int
    needle: slice
    passkey: str
    answer: str


def passkey_figure(panels: Sequence[PasskeyPanel]) -> Figure:
    """Show, per record, how the states grow and what the passkey's head holds at the question.

    Left: the overload ratio of every head along the text, the worst one beyond the training length (if the
    text is longer) drawn heavy. Right: what the state
    at the question is made of, in the head that holds most of the needle: the running sum over the tokens
    of their shares of its energy.

    Parameters
    ----------
    panels : sequence of PasskeyPanel
        One row each.
    """
    with sheet(len(panels), 2, 10, 2.6 * len(panels), sharex="col") as (figure, axes):
        for row, panel in zip(axes, panels, strict=True):
            _draw_growth(row[0], panel)
            _draw_shares(row[1], panel)
        for ax in axes[-1]:
            ax.set_xlabel("token")
    return figure


def _draw_growth(ax: Axes, panel: PasskeyPanel) -> None:
    ratio = overload_ratio(panel.record).isel(sequence=panel.sequence)
    is_beyond = (ratio["token"] >= panel.record.attrs["train_length"]).values
    judged = ratio.isel(token=is_beyond) if is_beyond.any() else ratio
    worst = _argmax(judged.median("token"))
    # The peak of every 128 tokens: a head that writes and forgets at once would only fill the panel with ink.
    peaks = ratio.coarsen(token=128, boundary="trim", coord_func="max").max()
    heads = peaks.stack(at=("layer", "head")).transpose("token", "at")
    ax.plot(peaks["token"], heads, color="0.8", linewidth=0.7)
    label = f"layer {worst['layer']}, head {worst['head']}"
    ax.plot(peaks["token"], peaks.sel(worst), color="black", linewidth=1.6, label=label)
    ax.axvline(panel.record.attrs["train_length"], **TRAIN_LENGTH, label="training length")
    ax.set(title=panel.title, ylabel="state norm /\nlargest in training", ylim=(0, 2.05))
    ax.margins(x=0)
    ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(0.95, 1.02), ncols=2)


def _draw_shares(ax: Axes, panel: PasskeyPanel) -> None:
    needle = share_of(panel.record, panel.needle.start, panel.needle.stop).isel(
        sequence=panel.sequence, probe=-1
    )
    head = _argmax(needle)
    share = panel.record["probes"]["share"].isel(sequence=panel.sequence, probe=-1).sel(head)
    made_of = 100 * share.cumsum("token")
    ax.fill_between(share["token"], 0, made_of, color="0.85", linewidth=0)
    ax.plot(share["token"], made_of, color="black", linewidth=1.2)
    label = f"the needle: {float(needle.sel(head)):.0%}"
    ax.axvspan(panel.needle.start, panel.needle.stop, color="tab:blue", alpha=0.5, linewidth=0, label=label)
    ax.axvline(panel.record.attrs["train_length"], **TRAIN_LENGTH)
    verdict = "right" if panel.answer == panel.passkey else "wrong"
    ax.set(
        title=f"passkey {panel.passkey}, answered {panel.answer} ({verdict})",
        ylabel=f"made of tokens so far (%)\nlayer {head['layer']}, head {head['head']}",
        ylim=(-3, 108),
    )
    ax.margins(x=0)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.26, 0.9))


def _argmax(values: xr.DataArray) -> dict[str, Any]:
    """The layer and head of the largest value."""
    at = values.compute().argmax(("layer", "head"))
    return {"layer": int(values["layer"][at["layer"]]), "head": int(values["head"][at["head"]])}


def passkey_map(
    answers: xr.Dataset, train_length: int | None = None, threshold: float = 0.95, confidence: float = 0.95
) -> Figure:
    """Show the share of passkeys recalled by depth and length, and the longest context that is recalled.

    Below, the accuracy over all depths with its Wilson interval. Lines stand to the right of the last length
    within: the solid one is the recall length, and the shaded band holds the lengths that are not decided.

    Parameters
    ----------
    answers : Dataset, (length, depth, trial)
        From :func:`statescope.analyses.read_answers`; cells that were not asked are hatched.
    train_length : int, optional
        In tokens. Default: what the answers say; without one no line is drawn.
    threshold, confidence : float
        See :func:`statescope.analyses.recall_length`.

    Notes
    -----
    Source: *Stuffed Mamba* (arXiv 2410.07145), figure 2 and section 4.3.
    """
    given = answers["correct"]
    asked = answers.sortby("length").isel(length=given.notnull().any(("depth", "trial")).values)
    if not asked.sizes["length"]:
        raise ValueError("answers has none yet: ask first")
    found = recall_length(asked, threshold, confidence)
    cells = asked["correct"].mean("trial").transpose("depth", "length")
    train_length = answers.attrs.get("train_length") if train_length is None else train_length
    lengths = asked["length"].values.astype(float)
    height, width = 0.8 + 0.34 * cells.sizes["depth"], max(4.6, 1.9 + 0.5 * len(lengths))
    with sheet(2, 1, width, height + 2.0, sharex=True, height_ratios=(height, 1.4)) as (figure, axes):
        _draw_cells(axes[0, 0], cells)
        _draw_accuracy(axes[1, 0], found, threshold)
        length, low, high = (float(found[f"recall_length{end}"]) for end in ("", "_low", "_high"))
        for ax in axes[:, 0]:
            ax.axvline(
                _after(lengths, length), color="black", linewidth=1.8, label=f"recall length {length:,.0f}"
            )
            if train_length is not None:
                label = f"training length {train_length:,.0f}"
                ax.axvline(_after(lengths, train_length), **TRAIN_LENGTH, label=label)
        bound = f"{high:,.0f}" if np.isfinite(high) else "no upper end"
        ends = (_after(lengths, low), _after(lengths, high) - (high in lengths))
        axes[1, 0].axvspan(
            *ends, color="0.9", linewidth=0, zorder=0, label=f"its interval: {low:,.0f} to {bound}"
        )
        axes[1, 0].set_xlim(-0.56, len(lengths) - 0.44)
        below(figure, axes[1, 0], columns=2)
        axes[1, 0].set_xticks(range(len(lengths)), [f"{n:,.0f}" for n in lengths], rotation=45, ha="right")
        axes[1, 0].set_xlabel("prompt length (tokens)")
    return figure


def _after(lengths: Any, at: float) -> float:
    """Right edge of the last column, of those at 0, 1, 2, ..., whose length is not above ``at``."""
    return float(np.searchsorted(lengths, at, side="right")) - 0.5


def _draw_cells(ax: Axes, cells: xr.DataArray) -> None:
    values = cells.values
    for y, x in np.argwhere(np.isnan(values)):
        ax.add_patch(
            Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor="0.75", hatch="xxx", linewidth=0)
        )
    image = ax.imshow(values, cmap=ACCURACY, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if cells.sizes["length"] > 24:
        ax.figure.colorbar(image, ax=ax, pad=0.02, format=PercentFormatter(1.0))
    else:
        for y, x in np.argwhere(np.isfinite(values)):
            ink = "black" if values[y, x] > 0.55 else "white"
            ax.text(x, y, f"{100 * values[y, x]:.0f}", ha="center", va="center", color=ink, fontsize="small")
    ax.set_yticks(range(cells.sizes["depth"]), [f"{d:g}" for d in cells["depth"].values])
    ax.set(ylabel="depth of the needle", title="passkeys recalled (%)")


def _draw_accuracy(ax: Axes, found: xr.Dataset, threshold: float) -> None:
    value, low, high = (found[f"accuracy{end}"].values for end in ("", "_low", "_high"))
    x = np.arange(len(value))
    ax.errorbar(x, value, [value - low, high - value], fmt="o-", color="black", markersize=4, capsize=2.5)
    ax.axhline(threshold, **BOUND, label=f"{threshold:.0%}")
    ax.set(ylabel="over all depths", ylim=(-0.04, 1.06))
