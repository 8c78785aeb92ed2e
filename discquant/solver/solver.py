# SPDX-License-Identifier: Apache-2.0
"""The solver's loop body: one optimizer step over the whole model, block by block, and its records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discquant.config import SolverConfig
from discquant.ops import (
    StepOptions,
    decode_frac_ref,
    projected_step_deferred_,
    soft_linear_step_deferred_,
    step_is_fused,
)
from discquant.solver.block import BlockState
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import BlockSink, StudentWeights, block_gradients
from discquant.solver.journal import Journal
from discquant.solver.placement import Placement
from discquant.solver.ranks import Ranks
from discquant.solver.scale_step import scale_gradient, scale_lr, scale_step_
from discquant.solver.schedule import GainControl, moment_bound, settings
from discquant.solver.soft_block import SoftWeights, step_grid
from discquant.solver.state import WeightState
from discquant.solver.weight_ref import WeightRef, assemble, first_not_finite, take_matrices

# A step keeps the bytes it replaces up to this much; above it a failed step cannot be taken back in memory.
JOURNAL_BYTES = 2 << 30


@dataclass(frozen=True)
class StepRecord:
    """What one step reports; shares are of the coordinates that may move.

    `moved` is the share on the other side of 1/2 than the anchor: off nearest, or off GPTQ's code when started there.
    Of a step that moves scales, `lr` is theirs, and the terms and shares of coordinates that stay are 0.
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


