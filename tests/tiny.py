"""Tiny random models of every supported family, and what compares records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from statescope.measured import STEPS, Measured, Suspect
from statescope.schema import READ_BY_QUERY

VOCABULARY = 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
_SHORT = {"num_hidden_layers": 3, "layer_types": _DELTA["layer_types"][:3]}
_LATENT = {
    "layer_types": _DELTA["layer_types"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

_MAMBA_1 = {"num_hidden_layers": 3, "state_size": 8, "expand": 4, "time_step_rank": 4}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_hidden_layers": 3,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 8,
        "expand": 2,
        "chunk_size": 16,
    },
    "bamba": {
        **_ATTENTION,
        **_MAMBA,
        "num_hidden_layers": 4,
        "attn_layer_indices": [1],
        "intermediate_size": 48,
    },
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "intermediate_size": 48,
        "shared_intermediate_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "nemotron_h": {
        **_ATTENTION,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "head_dim": 8,
        "intermediate_size": 48,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "falcon_h1": {
        **_ATTENTION,
        **_MAMBA,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "intermediate_size": 48,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "max_position_embeddings": 512,
        "intermediate_size": 48,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
    },
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": {
        **_ATTENTION,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "intermediate_size": 48,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_expand": 4,
        "mamba_dt_rank": 4,
    },
    "zamba": {
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "max_position_embeddings": 512,
        "intermediate_size": 48,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_expand": 4,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": {**_ATTENTION, **_DELTA, **_EXPERTS},
    "qwen3_5_text": {**_ATTENTION, **_DELTA},
    "qwen3_5_moe_text": {**_ATTENTION, **_DELTA, **_EXPERTS},
    "kimi_linear": {**_LATENT, "linear_num_heads": 4, "linear_head_dim": 16},
    "bailing_hybrid": {**_LATENT, "head_dim": 16, "num_mtp_layers": 0, "kda_lower_bound": -0.2},
    "olmo_hybrid": {**_ATTENTION, **_DELTA, "linear_num_key_heads": 4},
    "qwen4_exp_text": {
        **_ATTENTION,
        **_DELTA,
        **_EXPERTS,
        **_SHORT,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [3],
        "ngram_vocab_size_base": 97,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "glm5_next": {
        "text_config": {
            **_COMMON,
            **_LATENT,
            **_SHORT,
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "qk_rope_head_dim": 0,
            "q_lora_rank": 16,
            "index_topk": 128,  # beyond it, transformers chooses by the length of what it reads
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_kpool": 4,
            "hc_mult": 2,
            "linear_lower_bound": -0.2,
            "hc_sinkhorn_iters": 2,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": 32,
            "projection_intermediate_size": 16,
        },
    },
    "rwkv": {"hidden_size": 128, "attention_hidden_size": 128, "num_hidden_layers": 3, "context_length": 512},
    "recurrent_gemma": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "block_types": ["recurrent", "attention", "recurrent", "recurrent"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "attention_window_size": 24,
    },
    "minimax": {
        **_ATTENTION,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "head_dim": 16,
        "block_size": 16,
        "intermediate_size": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "xlstm": {"hidden_size": 128, "num_hidden_layers": 3, "num_heads": 4, "chunk_size": 16},
}
"""Settings by model type; every hybrid has an attention layer."""

RECURRENT_LAYERS = {
    "mamba2": [0, 1, 2],
    "bamba": [0, 2, 3],
    "granitemoehybrid": [0, 2, 3],
    "nemotron_h": [0, 2],
    "falcon_h1": [0, 1, 2],
    "zamba2": [0, 1, 2, 3, 4],
    "mamba": [0, 1, 2],
    "falcon_mamba": [0, 1, 2],
    "jamba": [0, 2, 3],
    "zamba": [0, 1, 2, 3, 4],
    "qwen3_next": [0, 2, 3],
    "qwen3_5_text": [0, 2, 3],
    "qwen3_5_moe_text": [0, 2, 3],
    "kimi_linear": [0, 2, 3],
    "bailing_hybrid": [0, 2, 3],
    "olmo_hybrid": [0, 2, 3],
    "qwen4_exp_text": [0, 2],
    "glm5_next": [0, 2],
    "rwkv": [0, 1, 2],
    "recurrent_gemma": [0, 2, 3],
    "minimax": [0, 2, 3],
    "xlstm": [0, 1, 2],
}
"""Depths at which a state sits."""

DELTA_RULE = (
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "olmo_hybrid",
    "kimi_linear",
    "bailing_hybrid",
    "qwen4_exp_text",
    "glm5_next",
)
"""Families that erase."""

MAMBA_1 = ("mamba", "falcon_mamba", "jamba", "zamba")
"""Families of Mamba-1's scan."""

LOSING = (*MAMBA_1, "recurrent_gemma")
"""Families whose own continuation of a text, by more than one token, loses a state."""

WITHOUT_ATTENTION = ("mamba2", "falcon_h1", "zamba", "zamba2", "mamba", "falcon_mamba", "rwkv", "xlstm")
"""Families with a state at every depth."""

FAMILIES = tuple(family for family in CONFIGS if family in CONFIG_MAPPING_NAMES)
"""What the installed transformers has: bailing_hybrid came after 5.17."""

EVERY_FAMILY = [
    family
    if family in FAMILIES
    else pytest.param(
        family, marks=pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {family}")
    )
    for family in CONFIGS
]
"""All families, to parametrise tests with."""


