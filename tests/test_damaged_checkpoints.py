"""A checkpoint that cannot be understood is refused, and no code of it is run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from refusing import TEXT, listing, refused
from torch import nn

import statescope


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> dict[str, Path]:
    """Write a checkpoint in each format, to be copied."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model.save_pretrained(folder / "transformers")
    shutil.copytree(statescope.bundled()["mamba2-byte-n16-t512"], folder / "mamba_ssm")
    return {name: folder / name for name in ("transformers", "mamba_ssm")}


FORMATS = pytest.mark.parametrize("form", ["transformers", "mamba_ssm"])


@FORMATS
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(
    form: str, zipped: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Weights that hold code are refused without running it."""
    folder, proof = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(checkpoints[form], folder)
    (folder / "model.safetensors").unlink()
    content = {"backbone.norm_f.weight": Payload(proof)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    before = listing(tmp_path)
    words = (f"model='{folder}'", "pickled code", "safetensors")
    refused(lambda: statescope.trace(folder, TEXT), ValueError, *words)
    assert listing(tmp_path) == before
    torch.load(folder / "pytorch_model.bin", weights_only=False)["backbone.norm_f.weight"].close()
    assert proof.exists(), "the payload is a dud: this test proves nothing"


def spoil(folder: Path, how: str) -> None:
    """Damage a checkpoint."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("A_log"))
    if how == "absent":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        if how == "incomplete":
            del weights[name]
        else:
            weights[name] = weights[name][:1].clone()
        save_file(weights, path, metadata={"format": "pt"})


@FORMATS
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("absent", ("no weights",)),
        ("cut short", ("damaged weights", "fetch it again")),
        ("incomplete", ("weights do not fit config.json", "A_log")),
        ("misshapen", ("weights do not fit config.json",)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers")
def test_damaged_weights(
    form: str, how: str, words: tuple[str, ...], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Weights that are missing or wrong are never made up."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints[form], folder)
    spoil(folder, how)
    refused(lambda: statescope.load(folder), ValueError, f"model='{folder}'", *words)


@pytest.mark.parametrize(
    ("form", "content", "words"),
    [
        ("mamba_ssm", {"rope_theta": 3}, ("config.json has rope_theta=3", "remove it")),
        (
            "mamba_ssm",
            {"ssm_cfg": {"layer": "Mamba2", "gate": 1}},
            ("config.json has ssm_cfg.gate=1", "remove it"),
        ),
        ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba1"}}, ("ssm_cfg.layer='Mamba1'", "only 'Mamba2'")),
        ("mamba_ssm", {"ssm_cfg": None}, ("ssm_cfg.layer='Mamba1'", "only 'Mamba2'")),
        ("mamba_ssm", {"rms_norm": False}, ("rms_norm=False", "only True")),
        ("mamba_ssm", {"vocab_size": ...}, ("config.json lacks vocab_size",)),
        ("mamba_ssm", {"d_model": ...}, ("config.json", "model_type", "d_model")),
        ("mamba_ssm", {"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, ("headdim 48", "does not divide 512")),
        ("transformers", {"model_type": "abacus"}, ("abacus",)),
    ],
)
def test_configuration_not_understood(
    form: str, content: dict[str, Any], words: tuple[str, ...], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A setting that is not understood is named, never ignored."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints[form], folder)
    path = folder / "config.json"
    merged = {**json.loads(path.read_text()), **content}
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        statescope.load(folder)
    assert all(word in str(caught.value) for word in words)


def test_model_not_found(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """A folder without a configuration, a file and a broken configuration are named."""
    refused(lambda: statescope.load(tmp_path), ValueError, f"model='{tmp_path}'", "config.json")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(lambda: statescope.load(file), ValueError, f"model='{file}'", "pass the folder")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: statescope.load(tmp_path), ValueError, "model: ", "config.json cannot be read as JSON")
    refused(lambda: statescope.load(checkpoints["mamba_ssm"], device="abacus"), ValueError, "device='abacus'")
    refused(lambda: statescope.load(checkpoints["mamba_ssm"], dtype="int8"), ValueError, "dtype='int8'")
