"""The notebooks run from top to bottom, and what is stored in them is what they give.

With ``STATESCOPE_STORE_NOTEBOOKS=1`` the outputs are stored anew, free of whatever changes from run to run.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import needs, skip

needs("nbclient")
needs("ipykernel")
needs("ipywidgets")

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from PIL import Image  # noqa: E402

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
BYTES = 1_500_000
"""What all notebooks may weigh together."""

ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|var|usr|work|Users|private|mnt|opt)\b|[A-Z]:\\\\")
WIDGET = "application/vnd.jupyter.widget-view+json"

each = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook beside a copy of what it reads; return it with its outputs."""
    shutil.copytree(NOTEBOOKS / "results", folder / "results")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, resources={"metadata": {"path": folder}}, record_timing=False, coalesce_streams=True
    ).execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    """List what the cells put out, progress bars left out: they vanish where a notebook is looked at."""
    found = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [o for o in found if WIDGET not in o.get("data", {})]


def text_of(output: Any) -> str:
    """Everything that an output says in words."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(str(v) for k, v in data.items() if k.startswith("text/"))])


def smaller(picture: str) -> str:
    """Keep a picture in 128 colours: a third of the bytes, and no difference to the eye."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        packed := io.BytesIO(), "png", optimize=True
    )
    return base64.b64encode(packed.getvalue()).decode()


def store(notebook: Any, path: Path) -> None:
    """Write a notebook with its outputs, without what differs between two runs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = {}, f"cell-{number:02}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            for data in (o.data for o in cell.outputs if "image/png" in o.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    nbformat.write(notebook, path)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([str(NOTEBOOKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)  # the kernel imports what the tests do
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("TRITON_INTERPRET", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)


def test_there_are_six() -> None:
    assert [p.stem[:2] for p in ALL] == ["01", "02", "03", "04", "05", "06"]
    assert sum(p.stat().st_size for p in ALL) < BYTES


@each
def test_runs(path: Path, tmp_path: Path) -> None:
    """No cell raises, nothing warns, and nothing is left beside the notebook."""
    done = execute(path, tmp_path)
    complaints = [o for o in outputs(done) if o.get("name") == "stderr" or "Warning" in text_of(o)]
    assert not complaints
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
    if os.environ.get("STATESCOPE_STORE_NOTEBOOKS") == "1":
        store(done, path)
    stored = nbformat.read(path, as_version=4)
    kinds = [[o.output_type for o in outputs(notebook)] for notebook in (done, stored)]
    assert kinds[0] == kinds[1], "the stored outputs are those of another notebook; store them anew"


@each
def test_what_is_stored(path: Path) -> None:
    """Outputs are there, whole, and say nothing about the machine they were made on."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook))
    for cell in notebook.cells:
        assert not cell.metadata, "store the outputs anew"
    said = "\n".join(map(text_of, outputs(notebook)))
    assert not ABSOLUTE.search(said)
    assert not re.search(r"tok/s|it/s|\d\d:\d\d", said), "progress bars and times change from run to run"


@each
def test_links_lead_somewhere(path: Path) -> None:
    prose = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\((?!http)([^)#]+)", prose):
        assert (NOTEBOOKS / target).exists(), target


class Lab:
    """JupyterLab, serving a folder to this machine only."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.token = secrets.token_hex(16)
        settings = {f"JUPYTER_{n}_DIR": str(home / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--notebook-dir={folder}",
            "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--IdentityProvider.token={self.token}",
            f"--LabApp.workspaces_dir={home}", f"--LabApp.user_settings_dir={home}", "--LabApp.news_url=None",
        ]  # fmt: skip
        with (home / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT
            )
        self.runtime, self.log = home / "runtime", home / "log"

    def url(self, timeout: float = 120) -> str:
        """Where it listens, as soon as it does."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.process.poll() is None:
            for path in self.runtime.glob("jpserver-*.json"):
                with contextlib.suppress(json.JSONDecodeError):  # not written to its end yet
                    return str(json.loads(path.read_text())["url"])
            time.sleep(0.2)
        raise RuntimeError(self.log.read_text())

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # it ends its kernels, then itself
        self.process.wait(30)


@pytest.fixture
def chromium() -> str:
    needs("jupyterlab")
    needs("playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        skip("there is no chromium")
    return found


def test_in_jupyterlab(chromium: str, tmp_path: Path) -> None:
    """The first notebook, opened in a browser, all its cells run by the menu."""
    from playwright.sync_api import sync_playwright

    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    (home := tmp_path / "home").mkdir()
    path = tmp_path / "notebooks" / ALL[0].name
    stored = nbformat.read(path, as_version=4)
    cleared = nbformat.from_dict(stored)
    for cell in cleared.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(cleared, path)
    with Lab(tmp_path / "notebooks", home) as lab, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab.url()}lab/tree/{path.name}?token={lab.token}")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
        page.get_by_text("Python 3", exact=False).and_(page.get_by_text("Idle")).first.wait_for(
            timeout=120_000
        )
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        done = saved_when_done(page, path)
        assert page.locator(".jp-Notebook img").count() > 0
        page.screenshot(path=tmp_path / "lab.png")
        browser.close()
    assert [o.output_type for o in outputs(done)] == [o.output_type for o in outputs(stored)]


def saved_when_done(page: Any, path: Path, timeout: float = 240) -> Any:
    """Save until the notebook on the disk has an output in its last cell; the page shows some cells only."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        notebook = nbformat.read(path, as_version=4)
        last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
        if last.outputs:
            return notebook
    page.screenshot(path=path.with_suffix(".png"))
    raise TimeoutError(f"the last cell has no output after {timeout} s; see {path.with_suffix('.png')}")