def config(family: str, **changes: Any) -> Any:
    """Configure a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family], **changes})


def build(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Build a tiny model with random weights and states that matter."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    settings = config(family, **changes)
    kind = AutoModelForImageTextToText if hasattr(settings, "text_config") else AutoModelForCausalLM
    model = kind.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
            if family in DELTA_RULE and name.endswith("A_log"):
                parameter.uniform_(-4, -1)  # as drawn, a state is forgotten within a token
    return model


def cached_state(family: str, model: Any, cache: Any, layer: int) -> torch.Tensor:
    """The state a model keeps, (batch, heads, key, value)."""
    if family == "recurrent_gemma":  # on the layer
        kept = model.model.layers[layer].temporal_block.rg_lru.recurrent_states
        return kept.unflatten(1, (-1, 64))[:, :, None]
    if family == "rwkv":  # numerators and denominators
        channels = torch.stack([x[:, :, layer] for x in cache[2:4]], 1)
        return channels.unflatten(2, (-1, 64)).transpose(1, 2).flatten(2)[:, :, None]
    if family == "xlstm":
        memory, normaliser, frame = cache.rnn_state[layer]
        return torch.cat([memory, normaliser[..., None]], -1) * frame[..., None].exp()
    if family == "minimax":
        return cache.linear_cache[layer]
    state: torch.Tensor = cache.layers[layer].recurrent_states[0]
    if family == "zamba":
        state = state.flatten(1, 2)
    if family in MAMBA_1:  # by channel, of which up to 64 make a head
        state = state.unflatten(1, (-1, 64))
    return state if family in DELTA_RULE else state.transpose(-2, -1)


def ids(tokens: int, sequences: int = 1, seed: int = 0) -> torch.Tensor:
    """Draw token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (sequences, tokens), generator=generator)


def assert_identical(
    a: xr.DataTree, b: xr.DataTree, ignore: tuple[str, ...] = ("created_at", "fingerprint")
) -> None:
    """Demand that two records agree in every value, bit for bit, and in every attribute but some."""
    assert sorted(a.children) == sorted(b.children)
    for name in a.children:
        xr.testing.assert_identical(a[name].to_dataset().load(), b[name].to_dataset().load())
    rest = [{k: v for k, v in tree.attrs.items() if k not in ignore} for tree in (a, b)]
    assert rest[0] == rest[1]


def assert_close(a: xr.DataTree, b: xr.DataTree, rtol: float = 1e-5) -> None:
    """Demand that two records agree, relative to each head's largest value (a cosine: to 1).

    What a query reads is a product of two rounded vectors that may be nearly orthogonal: five times as much.
    An output in which parts nearly cancel is off by what each of them is rounded to; so are shares in it.
    """
    assert sorted(a.children) == sorted(b.children)
    for group in a.children:
        one, other = a[group].to_dataset(), b[group].to_dataset()
        assert set(one.variables) == set(other.variables)
        for name in one.data_vars:
            x, y = one[name], other[name]
            assert x.dims == y.dims and x.shape == y.shape
            xr.testing.assert_equal(x.isnull(), y.isnull())
            over = [d for d in x.dims if d in ("token", "key", "value")]
            scale = abs(x).max(over) if name != "write_overlap" else xr.ones_like(x)
            if name in READ_BY_QUERY:
                scale = 5 * scale
            if name in ("output_norm", "output_share", "output_share_before"):
                cancelled = one["output_contribution"].sum("token") / one["output_norm"]
                scale = scale * cancelled.clip(min=1)
            error = float((abs(x - y) / scale.where(scale > 0, 1)).max())
            assert error <= rtol, f"{group}/{name} differs by {error:.2g} of its scale"


class Collected(dict[str, torch.Tensor]):
    """Keeps what segments yield, flat."""

    def take(self, row: int, measured: Measured) -> None:
        for name, (first, x) in measured.fields.items():
            self[f"{row} {name} {first}"] = x
        self |= {f"{row} state {p}": x for p, x in measured.states.items()}
        self |= {f"{row} of probe {p}": x for p, x in measured.of_probe.items()}

    def take_loss(self, start: int, loss: torch.Tensor, suspect: Suspect) -> None:
        self[f"loss {start}"] = loss
        assert suspect.values.isfinite().all()

    def joined(self, row: int, name: str) -> np.ndarray:
        """One variable of ``/steps`` of one layer over all tokens."""
        prefix = f"{row} {('steps', None)} "
        parts = {int(key.removeprefix(prefix)): x for key, x in self.items() if key.startswith(prefix)}
        return torch.cat([parts[at][STEPS.index(name)] for at in sorted(parts)], 1).numpy()


def thinned(steps: np.ndarray, window: int) -> dict[str, np.ndarray]:
    """Thin (5, sequence, token, head) in float64, window by window, as the design says in words."""
    parts = [steps.astype(np.float64)[:, :, i : i + window] for i in range(0, steps.shape[2], window)]

    def each(entry) -> np.ndarray:
        return np.stack([entry(*part) for part in parts], 1)

    total = each(lambda g, write, norm, mean, overlap: (write**2).sum(1))
    weighted = each(lambda g, write, norm, mean, overlap: (write**2 * overlap).sum(1))
    return {
        "log_decay": each(lambda g, *_: g.sum(1)),
        "write_norm": np.sqrt(total),
        "state_norm": each(lambda g, write, norm, mean, overlap: norm[:, -1]),
        "state_mean": each(lambda g, write, norm, mean, overlap: mean[:, -1]),
        "write_overlap": np.divide(weighted, total, out=np.zeros_like(total), where=total != 0),
        "state_norm_max": each(lambda g, write, norm, *_: norm.max(1)),
    }
