# SPDX-License-Identifier: Apache-2.0
"""What decides a run's footprint, and what follows from it by the engine's own rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from discquant.calibration.sampling import rows_at_once
from discquant.config import GridConfig, QuantizeConfig
from discquant.planning.shape import Block, Matrix, ModelShape
from discquant.planning.traffic import (
    StateLayout,
    code_bytes,
    grid_bytes_per_weight,
    outlier_bytes,
    scale_bytes,
    state_layout,
)

Placement = Literal["resident", "host", "disk"]
PLACEMENTS: tuple[Placement, ...] = ("resident", "host", "disk")


@dataclass(frozen=True)
class Allocating:
    """What `discquant allocate` measures of every layer.

    Attributes:
        choices: How many grids.
        hessians: Whether the codes are GPTQ's, which need X^T X of the inputs.
    """

    choices: int
    hessians: bool


@dataclass(frozen=True)
class Setting:
    """What decides the footprint.

    Attributes:
        config: Options of the run.
        placement: Where the state lives: on the device, in host memory, on disk.
        accelerator: Whether there is a device besides the host.
        element: Bytes per element of computing, 2 or 4 (8 in float64).
        process: What the process holds before it opens a model.
        stored: Bytes per weight in the checkpoint, or of the smallest dtype that holds the weights exactly.
        blockwise: The original's blocks can be read one by one.
        ranks: Processes that share a step's windows; all else here is of one of them.
        activations: Where activations between blocks are kept; None follows the placement.
        allocating: Of `discquant allocate`, whose phases are its own; None of a run.
    """

    config: QuantizeConfig
    placement: Placement = "resident"
    accelerator: bool = False
    element: int = 4
    process: float = 0.0
    stored: int = 2
    blockwise: bool = True
    ranks: int = 1
    activations: Placement | None = None
    allocating: Allocating | None = None

    @property
    def boundaries(self) -> Placement:
        """Where activations between blocks are kept (the engine's own rule)."""
        return self.activations or self.placement

    @property
    def streamed(self) -> bool:
        """Whether states live elsewhere than on the compute device."""
        return self.placement != "resident"

    @property
    def teacher_in_state(self) -> bool:
        """Whether the teacher is computed from the state (the solver's own rule)."""
        return self.config.solver.teacher_source == "state"

    @property
    def whole_model(self) -> bool:
        """Whether the original weights stay in memory; streamed, they are read block by block, after any sampling."""
        return not self.streamed or not self.blockwise or self.config.data.dataset == "self"

    @property
    def layout(self) -> StateLayout:
        """Bytes per weight of the state, but for what depends on a layer's grid: see `state_of`."""
        solver = self.config.solver
        return state_layout(
            solver.state,
            solver.optimizer,
            self.config.grid.bits,
            both=self.teacher_in_state and solver.start == "gptq",
            weight=float(self.stored) if self.streamed and not self.teacher_in_state else 0.0,
        )

    @property
    def step_tokens(self) -> int:
        """Tokens per step of all ranks."""
        return self.config.solver.batch_size * self.config.data.seqlen

    @property
    def tokens(self) -> int:
        """Tokens per step of one rank, of the one with most: an aligned subtree of the micro-batches (`Ranks.span`)."""
        solver = self.config.solver
        passes = -(-solver.batch_size // solver.micro_batch)
        own = (1 << (passes - 1).bit_length()) // self.ranks * solver.micro_batch
        return min(solver.batch_size, max(solver.micro_batch, own)) * self.config.data.seqlen

    @property
    def passes(self) -> int:
        """Forward passes per step of the rank with most."""
        return -(-self.tokens // self.micro_tokens)

    @property
    def gathered_tokens(self) -> int:
        """Tokens that the curvature's factors are gathered on at once; every rank gathers on all of them."""
        from discquant.solver.curvature import rows_at_once as windows_at_once

        solver, data = self.config.solver, self.config.data
        if not solver.curved:
            return 0
        return windows_at_once(min(solver.curvature_samples, data.nsamples), solver.batch_size) * data.seqlen

    @property
    def micro_tokens(self) -> int:
        """Tokens per forward pass."""
        return min(self.config.solver.micro_batch, self.config.solver.batch_size) * self.config.data.seqlen


def rows_sampled(shape: ModelShape, setting: Setting) -> int:
    """Return how many windows are sampled from the model side by side (calibration's own rule); 0 where none is."""
    config = setting.config
    if config.data.dataset != "self":
        return 0
    fit = rows_at_once(shape.cache, config.data.seqlen, setting.element)
    return min(fit, config.data.nsamples + config.validation_windows)


def mean_over(
    blocks: Sequence[Block], config: QuantizeConfig, value: Callable[[GridConfig, Matrix], float]
) -> float:
    """Return a figure per weight that depends on the layer's grid, on average over the weights of some blocks."""
    total = sum(
        matrix.weights * share * value(grid, matrix)
        for block in blocks
        for matrix in block.matrices
        for grid, share in config.grid_of.shares(matrix.modules)
    )
    return total / max(1, sum(block.weights for block in blocks))


def state_of(blocks: Sequence[Block], setting: Setting) -> StateLayout:
    """Return bytes per weight of the state, on average over some blocks."""
    config, solver = setting.config, setting.config.solver
    outliers = setting.teacher_in_state
    return dataclasses.replace(
        setting.layout,
        code=mean_over(blocks, config, lambda grid, _: code_bytes(grid.bits, solver.state)),
        outliers=mean_over(blocks, config, lambda grid, _: outlier_bytes(grid, solver.state))
        if outliers
        else 0.0,
        scales=mean_over(blocks, config, lambda grid, _: scale_bytes(grid, config)),
    )


def grid_share(shape: ModelShape, config: QuantizeConfig) -> float:
    """Return bytes of scales and zero points per weight, on average over the model."""

    def own(grid: GridConfig, matrix: Matrix) -> float:
        return grid_bytes_per_weight(grid.group_size, matrix.columns, grid.sym, grid.kind)

    return mean_over(shape.blocks, config, own)


def keeps_graph(shape: ModelShape, setting: Setting) -> bool:
    """Return whether the engine keeps the activations of all blocks instead of recomputing each (its own rule)."""
    from discquant.solver.solve import KEEP_GRAPH_BYTES

    outputs = sum(m.rows * m.count for block in shape.blocks for m in block.matrices)
    resident = setting.placement == setting.boundaries == "resident"
    return resident and outputs * setting.step_tokens * 4 * 3 <= KEEP_GRAPH_BYTES


def remembers_teacher(shape: ModelShape, setting: Setting) -> bool:
    """Return whether the engine keeps the teacher's last hidden state of every row (its own rule)."""
    from discquant.solver.solve import KEEP_TEACHER_BYTES

    options, data = setting.config.solver, setting.config.data
    repeats = options.steps * options.batch_size > data.nsamples and options.loss == "kl"
    return repeats and data.nsamples * data.seqlen * shape.hidden * 4 <= KEEP_TEACHER_BYTES
