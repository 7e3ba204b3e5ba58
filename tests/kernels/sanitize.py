"""Small fused scans for compute-sanitizer: out-of-bounds accesses and races on a GPU.

``python tests/kernels/sanitize.py`` runs them once and holds them against stepping. With ``--record FILE``
it runs itself under compute-sanitizer's memcheck and racecheck, and writes what they say, as JSON. Sizes are
odd, so that every tile is cut; heads share groups or not; both widths of copies are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before anything imports triton: the kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import OUTPUTS, STATES, WORST, Case, draw, errors, relative

from statescope.kernels import fused, loss, reference, windows
from statescope.plan import versions

HALF = torch.bfloat16
SCANS = (
    Case(1),
    Case(65, initial=True, dtype=HALF),
    Case(40, batch=2, heads=4, groups=2, initial=True),
    Case(70, batch=2, heads=4, groups=2, initial=True, dtype=HALF),
    Case(130, heads=3, groups=3, key=5, value=7, dtype=HALF),
    Case(90, key=20, value=130, initial=True, scale=False, dtype=HALF),
    Case(200, heads=4, groups=2, key=128, value=64, initial=True, dtype=HALF),  # bulk copies, the last cut
    Case(128, batch=2, key=128, value=64, dtype=HALF),  # bulk copies across sequences
    Case(50, key=128, value=64, initial=True, skip=False),
    Case(40, key=16, value=40, dtype=torch.float16),
    Case(70, heads=3, groups=3, key=5, value=7, initial=True, rated=True),
    Case(130, value=70, initial=True, entry=True, dtype=HALF),
    Case(33, heads=1, key=20, value=33, initial=True, delta=True),
    Case(17, heads=1, key=33, value=20, initial=True, delta=True, keyed=True),
    Case(140, key=64, value=64, initial=True, delta=True, dtype=HALF),
    Case(140, batch=2, key=130, value=70, initial=True, dtype=HALF),
    Case(140, key=64, value=64, initial=True, keyed=True, erase=True, dtype=HALF),  # with hard chunks
)

TOOLS = ("memcheck", "racecheck")


def run(scans: tuple[Case, ...] = SCANS) -> None:
    """Run every scan with outputs, measurements and kept states, one with a NaN, and the small kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in scans:
        r = draw(case, device)
        positions = (case.time - 1, 0, case.time // 2)
        got = on_host(fused.scan(r, positions=positions))
        host = on_host(r)
        want = reference.scan(host, positions=positions)
        worst = errors(got.steps, want.steps, host.start_state(torch.float64).norm(dim=(-2, -1)))
        assert float(worst["state_norm"].max()) <= WORST[case.dtype], case
        assert relative(got.y, want.y) <= OUTPUTS[case.dtype], case
        assert relative(got.states, want.states) <= STATES[case.dtype], case
    r = draw(Case(70, initial=True, dtype=HALF), device)
    spoiled = r.v.clone()
    spoiled[:, 33, 0, 0] = float("nan")
    got = fused.scan(r.replace(v=spoiled))
    assert bool(got.y[:, :33].isfinite().all()) and not bool(got.y[:, 33:, 0, 0].isfinite().any())
    steps = torch.rand(5, 2, 130, 3, device=device)
    assert relative(windows.in_one_pass(steps, 64).cpu(), windows.thin(steps.cpu(), 64).double()) < 1e-6
    logits, targets = torch.randn(9, 5001, device=device), torch.arange(9, device=device)
    expected = loss.token_loss(logits.cpu(), targets.cpu())
    assert relative(loss.in_one_pass(logits, targets).cpu(), expected) < 1e-6
    print(
        f"{len(scans) + 1} scans on {torch.cuda.get_device_name() if device == 'cuda' else 'the interpreter'}"
    )


def on_host(x: Any) -> Any:
    """Bring tensors where stepping takes no launches, of which every one is slow under a tool."""
    if isinstance(x, torch.Tensor):
        return x.cpu()
    return replace(x, **{f.name: on_host(getattr(x, f.name)) for f in fields(x)}) if is_dataclass(x) else x


def record(path: Path, tool: str = "compute-sanitizer") -> bool:
    """Run under every tool, write what they say, and return whether all found nothing."""
    # Without torch's pool every tensor is an allocation of its own, past whose end memcheck sees.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found: dict[str, Any] = {}
    result = {
        "command": "python tests/kernels/sanitize.py --record FILE",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "versions": {**versions(), "compute-sanitizer": _version(tool)},
        "scans": [*map(str, SCANS), "one with a NaN", "thinning", "loss"],
        "tools": found,
    }
    for name in TOOLS:
        script = str(Path(__file__).resolve())
        command = [tool, "--tool", name, "--error-exitcode", "1", sys.executable, script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        summary = [line.strip("= ") for line in lines if "SUMMARY" in line]
        found[name] = {"exit_code": done.returncode, "summary": summary}
        if done.returncode or not summary:
            found[name]["last_lines"] = lines[-30:]
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return all(entry["exit_code"] == 0 and entry["summary"] for entry in found.values())


def _version(tool: str) -> str:
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in reversed(said.splitlines()) if "ersion" in line), "unknown")


def main() -> None:
    """Run the scans, or record what the tools say of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--tool", default="compute-sanitizer", help="where it is, if not on the path")
    given = parser.parse_args()
    if given.record is None:
        fused.BULK_ROWS = 0  # so that small scans, too, are copied in bulk where they can be
        run()
    elif not record(given.record, given.tool):
        sys.exit(f"not clean: see {given.record}")


if __name__ == "__main__":
    main()
