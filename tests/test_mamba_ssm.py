"""mamba_ssm's own models: against a stand-in of ours everywhere, and against mamba_ssm where it is.

mamba_ssm is imported as installed, or from the folder that ``STATESCOPE_MAMBA_SSM`` names. Without a GPU
its kernels run in Triton's interpreter, on fewer tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mamba1_like
import mamba_ssm_like
import numpy as np
import pytest
import torch
from conftest import needs
from tiny import VOCABULARY, assert_close, assert_identical
from torch import Tensor
from torch.nn.functional import conv1d, silu
from zarr.storage import MemoryStore

import statescope
from statescope import caches, layout
from statescope.adapters import ADAPTERS
from statescope.capture import capture
from statescope.kernels import reference
from statescope.store import RecordWriter

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


@pytest.fixture(scope="module", params=["stand-in", "stand-in 1", "mamba_ssm", "mamba_ssm 1"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    if request.param.startswith("stand-in"):
        yield STAND_IN_1 if request.param.endswith("1") else STAND_IN
        return
    with pytest.MonkeyPatch.context() as patch:
        yield imported(patch, "Mamba1" if request.param.endswith("1") else "Mamba2")
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
        assert error(state, kept) < library.rtol
        norm = torch.from_numpy(record["steps"].state_norm.sel(layer=layer).values[:, -1])
        assert error(norm, kept.double().flatten(2).norm(dim=-1)) < library.rtol
    assert record.attrs["model_type"] == library.model.__module__.split(".")[0]


def test_segments_of_any_length(library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    """As if read in one pass, also where a segment is shorter than the convolution."""
    model, record, logits = whole
    for segment in library.segments:
        cut, found = traced(model, library.text(), segment=segment, snapshots=-1)
        assert error(found, logits) < library.rtol
        assert_close(cut, record, rtol=2 * library.rtol)
    assert error(plainly(model, library.text()[:, 16:]), logits[:, 16:]) > 1e-1, "what came before matters"


def test_what_is_kept_is_what_the_model_keeps(library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    """After segments of 2 and 3, the model itself reads on by single tokens."""
    model, _, logits = whole
    text, cache = library.text().to(library.device), caches.fresh(model)
    for start, stop in ((0, 9), (9, 11), (11, 14), (14, 17)):
        part = text[:, start:stop]
        with torch.no_grad(), capture(model, lambda layer, call, run_own: run_own()):
            found = model(part, **caches.inputs(model, cache, start, part)).logits
        assert error(found, logits[:, start:stop]) < library.rtol
    params = library.params(max_seqlen=20, max_batch_size=2)
    plainly(model, text[:, :17], inference_params=params)
    for layer in (0, 1):
        for found, kept in zip(
            cache.key_value_memory_dict[layer], params.key_value_memory_dict[layer], strict=True
        ):
            assert error(found, kept) < library.rtol
    params.key_value_memory_dict, params.seqlen_offset = cache.key_value_memory_dict, 17
    for t in (17, 18):
        found = plainly(model, text[:, t : t + 1], inference_params=params)
        assert error(found, logits[:, t : t + 1]) < library.rtol
        params.seqlen_offset += 1


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_own_scan_replaced(backend: str, library: Library, whole: tuple[Any, Any, Tensor]) -> None:
    model, record, logits = whole
    replaced, found = traced(model, library.text(), backend=backend, segment=14, snapshots=-1)
    assert 0 < error(found, logits) < library.rtol
    assert_close(replaced, record, rtol=2 * library.rtol)


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


@pytest.mark.parametrize(
    "settings",
    [
        {"rmsnorm": False},
        {"dt_limit": (0.01, 0.1)},
        {"D_has_hdim": True},
        {"d_conv": 2},
        {"ngroups": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings(settings: dict[str, Any]) -> None:
    """Every path through the mixer that bears on the scan or the convolution."""
    model, text = STAND_IN.build(**settings), STAND_IN.text()[:, :40]
    record, logits = traced(model, text)
    assert torch.equal(logits, plainly(model, text))
    cut, found = traced(model, text, segment=3)
    assert error(found, logits) < 1e-5
    assert_close(cut, record, rtol=2e-5)
    if "D_has_hdim" in settings:
        with pytest.raises(ValueError, match=r"D_has_hdim.*backend='auto'"):
            statescope.trace(model, text, backend="chunked")
    else:
        assert error(traced(model, text, segment=7, backend="chunked")[1], logits) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"rmsnorm": False}, {"dt_limit": (0.01, 0.1)}], ids=str)
def test_reference_reproduces_the_scan(settings: dict[str, Any]) -> None:
    """The equation, stepped by our reference, is what the stand-in's own loop computes."""
    model, layers = STAND_IN.build(**settings), []

    def compare(layer: int, call: Any, run_own: Any) -> Any:
        own = run_own()
        for mine, theirs in zip(call.answer(reference.scan(call.recurrence)), own, strict=True):
            assert mine.dtype == theirs.dtype == torch.float32
            assert error(mine, theirs) < 1e-5
        layers.append(layer)
        return own

    cache, text = caches.fresh(model), STAND_IN.text()
    with torch.no_grad(), capture(model, compare):
        for start, stop in ((0, 20), (20, 40)):
            part = text[:, start:stop]
            model(part, **caches.inputs(model, cache, start, part))
    assert layers == [0, 1, 0, 1]


