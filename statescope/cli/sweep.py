"""``statescope sweep``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli.app import app
from statescope.cli.given import integers, numbers, plain_errors
from statescope.cli.train import Settings, _say, base_config, read_settings

SMALL: dict[str, Any] = {
    "width": 32,
    "head_size": 16,
    "row": 64,
    "rows": 16,
    "keys": 256,
    "values": 16,
    "chunk": 32,
    "learning_rate": 1e-2,
}
"""Settings with which a grid takes minutes on two cores; ``--set`` goes before them."""


@app.command()
def sweep(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of table and checkpoints; continued.")
    ],
    states: Annotated[str, typer.Option(help="State sizes, N.")] = "4,8,16",
    lengths: Annotated[str, typer.Option(help="Training lengths, tokens; powers of two.")] = "16,32,64",
    seeds: Annotated[int, typer.Option(help="Runs of every cell, from seed 0.")] = 2,
    steps: Annotated[str, typer.Option(help="Training budgets, in steps.")] = "600",
    uniforms: Annotated[str, typer.Option(help="Shares of uniform lags.")] = "0",
    stream: Annotated[str, typer.Option(help="recall, or text: bytes with passkeys.")] = "recall",
    corpus: Annotated[str, typer.Option(help="File or folder of texts, for text.")] = "",
    settings: Settings = None,
    small: Annotated[
        bool, typer.Option(help="Tiny models, for a CPU; --full: those of the paper's lab.")
    ] = True,
    beyond: Annotated[int, typer.Option(help="Tokens of the long sequences of the evaluation.")] = 2048,
    evaluated: Annotated[int, typer.Option(help="How many long sequences every run reads.")] = 8,
    passkeys: Annotated[str, typer.Option(help="Tokens of the passkey prompts asked, for text.")] = "",
    trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = 16,
    fuse: Annotated[bool, typer.Option(help="Fuse kernels with torch.compile.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that trace checkpoints.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="Such as cuda:0,cuda:1. Default: all GPUs, or the CPU.")
    ] = None,
) -> None:
    """Train a grid of state sizes and training lengths, and say from which length on a state forgets.

    As it stands it takes some minutes on two cores. What is finished is never trained again.
    """
    with plain_errors():
        sizes, spans = integers("states", states), integers("lengths", lengths)
        budgets, shares = integers("steps", steps), numbers("uniforms", uniforms)
        from statescope.experiments.training.cell import Effort
        from statescope.experiments.training_length import Sweep, run

        given = {"stream": stream, "corpus": corpus, **(SMALL if small else {}), **read_settings(settings)}
        first = {"steps": min(budgets), "state_size": sizes[0], "train_length": spans[0]}
        grid = Sweep(base_config(first | given, devices), sizes, spans, range(seeds), budgets, shares)
        asked = tuple(integers("passkeys", passkeys or None) or ())
        effort = Effort(beyond=beyond, rows=evaluated, fuse=fuse, passkeys=asked, trials=trials)
        places = devices.split(",") if devices else None
        table = run(grid, output, effort=effort, devices=places, workers=workers, finished=_say)
        typer.echo(f"\ntable: {table}")
        summarise(table, output, beyond)


def summarise(table: Path, output: Path, beyond: int) -> None:
    """Print which runs forget, write what follows from it, and draw it."""
    from statescope.analyses.findings import budgets, findings
    from statescope.analyses.runs import read_runs
    from statescope.analyses.thresholds import learned_to_forget, thresholds

    runs = read_runs(table)
    for kind, some in budgets(runs):
        found = thresholds(learned_to_forget(some, far=beyond // 2), size="state_size")
        typer.echo(f"\nruns that forget, of {_name(kind)}, by state and training length")
        typer.echo(f"{'N':>6}" + "".join(f"{t:>9}" for t in found["train_length"].values) + "   threshold")
        for n in found["state_size"].values:
            row = found.sel(state_size=n)
            cells = zip(row["fraction"].values, row["runs"].values, strict=True)
            shares = "".join(f"{'-' if not k else f'{f * k:.0f}/{k:.0f}':>9}" for f, k in cells)
            typer.echo(f"{n:>6}{shares}   {_between(row)}")
    said = output / "findings.json"
    said.write_text(json.dumps(findings(runs, far=beyond // 2), indent=1), encoding="utf-8")
    typer.echo(f"\nfindings: {said}")
    if find_spec("seaborn") is None:
        typer.echo("no pictures: seaborn is not installed (pip install 'statescope-ssm[plots]')")
        return
    for kind, some in budgets(runs):
        _draw(some, output, _name(kind), beyond)


def _name(kind: dict[str, Any]) -> str:
    return f"{kind['stream']}-b{kind['steps']}-u{kind['uniform']:g}"


def _between(row: Any) -> str:
    last, first = float(row["last_failing"]), float(row["first_passing"])
    if last == 0:
        return f"at most {first:g}" if first < float("inf") else "not known"
    return f"above {last:g}" if first == float("inf") else f"{last:g} to {first:g}"


def _draw(runs: Any, output: Path, name: str, beyond: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from statescope.analyses.plots.laws import position_figure, threshold_figure

    for kind, figure in (
        ("positions", position_figure(runs)),
        ("thresholds", threshold_figure(runs, far=beyond // 2)),
    ):
        path = output / f"{kind}-{name}.png"
        figure.savefig(path, dpi=150)
        typer.echo(f"picture: {path}")
