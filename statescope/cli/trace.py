"""``statescope trace`` and ``statescope info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescope.cli import given
from statescope.cli.app import app
from statescope.cli.describe import describe, describe_batch


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="A bundled checkpoint, a folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the record.")],
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT_OR_FILE", help="A text, a UTF-8 file, or - for standard input."),
    ] = None,
    newlines: Annotated[int | None, typer.Option(help="Instead of a text: so many line breaks.")] = None,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a record that is there.")] = False,
) -> None:
    """Read a text with a model and record its recurrent states."""
    with given.plain_errors():
        if (text is None) == (newlines is None):
            raise ValueError("give either a text or --newlines")
        content: Any = newlines if text is None else given.read_text(text)
        import statescope
        from statescope.experiments.newlines import newlines as trace_newlines

        reads: Any = statescope.trace if newlines is None else trace_newlines
        chosen = given.watched(layers=layers, heads=heads, snapshots=snapshots, probes=probes)
        if chosen["probes"] is not None:
            chosen["probes"] = statescope.Probes(chosen["probes"], reach)
        reads(
            model,
            content,
            tokenizer=tokenizer,
            store=output,
            window=window,
            segment=segment,
            backend=backend,
            device=device,
            dtype=dtype,
            train_length=train_length,
            overwrite=overwrite,
            **chosen,
        )
        describe(output)


@app.command()
def info(store: Annotated[str, typer.Argument(help="A record, or the folder or URL of a batch.")]) -> None:
    """Say what a record holds, or what became of a batch."""
    with given.plain_errors():
        from statescope.batch.collection import is_collection

        if is_collection(store):
            describe_batch(store)
        else:
            describe(Path(store))
