"""``statescope bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from statescope.cli.app import app
from statescope.cli.given import integers, plain_errors


@app.command()
def bench(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Result file (JSON); the picture is put beside it.")
    ] = Path("bench.json"),
    parts: Annotated[
        str, typer.Option(help="What to measure, of accuracy, scan, forward, stream, families, batch.")
    ] = "accuracy,scan,forward,stream,families",
    shapes: Annotated[
        str,
        typer.Option(
            help="Scans that are timed: of Mamba-2 at 130M, 370M, 1.3B, 2.7B; gated-delta, KDA, GLA, HGRN-2,"
            " RetNet, RWKV-7, Mamba-1."
        ),
    ] = "370M,gated-delta,KDA,GLA,HGRN-2,RetNet,RWKV-7,Mamba-1",
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of the scan, such as 2048,65536. Default: by device.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed rounds of every contestant. Default: 5, on a CPU 3.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Shape or bundled checkpoint of forward and stream. Default: by device.")
    ] = "",
    forward: Annotated[
        int, typer.Option(help="Tokens of the whole model's forward. Default: by device.")
    ] = 0,
    stream: Annotated[
        str | None, typer.Option(help="Tokens of the texts traced to disk. Default: by device.")
    ] = None,
    families: Annotated[
        int | None, typer.Option(help="Tokens read by a small model of every family. Default: by device.")
    ] = None,
    texts: Annotated[int | None, typer.Option(help="Texts of the batch. Default: by device.")] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder on the disk to write records to, and remove again.")
    ] = None,
    draw: Annotated[
        list[Path] | None, typer.Option(help="Measure nothing: draw this result file (may be repeated).")
    ] = None,
) -> None:
    """Verify the kernels here, then time them beside their peers."""
    with plain_errors():
        if draw:
            _draw_results(draw, draw[0].with_suffix(".png"))
            return
        import torch

        from statescope.experiments.bench import command
        from statescope.experiments.bench.settings import Settings

        settings = Settings.of(
            gpu=torch.cuda.is_available(),
            parts=tuple(parts.split(",")),
            shapes=tuple(shapes.split(",")),
            lengths=tuple(integers("lengths", lengths) or ()),
            rounds=rounds,
            model=model,
            forward=forward,
            stream=tuple(integers("stream", stream) or ()),
            families=families,
            texts=texts,
            scratch=scratch,
        )
        result = command.run(settings, output, typer.echo)
        typer.echo(f"\nresult: {output}")
        _draw_results([output], output.with_suffix(".png"))
        if result["failed"]:
            raise typer.Exit(1)


def _draw_results(results: list[Path], picture: Path) -> None:
    content = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    try:
        from statescope.experiments.bench import figure
    except ModuleNotFoundError as error:
        typer.echo(f"no picture: {error.name} is not installed (pip install 'statescope-ssm[plots]')")
        return
    try:
        figure.save(content, picture)
    except ValueError as error:
        typer.echo(f"no picture: {error}")
        return
    typer.echo(f"picture: {picture}")
