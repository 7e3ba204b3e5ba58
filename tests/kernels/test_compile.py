"""What the fused kernels use, compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs, skip

needs("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")

BOUNDS = {
    # kernel, inputs, target: registers of a thread, bytes of shared memory, bytes spilled by a thread
    "read bf16 sm_90": (255, 113_000, 256),  # two programs share a multiprocessor: 227 KiB, 64 Ki registers
    "write bf16 sm_90": (168, 76_500, 64),  # three
    "read fp32 sm_90": (255, 34_000, 1600),
    "write fp32 sm_90": (168, 34_000, 0),
    **{f"pace gated delta {target}": (64, 0, 0) for target in ("sm_80", "sm_90", "gfx942")},
    "prepare gated delta sm_90": (160, 51_500, 0),  # three
    "invert gated delta sm_90": (96, 16_500, 0),  # five
    "careful invert gated delta sm_90": (128, 16_500, 0),
    "walk gated delta sm_90": (232, 124_500, 0),  # one
    "careful walk gated delta sm_90": (255, 124_500, 128),
    "read gated delta sm_90": (255, 98_500, 0),
    "careful read gated delta sm_90": (255, 98_500, 640),
    "measure gated delta sm_90": (72, 0, 0),
    "prepare RetNet sm_90": (176, 51_500, 0),
    "walk RetNet sm_90": (160, 58_000, 0),
    "read RetNet sm_90": (255, 98_500, 0),
    "measure RetNet sm_90": (80, 0, 0),
    "relate KDA sm_90": (255, 49_500, 96),
    "relate wide KDA sm_90": (255, 49_500, 208),
    "solve KDA sm_90": (168, 74_000, 48),
    "walk KDA sm_90": (168, 230_500, 0),
    "read KDA sm_90": (168, 49_500, 0),
    "measure KDA sm_90": (255, 74_000, 384),
    "measure wide KDA sm_90": (255, 74_500, 720),
    "tally KDA sm_90": (64, 0, 0),
    "relate_parts KDA sm_90": (255, 27_000, 80),
    "measure_parts KDA sm_90": (255, 10_500, 96),
    "relate RWKV-7 sm_90": (255, 49_500, 1136),
    "relate wide RWKV-7 sm_90": (255, 49_500, 1440),
    "solve RWKV-7 sm_90": (168, 25_000, 16),
    "walk RWKV-7 sm_90": (96, 166_500, 0),
    "read RWKV-7 sm_90": (255, 16_500, 0),
    "measure RWKV-7 sm_90": (255, 57_500, 800),
    "measure wide RWKV-7 sm_90": (255, 74_000, 1088),
    "tally RWKV-7 sm_90": (112, 0, 0),
    "relate_parts RWKV-7 sm_90": (255, 28_000, 64),
    "measure_parts RWKV-7 sm_90": (255, 16_500, 560),
    "read bf16 sm_80": (255, 48_000, 64),
    "write bf16 sm_80": (168, 48_000, 0),
    "read fp32 sm_80": (255, 34_000, 1600),
    "write fp32 sm_80": (168, 34_000, 0),
    "prepare gated delta sm_80": (128, 4_500, 0),
    "invert gated delta sm_80": (80, 8_500, 0),
    "walk gated delta sm_80": (184, 16_500, 0),
    "read gated delta sm_80": (112, 4_500, 0),
    "measure gated delta sm_80": (96, 0, 0),
    "relate KDA sm_80": (232, 8_500, 0),
    "relate wide KDA sm_80": (255, 8_500, 0),
    "solve KDA sm_80": (112, 8_500, 0),
    "walk KDA sm_80": (200, 27_000, 0),
    "read KDA sm_80": (56, 4_500, 0),
    "measure KDA sm_80": (128, 6_500, 0),
    "measure wide KDA sm_80": (168, 6_500, 0),
    "tally KDA sm_80": (64, 0, 0),
    "relate_parts KDA sm_80": (255, 6_500, 0),
    "measure_parts KDA sm_80": (255, 3_500, 0),
    "relate RWKV-7 sm_80": (232, 5_500, 0),
    "relate wide RWKV-7 sm_80": (255, 5_500, 0),
    "solve RWKV-7 sm_80": (48, 4_500, 0),
    "walk RWKV-7 sm_80": (128, 9_500, 0),
    "read RWKV-7 sm_80": (48, 3_500, 0),
    "measure RWKV-7 sm_80": (240, 4_500, 0),
    "measure wide RWKV-7 sm_80": (240, 4_500, 0),
    "tally RWKV-7 sm_80": (120, 0, 0),
    "relate_parts RWKV-7 sm_80": (240, 4_500, 0),
    "measure_parts RWKV-7 sm_80": (255, 2_500, 16),
    "read bf16 gfx942": (256, 34_000, 1024),
    "write bf16 gfx942": (128, 34_000, 0),
    "read fp32 gfx942": (512, 34_000, 64),
    "write fp32 gfx942": (128, 34_000, 0),
    "prepare gated delta gfx942": (144, 2_500, 0),
    "invert gated delta gfx942": (160, 4_500, 0),
    "walk gated delta gfx942": (168, 8_500, 0),
    "read gated delta gfx942": (112, 4_500, 0),
    "measure gated delta gfx942": (80, 0, 0),
    "relate KDA gfx942": (168, 4_500, 0),
    "relate wide KDA gfx942": (184, 4_500, 0),
    "solve KDA gfx942": (168, 4_500, 0),
    "walk KDA gfx942": (152, 8_500, 0),
    "read KDA gfx942": (80, 4_500, 0),
    "measure KDA gfx942": (208, 4_500, 0),
    "measure wide KDA gfx942": (256, 4_500, 0),
    "tally KDA gfx942": (40, 0, 0),
    "relate_parts KDA gfx942": (208, 4_500, 0),
    "measure_parts KDA gfx942": (184, 4_500, 0),
    "relate RWKV-7 gfx942": (136, 2_500, 0),
    "relate wide RWKV-7 gfx942": (144, 2_500, 0),
    "solve RWKV-7 gfx942": (144, 2_500, 0),
    "walk RWKV-7 gfx942": (104, 2_500, 0),
    "read RWKV-7 gfx942": (56, 2_500, 0),
    "measure RWKV-7 gfx942": (224, 2_500, 0),
    "measure wide RWKV-7 gfx942": (248, 2_500, 0),
    "tally RWKV-7 gfx942": (64, 0, 0),
    "relate_parts RWKV-7 gfx942": (168, 2_500, 0),
    "measure_parts RWKV-7 gfx942": (224, 3_500, 0),
    "enter Mamba-1 sm_90": (96, 640, 0),  # 21 warps on a multiprocessor
    "read Mamba-1 sm_90": (96, 640, 0),
    "read entries sm_90": (96, 1_100, 0),
    "enter Mamba-1 sm_80": (96, 2176, 0),
    "read Mamba-1 sm_80": (96, 640, 0),
    "read entries sm_80": (104, 2_176, 0),
    "enter Mamba-1 gfx942": (96, 640, 0),
    "read Mamba-1 gfx942": (96, 640, 0),
    "read entries gfx942": (96, 2176, 0),
    **{f"thin {target}": (160, 4096, 0) for target in ("sm_80", "sm_90", "gfx942")},
    **{f"loss {target}": (96, 64, 0) for target in ("sm_80", "sm_90", "gfx942")},
}
"""A change that breaks one of these costs occupancy or sends the state through memory."""


@pytest.fixture(scope="module")
def used() -> dict[str, dict[str, int]]:
    targets = sorted({name.split()[-1] for name in BOUNDS})
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *targets], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0 and any(word in done.stderr for word in ("ptxas", "target", "backend")):
        skip(f"this triton does not compile for {targets}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", BOUNDS)
def test_fits(name: str, used: dict[str, dict[str, int]]) -> None:
    registers, shared, spilled = BOUNDS[name]
    got = used[name]
    assert got["registers"] <= registers
    assert got["shared"] <= shared
    assert got["spilled"] <= spilled


WALKED = [n for n in BOUNDS if re.search("(delta|KDA|RWKV-7|RetNet) sm_90", n)]


@pytest.mark.parametrize("name", WALKED)
def test_no_operand_is_known_in_part(name: str, used: dict[str, dict[str, int]]) -> None:
    """What ptxas knows of a first operand that lies in registers it may get wrong, as H200s have shown."""
    assert used[name]["known"] == 0


@pytest.mark.parametrize("name", WALKED)
def test_no_product_is_as_narrow_as_ptxas_gets_wrong(name: str, used: dict[str, dict[str, int]]) -> None:
    """Of 32 columns, the first operand in registers: wrong by ptxas 12.8, right by 13.0."""
    assert used[name]["narrow"] == 0


@pytest.mark.parametrize("name", WALKED)
def test_no_tile_is_overwritten_while_it_is_read(name: str, used: dict[str, dict[str, int]]) -> None:
    """Triton 3.6 gives a tile that both products and registers read a buffer too few, as H200s have shown."""
    assert used[name]["twice"] == 0


ANEW = """
import importlib
from triton.runtime.jit import JITFunction
from statescope.kernels import fused_entries_kernels, fused_kernels, fused_tiles, window_kernels
lengths = dict.fromkeys((fused_entries_kernels, fused_kernels, window_kernels), fused_kernels.LENGTHS)
for name in ("alike", "hard", "keyed", "pairs"):
    lengths[importlib.import_module(f"statescope.kernels.fused_{name}_kernels")] = fused_tiles.SIZES
kernels = [(k, names) for m, names in lengths.items() for k in vars(m).values() if isinstance(k, JITFunction)]
kernels = [(k, names) for k, names in kernels if not k.__name__.startswith("_")]
print(len(kernels), *(
    f"{k.__name__}:{p.name}" for k, names in kernels for p in k.params
    if p.name in names and not p.do_not_specialize
))
"""


def test_texts_of_all_lengths_share_their_kernels() -> None:
    """A hundred texts of different lengths would else wait for dozens of variants to be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", ANEW], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["31"], done.stdout + done.stderr
