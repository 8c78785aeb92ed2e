# SPDX-License-Identifier: Apache-2.0
"""The compiled extension, its facts, and the choices of setup.py."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from discquant import _extension, environment
from discquant.ops import pack


def build(repo_root: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={out}/lib", f"--build-temp={out}/temp"]
    environ = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=repo_root, env=environ)


def test_extension_is_built_where_a_compiler_is() -> None:
    if not (shutil.which("c++") or shutil.which("g++")) or environment.variable("DISCQUANT_BUILD") == "none":
        assert not _extension.available()
        return
    assert _extension.available(), _extension.failure()


def test_build_facts() -> None:
    facts = environment.facts()["extension"]
    if not facts["available"]:
        assert facts["reason"]
        return
    assert facts["layout_version"] >= 1
    assert facts["compiler"].split()[0] in ("gcc", "clang")
    assert facts["torch_target_version"] == 0x020A000000000000
    if torch.version.cuda is None:
        assert facts["cuda_architectures"] == []
    else:
        names = [name.removesuffix("+PTX").rstrip("af") for name in facts["cuda_architectures"]]
        assert all(name.isdigit() for name in names)


def test_cpu_features_agree_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    facts = environment.facts()["extension"]
    if not facts["available"] or platform.machine() != "x86_64" or not cpuinfo.exists():
        assert platform.machine() != "x86_64" or not facts["available"] or not cpuinfo.exists()
        return
    line = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    amx = facts["cpu_features"].pop("amx_int8")
    assert facts["cpu_features"] == {name: name in flags for name in facts["cpu_features"]}
    assert {"avx2", "avx512f", "avx512_vnni", "avx512_bf16"} <= facts["cpu_features"].keys()
    # The compiler must know it too, and Linux must let this process use it.
    assert not amx or {"amx_tile", "amx_int8", "gfni"} <= flags


def test_triton_kernels_is_installed_under_our_name(repo_root: Path) -> None:
    spec = importlib.util.find_spec("discquant.triton_kernels")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve() == repo_root / "triton_kernels" / "__init__.py"
    script = "import importlib.util as u; print(u.find_spec('triton_kernels'))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=repo_root / "tests"
    )
    assert done.stdout.strip() == "None" or str(repo_root) not in done.stdout


def test_isa_flags_follow_the_file_name(build_script: ModuleType) -> None:
    assert build_script.isa_flags("csrc/packed/gemv.cpp") == ""
    assert "avx512" not in build_script.isa_flags("csrc/packed/gemv_avx2.cpp")
    assert "-mavx512vnni" not in build_script.isa_flags("gemv_avx512.cpp")
    assert "-mavx512vnni" in build_script.isa_flags("gemv_avx512vnni.cpp")
    assert "-mamx-int8" in build_script.isa_flags("gemv_amx.cpp")
    assert "-mamx-int8" not in build_script.isa_flags("gemv_avx512vnni.cpp")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_flags_that_a_compiler_refuses(build_script: ModuleType) -> None:
    assert build_script.accepts("c++", "-O1")
    assert not build_script.accepts("c++", "-mno-such-instructions")


def test_x86_files_are_left_out_elsewhere(build_script: ModuleType) -> None:
    arm = build_script.sources("cpp", machine="aarch64")
    assert "csrc/bindings.cpp" in arm
    assert not [path for path in arm if "avx" in Path(path).stem or "amx" in Path(path).stem]


def test_cuda_architectures(build_script: ModuleType) -> None:
    assert build_script.cuda_archs((12, 0), None) == ["80", "86", "89", "90a"]
    assert build_script.cuda_archs((13, 0), None)[-2:] == ["100", "120"]
    assert build_script.cuda_archs((13, 0), "8.0;9.0a+PTX") == ["80", "90a+PTX"]
    # Without the suffix there would be no warpgroup products on an H100.
    assert build_script.cuda_archs((13, 0), "8.6 9.0 9.0+PTX") == ["86", "90a", "90a+PTX"]

    def flags(*archs: str) -> list[str]:
        found: list[str] = build_script.gencode(list(archs)).removeprefix("-gencode=").split(" -gencode=")
        return found

    assert flags("80", "86", "90a") == [
        "arch=compute_80,code=sm_80", "arch=compute_80,code=sm_86", "arch=compute_90a,code=sm_90a",
    ]  # fmt: skip
    assert flags("89") == ["arch=compute_89,code=sm_89"]
    # PTX for compute_90a would run nowhere else.
    assert flags("86", "90a+PTX") == [
        "arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("built", "capability", "code"),
    [
        ("80,86,89,90a", (9, 0), "90a"), ("80,86,89,90a", (8, 6), "86"), ("80", (8, 9), "80"),
        ("86", (8, 0), None), ("90a", (10, 0), None), ("100", (10, 3), "100"), ("100a", (10, 3), None),
        ("80", (7, 5), None), ("80+PTX", (12, 0), "80+PTX"), ("80+PTX,90a", (9, 0), "90a"),
        ("86+PTX,80", (8, 6), "86+PTX"), ("90a+PTX", (10, 0), "90a+PTX"), ("90a+PTX", (8, 9), None), ("", (8, 0), None),
    ],
)  # fmt: skip
def test_code_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, built: str, capability: tuple[int, int], code: str | None
) -> None:
    """CUDA's rule of which binary runs where; the ops take the extension on a GPU by it, and fall back otherwise."""
    facts = {"cuda_architectures": built.split(",") if built else []}
    monkeypatch.setattr(_extension, "_attempt", lambda: (SimpleNamespace(build_facts=lambda: facts), ""))
    monkeypatch.setattr(pack, "_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    _extension.cuda_code.cache_clear()
    try:
        assert _extension.cuda_code(*capability) == code
        chosen = pack.choose("op", "auto", torch.device("cuda", 0), "packed_linear_mma", triton=None)
        assert chosen == ("cpp" if code else "triton")
        if code is None:
            with pytest.raises(RuntimeError, match="holds nothing for compute capability"):
                pack.choose("op", "cpp", torch.device("cuda", 0), "packed_linear_mma")
    finally:
        _extension.cuda_code.cache_clear()


def test_auto_degrades_without_compiler(repo_root: Path, tmp_path: Path) -> None:
    done = build(repo_root, tmp_path, DISCQUANT_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("discquant._C was not built: no C++ compiler: no-such-compiler was not found") == 1
    )
    assert not list(tmp_path.rglob("_C*"))


def test_explicit_build_fails_without_compiler(repo_root: Path, tmp_path: Path) -> None:
    done = build(repo_root, tmp_path, DISCQUANT_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_cuda_build_fails_with_cpu_torch(repo_root: Path, tmp_path: Path) -> None:
    done = build(repo_root, tmp_path, DISCQUANT_BUILD="cuda")
    assert done.returncode != 0
    assert "DISCQUANT_BUILD=cuda needs" in done.stderr
    assert "a CUDA build of torch" in done.stderr


def test_unknown_build_is_refused(repo_root: Path, tmp_path: Path) -> None:
    done = build(repo_root, tmp_path, DISCQUANT_BUILD="fast")
    assert done.returncode != 0
    assert "must be auto, cpu, cuda or none, got 'fast'" in done.stderr
