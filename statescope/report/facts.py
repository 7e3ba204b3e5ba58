"""What a record holds, in words."""

from __future__ import annotations

import json

import xarray as xr


def facts(record: xr.DataTree) -> dict[str, str]:
    """Say, by name, what a record is about and how it was made."""
    a, sizes = record.attrs, record["steps"].sizes
    window, length = json.loads(a["watch"])["window"], a["train_length"] or "unknown"
    outputs = "the model's own scan" if a["outputs"] == "model" else f"the {a['backend']} kernel"
    lines = {
        "model": f"{a['model_id']} ({a['model_type']}, {a['dtype']}, training length {length})",
        "text": f"{sizes['sequence']} x {a['tokens']:,} tokens, mean loss {_mean_loss(record)}",
        "steps": f"{sizes['layer']} layers x {sizes['head']} heads, tokens per entry: {window}",
        "outputs": f"by {outputs}, in segments of {a['segment']:,} tokens",
        "measured": f"by the {a['backend']} kernel",
        "created": f"{a['created_at']} by statescope {a['statescope_version']}",
    }
    for group, dim in (("snapshots", "position"), ("probes", "probe")):
        if group in record.children:
            positions = record[group].to_dataset()[dim].values
            lines[group] = ", ".join(str(p) for p in positions[:12]) + (
                ", ..." if positions.size > 12 else ""
            )
    if a.get("first_nonfinite"):
        lines["non-finite"] = f"first at {a['first_nonfinite']}"
    return lines


def progress(record: xr.DataTree) -> str:
    """Say whether a record is complete."""
    if record.attrs["complete"]:
        return "complete"
    return f"interrupted after {record.attrs['committed']:,} tokens; trace again to go on"


def _mean_loss(record: xr.DataTree) -> str:
    loss = float(record["tokens"]["loss"].mean())
    return "unknown" if loss != loss else f"{loss:.3f} nat"
