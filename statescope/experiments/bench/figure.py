"""A picture of result files, drawn from the JSON alone (matplotlib, seaborn; no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

OURS = "statescope, y and measurements"

MARKS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))
"""Marker and line of each shape: to be told apart without colour."""


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Draw the scan's time over its peer's against length, and the time of traces over plain forwards.

    Parameters
    ----------
    results : sequence of dict
        Result files; their entries are drawn together.

    Raises
    ------
    ValueError
        If none of them holds a timed scan or forward.
    """
    scans = [e for r in results for e in r.get("scan", []) if _scan_ratio(e) is not None]
    forwards = [e for r in results for e in r.get("forward", []) if _bars(e)]
    if not scans and not forwards:
        raise ValueError("the result holds no timed scan and no timed forward: there is nothing to draw")
    bars = [len(_bars(e)) for e in forwards]
    heights = [3.0] * bool(scans) + [0.7 + 0.3 * n for n in bars]
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure, axes = plt.subplots(
            len(heights), 1, figsize=(7.5, sum(heights)), squeeze=False, layout="constrained",
            height_ratios=heights,
        )  # fmt: skip
        column = list(axes[:, 0])
        if scans:
            _draw_scans(column.pop(0), scans)
        for ax, entry in zip(column, forwards, strict=True):
            _draw_forward(ax, entry)
        devices = list(dict.fromkeys(f"{r['device']}, {r['dtype']}" for r in results))
        figure.suptitle("; ".join(devices), fontsize="medium")
        sns.despine(figure)
    return figure


def save(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw results and write the picture."""
    figure = draw(results)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_scans(ax: Axes, entries: list[dict[str, Any]]) -> None:
    peers = {_scan_ratio(e)[0] for e in entries}  # type: ignore[index]
    for name, (marker, line) in zip(dict.fromkeys(e["shape"] for e in entries), MARKS * 9, strict=False):
        own = sorted((e for e in entries if e["shape"] == name), key=lambda e: e["tokens"])
        tokens, ratios = [e["tokens"] for e in own], [_scan_ratio(e)[1] for e in own]  # type: ignore[index]
        shade = {"130M": "0.6", "370M": "0.4", "1.3B": "0.2", "2.7B": "0"}.get(name, "0")
        label = f"{name}: {own[0]['heads']} heads"
        ax.plot(tokens, ratios, marker=marker, linestyle=line, color=shade, label=label, markersize=5)
    ax.axhline(1, color="tab:red", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({e["tokens"] for e in entries}))
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set(
        xlabel="tokens",
        ylabel=f"time of our scan with all measurements\nover that of {' or '.join(sorted(peers))}",
    )
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)


def _draw_forward(ax: Axes, entry: dict[str, Any]) -> None:
    bars = _bars(entry)
    kinds = {"our scan": ("0.25", ""), "its own scan": ("0.65", "///")}
    for at, (name, _, ratio) in enumerate(bars):
        shade, hatch = next((k for word, k in kinds.items() if word in name), ("1", ""))
        ax.barh(at, ratio, color=shade, hatch=hatch, edgecolor="black", linewidth=0.6, height=0.7)
        ax.annotate(f"{ratio:.2f}", (ratio, at), (3, 0), textcoords="offset points", va="center")
    ax.axvline(1, color="tab:red", linewidth=1)
    ax.set_yticks(range(len(bars)), [name for name, *_ in bars])
    ax.invert_yaxis()
    ax.margins(x=0.08)
    baseline = bars[0][1]
    without = f" without {entry['without']}" if "without" in entry else ""
    ax.set_title(f"{entry['model']}, {entry['tokens']:,} tokens{without}", fontsize="medium")
    ax.set_xlabel(f"time of a forward over the plain one of {baseline}")


def _scan_ratio(entry: dict[str, Any]) -> tuple[str, float] | None:
    """Our scan's ratio to the first peer that was timed, on the host's clock."""
    ours = [row for row in entry.get("rows", []) if row["name"] == OURS]
    return next(iter(ours[0].get("ratios", {}).items()), None) if ours else None


def _bars(entry: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Names, baseline and ratios of the traces, and of another peer's plain forward."""
    found = []
    for row in entry.get("rows", []):
        ratios = row.get("ratios", {})
        if row["name"] != "transformers" and "transformers" in ratios and "zarr" not in row["name"]:
            name = row["name"] if "traced" in row["name"] else f"{row['name']}, plain"
            found.append((name, "transformers", ratios["transformers"]))
    return found
