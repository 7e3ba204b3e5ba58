"""Figures of records (matplotlib, seaborn)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from statescope.analyses import overload_ratio, share_of

TRAIN_LENGTH: dict[str, Any] = {"color": "tab:red", "linestyle": "--", "linewidth": 1.2}
"""How the training length is drawn, in every figure."""


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

    Left: the overload ratio of every head along the text, the worst one drawn heavy. Right: what the state
    at the question is made of, in the head that holds most of the needle: the running sum over the tokens
    of their shares of its energy.

    Parameters
    ----------
    panels : sequence of PasskeyPanel
        One row each.
    """
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure, axes = plt.subplots(
            len(panels), 2, figsize=(10, 2.6 * len(panels)), squeeze=False, layout="constrained", sharex="col"
        )
        for row, panel in zip(axes, panels, strict=True):
            _draw_growth(row[0], panel)
            _draw_shares(row[1], panel)
        for ax in axes[-1]:
            ax.set_xlabel("token")
        sns.despine(figure)
    return figure


def _draw_growth(ax: Axes, panel: PasskeyPanel) -> None:
    ratio = overload_ratio(panel.record).isel(sequence=panel.sequence)
    beyond = ratio.isel(token=(ratio["token"] >= panel.record.attrs["train_length"]).values)
    worst = _argmax(beyond.median("token"))
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
    at = values.argmax(("layer", "head"))
    return {"layer": int(values["layer"][at["layer"]]), "head": int(values["head"][at["head"]])}
