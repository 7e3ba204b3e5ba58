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
PEERS = ("mamba_ssm", "transformers in torch")
"""Names of rows, as ``scans`` and ``forward`` give them."""

MARKS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))
"""Marker and line of each shape: to be told apart without colour."""

KINDS = {"our scan": ("0.3", ""), "its own scan": ("0.75", "///")}
"""Shade and hatch of a bar, by a word of its name."""

EVEN: dict[str, Any] = {"color": "tab:red", "linewidth": 1, "linestyle": "--"}
"""How the line of equal times is drawn."""


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
    scans = [e for r in results for e in r.get("scan", [])]
    peer = next((p for p in PEERS if any(p in _ours(e) for e in scans)), None)
    scans = [e for e in scans if peer in _ours(e)]
    forwards = [e for r in results for e in r.get("forward", []) if _bars(e)]
    if not scans and not forwards:
        raise ValueError("the result holds no timed scan and no timed forward: there is nothing to draw")
    heights = [3.0] * bool(scans) + [0.9 + 0.25 * len(_bars(e)) for e in forwards]
    with sns.axes_style("ticks"), sns.plotting_context("paper"):
        figure = plt.figure(figsize=(7.5, 0.3 + sum(heights)), layout="constrained")
        panels = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        if peer is not None:
            _draw_scans(panels.pop(0).subplots(), scans, peer)
        for panel, entry in zip(panels, forwards, strict=True):
            _draw_forward(panel.subplots(), entry)
        devices = list(dict.fromkeys(f"{r['device']}, {r['dtype']}" for r in results))
        figure.suptitle("; ".join(devices), fontsize="medium")
        for ax in figure.axes:
            sns.despine(ax=ax)
    return figure


def save(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw results and write the picture."""
    figure = draw(results)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_scans(ax: Axes, entries: list[dict[str, Any]], peer: str) -> None:
    for name, (marker, line) in zip(dict.fromkeys(e["shape"] for e in entries), MARKS * 9, strict=False):
        own = sorted((e for e in entries if e["shape"] == name), key=lambda e: e["tokens"])
        tokens, ratios = [e["tokens"] for e in own], [_ours(e)[peer] for e in own]
        shade = {"130M": "0.65", "370M": "0.45", "1.3B": "0.2", "2.7B": "0"}.get(name, "0")
        label = f"{name}: {own[0]['heads']} heads of {own[0]['value']} x {own[0]['key']}"
        ax.plot(tokens, ratios, marker=marker, linestyle=line, color=shade, label=label, markersize=5)
    ax.axhline(1, **EVEN)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({e["tokens"] for e in entries}))
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_title(f"one layer's scan: ours with all measurements over {peer}", fontsize="medium")
    ax.set(xlabel="tokens", ylabel="ratio of times")
    ax.set_ylim(0, 1.08 * max(1.0, *(_ours(e)[peer] for e in entries)))
    ax.legend(frameon=False)


def _draw_forward(ax: Axes, entry: dict[str, Any]) -> None:
    bars = _bars(entry)
    for at, (name, ratio) in enumerate(bars):
        shade, hatch = next((k for word, k in KINDS.items() if word in name), ("1", ""))
        ax.barh(at, ratio, color=shade, hatch=hatch, edgecolor="black", linewidth=0.6, height=0.7)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        ax.annotate(f"{ratio:.2f}", (ratio, at), (3, 0), textcoords="offset points", va="center", bbox=box)
    ax.axvline(1, zorder=0, **EVEN)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.invert_yaxis()
    ax.margins(x=0.1)
    without = f" without {entry['without']}" if "without" in entry else ""
    ax.set_title(f"whole model: {entry['model']}, {entry['tokens']:,} tokens{without}", fontsize="medium")
    ax.set_xlabel("time over the plain forward of the same model")


def _ours(entry: dict[str, Any]) -> dict[str, float]:
    """Ratios of our scan, on the host's clock."""
    ours = [row for row in entry.get("rows", []) if row["name"] == OURS]
    return ours[0].get("ratios", {}) if ours else {}


def _bars(entry: dict[str, Any]) -> list[tuple[str, float]]:
    """Names of the traces, and their time over the plain forward of the same model."""
    found = []
    for row in entry.get("rows", []):
        model = row["name"].partition(" traced")[0] if " traced" in row["name"] else "transformers"
        ratio = row.get("ratios", {}).get(model)
        if ratio is not None and "traced" in row["name"]:
            found.append((row["name"], ratio))
    return found
