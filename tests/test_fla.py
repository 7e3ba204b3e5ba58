"""Models of flash-linear-attention: arguments of its scans against loops of ours; its models where it is.

fla is no dependency. Without a GPU its kernels run in Triton's interpreter, one configuration of each.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs, skip
from test_mamba_ssm import FOLDER, imported
from tiny import VOCABULARY, assert_close, ids
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

import statescope
from statescope.adapters import ADAPTERS
from statescope.capture import capture
from statescope.carry import Carry
from statescope.kernels import reference

TIME, HEADS, KEY, VALUE = 9, 2, 6, 5


def draw(*shape: int) -> Tensor:
    return torch.randn(2, TIME, HEADS, *shape, dtype=torch.float64)


def run(name: str, *, transposed: bool, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and last state of a scan by our reference, and the state it began with."""
    start = torch.randn(2, HEADS, KEY, VALUE, dtype=torch.float64)
    layout = {"state_v_first": True} if transposed else {}
    initial = start.transpose(-2, -1).contiguous() if transposed else start
    call = ADAPTERS[name].read(False, **given, initial_state=initial, output_final_state=True, **layout)
    assert call.recurrence.structure == ADAPTERS[name].structure
    y, last = call.answer(reference.scan(call.recurrence))
    return y, last.transpose(-2, -1) if transposed else last, start


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., None] * y[..., None, :]


def read(state: Tensor, key: Tensor) -> Tensor:
    return (key[..., None] * state).sum(-2)


@pytest.mark.parametrize(("name", "decay"), [("chunk_gla", "g"), ("fused_recurrent_gla", "gk")])
def test_gla(name: str, decay: str) -> None:
    q, k, g, v = draw(KEY), draw(KEY), -draw(KEY).abs(), draw(VALUE)
    y, last, state = run(name, transposed=True, q=q, k=k, v=v, **{decay: g})
    for t in range(TIME):
        state = g[:, t].exp()[..., None] * state + outer(k[:, t], v[:, t])
        close(y[:, t], read(state, q[:, t]) * KEY**-0.5)
    close(last, state)
    with pytest.raises(ValueError, match=r"packed sequences .cu_seqlens"):
        ADAPTERS[name].read(False, q, k, v, **{decay: g}, cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("name", ["chunk_retention", "fused_chunk_retention", "fused_recurrent_retention"])
def test_retention(name: str) -> None:
    q, k, v = draw(KEY), draw(KEY), draw(VALUE)
    y, last, state = run(name, transposed=False, q=q, k=k, v=v)
    gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64], dtype=torch.float64)[:, None, None]
    for t in range(TIME):
        state = gamma * state + outer(k[:, t], v[:, t])
        close(y[:, t], read(state, q[:, t]) * KEY**-0.5)
    close(last, state)
    with pytest.raises(ValueError, match=r"without a state; set config.attn_mode='chunk'"):
        ADAPTERS["parallel_retention"].read(False, q=q, k=k, v=v)


@pytest.mark.parametrize("name", ["chunk_delta_rule", "fused_recurrent_delta_rule"])
def test_delta_rule(name: str) -> None:
    q, k, v, beta = draw(KEY), draw(KEY), draw(VALUE), draw().sigmoid()
    y, last, state = run(name, transposed=False, q=q, k=k, v=v, beta=beta, use_qk_l2norm_in_kernel=True)
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    for t in range(TIME):
        new = beta[:, t, :, None] * (v[:, t] - read(state, k[:, t]))
        state = state + outer(k[:, t], new)
        close(y[:, t], read(state, q[:, t]) * KEY**-0.5)
    close(last, state)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule(name: str, negative: bool) -> None:
    q, k, v, g, beta = draw(KEY), draw(KEY), draw(VALUE), draw(), draw()
    gate = {"A_log": torch.randn(HEADS), "dt_bias": torch.randn(HEADS)}
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": negative}
    norm = {"use_qk_l2norm_in_kernel": True}
    y, last, state = run(name, transposed=True, q=q, k=k, v=v, g=g, beta=beta, **gate, **flags, **norm)
    q, k, beta = normalize(q, dim=-1), normalize(k, dim=-1), beta.sigmoid() * (1 + negative)
    g = -gate["A_log"].double().exp() * softplus(g + gate["dt_bias"].double())
    for t in range(TIME):
        state = g[:, t].exp()[..., None, None] * state
        state = state + outer(k[:, t], beta[:, t, :, None] * (v[:, t] - read(state, k[:, t])))
        close(y[:, t], read(state, q[:, t]) * KEY**-0.5)
    close(last, state)


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda(name: str, bound: float | None) -> None:
    q, k, v, g, beta = draw(KEY), draw(KEY), draw(VALUE), draw(KEY), draw()
    gate = {"A_log": torch.randn(HEADS), "dt_bias": torch.randn(HEADS * KEY), "lower_bound": bound}
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
    y, last, state = run(name, transposed=True, q=q, k=k, v=v, g=g, beta=beta, **gate, **flags)
    q, k, beta = normalize(q, dim=-1), normalize(k, dim=-1), beta.sigmoid()
    rate, g = gate["A_log"].double().exp()[:, None], g + gate["dt_bias"].double().view(HEADS, KEY)
    g = -rate * softplus(g) if bound is None else bound * (rate * g).sigmoid()
    for t in range(TIME):
        state = g[:, t].exp()[..., None] * state
        state = state + outer(k[:, t], beta[:, t, :, None] * (v[:, t] - read(state, k[:, t])))
        close(y[:, t], read(state, q[:, t]) * KEY**-0.5)
    close(last, state)


