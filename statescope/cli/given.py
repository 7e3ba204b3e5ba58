"""What is given on the command line: read, checked, complained about in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Integers = Annotated[str | None, typer.Option(help="Integers or ranges, such as 0,3,8:12 or 127:4096:128.")]


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
