"""What a record holds, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def describe(store: Path) -> None:
    """Print what a record holds."""
    import statescope

    record: Any = statescope.open(store)
    a, sizes = record.attrs, record["steps"].sizes
    state = (
        "complete" if a["complete"] else f"interrupted after {a['committed']:,} tokens; trace again to go on"
    )
    files = [p for p in store.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files) / 2**20
    window, length = json.loads(a["watch"])["window"], a["train_length"] or "unknown"
    outputs = "the model's own scan" if a["outputs"] == "model" else f"the {a['backend']} kernel"
    lines = {
        "record": f"{store} ({size:.1f} MiB, {len(files)} files), {state}",
        "model": f"{a['model_id']} ({a['model_type']}, {a['dtype']}, training length {length})",
        "text": f"{sizes['sequence']} x {a['tokens']:,} tokens, mean loss {_mean_loss(record)}",
        "steps": f"{sizes['layer']} layers x {sizes['head']} heads, tokens per entry: {window}",
        "outputs": f"by {outputs}, in segments of {a['segment']:,} tokens",
        "measured": f"by the {a['backend']} kernel",
        "created": f"{a['created_at']} by statescope {a['statescope_version']}",
    }
    for group, dim in (("snapshots", "position"), ("probes", "probe")):
        if group in record:
            lines[group] = ", ".join(str(p) for p in record[group][dim].values[:12])
    if a.get("first_nonfinite"):
        lines["non-finite"] = f"first at {a['first_nonfinite']}"
    for name, line in lines.items():
        typer.echo(f"{name:12} {line}")
    _summarise(record)


def _mean_loss(record: Any) -> str:
    loss = float(record["tokens"]["loss"].mean())
    return "unknown" if loss != loss else f"{loss:.3f} nat"


def _summarise(record: Any) -> None:
    """Print the mean of every variable of /steps by layer."""
    steps = record["steps"]
    if not steps.sizes["token"]:
        return
    means = {name: steps[name].mean(("sequence", "token", "head")) for name in steps.data_vars}
    typer.echo("\nmean over tokens and heads")
    typer.echo(f"{'layer':>5} " + " ".join(f"{name:>14}" for name in means))
    for i, layer in enumerate(steps["layer"].values):
        typer.echo(f"{layer:>5} " + " ".join(f"{float(m[i]):>14.4g}" for m in means.values()))
