"""What does not fit is refused with one clear message, and nothing that exists is touched."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import skip
from tiny import VOCABULARY, assert_close, assert_identical, build, ids
from torch import nn
from zarr.storage import LocalStore, MemoryStore

import statescope
from statescope import layout
from statescope.store import RecordWriter

TEXT = ids(20)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("mamba2")


@pytest.fixture(scope="module")
def finished(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a finished record, to be copied."""
    place = tmp_path_factory.mktemp("records") / "run.zarr"
    statescope.trace(model, TEXT, store=place, window=3, snapshots=5, probes=7)
    return place


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount small file systems; they go away after the test."""
    mounted: list[Path] = []

    def make(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            skip("mounting a file system of its own is not allowed here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def listing(folder: Path) -> dict[str, Any]:
    """List every path below a folder with its content."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(call: Callable[[], Any], error: type[Exception], *words: str) -> None:
    """Demand one error of exactly that class whose message has all the words."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error, f"{caught.type.__name__} is a surprise: {caught.value}"
    message = str(caught.value)
    assert len(message) < 600
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)).eval()


def partly(device: str) -> nn.Module:
    """Put one layer of a model elsewhere, as accelerate does with a device_map."""
    model = build("mamba2")
    model.backbone.layers[1].to(device)
    return model


def returns_a_number(layer: int, recurrence: Any) -> Any:
    return 3


def forgets_a_token(layer: int, recurrence: Any) -> Any:
    return (
        recurrence.between(1, recurrence.time, recurrence.initial_state)
        if recurrence.time > 1
        else recurrence
    )


class Unknown:
    """Anything that is no zarr store."""


FAMILIES_NAMED = ("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2")

ARGUMENTS: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("empty string", {"text": ""}, ValueError, ("text is empty", "at least one token")),
    ("empty list", {"text": []}, ValueError, ("text is empty", "at least one token")),
    ("empty batch", {"text": [[], []]}, ValueError, ("text is empty", "at least one token")),
    (
        "id too high",
        {"text": [3, 64]},
        ValueError,
        ("text has token id 64", "(0, 1)", "0 to 63", "tokenizer"),
    ),
    ("id negative", {"text": [[1, 2], [3, -4]]}, ValueError, ("text has token id -4", "(1, 1)", "0 to 63")),
    ("ids as floats", {"text": [1.0, 2.0]}, TypeError, ("text has dtype float64", "integer")),
    ("ids in bfloat16", {"text": TEXT.bfloat16()}, TypeError, ("text has dtype", "bfloat16", "integer")),
    ("ids as booleans", {"text": [True, False]}, TypeError, ("text has dtype bool", "integer")),
    ("three axes", {"text": TEXT[None]}, ValueError, ("text has 3 dimensions", "(time,) or (batch, time)")),
    ("no axis", {"text": {"input_ids": [1]}}, TypeError, ("text is a dict", "sequence of token ids")),
    ("bytes", {"text": b"abc"}, TypeError, ("text is a bytes", "sequence of token ids")),
    ("ragged lists", {"text": [[1, 2], [3]]}, ValueError, ("text holds", "different lengths", "one by one")),
    ("strings", {"text": ["one", "two"]}, TypeError, ("text is a list of strings", "one by one")),
    ("nested strings", {"text": [["one"]]}, TypeError, ("text has dtype", "integer")),
    ("no tokenizer", {"text": "hello"}, ValueError, ("tokenizer is not known", "pass tokenizer=", "'bytes'")),
    (
        "tokenizer unknown",
        {"text": "hello", "tokenizer": "no/such/tokenizer/anywhere"},
        ValueError,
        ("tokenizer", "no/such/tokenizer/anywhere"),
    ),
    ("no recurrence", {"model": gpt2}, ValueError, ("model is a GPT2LMHeadModel", *FAMILIES_NAMED)),
    ("no recurrence, string", {"model": gpt2, "text": "a"}, ValueError, ("GPT2LMHeadModel", "mamba2")),
    ("no language model", {"model": lambda: nn.Linear(2, 2).eval()}, TypeError, ("model is a Linear",)),
    ("no model", {"model": lambda: 3}, TypeError, ("model is a int", "transformers model", "folder")),
    (
        "no head",
        {"model": lambda: build("mamba2").backbone},
        ValueError,
        ("model is a Mamba2Model", "logits"),
    ),
    (
        "in training",
        {"model": lambda: build("mamba2").train()},
        ValueError,
        ("training mode", "model.eval()"),
    ),
    ("sharded", {"model": lambda: partly("meta")}, ValueError, ("weights on cpu and meta", "device_map")),
    (
        "not loaded",
        {"model": lambda: build("mamba2").to("meta")},
        ValueError,
        ("weights on meta", "one device"),
    ),
    ("layer", {"layers": [0, 7]}, ValueError, ("layers names layer 7", "0 to 2")),
    ("layer in a gap", {"model": lambda: build("bamba"), "layers": 1}, ValueError, ("layer 1", "0, 2, 3")),
    ("no layer", {"layers": []}, ValueError, ("layers names no layer", "0 to 2")),
    ("layer by name", {"layers": "first"}, ValueError, ("layers holds", "integers")),
    ("head", {"heads": 4}, ValueError, ("heads names head 4", "0 to 3")),
    ("head negative", {"heads": -1}, ValueError, ("heads names head -1", "0 to 3")),
    ("snapshot", {"snapshots": [3, 20]}, ValueError, ("snapshots names position 20", "0 to 19")),
    ("snapshot negative", {"snapshots": -21}, ValueError, ("snapshots names position -21", "0 to 19")),
    ("snapshot fraction", {"snapshots": 0.5}, ValueError, ("snapshots holds 0.5", "integers")),
    ("probe", {"probes": 99}, ValueError, ("probes names position 99", "0 to 19")),
    ("reach", {"probes": statescope.Probes([3], reach=0)}, ValueError, ("probes has reach=0", "1 token")),
    ("reach fraction", {"probes": statescope.Probes([3], reach=1.5)}, ValueError, ("probes has reach=1.5",)),
    ("window", {"window": 0}, ValueError, ("window=0", "1 or more")),
    ("window fraction", {"window": 1.5}, ValueError, ("window=1.5", "1 or more")),
    ("segment", {"segment": 0}, ValueError, ("segment=0", "1 or more")),
    ("segment boolean", {"segment": True}, ValueError, ("segment=True", "1 or more")),
    ("train length", {"train_length": 0}, ValueError, ("train_length=0", "1 or more")),
    ("backend", {"backend": "fast"}, ValueError, ("backend='fast'", "auto", "model", "chunked", "reference")),
    (
        "backend that edits not",
        {"backend": "model", "edit": returns_a_number},
        ValueError,
        ("backend='model'", "edit", "'auto'"),
    ),
    ("edit no function", {"edit": 3}, TypeError, ("edit is a int", "(layer, recurrence)")),
    ("edit nonsense", {"edit": returns_a_number}, TypeError, ("edit returned int", "layer 0", "Recurrence")),
    (
        "edit another shape",
        {"edit": forgets_a_token},
        ValueError,
        ("edit returned", "layer 0", "(1, 20, 4, 16, 8)"),
    ),
    ("device", {"device": "meta"}, ValueError, ("device='meta'", "on cpu", "move the model")),
    ("device unknown", {"device": "abacus"}, ValueError, ("device='abacus'", "'cpu'")),
    ("dtype", {"dtype": "float16"}, ValueError, ("dtype='float16'", "torch.float32", "convert")),
    ("dtype unknown", {"dtype": "float3"}, ValueError, ("dtype='float3'", "'float32'")),
    ("dtype integer", {"dtype": torch.int8}, ValueError, ("dtype=torch.int8", "floating")),
    ("store of no kind", {"store": Unknown()}, TypeError, ("store is a Unknown", "folder")),
    ("store empty", {"store": ""}, ValueError, ("store=''", "folder")),
    ("store far away", {"store": "s3://bucket/run.zarr"}, ValueError, ("store='s3://", "zarr store")),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), [c[1:] for c in ARGUMENTS], ids=[c[0] for c in ARGUMENTS]
)
def test_argument_refused(
    changes: dict[str, Any],
    error: type[Exception],
    words: tuple[str, ...],
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each argument that does not fit names itself and the remedy; no file appears or changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    given = {"model": model, "text": TEXT, "store": tmp_path / "run.zarr", **changes}
    if callable(given["model"]) and not isinstance(given["model"], nn.Module):
        given["model"] = given["model"]()
    before = listing(tmp_path)
    refused(lambda: statescope.trace(given.pop("model"), given.pop("text"), **given), error, *words)
    assert listing(tmp_path) == before


def occupied(kind: str, place: Path, finished: Path) -> None:
    """Put something where a record is to go."""
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "notes.txt").write_text("mine")
    elif kind == "group":
        zarr.create_group(place, attributes={"mine": True}).create_array("x", data=np.arange(3.0))
    elif kind == "array":
        zarr.create_array(place, data=np.arange(3.0))
    elif kind == "format 2":
        zarr.create_group(place, zarr_format=2)
    elif kind == "broken":
        place.mkdir()
        (place / "zarr.json").write_text('{"zarr')
    elif kind == "below a file":
        place.parent.write_text("mine")
    else:
        shutil.copytree(finished, place)
        if kind == "newer":
            change_root(place, schema_version=99, complete=False)


def change_root(place: Path, **attributes: Any) -> None:
    """Change root attributes of a record; ... takes one away."""
    path = place / "zarr.json"
    content = json.loads(path.read_text())
    merged = {**content["attributes"], **attributes}
    content["attributes"] = {k: v for k, v in merged.items() if v is not ...}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("file", ("is a file", "name a folder")),
        ("folder", ("no record", "name another place")),
        ("group", ("no record", "name another place")),
        ("array", ("no record", "name another place")),
        ("format 2", ("no record", "name another place")),
        ("broken", ("no record", "name another place")),
    ],
)
@pytest.mark.parametrize("form", [str, Path, LocalStore])
def test_foreign_place_kept(
    form: Any,
    kind: str,
    words: tuple[str, ...],
    overwrite: bool,
    model: nn.Module,
    finished: Path,
    tmp_path: Path,
) -> None:
    """What is no record is never written over, whatever overwrite says."""
    place = tmp_path / "run.zarr"
    occupied(kind, place, finished)
    before = listing(tmp_path)
    if kind == "file" and form is LocalStore:
        place = place.resolve()
        form = Path
    refused(
        lambda: statescope.trace(model, TEXT, store=form(place), overwrite=overwrite),
        FileExistsError,
        f"store='{place}'",
        *words,
    )
    assert listing(tmp_path) == before


def test_foreign_memory_store_kept(model: nn.Module) -> None:
    """A store in memory that holds something else is refused too."""
    place = MemoryStore()
    zarr.create_array(place, name="x", data=np.arange(3.0))
    refused(
        lambda: statescope.trace(model, TEXT, store=place, overwrite=True),
        FileExistsError,
        "store=",
        "no record",
    )
    np.testing.assert_array_equal(zarr.open_array(place, path="x")[:], np.arange(3.0))


@pytest.mark.parametrize(
    ("kind", "words"), [("finished", ("finished",)), ("newer", ("interrupted", "another"))]
)
def test_record_not_overwritten_unasked(
    kind: str, words: tuple[str, ...], model: nn.Module, finished: Path, tmp_path: Path
) -> None:
    """A record that is there stays, and the message says how to replace it."""
    place = tmp_path / "run.zarr"
    occupied(kind, place, finished)
    before = listing(tmp_path)
    refused(
        lambda: statescope.trace(model, TEXT, store=place),
        FileExistsError,
        "store=",
        "overwrite=True",
        *words,
    )
    assert listing(tmp_path) == before


def test_place_below_a_file(model: nn.Module, tmp_path: Path) -> None:
    """A path through a file is named as the store that cannot be written."""
    (tmp_path / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    place = tmp_path / "notes.txt" / "run.zarr"
    refused(
        lambda: statescope.trace(model, TEXT, store=place), NotADirectoryError, "store=", "choose a place"
    )
    assert listing(tmp_path) == before


def test_read_only_place(model: nn.Module, mount: Callable[..., Path]) -> None:
    """A read-only file system is named; records on it open, and are not resumed by accident."""
    place = mount("readonly", "size=4m")
    statescope.trace(model, TEXT, store=place / "done.zarr")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    before = listing(place)
    for overwrite in (False, True):
        refused(
            lambda overwrite=overwrite: statescope.trace(
                model, TEXT, store=place / "new" / "run.zarr", overwrite=overwrite
            ),
            OSError,
            "store=",
            os.strerror(errno.EROFS),
            "choose a place that can be written",
        )
    refused(
        lambda: statescope.trace(model, TEXT, store=place / "done.zarr", overwrite=True),
        OSError,
        "store=",
        "choose",
    )
    assert listing(place) == before
    assert statescope.open(place / "done.zarr").attrs["complete"]


def test_unwritable_system_folder(model: nn.Module) -> None:
    """A folder of the kernel's refuses even root."""
    if not Path("/proc/self").exists():
        skip("/proc is not mounted")
    with pytest.raises(OSError, match=re.escape("store='/proc/run.zarr' cannot be written")):
        statescope.trace(model, TEXT, store="/proc/run.zarr")