def test_fused_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where causal_conv1d is installed, that function is given what came before."""
    model, text, given = STAND_IN.build(), STAND_IN.text()[:, :40], []
    expected = traced(model, text)[1]

    def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, activation: str, seq_idx: Any) -> Tensor:
        assert activation == "silu" and seq_idx is None
        assert x.stride(1) == 1, "the channels are adjacent in memory"
        given.append((x.shape[-1], x.is_contiguous() or x.transpose(1, 2).is_contiguous()))
        out = conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return silu(out[..., : x.shape[-1]])

    monkeypatch.setattr(mamba_ssm_like, "causal_conv1d_fn", causal_conv1d_fn)
    whole = traced(model, text)[1]
    assert torch.equal(whole, plainly(model, text)) and error(whole, expected) < 1e-6
    given.clear()
    assert error(traced(model, text, segment=3)[1], expected) < 1e-5
    assert [length for length, _ in given[::2]] == [3, *[6] * 11, 7]  # the last takes the odd token
    assert all(packed for _, packed in given[2:])
    assert mamba_ssm_like.causal_conv1d_fn is causal_conv1d_fn


def test_bfloat16() -> None:
    """The state is carried in float32, so that it does not matter where segments end."""
    model, text = STAND_IN.build().to(torch.bfloat16), STAND_IN.text()[:, :41]
    record, logits = traced(model, text)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, plainly(model, text))
    cut, found = traced(model, text, segment=20)
    assert torch.equal(found, logits)
    assert_close(cut, record, rtol=2e-5)
    cache = caches.fresh(model)
    with torch.no_grad(), capture(model, lambda layer, call, run_own: run_own()):
        model(text, **caches.inputs(model, cache, 0, text))
    inputs, state = cache.key_value_memory_dict[0]
    assert inputs.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that was interrupted is gone on from, exactly, by the same request only."""
    monkeypatch.setattr(layout, "SHARD_TOKENS", 32)
    commit = RecordWriter.commit

    def until(stop: int | None) -> None:
        def interrupted(self: RecordWriter, at: int, *rest: Any, **attributes: Any) -> None:
            commit(self, at, *rest, **attributes)
            if at == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(RecordWriter, "commit", interrupted)

    request = {"model": STAND_IN.build(), "text": STAND_IN.text(), "segment": 16, "probes": [50, -1]}
    expected, place = statescope.trace(**request), MemoryStore()
    for stop in (32, 96):
        until(stop)
        with pytest.raises(KeyboardInterrupt):
            statescope.trace(**request, store=place)
        assert statescope.open(place).attrs["committed"] == stop
    until(None)
    other = request | {"model": STAND_IN.build(dt_limit=(0.0, 1.0))}  # the same weights
    with pytest.raises(FileExistsError, match="interrupted record of another"):
        statescope.trace(**other, store=place)
    assert_identical(statescope.trace(**request, store=place), expected)


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


