"""What is measured: shapes, inputs, models, and the peers' scans."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from statescope.adapters.mamba2 import read_chunk_scan
from statescope.models import bundled, load
from statescope.recurrence import Recurrence

CHUNK = 256
"""Tokens of a chunk of the peers' scans: what public Mamba-2 models are configured with."""


@dataclass(frozen=True)
class Shape:
    """A public Mamba-2 model's shape; heads of 64 x 128."""

    layers: int
    width: int
    heads: int
    value: int = 64
    key: int = 128


SHAPES = {
    "130M": Shape(24, 768, 24),
    "370M": Shape(48, 1024, 32),
    "1.3B": Shape(48, 2048, 64),
    "2.7B": Shape(64, 2560, 80),
}


@dataclass(frozen=True)
class Signature:
    """A layer of a public model with another scan."""

    heads: int
    key: int
    value: int


SIGNATURES = {
    "gated-delta": Signature(32, 128, 128),  # Qwen3-Next 80B
    "KDA": Signature(32, 128, 128),  # Kimi Linear 48B
    "GLA": Signature(4, 128, 256),  # GLA 340M
    "HGRN-2": Signature(16, 128, 128),  # HGRN-2 1.3B
    "RetNet": Signature(8, 256, 512),  # RetNet 1.3B
    "RWKV-7": Signature(32, 64, 64),  # RWKV-7 1.5B
    "Mamba-1": Signature(24, 16, 64),  # 130M, channels in groups of 64
}


def draw(shape: Shape, time: int, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Draw a layer's scan call: slow and fast heads; x, B and C slices of one convolution's output."""
    g = torch.Generator(device=device).manual_seed(seed)
    width = shape.heads * shape.value
    xbc = torch.randn(1, time, width + 2 * shape.key, device=device, generator=g).add_(0.2).to(dtype)
    x, b, c = xbc.split([width, shape.key, shape.key], -1)
    return {
        "hidden_states": x.unflatten(2, (shape.heads, shape.value)),
        "dt": torch.randn(1, time, shape.heads, device=device, generator=g).sub_(1).to(dtype),
        "A": -torch.logspace(-1, 1.2, shape.heads, device=device),
        "B": b[:, :, None],
        "C": c[:, :, None],
        "D": torch.randn(shape.heads, device=device, generator=g),
        "dt_bias": torch.randn(shape.heads, device=device, generator=g) * 1.5 - 2.5,
    }


def as_recurrence(call: dict[str, Any]) -> Recurrence:
    """Read a drawn call as the adapter reads a model's."""
    return read_chunk_scan(False, **call, chunk_size=CHUNK, dt_softplus=True).recurrence


def mamba_ssm_scan(call: dict[str, Any]) -> Callable[[], Any]:
    """Return mamba_ssm's plain forward scan of a call, of which ``y`` is the first result.

    Raises
    ------
    ImportError, RuntimeError
        If it is not installed, or the call is not on a GPU.
    """
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd as forward

    x, dt, a, b, c = (call[name] for name in ("hidden_states", "dt", "A", "B", "C"))
    if not x.is_cuda:
        raise RuntimeError("mamba_ssm needs a GPU")
    return lambda: forward(x, dt, a, b, c, CHUNK, D=call["D"], dt_bias=call["dt_bias"], dt_softplus=True)


def transformers_scan(call: dict[str, Any]) -> Callable[[], Any]:
    """Return the scan of transformers in torch of a call."""
    from transformers.models.mamba2 import modeling_mamba2

    own: Any = modeling_mamba2.mamba2_chunk_scan
    in_torch = own.__wrapped__

    def work() -> Any:
        with torch.no_grad():
            return in_torch(**call, chunk_size=CHUNK, dt_softplus=True)

    return work


def build(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Build the transformers model of a name: a public shape with random weights, or a bundled one."""
    if name in bundled():
        return load(name, device=device, dtype=dtype)
    return random_model(SHAPES[name], device, dtype)


def random_model(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """Build a transformers Mamba-2 of a shape with random weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50288, hidden_size=shape.width, num_hidden_layers=shape.layers, num_heads=shape.heads,
        head_dim=shape.value, state_size=shape.key, n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model: nn.Module = Mamba2ForCausalLM(config)
    return model.to(dtype).eval()


def mamba_ssm_model(model: nn.Module) -> nn.Module:
    """Build mamba_ssm's ``MambaLMHeadModel`` with the weights of a transformers Mamba-2.

    Raises
    ------
    ImportError, RuntimeError
        If it is not installed, or the model is not on a GPU.
    """
    first, c = next(model.parameters()), _config(model)
    if not first.is_cuda:
        raise RuntimeError("mamba_ssm needs a GPU")
    with _without_mamba1_kernels():
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    layer = {
        "layer": "Mamba2", "d_state": c.state_size, "headdim": c.head_dim, "ngroups": c.n_groups,
        "expand": c.expand, "chunk_size": c.chunk_size,
        "use_mem_eff_path": find_spec("causal_conv1d") is not None,
    }  # fmt: skip
    config = MambaConfig(
        d_model=c.hidden_size, n_layer=c.num_hidden_layers, vocab_size=c.vocab_size, ssm_cfg=layer,
        tie_embeddings=c.tie_word_embeddings,
    )  # fmt: skip
    peer: nn.Module = MambaLMHeadModel(config, device=first.device, dtype=first.dtype)
    renamed = {k.replace(".embeddings.", ".embedding."): v for k, v in model.state_dict().items()}
    peer.load_state_dict(renamed)
    return peer.eval()


def vocabulary(model: nn.Module) -> int:
    """Number of token ids a model knows."""
    return int(_config(model).vocab_size)


def _config(model: nn.Module) -> Any:
    return model.config


@contextmanager
def _without_mamba1_kernels() -> Iterator[None]:
    """Let mamba_ssm be imported where its compiled kernels are missing: only Mamba-1 calls them."""
    name = "selective_scan_cuda"
    missing = find_spec("mamba_ssm") is not None and name not in sys.modules and find_spec(name) is None
    if missing:
        sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        if missing:
            del sys.modules[name]
