"""The report: complete, self-contained, safe, and opened in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs, skip
from typer.testing import CliRunner

import statescope
from statescope.cli import app

needs("seaborn")
needs("jinja2")

from matplotlib.image import imread  # noqa: E402

from statescope.report.page import write_report  # noqa: E402

MODEL = "mamba2-byte-n16-t512"
EVIL = '"><script>document.title = "owned"</script><img src=x onerror=alert(1)>|`_*[a](http://evil.example/)'
FIGURES = ["overload", "state", "retention", "decay", "loss", "rank", "strip", "attention"]


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, str] = {}
        self.calls: list[str] = []
        self._section, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        if tag == "code":
            self.calls.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.words[self._section] = self.words.get(self._section, "") + data
        if self._inside == "code":
            self.calls[-1] += data

    @property
    def sections(self) -> list[str]:
        return [str(a["id"]) for tag, a in self.tags if tag == "section"]

    @property
    def images(self) -> dict[str, bytes]:
        found = [str(a["src"]) for tag, a in self.tags if tag == "img"]
        assert all(src.startswith("data:image/png;base64,") for src in found)
        names = [
            s for s in self.sections if s in (*FIGURES, "passkeys") and "trace again" not in self.words[s]
        ]
        return dict(zip(names, (base64.b64decode(src.split(",", 1)[1]) for src in found), strict=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record with all there is, and one with as little as can be."""
    out = tmp_path_factory.mktemp("report")
    text = "The grass is green. The sky is blue. Naïve <b>markup</b> & more. " * 12
    options: dict[str, Any] = {"backend": "chunked", "progress": False}
    statescope.trace(
        MODEL, text, store=out / "full.zarr", layers=[1, 3], snapshots=[63, 511, 700], probes=[-1], **options
    )
    statescope.trace(MODEL, text, store=out / "bare.zarr", window=8, layers=[1], **options)
    statescope.trace(MODEL, "x", store=out / "one.zarr", snapshots=[0], probes=[0], **options)
    edited(out / "bare.zarr", out / "unknown.zarr", train_length=None)
    edited(out / "full.zarr", out / "evil.zarr", model_id=EVIL, train_length=256)
    rows = [
        {"length": n, "depth": d, "trial": t, "seed": 0, "needle_start": 0, "needle_stop": 5,
         "passkey": "12345", "answer": "12345" if n < 999 else "0"}
        for n in (256, 512, 1024) for d in (0.0, 1.0) for t in range(60)
    ]  # fmt: skip
    header = {"statescope_passkeys": 1, "model_id": MODEL, "train_length": 512}
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    return out