class Solver:
    """Solve for `frac` of every state in place.

    Attributes:
        placement: The states, by block.
        step_number: Steps taken.
        gain: Gain on the KL gradient.
        before_change: Called with a block's index before a step changes its state (a checkpoint that is still being
            written wants the old bytes).
    """

    def __init__(
        self,
        chain: Chain,
        states: Sequence[Sequence[WeightState]] | Placement,
        config: SolverConfig,
        *,
        seed: int = 0,
        keep_graph: bool = False,
        served: torch.dtype | None = None,
        boundaries: Boundaries | None = None,
        ranks: Ranks | None = None,
        soft: bool | None = None,
    ) -> None:
        """Bind states (one list per block, in the order of `chain.weights`) to the chain.

        Args:
            chain: The model; its own weights are the teacher unless the states hold it.
            states: Per block, per weight; or where they live.
            config: Solver options.
            seed: Keys stochastic rounding.
            keep_graph: See `block_gradients`; changes speed and memory, not results.
            served: Dtype in which the file will be dequantized; student weights are rounded to it, so that
                what is trained is what is served. None is the compute dtype.
            boundaries: Where activations between blocks are kept.
            ranks: Who else takes part.
            soft: Run linear layers on the state (`SoftWeights`) instead of writing a block's weights out; None does
                so on CUDA.
        """
        self.chain = chain
        self.soft = soft
        if isinstance(states, Placement):
            self.placement = states
        else:
            device = next((s.frac.device for block in states for s in block), torch.device("cpu"))
            self.placement = Placement("resident", device)
            for index, block in enumerate(states):
                self.placement.add(block)
                # The caller's states stay what is solved for: they become views into the block, too.
                for given, packed in zip(block, self.placement.home(index).states, strict=True):
                    vars(given).update(vars(packed))
        self.config = config
        self.seed = seed
        self.keep_graph = keep_graph
        self.boundaries = boundaries or Boundaries()
        self.ranks = ranks or Ranks()
        self.step_number = 0
        self.dtype: torch.dtype = getattr(torch, config.compute_dtype)
        self.gain = GainControl(config.kl_weight or 1.0, None if config.kl_weight else config.saturation)
        self.served = served or self.dtype
        self.before_change: Callable[[int], None] | None = None
        self._journal = Journal(JOURNAL_BYTES)
        self._moved: float | None = None  # of the last step that chose codes
        names = [ref.name for refs in chain.weights for ref in refs]
        self._tensor_ids = {name: index for index, name in enumerate(names)}

    @property
    def states(self) -> list[list[WeightState]]:
        """The states where they live, per block and weight; to be read between steps."""
        return [block.states for block in self.placement.homes()]

    def check(self) -> None:
        """Refuse to read a state that a failed step left half-way.

        Raises:
            RuntimeError: There is such a state.
        """
        self._journal.check()

    def student(self, index: int) -> dict[str, Tensor]:
        """Return the interpolated weights of a block by parameter name."""
        states = self.placement.fetch(index).states
        return assemble(
            self.chain.weights[index], (state.soft_weight(self.served).to(self.dtype) for state in states)
        )

    def student_block(
        self, index: int, on_layer: Callable[[WeightState, Tensor, Tensor], bool] | None = None
    ) -> dict[str, Tensor]:
        """Return what a step runs a block with: `SoftWeights` where they are wanted, else `student`."""
        states = self.placement.fetch(index).states
        if not (any(state.frac.is_cuda for state in states) if self.soft is None else self.soft):
            return self.student(index)
        block, refs = self.chain.blocks[index], self.chain.weights[index]
        return SoftWeights(block, refs, states, dtype=self.dtype, served=self.served, on_layer=on_layer)

    def teacher(self, index: int) -> Mapping[str, Tensor] | None:
        """Return the original weights of a block as its state holds them, None where they are the model's own."""
        states = self.placement.fetch(index).states
        if not all(state.holds_teacher for state in states) or not states:
            return None
        matrices = (state.teacher_weight(self.dtype) for state in states)
        return assemble(self.chain.weights[index], (matrix for matrix in matrices if matrix is not None))

    def rounded(self, index: int) -> dict[str, Tensor]:
        """Return the weights of a block with `frac` rounded."""
        states = self.placement.fetch(index).states
        return assemble(
            self.chain.weights[index], (state.hard_weight(self.served).to(self.dtype) for state in states)
        )

    def _open_block(self, index: int, opened: set[int]) -> BlockState:
        """Return a block whose bytes may be changed: kept for undoing, and free of a checkpoint's writer.

        Args:
            index: Of the block.
            opened: Blocks that were opened in this step; this one joins them.
        """
        block = self.placement.fetch(index, change=index not in opened)
        if index not in opened:
            opened.add(index)
            if self.before_change is not None:
                self.before_change(index)
            self._journal.keep(index, block.changed())
        return block

    def _refuse_not_finite(self, refs: Sequence[WeightRef], grads: dict[str, Tensor]) -> None:
        """Look at gradients on a CPU; on a GPU that pass moves 22 bytes per weight, and the steps alone look."""
        if all(grad.device.type == "cpu" for grad in grads.values()):
            bad = first_not_finite(refs, grads)
            if bad is not None:
                raise self._not_finite(bad)

    def _not_finite(self, name: str) -> NonFiniteGradientError:
        return NonFiniteGradientError(
            f"solver: the gradient of {name} must be finite, got NaN or Inf at step {self.step_number + 1}; "
            f"{self._journal.outcome}"
        )

    def step(self, batches: Sequence[Prepared], tokens: int | None = None) -> StepRecord:
        """Take one step on the mean loss over `batches`.

        Whatever stops a step half-way, the state is afterwards as it was before (see `Journal`).

        Args:
            batches: Micro-batches of this rank.
            tokens: Counted tokens of the whole step; None where `batches` are all of it.

        Raises:
            NonFiniteGradientError: A gradient is not finite; the message names the weight.
            ValueError: The loss is not finite; nothing was changed.
            RankLostError: Another rank is gone.
            RuntimeError: An earlier step failed half-way and was too large to be taken back.
        """
        self._journal.begin()
        try:
            moves = self.config.scale_iters > 0 and self.step_number >= self.config.iters
            record = (self._take_scale_step if moves else self._take_step)(batches, tokens)
        except BaseException:
            self.boundaries.clear()
            if self._journal.restore(self.placement):
                self.placement.changed_at_home()
            raise
        self._journal.forget()
        return record

    def with_curvature(self, ref: WeightRef, state: WeightState, grad: Tensor, weight: float) -> Tensor:
        """Return the KL gradient with the curvature term, which needs no tokens and so carries no noise of theirs."""
        original = None if state.holds_teacher else ref.matrix()
        term = state.curvature_gradient(original, grad.dtype)
        return grad if term is None else grad.add(term, alpha=weight)

    def _gradients(
        self, student: StudentWeights, batches: Sequence[Prepared], take: BlockSink, tokens: int | None
    ) -> float:
        """Hand every block's gradient to `take`, last block first; return the loss."""
        return block_gradients(
            self.chain,
            student,
            batches,
            take,
            loss=self.config.loss,
            keep_graph=self.keep_graph,
            teacher=self.teacher,
            boundaries=self.boundaries,
            ranks=self.ranks,
            tokens=tokens,
        )

    def _take_step(self, batches: Sequence[Prepared], tokens: int | None) -> StepRecord:
        number = self.step_number + 1
        now = settings(self.config, number)
        curvature = now.curvature if self.config.loss == "kl" else 0.0
        options = StepOptions(
            optimizer=self.config.optimizer,
            lr=now.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            kl_weight=self.gain.gain,
            grad_clamp=self.config.grad_clamp,
            linear_weight=now.linear_weight,
            hardening=now.hardening,
            step=number,
            moment_bound=moment_bound(self.config),
            seed=self.seed,
        )
        # Read once, after the last block: on a GPU a read would hold up the blocks that wait behind it.
        counts: list[Tensor] = []
        counted: list[str] = []

        opened: set[int] = set()

        def count(state: WeightState, found: Tensor) -> None:
            if now.snap > 0:
                state.snap_(now.snap)
                found[1] = state.count_fractional()
            counts.append(found)
            counted.append(state.name)

        def own(state: WeightState) -> StepOptions:
            return dataclasses.replace(options, tensor_id=self._tensor_ids[state.name])

        def take(index: int, grads: dict[str, Tensor]) -> None:
            refs = self.chain.weights[index]
            # A layer that took its step inside backward left no gradient.
            left = [place for place, ref in enumerate(refs) if ref.param_name in grads]
            self._refuse_not_finite([refs[place] for place in left], grads)
            block = self._open_block(index, opened)
            matrices = take_matrices([refs[place] for place in left], grads)
            for place, grad in zip(left, matrices, strict=True):
                state = block.states[place]
                if curvature:
                    grad = self.with_curvature(refs[place], state, grad, curvature)
                grid: dict[str, Any] = step_grid(state)
                found = projected_step_deferred_(
                    state.frac,
                    state.anchor,
                    grad,
                    **grid,
                    options=own(state),
                    momentum=state.momentum,
                    second_moment=state.second_moment,
                )
                count(state, found)
            self.placement.write_back(index)

        def student(index: int) -> dict[str, Tensor]:
            def step_at_once(state: WeightState, grad_output: Tensor, x: Tensor) -> bool:
                if not step_is_fused(x.reshape(-1, x.shape[-1]), *state.shape):
                    return False
                self._open_block(index, opened)
                grid: dict[str, Any] = step_grid(state)
                found = soft_linear_step_deferred_(
                    grad_output,
                    x,
                    state.frac,
                    state.anchor,
                    **grid,
                    options=own(state),
                    momentum=state.momentum,
                    second_moment=state.second_moment,
                )
                count(state, found)
                return True

            # The clamp acts on the whole step's gradient, which one backward pass sees with one micro-batch only.
            alone = len(batches) == 1 and self.ranks.world == 1 and not curvature
            return self.student_block(index, step_at_once if alone else None)

        gain = self.gain.gain
        loss = self._gradients(student, batches, take, tokens)
        table = torch.stack(counts).tolist()
        for name, row in zip(counted, table, strict=True):
            if row[4]:
                raise self._not_finite(name)
        live, fractional, moved, saturated, _ = (sum(column) for column in zip(*table, strict=True))
        self.step_number = number
        self.gain.update(saturated, live)
        total = max(1, live)
        self._moved = moved / total
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

    def _take_scale_step(self, batches: Sequence[Prepared], tokens: int | None) -> StepRecord:
        """Move the scales; the codes stay, for `frac` lies at 0 or 1 since the last of the steps before."""
        number = self.step_number + 1
        taken = number - self.config.iters
        lr = scale_lr(self.config, taken)
        if self._moved is None:
            self._moved = self._share_moved()
        opened: set[int] = set()
        finite: list[Tensor] = []
        names: list[str] = []

        def take(index: int, grads: dict[str, Tensor]) -> None:
            refs = self.chain.weights[index]
            self._refuse_not_finite(refs, grads)
            block = self._open_block(index, opened)
            for state, grad in zip(block.states, take_matrices(refs, grads), strict=True):
                found = scale_gradient(state.grid, state.codes(), grad)
                finite.append(torch.isfinite(found).all())
                names.append(state.name)
                assert state.scale_change is not None
                assert state.scale_momentum is not None
                assert state.scale_second_moment is not None
                scale_step_(
                    state.scale_change, state.scale_momentum, state.scale_second_moment, found, lr=lr, step=taken
                )  # fmt: skip
            self.placement.write_back(index)

        loss = self._gradients(self.student_block, batches, take, tokens)
        for name, good in zip(names, torch.stack(finite).tolist(), strict=True):
            if not good:
                raise self._not_finite(name)
        self.step_number = number
        return StepRecord(number, loss, lr, 0.0, 0.0, 0.0, 0.0, self._moved, 0.0)

    def _share_moved(self) -> float:
        """Return the share of the coordinates that may move on the other side of 1/2 than the anchor."""
        moved = live = 0
        for block in self.placement.homes():
            for state in block.states:
                free = state.live()
                side = decode_frac_ref(state.anchor, torch.float32) > 0.5
                moved += int(((state.position() > 0.5) != side)[free].sum())
                live += int(free.sum())
        return moved / max(1, live)
