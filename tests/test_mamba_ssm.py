"""mamba_ssm's own models: against a stand-in of ours everywhere, and against mamba_ssm where it is.

mamba_ssm is imported as installed, or from the folder that ``STATESCOPE_MAMBA_SSM`` names. Without a GPU
its kernels run in Triton's interpreter, on fewer tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mamba1_like
import mamba3_like
import mamba_ssm_like
import pytest
import torch
from conftest import needs
from tiny import VOCABULARY, assert_close
from torch import Tensor
from torch.nn.functional import silu
from zarr.storage import MemoryStore

import statescope
from statescope import caches
from statescope.capture import capture

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
    anew: float = 0.0

    @property
    def rounded(self) -> float:
        """Relative error where layers read what is rounded anew, which Mamba-3 does to bfloat16."""
        return max(self.rtol, self.anew)

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


STAND_INS = {
    "Mamba1": dataclasses.replace(STAND_IN, home=mamba1_like, layer="Mamba1"),
    "Mamba2": STAND_IN,
    "Mamba3": dataclasses.replace(
        STAND_IN, home=mamba3_like, layer="Mamba3", tokens=60, segments=(3, 32), anew=2**-7
    ),
}


@pytest.fixture(
    scope="module",
    params=[(name, layer) for name in ("stand-in", "mamba_ssm") for layer in STAND_INS],
    ids=" ".join,
)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    name, layer = request.param
    if name == "stand-in":
        yield STAND_INS[layer]
        return
    with pytest.MonkeyPatch.context() as patch:
        yield imported(patch, layer)
    for name in [n for n in sys.modules if n.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]  # transformers would take it for its own use


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
        own = {"Mamba1": "modules.mamba_simple"}.get(layer, f"modules.{layer.lower()}")
        names = ("models.mixer_seq_simple", "models.config_mamba", "utils.generation", own)
        models, configs, generation, home = (importlib.import_module(f"mamba_ssm.{name}") for name in names)
    if layer == "Mamba3" and DEVICE == "cpu":  # its kernels are for a GPU's assembler
        patch.setattr(home, "mamba3_siso_combined", mamba3_like.mamba3_siso_combined)

    def with_mamba3(config: Any) -> Any:
        """MambaLMHeadModel knows no Mamba-3; who wants one puts its mixers in."""
        settings, config.ssm_cfg = config.ssm_cfg, {"layer": "Mamba2"}
        model = models.MambaLMHeadModel(config)
        for depth, block in enumerate(model.backbone.layers):
            if depth not in config.attn_layer_idx:
                block.mixer = home.Mamba3(config.d_model, layer_idx=depth, **{**settings, "layer": None})
        return model

    with_mamba3.__module__ = models.__name__
    sizes = {
        "Mamba1": {"expand": 4},
        "Mamba2": {"d_state": 16, "headdim": 32, "chunk_size": 16},
        "Mamba3": {"d_state": 16, "headdim": 16, "chunk_size": 16},
    }
    return Library(
        with_mamba3 if layer == "Mamba3" else models.MambaLMHeadModel,
        configs.MambaConfig,
        generation.InferenceParams,
        home,
        DEVICE,
        tokens=24 if DEVICE == "cpu" else 150,
        segments=(3, 16) if DEVICE == "cpu" else (2, 3, 7, 64),
        ssm_cfg=sizes[layer],
        layer=layer,
        rtol=1e-5 if DEVICE == "cpu" else 1e-2,  # there its products round what they multiply to TF32
        anew=2**-7 if layer == "Mamba3" else 0.0,
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


@pytest.fixture(scope="module")
def whole(library: Library) -> tuple[Any, Any, Tensor]:
    """Build a model and read its text in one pass: the model, the record, the logits."""
    model = library.build()
    return model, *traced(model, library.text(), snapshots=-1)


def test_one_pass_is_the_model(library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    """Logits are those of the plain forward, bit for bit; the state is what the model keeps."""
    model, record, logits = whole
    text = library.text()
    assert torch.equal(logits, plainly(model, text))
    assert logits.std() > 0.1
    params = library.params(max_seqlen=library.tokens, max_batch_size=2)
    plainly(model, text, inference_params=params)
    for layer in (0, 1):
        state = torch.from_numpy(record["snapshots"].state.sel(layer=layer).values[:, 0])
        kept = params.key_value_memory_dict[layer][1]
        kept = library.matrices(kept)
        assert error(state[:, :, : kept.shape[2]], kept) < library.rtol  # of Mamba-3 a row more
        norm = torch.from_numpy(record["steps"].state_norm.sel(layer=layer).values[:, -1])
        assert error(norm, kept.double().flatten(2).norm(dim=-1)) < library.rtol
    assert record.attrs["model_type"] == library.model.__module__.split(".")[0]


def test_segments_of_any_length(library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    """As if read in one pass, also where a segment is shorter than the convolution."""
    model, record, logits = whole
    for segment in library.segments:
        cut, found = traced(model, library.text(), segment=segment, snapshots=-1)
        assert error(found, logits) < library.rounded
        assert_close(cut, record, rtol=2 * library.rounded)
    assert error(plainly(model, library.text()[:, 16:]), logits[:, 16:]) > 1e-1, "what came before matters"


def test_what_is_kept_is_what_the_model_keeps(library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    """After segments of 2 and 3, the model itself reads on by single tokens."""
    model, _, logits = whole
    text, cache = library.text().to(library.device), caches.fresh(model)
    for start, stop in ((0, 9), (9, 11), (11, 14), (14, 17)):
        part = text[:, start:stop]
        with torch.no_grad(), capture(model, lambda layer, call, run_own: run_own()):
            found = model(part, **caches.inputs(model, cache, start, part)).logits
        assert error(found, logits[:, start:stop]) < library.rounded
    params = library.params(max_seqlen=20, max_batch_size=2)
    plainly(model, text[:, :17], inference_params=params)
    for layer in (0, 1):
        for found, kept in zip(
            cache.key_value_memory_dict[layer], params.key_value_memory_dict[layer], strict=True
        ):
            assert error(found, kept) < library.rounded
    if library.layer == "Mamba3" and library.home.__name__.startswith("mamba_ssm."):
        return  # its step for single tokens needs a GPU
    params.key_value_memory_dict, params.seqlen_offset = cache.key_value_memory_dict, 17
    for t in (17, 18):
        found = plainly(model, text[:, t : t + 1], inference_params=params)
        assert error(found, logits[:, t : t + 1]) < library.rounded
        params.seqlen_offset += 1


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_own_scan_replaced(backend: str, library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    model, record, logits = whole
    replaced, found = traced(model, library.text(), backend=backend, segment=14, snapshots=-1)
    assert error(found, logits) < library.rounded
    assert library.anew or not torch.equal(found, logits)
    assert_close(replaced, record, rtol=2 * library.rounded)


def test_model_is_left_as_it_was(library: Library) -> None:
    """No function, hook or state stays behind, also after a failure in a later segment."""
    model = library.build()

    def condition() -> list[Any]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
        hooks = [getattr(module, kind) for module in model.modules() for kind in kinds]
        weights = [w.clone() for w in model.state_dict().values()]
        own = [vars(module).copy() for module in model.modules()]
        return [
            vars(library.home).copy(),
            [len(h) for h in hooks],
            [sorted(v) for v in own],
            *[w.tolist() for w in weights],
        ]

    before = condition()
    statescope.trace(model, library.text()[:, :7], segment=3)
    assert condition() == before
    calls = []

    def fails(layer: int, recurrence: Any) -> Any:
        calls.append(layer)
        if len(calls) == 4:
            raise LookupError("on purpose")
        return recurrence

    with pytest.raises(LookupError, match="on purpose"):
        statescope.trace(model, library.text()[:, :7], segment=3, edit=fails)
    assert calls == [0, 1, 0, 1]
    assert condition() == before


def test_attention_is_read_in_one_pass(library: Library) -> None:
    """Of a hybrid, a text in one segment is right; more are refused before anything is written."""
    cfg = (
        {"attn_cfg": {"num_heads": 4, "causal": True}}
        if library.home.__name__.startswith("mamba_ssm.")
        else {}
    )
    build = library.config
    library = Library(**{**vars(library), "config": lambda **k: build(**k, **cfg)})
    model, text = library.build(attention=(1,), layers=3), library.text()
    record, logits = traced(model, text)
    assert record["steps"].layer.values.tolist() == [0, 2]
    assert torch.equal(logits, plainly(model, text))
    place = MemoryStore()
    with pytest.raises(ValueError, match=r"attention at layers \[1\].*segment="):
        statescope.trace(model, text, segment=library.tokens // 2, store=place)
    assert not place._store_dict
