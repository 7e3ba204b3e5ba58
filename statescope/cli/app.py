"""The application all commands belong to."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look inside the recurrent state of a language model while it reads.",
)
