"""Load a model: bundled, transformers format or mamba_ssm format. Never runs code from a checkpoint."""

from __future__ import annotations

import json
import pickle
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from statescope.tokens import BYTES

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def bundled() -> dict[str, Path]:
    """Checkpoints that come with the package, by name: by training length, then by the state's size."""
    root = Path(str(files("statescope") / "checkpoints"))
    found = [p.parent for p in root.glob("*/config.json")]
    return {
        p.name: p for p in sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)][::-1])
    }


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal language model for tracing.

    Parameters
    ----------
    name : str or Path
        A bundled checkpoint (see :func:`bundled`), a folder, or a hub id; in transformers format, or in
        mamba_ssm's (``config.json`` with ``d_model``, and ``model.safetensors`` or ``pytorch_model.bin``).
    device : str or torch.device, optional
        Default: the GPU if there is one, else the CPU.
    dtype : str or torch.dtype, optional
        Default: float32.
    trust_remote_code : bool
        Handed to transformers; never set for you.

    Returns
    -------
    nn.Module
        A transformers model in evaluation mode.

    Raises
    ------
    ValueError
        If there is no such model, its configuration is not understood, or its weights hold pickled code;
        names ``model``.
    """
    place = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = _folder(str(name))
    config = _read_json(folder / "config.json")
    kind = as_dtype(dtype or torch.float32)
    try:
        if "model_type" in config:
            model = _load_transformers(folder, config["model_type"], kind, trust_remote_code)
        elif "d_model" in config and "n_layer" in config:
            model = _load_mamba_ssm(folder, config, kind)
        else:
            raise ValueError(
                f"model={str(name)!r}: config.json names neither a model_type (transformers) nor a d_model"
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"model={str(name)!r} holds pickled code in its weights, which is not run; convert it to"
            " safetensors on a machine where you trust it"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"model={str(name)!r} has damaged weights: {error}; fetch it again") from error
    model.config._name_or_path = str(name)
    return model.to(place).eval()


def as_device(device: str | torch.device) -> torch.device:
    """Turn a name such as ``"cuda"`` into a device that is there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown; expected one such as 'cpu' or 'cuda'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch finds no GPU here; use 'cpu'")
    return found


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Turn a name such as ``"bfloat16"`` into a floating torch dtype."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r}; expected a floating dtype such as 'float32' or 'bfloat16'")
    return found


def _folder(name: str) -> Path:
    if name in bundled():
        return bundled()[name]
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"model={name!r} is a folder without config.json; expected a checkpoint")
        return Path(name)
    if Path(name).exists():
        raise ValueError(f"model={name!r} is a file; pass the folder that holds config.json and the weights")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "*.py"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model={name!r} is neither bundled ({', '.join(bundled())}), nor a folder, nor a hub id that can"
            f" be reached: {str(error).splitlines()[0]}"
        ) from error


def _load_transformers(folder: Path, model_type: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    loaded: Any
    sees = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind: Any = AutoModelForImageTextToText if model_type in sees else AutoModelForCausalLM
    try:
        loaded = kind.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"model={str(folder)!r} has no weights that can be read: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"model={str(folder)!r}: weights do not fit config.json: {error}") from error
    model, found = loaded
    if found["missing_keys"]:  # transformers would go on with random ones
        missing = ", ".join(sorted(found["missing_keys"]))
        raise ValueError(f"model={str(folder)!r}: weights do not fit config.json: missing are {missing}")
    return model


def _load_mamba_ssm(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import Mamba2ForCausalLM

    weights = _read_weights(folder)
    weights = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in weights.items()}
    with torch.device("meta"):
        model = Mamba2ForCausalLM(mamba2_config(config))
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    try:
        model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"model={str(folder)!r}: weights do not fit config.json: {error}") from error
    model.tie_weights()
    training = folder / "training.json"
    if training.is_file():
        facts = _read_json(training)
        model.config.train_length = facts.get("train_length")
        if facts.get("stream") == "recall":  # see statescope.reader.predicts_next_token
            model.config.predicts_next_token = False
        if str(facts.get("tokenizer", "")).startswith(BYTES):
            model.config.statescope_tokenizer = BYTES
    return model


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"model={str(folder)!r} has no weights; expected {' or '.join(WEIGHTS)}")
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


_FIXED = {
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "ssm_cfg.layer": "Mamba2",
    "ssm_cfg.rmsnorm": True,
    "ssm_cfg.norm_before_gate": False,
    "ssm_cfg.D_has_hdim": False,
    "ssm_cfg.d_ssm": None,
}
"""Settings of mamba_ssm that transformers' Mamba-2 has at one value only."""

_WITHOUT_EFFECT = {"fused_add_norm", "ssm_cfg.use_mem_eff_path", "ssm_cfg.A_init_range", "ssm_cfg.conv_init"}
"""Settings that choose an implementation or an initialisation."""

_RENAMED = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
    "ssm_cfg.d_state": "state_size",
    "ssm_cfg.d_conv": "conv_kernel",
    "ssm_cfg.expand": "expand",
    "ssm_cfg.headdim": "head_dim",
    "ssm_cfg.ngroups": "n_groups",
    "ssm_cfg.dt_min": "time_step_min",
    "ssm_cfg.dt_max": "time_step_max",
    "ssm_cfg.dt_init_floor": "time_step_floor",
    "ssm_cfg.dt_limit": "time_step_limit",
    "ssm_cfg.bias": "use_bias",
    "ssm_cfg.conv_bias": "use_conv_bias",
    "ssm_cfg.chunk_size": "chunk_size",
}


def mamba2_config(config: dict[str, Any]) -> Any:
    """Translate mamba_ssm's configuration of a Mamba-2 model into transformers' ``Mamba2Config``.

    Raises
    ------
    ValueError
        If a setting is unknown or has no counterpart; names it.
    """
    from transformers import Mamba2Config

    flat = {k: v for k, v in config.items() if k != "ssm_cfg"}
    flat |= {f"ssm_cfg.{k}": v for k, v in (config.get("ssm_cfg") or {}).items()}
    if "vocab_size" not in flat:
        raise ValueError("model: config.json lacks vocab_size")
    flat.setdefault("ssm_cfg.layer", "Mamba1")  # what mamba_ssm does
    settings: dict[str, Any] = {"n_groups": 1, "head_dim": 64, "state_size": 128, "chunk_size": 256}
    settings |= {"tie_word_embeddings": True, "residual_in_fp32": True, "layer_norm_epsilon": 1e-5}
    for name, value in flat.items():
        if name in _FIXED and value != _FIXED[name]:
            raise ValueError(f"model: config.json has {name}={value!r}; only {_FIXED[name]!r} can be loaded")
        if name in _RENAMED:
            settings[_RENAMED[name]] = tuple(value) if name == "ssm_cfg.dt_limit" else value
        elif name not in _FIXED and name not in _WITHOUT_EFFECT | {"vocab_size", "pad_vocab_size_multiple"}:
            raise ValueError(
                f"model: config.json has {name}={value!r}, which is not understood;"
                " remove it if the model is the same without it"
            )
    multiple = flat.get("pad_vocab_size_multiple", 8)
    inner = settings["hidden_size"] * settings.get("expand", 2)
    if inner % settings["head_dim"]:
        raise ValueError(
            f"model: config.json has headdim {settings['head_dim']}, which does not divide {inner}"
        )
    return Mamba2Config(
        vocab_size=-(-flat["vocab_size"] // multiple) * multiple,
        num_heads=inner // settings["head_dim"],
        architectures=["Mamba2ForCausalLM"],
        **settings,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"model: {path} cannot be read as JSON: {error}") from error
    return content
