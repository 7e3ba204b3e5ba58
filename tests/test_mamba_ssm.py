"""mamba_ssm's own models: against a stand-in of ours everywhere, and against mamba_ssm where it is.

mamba_ssm is imported as installed, or from the folder that ``STATESCOPE_MAMBA_SSM`` names. Without a GPU
its kernels run in Triton's interpreter, on fewer tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mamba_ssm_library import STAND_IN, STAND_IN_1, Library, error, imported, plainly, traced
from tiny import assert_close
from torch import Tensor
from zarr.storage import MemoryStore

import statescope
from statescope import caches
from statescope.capture import capture


@pytest.fixture(scope="module", params=["stand-in", "stand-in 1", "mamba_ssm", "mamba_ssm 1"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    if request.param.startswith("stand-in"):
        yield STAND_IN_1 if request.param.endswith("1") else STAND_IN
        return
    with pytest.MonkeyPatch.context() as patch:
        yield imported(patch, "Mamba1" if request.param.endswith("1") else "Mamba2")
    for name in [n for n in sys.modules if n.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]  # transformers would take it for its own use


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
