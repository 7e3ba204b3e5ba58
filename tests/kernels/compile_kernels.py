"""Compile the fused kernels ahead of time, without a GPU, and print what they use as JSON.

Run on its own, because the interpreter that the other tests switch on cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from statescope.kernels import (
    fused,
    fused_alike,
    fused_alike_kernels,
    fused_entries,
    fused_entries_kernels,
    fused_hard_kernels,
    fused_kernels,
    fused_keyed,
    fused_keyed_kernels,
    fused_pairs,
    fused_pairs_kernels,
    loss_kernels,
    window_kernels,
)
from statescope.recurrence import Recurrence

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INTEGERS = {
    "TIME": "i32",
    "PADDED": "i32",
    "CHUNKS": "i32",
    "LENGTH": "i32",
    "SPANS": "i32",
    "BATCH": "i32",
    "ROWS": "i32",
}
MADE = ("remaining", "through", "asked", "states", "seen")
"""Buffers in the inputs' dtype."""

OF_ALIKE = ("inverse", "met", "seen", "states", "u", "values")
"""The same, of the kernels of heads whose keys all decay alike."""

KEYED = {"KDA": {"KEY": 128, "VALUE": 128, "DELTA": True, "HAS_SCALE": True},
         "RWKV-7": {"KEY": 64, "VALUE": 64, "BEFORE": True, "HAS_SCALE": False}}  # fmt: skip
"""With erase terms: decay per key alone is less of KDA."""

ALIKE = {"gated delta": {"KEY": 128, "VALUE": 128, "ERASES": True},
         "RetNet": {"KEY": 256, "VALUE": 512, "ERASES": False}}  # fmt: skip

HEADS = {"HEADS": 80, "GROUPS": 1, "KEY": 128, "VALUE": 64}


SHAPE = Recurrence(*(torch.empty(1, 1, 1, HEADS[n], device="meta") for n in ("KEY", "KEY", "VALUE")),
                   torch.empty(1, 1, 1, device="meta"))  # fmt: skip


def source(
    kernel: Any, tiling: fused.Tiling, dtype: str, bulk: bool, made: tuple[str, ...] = (), **constants: Any
) -> ASTSource:
    """Describe a kernel for 80 heads of 128 keys and 64 values, every pointer aligned."""
    shapes = {"q": tiling.keys, "k": tiling.keys, "v": tiling.values, "y": tiling.values}
    constants = {"L": tiling.chunk, "BK": tiling.keys, "BV": tiling.values} | HEADS | constants
    constants |= {"BF16": dtype == "bf16", "BULK": bulk}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in shapes and bulk:
            signature[argument] = f"tensordesc<{dtype}[{tiling.chunk}, {shapes[argument]}]>"
        elif argument in INTEGERS or re.fullmatch("(found|[qkuvabgwy])_[fbtghkv]", argument):
            signature[argument] = "i32"
            if argument not in INTEGERS or argument == "PADDED":
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            kinds = dict.fromkeys(("spoiled", "hard", "listed", "slots"), "*i32") | {"ends": "*i64"}
            kinds |= dict.fromkeys((*shapes, *made), f"*{dtype}")
            signature[argument] = kinds.get(argument, "*fp32")
            attributes[i,] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def small(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Iterator[ASTSource]:
    """Describe a kernel for numbers at large, and for ones, which triton makes constants."""
    for ones in ({}, {name: 1 for name, kind in types.items() if kind == "i32"}):
        fixed = constants | ones
        signature = {n: "constexpr" if n in fixed else types[n] for n in kernel.arg_names}
        yield ASTSource(fn=kernel, signature=signature, constexprs=fixed)


def usage(compiled: Any, backend: str) -> dict[str, int]:
    """Read registers, bytes of shared memory and spills off the compiled kernel."""
    if backend == "hip":
        numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_\w+):\s+(\d+)", compiled.asm["amdgcn"])}
        spilled = 4 * numbers["vgpr_spill_count"]
        return {"registers": numbers["vgpr_count"], "shared": compiled.metadata.shared, "spilled": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    found = {"registers": int(registers), "shared": compiled.metadata.shared, "spilled": int(stack)}
    ptx = compiled.asm["ptx"]
    traps = {"known": known_operands(ptx), "narrow": narrow_operands(ptx)}
    return found | traps | {"twice": read_twice(compiled.asm["ttgir"])}


def known_operands(ptx: str) -> int:
    """Count the products whose first operand, in registers, is a constant in part."""
    moved = dict(re.findall(r"mov\.[bu]32\s+(%r\d+), (-?\d+|%r\d+);", ptx))

    def constant(register: str) -> bool:
        while register in moved:
            register = moved[register]
        return not register.startswith("%")

    operands = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, \{([^}]*)\}", ptx)
    shares = [sum(constant(r.strip()) for r in o.split(",")) for o in operands]
    return sum(0 < share < 4 for share in shares)


def narrow_operands(ptx: str) -> int:
    """Count the products of 32 columns whose first operand lies in registers."""
    return len(re.findall(r"wgmma\.mma_async\S*m64n32k\S* \{[^}]*\}, \{", ptx))