def edited(store: Path, copy: Path, **attributes: Any) -> None:
    """Copy a record with other root attributes."""
    shutil.copytree(store, copy)
    meta = json.loads((copy / "zarr.json").read_text())
    meta["attributes"] |= attributes
    (copy / "zarr.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def full(folder: Path) -> str:
    write_report(folder / "full.zarr", folder / "full.html", answers=folder / "answers.jsonl")
    return (folder / "full.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def evil(folder: Path) -> str:
    """A page about a model whose name is an attack."""
    write_report(folder / "evil.zarr", folder / "evil.html", answers=folder / "answers.jsonl")
    return (folder / "evil.html").read_text(encoding="utf-8")


def report(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *(str(a) for a in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_verdict_comes_first_and_nothing_is_missing(full: str) -> None:
    page = Page(full)
    assert page.sections == ["verdict", "record", "heads", "code", *FIGURES, "passkeys"]
    before = [tag for tag, _ in page.tags][: [t for t, a in page.tags].index("section")]
    assert not {"img", "table", "pre"} & set(before)
    said = page.words["verdict"]
    assert "Of 16 heads, after 792 tokens (training length 512)" in said and "by its loss" in said
    assert "half of a memory's energy" in said and "95 % of them up to 512 tokens" in said
    assert MODEL in page.words["record"] and "1 x 792 tokens" in page.words["record"]
    assert len(re.findall(r"<tr><td>", full)) == 12


def test_the_page_holds_all_its_pictures_and_loads_nothing(full: str) -> None:
    page = Page(full)
    assert len(page.images) == 9
    for name, content in page.images.items():
        height, width, _ = imread(io.BytesIO(content)).shape
        assert height > 150 and width > 400, name
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    asked = [
        a[key] or "" for _, a in page.tags for key in ("src", "href", "srcset", "data", "action") if key in a
    ]
    assert len(asked) == 9 and all(at.startswith("data:") for at in asked) and "url(" not in full


def test_every_call_runs(folder: Path, full: str) -> None:
    setup, *calls = Page(full).calls
    names: dict[str, Any] = {}
    exec(setup, names)
    assert len(calls) == 9
    for call in calls:
        assert eval(call, names).axes


def test_what_users_give_is_escaped(folder: Path, evil: str) -> None:
    page = Page(evil)
    assert "script" not in {tag for tag, _ in page.tags} and page.words["record"].count(EVIL) == 1
    assert all(str(a["src"]).startswith("data:") for tag, a in page.tags if tag == "img")
    write_report(folder / "evil.zarr", folder / "evil.md")
    text = (folder / "evil.md").read_text(encoding="utf-8")
    assert "<script" not in text.replace("\\<", "") and "\\[a\\](http" in text and "\\|\\`\\_\\*" in text


def test_markdown_has_its_pictures_beside_it(folder: Path, tmp_path: Path) -> None:
    code, said = report(folder / "full.zarr", "-o", tmp_path / "my report.md", "--format", "md")
    assert code == 0 and said == f"report: {tmp_path}/my report.md (and 8 pictures)\n"
    text = (tmp_path / "my report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]*\]\(<([^>]*)>\)", text)
    assert linked == [f"my report-{name}.png" for name in FIGURES]
    assert all(imread(tmp_path / name).ndim == 3 for name in linked)
    assert text.index("Of 16 heads") < text.index("## The record") < text.index("![")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["my report.md", *linked])


def test_a_record_with_little_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    assert report(folder / "unknown.zarr", "-o", tmp_path / "a.html")[0] == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "No verdict" in page.words["verdict"] and "--train-length" in page.words["verdict"]
    assert "trace again with --snapshots" in page.words["rank"]
    for name in ("strip", "attention"):
        assert "trace again with --probes" in page.words[name]
    assert "pass --train-length" in page.words["overload"] and "Slowest heads" in page.words["heads"]
    assert [tag for tag, _ in page.tags].count("img") == 4
    assert report(folder / "unknown.zarr", "-o", tmp_path / "b.html", "--train-length", 300)[0] == 0
    page = Page((tmp_path / "b.html").read_text(encoding="utf-8"))
    assert (
        "training length 300" in page.words["verdict"] and "as given for this report" in page.words["record"]
    )
    assert "plots.overload_figure(record, train_length=300)" in page.calls


def test_one_token(folder: Path, tmp_path: Path) -> None:
    assert report(folder / "one.zarr", "-o", tmp_path / "a.html")[0] == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "nothing was read beyond it" in page.words["verdict"] and "no losses" in page.words["loss"]


def test_token_ids_without_text(folder: Path, tmp_path: Path) -> None:
    ids = np.arange(300) % 256
    statescope.trace(MODEL, ids, store=tmp_path / "ids.zarr", probes=[-1], progress=False)
    import zarr

    tokens: Any = zarr.open_group(tmp_path / "ids.zarr")["tokens/token_id"]
    tokens[:] = 50_000
    assert report(tmp_path / "ids.zarr", "-o", tmp_path / "a.html")[0] == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "token ids, not their text" in page.words["strip"] and "pieces=" in page.words["strip"]


def test_answers_of_another_model_are_called_so(evil: str) -> None:
    assert f"the answers are those of {MODEL}" in Page(evil).words["verdict"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no.zarr",), "'no.zarr' does not exist"),
        (("{}/answers.jsonl",), "is no Zarr group"),
        (("{}/full.zarr", "-o", "report.pdf"), "expected a name that ends in .html or .md"),
        (("{}/full.zarr", "--format", "pdf"), "format='pdf'; expected 'html' or 'md'"),
        (("{}/full.zarr", "-o", "a.html", "--format", "md"), "format='md' does not fit output='a.html'"),
        (("{}/full.zarr", "-o", "no/such/a.html"), "there is no folder 'no/such'"),
        (("{}/full.zarr", "--answers", "{}/full.zarr/zarr.json"), "is no file of answers"),
        (("{}/full.zarr", "--train-length", "0"), "train_length=0; expected a number of tokens"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: tuple[str, ...], said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = report(*(a.format(folder) for a in arguments))
    assert code == 2 and output.startswith("error: ") and output.count("\n") == 1 and said in output
    assert not list(tmp_path.iterdir())


def test_an_interrupted_record_is_called_so(folder: Path, tmp_path: Path) -> None:
    edited(folder / "full.zarr", tmp_path / "cut.zarr", committed=600, complete=False)
    write_report(tmp_path / "cut.zarr", tmp_path / "a.html")
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "The record is interrupted" in page.words["verdict"]
    assert "interrupted after 600 tokens" in page.words["record"]
    edited(folder / "full.zarr", tmp_path / "none.zarr", committed=0, complete=False)
    with pytest.raises(ValueError, match="has no tokens yet"):
        write_report(tmp_path / "none.zarr", tmp_path / "b.html")


def test_a_report_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from statescope.cli import app;"
        f" app(['report', {str(folder / 'bare.zarr')!r}, '-o', {str(tmp_path / 'a.html')!r}],"
        " standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n") and (tmp_path / "a.html").is_file()


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
    )
    if found is None:
        skip("chromium is not installed (apt-get install chromium)")
    return str(found)


def dom(chromium: str, page: Path, profile: Path) -> str:
    """Open a page and give back what the browser made of it."""
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    closed = [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ]
    done = subprocess.run(
        [chromium, "--headless", *quiet, *closed, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_in_a_browser(chromium: str, folder: Path, full: str, tmp_path: Path) -> None:
    """Let the browser say which pictures it decoded and what it asked for: a script put into a copy."""
    policy = "default-src 'none';"
    assert policy in full
    script = (
        "<script>addEventListener('load', () => { document.body.dataset.seen = JSON.stringify({"
        " widths: [...document.images].map(i => i.naturalWidth),"
        " asked: performance.getEntriesByType('resource').map(e => e.name).filter(n => !/^data:/.test(n)),"
        " first: document.querySelector('h1').nextElementSibling.id,"
        " top: document.getElementById('verdict').getBoundingClientRect().bottom,"
        " wide: document.documentElement.scrollWidth - innerWidth}) })</script></body>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(full.replace(policy, "script-src 'unsafe-inline';").replace("</body>", script))
    found = re.search(r'data-seen="([^"]*)"', dom(chromium, copy, tmp_path / "profile"))
    assert found, "the page's script did not run"
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert len(seen["widths"]) == 9 and all(w > 400 for w in seen["widths"])
    assert seen["asked"] == [] and seen["first"] == "verdict" and 0 < seen["top"] < 600 and seen["wide"] <= 0


def test_nothing_given_runs_in_a_browser(chromium: str, evil: str, tmp_path: Path) -> None:
    """Without the page's own policy against scripts: escaping alone must do."""
    unguarded = re.sub(r'<meta http-equiv="Content-Security[^>]*>', "", evil)
    (tmp_path / "evil.html").write_text(unguarded, encoding="utf-8")
    assert unguarded != evil
    opened = dom(chromium, tmp_path / "evil.html", tmp_path / "profile")
    assert "<title>owned" not in opened and "&lt;script&gt;" in opened and "<img src=x" not in opened
