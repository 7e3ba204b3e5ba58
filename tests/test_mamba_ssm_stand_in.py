"""mamba_ssm's own models, on a stand-in of ours: every setting, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import mamba3_like
import mamba_ssm_like
import numpy as np
import pytest
import torch
from test_mamba_ssm import STAND_IN, STAND_INS, error, plainly, traced
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
from statescope.zipped import Files


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


@pytest.mark.parametrize(
    ("layer", "stops", "changed"),
    [("Mamba2", (32, 96), {"dt_limit": (0.0, 1.0)}), ("Mamba3", (32,), {"is_outproj_norm": True})],
    ids=["Mamba2", "Mamba3"],
)
def test_interrupted(
    layer: str, stops: tuple[int, ...], changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that was interrupted is gone on from, exactly, by the same request only."""
    library = STAND_INS[layer]
    monkeypatch.setattr(layout, "SHARD_TOKENS", 32)
    commit = RecordWriter.commit

    def until(stop: int | None) -> None:
        def interrupted(self: RecordWriter, at: int, *rest: Any, **attributes: Any) -> None:
            commit(self, at, *rest, **attributes)
            if at == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(RecordWriter, "commit", interrupted)

    request = {"model": library.build(), "text": library.text(), "segment": 16, "probes": [50, -1]}
    expected, place = statescope.trace(**request), MemoryStore()
    for stop in stops:
        until(stop)
        with pytest.raises(KeyboardInterrupt):
            statescope.trace(**request, store=place)
        assert statescope.open(place).attrs["committed"] == stop
    until(None)
    other = request | {"model": library.build(**changed)}  # of Mamba-2 with the same weights
    with pytest.raises(FileExistsError, match="interrupted record of another"):
        statescope.trace(**other, store=place)
    assert_identical(statescope.trace(**request, store=place), expected)


def test_fla_reads_in_one_pass() -> None:
    """Layers of fla that call mamba_ssm's scans, of Mamba and Mamba-3, go on by single tokens only."""

    class OfFla(mamba3_like.Mamba3):
        __module__ = "fla.layers.mamba3"

    model, text = STAND_INS["Mamba3"].build(layers=1), STAND_INS["Mamba3"].text()
    model.backbone.layers[0].mixer.__class__ = OfFla
    assert statescope.trace(model, text).attrs["complete"]
    place = Files()
    with pytest.raises(ValueError, match=r"single tokens.*segment= the length"):
        statescope.trace(model, text, segment=16, store=place)
    assert not place.files


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
