"""``statescope train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli.app import app
from statescope.cli.given import Device, plain_errors

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other setting, as NAME=VALUE (see run.json beside a checkpoint); repeated."
    ),
]


@app.command()
def train(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of checkpoints and table; continued.")
    ],
    stream: Annotated[str, typer.Option(help="recall, or text: bytes with passkeys.")] = "recall",
    corpus: Annotated[str, typer.Option(help="File or folder of texts, for text.")] = "",
    state_size: Annotated[int, typer.Option(help="Keys of a head's state.")] = 16,
    train_length: Annotated[int, typer.Option(help="Tokens of a training sequence; a power of two.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    seed: Annotated[int, typer.Option(help="Draws weights and data.")] = 0,
    settings: Settings = None,
    beyond: Annotated[int, typer.Option(help="Tokens of the long sequences of the evaluation.")] = 16384,
    device: Device = None,
) -> None:
    """Train a small Mamba-2 model; an interrupted run goes on where its state was last kept."""
    with plain_errors():
        from statescope.experiments.training.cell import Effort
        from statescope.experiments.training_length import Sweep, run

        given = {"stream": stream, "corpus": corpus, "steps": steps, **read_settings(settings)}
        given |= {"state_size": state_size, "train_length": train_length, "seed": seed}
        base = base_config(given, device)
        sweep = Sweep(base, [base.state_size], [base.train_length], [base.seed])
        effort = Effort(beyond=beyond, fuse=False)
        table = run(sweep, output, effort=effort, devices=[device] if device else None, finished=_say)
        typer.echo(f"checkpoint: {output / 'runs' / sweep.runs[0].name()}\ntable: {table}")


def base_config(given: dict[str, Any], device: str | None) -> Any:
    """Make a configuration; matrix products are in float32 on a CPU, unless said otherwise."""
    from statescope.experiments.training.config import Config

    if "dtype" not in given:
        import torch

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        given = given | {"dtype": "float32" if on_cpu else "bfloat16"}
    if "warmup" not in given and "steps" in given:
        given = given | {"warmup": max(1, min(50, int(given["steps"]) // 10))}
    return Config.from_json(given)


def read_settings(given: list[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE``; a value is JSON where it can be, else a word."""
    import json

    found: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"set={item!r}; expected NAME=VALUE")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def _say(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        inside, beyond = (_recent(row[part]) for part in ("inside", "beyond"))
        seconds, last = row["made"]["train_seconds"], row["beyond"]["position"][-1]
        typer.echo(
            f"{row['run']} step {row['step']}: recall at short lags {inside:.3f} inside, {beyond:.3f} from"
            f" token {last:,} on ({seconds:.0f} s, {row['made']['runs_together']} runs)"
        )


def _recent(counted: dict[str, Any]) -> float:
    """Share of right answers at the shortest lags, in the last bin of positions that has any."""
    asked, right = ([row[0] for row in counted[name]] for name in ("asked", "right"))
    last = max((i for i, n in enumerate(asked) if n), default=0)
    return float(right[last] / max(asked[last], 1))
