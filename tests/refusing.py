"""What the tests of refusals share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from tiny import ids

TEXT = ids(20)


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
