"""Mamba-3: its scan against a loop in float64, that loop against mamba_ssm's kernels where they are.

What models of it do is tested with mamba_ssm's others (:mod:`test_mamba_ssm`).
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from mamba3_like import stepped
from test_mamba_ssm import imported
from torch import Tensor

from statescope.adapters import ADAPTERS, mamba3
from statescope.kernels import reference
from statescope.recurrence import Recurrence
from statescope.scan import Attribution, probe, scan

TIME, HEADS, KEY, VALUE = 37, 4, 16, 16
SISO = ADAPTERS["mamba3_siso_combined"]


def arguments(groups: int, steps: float = 0.5, angles: int = KEY // 4) -> dict[str, Tensor]:
    """Draw what the scan is given; what a token brings is exact in bfloat16."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape).bfloat16().float()

    step = torch.rand(2, HEADS, TIME) * steps
    return {
        "Q": draw(TIME, groups, KEY),
        "K": draw(TIME, groups, KEY),
        "V": draw(TIME, HEADS, VALUE),
        "ADT": -step * torch.rand(2, HEADS, TIME) * 2,
        "DT": step,
        "Trap": draw(HEADS, TIME),
        "Q_bias": 1 + 0.1 * torch.randn(HEADS, KEY),
        "K_bias": 1 + 0.1 * torch.randn(HEADS, KEY),
        "Angles": draw(TIME, HEADS, angles),
        "D": torch.randn(HEADS),
    }


