"""What runs are trained with: the choice and its record, and mamba_ssm's scan beside ours.

Everywhere a loop in float64 stands in for mamba_ssm's function; its own kernels are held against ours where
they are (see ``test_mamba_ssm``), on a GPU, or without one in Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mamba_ssm_like
import pytest
import torch
from conftest import skip
from test_mamba_ssm import DEVICE, imported
from torch import Tensor

from statescope.experiments.packing import pack
from statescope.experiments.training import scans
from statescope.experiments.training.cell import Effort, train_cell
from statescope.experiments.training.config import Config
from statescope.experiments.training.ensemble import Ensemble
from statescope.experiments.training.model import scan_in_torch
from statescope.experiments.training.scans import PEER, Kernels, choose, scan_in_mamba_ssm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = Config(
    row=64,
    rows=2,
    width=16,
    head_size=8,
    state_size=4,
    train_length=64,
    steps=1,
    warmup=1,
    keys=40,
    values=8,
    chunk=16,
    dtype="float32",
)
RUNS = [TINY, TINY.but(seed=1, train_length=16)]
"""Stacked as one, with sequences that begin at other tokens in each."""

ROUNDED = TINY.but(dtype="bfloat16")
ROUGH = "bfloat16" if DEVICE == "cuda" else "float32"
"""What mamba_ssm's kernels are tried in; in Triton's interpreter products of bfloat16 come out wrong."""

ROUNDING = {"bfloat16": 2**-8, "float32": 1e-5}
"""Relative error that is always allowed."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a loop in float64 where mamba_ssm's function would be."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, PEER, mamba_ssm_like)
    monkeypatch.setattr(scans, "version", lambda name: f"of {name}")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)


def test_mamba_ssm_is_taken_where_it_is(stand_in: None) -> None:
    auto, asked = choose(ROUNDED, GPU), choose(ROUNDED.but(kernels="mamba_ssm"), GPU)
    assert str(auto) == "mamba_ssm of mamba-ssm (auto)"
    assert str(asked) == "mamba_ssm of mamba-ssm (asked for)"
    ours = choose(ROUNDED.but(kernels="torch"), GPU)
    assert str(ours) == "torch (asked for)" and ours.scan is scan_in_torch


@pytest.mark.parametrize(
    ("config", "device", "why"),
    [
        (ROUNDED, CPU, "device='cpu' is no GPU"),
        (TINY, GPU, "dtype='float32' would be rounded"),
    ],
    ids=str,
)
def test_what_mamba_ssm_cannot_do_is_ours(
    stand_in: None, config: Config, device: torch.device, why: str
) -> None:
    ours = choose(config, device)
    assert ours.name == "torch" and ours.scan is scan_in_torch
    assert str(ours).startswith("torch (auto: ") and why in ours.why
    with pytest.raises(ValueError, match="kernels='mamba_ssm'") as raised:
        choose(config.but(kernels="mamba_ssm"), device)
    assert why in str(raised.value)


def test_where_mamba_ssm_is_absent_that_is_said(absent: None) -> None:
    assert choose(ROUNDED, GPU).why.startswith("auto: mamba_ssm cannot be imported: ")
    with pytest.raises(ValueError, match="cannot be imported"):
        Ensemble([ROUNDED.but(kernels="mamba_ssm")], GPU)


def test_what_was_used_is_in_the_row_and_beside_the_checkpoint(tmp_path: Path) -> None:
    effort = Effort(beyond=128, rows=1)
    runs = [TINY, TINY.but(kernels="torch")]
    for config, said in zip(runs, ("torch (auto: device='cpu' is no GPU)", "torch (asked for)"), strict=True):
        (row,) = train_cell([config], tmp_path, CPU, effort)
        beside = json.loads((tmp_path / row["checkpoint"] / "made.json").read_text())
        assert beside == row["made"] and beside["kernels"] == said
        pack(tmp_path / row["checkpoint"], tmp_path / said)
        packed = json.loads((tmp_path / said / "training.json").read_text())["made"]
        assert packed.pop("command").startswith("statescope train ")
        assert packed == {k: v for k, v in beside.items() if k != "command"}
    assert runs[0].name() != runs[1].name()


def test_runs_are_called_as_before_there_was_a_choice() -> None:
    assert Config().name() == "recall-n16-t64-b2000-s0-4fe9d6e6"
    with pytest.raises(ValueError, match="kernels='cuda'"):
        TINY.but(kernels="cuda")


