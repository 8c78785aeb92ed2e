# SPDX-License-Identifier: Apache-2.0
"""Native code outside Python: sanitizers on the CPU side, nvcc for every architecture on the GPU side.

Products are kept under build/ by content, so that only a change of the sources compiles again.
"""

from __future__ import annotations

import collections
import fcntl
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FAMILIES = (["80", "86", "89"], ["90a"])  # one translation to PTX each
ARCHS = [arch for family in FAMILIES for arch in family]
NVCC = shutil.which("nvcc")
Compile = Callable[[str, str], tuple[Path, str]]
NEEDS_NVCC = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: CUDA sources are not compiled")


def run_checks(repo_root: Path, target: str) -> None:
    """Build and run a target of csrc/packed/Makefile."""
    command = ["make", "-C", "csrc/packed", target]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\nok\n" in done.stdout


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the sanitizer target is for x86-64"
)
@pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("c++")), reason="make or a C++ compiler is missing"
)
@pytest.mark.slow
def test_sanitizers(repo_root: Path) -> None:
    """Index maps, magic numbers and every CPU kernel, under ASan and UBSan."""
    run_checks(repo_root, "sanitize")


@pytest.fixture
def compiled(repo_root: Path, build_script: ModuleType) -> Compile:
    """Compiles a file for the family of an architecture, or takes the kept result; the file, and what ptxas said."""

    def compile(source: str, arch: str) -> tuple[Path, str]:
        assert NVCC is not None
        family = next(family for family in FAMILIES if arch in family)
        flags = [
            "-O3", "-std=c++17", "--expt-relaxed-constexpr", *build_script.gencode(family).split(), "-Xptxas", "-v",
            "-fatbin",
        ]  # fmt: skip
        digest = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
        digest.update(" ".join(flags).encode())
        folder = repo_root / "csrc/packed"
        for path in [*sorted(folder.glob("*.h")), *sorted(folder.glob("*.cuh")), repo_root / source]:
            digest.update(path.read_bytes())
        kept = repo_root / "build" / "nvcc"
        kept.mkdir(parents=True, exist_ok=True)
        name = f"{Path(source).stem}_{'_'.join(family)}"
        out = kept / f"{name}_{digest.hexdigest()[:16]}.fatbin"
        log = out.with_suffix(".log")
        with (kept / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests of other processes want it, too
            if not log.exists():
                for old in kept.glob(f"{name}_*"):
                    old.unlink()
                command = [NVCC, *flags, f"-I{repo_root / 'csrc'}", source, "-o", str(out)]
                done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-4000:]
                log.write_text(done.stdout + done.stderr)
        # Warnings; then "Compiling entry function 'name' for 'sm_86'" and what is said of it.
        first, *parts = re.split(r"(?=Compiling entry function)", log.read_text())
        return out, first + "".join(part for part in parts if f"for 'sm_{arch}'" in part)

    return compile


@pytest.mark.skipif(
    platform.system() != "Linux" or not (shutil.which("make") and shutil.which("c++")),
    reason="the emulated GPU needs Linux, make and a C++ compiler",
)
@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["linear", "prefill"])
def test_kernels_on_an_emulated_gpu(repo_root: Path, kernels: str) -> None:
    """The GPU kernels themselves: float64 bounds, any order of blocks, exact-size buffers, ASan."""
    run_checks(repo_root, f"emulate-{kernels}")


@NEEDS_NVCC
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(compiled: Compile, arch: str) -> None:
    _, log = compiled("csrc/packed/gpu_linear.cu", arch)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    # two types x two widths x (up to 8 tokens or 16) x (exact or not) x (a group spans a unit or not)
    assert len(registers) == 32
    assert not any(spills)
    assert not any(int(n) for n in re.findall(r"(\d+) bytes stack frame", log))  # the ring lies in registers
    assert max(registers) <= 65536 // 512
    _, log = compiled("csrc/packed/gpu_pack.cu", arch)
    assert len(re.findall(r"Used \d+ registers", log)) == 9  # pack, unpack, repack; three types x two widths
    assert not any(int(n) for n in re.findall(r"(\d+) bytes spill", log))