LONG = ids(2400)
SETTINGS: dict[str, Any] = {"segment": 200, "snapshots": [0, 1199, -1], "probes": 2100}


def test_full_disk(model: nn.Module, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk midway leaves an exact prefix; with more space the same call ends in the same record."""
    monkeypatch.setattr(layout, "SHARD_TOKENS", 200)
    whole = statescope.trace(model, LONG, **SETTINGS)
    place = mount("small", "size=600k") / "run.zarr"
    with pytest.raises(OSError, match=r"free some space; its first .* run the same call again") as caught:
        statescope.trace(model, LONG, store=place, **SETTINGS)
    assert caught.value.errno == errno.ENOSPC
    assert f"store='{place}'" in str(caught.value)
    assert not list(place.rglob("*.partial*")), "half a file is left"
    part = statescope.open(place)
    committed = part.attrs["committed"]
    assert 0 < committed < 2400
    assert f"first {committed} tokens" in str(caught.value)
    assert_prefix(part, whole, committed)
    subprocess.run(["mount", "-o", "remount,size=16m", str(place.parent)], check=True)
    assert_identical(statescope.trace(model, LONG, store=place, **SETTINGS), whole)


def assert_prefix(part: Any, whole: Any, committed: int) -> None:
    """Demand that what is committed equals the whole record bit for bit."""
    for group in ("tokens", "steps"):
        np.testing.assert_array_equal(part[group].token, np.arange(committed))
        expected = whole[group].to_dataset().isel(token=slice(0, committed)).load()
        assert part[group].to_dataset().load().identical(expected)


def test_full_disk_before_the_first_commit(model: nn.Module, mount: Callable[..., Path]) -> None:
    """Where not even the first commit fits, nothing is left to stand in the way."""
    place = mount("tiny", "size=160k") / "run.zarr"
    with pytest.raises(OSError, match=r"free some space$"):
        statescope.trace(model, LONG, store=place, **SETTINGS)
    assert listing(place.parent) == {}


def test_file_size_limit(tmp_path: Path) -> None:
    """A limit on file sizes reads like a full disk: named, the prefix exact."""
    place = tmp_path / "run.zarr"
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import statescope
        from statescope import layout, store
        from tiny import build, ids

        layout.SHARD_TOKENS = 50
        commit = store.RecordWriter.commit

        def limited(self, tokens, carry, **attributes):
            commit(self, tokens, carry, **attributes)
            if tokens == 150:
                resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))

        store.RecordWriter.commit = limited
        try:
            statescope.trace(build("mamba2"), ids(400), store={str(place)!r}, segment=50)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print("refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout and "free some space; its first 150 tokens are safe" in done.stdout
    part = statescope.open(place)
    assert part.attrs["committed"] == 150
    assert_prefix(part, statescope.trace(build("mamba2"), ids(400), segment=50), 150)


BAD = 7
"""Token id whose embedding is NaN."""


def poisoned(**changes: Any) -> nn.Module:
    """Build a model with one row of NaN in its embedding."""
    model = build("mamba2", **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    return model


def text_with(*places: int, tokens: int = 90) -> torch.Tensor:
    text = ids(tokens)
    text[text == BAD] = BAD + 1
    text[0, list(places)] = BAD
    return text


def first_in(record: Any) -> int:
    """Find the first token at which anything but the loss of token 0 is not finite."""
    bad = ~np.isfinite(record["tokens"].loss.values)
    bad[:, 0] = False
    for name in record["steps"].data_vars:
        bad |= (~np.isfinite(record["steps"][name].values)).any((1, 3))
    return int(np.flatnonzero(bad.any(0))[0])


@pytest.mark.parametrize("segment", [16, 1, 90, 32])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_nonfinite_weights(backend: str, segment: int) -> None:
    """A NaN is recorded, warned of and located; all before it is as if the text ended there."""
    model, text = poisoned(tie_word_embeddings=False), text_with(40, 70)
    with pytest.warns(RuntimeWarning, match="non-finite values; the first is in") as caught:
        record = statescope.trace(model, text, backend=backend, segment=segment)
    assert [w.filename for w in caught] == [__file__]
    assert record.attrs["complete"]
    first = record.attrs["first_nonfinite"]
    assert first["token"] == first_in(record)
    here = record["steps"][first["variable"]].isel(sequence=first["sequence"])
    assert not np.isfinite(here.sel(layer=first["layer"], token=first["token"], head=first["head"]))
    # transformers' own scan, a matrix product, spreads a NaN to the start of what it is given
    expected = 40 // segment * segment if backend == "auto" else 40
    assert first["token"] == expected
    if expected == 0:
        return
    cut = statescope.trace(model, text[:, : first["token"]], backend=backend, segment=segment)
    before = record.isel(token=slice(0, first["token"]))
    for group in ("tokens", "steps"):
        for name, x in before[group].data_vars.items():
            known = x.isel(token=slice(1, None)) if name == "loss" else x
            assert np.isfinite(known).all()
    assert_close(cut, before)


def test_nonfinite_through_tied_weights() -> None:
    """Where the output shares the embedding, the first loss is the first casualty."""
    model = poisoned(tie_word_embeddings=True)
    with pytest.warns(RuntimeWarning, match="the first is in loss at sequence 0, token 1$"):
        record = statescope.trace(model, text_with(40), backend="chunked")
    assert record.attrs["first_nonfinite"] == {"variable": "loss", "sequence": 0, "token": 1}
    assert first_in(record) == 1


def test_nonfinite_loss_of_a_later_sequence() -> None:
    """The first in the order of tokens counts, not the first sequence."""
    model, text = build("mamba2"), torch.cat([text_with(60), text_with(30)])

    def impossible(module: nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([BAD]), -torch.inf)

    model.lm_head.register_forward_hook(impossible)
    with pytest.warns(RuntimeWarning, match="first is in loss"):
        record = statescope.trace(model, text)
    assert record.attrs["first_nonfinite"] == {"variable": "loss", "sequence": 1, "token": 30}


def test_nonfinite_survives_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run keeps the place that an earlier commit noted."""
    monkeypatch.setattr(layout, "SHARD_TOKENS", 16)
    model, text, place = poisoned(tie_word_embeddings=False), text_with(5, 70), MemoryStore()
    commit = RecordWriter.commit

    def interrupted(self: RecordWriter, tokens: int, *rest: Any, **attributes: Any) -> None:
        commit(self, tokens, *rest, **attributes)
        if tokens == 48:
            raise KeyboardInterrupt

    monkeypatch.setattr(RecordWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statescope.trace(model, text, segment=16, backend="chunked", store=place)
    assert statescope.open(place).attrs["first_nonfinite"]["token"] == 5
    monkeypatch.setattr(RecordWriter, "commit", commit)
    with pytest.warns(RuntimeWarning, match="token 5,"):
        record = statescope.trace(model, text, segment=16, backend="chunked", store=place)
    assert record.attrs["first_nonfinite"]["token"] == 5


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


DAMAGE: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    ("newer", lambda p: change_root(p, schema_version=99), ("schema_version 99", "upgrade")),
    ("version as text", lambda p: change_root(p, schema_version="1"), ("schema_version",)),
    ("no version", lambda p: change_root(p, schema_version=...), ("no record", "schema_version is missing")),
    ("no watch", lambda p: change_root(p, watch=...), ("lacks the root attributes watch", "damaged")),
    ("no root", lambda p: (p / "zarr.json").unlink(), ("no Zarr group",)),
    ("half a root", lambda p: (p / "zarr.json").write_text('{"zarr'), ("no Zarr group",)),
    ("no group", lambda p: shutil.rmtree(p / "steps"), ("lacks steps/", "damaged", "again")),
    ("no group to watch", lambda p: shutil.rmtree(p / "probes"), ("lacks probes/", "damaged", "again")),
    ("group unnamed", lambda p: (p / "steps/zarr.json").unlink(), ("lacks steps/", "damaged", "again")),
    ("no array", lambda p: shutil.rmtree(p / "steps/state_norm"), ("lacks steps/state_norm", "again")),
    ("array unnamed", lambda p: (p / "steps/state_norm/zarr.json").unlink(), ("lacks steps/state_norm",)),
    (
        "half an array",
        lambda p: (p / "steps/state_norm/zarr.json").write_text("{"),
        ("lacks steps/state_norm",),
    ),
    ("no maximum", lambda p: shutil.rmtree(p / "steps/state_norm_max"), ("lacks steps/state_norm_max",)),
    ("no coordinate", lambda p: (p / "steps/token/zarr.json").unlink(), ("lacks steps/token", "damaged")),
    ("no snapshot", lambda p: shutil.rmtree(p / "snapshots/state"), ("lacks snapshots/state", "damaged")),
]


@pytest.mark.parametrize(("damage", "words"), [c[1:] for c in DAMAGE], ids=[c[0] for c in DAMAGE])
def test_damaged_record(
    damage: Callable[[Path], Any], words: tuple[str, ...], finished: Path, tmp_path: Path
) -> None:
    """A record that lacks something says what, and is not changed by the attempt."""
    place = tmp_path / "run.zarr"
    shutil.copytree(finished, place)
    damage(place)
    before = listing(tmp_path)
    refused(lambda: statescope.open(place), ValueError, f"store='{place}'", *words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder", "group", "array", "format 2"])
def test_open_foreign(kind: str, finished: Path, tmp_path: Path) -> None:
    """What is no record does not open as one."""
    place = tmp_path / "run.zarr"
    occupied(kind, place, finished)
    before = listing(tmp_path)
    refused(lambda: statescope.open(place), ValueError, f"store='{place}'", "no record")
    assert listing(tmp_path) == before


def test_open_nothing(tmp_path: Path) -> None:
    """A path that does not exist is named, and not made."""
    place = tmp_path / "nothing.zarr"
    refused(lambda: statescope.open(place), FileNotFoundError, f"store='{place}'", "does not exist")
    assert not place.exists()
