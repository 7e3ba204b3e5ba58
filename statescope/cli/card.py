"""``statescope pack`` and ``statescope card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli.app import app
from statescope.cli.given import integers, numbers, plain_errors, read_file


@app.command()
def pack(
    run: Annotated[Path, typer.Argument(help="Folder of a run, from statescope train or sweep.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    table: Annotated[
        Path | None, typer.Option(help="Table with the run. Default: the sweep's, if the run is still there.")
    ] = None,
) -> None:
    """Pack a trained run into a checkpoint to be passed on: mamba_ssm's format, half the bytes."""
    with plain_errors():
        from statescope.experiments.packing import pack as write

        write(run, output, table)
        size = sum(p.stat().st_size for p in output.iterdir())
        typer.echo(f"checkpoint: {output} ({size / 1e6:.1f} MB); measure it with statescope card {output}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A byte-level checkpoint, such as statescope pack writes.")],
    haystack: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: a text to hide passkeys in besides the paper's filler; repeated."),
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(help="Another packed checkpoint to ask the same, for comparison.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "512,1024,2048,4096",
    depths: Annotated[str, typer.Option(help="The needle: 0 (start) to 1 (end).")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Prompts of each length and depth.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws the passkeys.")] = 0,
) -> None:
    """Measure what a checkpoint recalls and what its states do, and write its card beside it."""
    with plain_errors("stopped; nothing was written"):
        sizes, places = sorted(set(integers("lengths", lengths))), numbers("depths", depths)
        texts = {}
        for given in haystack or []:
            name, equals, file = given.partition("=")
            if not equals:
                raise ValueError(f"haystack={given!r}; expected NAME=FILE")
            texts[name] = read_file("haystack", Path(file))
        from statescope.experiments.cards import README, shows, write_card

        grid: Any = {"lengths": sizes, "depths": places, "trials": trials, "seed": seed}
        written = write_card(folder, texts, beside=beside, **grid)
        typer.echo("\n".join(shows(written)))
        typer.echo(f"card: {folder / README}")
