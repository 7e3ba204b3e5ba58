"""Write the page: HTML in one file, or Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

import statescope.record
from statescope.analyses import read_answers
from statescope.batch.collection import is_collection
from statescope.report.corpus import corpus_content
from statescope.report.facts import facts, progress
from statescope.report.sections import Section, sections
from statescope.report.verdict import judge

FORMATS = {".html": "html", ".htm": "html", ".md": "md"}


def write_report(
    store: str | Path,
    output: str | Path,
    *,
    answers: str | Path | None = None,
    train_length: int | None = None,
    format: str | None = None,
) -> list[Path]:
    """Write one page about a record: the verdict first, then facts, worst heads and figures.

    Parameters
    ----------
    store : str or Path
        A record, or what ``statescope batch`` wrote.
    output : str or Path
        The page to write. HTML holds everything and loads nothing; beside a Markdown file its pictures are
        written, ``NAME-FIGURE.png``.
    answers : str or Path, optional
        File of passkey answers, for their map.
    train_length : int, optional
        In tokens. Default: the record's own; without one the report says that it cannot judge.
    format : str, optional
        ``"html"`` or ``"md"``. Default: by the name of ``output``.

    Returns
    -------
    list of Path
        What was written, the page first.

    Raises
    ------
    ValueError, FileNotFoundError
        If record or answers cannot be read, or the format is not known. Nothing is written then.
    """
    output = Path(output)
    format = _format(output, format)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}")
    if is_collection(store):
        if answers is not None:
            raise ValueError("answers go with one record, not with a collection")
        content = corpus_content(store, train_length)
        return _write(output, format, content)
    record = statescope.record.open(store)
    if not record["steps"].sizes["token"]:
        raise ValueError(f"store={str(store)!r} has no tokens yet: nothing is committed")
    table = None if answers is None else read_answers(answers)
    length = record.attrs["train_length"] if train_length is None else train_length
    verdict = judge(record, length, table)
    figures = list(sections(record, length, train_length, verdict.judged, table))
    content = {
        "verdict": verdict,
        "facts": _facts(store, record, train_length, answers),
        "figures": figures,
        "setup": _setup(store, answers),
        "model": str(record.attrs["model_id"]),
        "version": str(record.attrs["statescope_version"]),
    }
    return _write(output, format, content)


def _write(output: Path, format: str, content: Mapping[str, Any]) -> list[Path]:
    figures = content["figures"]
    pictures = {} if format == "html" else _pictures(output, figures)
    page = _render(format, {**content, "files": {name: path.name for name, (path, _) in pictures.items()}})
    for path, data in pictures.values():
        _replace(path, data)
    _replace(output, page.encode("utf-8", errors="backslashreplace"))
    return [output, *(path for path, _ in pictures.values())]


def _format(output: Path, given: str | None) -> str:
    by_name = FORMATS.get(output.suffix.lower())
    if given is None and by_name is None:
        raise ValueError(f"output={str(output)!r}; expected a name that ends in .html or .md, or a format")
    if given not in (None, *FORMATS.values()):
        raise ValueError(f"format={given!r}; expected 'html' or 'md'")
    if None not in (given, by_name) and given != by_name:
        raise ValueError(f"format={given!r} does not fit output={str(output)!r}")
    return str(given or by_name)


def _facts(
    store: str | Path, record: Any, train_length: int | None, answers: str | Path | None
) -> dict[str, str]:
    known = {"record": f"{store}, {progress(record)}", **facts(record)}
    if train_length is not None:
        known["training length"] = f"{train_length:,} tokens, as given for this report"
    if answers is not None:
        known["answers"] = str(answers)
    versions = record.attrs["versions"]
    if isinstance(versions, Mapping):
        known["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return known


def _setup(store: str | Path, answers: str | Path | None) -> str:
    """Return the code that every call of the page stands on."""
    lines = [
        "import statescope",
        "from statescope.analyses import plots",
        "",
        f"record = statescope.open({str(store)!r})",
    ]
    if answers is not None:
        lines.insert(2, "from statescope.analyses import read_answers")
        lines.append(f"answers = read_answers({str(answers)!r})")
    return "\n".join(lines)


def _pictures(output: Path, figures: list[Section]) -> dict[str, tuple[Path, bytes]]:
    return {
        f.name: (output.with_name(f"{output.stem}-{f.name}.png"), f.picture)
        for f in figures
        if f.picture is not None
    }


def _render(format: str, content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("statescope.report", "templates"),
        autoescape=format == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"base64": lambda data: base64.b64encode(data).decode("ascii"), "plain": _plain}
    return environment.get_template(f"page.{format}").render(content)


def _plain(text: Any) -> str:
    """Make any text one line of Markdown that says just that: no markup, no HTML, no table cell's end."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(str(text).split()))


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
