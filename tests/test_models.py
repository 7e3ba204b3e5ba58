"""Checkpoints in mamba_ssm's format, bundled and on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_close, build, ids

import statescope
from statescope.models import as_dtype, mamba2_config

BUNDLED = ("mamba2-byte-n16-t512", "mamba2-byte-n64-t512")
PUBLISHED = {
    "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip
"""The configuration that state-spaces publishes with mamba2-130m."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mamba_ssm checkpoint as state-spaces publishes it: config.json and pytorch_model.bin."""
    source = statescope.bundled()[BUNDLED[0]]
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    return tmp_path


def test_bundled() -> None:
    assert tuple(statescope.bundled())[:2] == BUNDLED  # by training length, then by the state's size
    for name, folder in statescope.bundled().items():
        config = statescope.load(name).config
        assert folder.name == name == f"mamba2-byte-n{config.state_size}-t{config.train_length}"
        assert {p.name for p in folder.iterdir()} == {
            "config.json", "model.safetensors", "training.json", "card.json", "README.md"
        }  # fmt: skip
        assert (folder / "model.safetensors").stat().st_size < 4_000_000
    model = statescope.load(BUNDLED[0])
    assert model.config.train_length == 512 and not model.training
    assert next(model.parameters()).dtype == torch.float32


def test_bin_equals_safetensors(folder: Path) -> None:
    text = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        assert torch.equal(statescope.load(folder)(text).logits, statescope.load(BUNDLED[0])(text).logits)


def test_folder_is_traced_by_name(folder: Path) -> None:
    record = statescope.trace(str(folder), [1, 2, 3])
    assert record.attrs["model_id"] == str(folder) and record.attrs["model_type"] == "mamba2"


def test_transformers_folder(tmp_path: Path) -> None:
    model = statescope.load(BUNDLED[0])
    model.save_pretrained(tmp_path)
    again = statescope.load(tmp_path)
    text = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        assert torch.equal(again(text).logits, model(text).logits)


def test_model_that_also_sees(tmp_path: Path) -> None:
    """glm5_next comes with eyes only."""
    model = build("glm5_next")
    model.save_pretrained(tmp_path)
    record = statescope.trace(str(tmp_path), ids(9))
    assert record.attrs["model_type"] == "glm5_next"
    assert_close(record, statescope.trace(model, ids(9)))


def test_published_configuration() -> None:
    config = mamba2_config(PUBLISHED)
    assert (config.num_heads, config.head_dim, config.state_size, config.n_groups) == (24, 64, 128, 1)
    assert (config.vocab_size, config.chunk_size, config.layer_norm_epsilon) == (50288, 256, 1e-5)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer='Mamba1'"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer='Mamba1'"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx"),
        ({"rms_norm": False}, "rms_norm"),
        ({"surprise": 1}, "surprise"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 100}}, "headdim"),
    ],
    ids=str,
)
def test_configuration_that_cannot_be_loaded(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mamba2_config(PUBLISHED | change)


def test_settings_reach_the_model() -> None:
    source = json.loads((statescope.bundled()[BUNDLED[1]] / "config.json").read_text())
    assert mamba2_config(source).chunk_size == 128 and mamba2_config(source).state_size == 64


@pytest.mark.parametrize("dtype", ["int8", "no_such", torch.int64])
def test_dtype_is_named(dtype: object) -> None:
    with pytest.raises(ValueError, match="dtype="):
        as_dtype(dtype)


def test_weights_that_do_not_fit(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 128}))
    with pytest.raises(ValueError, match="do not fit"):
        statescope.load(folder)


def test_unreachable_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"neither bundled .* nor a folder, nor a hub id"):
        statescope.load("nobody/nothing")
