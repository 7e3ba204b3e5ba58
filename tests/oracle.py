"""Mamba-2 in float64, written against the paper and mamba_ssm's weight names, independent of the package.

Every layer is stepped token by token with its state in full; nothing is chunked and no identity is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]


@dataclass
class LayerTrace:
    """Per token and head: what the record holds, by stepping; and the ingredients of shares."""

    log_decay: Array
    write_norm: Array
    state_norm: Array
    state_mean: Array
    write_overlap: Array
    key: Array  # (time, key), scaled by nothing
    query: Array  # (time, key)
    step: Array  # (time, head), dt
    value: Array  # (time, head, value), scaled by dt
    states: dict[int, Array]  # (head, key, value)


def run(folder: Path, ids: NDArray[np.int64], keep: tuple[int, ...] = ()) -> tuple[Array, list[LayerTrace]]:
    """Return the logits (time, vocabulary) and a trace of every layer."""
    config = json.loads((folder / "config.json").read_text())
    w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    x = w["backbone.embedding.weight"][ids]
    traces = []
    for i in range(config["n_layer"]):
        p = f"backbone.layers.{i}."
        y, trace = _mixer(
            _rms(x, w[p + "norm.weight"]), {k: w[p + "mixer." + k] for k in _NAMES}, config, keep
        )
        x = x + y
        traces.append(trace)
    return _rms(x, w["backbone.norm_f.weight"]) @ w["backbone.embedding.weight"].T, traces


_NAMES = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "A_log",
    "dt_bias",
    "D",
    "norm.weight",
    "out_proj.weight",
)


def _mixer(u: Array, w: dict[str, Array], config: dict, keep: tuple[int, ...]) -> tuple[Array, LayerTrace]:
    inner, n, p = 2 * config["d_model"], config["ssm_cfg"]["d_state"], config["ssm_cfg"]["headdim"]
    time, heads = len(u), inner // p
    projected = u @ w["in_proj.weight"].T
    z, xbc, dt = np.split(projected, [inner, 2 * inner + 2 * n], axis=1)
    xbc = _silu(_causal_conv(xbc, w["conv1d.weight"][:, 0], w["conv1d.bias"]))
    x, b, c = np.split(xbc, [inner, inner + n], axis=1)
    x = x.reshape(time, heads, p)
    dt = np.logaddexp(0.0, dt + w["dt_bias"])
    log_decay = -dt * np.exp(w["A_log"])
    fields = {name: np.zeros((time, heads)) for name in ("write", "norm", "mean", "overlap")}
    y, states = np.zeros((time, heads, p)), {}
    state = np.zeros((heads, n, p))
    for t in range(time):
        old = np.exp(log_decay[t])[:, None, None] * state
        write = dt[t][:, None, None] * b[t][None, :, None] * x[t][:, None, :]
        state = old + write
        y[t] = np.einsum("hnp,n->hp", state, c[t]) + w["D"][:, None] * x[t]
        fields["write"][t] = np.sqrt((write**2).sum((1, 2)))
        fields["norm"][t] = np.sqrt((state**2).sum((1, 2)))
        fields["mean"][t] = state.mean((1, 2))
        size = np.sqrt((old**2).sum((1, 2))) * fields["write"][t]
        fields["overlap"][t] = np.divide((old * write).sum((1, 2)), size, out=np.zeros(heads), where=size > 0)
        if t in keep:
            states[t] = state.copy()
    gated = _rms(y.reshape(time, inner) * _silu(z), w["norm.weight"])
    trace = LayerTrace(
        log_decay, *fields.values(), key=b, query=c, step=dt, value=x * dt[..., None], states=states
    )
    return gated @ w["out_proj.weight"].T, trace


def attribute(trace: LayerTrace, probe: int) -> dict[str, Array]:
    """What state and output at the probe have of every token up to it, (time, head); the output's norm."""
    state = trace.states[probe]
    after = np.cumsum(trace.log_decay[: probe + 1][::-1], axis=0)[::-1]
    survives = np.exp(np.vstack([after[1:], np.zeros((1, after.shape[1]))]))
    key, value = trace.key[: probe + 1], trace.value[: probe + 1]
    size = np.linalg.norm(key, axis=1)[:, None] * np.linalg.norm(value, axis=2)
    share = np.einsum("tn,hnp,thp->th", key, state, value) / (state**2).sum((1, 2))
    attention = survives * (key @ trace.query[probe])[:, None]
    output = np.einsum("hnp,n->hp", state, trace.query[probe])
    part = attention[..., None] * value
    return {
        "contribution": survives * size,
        "share": survives * share,
        "attention": attention * trace.step[: probe + 1],
        "output_contribution": np.linalg.norm(part, axis=2),
        "output_share": np.einsum("thp,hp->th", part, output) / (output**2).sum(1),
        "output_norm": np.linalg.norm(output, axis=1),
    }


def _causal_conv(x: Array, weight: Array, bias: Array) -> Array:
    width = weight.shape[1]
    padded = np.vstack([np.zeros((width - 1, x.shape[1])), x])
    return sum(padded[i : i + len(x)] * weight[:, i] for i in range(width)) + bias


def _rms(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
