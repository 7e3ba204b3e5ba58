"""mamba_ssm, or a stand-in for it, and how it is read plainly and traced."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
import types
import warnings
from dataclasses import dataclass
from typing import Any

import mamba1_like
import mamba_ssm_like
import pytest
import torch
from conftest import needs
from tiny import VOCABULARY
from torch import Tensor
from torch.nn.functional import silu

import statescope

FOLDER = os.environ.get("STATESCOPE_MAMBA_SSM")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Library:
    """mamba_ssm, or the stand-in for it."""

    model: Any
    config: Any
    params: Any
    home: types.ModuleType
    device: str
    tokens: int
    segments: tuple[int, ...]
    ssm_cfg: dict[str, Any]
    rtol: float = 1e-5
    layer: str = "Mamba2"

    def build(self, attention: tuple[int, ...] = (), layers: int = 2, **ssm_cfg: Any) -> Any:
        """Build a small model whose states matter."""
        torch.manual_seed(0)
        config = self.config(
            d_model=32,
            n_layer=layers,
            vocab_size=VOCABULARY,
            ssm_cfg={"layer": self.layer} | self.ssm_cfg | ssm_cfg,
            attn_layer_idx=list(attention),
        )
        model = self.model(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "norm" not in name:
                    parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
        return model.to(self.device)

    def matrices(self, kept: Tensor) -> Tensor:
        """A state as mamba_ssm keeps it, by head: (batch, heads, key, value)."""
        if self.layer == "Mamba1":
            kept = kept.unflatten(1, (-1, 64))
        return kept.transpose(-2, -1).cpu()

    def text(self) -> Tensor:
        """Draw two sequences of token ids."""
        return torch.randint(VOCABULARY, (2, self.tokens), generator=torch.Generator().manual_seed(1))


STAND_IN = Library(
    mamba_ssm_like.MambaLMHeadModel,
    mamba_ssm_like.MambaConfig,
    mamba_ssm_like.InferenceParams,
    mamba_ssm_like,
    "cpu",
    tokens=150,
    segments=(2, 3, 7, 64),
    ssm_cfg={},
)


STAND_IN_1 = dataclasses.replace(STAND_IN, home=mamba1_like, layer="Mamba1")


def imported(patch: pytest.MonkeyPatch, layer: str) -> Library:
    """Import mamba_ssm; without a GPU its kernels are interpreted."""
    if FOLDER:
        patch.syspath_prepend(FOLDER)
    for name in ("mamba_ssm", "triton", "einops"):
        needs(name)
    try:
        import selective_scan_cuda  # noqa: F401
    except ImportError:  # Mamba-2 does without; for Mamba-1 mamba_ssm's own reference stands in
        compiled: Any = types.ModuleType("selective_scan_cuda")
        compiled.fwd = reference_of_mamba_ssm
        patch.setitem(sys.modules, "selective_scan_cuda", compiled)
    if DEVICE == "cpu":
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    patch.setenv("MAMBA_DETERMINISTIC", "1")  # one configuration of each kernel, so that none is timed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = "modules.mamba2" if layer == "Mamba2" else "modules.mamba_simple"
        names = ("models.mixer_seq_simple", "models.config_mamba", "utils.generation", own)
        models, configs, generation, home = (importlib.import_module(f"mamba_ssm.{name}") for name in names)
    return Library(
        models.MambaLMHeadModel,
        configs.MambaConfig,
        generation.InferenceParams,
        home,
        DEVICE,
        tokens=24 if DEVICE == "cpu" else 150,
        segments=(3, 16) if DEVICE == "cpu" else (2, 3, 7, 64),
        ssm_cfg={"d_state": 16, "headdim": 32, "chunk_size": 16} if layer == "Mamba2" else {"expand": 4},
        layer=layer,
        rtol=1e-5 if DEVICE == "cpu" else 1e-2,  # there its products round what they multiply to TF32
    )


def reference_of_mamba_ssm(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *rest: Any) -> Any:
    """What mamba_ssm's compiled scan gives: outputs, the last state in every other entry, gated outputs."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    y, last = selective_scan_ref(u, delta, A, B, C, D, None, *rest, return_last_state=True)
    states = torch.stack([last, last], -1).flatten(2)[:, :, None]
    return y, states, *([] if z is None else [y * silu(z)])


def plainly(model: Any, text: Tensor, **inputs: Any) -> Tensor:
    """Read a text as a user would, on the path on which mixers call their scan by name."""
    for block in model.backbone.layers:
        block.mixer.use_mem_eff_path = False
    with torch.no_grad():
        logits: Tensor = model(text.to(next(model.parameters()).device), **inputs).logits
    for block in model.backbone.layers:
        block.mixer.use_mem_eff_path = True
    return logits


def traced(model: Any, text: Tensor, **settings: Any) -> tuple[Any, Tensor]:
    """Trace; the record, and the logits on the way."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda *a: seen.append(a[2].logits))
    try:
        record = statescope.trace(model, text, **settings)
    finally:
        hook.remove()
    return record, torch.cat([logits for logits in seen if len(logits) == len(text)], 1)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest value."""
    assert found.shape == expected.shape and expected.abs().max() > 1e-3
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
