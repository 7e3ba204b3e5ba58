"""Packed runs are the runs they were made from; cards say what was measured, and nothing else."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import statescope
from statescope.cli import app
from statescope.experiments.cards import read_card, recalled, render, shows, write_card
from statescope.experiments.packing import pack
from statescope.experiments.passkey import passkey
from statescope.experiments.training.cell import Effort
from statescope.experiments.training.config import Config
from statescope.experiments.training_length import Sweep, run

BUNDLED = pytest.mark.parametrize("name", list(statescope.bundled()))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the one run of a sweep over a text."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "book.txt").write_text("It was a dark and stormy night, and the rain fell in torrents. " * 80)
    base = Config(
        stream="text", corpus=str(folder / "book.txt"), row=128, rows=2, train_length=128, steps=4, warmup=1,
        width=16, head_size=8, state_size=4, chunk=32, dtype="float32",
    )  # fmt: skip
    run(Sweep(base, [4], [128]), folder, effort=Effort(beyond=128, rows=1, traced=128), progress=False)
    return next((folder / "runs").iterdir())


@pytest.fixture(scope="module")
def packed(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(swept, tmp_path_factory.mktemp("packed") / "tiny")


def test_packed_run_is_the_run_in_half_the_bytes(swept: Path, packed: Path) -> None:
    before, after = (load_file(place / "model.safetensors") for place in (swept, packed))
    assert len(before) == len(after)
    for name, weight in before.items():
        stored = after[name.replace("embeddings", "embedding")]
        assert stored.dtype == (torch.float16 if weight.ndim > 1 else torch.float32)
        assert (stored.float() - weight).abs().max() <= 2**-11 * weight.abs().max()
    ids = torch.randint(0, 256, (1, 60))
    model, own = statescope.load(packed, device="cpu"), statescope.load(swept, device="cpu")
    with torch.no_grad():
        assert (model(ids).logits - own(ids).logits).abs().max() <= 0.01 * own(ids).logits.abs().max()
    assert model.config.train_length == own.config.train_length == 128
    assert model.config.statescope_tokenizer == own.config.statescope_tokenizer
    assert statescope.trace(model, "text").attrs["tokens"] == 4


def test_a_recall_run_still_predicts_no_next_token(tmp_path: Path) -> None:
    base = Config(
        row=32, rows=1, train_length=8, steps=1, warmup=1, width=16, head_size=8, state_size=4, chunk=8,
        keys=8, values=4, dtype="float32",
    )  # fmt: skip
    run(Sweep(base, [4], [8]), tmp_path, effort=Effort(beyond=32, rows=1, traced=32), progress=False)
    model = statescope.load(pack(next((tmp_path / "runs").iterdir()), tmp_path / "tiny"), device="cpu")
    assert statescope.trace(model, [1, 2, 3, 4])["tokens"].loss.isnull().all()


def test_what_is_passed_on_says_how_it_was_made(swept: Path, packed: Path) -> None:
    facts = json.loads((packed / "training.json").read_text())
    settings = json.loads((swept / "run.json").read_text())
    assert facts["corpus"] == "book.txt" and settings["corpus"] != "book.txt"  # its name, not where it lay
    assert {**facts, "corpus": settings["corpus"]}.items() >= settings.items()
    assert {"command", "device", "torch", "date"} <= set(facts["made"])


def test_refused_and_nothing_written(swept: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not empty"):
        pack(swept, packed)
    (tmp_path / "half").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(swept / name, tmp_path / "half")
    with pytest.raises(ValueError, match=r"has no run\.json"):
        pack(tmp_path / "half", tmp_path / "new")
    (tmp_path / "table.jsonl").write_text('{"statescope_runs": 1}\n')
    with pytest.raises(ValueError, match="has no run text-n4"):
        pack(swept, tmp_path / "new", tmp_path / "table.jsonl")
    with pytest.raises(ValueError, match=r"has no training\.json"):
        write_card(swept)
    assert not (tmp_path / "new").exists() and not (swept / "card.json").exists()


def test_command_of_a_run_without_its_table_trains_it_again(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "moved")
    folder = pack(tmp_path / "moved", tmp_path / "new")
    command = json.loads((folder / "training.json").read_text())["made"]["command"].split()
    assert command[:4] == ["statescope", "train", "-o", "lab"]
    settings = json.loads((swept / "run.json").read_text())
    rest = [settings["corpus"] if word == "book.txt" else word for word in command[4:]]
    short = ["--beyond", "128", "--device", "cpu"]
    done = CliRunner().invoke(app, ["train", "-o", str(tmp_path / "lab"), *rest, *short])
    assert done.exit_code == 0, done.output
    (again,) = (tmp_path / "lab" / "runs").iterdir()
    assert json.loads((again / "run.json").read_text()) == settings
    before, after = (load_file(place / "model.safetensors") for place in (swept, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_card_holds_what_is_measured(packed: Path, swept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "tiny")
    text = "Call me Ishmael. Some years ago, never mind how long precisely. " * 70
    (tmp_path / "text").write_text(text)
    given = ["--haystack", f"Melville={tmp_path / 'text'}", "--lengths", "140,200", "--depths", "0,1"]
    given += ["--beside", str(packed)]
    done = CliRunner().invoke(app, ["card", str(folder), *given, "--trials", "2"])
    assert done.exit_code == 0, done.output
    card = read_card(folder)
    assert (folder / "README.md").read_text() == render(card)
    again = passkey(folder, [140, 200], [0, 1], 2, haystack=text, progress=False)["correct"].sum("trial")
    assert card["passkeys"]["right"]["Melville"] == again.values.tolist()
    own = {"right": card["passkeys"]["right"], "states": card["states"]}
    assert card["beside"] == {"differs": {}} | own
    assert card["states"]["text"] == "Melville" and set(card["states"]["live_memories"]) == {"128", "1024"}
    assert "after 1,024 tokens (training length 128)" in shows(card)[3]
    done = CliRunner().invoke(app, ["card", str(folder), "--haystack", "Melville"])
    assert done.exit_code == 2 and "expected NAME=FILE" in done.output
    done = CliRunner().invoke(app, ["pack", str(swept), "-o", str(tmp_path / "other")])
    assert done.exit_code == 0 and statescope.load(tmp_path / "other")


def test_sentences_follow_from_the_numbers() -> None:
    counts = [[32, 32], [32, 31], [32, 3]]
    card = {
        "name": "x",
        "training": {"train_length": 512},
        "checkpoint": {"layers": 2, "heads": 8},
        "passkeys": {"length": [512, 1024, 2048], "depth": [0, 1], "trials": 32, "right": {"prose": counts}},
        "states": {
            "text": "prose",
            "worst_overload": 1.5,
            "overloaded_heads": 1,
            "live_memories": {"512": 30.2, "2048": 99.0},
            "sentence": "After all it forgets.",
        },
    }
    assert recalled(card["passkeys"], counts) == (1024, 0, 2048)
    other = {"differs": {"train_length": 256}, "right": {"prose": [[32, 32], [1, 32], [0, 0]]}}
    other["states"] = card["states"] | {"worst_overload": 2.5}
    assert "That other model's heads, likewise, over 8" in shows(card | {"beside": other})[-1]
    assert shows(card | {"beside": other})[1] == (
        "The same model with train length 256, else trained alike, recalls 95 % of passkeys in prose from up"
        " to 512 tokens, 2 x its training length (surely up to 0; surely no more from 1,024 on)."
    )
    assert shows(card) == [
        "It recalls 95 % of passkeys in prose from up to 1,024 tokens, 2 x its training length (surely up to"
        " 0; surely no more from 2,048 on).",
        "Its states: after all it forgets.",
        "Its heads that outgrow what training has seen, over 8 training lengths of prose: 1 of 16, the worst"
        " 1.5 times; the fullest effectively holds so many writes: 30 at token 512, 99 at token 2,048.",
    ]


@BUNDLED
def test_bundled_checkpoints_have_cards(name: str) -> None:
    folder = statescope.bundled()[name]
    card = read_card(folder)
    assert (folder / "README.md").read_text() == render(card)
    assert card["name"] == name
    assert card["training"] == json.loads((folder / "training.json").read_text())
    assert card["checkpoint"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert card["checkpoint"]["parameters"] == sum(p.numel() for p in statescope.load(name).parameters())
    assert f"[{name}]({name}/README.md)" in (folder.parent / "README.md").read_text()


def test_the_bundled_one_that_forgets_is_the_one_that_the_rule_chose() -> None:
    """Of all runs trained for it, none with an overloaded head in any text recalls more; nor has it one."""
    path = Path(__file__).parents[1] / "notebooks" / "results" / "h200-checkpoints.json"
    runs = json.loads(path.read_text())["runs"]
    table = lzma.decompress(path.with_name("h200-checkpoints.jsonl.xz").read_bytes()).decode()
    rows = {row["run"]: row for row in map(json.loads, table.splitlines()) if "run" in row}
    for claimed in runs:
        row = rows[claimed["run"]]
        assert claimed["command"] == row["made"]["command"] and row["made"]["device"].startswith("NVIDIA")
        assert claimed["passkeys"] == [sum(right) for right in row["passkeys"]["right"]]
        assert {k: row["config"][k] for k in ("layers", "state_size", "seed")}.items() <= claimed.items()
    passed = [len(runs)]
    left = runs
    for text in ("held-out books", "book text", "filler"):
        left = [r for r in left if r["states"][text]["overloaded_heads"] == 0]
        passed.append(len(left))
    assert passed == [32, 9, 5, 3]
    best = max(left, key=lambda r: sum(r["passkeys"]))
    card = read_card(statescope.bundled()["mamba2-byte-n32-t2048"])
    same = ("layers", "state_size", "train_length", "seed", "steps")
    assert {k: best[k] for k in same} == {k: card["training"][k] for k in same}
    assert card["training"]["made"]["command"] == best["command"]
    assert card["states"]["overloaded_heads"] == 0 and "forget by its states" in card["states"]["sentence"]
    assert best["states"]["book text"]["worst_overload"] == card["states"]["worst_overload"]
