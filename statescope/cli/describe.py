"""What a record holds, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def describe(store: Path) -> None:
    """Print what a record holds."""
    import statescope
    from statescope.report.facts import facts, progress

    record: Any = statescope.open(store)
    files = [store] if store.is_file() else [p for p in store.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files) / 2**20
    lines = {"record": f"{store} ({size:.1f} MiB, {len(files)} files), {progress(record)}", **facts(record)}
    for name, line in lines.items():
        typer.echo(f"{name:12} {line}")
    _summarise(record)


def describe_batch(place: str) -> None:
    """Print what became of the texts of a batch."""
    from statescope.batch.collection import counts_of

    found = counts_of(place)
    counts = ", ".join(f"{found[status]:,} {status}" for status in ("done", "failed", "pending"))
    typer.echo(f"{'batch':12} {place}: {counts}; {found['tokens']:,} tokens, {found['bytes'] / 1e6:,.1f} MB")
    for name, reason in found["reasons"].items():
        typer.echo(f"{'failed':12} {name}: {reason}")


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
