# SPDX-License-Identifier: Apache-2.0
"""The solver's loop body: one optimizer step over the whole model, block by block, and its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discquant.config import SolverConfig
from discquant.ops import (
    StepCounts,
    StepOptions,
    expand_groups,
    projected_step_,
    soft_linear_step_,
    step_is_fused,
)
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import block_gradients
from discquant.solver.schedule import GainControl, moment_bound, settings
from discquant.solver.soft_block import SoftWeights, step_grid
from discquant.solver.state import WeightState
from discquant.solver.weight_ref import assemble, first_not_finite, take_matrices


@dataclass(frozen=True)
class StepRecord:
    """What one step reports; shares are of the coordinates that may move.

    `moved` is the share on the other side of 1/2 than the anchor: off nearest, or off GPTQ's code when started there.
    """

    step: int
    loss: float
    lr: float
    kl_weight: float
    linear_weight: float
    hardening: float
    fractional: float
    moved: float
    saturated: float


class NonFiniteGradientError(ValueError):
    """A weight's gradient holds NaN or Inf."""


def row_order(num_rows: int, seed: int) -> Iterator[int]:
    """Yield row numbers for ever: a new seeded permutation for each pass over the data."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(num_rows, generator=generator).tolist()
        epoch += 1


class Solver:
    """Solve for `frac` of every state in place."""

    def __init__(
        self,
        chain: Chain,
        states: Sequence[Sequence[WeightState]],
        config: SolverConfig,
        *,
        seed: int = 0,
        keep_graph: bool = False,
        served: torch.dtype | None = None,
        soft: bool | None = None,
    ) -> None:
        """Bind states (one list per block, in the order of `chain.weights`) to the chain.

        Args:
            chain: Model whose own weights are the teacher.
            states: Per block, per weight.
            config: Solver options.
            seed: Keys stochastic rounding.
            keep_graph: See `block_gradients`; changes speed and memory, not results.
            served: Dtype in which the file will be dequantized; student weights are rounded to it, so that
                what is trained is what is served. None is the compute dtype.
            soft: Run linear layers on the state (`SoftWeights`) instead of writing a block's weights out; None does
                so on CUDA.
        """
        self.chain = chain
        self.states = [list(block) for block in states]
        self.config = config
        self.seed = seed
        self.keep_graph = keep_graph
        self.step_number = 0
        self.dtype: torch.dtype = getattr(torch, config.compute_dtype)
        self.gain = GainControl(config.kl_weight or 1.0, None if config.kl_weight else config.saturation)
        self.served = served or self.dtype
        self.soft = soft
        self._tensor_ids = {
            state.name: index for index, state in enumerate(s for block in self.states for s in block)
        }

    def student(self, index: int) -> dict[str, Tensor]:
        """Return the interpolated weights of a block by parameter name."""
        refs = self.chain.weights[index]
        return assemble(refs, (state.soft_weight(self.served).to(self.dtype) for state in self.states[index]))

    def student_block(
        self, index: int, on_layer: Callable[[WeightState, Tensor, Tensor], bool] | None = None
    ) -> dict[str, Tensor]:
        """Return what a step runs a block with: `SoftWeights` where they are wanted, else `student`."""
        states = self.states[index]
        if not (any(state.frac.is_cuda for state in states) if self.soft is None else self.soft):
            return self.student(index)
        block, refs = self.chain.blocks[index], self.chain.weights[index]
        return SoftWeights(block, refs, states, dtype=self.dtype, served=self.served, on_layer=on_layer)

    def rounded(self, index: int) -> dict[str, Tensor]:
        """Return the weights of a block with `frac` rounded."""
        refs = self.chain.weights[index]
        return assemble(refs, (state.hard_weight(self.served).to(self.dtype) for state in self.states[index]))

    def _checked(self, index: int, grads: dict[str, Tensor]) -> None:
        name = first_not_finite(self.chain.weights[index], grads)
        if name is not None:
            raise NonFiniteGradientError(
                f"solver: the gradient of {name} must be finite, got NaN or Inf at step "
                f"{self.step_number + 1}; its state is unchanged"
            )

    def step(self, batches: Sequence[Prepared]) -> StepRecord:
        """Take one step on the mean loss over `batches`.

        Raises:
            NonFiniteGradientError: A gradient is not finite; that block was not changed (but for layers of it that
                had stepped inside backward, where a measured table asks for that).
            ValueError: The loss is not finite; nothing was changed.
        """
        number = self.step_number + 1
        now = settings(self.config, number)
        live = fractional = moved = saturated = 0
        bound = moment_bound(self.config)

        def options(state: WeightState) -> StepOptions:
            return StepOptions(
                optimizer=self.config.optimizer,
                lr=now.lr,
                betas=self.config.betas,
                weight_decay=self.config.weight_decay,
                kl_weight=self.gain.gain,
                grad_clamp=self.config.grad_clamp,
                linear_weight=now.linear_weight,
                hardening=now.hardening,
                step=number,
                moment_bound=bound,
                seed=self.seed,
                tensor_id=self._tensor_ids[state.name],
            )

        def count(state: WeightState, counts: StepCounts) -> None:
            nonlocal live, fractional, moved, saturated
            live += counts.live
            if now.snap > 0:
                state.snap_(now.snap)
                fractional += state.count_fractional()
            else:
                fractional += counts.fractional
            moved += counts.moved
            saturated += counts.saturated

        def take(index: int, grads: dict[str, Tensor]) -> None:
            self._checked(index, grads)
            pairs = zip(self.chain.weights[index], self.states[index], strict=True)
            # A layer that took its step inside backward left no gradient.
            left = [(ref, state) for ref, state in pairs if ref.param_name in grads]
            matrices = take_matrices([ref for ref, _ in left], grads)
            for grad, (_, state) in zip(matrices, left, strict=True):
                grid: dict[str, Any] = step_grid(state)
                count(state, projected_step_(
                    state.frac, state.anchor, grad, **grid, options=options(state), momentum=state.momentum,
                    second_moment=state.second_moment,
                ))  # fmt: skip

        def step_at_once(state: WeightState, grad_output: Tensor, x: Tensor) -> bool:
            if not step_is_fused(x.reshape(-1, x.shape[-1]), *state.shape):
                return False
            if not bool(torch.isfinite(grad_output).all()) or not bool(torch.isfinite(x).all()):
                return False  # the gradient is made, found not finite, and named
            count(state, soft_linear_step_(
                grad_output, x, state.frac, state.anchor, **step_grid(state), options=options(state),
                momentum=state.momentum, second_moment=state.second_moment,
            ))  # fmt: skip
            return True

        def student(index: int) -> dict[str, Tensor]:
            # The clamp acts on the whole step's gradient, which one backward pass sees with one micro-batch only.
            return self.student_block(index, step_at_once if len(batches) == 1 else None)

        gain = self.gain.gain
        loss = block_gradients(
            self.chain, student, batches, take, loss=self.config.loss, keep_graph=self.keep_graph
        )
        self.step_number = number
        self.gain.update(saturated, live)
        total = max(1, live)
        return StepRecord(
            number,
            loss,
            now.lr,
            gain,
            now.linear_weight,
            now.hardening,
            fractional / total,
            moved / total,
            saturated / total,
        )

    def calibrate_gain(self, batches: Sequence[Prepared]) -> float:
        """Set the gain so that `saturation` of the entries reach the clamp at the rounded-to-nearest model.

        At the original weights the KL gradient is zero, so the first gradients cannot set it.

        Returns:
            The gain on dKL/dfrac.
        """
        samples: list[Tensor] = []

        def sink(index: int, grads: dict[str, Tensor]) -> None:
            refs = self.chain.weights[index]
            for matrix, state in zip(take_matrices(refs, grads), self.states[index], strict=True):
                grad = matrix.float()
                gap, group_size = state.grid.gap(state.codes_down())
                flat = (grad * expand_groups(gap.float(), group_size, grad.shape[1])).abs()[state.live()]
                samples.append(flat[:: max(1, flat.numel() // 65536)].clone())

        def nearest(index: int) -> dict[str, Tensor]:
            refs = self.chain.weights[index]
            grids = [state.grid for state in self.states[index]]
            served = (
                grid.dequantize(grid.nearest(ref.matrix()), self.served).to(self.dtype)
                for ref, grid in zip(refs, grids, strict=True)
            )
            return assemble(refs, served)

        block_gradients(self.chain, nearest, batches, sink, loss=self.config.loss)
        pooled = torch.cat(samples) if samples else torch.ones(1)
        level = float(
            torch.quantile(pooled[:: max(1, pooled.numel() // 1_000_000)], 1 - self.config.saturation)
        )
        gain = self.config.grad_clamp / max(level, 1e-30)
        self.gain = GainControl(gain, self.config.saturation)
        return gain
