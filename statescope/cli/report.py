"""``statescope report``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from statescope.cli.app import app
from statescope.cli.given import TrainLength, plain_errors


@app.command()
def report(
    store: Annotated[str, typer.Argument(help="A record, or the folder or URL of a batch.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write. Default: report.html.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="File of answers, from statescope passkey: adds their map.")
    ] = None,
    train_length: TrainLength = None,
    format: Annotated[
        str | None, typer.Option(help="html, one file; or md, with pictures beside it. Default: by the name.")
    ] = None,
) -> None:
    """Write one page about a record, or many: the verdict, the facts, the figures and how each was made."""
    with plain_errors():
        missing = [name for name in ("jinja2", "seaborn") if find_spec(name) is None]
        if missing:
            raise ValueError(f"report needs {missing[0]}: pip install 'statescope-ssm[plots]'")
        import matplotlib

        matplotlib.use("Agg")
        from statescope.report.page import write_report

        page = output or Path(f"report.{format or 'html'}")
        written = write_report(store, page, answers=answers, train_length=train_length, format=format)
        typer.echo(f"report: {written[0]}" + (f" (and {len(written) - 1} pictures)" if written[1:] else ""))