def states(angles: int = KEY // 4) -> tuple[Tensor, ...]:
    """Draw what a stretch goes on from."""
    shapes = ((angles,), (VALUE, KEY), (KEY,), (VALUE,))
    return tuple(torch.randn(2, HEADS, *shape) for shape in shapes)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def recurrence(given: dict[str, Tensor], entering: Any = None) -> Recurrence:
    read: Recurrence = SISO.read(False, **given, Input_States=entering).recurrence
    assert read.structure == SISO.structure
    return read


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("steps", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize("goes_on", [False, True])
def test_steps_are_the_model_s(kernel: str, steps: float, goes_on: bool) -> None:
    """Norms are of the state without its additional row and of both writes, however small they are."""
    given, entering = arguments(2, steps), states() if goes_on else None
    y, parts, (_, last, _, _) = stepped(**given, Z=None, states=entering, rough=True)
    found = scan(recurrence(given, entering), backend=kernel)
    assert found.y is not None and found.steps is not None
    assert error(found.y, y) < 2e-6
    assert error(found.final_state[:, :, :-1], last.transpose(-2, -1)) < 2e-6
    expected = {
        "log_decay": [given["ADT"][:, :, t] for t in range(TIME)],
        "write_norm": [added.flatten(2).norm(dim=-1) for _, added in parts],
        "state_norm": [(decayed + added).flatten(2).norm(dim=-1) for decayed, added in parts],
        "state_mean": [(decayed + added).mean((-2, -1)) * KEY / (KEY + 1) for decayed, added in parts],
    }
    for name, rows in expected.items():
        assert error(getattr(found.steps, name), torch.stack(rows, 1)) < 5e-6, name
    overlaps = [
        torch.nan_to_num((d * u).flatten(2).sum(-1) / (d.flatten(2).norm(dim=-1) * u.flatten(2).norm(dim=-1)))
        for d, u in parts
    ]
    assert (found.steps.write_overlap - torch.stack(overlaps, 1)).abs().max() < 1e-5


def test_split_anywhere() -> None:
    """From the states it answers with, the rest is what it would have been."""
    given = arguments(1)
    whole = SISO.read(False, **given, return_final_states=True)
    y, *last = whole.answer(reference.scan(whole.recurrence))
    time_axis = {"ADT": 2, "DT": 2, "Trap": 2, "Q": 1, "K": 1, "V": 1, "Angles": 1}
    for cut in (1, 20):
        parts, entering = [], None
        for part in (slice(0, cut), slice(cut, TIME)):
            some = {
                n: x if n not in time_axis else x[:, :, part] if time_axis[n] == 2 else x[:, part]
                for n, x in given.items()
            }
            call = SISO.read(False, **some, Input_States=entering, return_final_states=True)
            out, *entering = call.answer(reference.scan(call.recurrence))
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-2, atol=1e-6)  # rounded to bfloat16
        for found, expected in zip(entering, last, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_own_angle_is_carried_unrounded() -> None:
    """mamba_ssm's scan answers with an angle in bfloat16; what is gone on from is not rounded."""
    call = SISO.read(False, **arguments(1), return_final_states=True)
    assert call.complete is not None
    own = call.answer(reference.scan(call.recurrence))
    rough = own[0], own[1].bfloat16(), *own[2:]
    assert not torch.equal(rough[1].float(), own[1])
    for found, expected in zip(call.complete(rough), own, strict=True):
        assert torch.equal(found, expected)


def test_what_survives_at_a_probe() -> None:
    """A token's contribution is of its value, written with it and once more with the next; a closed form."""
    given, p = arguments(1), 30
    read = recurrence(given)
    until = read.between(0, p + 1, None)
    state = reference.scan(until, positions=[p]).states[:, 0]
    found: Attribution = probe(until, state, read.q[:, p])
    run = given["ADT"].double().cumsum(2)[:, :, : p + 1]
    step, share = (x.double()[:, :, : p + 1] for x in (given["DT"], given["Trap"].sigmoid()))
    weight = (run[:, :, -1:] - run).exp() * step * share
    weight[:, :, :-1] += (run[:, :, -1:] - run).exp()[:, :, :-1] * (step * (1 - share))[:, :, 1:]
    key = read.k[:, : p + 1, :, :KEY].double().norm(dim=-1) / (step * share).transpose(1, 2)
    expected = weight.transpose(1, 2) * key * given["V"][:, : p + 1].double().norm(dim=-1)
    assert error(found.contribution, expected) < 1e-5
    assert (found.share.sum(1) + found.share_before - 1).abs().max() < 1e-5
    assert (found.output_share.sum(1) + found.output_share_before - 1).abs().max() < 1e-4


def test_refused() -> None:
    """Packed sequences, and the layers with several inputs and outputs a head."""
    with pytest.raises(ValueError, match=r"packed sequences .cu_seqlens"):
        SISO.read(False, **arguments(1), cu_seqlens=torch.tensor([0, TIME]))
    with pytest.raises(ValueError, match=r"is_mimo.*only is_mimo=False"):
        ADAPTERS["mamba3_mimo_combined"].read(False, **arguments(1))


@pytest.mark.parametrize("goes_on", [False, True])
def test_loop_is_what_mamba_ssm_s_kernels_compute(goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 in Triton's interpreter, with functions for the approximations of a GPU's assembler."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU these kernels approximate; the interpreter runs them exactly")
    imported(monkeypatch, "Mamba3")
    names = ("angle_dt", "mamba3_siso_fwd")
    angle_dt, siso = (importlib.import_module(f"mamba_ssm.ops.triton.mamba3.{name}") for name in names)
    import triton.language as tl

    exact = {
        "cos_approx": lambda x: tl.cos(x),
        "sin_approx": lambda x: tl.sin(x),
        "tanh_approx": lambda x: 2 * tl.sigmoid(2 * x) - 1,
        "sigmoid_approx": lambda x: tl.sigmoid(x),
        "silu": lambda x: x * tl.sigmoid(x),
    }
    for module in (angle_dt, siso):
        for name in exact.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, exact[name])
    for kernel in (angle_dt.angle_dt_fwd_kernel, siso.mamba3_siso_fwd_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    given, entering = arguments(2), states() if goes_on else None
    gate = torch.randn(2, TIME, HEADS, VALUE)
    angle, *others = entering or (None,)
    cut = {"chunk_size": 16, "cu_seqlens": None}
    omega, step = given["Angles"], given["DT"]
    turned, last = angle_dt.angle_dt_fwd(omega, step, init_state=angle, return_output_state=True, **cut)
    found = siso.mamba3_siso_fwd(
        **given | {"Angles": turned}, Z=gate, Initial_States=others or None, return_final_states=True, **cut
    )
    y, _, expected = stepped(**given, Z=gate, states=entering)
    assert error(found[0], y) < 2e-6
    ours = mamba3._angles(omega, step, entering, 16)  # on a GPU by the same kernel
    assert error(ours.cos(), turned.cos()) < 2e-6 and error(ours.sin(), turned.sin()) < 2e-6
    for mine, theirs in zip(expected, (last, *found[-1]), strict=True):
        assert error(theirs, mine) < 2e-6
