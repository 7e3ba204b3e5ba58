"""``statescope models``."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from statescope.cli.app import app
from statescope.cli.given import plain_errors


class Format(Enum):
    """How to print the table."""

    TEXT = "text"
    MD = "md"


@app.command()
def models(
    form: Annotated[Format, typer.Option("--format", help="As paragraphs, or as Markdown.")] = Format.TEXT,
) -> None:
    """List the models whose recurrent states can be read, by the scan they call."""
    with plain_errors():
        from statescope.supported import as_markdown, as_text

        typer.echo(as_markdown() if form is Format.MD else as_text(), nl=False)
