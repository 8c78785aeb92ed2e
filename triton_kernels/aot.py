# SPDX-License-Identifier: Apache-2.0
"""Compile kernels without a GPU, exactly as their launchers would: python -m discquant.triton_kernels.aot.

The launchers run on meta tensors while `JITFunction.run` only records; each recorded launch is then compiled for every
target, and registers, spills, shared memory, tensor-core instructions and (of elementwise kernels) instructions per
element are read from the machine code. Results are kept by content hash (source of the kernel and of all it calls,
types, constants, options, Triton, target, what is read), which also stands in the report: `--known` takes rows from an
earlier report whose hash is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import sass

# Shared memory one block may use, bytes.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.uint16: "u16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
# Kernels without a loop whose instructions are counted per element.
ELEMENTWISE = ("soft_weight", "anchor_codes")
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")
# What `compile_launch` reads.
FACTS = (
    "registers", "spill_bytes", "shared_bytes", "tensor_core", "ptx_lines", "instructions_per_element",
    "slow_per_element",
)  # fmt: skip
FIELDS = ("case", "kernel", "target", "default", *FACTS, "triton", "digest")


class Launch(NamedTuple):
    """One recorded launch: types of the arguments, constants, known divisibility, options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    def digest(self, capability: int) -> str:
        """Content hash of everything that decides the machine code."""
        constants = sorted((name, str(value)) for name, value in self.constants.items())
        parts = (self.kernel.cache_key, sorted(self.signature.items()), constants, sorted(self.attributes.items()),
                 sorted(self.options.items()), capability, triton.__version__, FACTS)  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = kernel.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, torch.Tensor):
            kind = f"*{TYPES[value.dtype]}"
            # PyTorch aligns allocations; a slice that does not is another specialisation of the same code.
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            kind = "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
    return Launch(kernel, signature, constants, attributes, options)


@contextlib.contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Within the block, kernels append to `launches` instead of running."""
    if not isinstance(JITFunction, type) or triton.knobs.runtime.interpret:
        raise RuntimeError("aot: TRITON_INTERPRET must be unset, the interpreter compiles nothing")
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_describe(self, args, kwargs))

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def record(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """Launches that `launcher(*args, **kwargs)` makes; tensors may be on the meta device."""
    launches: list[Launch] = []
    with recording(launches):
        launcher(*args, **kwargs)
    return launches


def compile_launch(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile for sm_<capability>; return what the machine code uses."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    spilled = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    local = max(int(n) for n in re.findall(r"LOCAL:(\d+)", usage))
    kinds = [kind for kind in ("wgmma.mma_async", "mma.sync") if kind in ptx]
    shape = {name: int(launch.constants.get(name, 1)) for name in ("BLOCK_M", "BLOCK_K", "TILES")}
    count = slow = ""
    if "TILES" in launch.constants or any(name in launch.kernel.__name__ for name in ELEMENTWISE):
        # Elementwise: a program walks TILES blocks, or one.
        elements = shape["BLOCK_M"] * shape["BLOCK_K"] // (32 * int(launch.options.get("num_warps", 4)))
        count, slow = (
            f"{n:.1f}"
            for n in sass.per_element(sass.disassemble(compiled.asm["cubin"]), elements, shape["TILES"])
        )
    return {
        "registers": registers,
        "spill_bytes": spilled + local,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": kinds[0].split(".")[0] if kinds else "",
        "ptx_lines": ptx.count("\n"),
        "instructions_per_element": count,
        "slow_per_element": slow,
    }


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Facts of a report's rows by their hash, numbers as numbers."""
    with path.open(newline="") as file:
        return {
            row["digest"]: {name: int(row[name]) if row[name].isdigit() else row[name] for name in FACTS}
            for row in csv.DictReader(file)
        }


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    """What says something of the machine code: lines of PTX name files, by where the checkout lies."""
    return {name: value for name, value in facts.items() if name != "ptx_lines"}


def report(
    cache: Path,
    targets: list[int],
    everything: bool,
    only: str = "",
    known: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Compile the cases (the default ones, or all) that are not in the cache; one row per case and target.

    Facts of `known` by hash stand for a compilation, but for each kernel's first one on a target, which must agree.
    """
    from .aot_cases import cases

    cache.mkdir(parents=True, exist_ok=True)
    known, tried = known or {}, set()
    rows = []
    for case in cases():
        if not (case.default or everything) or only not in case.name:
            continue
        launches = {launch.digest(0): launch for launch in record(case.launcher, *case.arguments)}
        for launch in launches.values():
            for capability in targets:
                if case.targets and capability not in case.targets:
                    continue
                digest = launch.digest(capability)
                entry = cache / f"{digest}.json"
                first = (launch.kernel.__name__, capability) not in tried
                tried.add((launch.kernel.__name__, capability))
                if digest in known and not first:
                    facts = known[digest]
                elif entry.exists():
                    facts = json.loads(entry.read_text())
                else:
                    facts = compile_launch(launch, capability)
                    partial = entry.with_suffix(f".{id(entry)}.tmp")
                    partial.write_text(json.dumps(facts))
                    partial.replace(entry)
                if _machine(facts) != _machine(known.get(digest, facts)):
                    raise RuntimeError(
                        f"aot: {case.name} sm_{capability} is {facts}, and {known[digest]} in the report"
                    )
                rows.append({
                    "case": case.name, "kernel": launch.kernel.__name__.strip("_"), "target": f"sm_{capability}",
                    "default": int(case.default), **facts, "triton": triton.__version__, "digest": digest,
                })  # fmt: skip
    return rows


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What fails the check: a default configuration that spills, or any that needs more shared memory than there is."""
    found = []
    for row in rows:
        limit = SHARED_LIMIT[int(row["target"][3:])]
        if row["shared_bytes"] > limit:
            found.append(
                f"{row['case']} {row['target']}: {row['shared_bytes']} B shared memory, limit {limit}"
            )
        if row["default"] and row["spill_bytes"]:
            found.append(f"{row['case']} {row['target']}: {row['spill_bytes']} B spilled")
    return found


def main() -> int:
    """Command line; the exit status is 1 if a check fails."""
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels without a GPU and report what they use."
    )
    parser.add_argument("--cache", type=Path, default=Path("build/aot"), help="where results are kept")
    parser.add_argument("--targets", default="80,90", help="compute capabilities, comma separated")
    parser.add_argument("--all", action="store_true", help="every configuration, not only the default ones")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument(
        "--known", type=Path, help="an earlier report: what has not changed since is not compiled again"
    )
    options = parser.parse_args()
    known = read_report(options.known) if options.known else None
    rows = report(
        options.cache, [int(t) for t in options.targets.split(",")], options.all, options.only, known
    )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        print(
            f"{row['case']:44} {row['target']} registers {row['registers']:3} spill {row['spill_bytes']:4} "
            f"shared {row['shared_bytes']:6} {row['tensor_core']} {row['instructions_per_element']}"
        )
    found = problems(rows)
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
