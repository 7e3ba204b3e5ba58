"""Small random models of every supported transformers family: traced forwards beside plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from statescope.adapters import ADAPTERS
from statescope.experiments.bench.apart import Lost, reason, workplace
from statescope.experiments.bench.settings import Settings
from statescope.experiments.bench.timing import rows, table, take_turns
from statescope.models import as_dtype
from statescope.tracing import trace

PLAIN = "plain forward"
OWN, OURS = "traced, its own scan", "traced, our scan"

VOCABULARY = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 131072,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA_2 = {
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_expand": 2,
    "mamba_chunk_size": 64,
}  # fmt: skip
_KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
_DELTA = {
    "layer_types": _KINDS, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}  # fmt: skip
_LATENT = {
    "layer_types": _KINDS, "num_key_value_heads": 4, "moe_intermediate_size": 128, "num_local_experts": 2,
    "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
_MAMBA_1 = {"state_size": 16, "expand": 2, "time_step_rank": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 64, "expand": 2, "chunk_size": 64,
    },
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_MAMBA_2, "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "shared_intermediate_size": 256, "num_local_experts": 2, "num_experts_per_tok": 1,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "ssm_state_size": 64,
        "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 1, "chunk_size": 64,
    },
    "falcon_h1": {**_MAMBA_2, "mamba_d_ssm": 512},
    "zamba2": {
        "attention_head_dim": 128, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "mamba_d_state": 64, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 64,
        "chunk_size": 64, "num_mem_blocks": 1, "use_shared_attention_adapter": False,
        "num_key_value_heads": 4,
    },
    "mamba": _MAMBA_1,
    "falcon_mamba": _MAMBA_1,
    "jamba": {
        "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
        "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 16,
    },
    "zamba": {
        "num_hidden_layers": 5,  # two attention layers, which share their weights
        "attention_head_dim": 128, "num_key_value_heads": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "n_mamba_heads": 2, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 16,
    },
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {**_LATENT, "linear_num_heads": 4, "linear_head_dim": 64},
    "bailing_hybrid": {**_LATENT, "num_mtp_layers": 0, "kda_lower_bound": -0.2},
    "qwen4_exp_text": {
        **_DELTA, **_EXPERTS, "hc_count": 2, "hc_lowrank": 32, "indexer_n_heads": 4, "indexer_kv_heads": 1,
        "indexer_head_dim": 64, "indexer_budget": 512, "indexer_compress_ratio": 16,
    },
    "glm5_next": {
        "text_config": {
            **_COMMON, **_LATENT, "linear_num_heads": 4, "linear_head_dim": 64, "qk_rope_head_dim": 0,
            "q_lora_rank": 64, "index_topk": 512, "index_head_dim": 64, "index_n_heads": 4, "hc_mult": 2,
        },
        "vision_config": {
            "depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 256,
            "projection_intermediate_size": 64,
        },
    },
    "rwkv": {"attention_hidden_size": 256, "context_length": 131072},
    "recurrent_gemma": {"block_types": ["recurrent", "attention", "recurrent", "recurrent"]},
    "minimax": {
        "layer_types": _KINDS, "block_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
    },
    "xlstm": {"num_heads": 4, "chunk_size": 64},
}  # fmt: skip
"""Settings by model type, on top of 4 layers of 256; every hybrid has an attention layer."""


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield an entry for each family."""
    job = {"device": settings.device, "dtype": settings.dtype, "rounds": settings.rounds}
    with workplace(settings.gpu) as work:
        for family in CONFIGS:
            about = {"family": family, "signature": _signature(family), "tokens": settings.families}
            try:
                found = work.call(f"{__name__}.timed", family=family, tokens=settings.families, **job)
            except Lost as lost:
                found = {"skipped": str(lost)}
            yield about | found


def describe(entry: dict[str, Any]) -> Iterator[str]:
    """Put an entry into words."""
    title = f"{entry['family']} ({entry['signature']}), {entry['tokens']:,} tokens"
    if "rows" not in entry:
        yield f"{title}: skipped: {entry['skipped']}"
        return
    yield from table(title, entry["rows"])


def timed(family: str, tokens: int, device: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Time the plain forward of a small random model and its traces in memory, in turns."""
    try:
        model = build(family, device, as_dtype(dtype))
    except Exception as error:  # the installed transformers may not have it, or know it by other settings
        return {"skipped": reason(error)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=generator)
    there = ids.to(device)

    def plain() -> Any:
        with torch.no_grad():
            return model(there)

    kernel = ours(model, ids)
    contestants: dict[str, Callable[[], Any]] = {
        PLAIN: plain,
        OWN: lambda: trace(model, ids, progress=False),
        OURS: lambda: trace(model, ids, backend=kernel, progress=False),
    }
    return {"kernel": kernel, "rows": rows(take_turns(contestants, rounds, device, warm=1), (PLAIN,))}


def build(family: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Build a small model of a family with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family]})
    kind: Any = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model: nn.Module = kind.from_config(config)
    return model.to(device, dtype).eval()


def ours(model: nn.Module, ids: torch.Tensor) -> str:
    """Name the kernel that serves a model's scans, from a trace of its first tokens."""
    return str(trace(model, ids[:, :16], progress=False).attrs["backend"])


def _signature(family: str) -> str:
    return next(a.signature for a in ADAPTERS.values() if family in a.models)
