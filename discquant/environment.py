# SPDX-License-Identifier: Apache-2.0
"""What this machine has, for `discquant env` and for the choice of kernels; the one reader of DISCQUANT_* variables.

A leaf: imports nothing of the package but `_extension` and `errors`. Nothing is asked of a device at import.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discquant.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Without it cuBLAS may split a product differently from run to run; torch asks for it in deterministic mode.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
VARIABLES = {
    "DISCQUANT_CACHE": "folder of this machine's measured rates (discquant plan --measure); default ~/.cache/discquant",
    "DISCQUANT_BUILD": "what setup.py compiles: auto (default), cpu, cuda or none",
    "DISCQUANT_PYTHON": "interpreter that the Makefile uses instead of making .venv",
    "DISCQUANT_SHARED": "folder of test models and texts; tests that need it are skipped without it",
    "DISCQUANT_TRACEBACK": "1 shows the traceback of a user error at the command line",
}
PACKAGES = (
    "discquant", "torch", "triton", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy",
)  # fmt: skip


def variable(name: str) -> str | None:
    """Value of a DISCQUANT_* variable, None where unset or empty.

    Raises:
        KeyError: The variable is not in VARIABLES, which documents all of them.
    """
    if name not in VARIABLES:
        raise KeyError(f"environment: {name} is not one of {sorted(VARIABLES)}")
    return os.environ.get(name) or None


def compute_device(name: str, local: int = 0) -> torch.device:
    """Return the device that a word of the command line means, once it is known to be there.

    Args:
        name: auto (the GPU where torch sees one, else the CPU), cpu, cuda, or cuda:N.
        local: Which GPU `auto` and `cuda` mean: this process's number among those of the machine.

    Raises:
        ConfigError: No such word, or no such device here; the message says how to mend it.
    """
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind, colon, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or bool(colon) != number.isdecimal()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if torch.version.cuda is None:
        raise ConfigError(
            f"device {name}: this torch ({torch.__version__}) is built without CUDA; install one that has it, or take "
            "--device cpu"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {name}: torch is built for CUDA {torch.version.cuda} but sees no GPU; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or take --device cpu"
        )
    index, count = int(number) if number else local, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"device {name}: torch sees {count} GPUs, cuda:0 to cuda:{count - 1}; take one of these"
        )
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Return what of a device decides the bytes of a result: "cpu", or the GPU's model."""
    import torch

    return device.type if device.type != "cuda" else f"cuda {torch.cuda.get_device_name(device)}"


def versions() -> dict[str, str | None]:
    """Installed version of Python and of every package that can change a result; None where absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"model": model, "machine": platform.machine(), "cores": cores, "memory_bytes": memory}


def cpu_name() -> str:
    """Return what of the processor decides the last bits of a sum: its model, and the instruction set torch takes."""
    import torch

    return f"{_cpu()['model']}, {torch.backends.cpu.get_cpu_capability()}"


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_bytes": device.total_memory,
                "multiprocessors": device.multi_processor_count,
            }
        )
    return found


def _triton() -> dict[str, Any]:
    """Whether Triton kernels can run: on a GPU, or anywhere under its interpreter."""
    return {
        "installed": versions()["triton"] is not None,
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }


def _extension_facts() -> dict[str, Any]:
    from discquant import _extension

    reason = _extension.failure()
    if reason is not None:
        return {"available": False, "reason": reason}
    return {"available": True, **_extension.load().build_facts()}


# What the CPU kernels of each instruction set need, best first: the rule of csrc/packed/cpu_linear.cpp.
_ISA_FEATURES = {
    "amx": ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_int8"),
    "avx512vnni": ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx512": ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma"),
    "scalar": (),
}


def cpu_isas() -> list[str]:
    """Instruction sets of the compiled CPU kernels that this processor runs, best first; none without the extension."""
    found = _extension_facts().get("cpu_features")
    if found is None:
        return []
    return [isa for isa, needed in _ISA_FEATURES.items() if all(found.get(name) for name in needed)]


def _kernels() -> dict[str, str]:
    """What `packed_linear` runs on each device of this machine, and why where it is not the fastest there is."""
    import torch

    from discquant import _extension

    extension, isas = _extension_facts(), cpu_isas()
    reason = f"reference: {extension.get('reason')}"
    found = {"packed_linear cpu": f"{isas[0]}, {torch.get_num_threads()} threads" if isas else reason}
    for index, gpu in enumerate(_gpus()):
        code = _extension.cuda_code(*map(int, gpu["capability"].split(".")))
        fallback = "triton" if versions()["triton"] is not None else "reference"
        found[f"packed_linear cuda:{index}"] = (
            f"cuda sm_{code}" if code is not None else f"{fallback}: nothing compiled for {gpu['capability']}"
        )
    return found


def facts() -> dict[str, Any]:
    """Versions, processor, GPUs, extension (or why there is none), Triton, kernels in use, DISCQUANT_* variables."""
    import torch

    return {
        "versions": versions(),
        "platform": f"{sys.platform} {platform.release()}",
        "cpu": _cpu(),
        "gpus": _gpus(),
        "torch": {"cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "triton": _triton(),
        "extension": _extension_facts(),
        "kernels": _kernels(),
        "variables": {name: variable(name) for name in VARIABLES if variable(name) is not None},
    }
