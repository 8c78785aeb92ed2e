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
from discquant.solver.kronecker import triangle_shape
from discquant.solver.placement import CHOICES, Choice, Placement, Where
from discquant.solver.ranks import Ranks


def curvature_bytes(shape: tuple[int, int], options: SolverConfig) -> int:
    """Return the bytes of the curvature's factors of a linear layer [out_features, in_features]; 0 without the term."""
    if not options.curved:
        return 0
    element = 4 if options.state == "fp32" else 2
    return element * sum(math.prod(triangle_shape(size, options.curvature_width)) for size in shape)


@dataclass
class Engine:
    """Options of carrying out; on one kind of device none of them changes a bit of the result.

    Attributes:
        where: Placement of the state; `auto` is for a run to settle, by its plan.
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

    @property
    def streamed(self) -> bool:
        """Whether blocks, the original's as well as the state's, come to the compute device only when they run."""
        return self.where in ("host", "disk")

    def placement(self) -> Placement:
        """Return an empty placement.

        Raises:
            ConfigError: `auto`, which only a run's plan can settle.
        """
        if self.where == "auto":
            raise ConfigError(
                "placement auto is settled by a run's plan; a solve by itself needs one of the others"
            )
        return Placement(self.where, self.device, self._files())

    def boundaries(self) -> Boundaries:
        """Return where block inputs are kept by whoever has no state placed; `where` must be settled."""
        where = self.activations or self.where
        assert where != "auto"
        return Boundaries(where, self.device, self._files())

    def boundary_store(self, placement: Placement) -> Boundaries:
        """Return where boundary activations are kept."""
        return Boundaries(self.activations or placement.where, self.device, self._files())
