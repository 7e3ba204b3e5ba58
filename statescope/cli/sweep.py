"""``statescope sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli.app import app
from statescope.cli.given import integers, numbers, plain_errors
from statescope.cli.laws import summarise
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
        bool, typer.Option("--small/--full", help="Tiny models, for a CPU, or wider ones, for GPUs.")
    ] = True,
    beyond: Annotated[int, typer.Option(help="Tokens of the long sequences of the evaluation.")] = 2048,
    evaluated: Annotated[int, typer.Option(help="How many long sequences every run reads.")] = 8,
    traced: Annotated[int, typer.Option(help="Tokens over which the states of every run are traced.")] = 4096,
    passkeys: Annotated[str, typer.Option(help="Tokens of the passkey prompts asked, for text.")] = "",
    trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = 16,
    fuse: Annotated[bool, typer.Option(help="Fuse kernels with torch.compile.")] = False,
    together: Annotated[int, typer.Option(help="At most so many runs are trained as one.")] = 64,
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
        grid = Sweep(
            base_config(first | given, devices), sizes, spans, range(seeds), budgets, shares, together
        )
        asked = tuple(integers("passkeys", passkeys or None) or ())
        effort = Effort(beyond, evaluated, fuse=fuse, traced=traced, passkeys=asked, trials=trials)
        places = devices.split(",") if devices else None
        table = run(grid, output, effort=effort, devices=places, workers=workers, finished=_say)
        typer.echo(f"\ntable: {table}")
        summarise([table], output, beyond // 2)