@pytest.mark.parametrize("name", ["chunk_rwkv6", "fused_recurrent_rwkv6"])
def test_rwkv6(name: str) -> None:
    r, k, v, w, u = draw(KEY), draw(KEY), draw(VALUE), -draw(KEY).exp(), torch.randn(HEADS, KEY).double()
    y, last, state = run(name, transposed=False, r=r, k=k, v=v, w=w, u=u, scale=1.0)
    for t in range(TIME):
        write = outer(k[:, t], v[:, t])
        close(y[:, t], read(state + u[..., None] * write, r[:, t]))
        state = w[:, t].exp()[..., None] * state + write
    close(last, state)


@pytest.mark.parametrize("name", ["chunk_rwkv7", "fused_mul_recurrent_rwkv7"])
def test_rwkv7(name: str) -> None:
    r, k, v, w = draw(KEY), draw(KEY), draw(VALUE), -draw(KEY).exp()
    erased, rate = normalize(draw(KEY), dim=-1), draw(KEY).sigmoid()
    parts = {"a": -erased, "b": erased * rate} if name == "chunk_rwkv7" else {"kk": erased, "a": rate}
    y, last, state = run(name, transposed=False, r=r, w=w, k=k, v=v, scale=1.0, **parts)
    for t in range(TIME):
        lost = outer(erased[:, t] * rate[:, t], read(state, erased[:, t]))
        state = w[:, t].exp()[..., None] * state - lost + outer(k[:, t], v[:, t])
        close(y[:, t], read(state, r[:, t]))
    close(last, state)


