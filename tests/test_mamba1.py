"""Mamba-1, whose channels are gathered to heads, against its paper's recurrence channel by channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from tiny import assert_close, build, ids
from torch import Tensor
from torch.nn.functional import softplus
from transformers.models.mamba import modeling_mamba

import statescope
from statescope.adapters import ADAPTERS
from statescope.adapters.mamba1 import channels_of_a_head, read_selective_scan
from statescope.recurrence import Recurrence

TOKENS = 90
TEXT = ids(TOKENS, sequences=2)


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the model hands to its scan, by layer."""
    seen: list[dict[str, Any]] = []
    own = modeling_mamba.mamba_selective_scan

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append({**dict(zip(("x", "dt", "A", "B", "C"), args, strict=True)), **kwargs})
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_mamba, "mamba_selective_scan", spy)
        yield seen


def states(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed states, writes and states of every channel, (batch, time, channel, d_state), in float64."""
    x, dt, A, B = (call[name].double() for name in ("x", "dt", "A", "B"))
    step = softplus(dt + call["delta_bias"].double()[:, None])
    state = torch.zeros(*x.shape[:2], A.shape[1], dtype=torch.float64)
    rows = []
    for t in range(x.shape[-1]):
        decayed = torch.exp(step[..., t, None] * A) * state
        write = (step[..., t] * x[..., t])[..., None] * B[:, None, :, t]
        state = decayed + write
        rows.append((decayed, write, state))
    decayed, write, state = (torch.stack(kind, 1) for kind in zip(*rows, strict=True))
    return decayed, write, state


@pytest.mark.parametrize(("inner", "head"), [(128, 64), (96, 48)])
@torch.no_grad()
def test_heads_are_channels_in_quadrature(inner: int, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record against the states of all channels, held in full."""
    assert channels_of_a_head(inner) == head
    model = build("mamba", expand=inner // 32)
    with spied(monkeypatch) as calls:
        model(TEXT, use_cache=False)
    record = statescope.trace(model, TEXT, snapshots=50, probes=70, segment=40)
    for layer, call in enumerate(calls):
        decayed, write, state = (x.unflatten(2, (-1, head)) for x in states(call))
        norms = [x.square().sum(-1).sqrt().square().sum(-1).sqrt() for x in (decayed, write, state)]
        cross = (decayed * write).sum((-2, -1))
        step = softplus(call["dt"].double() + call["delta_bias"].double()[:, None])
        rate = (step[:, :, None] * call["A"].double()[..., None]).mean(2).transpose(1, 2)
        want = {
            "log_decay": rate.unflatten(2, (-1, head)).mean(-1),
            "write_norm": norms[1],
            "state_norm": norms[2],
            "state_mean": state.mean((-2, -1)),
            "write_overlap": torch.where(cross == 0, 0.0, cross / (norms[0] * norms[1])),
        }
        got = record["steps"].to_dataset().sel(layer=layer)
        for name, truth in want.items():
            error = np.abs(got[name].values - truth.numpy()).max() / truth.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e}"
        kept = record["snapshots"].state.sel(layer=layer, position=50).values
        np.testing.assert_allclose(kept, state[:, 50].transpose(-2, -1), atol=1e-5 * float(state.abs().max()))
        check_probe(record["probes"].to_dataset().sel(layer=layer, probe=70), call, write, state, head)


def value_of(call: dict[str, Any]) -> Tensor:
    """What every channel is given to write, (batch, time, channel)."""
    step = softplus(call["dt"].double() + call["delta_bias"].double()[:, None])
    return (step * call["x"].double()).transpose(1, 2)


def check_probe(got: Any, call: dict[str, Any], write: Tensor, state: Tensor, head: int) -> None:
    """What survives of every write at token 70, entry by entry."""
    step = softplus(call["dt"].double() + call["delta_bias"].double()[:, None])
    log_decay = (step[..., None] * call["A"].double()[:, None]).transpose(1, 2).unflatten(2, (-1, head))
    until = log_decay.cumsum(1)
    survives = write[:, :71] * (until[:, 70:71] - until[:, :71]).exp()
    contribution = survives.square().sum((-2, -1)).sqrt()
    share = (survives * state[:, 70:71]).sum((-2, -1)) / state[:, 70:71].square().sum((-2, -1))
    query = call["C"].double().transpose(1, 2)[:, 70]
    read, v = torch.einsum("bthvk,bk->bthv", survives, query), value_of(call).unflatten(2, (-1, head))[:, :71]
    output = read.sum(1, keepdim=True)
    wanted = {
        "contribution": contribution,
        "share": share,
        "attention": (read * v).sum(-1) / v.square().sum(-1),
        "output_contribution": read.norm(dim=-1),
        "output_share": (read * output).sum(-1) / output.square().sum(-1),
    }
    for name, truth in wanted.items():
        error = np.abs(got[name].values[:, :71] - truth.numpy()).max() / truth.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"
    np.testing.assert_allclose(got["share"].sum("token") + got["share_before"], 1, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_half_precision_goes_on(backend: str) -> None:
    """In bfloat16, where the model rounds its outputs, segments still give what one pass gives."""
    model = build("mamba").to(torch.bfloat16)
    whole = statescope.trace(model, TEXT, segment=TOKENS, backend=backend)
    parts = statescope.trace(model, TEXT, segment=30, backend=backend)
    assert_close(parts, whole, rtol=0.05)  # a state that is lost differs by 0.5 and more


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")
def test_fused_scan_of_a_model() -> None:
    """In Triton's interpreter, segments and probes included."""
    needs("triton")
    model, text = build("mamba"), ids(20)
    asked = {"segment": 12, "snapshots": 5, "probes": 17}
    in_torch = statescope.trace(model, text, backend="chunked", **asked)
    assert_close(statescope.trace(model, text, backend="fused", **asked), in_torch, rtol=1e-5)


def test_edit_reaches_the_scan() -> None:
    """With the step sizes' decays halved the state is larger, and with nothing changed all is the same."""
    model = build("mamba")
    plain = statescope.trace(model, TEXT)
    same = statescope.trace(model, TEXT, edit=lambda layer, r: r, segment=30)
    assert_close(same, plain, rtol=1e-5)
    slower = statescope.trace(model, TEXT, edit=lambda layer, r: r.replace(log_decay=r.log_decay / 8))

    def in_place(layer: int, r: Recurrence) -> Recurrence:
        r.log_decay[:, :40] /= 8
        r.log_decay[:, 40:, 0].div_(8)
        r.log_decay[:, 40:, 1:].div_(8)
        return r

    assert_close(statescope.trace(model, TEXT, edit=in_place), slower, rtol=1e-6)
    grown = slower["steps"].state_norm.sel(layer=0) / plain["steps"].state_norm.sel(layer=0)
    assert float(grown.isel(token=-1).min()) > 1.05


def test_groups_of_channels_are_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit sees zamba's groups as one recurrence; unknown ones of another model are refused."""
    model, seen = build("zamba"), []

    def edit(layer: int, r: Recurrence) -> Recurrence:
        seen.append((layer, r.heads, r.groups))
        return r.replace(v=r.v * 2)

    plain, edited = (statescope.trace(model, TEXT, segment=30, edit=e) for e in (None, edit))
    assert {(heads, groups) for _, heads, groups in seen} == {(2, 2)}
    np.testing.assert_allclose(
        edited["steps"].state_norm.sel(layer=0), 2 * plain["steps"].state_norm.sel(layer=0), rtol=1e-5
    )
    for name in ("mamba_selective_scan", "mamba_selective_state_update"):
        monkeypatch.setitem(ADAPTERS, name, dataclasses.replace(ADAPTERS[name], parts=""))
    with pytest.raises(ValueError, match="layer 0 scans its heads in several calls"):
        statescope.trace(build("zamba"), TEXT)


def test_unknown_argument_is_refused() -> None:
    """A later transformers that hands the state to its scan must not have it added twice."""
    x = torch.ones(1, 4, 3)
    call = {"hidden_states": x, "dt": x, "A": -x[0], "B": x[:, :3], "C": x[:, :3]}
    assert read_selective_scan(True, **call, seq_idx=None).complete is None
    with pytest.raises(ValueError, match="initial_states, which this adapter does not know"):
        read_selective_scan(True, **call, initial_states=x)
    with pytest.raises(ValueError, match=r"expected \(batch, d_state, time\)"):
        read_selective_scan(True, **{**call, "B": x[0]})
