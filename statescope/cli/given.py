"""What is given on the command line: read, checked, complained about in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# Options that several commands have.
Integers = Annotated[str | None, typer.Option(help="Integers or ranges, such as 0,3,8:12 or 127:4096:128.")]
Tokenizer = Annotated[str | None, typer.Option(help="Hub id, folder, tokenizer.json or bytes.")]
Reach = Annotated[int | None, typer.Option(help="Tokens before each probe that get a share. Default: all.")]
Window = Annotated[int, typer.Option(help="Tokens per entry of /steps.")]
Segment = Annotated[int | None, typer.Option(help="Tokens of one forward pass.")]
Backend = Annotated[str, typer.Option(help="auto, model, or the name of a kernel.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...")]
TrainLength = Annotated[int | None, typer.Option(help="Tokens the model was trained at.")]


@contextmanager
def plain_errors(
    stopped: str = "stopped; run the same command again to go on from the last commit",
) -> Iterator[None]:
    """Show what a user can mend as one line, without a traceback, and nothing of transformers' advice."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo(stopped, err=True)
        raise typer.Exit(130) from error


def read_text(text: str) -> str:
    """Read a file or standard input, or take the text as it is."""
    if text == "-":
        return sys.stdin.read()
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # a text too long, or of characters no path has
        is_file = False
    if not is_file:
        return text
    return read_file("text", Path(text))


def read_file(name: str, path: Path) -> str:
    """Read a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def numbers(name: str, given: str) -> list[float]:
    """Read ``0,0.5,1``."""
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}={given!r}; expected numbers, such as 0,0.5,1") from error


def watched(**spans: str | None) -> dict[str, Any]:
    """Read layers, heads, snapshots and probes, each as :func:`integers` does."""
    return {name: integers(name, span) for name, span in spans.items()}


def integers(name: str, given: str | None) -> Any:
    """Read ``0,3,8:12``: integers and ranges with Python's meaning."""
    if given is None:
        return None
    found: list[int] = []
    try:
        for part in given.split(","):
            bounds = [int(x) if x else None for x in part.split(":")]
            if len(bounds) == 1 and bounds[0] is not None:
                found.append(bounds[0])
            elif len(bounds) in (2, 3) and bounds[1] is not None:
                found.extend(range(bounds[0] or 0, bounds[1], (bounds[2:] or [1])[0] or 1))
            else:
                raise ValueError(part)
    except ValueError as error:
        raise ValueError(
            f"{name}={given!r}; expected integers or start:stop[:step], such as 0,3,8:12"
        ) from error
    return found