class LayerOfMamba2(nn.Module):
    """What is read of fla's layer."""

    def __init__(self, groups: int, norm: bool, of_channels: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.ssm_state_size, self.n_groups = 4, VALUE, KEY, groups
        self.intermediate_size, self.conv_kernel_size, self.chunk_size = 4 * VALUE, 4, 16
        self.conv_dim = self.intermediate_size + 2 * groups * KEY
        self.rmsnorm, self.D_has_hdim, self.dt_limit, self.act = norm, of_channels, (0.0, 0.9), nn.SiLU()
        self.in_proj = nn.Linear(8, self.intermediate_size + self.conv_dim + 4, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, 4, groups=self.conv_dim, padding=3)
        self.A_log, self.dt_bias = (
            nn.Parameter(torch.linspace(0, 2, 4)),
            nn.Parameter(torch.linspace(-3, 0, 4)),
        )
        self.D = nn.Parameter(torch.rand(4 * VALUE if of_channels else 4))
        self.out_proj = nn.Linear(self.intermediate_size, 8, bias=False)

    def norm(self, y: Tensor, gate: Tensor) -> Tensor:
        return normalize(y * self.act(gate), dim=-1)


def loop_of_mamba2(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last inputs of the convolution and state of fla's layer, token by token from the start."""
    gate, inputs, dt = layer.in_proj(x).split([4 * VALUE, layer.conv_dim, 4], -1)
    state, rows = torch.zeros(len(x), 4, VALUE, KEY, dtype=x.dtype), []
    window = torch.zeros(len(x), layer.conv_dim, 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        window = torch.cat([window[..., 1:], inputs[:, t, :, None]], -1)
        mixed = layer.act((window * layer.conv1d.weight[:, 0]).sum(-1) + layer.conv1d.bias)
        v, B, C = mixed.split([4 * VALUE, layer.n_groups * KEY, layer.n_groups * KEY], -1)
        v = v.unflatten(-1, (4, VALUE))
        B, C = (y.unflatten(-1, (-1, KEY)).repeat_interleave(4 // layer.n_groups, 1) for y in (B, C))
        step = softplus(dt[:, t] + layer.dt_bias).clamp(*layer.dt_limit)
        kept = (-step * layer.A_log.exp()).exp()[..., None, None]
        state = kept * state + outer(step[..., None] * v, B)
        skip = layer.D.unflatten(0, (4, -1)) * v
        y = ((state * C[:, :, None]).sum(-1) + skip).flatten(1)
        rows.append(layer.norm(y, gate[:, t]) if layer.rmsnorm else y * layer.act(gate[:, t]))
    return layer.out_proj(torch.stack(rows, 1)), window, state


@pytest.mark.parametrize("method", ["torch_forward", "cuda_kernels_forward"])
@pytest.mark.parametrize(("groups", "norm", "of_channels"), [(1, True, False), (4, False, True)])
def test_layer_of_mamba2(method: str, groups: int, norm: bool, of_channels: bool) -> None:
    """From the start and going on; several tokens reach the layer's own method one by one."""
    torch.set_default_dtype(torch.float64)
    try:
        layer, x = LayerOfMamba2(groups, norm, of_channels), torch.randn(2, TIME, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    adapter = ADAPTERS[f"fla.layers.mamba2.Mamba2.{method}"]
    with torch.no_grad():
        y, window, state = loop_of_mamba2(layer, x)
        last: Any = None
        for part, expected in zip(x.split([6, 3], 1), y.split([6, 3], 1), strict=True):
            call = adapter.read(True, layer, part, last, True, None)
            assert call.recurrence.structure == adapter.structure
            found, *kept = call.answer(reference.scan(call.recurrence))
            close(found, expected)
            before, last = last, dict(zip(("conv_state", "recurrent_state"), kept, strict=True))
        close(last["conv_state"], window)
        close(last["recurrent_state"], state)
        given: list[Any] = []

        def own(token: Tensor, entering: Any, use_cache: bool, mask: Any) -> Any:
            given.append((token, entering))
            single = adapter.read(True, layer, token, entering, use_cache, mask)
            assert single.own is None
            return single.answer(reference.scan(single.recurrence))

        for found, expected in zip(call.own(own), (y[:, 6:], window, state), strict=True):
            close(found, expected)
        assert [token.shape[1] for token, _ in given] == [1, 1, 1] and given[0][1] is before


def test_layer_of_mamba2_refuses() -> None:
    """A mask; and groups that fla's torch code takes for one head here and for another there."""
    read_torch, read_kernels = (
        ADAPTERS[f"fla.layers.mamba2.Mamba2.{name}"].read
        for name in ("torch_forward", "cuda_kernels_forward")
    )
    layer, x = LayerOfMamba2(2, True, False), torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match=r"n_groups=2.*GPU with mamba_ssm"):
        read_torch(True, layer, x)
    assert read_kernels(True, layer, x).recurrence.groups == 2
    with pytest.raises(ValueError, match="attention_mask"):
        read_kernels(True, layer, x, attention_mask=torch.ones(1, 3))


MODELS: dict[str, dict[str, Any]] = {
    "GLA": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1},
    "HGRN2": {"num_heads": None, "expand_ratio": 16},
    "RetNet": {"num_heads": 2, "expand_v": 2},
    "DeltaNet": {"num_heads": 2},
    "GatedDeltaNet": {"num_heads": 2, "head_dim": 16, "expand_v": 1},
    "KDA": {"num_heads": 2, "head_dim": 16, "expand_v": 1},
    "RWKV6": {"num_heads": 2, "proj_low_rank_dim": 8, "gate_low_rank_dim": 8},
    "Mamba2": {"head_dim": 16, "state_size": 8, "num_heads": 4, "chunk_size": 16, "initializer_range": 0.5},
    "RWKV7": {"head_dim": 16, **{f"{x}_low_rank_dim": 8 for x in ("decay", "gate", "a", "v")}},
}
TEXT = ids(24, sequences=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def fla() -> Iterator[Any]:
    """Import fla; without a GPU its kernels are interpreted."""
    for name in ("fla", "triton", "einops"):
        needs(name)
    from triton.runtime import autotuner

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if DEVICE == "cpu":
            assert os.environ["TRITON_INTERPRET"] == "1"
            own = autotuner.Autotuner.__init__

            def first_only(self: Any, fn: Any, names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
                own(self, fn, names, configs[:1], *args, **kwargs)

            patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
            patch.setattr(autotuner.Autotuner, "__init__", first_only)
        if FOLDER or find_spec("mamba_ssm"):
            imported(patch, "Mamba2")  # whose kernels fla's Mamba-2 then has
        yield importlib.import_module("fla.models")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("fla", "mamba_ssm")]:
        del sys.modules[name]  # transformers would take it for its own use


def built(fla: Any, name: str, **changes: Any) -> nn.Module:
    plain = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(fla, f"{name}Config")(**sizes, **plain, **MODELS[name] | changes)
        torch.manual_seed(0)
        made: nn.Module = getattr(fla, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if parameter.ndim > 1 and "norm" not in path and min(parameter.shape) > 1:
                parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
    return made.to(DEVICE)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, fla: Any) -> nn.Module:
    return built(fla, request.param)


@pytest.mark.filterwarnings("ignore")
def test_model_of_fla(model: nn.Module) -> None:
    """Observed bit for bit, replaced to rounding, the same in segments, with the state that fla keeps."""
    text, seen = TEXT.to(DEVICE), []
    with torch.no_grad():
        plain = model(text, use_cache=True)
    hook = model.register_forward_hook(lambda *a: seen.append(a[2].logits))
    whole = statescope.trace(model, text, snapshots=-1)
    assert torch.equal(seen.pop(), plain.logits)
    layer = [a for a in ADAPTERS.values() if type(model).__name__.removesuffix("ForCausalLM") in a.models]
    assert {whole.attrs["structure"]} == {a.structure for a in layer}
    for depth in (0, 1):
        kept = plain.past_key_values[depth]["recurrent_state"].cpu().numpy()
        state = whole["snapshots"].state.sel(layer=depth).values[:, 0]
        kept = (
            kept
            if kept.shape == state.shape and np.allclose(kept, state, atol=1e-3)
            else kept.swapaxes(-2, -1)
        )
        np.testing.assert_allclose(state, kept, atol=1e-4 * np.abs(kept).max())
    replaced = statescope.trace(model, text, snapshots=-1, backend="chunked")
    torch.testing.assert_close(seen.pop(), plain.logits, rtol=1e-3, atol=1e-4)
    assert_close(replaced, whole, rtol=1e-4)
    for backend in ("auto", "chunked"):
        assert_close(
            statescope.trace(model, text, snapshots=-1, segment=7, backend=backend), whole, rtol=1e-4
        )
    hook.remove()
    with torch.no_grad(), capture(model, lambda layer, call, run_own: run_own()):
        carry = Carry.fresh(model)
        from statescope import caches

        model(text[:, :9], **caches.inputs(model, carry.cache, 0, text[:, :9]))
        again = Carry.from_bytes(carry.to_bytes(), model, torch.device(DEVICE))
        pair = [
            model(text[:, 9:], **caches.inputs(model, c.cache, 9, text[:, 9:])).logits for c in (carry, again)
        ]
    assert torch.equal(*pair)


@pytest.mark.filterwarnings("ignore")
def test_mamba2_with_kernels(fla: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with mamba_ssm's kernels, where groups of heads that share a key are in order."""
    layers = importlib.import_module("fla.layers.mamba2")
    if not layers.is_fast_path_available:
        skip("mamba_ssm is not installed")

    def forward(
        self: Any, hidden_states: Tensor, past_key_values: Any, use_cache: bool, **others: Any
    ) -> tuple[Tensor, None, Any]:
        kept = layers.get_layer_cache(self, past_key_values)
        y, inputs, state = self.cuda_kernels_forward(hidden_states, kept, use_cache)
        states = {"recurrent_state": state, "conv_state": inputs, "offset": hidden_states.shape[1]}
        layers.update_layer_cache(self, past_key_values, **states)
        return y, None, past_key_values

    if DEVICE == "cpu":  # as it does on a GPU
        monkeypatch.setattr(layers.Mamba2, "forward", forward)
    test_model_of_fla(built(fla, "Mamba2", n_groups=2, state_size=32))
