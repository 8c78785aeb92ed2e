# SPDX-License-Identifier: Apache-2.0
"""Extension and package mapping only; metadata is in pyproject.toml.

DISCQUANT_BUILD=auto|cpu|cuda|none chooses what is compiled into ``discquant._C``: `auto` takes what the tools at hand
allow and degrades with one warning, `cpu` and `cuda` fail when they cannot be honoured. Never asks the local GPU.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The stable ABI of torch 2.10: one binary serves every later torch, and a file compiles in seconds.
TORCH_TARGET = "0x020a000000000000"
# Longest suffix first: `_avx512vnni` must not be taken for `_avx512`.
ISA_FLAGS = {
    "_amx": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c -mgfni -mamx-tile -mamx-int8",
    "_avx512vnni": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c",
    "_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c",
    "_avx2": "-mavx2 -mfma -mf16c",
}
# Architecture -> first toolkit (major, minor) that compiles it. Used when TORCH_CUDA_ARCH_LIST is unset.
CUDA_ARCHS = {"80": (11, 0), "86": (11, 1), "89": (11, 8), "90a": (12, 0), "100": (12, 8), "120": (12, 8)}


def isa_flags(source: str) -> str:
    """Instruction-set flags that a file's name asks for, e.g. ``gemv_avx2.cpp``."""
    stem = Path(source).stem
    return next((flags for suffix, flags in ISA_FLAGS.items() if stem.endswith(suffix)), "")


def accepts(cxx: str, flags: str) -> bool:
    """Whether the compiler knows these flags: GCC does AMX from 11 on."""
    command = [*shlex.split(cxx), *shlex.split(flags), "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", capture_output=True).returncode == 0


def sources(kind: str, machine: str | None = None) -> list[str]:
    """Files under csrc/ to compile, sorted; x86 files are left out on other processors."""
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64")
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*.{kind}"))
    return [path for path in found if x86 or not isa_flags(path)]


def cuda_archs(toolkit: tuple[int, int], wanted: str | None) -> list[str]:
    """Architectures as nvcc writes them, "90a", with "+PTX" where asked for; ``wanted`` is TORCH_CUDA_ARCH_LIST.

    9.0 becomes 90a, without which there are no warpgroup products; code for it runs on every GPU of 9.0.
    """
    if wanted:
        archs = [arch.replace(".", "") for arch in wanted.replace(" ", ";").split(";") if arch]
        return [{"90": "90a", "90+PTX": "90a+PTX"}.get(arch, arch) for arch in archs]
    return [arch for arch, first in CUDA_ARCHS.items() if toolkit >= first]