@NEEDS_NVCC
@pytest.mark.slow
def test_launchers_compile_against_any_torch(repo_root: Path) -> None:
    """The CUDA registrations need the stable ABI's headers only: a CPU build of torch has them."""
    from torch.utils.cpp_extension import include_paths

    assert NVCC is not None
    toolkit = Path(NVCC).resolve().parent.parent / "include"
    source = repo_root / "csrc/packed/register_cuda.cpp"
    folders = [*include_paths("cpu"), str(toolkit)]
    command = [
        shutil.which("c++") or "c++", "-fsyntax-only", "-std=c++17", "-Wall", "-Werror", "-DUSE_CUDA",
        "-DDISCQUANT_WITH_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{repo_root / 'csrc'}",
        *(part for folder in folders for part in ("-isystem", folder)), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def disassemble(path: Path, arch: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("cuobjdump comes with Triton, which is not installed")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-sass", "-arch", f"sm_{arch}", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@NEEDS_NVCC
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_operations_per_32_weights(compiled: Compile, arch: str) -> None:
    """What 32 weights cost in integer and half instructions: the counts of kernels.md section 1, and no more."""
    sass = disassemble(compiled("tests/packed/dequant_count.cu", arch)[0], arch)
    counts: dict[str, int] = {}
    for part in sass.split("Function : ")[1:]:
        operations = re.findall(r"^\s*/\*[0-9a-f]{4}\*/\s+(?:@!?P\d\s+)?([A-Z0-9]+)", part, re.MULTILINE)
        kinds = collections.Counter(operations)
        assert not kinds["I2F"] and not kinds["I2FP"]
        # Before sm_90 ptxas builds the pair of bfloat16 ones by PRMT, several times over: constants, not per weight.
        assert kinds["PRMT"] <= (0 if arch == "90a" else 11)
        counts[part.split()[0]] = sum(kinds[name] for name in ("LOP3", "SHF", "HADD2", "HFMA2", "HMUL2"))
    assert counts == {"half_4": 36, "half_3": 41, "bfloat_4": 44, "bfloat_3": 41}


@NEEDS_NVCC
@pytest.mark.slow
def test_tensor_core_loop(compiled: Compile) -> None:
    """The compiled kernel really uses mma, ldmatrix and asynchronous copies, and no atomics on data."""
    sass = disassemble(compiled("csrc/packed/gpu_linear.cu", "80")[0], "80")
    for name in ("HMMA.16816.F32", "LDSM.16", "LDGSTS"):
        assert name in sass, name
    assert not re.search(r"\bRED\.|ATOM[A-Z]*\.[A-Z.]*F(16|32)", sass)


@NEEDS_NVCC
@pytest.mark.slow
def test_prefill_pipeline(compiled: Compile) -> None:
    """The kernel for many tokens is the pipeline it is meant to be: ptxas neither spills nor serialises its wgmma."""
    path, log = compiled("csrc/packed/gpu_prefill.cu", "90a")
    # two types x two widths x 64 or 128 tokens x groups of 32, 64 or more
    assert len(re.findall(r"Used \d+ registers", log)) == 24
    assert not any(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", log))
    assert "serialized" not in log
    kernels = disassemble(path, "90a").split("Function : ")[1:]
    assert len(kernels) == 24
    for part in kernels:
        lines = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d\s+)?([\w.]+)([^;]*);", part)
        products = [i for i, (name, _) in enumerate(lines) if name.startswith("HGMMA.64x")]
        # Eight steps of two units, always the same two sets of sums, each step one group of which one may run on.
        assert len(products) == 16
        assert len({lines[i][1].split(",")[0] for i in products}) == 2
        assert sum("gsb0" in lines[i][1] for i in products) == 8
        waits = [operands.split(",")[1].strip() for name, operands in lines if name == "WARPGROUP.DEPBAR.LE"]
        assert sorted(waits) == ["0x0"] + 8 * ["0x1"]
        # Fragments are whole before the fence: nothing writes them between it and its products.
        fences = [i for i, (name, _) in enumerate(lines) if name == "WARPGROUP.ARRIVE"]
        assert len(fences) == 8
        for fence in fences:
            pair = [i for i in products if i > fence][:2]
            bases = [int(re.findall(r"R(\d+)", lines[i][1])[1]) for i in pair]
            fragments = {base + j for base in bases for j in range(4)}
            for name, operands in lines[fence : pair[1]]:
                target = re.match(r"\s*(?:P\w+,\s*)?R(\d+)", operands)
                assert name.startswith("HGMMA") or target is None or int(target[1]) not in fragments
        # A product of 64 tokens takes the tensor cores 32 clocks, of 128 tokens 64; the two warps of a scheduler
        # share them, so this many instructions a product keep well inside the time of one.
        assert (products[-1] - products[0]) / 15 <= 26, part.split()[0]


@NEEDS_NVCC
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "89"])
def test_prefill_without_warpgroups(compiled: Compile, arch: str) -> None:
    """Elsewhere it is a kernel of mma.m16n8k16, without spills; each fragment of activations is loaded once."""
    path, log = compiled("csrc/packed/gpu_prefill.cu", arch)
    assert len(re.findall(r"Used \d+ registers", log)) == 24
    assert not any(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", log))
    for part in disassemble(path, arch).split("Function : ")[1:]:
        names = collections.Counter(re.findall(r"\b(HMMA\.16816\.F32|LDSM|LDGSTS|HGMMA)\b", part))
        tiles = 128 // 8 if "Li128E" in part.split()[0] else 64 // 8  # of eight tokens
        assert names["HMMA.16816.F32"] == 8 * 2 * tiles and names["LDSM"] == 8 * tiles // 2, part.split()[0]
        assert names["LDGSTS"] and not names["HGMMA"]


def shortest_path(sass: str, begin: int, ends: set[int]) -> int:
    """Instructions executed from instruction `begin` to the nearest of `ends`, branches taken at will."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([\w.]+)([^;]*);", sass, re.MULTILINE)
    places = {int(address, 16): place for place, (address, _, _, _) in enumerate(lines)}
    seen, front, steps = {begin}, [begin], 0
    while front:
        steps += 1
        after: list[int] = []
        for place in front:
            _, guard, name, operands = lines[place]
            follow = [] if name in ("BRA", "EXIT", "RET") and not guard else [place + 1]
            if name.startswith("BRA") and (target := re.search(r"0x[0-9a-f]+", operands)):
                follow.append(places[int(target.group(), 16)])
            after += [one for one in follow if one < len(lines) and one not in seen]
            seen.update(follow)
        if any(one in ends for one in after):
            return steps
        front = after
    raise AssertionError("no way from there")


@NEEDS_NVCC
@pytest.mark.slow
def test_instructions_of_the_decode_loop(compiled: Compile) -> None:
    """A warp's way from one unit of 32 x 128 to the next, at up to 8 tokens and groups of 128: what bounds 3 bits."""
    sass = disassemble(compiled("csrc/packed/gpu_linear.cu", "90a")[0], "90a")
    found = {}
    for part in sass.split("Function : ")[1:]:
        kind = re.search(r"(Half2|Bfloat2)ELi([34])ELi1ELb0ELb1E", part.split()[0])
        if kind is None:
            continue
        names = re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", part, re.MULTILINE)
        products = [place for place, name in enumerate(names) if name.startswith("HMMA")]
        first = [place for i, place in enumerate(products) if i % 16 == 0]  # of a unit: 2 tiles x 8 steps
        paths = [shortest_path(part, place, set(first) - {place}) for place in first]
        found[f"{kind[1]} {kind[2]}"] = sum(paths) / len(paths) / 2  # of a tile of 16 x 128
    limits = {"Half2 3": 118, "Bfloat2 3": 118, "Half2 4": 106, "Bfloat2 4": 122}
    assert found.keys() == limits.keys() and all(found[key] <= limits[key] for key in limits), found
