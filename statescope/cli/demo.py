"""``statescope demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statescope.cli.app import app
from statescope.cli.given import plain_errors


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for records and picture.")] = Path(
        "demo"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace records that are there.")] = False,
) -> None:
    """Trace passkeys inside and beyond the training length with the bundled checkpoints."""
    with plain_errors():
        from statescope.experiments import demo as demonstration

        demonstration.run(output, overwrite=overwrite, say=typer.echo)