def gencode(archs: list[str]) -> str:
    """nvcc's flags for these architectures.

    The kernels ask for nothing between sm_80 and sm_90, so all of 8.x come from one translation to PTX: that is half of
    the time to compile them.
    """
    real = [arch.removesuffix("+PTX") for arch in archs]
    ampere = sorted(arch for arch in real if len(arch) == 2 and arch[0] == "8")
    virtual = {arch: ampere[0] if arch in ampere else arch for arch in real}
    flags = [f"-gencode=arch=compute_{virtual[arch]},code=sm_{arch}" for arch in real]
    # PTX with a suffix would run on that architecture alone.
    bare = [arch.removesuffix("+PTX").rstrip("af") for arch in archs if arch.endswith("+PTX")]
    return " ".join([*flags, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in bare)])


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """Toolkit version from ``nvcc --version``."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    major, minor = text.split("release ")[1].split(",")[0].split(".")
    return int(major), int(minor)


def wants_cuda(build: str) -> bool:
    """Whether to compile csrc/**/*.cu: nvcc and a CUDA torch are both needed.

    Raises:
        CompileError: DISCQUANT_BUILD=cuda and one of them is missing.
    """
    if build in ("cpu", "none"):
        return False
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    missing = [
        text
        for text, absent in (
            ("nvcc (set CUDA_HOME)", CUDA_HOME is None or shutil.which(f"{CUDA_HOME}/bin/nvcc") is None),
            ("a CUDA build of torch", torch.version.cuda is None),
        )
        if absent
    ]
    if build == "cuda" and missing:
        raise CompileError(f"DISCQUANT_BUILD=cuda needs {' and '.join(missing)}")
    return not missing


class NinjaBuild(build_ext):
    """Write a build.ninja for the one extension and run it: flags per file, all cores, rebuilds only what changed.

    torch's BuildExtension has one set of flags per language, not per file, and asks the local GPU for its architecture.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; with DISCQUANT_BUILD=auto a failure becomes one warning (the op that needs it says so)."""
        build = os.environ.get("DISCQUANT_BUILD", "auto")
        try:
            self._build(build)
        except Exception as cause:
            if build != "auto":
                raise CompileError(str(cause)) from cause
            warnings.warn(f"discquant._C was not built: {cause}; the package works without it", stacklevel=1)

    def _build(self, build: str) -> None:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise CompileError(f"no C++ compiler: {cxx} was not found")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is None:
            raise CompileError("ninja was not found: pip install ninja")
        cuda = wants_cuda(build)
        includes = [
            str(ROOT / "csrc"),
            *include_paths("cuda" if cuda else "cpu"),
            sysconfig.get_path("include"),
        ]
        if not (Path(torch.__file__).parent / "include" / "pybind11").is_dir():
            import pybind11

            includes.append(pybind11.get_include())
        target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
        defines = [f"-DDISCQUANT_TORCH_TARGET={TORCH_TARGET}", "-DDISCQUANT_EXTENSION_NAME=_C"]
        archs: list[str] = []
        if cuda:
            archs = cuda_archs(nvcc_version(f"{CUDA_HOME}/bin/nvcc"), os.environ.get("TORCH_CUDA_ARCH_LIST"))
            defines += ["-DUSE_CUDA", "-DDISCQUANT_WITH_CUDA"]
        defines.append(f'-DDISCQUANT_CUDA_ARCHS=\\"{",".join(archs)}\\"')
        common = " ".join(
            [*(f"-isystem {shlex.quote(path)}" for path in includes[1:]), f"-I{shlex.quote(includes[0])}"]
        )
        # Contracted multiply-adds would round differently per instruction set; kernels ask for theirs by name.
        cflags = (
            f"-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall {' '.join(defines)} {common}"
        )
        nvflags = f"-O3 -std=c++17 -Xcompiler -fPIC --expt-relaxed-constexpr {' '.join(defines)} {common}"
        nvflags = f"{nvflags} {gencode(archs)}"
        libraries = [f"-L{shlex.quote(path)}" for path in library_paths("cuda" if cuda else "cpu")]
        if sys.platform == "linux":
            # What an operator throws, torch catches: a second libstdc++, some compilers' default, makes that crash.
            # And libtorch is kept though nothing in it is named: it brings the CUDA half, which weak symbols look for.
            libraries += ["-l:libstdc++.so.6", "-Wl,--no-as-needed"]
        libraries += ["-ltorch", "-ltorch_cpu", "-lc10"] + (["-lcudart"] if cuda else [])
        out = Path(self.get_ext_fullpath("discquant._C")).resolve()
        # An editable build gets a fresh temporary folder each time; objects kept here make the next one incremental.
        kept = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        temp = kept if self.editable_mode else Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {cflags} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {CUDA_HOME}/bin/nvcc -MD -MF $out.d {nvflags} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -o $out $in {' '.join(libraries)}",
        ]
        objects = []
        for source in sources("cpp") + (sources("cu") if cuda else []):
            rule = "cxx" if source.endswith(".cpp") else "nvcc"
            objects.append(str(temp / f"{source.replace('/', '_')}.o"))
            lines.append(f"build {ninja_path(objects[-1])}: {rule} {ninja_path(str(ROOT / source))}")
            # torch 2.10 to 2.12 bring a pybind11 that refuses the stable ABI; bindings.cpp needs no torch header.
            stable = "" if Path(source).name == "bindings.cpp" else target
            flags = isa_flags(source)
            if Path(source).stem.endswith("_amx") and not accepts(cxx, flags):
                flags = ""  # the file compiles to "not there"
            lines.append(f"  flags = {stable} {flags}")
        lines.append(f"build {ninja_path(str(out))}: link {' '.join(map(ninja_path, objects))}")
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([ninja, "-C", str(temp)], capture_output=True, text=True)
        print(done.stdout, file=sys.stderr)
        if done.returncode:
            raise CompileError(f"the compiler failed:\n{done.stdout[-4000:]}{done.stderr[-1000:]}")


def ninja_path(path: str) -> str:
    """Escape a path for a build.ninja line."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def main() -> None:
    """Run setuptools with the package mapping and, unless DISCQUANT_BUILD=none, the extension."""
    build = os.environ.get("DISCQUANT_BUILD", "auto")
    if build not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"DISCQUANT_BUILD must be auto, cpu, cuda or none, got {build!r}")
    extension = Extension("discquant._C", sources("cpp") + sources("cu"), optional=build == "auto")
    setup(
        # The top-level folder must not be importable as `triton_kernels`: that name belongs to Triton's own project.
        packages=[*find_packages(include=["discquant", "discquant.*"]), "discquant.triton_kernels"],
        package_dir={"discquant.triton_kernels": "triton_kernels"},
        package_data={"discquant.ops": ["*.json"]},
        ext_modules=[] if build == "none" else [extension],
        cmdclass={"build_ext": NinjaBuild},
    )


if __name__ == "__main__":
    main()
