# SPDX-License-Identifier: Apache-2.0
"""How a solve is carried out, as against what it computes: placement of state and activations, device, ranks.

Placement and ranks change no bit of the result; another device does, in the last bits of its sums.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from discquant.config import SolverConfig
from discquant.environment import CUBLAS_WORKSPACE
from discquant.errors import ConfigError
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain
from discquant.solver.kronecker import factor_shape
from discquant.solver.placement import CHOICES, Choice, Placement, Where
from discquant.solver.ranks import Ranks

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# Of what is free, the state may take this much; the rest is for weights in use and activations.
RESIDENT_SHARE = 0.5
# A model that takes more than this of a free GPU stays on the host, and its blocks come one by one.
MODEL_SHARE = 0.3
HOST_SHARE = 0.8


def bytes_per_weight(options: SolverConfig, *, num_bits: int = 4, weights_dtype_bytes: int = 0) -> float:
    """Return the bytes of state per weight, without scales, outliers and the curvature's factors.

    Args:
        options: State width, optimizer, teacher and start.
        num_bits: Code width.
        weights_dtype_bytes: Bytes per original weight where those are part of the state (teacher `weights` that is
            streamed), else 0.
    """
    value = {"fp32": 4.0, "bf16": 2.0, "u8": 1.0}[options.state]
    code = 0.5 if options.state == "u8" and num_bits <= 4 else 1.0
    moments = {"adamw": 2, "momentum": 1, "lion": 1, "sgd": 0}[options.optimizer]
    total = code + value * (2 + moments) + weights_dtype_bytes
    if options.teacher_source == "state" and options.start == "gptq":
        total += 0.125 if options.state == "u8" else value
    return total


def curvature_bytes(shape: tuple[int, int], options: SolverConfig) -> int:
    """Return the bytes of the curvature's factors of a linear layer [out_features, in_features]; 0 without the term."""
    if not options.curved:
        return 0
    element = 4 if options.state == "fp32" else 2
    return element * sum(math.prod(factor_shape(size, options.curvature_width)) for size in shape)


def free_host_bytes() -> int | None:
    """Return the memory that can be had without swapping or leaving the container's limit, None where nothing tells."""
    found = []
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is the word "max"
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        rows = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for key, value in rows if key == "inactive_file")
        found.append(max(0, limit - used + cached))
    return min(found) if found else None


@dataclass
class Engine:
    """Options of carrying out; on one kind of device none of them changes a bit of the result.

    Attributes:
        where: Placement of the state; `auto` takes the first of resident, host and disk that has room.
        activations: Where boundary activations are kept; None follows the state.
        device: Compute device; the chain must be there.
        folder: For the files of `disk`.
        ranks: Who else takes part.
    """

    where: Choice = "resident"
    activations: Where | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: An unknown placement.
        """
        if self.where not in CHOICES:
            raise ConfigError(f"placement must be one of {', '.join(CHOICES)}, got {self.where!r}")
        if self.activations is not None and self.activations not in get_args(Where):
            raise ConfigError(
                f"activations must be one of {', '.join(get_args(Where))}, got {self.activations!r}"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # kernels are launched on the current one
            os.environ.setdefault(*CUBLAS_WORKSPACE)  # read once, at the first product on the GPU

    def offloads(self, model_bytes: int) -> bool:
        """Return whether a model's own blocks come to the device only when they run; never on the CPU."""
        if self.device.type != "cuda":
            return False
        if self.where != "auto":
            return self.where != "resident"
        free, _ = torch.cuda.mem_get_info(self.device)
        return model_bytes > MODEL_SHARE * free

    @contextlib.contextmanager
    def reproducible(self) -> Iterator[None]:
        """Have torch take the same bits every time: on a GPU, attention's gradient adds in any order otherwise."""
        if self.device.type != "cuda":
            yield
            return
        before = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        memory: Any = torch.utils.deterministic
        filled = memory.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            memory.fill_uninitialized_memory = filled

    def _files(self) -> Path | None:
        return None if self.folder is None else self.folder / f"rank-{self.ranks.rank}"

    def streams(self, model: Path) -> bool:
        """Return whether original weights should stay on disk: the placement says so, or they would fill the memory."""
        if self.where != "auto":
            return self.where != "resident"
        host = free_host_bytes()
        # Stored in 16 bits, computed in 32 on a CPU.
        size = 2 * sum(file.stat().st_size for file in model.glob("*.safetensors")) if model.is_dir() else 0
        return host is not None and size > RESIDENT_SHARE * host

    def chosen(self, needed: int) -> Where:
        """Return the placement of a state of `needed` bytes."""
        if self.where != "auto":
            return self.where
        host = free_host_bytes()
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if needed <= RESIDENT_SHARE * free:
                return "resident"
            return "host" if host is None or needed <= HOST_SHARE * host else "disk"
        # Host memory is the compute device's own: moving blocks within it would only cost.
        return "resident" if host is None or needed <= HOST_SHARE * host else "disk"

    def placement(self, chain: Chain, options: SolverConfig) -> Placement:
        """Return an empty placement for the state of a chain."""
        refs = [ref for block in chain.weights for ref in block]
        factors = sum(curvature_bytes(ref.shape, options) for ref in refs if ref.has_factors)
        where = self.chosen(int(sum(ref.matrix_size for ref in refs) * bytes_per_weight(options)) + factors)
        return Placement(where, self.device, self._files())

    def boundary_store(self, placement: Placement) -> Boundaries:
        """Return where boundary activations are kept."""
        return Boundaries(self.activations or placement.where, self.device, self._files())
