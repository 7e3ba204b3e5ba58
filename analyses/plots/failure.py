"""The figure of what explains lost passkeys."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statescope.analyses.plots.style import BOUND, MARKS, sheet

MODELS = {"length and depth": ("0.85", ""), "state": ("0.65", "///"), "both": ("0.45", "...")}
"""Shade and hatch by model."""


def failure_figure(explanation: xr.Dataset) -> Figure:
    """Show how well the state tells which passkeys are lost, what it is told by, and if probabilities hold.

    Left: the area under the curve over all prompts, and over pairs of the same length and depth, where 0.5
    is chance. Middle: how much of it is lost where one measure is shuffled. Right: how often prompts succeed
    against the probability they were given.

    Parameters
    ----------
    explanation : Dataset
        From :func:`statescope.analyses.failure.explain_failure`.
    """
    missing = [n for n in ("auc", "auc_same_cell", "importance", "observed") if n not in explanation]
    if missing:
        raise ValueError(f"explanation has no {missing[0]}; pass what explain_failure returns")
    with sheet(1, 3, 11.0, 3.4, width_ratios=(1, 1.05, 1)) as (figure, axes):
        _draw_auc(axes[0, 0], explanation)
        _draw_importance(axes[0, 1], explanation)
        _draw_calibration(axes[0, 2], explanation)
    return figure


def _draw_auc(ax: Axes, found: xr.Dataset) -> None:
    kinds = {"auc": "all prompts", "auc_same_cell": "same length\nand depth"}
    models = [str(m) for m in found["model"].values]
    for i, model in enumerate(models):
        shade, hatch = MODELS.get(model, ("0.6", "xx"))
        for j, name in enumerate(kinds):
            low, value, high = _interval(found.sel(model=model), name)
            x = j + 0.27 * (i - (len(models) - 1) / 2)
            ax.bar(
                x, value - 0.5, 0.25, 0.5, color=shade, edgecolor="white", hatch=hatch,
                label=model if j == 0 else None,
            )  # fmt: skip
            ax.errorbar(x, value, [[value - low], [high - value]], color="black", capsize=2.5, linewidth=1)
            ax.text(x, high + 0.012, f"{value:.2f}", ha="center", fontsize="x-small")
    ax.axhline(0.5, **BOUND)
    ax.set_xticks(range(len(kinds)), list(kinds.values()))
    ax.set(ylabel="area under the curve (0.5: chance)", ylim=(min(0.45, ax.get_ylim()[0]), 1.0))
    ax.legend(frameon=False, fontsize="small", loc="upper right")


def _draw_importance(ax: Axes, found: xr.Dataset) -> None:
    ordered = found.sortby("importance")
    names = [str(n).replace("_", " ") for n in ordered["measure"].values]
    low, value, high = (ordered[f"importance{end}"].values for end in ("_low", "", "_high"))
    y = np.arange(len(names))
    ax.barh(y, value, 0.62, color="0.7", edgecolor="0.3")
    ax.errorbar(
        value, y, xerr=[value - low, high - value], color="black", linestyle="none", capsize=2.5, linewidth=1
    )
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(y, names)
    ax.set_xlabel("area lost where the measure is shuffled")


def _draw_calibration(ax: Axes, found: xr.Dataset) -> None:
    ax.plot([0, 1], [0, 1], **BOUND)
    shift = {"length and depth": -0.006, "both": 0.006}
    for mark, model in zip(MARKS[1:], shift, strict=False):
        part: Any = found.sel(model=model)
        low, value, high = _interval(part, "observed")
        known = np.isfinite(value)
        filled = model == "both"
        ax.errorbar(
            part["predicted"].values[known] + shift[model],
            value[known],
            [(value - low)[known], (high - value)[known]],
            marker=mark,
            color="black" if filled else "0.5",
            markerfacecolor="black" if filled else "white",
            linestyle="-" if filled else "--",
            linewidth=0.9,
            markersize=4.5,
            capsize=2,
            label=model,
        )
    ax.set(
        xlabel="predicted probability",
        ylabel="share answered rightly",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    ax.legend(frameon=False, fontsize="small", loc="upper left")


def _interval(found: xr.Dataset, name: str) -> tuple[Any, Any, Any]:
    low, value, high = (found[name + end].values for end in ("_low", "", "_high"))
    return low, value, high
