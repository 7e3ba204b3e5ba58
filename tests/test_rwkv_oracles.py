"""Trained RWKV-4, 5.2 and 7, whose logits rwkv.cpp wrote down: our scan is the recurrence inside them.

RWKV-4 is transformers' model, traced. For 5.2 and 7, of which transformers has none, the layers around the
scan are written here, after the models' own papers (arXiv 2404.05892, arXiv 2503.14456).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import group_norm, layer_norm, normalize, pad, silu

import statescope
from statescope.recurrence import Recurrence
from statescope.scan import ScanOutput, scan

PROMPT = torch.tensor([list(b'"in')])
EPSILON = {5: 1e-5, 7: 64e-5}
"""Of the norm behind the scan, by version, in rwkv.cpp."""


class Weights(dict[str, Tensor]):
    """Tensors of a checkpoint of rwkv.cpp; a header of 24 bytes, then each with its own."""

    def __init__(self, path: Path) -> None:
        data, at = path.read_bytes(), 24
        self.layers = struct.unpack_from("<6i", data)[4]
        while at < len(data):
            axes, letters, kind = struct.unpack_from("<3i", data, at)
            shape = struct.unpack_from(f"<{axes}i", data, at + 12)[::-1]
            at += 12 + 4 * axes
            name = data[at : at + letters].decode()
            at += letters
            assert kind == 0, "float32"
            values = np.frombuffer(data, np.float32, int(np.prod(shape)), at).reshape(shape)
            self[name] = torch.from_numpy(values.copy())
            at += values.nbytes

    def of(self, prefix: str) -> dict[str, Tensor]:
        """Everything below a prefix, by what follows it."""
        return {name.removeprefix(prefix): x for name, x in self.items() if name.startswith(prefix)}

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])


def oracle(shared: Path, version: str) -> tuple[Weights, Tensor]:
    """Weights, and the logits after the prompt."""
    folder = shared / "data" / "oracles" / "rwkv"
    logits = np.fromfile(folder / f"expected-logits-{version}.bin", dtype=np.float32)
    return Weights(folder / f"tiny-rwkv-{version}-FP32.bin"), torch.from_numpy(logits)


def shifted(x: Tensor) -> Tensor:
    """The token before, zeros before the first."""
    return pad(x[:, :-1], (0, 0, 1, 0))


def forward(
    weights: Weights, attention: Any, feed_forward: Any, backend: str
) -> tuple[Tensor, list[Recurrence]]:
    """Logits of every token of the prompt, and the recurrence of every layer."""
    x, shared, seen = weights.norm("blocks.0.ln0", weights["emb.weight"][PROMPT]), {}, []
    for layer in range(weights.layers):
        name = f"blocks.{layer}"
        y, recurrence = attention(weights.of(f"{name}.att."), weights.norm(f"{name}.ln1", x), shared, backend)
        x = x + y
        x = x + feed_forward(weights.of(f"{name}.ffn."), weights.norm(f"{name}.ln2", x))
        seen.append(recurrence)
    return weights.norm("ln_out", x) @ weights["head.weight"].T, seen


def run(recurrence: Recurrence, backend: str) -> Tensor:
    """Outputs of our scan, and a look at its measurements: the norm is that of the states."""
    found: ScanOutput = scan(recurrence, backend=backend, positions=range(recurrence.time))
    assert found.y is not None and found.steps is not None
    norms = found.states.flatten(3).norm(dim=-1)
    torch.testing.assert_close(found.steps.state_norm, norms, rtol=1e-4, atol=1e-6)
    return found.y.float()


def attention_5(w: dict[str, Tensor], x: Tensor, _: Any, backend: str) -> tuple[Tensor, Recurrence]:
    """Decay per key; the output reads the state before the token, and the token with a bonus."""
    heads, last = (*w["time_decay"].shape[:2],), shifted(x)
    r, k, v, g = (
        (x * w[f"time_mix_{m}"] + last * (1 - w[f"time_mix_{m}"])) @ w[f"{name}.weight"].T
        for m, name in (("r", "receptance"), ("k", "key"), ("v", "value"), ("g", "gate"))
    )
    r, k, v = (t.unflatten(2, heads) for t in (r, k, v))
    decay = w["time_decay"][..., 0].log().expand(k.shape)
    next_query = torch.cat([r[:, 1:], r[:, :1]], 1)  # reads, after a token, for the one that follows
    recurrence = Recurrence(q=next_query, k=k, v=v, log_decay=decay)
    y = pad(run(recurrence, backend)[:, :-1], (0, 0, 0, 0, 1, 0))
    y = y + (r * w["time_faaaa"][..., 0] * k).sum(-1, keepdim=True) * v
    y = group_norm(y.flatten(2)[0], heads[0], w["ln_x.weight"], w["ln_x.bias"], EPSILON[5])[None]
    return (y * silu(g)) @ w["output.weight"].T, recurrence


def feed_forward_5(w: dict[str, Tensor], x: Tensor) -> Tensor:
    k, r = (x * w[f"time_mix_{m}"] + shifted(x) * (1 - w[f"time_mix_{m}"]) for m in "kr")
    value = (k @ w["key.weight"].T).relu().square() @ w["value.weight"].T
    return torch.sigmoid(r @ w["receptance.weight"].T) * value


def attention_7(w: dict[str, Tensor], x: Tensor, shared: Any, backend: str) -> tuple[Tensor, Recurrence]:
    """Decay per key, and an erase term along a key of its own."""
    heads = (*w["r_k"].shape,)
    xr, xw, xk, xv, xa, xg = (x + (shifted(x) - x) * mix for mix in w["x_rwkvag"])
    r, k, v = (t @ w[f"{n}.weight"].T for t, n in ((xr, "receptance"), (xk, "key"), (xv, "value")))
    decay = -np.exp(-0.5) * torch.sigmoid(w["w0"][0] + torch.tanh(xw @ w["w1"].T) @ w["w2"].T)
    first = shared.setdefault("first value", v)
    if first is not v:
        v = v + (first - v) * torch.sigmoid(w["v0"][0] + xv @ w["v1"].T @ w["v2"].T)
    a = torch.sigmoid(w["a0"][0] + xa @ w["a1"].T @ w["a2"].T)
    g = torch.sigmoid(xg @ w["g1"].T) @ w["g2"].T
    erased = normalize((k * w["k_k"][0]).unflatten(2, heads), dim=-1)
    k = k * (1 + (a - 1) * w["k_a"][0])
    r, k, v, a, decay = (t.unflatten(2, heads) for t in (r, k, v, a, decay))
    recurrence = Recurrence(q=r, k=k, v=v, log_decay=decay, a=erased * a, b=-erased)
    y = run(recurrence, backend).flatten(2)
    y = group_norm(y[0], heads[0], w["ln_x.weight"], w["ln_x.bias"], EPSILON[7])[None].unflatten(2, heads)
    y = y + (r * k * w["r_k"]).sum(-1, keepdim=True) * v
    return (y.flatten(2) * g) @ w["output.weight"].T, recurrence


def feed_forward_7(w: dict[str, Tensor], x: Tensor) -> Tensor:
    k = (x + (shifted(x) - x) * w["x_k"][0]) @ w["key.weight"].T
    return k.relu().square() @ w["value.weight"].T


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("version", "attention", "feed_forward", "structure"),
    [
        ("5v2-730K", attention_5, feed_forward_5, "decay per key"),
        ("7v0-834K", attention_7, feed_forward_7, "decay per key, erase term"),
    ],
    ids=["5.2", "7"],
)
def test_golden_logits(
    version: str, attention: Any, feed_forward: Any, structure: str, backend: str, shared: Path
) -> None:
    """The logits that rwkv.cpp gives after the prompt, with our scan in every layer."""
    weights, expected = oracle(shared, version)
    logits, recurrences = forward(weights, attention, feed_forward, backend)
    assert {r.structure for r in recurrences} == {structure}
    error = (logits[0, -1] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{error:.1e}"
    without, _ = forward(weights, lambda w, x, *rest: (0 * x, None), feed_forward, backend)
    assert (without[0, -1] - expected).abs().max() > 1e-2, "the recurrence matters"


RENAMED = {
    "emb": "rwkv.embeddings",
    "ln_out": "rwkv.ln_out",
    "ln0": "pre_ln",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
    "blocks": "rwkv.blocks",
}


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_golden_logits_of_rwkv_4(backend: str, shared: Path) -> None:
    """The trained RWKV-4 in transformers, while it is traced."""
    from transformers import RwkvConfig, RwkvForCausalLM

    weights, expected = oracle(shared, "4v0-660K")
    config = RwkvConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        rescale_every=0,
        tie_word_embeddings=False,
    )
    model = RwkvForCausalLM(config).eval()
    state = {}
    for name, x in weights.items():
        if name.endswith("time_decay"):
            x = (-x).log()  # stored as the log decay itself
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        state[name] = x.view(1, 1, -1) if "time_mix" in name else x
    model.load_state_dict(state)
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda *a: seen.append(a[2].logits))
    record = statescope.trace(model, PROMPT, backend=backend)
    hook.remove()
    error = (seen[-1][0, -1] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{error:.1e}"
    assert record.attrs["structure"] == "decay per entry"
    assert np.isfinite(record["steps"].state_norm).all()
