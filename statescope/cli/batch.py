"""``statescope batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statescope.cli import given
from statescope.cli.app import app


@app.command()
def batch(
    inputs: Annotated[
        Path, typer.Argument(help="A .jsonl, .csv or .parquet file, a saved dataset, a folder of text files.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="A bundled checkpoint, a folder or a hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DUMPS", help="Folder or URL (s3://...) of the records.")
    ],
    text: Annotated[str, typer.Option(help="Column of the texts, strings or lists of token ids.")] = "text",
    id: Annotated[str | None, typer.Option(help="Column of the ids. Default: id, or the row.")] = None,
    pattern: Annotated[str, typer.Option(help="Which files of a folder.")] = "**/*.txt",
    workers: Annotated[
        int | None, typer.Option(help="Processes. Default: one for each GPU, else one for each two cores.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a running Dask scheduler, for its workers instead.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read so many texts at most.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n runs that share the work.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Read again what failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a sample, estimate time and bytes, write nothing.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Read no texts together: bit for bit what trace gives.")
    ] = False,
    commit: Annotated[
        Path | None,
        typer.Option(help="Icechunk repository that takes all that is done as one version, at the end."),
    ] = None,
    tokenizer: given.Tokenizer = None,
    layers: given.Integers = None,
    heads: given.Integers = None,
    snapshots: given.Integers = None,
    probes: given.Integers = None,
    reach: given.Reach = None,
    window: given.Window = 1,
    segment: given.Segment = None,
    backend: given.Backend = "auto",
    device: given.Device = None,
    dtype: given.Dtype = None,
    train_length: given.TrainLength = None,
) -> None:
    """Trace many texts with many workers, each into a record of its own; run again to go on."""
    with given.plain_errors("stopped; everything finished is kept: run the same command again to go on"):
        from statescope.batch.command import batch as run
        from statescope.batch.estimate import estimate
        from statescope.batch.settings import Settings
        from statescope.batch.snapshots import commit as commit_to
        from statescope.batch.snapshots import installed

        if commit is not None:
            installed()
        watched = given.watched(layers=layers, heads=heads, snapshots=snapshots, probes=probes)
        settings = Settings(
            model=model,
            tokenizer=tokenizer,
            **{name: None if span is None else tuple(span) for name, span in watched.items()},
            reach=reach,
            window=window,
            segment=segment,
            backend=backend,
            device=device,
            dtype=dtype,
            train_length=train_length,
            alone=alone,
        )
        which = {"text": text, "id": id, "pattern": pattern, "limit": limit, "shard": shard}
        which |= {"retry_failed": retry_failed, "workers": workers}
        if dry_run:
            for line in estimate(inputs, output, settings, **which).lines():  # type: ignore[arg-type]
                typer.echo(line)
            return
        found = run(inputs, output, settings, scheduler=scheduler, say=typer.echo, **which)  # type: ignore[arg-type]
        for line in found.lines():
            typer.echo(line)
        if commit is not None and found.done:
            typer.echo(f"committed to {commit}: snapshot {commit_to(output, commit)}")
        if not found.complete:
            raise typer.Exit(1)
