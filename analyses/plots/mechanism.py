"""The figure of what states learn along training, beside what is recalled beyond the training length."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from statescope.analyses.plots.laws import DASHES, SHADES, choose
from statescope.analyses.plots.style import log_axis, sheet
from statescope.analyses.runs import FAR
from statescope.analyses.thresholds import recent_recall

PANELS = {
    "inside": "recent recall\ninside",
    "far": "recent recall\nfar beyond",
    "inside_retention": "retention over\nthe training length",
    "inside_live_memories": "live memories at\nthe training length",
}


def mechanism_figure(table: xr.Dataset, far: int = FAR, most: int = 6) -> Figure:
    """Show along training: recall of recent pairs inside and far beyond, retention, and live memories.

    One curve a training length, the median over seeds, its band their range. Of the heads, retention and
    live memories are those of the head with most.

    Parameters
    ----------
    table : Dataset
        Runs of one state size with rows at several steps.
    far : int
        Tokens from which on positions count as far beyond.
    most : int
        At most so many training lengths are drawn.

    Raises
    ------
    ValueError
        If the runs are of several state sizes.
    """
    sizes = np.unique(table["state_size"].values)
    if len(sizes) != 1:
        raise ValueError(f"table has runs of state sizes {sizes.tolist()}; choose one")
    recalled = recent_recall(table, far)
    measures = {
        name: recalled[name] if name in recalled else table[name].max(("layer", "head")) for name in PANELS
    }
    lengths = choose(np.unique(table["train_length"].values), most)
    with sheet(2, 2, 7.4, 4.6, sharex=True) as (figure, axes):
        for ax, (name, label) in zip(axes.flat, PANELS.items(), strict=True):
            for i, length in enumerate(lengths):
                of_length = measures[name].isel(run=(table["train_length"] == length).values)
                by_step = of_length.groupby("step")
                low, middle, high = (by_step.quantile(q) for q in (0.0, 0.5, 1.0))
                style = {"color": SHADES[i % len(SHADES)], "linestyle": DASHES[i % len(DASHES)]}
                ax.fill_between(low["step"], low, high, color=style["color"], alpha=0.15, linewidth=0)
                ax.plot(middle["step"], middle, linewidth=1.3, marker=".", label=f"{length:,}", **style)
            ax.set(ylabel=label, xscale="log")
        log_axis(axes[1, 1])
        steps = choose(np.unique(table["step"].values), 5)
        for ax in axes[-1]:
            ax.set_xlabel("training step")
            ax.set_xticks(steps, [f"{step:,}" for step in steps])
            ax.xaxis.set_minor_formatter(NullFormatter())
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
