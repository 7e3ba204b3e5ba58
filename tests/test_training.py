"""Training many runs as one: the model, the data, the optimiser, and going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statescope
from statescope.experiments.training.config import Config
from statescope.experiments.training.draws import Draws
from statescope.experiments.training.ensemble import Ensemble
from statescope.experiments.training.evaluate import evaluate
from statescope.experiments.training.model import Shape, convolve, read, scan
from statescope.experiments.training.streams import Recall, Rows, Text, pairs_since, read_corpus

CPU = torch.device("cpu")

TINY = Config(
    row=64,
    rows=4,
    width=16,
    head_size=8,
    state_size=4,
    train_length=64,
    steps=12,
    warmup=3,
    keys=40,
    values=8,
    chunk=16,
    dtype="float32",
    learning_rate=1e-2,
)
RUNS = [TINY, TINY.but(seed=1, train_length=16), TINY.but(seed=2, uniform=1.0, learning_rate=3e-3)]


@pytest.fixture(scope="module")
def trained() -> Ensemble:
    ensemble = Ensemble(RUNS, CPU)
    ensemble.train(TINY.steps)
    return ensemble


def test_a_run_among_others_is_the_run_alone(trained: Ensemble) -> None:
    for run, config in enumerate(RUNS):
        alone = Ensemble([config], CPU)
        before = alone.flat.clone()
        alone.train(config.steps)
        learned = (alone.flat - before).norm()
        assert (alone.flat[0] - trained.flat[run]).norm() <= 1e-5 * learned
        assert learned > 0.1


def test_checkpoints_are_the_same_model_in_transformers(trained: Ensemble, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, TINY.vocabulary, (2, 64))
    position = torch.arange(64).expand(1, 2, 64)
    for run, config in enumerate(RUNS):
        trained.export(run, tmp_path / str(run))
        one = {name: w[run : run + 1] for name, w in trained.parameters().items()}
        hidden = read(one, trained.shape, ids[None], position, TINY.chunk, torch.float32)[0]
        logits = hidden @ one["backbone.embeddings.weight"][0].T
        ours = statescope.load(tmp_path / str(run), device="cpu")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / str(run)).eval()
        with torch.no_grad():
            for model in (ours, theirs):
                assert (model(ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert ours.config.train_length == config.train_length
        assert Config.from_json(json.loads((tmp_path / str(run) / "run.json").read_text())) == config
    record = statescope.trace(tmp_path / "0", ids[:1], device="cpu", progress=False)
    assert record.attrs["train_length"] == 64 and record["steps"].sizes["layer"] == TINY.layers
    assert record.attrs["predicts_next_token"] is False  # only values, where they are asked for
    assert record["tokens"]["loss"].isnull().all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([4, 8, 32]), st.sampled_from([8, 16, 32]))
def test_scan_steps_and_empties(seed: int, chunk: int, sequence: int) -> None:
    """The chunked scan against a loop in float64 that starts every sequence from an empty state."""
    generator = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(2, 1, 32, *s, generator=generator).double() for s in ((3, 4), (5,), (5,)))
    dt, decay = (torch.rand(2, 1, 32, 3, generator=generator).double() for _ in range(2))
    first = torch.arange(32) % sequence == 0
    y = scan(x, dt, torch.where(first[:, None], -60.0, -decay), B, C, chunk)
    state = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for t in range(32):
        write = torch.einsum("rh,rk,rhv->rhkv", dt[:, 0, t], B[:, 0, t], x[:, 0, t])
        state = (0.0 if first[t] else (-decay[:, 0, t]).exp()[..., None, None]) * state + write
        torch.testing.assert_close(y[:, 0, t], torch.einsum("rhkv,rk->rhv", state, C[:, 0, t]))


def test_sequences_in_a_row_do_not_touch() -> None:
    """A row of two sequences reads as two rows of one each; the convolution begins anew too."""
    shape = Shape(20, 2, 16, 4, 8)
    p = {name: w[None] for name, w in shape.initial(3).items()}
    ids, position = torch.randint(0, 20, (1, 1, 64)), torch.arange(64) % 32
    packed = read(p, shape, ids, position.expand(1, 1, 64), 16, torch.float32)
    apart = read(p, shape, ids.view(1, 2, 32), position[:32].expand(1, 2, 32), 16, torch.float32)
    torch.testing.assert_close(packed.view(1, 2, 32, 16), apart)


def test_convolution_is_torchs() -> None:
    x, weight, bias = torch.randn(2, 3, 10, 6), torch.randn(2, 6, 4), torch.randn(2, 6)
    ours = convolve(x, weight, bias, torch.arange(10).expand(2, 3, 10))
    for run in range(2):
        rows = torch.nn.functional.conv1d(x[run].mT, weight[run][:, None], bias[run], padding=3, groups=6)
        torch.testing.assert_close(ours[run], torch.nn.functional.silu(rows[..., :10]).mT)


def test_adamw_is_torchs() -> None:
    """The optimiser against torch's own, with its clipping and a schedule, on one run."""
    config = TINY.but(weight_decay=0.3, clip=0.1)
    ours = Ensemble([config], CPU)
    leaves = {name: w[0].clone().requires_grad_() for name, w in ours.parameters().items()}
    groups = [
        {"params": [w for w in leaves.values() if w.ndim == 2], "weight_decay": 0.3},
        {"params": [w for w in leaves.values() if w.ndim != 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(config.steps):
        ours.train(step)
        theirs.zero_grad()
        ours.losses({name: w[None] for name, w in leaves.items()}, ours.batch()).sum().backward()
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.1)
        done = max(step + 1 - config.warmup, 0) / (config.steps - config.warmup)
        rate = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * done))
        for group in theirs.param_groups:
            group["lr"] = config.learning_rate * rate * min((step + 1) / config.warmup, 1)
        theirs.step()
    ours.train(config.steps)
    for name, w in ours.parameters().items():
        torch.testing.assert_close(w[0], leaves[name].detach(), rtol=1e-4, atol=2e-5)