def test_refused() -> None:
    """A string without tokenizer, ids out of range, training, packed sequences, and what has no state."""
    model = STAND_IN.build()
    with pytest.raises(ValueError, match="tokenizer is not known"):
        statescope.trace(model, "text")
    with pytest.raises(ValueError, match=f"ids 0 to {VOCABULARY - 1}"):
        statescope.trace(model, [1, VOCABULARY])
    with pytest.raises(ValueError, match="training mode"):
        statescope.trace(model.train(), [1, 2])
    with pytest.raises(ValueError, match="MambaLMHeadModel with layer Mamba2"):
        statescope.trace(STAND_IN.build(attention=(0, 1)).eval(), [1, 2])
    x, B = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 1, 4)
    read = ADAPTERS["mamba_chunk_scan_combined"].read
    for packed in ({"seq_idx": torch.zeros(1, 3)}, {"cu_seqlens": torch.tensor([0, 3])}):
        with pytest.raises(ValueError, match=f"packed sequences .{next(iter(packed))}"):
            read(False, x, x[..., 0], -x[0, 0, :, 0], B, B, 16, **packed)


@pytest.fixture(scope="module")
def beside_mamba_ssm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Trace a transformers model on a CPU, in a process in which there is a mamba_ssm that needs a GPU."""
    folder = tmp_path_factory.mktemp("fake")
    for package in ("", "ops", "ops/triton"):
        (folder / "mamba_ssm" / package).mkdir()
        (folder / "mamba_ssm" / package / "__init__.py").touch()
    (folder / "mamba_ssm/__init__.py").write_text(
        "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined\n"
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update\n"
    )
    for module, name in (
        ("ssd_combined", "mamba_chunk_scan_combined"),
        ("selective_state_update", "selective_state_update"),
    ):
        (folder / f"mamba_ssm/ops/triton/{module}.py").write_text(
            f"def {name}(*args, **kwargs): raise RuntimeError('0 active drivers')\n"
        )
    script = """
        import sys
        import numpy as np, pytest, torch
        import statescope
        from tiny import build, ids
        model, text = build("mamba2"), ids(40, sequences=2)
        from transformers.models.mamba2 import modeling_mamba2
        bound = modeling_mamba2.mamba2_chunk_scan
        with pytest.raises(RuntimeError, match="0 active drivers"):
            model(text)
        record = statescope.trace(model, text, segment=7)
        assert modeling_mamba2.mamba2_chunk_scan is bound
        with pytest.raises(RuntimeError, match="0 active drivers"):
            model(text)
        np.savez(sys.argv[1], loss=record["tokens"].loss, **record["steps"].data_vars)
    """
    result = folder / "record.npz"
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(result)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # threads sum in another order
        check=True,
    )
    return str(result)


def test_transformers_beside_mamba_ssm_on_a_cpu(beside_mamba_ssm: str) -> None:
    """Where transformers has bound mamba_ssm's scan, on a CPU a capture runs torch's instead."""
    from tiny import build, ids

    expected = statescope.trace(build("mamba2"), ids(40, sequences=2), segment=7)
    with np.load(beside_mamba_ssm) as found:
        assert set(found) == {"loss", *expected["steps"].data_vars}
        np.testing.assert_array_equal(found["loss"], expected["tokens"].loss)
        for name, values in expected["steps"].data_vars.items():
            np.testing.assert_array_equal(found[name], values)