def read_twice(ttgir: str) -> int:
    """Count the pipelined tiles that registers read too, where products that read them may be pending."""
    text = re.sub(r" loc\(.*", "", ttgir)
    views = dict(re.findall(r"(%\w+) = ttg.memdesc_(?:index|trans) (%\w+)", text))

    def tiles(found: list[str]) -> set[str]:
        while any(x in views for x in found):
            found = [views.get(x, x) for x in found]
        return set(found)

    copied = tiles(re.findall(r"ttg.async_copy_global_to_local %\w+, (%\w+)", text))
    loaded = tiles(re.findall(r"ttg.local_load (%\w+)", text))
    operands = re.findall(r"warp_group_dot (%\w+), (%\w+), .*isAsync = true", text)
    pending = re.search(r"pendings = [1-9]", text)
    return len(copied & loaded & tiles([x for pair in operands for x in pair])) if pending else 0


def keyed(structure: str, target: str, backend: str, where: GPUTarget) -> dict[str, dict[str, int]]:
    """Compile the kernels of a structure whose keys decay each at its own rate, with bfloat16 values."""
    sizes = KEYED[structure]
    q, v = (torch.empty(1, 1, 1, sizes[n], dtype=torch.bfloat16, device="meta") for n in ("KEY", "VALUE"))
    a = SHAPE.log_decay if "DELTA" in sizes else q
    host, kernels = (
        (fused_keyed, fused_keyed_kernels) if "DELTA" in sizes else (fused_pairs, fused_pairs_kernels)
    )
    r = Recurrence(q, q, v, q.float(), a=a, b=None if "DELTA" in sizes else q)
    cut = host.tiling(r, True, target == "sm_90")
    asked = {name: True for name in ("OUTPUTS", "HAS_SKIP", "HAS_INITIAL", "STORE", "MEASURE", "SPLIT")}
    asked |= {"KEEP": False, "PRECISION": "ieee", "ERASES": True, "BEFORE": False, "KEY_GROUPS": 1}
    asked |= sizes | {"BLOCKS": -(-sizes["VALUE"] // cut.walked), "AHEAD": fused_pairs.AHEAD}
    usual = {"num_warps": cut.warps, "num_stages": cut.stages}
    walked = {"BK": cut.walked_keys, "BV": cut.walked, "STAGES": cut.walk_stages}
    measured = {"BS": cut.measured, "BV": cut.measured_columns}
    solving = {} if target != "sm_90" else {"maxnreg": cut.solve_registers}
    solved = {"PART": min(fused_keyed.SOLVED, cut.chunk), "BS": cut.solved, "BV": cut.solved}
    parts = {"PART": fused_keyed.PART, "BS": cut.part, "BV": cut.part}
    few = {"num_warps": cut.part_warps, "num_stages": cut.part_stages}
    launches = [
        ("relate", {"BS": cut.related, "WIDE": False}, usual),
        ("relate wide", {"BS": cut.related, "WIDE": True}, usual),
        ("solve", solved, usual | solving),
        ("walk", walked, {"num_warps": cut.warps}),
        ("read", {"BS": cut.read_keys, "BV": cut.read_columns}, usual),
        ("measure", measured | {"WIDE": False}, usual | {"num_stages": cut.measure_stages}),
        ("measure wide", measured | {"WIDE": True}, usual | {"num_stages": cut.measure_stages}),
        ("tally", {"BK": cut.keys}, {"num_warps": 1}),
        ("relate_parts", parts, few),
        ("measure_parts", parts, few),
    ]
    found = {}
    for label, more, options in launches:
        name = label.split()[0]
        kernel = getattr(kernels, name, None) or getattr(fused_hard_kernels, name)
        tiling = fused.Tiling(cut.chunk, cut.keys, 64)
        described = source(kernel, tiling, "bf16", False, MADE, **asked | more)
        compiled = triton.compile(described, target=where, options=options)
        found[f"{label} {structure} {target}"] = usage(compiled, backend)
    return found


def alike(structure: str, target: str, backend: str, where: GPUTarget) -> dict[str, dict[str, int]]:
    """Compile the kernels of heads whose keys all decay alike, with bfloat16 values."""
    sizes = ALIKE[structure]
    q, v = (torch.empty(1, 1, 1, sizes[n], dtype=torch.bfloat16, device="meta") for n in ("KEY", "VALUE"))
    a = SHAPE.log_decay if sizes["ERASES"] else None
    cut = fused_alike.tiling(Recurrence(q, q, v, SHAPE.log_decay, a=a), True, target == "sm_90")
    blocks, pieces = -(-sizes["VALUE"] // cut.walked), -(-sizes["VALUE"] // cut.columns)
    asked = {name: True for name in ("OUTPUTS", "HAS_SKIP", "HAS_SCALE", "STORE", "MEASURE", "SPLIT")}
    asked |= {"KEEP": False, "HAS_INITIAL": True, "PRECISION": "ieee" if backend == "hip" else "tf32x3"}
    asked |= sizes | {"BE": fused_alike.ENTRIES, "BLOCKS": blocks, "PIECES": pieces}
    asked |= {"SUMS": blocks, "STEP": 4} if sizes["ERASES"] else {"SUMS": pieces, "STEP": 1}
    walked = {"BK": cut.walked_keys, "BV": cut.walked, "STAGES": cut.walk_stages}
    reads = {"BS": cut.read_slice, "BV": cut.columns}
    inverts = {"BS": cut.slice, "PART": fused_alike.PART}
    launches = [
        ("pace", {}, {"num_warps": 1}),
        ("prepare", {"BS": cut.slice}, {"num_warps": cut.warps, "num_stages": cut.stages}),
        ("invert", inverts, {"num_warps": cut.warps, "num_stages": 1} | fused_alike.ALIKE),
        ("walk", walked, {"num_warps": cut.walk_warps} | fused_alike.ALIKE),
        ("read", reads, {"num_warps": cut.read_warps, "num_stages": cut.read_stages} | fused_alike.ALIKE),
        ("measure", {}, {"num_warps": 1}),
    ]
    found = {}
    for name, more, options in launches:
        if name == "invert" and not sizes["ERASES"]:
            continue
        kernel = getattr(fused_alike_kernels, name)
        again = target == "sm_90" and name in ("invert", "walk", "read") and sizes["ERASES"]
        for careful in (False, True) if again else (False,):
            tiling = fused.Tiling(cut.chunk, cut.slice, cut.columns)
            constants = asked | more | {"CAREFUL": careful}
            described = source(kernel, tiling, "bf16", False, OF_ALIKE, **constants)
            compiled = triton.compile(described, target=where, options=options)
            found[f"{'careful ' * careful}{name} {structure} {target}"] = usage(compiled, backend)
    return found


def entries(target: str, backend: str, where: GPUTarget) -> dict[str, dict[str, int]]:
    """Compile the walks where entries decay: a Mamba-1 of 5120 channels, float32 as its values are."""
    shape = {"HEADS": 80, "GROUPS": 1, "KEY": 16, "VALUE": 64}
    tiling = fused.Tiling(fused_entries.LENGTH, 16, min(64, fused_entries.ENTRIES // 16))
    asked = {"CUT": False, "HAS_SCALE": False, "HAS_SKIP": False}
    found = {}
    for label, rated, first in (("enter Mamba-1", True, True), ("read Mamba-1", True, False),
                                ("read entries", False, False)):  # fmt: skip
        kind = {"RATED": rated, "FRESH": first, "OUTPUTS": not first, "MEASURE": not first}
        described = source(fused_entries_kernels.walk, tiling, "fp32", False, **shape, **asked, **kind)
        compiled = triton.compile(described, target=where, options={"num_warps": 1})
        found[f"{label} {target}"] = usage(compiled, backend)
    return found


def main() -> None:
    """Compile every kernel that walks, for every target asked for."""
    read = {"OUTPUTS": True, "MEASURE": True, "HAS_SKIP": True}
    write = {"CUT": False, "MEASURE": True}
    results = {}
    for target in sys.argv[1:]:
        backend, arch = ("hip", target) if target.startswith("gfx") else ("cuda", int(target[3:]))
        where = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        for dtype in ("bf16", "fp32"):
            tiling = fused._tiling(HEADS["KEY"], HEADS["VALUE"], dtype == "bf16", target == "sm_90")
            bulk = dtype == "bf16" and target == "sm_90"
            common = {"PRECISION": "ieee" if backend == "hip" else "tf32x3"}
            for label, constants, stages, options in (
                ("read", read, tiling.read_stages, {"num_warps": tiling.read_warps}),
                ("write", write, tiling.write_stages, {"num_warps": tiling.write_warps}),
            ):
                if label == "write" and bulk:
                    options["maxnreg"] = tiling.write_registers
                kernel = getattr(fused_kernels, f"{label}_spans")
                described = source(kernel, tiling, dtype, bulk, **common, **constants, STAGES=stages)
                compiled = triton.compile(described, target=where, options=options)
                results[f"{label} {dtype} {target}"] = usage(compiled, backend)
        for structure in KEYED:
            results |= keyed(structure, target, backend, where)
        for structure in ALIKE:
            if structure == "gated delta" or target == "sm_90":  # elsewhere another scan has the other
                results |= alike(structure, target, backend, where)
        results |= entries(target, backend, where)
        thin = {"steps": "*fp32", "out": "*fp32", "TIME": "i32", "HEADS": "i32", "WINDOW": "i32"}
        loss = {"logits": "*bf16", "stride": "i32", "targets": "*i64", "loss": "*fp32", "VOCABULARY": "i32"}
        for label, warps, described in (
            ("thin", 4, small(window_kernels.thin_windows, thin, {"ROWS": 64, "COLUMNS": 32})),
            ("loss", 8, small(loss_kernels.cross_entropy_rows, loss, {"BLOCK": 4096})),
        ):
            compiled = [triton.compile(d, target=where, options={"num_warps": warps}) for d in described]
            found = [usage(c, backend) for c in compiled]
            results[f"{label} {target}"] = {k: max(f[k] for f in found) for k in found[0]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