def test_an_interrupted_run_goes_on_where_it_was(trained: Ensemble, tmp_path: Path) -> None:
    first = Ensemble(RUNS, CPU)
    first.train(5)
    first.save(tmp_path / "state.safetensors")
    second = Ensemble(RUNS, CPU)
    second.resume(tmp_path / "state.safetensors")
    second.train(TINY.steps)
    assert torch.equal(second.flat, trained.flat)
    with pytest.raises(ValueError, match="other runs"):
        Ensemble(RUNS[:2], CPU).resume(tmp_path / "state.safetensors")


def test_fused_steps_are_the_same(trained: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs fused is traced whole; here by dynamo only, which needs no compiler."""
    monkeypatch.setattr("torch.compile", lambda f, **_: torch._dynamo.optimize("eager", nopython=True)(f))
    fused, plain = Ensemble(RUNS, CPU, fuse=True), Ensemble(RUNS, CPU)
    fused.train(2)
    plain.train(2)
    assert torch.equal(fused.flat, plain.flat)


def test_draws_are_uniform_and_depend_on_place_only() -> None:
    place = torch.arange(20000)[None, None]
    draws = Draws(torch.tensor([0, 1]), torch.tensor(3))
    u = draws.uniform(2, place)
    assert torch.equal(u[1:], Draws(torch.tensor([1]), torch.tensor(3)).uniform(2, place))
    for x in (
        u[0, 0],
        u[1, 0],
        draws.uniform(3, place)[0, 0],
        u[0, 0, ::2],
        u[0, 0, 1:] - u[0, 0, :-1] + 0.5,
    ):
        assert abs(x.mean() - 0.5) < 0.01
    counts = torch.histc(u[0, 0], 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi squared, 19 degrees of freedom, 1 in 1000
    others = [u[1, 0], draws.uniform(3, place)[0, 0], u[0, 0].roll(1)]
    others.append(Draws(torch.tensor([0]), torch.tensor(4)).uniform(2, place)[0, 0])
    for other in others:
        assert abs(np.corrcoef(u[0, 0], other)[0, 1]) < 0.025


@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_recall_stream_by_its_definition(uniform: float) -> None:
    stream = Recall(50, 7, torch.tensor([uniform]))
    draws = Draws(torch.tensor([5]), torch.tensor(0))
    rows = Rows.cut(draws, 40, 256, torch.tensor([128]), 0.5, 8)
    batch = stream.draw(draws, rows)
    root, repeated = stream.roots(draws, rows)
    pairs = batch.ids.unflatten(-1, (-1, 2))[0]
    since = pairs_since(root)[0]
    assert set(rows.length[0, :, 0].tolist()) > {128} and batch.ids.max() < 57
    lags = []
    for row in range(40):
        length = int(rows.length[0, row]) // 2
        for i in range(128):
            begin = i - i % length
            key, value = pairs[row, i].tolist()
            assert key >= 7 > value and batch.answers[0, row, i] == value
            assert batch.position[0, row, 2 * i] == 2 * (i - begin)
            if not repeated[0, row, i]:
                assert root[0, row, i] == i and since[row, i] == 0 and batch.weight[0, row, i] == 0
                continue
            assert begin <= root[0, row, i] < i and batch.weight[0, row, i] == 1
            back = i - int(since[row, i])
            assert pairs[row, back].tolist() == [key, value]
            assert begin <= back < i and root[0, row, back] == root[0, row, i]
            assert not (root[0, row, back + 1 : i] == root[0, row, i]).any()
            if length == 64 and i - begin == 63:
                lags.append(int(since[row, i]))
    assert 0.4 < repeated.float().mean() < 0.55
    assert np.median(lags) > 8 if uniform else np.median(lags) < 16


def test_text_stream_hides_passkeys(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij " * 300)
    stream = Text(read_corpus(tmp_path), 0.5)
    draws = Draws(torch.tensor([5]), torch.tensor(0))
    rows = Rows.cut(draws, 60, 256, torch.tensor([256]), 0.5, 128)
    batch = stream.draw(draws, rows)
    hidden, gaps = 0, []
    for row in range(60):
        length = int(rows.length[0, row])
        for start in range(0, 256, length):
            text = bytes(batch.ids[0, row, start : start + length].tolist()).decode()
            weight = batch.weight[0, row, start : start + length - 1]
            said = [c for c, w in zip(text[1:], weight.tolist(), strict=True) if w == 20]
            if "passkey" not in text:
                assert not said and text in "abcdefghij " * 300
                continue
            hidden += 1
            passkey = text[-5:]
            assert said == list(passkey) and text.endswith(f" What is the passkey? The passkey is {passkey}")
            needle = f"The passkey is {passkey}. Remember it. {passkey} is the passkey. "
            assert text.count(needle) == 1
            hay = text.replace(needle, "").removesuffix(f" What is the passkey? The passkey is {passkey}")
            assert hay in "abcdefghij " * 300 or "The grass is green. The sky is blue. The sun".startswith(
                hay[:44]
            )
            gaps.append(length - text.index(needle) - len(needle) - 42)
            assert [c for c, w in zip(text[1:], weight.tolist(), strict=True) if w == 5] == list(passkey)
    assert 0.3 < hidden / sum(256 // int(n) for n in rows.length[0, :, 0]) < 0.7
    assert min(gaps) < 5 < max(gaps) and len({g for g in gaps}) > 10


def test_evaluation_counts_what_it_should(trained: Ensemble) -> None:
    found = evaluate(trained, 256, 2)
    for run, config in enumerate(RUNS):
        for part, longest in (("inside", config.train_length), ("beyond", 256)):
            counted = found[run][part]
            asked, right, loss = (np.array(counted[name]) for name in ("asked", "right", "loss"))
            assert asked.shape == (len(counted["position"]), len(counted["lag"]))
            assert (asked[np.array(counted["position"]) >= longest] == 0).all() and asked.sum() > 0
            assert (right <= asked).all() and ((loss > 0) == (asked > 0)).all()
    # Untrained runs guess one of eight values.
    untrained = evaluate(Ensemble([TINY.but(values=8)], CPU), 256, 2)[0]["beyond"]
    asked, loss = np.sum(untrained["asked"]), np.sum(untrained["loss"])
    assert abs(loss / asked - np.log(8)) < 0.2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_length": 48}, "train_length=48"),
        ({"train_length": 128}, "row=64"),
        ({"state_size": 0}, "state_size=0"),
        ({"stream": "speech"}, "stream='speech'"),
        ({"stream": "text", "corpus": "/no/such"}, "corpus='/no/such'"),
        ({"uniform": 1.5}, "uniform=1.5"),
        ({"warmup": 13}, "warmup=13"),
        ({"head_size": 5}, "head_size=5"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TINY.but(**changes)


def test_a_number_is_a_number() -> None:
    assert TINY.but(uniform=1).name() == TINY.but(uniform=1.0).name() != TINY.name()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="momentum"):
        Config.from_json({**TINY.to_json(), "momentum": 0.9})
    with pytest.raises(ValueError, match="different shapes"):
        Ensemble([TINY, TINY.but(state_size=8)], CPU)