def losses(ensemble: Ensemble, scan: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every run, and the gradients of their sum."""
    ensemble.kernels = Kernels("", "", scan)
    leaves = {name: w.detach().requires_grad_() for name, w in ensemble.parameters().items()}
    found = ensemble.losses(leaves, ensemble.batch())
    return found.detach(), dict(
        zip(leaves, torch.autograd.grad(found.sum(), list(leaves.values())), strict=True)
    )


def test_stacked_runs_are_called_as_mamba_ssm_wants(stand_in: None) -> None:
    """Loss and gradients of two runs by a function with mamba_ssm's signature, against our scan."""
    ensemble = Ensemble(RUNS, CPU)
    position = ensemble.batch().position
    assert (position[:, :, 1:] == 0).any((1, 2)).all() and not torch.equal(position[0], position[1])
    theirs, ours = (losses(ensemble, scan) for scan in (scan_in_mamba_ssm, scan_in_torch))
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-6, atol=0)
    for name, want in ours[1].items():
        assert (theirs[1][name] - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("scan", [scan_in_mamba_ssm, scan_in_torch])
def test_scans_are_the_recurrence(stand_in: None, scan: Any) -> None:
    """Outputs and gradients against a loop in float64, with sequences that begin in mid row."""
    inputs, position = drawn(2, 2, 32, 3, 4, 5, [(0, 11, 20), (0, 5)])
    leaves = [x.requires_grad_() for x in inputs]
    y, want = scan(*leaves, position, 8), stepped(*leaves, position)
    torch.testing.assert_close(y, want)
    weight = torch.randn_like(want)
    for found, expected in zip(
        *(torch.autograd.grad((z * weight).sum(), leaves) for z in (y, want)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def drawn(
    runs: int, rows: int, tokens: int, heads: int, values: int, keys: int, starts: list[tuple[int, ...]]
) -> tuple[list[Tensor], Tensor]:
    """x, dt, rate, B and C in float64, and positions; sequences begin at each row's own starts."""
    generator = torch.Generator().manual_seed(0)
    x, B, C = (
        torch.randn(runs, rows, tokens, *size, generator=generator).double()
        for size in ((heads, values), (keys,), (keys,))
    )
    dt = torch.rand(runs, rows, tokens, heads, generator=generator).double()
    rate = torch.rand(runs, heads, generator=generator).double() + 0.1
    token = torch.arange(tokens)
    begun = torch.tensor([[max(s for s in own if s <= t) for t in range(tokens)] for own in starts])
    return [x, dt, rate, B, C], (token - begun)[:, None].expand(runs, rows, tokens)


def stepped(x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, position: Tensor) -> Tensor:
    """Read the states, token by token."""
    state = torch.zeros((), dtype=x.dtype)
    found = []
    for t in range(x.shape[2]):
        kept = (-rate[:, None] * dt[:, :, t]).exp() * (position[:, :, t, None] > 0)
        write = dt[:, :, t, :, None, None] * x[:, :, t, :, :, None] * B[:, :, t, None, None]
        state = kept[..., None, None] * state + write
        found.append((state * C[:, :, t, None, None]).sum(-1))
    return torch.stack(found, 2)


@pytest.fixture(scope="module")
def mamba_ssm() -> Iterator[None]:
    """mamba_ssm itself, with one configuration of each kernel; as test_mamba_ssm imports it."""
    with pytest.MonkeyPatch.context() as patch:
        imported(patch, "Mamba2")
        if DEVICE == "cpu":
            some = SimpleNamespace(multi_processor_count=1)
            patch.setattr(torch.cuda, "get_device_properties", lambda _: some)
        yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


SIZES = {
    "n16": (16, 64, 64),
    "n5": (5, 8, 16),
    "n1": (1, 4, 8),
    "n24": (24, 20, 32),
    "n64": (64, 64, 64),
    "n160": (160, 64, 64),
    "n256": (256, 128, 256),
    "n512": (512, 32, 64),
    "p256": (16, 256, 128),
    "c1": (16, 16, 1),
    "c4": (8, 16, 4),
    "c512": (16, 64, 512),
}
"""State size, head size and chunk."""

INTERPRETED = ("n5", "n1", "n24", "c4")


@pytest.mark.parametrize("sizes", INTERPRETED)
def test_rounding_costs_no_more_than_ours(stand_in: None, sizes: str) -> None:
    """What is given and taken in bfloat16, by a function that is exact in between."""
    compare(SIZES[sizes], "bfloat16", "cpu")


@pytest.mark.parametrize("sizes", SIZES)
def test_mamba_ssms_kernels_scan_as_ours(mamba_ssm: None, sizes: str) -> None:
    if DEVICE == "cpu" and sizes not in INTERPRETED:
        skip("these sizes take minutes in Triton's interpreter")
    compare(SIZES[sizes], ROUGH, DEVICE)


def compare(sizes: tuple[int, int, int], dtype: str, device: str) -> None:
    """Outputs and gradients are about as near to float64's as those of our scan.

    A rate's gradient is a difference of sums that nearly cancel: the scaling by it, and back. So what is
    lost in rounding the outputs, and what they are weighted with, is lost there too.
    """
    keys, values, chunk = sizes
    tokens, rough = 4 * chunk, getattr(torch, dtype)
    inputs, position = drawn(2, 2, tokens, 2, values, keys, [(0, chunk + 3), (0, 5, tokens - 2)])
    position = position.to(device)
    kinds = (rough, torch.float32, torch.float32, rough, rough)
    rounded = [x.to(device, kind) for x, kind in zip(inputs, kinds, strict=True)]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((*position.shape, 2, values), generator=generator).double().to(device)

    def found(scan: Any, given: list[Tensor], *rest: Any) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in given]
        y = scan(*leaves, position, *rest)
        return [y.detach(), *torch.autograd.grad((y.double() * weight).sum(), leaves)]

    want = found(stepped, [x.double() for x in rounded])
    theirs, ours = (found(scan, rounded, chunk) for scan in (scan_in_mamba_ssm, scan_in_torch))
    lost = (want[0] * weight).square().sum((1, 2, 4)).sqrt() / rounded[2].double()
    for name, x, y, z in zip(("y", "x", "dt", "rate", "B", "C"), want, theirs, ours, strict=True):
        error, own, size = (float(a.norm()) for a in (y - x, z - x, x))
        allowed = max(2 * own, ROUNDING[dtype] * size)
        if name == "rate":
            allowed += torch.finfo(rough).eps * float(lost.norm())
        print(f"{name}: mamba_ssm {error / size:.1e}, ours {own / size:.1e}")
        assert error <= allowed, name


def test_runs_learn_from_mamba_ssms_kernels_as_from_ours(mamba_ssm: None) -> None:
    """Loss and gradients of two runs: about as near to those in float32 as with our scan."""
    sizes = {"row": 2048, "width": 256, "head_size": 64, "chunk": 64} if DEVICE == "cuda" else {"row": 64}
    config = TINY.but(**sizes, state_size=16, train_length=sizes["row"])
    runs, device = [config, config.but(seed=1, train_length=16)], torch.device(DEVICE)
    exact = losses(Ensemble(runs, device), scan_in_torch)
    rough = Ensemble([c.but(dtype=ROUGH) for c in runs], device)
    theirs, ours = (losses(rough, scan) for scan in (scan_in_mamba_ssm, scan_in_torch))
    for run in range(2):
        want, *both = (torch.cat([g[run].flatten() for g in x[1].values()]) for x in (exact, theirs, ours))
        error, own = (float((got - want).norm() / want.norm()) for got in both)
        apart = [float(abs(x[0][run] / exact[0][run] - 1)) for x in (theirs, ours)]
        print(f"gradients: mamba_ssm {error:.1e}, ours {own:.1e}; loss: {apart[0]:.1e}, {apart[1]:.1e}")
        assert error <= max(1.5 * own, ROUNDING[ROUGH]) and apart[0] <= ROUNDING[ROUGH]
    if DEVICE == "cuda":
        for name, scan in (("mamba_ssm", scan_in_mamba_ssm), ("ours", scan_in_torch)):
            print(f"{name}: {milliseconds(rough, scan):.2f} ms a step, not fused")


def milliseconds(ensemble: Ensemble, scan: Any, times: int = 5) -> float:
    """How long loss and gradients take on a GPU."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(times):
        losses(ensemble, scan)
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended) / times)
