# SPDX-License-Identifier: Apache-2.0
"""A whole solve in memory: grids, start, steps, records. What a run directory wraps with checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from discquant.config import GridConfig, GridOf, GridRules, QuantizeConfig, SolverConfig
from discquant.grids import Grid, place_grid
from discquant.grids.fused import FUSED
from discquant.solver.calibrate import calibrate_gain, published_gain
from discquant.solver.chain import Chain
from discquant.solver.codes import NearestCodes, StateCodes, StateGrids
from discquant.solver.curvature import Factors, kronecker_factors, rows_at_once
from discquant.solver.engine import Engine
from discquant.solver.kronecker import pack_triangles, triangle_trace
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.measure import mean_kl, served_weights
from discquant.solver.rows import TokenRows, row_order
from discquant.solver.sampled import label_generator
from discquant.solver.schedule import GainControl, resolve
from discquant.solver.solver import Solver, StepRecord
from discquant.solver.state import Kept, WeightState
from discquant.solver.usage import unseen_experts
from discquant.solver.weight_ref import WeightRef

# Placement policy: what may be kept instead of recomputed. Neither changes a bit of the result.
KEEP_GRAPH_BYTES = 3 << 30
KEEP_TEACHER_BYTES = 1 << 30
START_KL_ROWS = 32

OnStep = Callable[[Solver, StepRecord], None]


def lay_grids(chain: Chain, config: GridConfig | GridOf) -> dict[str, Grid]:
    """Lay a grid on every weight of the chain; by module name, on the CPU.

    `config` is one for all, or says which one by the module's name (`QuantizeConfig.grid_of`). NVFP4 has one global
    scale per matrix, but engines keep one for all that they fuse (q, k and v, say) and take the block scales as they
    are: those matrices get the same.

    Raises:
        ValueError: A weight is not finite; the message names it.
    """
    of = GridRules(config) if isinstance(config, GridConfig) else config
    grids: dict[str, Grid] = {}
    for refs in chain.weights:
        largest = _largest_fused([ref for ref in refs if of(ref.name).kind == "nvfp4"])
        for ref in refs:
            grids[ref.name] = lay_grid(ref, of(ref.name), largest=largest.get(ref.name))
    return grids


def _largest_fused(refs: Sequence[WeightRef]) -> dict[str, float]:
    """Largest magnitude of the matrices that an engine fuses with a weight of this block, by the weight's name.

    Raises:
        ValueError: A weight is not finite; the message names it.
    """
    fused: dict[tuple[str, int], list[str]] = {}
    own: dict[str, float] = {}
    for ref in refs:
        parent, _, last = ref.name.rpartition(".")
        for number, members in enumerate(FUSED):
            if last in members:
                own[ref.name] = float(ref.matrix().abs().max())
                if not math.isfinite(own[ref.name]):
                    raise ValueError(f"{ref.name}.weight: must be finite, got NaN or Inf")
                fused.setdefault((parent, number), []).append(ref.name)
    return {name: max(own[other] for other in names) for names in fused.values() for name in names}


def lay_grid(
    ref: WeightRef, config: GridConfig, rows: int | None = None, *, largest: float | None = None
) -> Grid:
    """Lay a grid on one weight, or on its first `rows` rows; on the CPU. `largest` as for `place_grid`.

    Raises:
        ValueError: The weight is not finite; the message names it.
    """
    try:
        return place_grid(ref.matrix()[:rows], config, largest=largest).to(torch.device("cpu"))
    except ValueError as error:
        raise ValueError(f"{ref.name}.weight: {error}") from error


def start_positions(
    chain: Chain,
    grids: Mapping[str, Grid],
    config: SolverConfig,
    codes: Mapping[str, Tensor] | None,
    seed: int,
) -> Iterator[list[Tensor | None]]:
    """Yield, block by block, where `frac` starts for each weight (None is the original weight).

    random: uniform in [0, 1), seeded.  gptq: half-way between the original position (cut to [0, 1]) and
    the neighbour on the side of GPTQ's code.
    """
    generator = torch.Generator().manual_seed(seed + 17)
    for refs in chain.weights:
        starts: list[Tensor | None] = []
        for ref in refs:
            if config.start == "random":
                starts.append(torch.rand(ref.shape, generator=generator).to(chain.device))
            elif config.start == "gptq":
                assert codes is not None
                q_down, frac_ref = grids[ref.name].to(chain.device).neighbours(ref.matrix())
                side = (codes[ref.name].to(chain.device).int() - q_down.int()).clamp(0, 1).float()
                starts.append(0.5 * frac_ref.clamp(0, 1) + 0.5 * side)
            else:
                starts.append(None)
        yield starts


def activation_bytes(chain: Chain, tokens: int) -> int:
    """Estimate what autograd keeps for all blocks: three float32 copies of every linear output."""
    outputs = sum(
        ref.parameter.shape[0] if ref.part is None else ref.part.end - ref.part.begin
        for refs in chain.weights
        for ref in refs
    )
    return outputs * tokens * 4 * 3


class Solve:
    """One DiscQuant solve; `advance` takes one step, so the owner decides when to checkpoint or stop."""

    def __init__(
        self,
        chain: Chain,
        grids: Mapping[str, Grid],
        rows: TokenRows,
        config: QuantizeConfig,
        *,
        served: torch.dtype | None = None,
        fresh: bool = True,
        start_codes: Mapping[str, Tensor] | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Build the state and set the gain.

        Args:
            chain: Model.
            grids: Grid of each weight, on the CPU. Where the state lives in memory of the host or on disk, they become
                views of it: scales exist once. They then keep it alive; `Grid.copied` parts them.
            rows: Calibration rows.
            config: The run's configuration.
            served: See `Solver`.
            fresh: False when a checkpoint will overwrite state and gain.
            start_codes: GPTQ's codes if they are known already.
            engine: Where state and activations live, and who else takes part; its device is the chain's.
        """
        self.engine = engine or Engine(device=chain.device)
        self.chain, self.rows, self.config = chain, rows, config
        if self.engine.device != chain.device:
            raise ValueError(
                f"Solve: the chain must be on the engine's device = {self.engine.device}, got {chain.device}"
            )
        self.served = served or torch.float32
        options = config.solver
        tokens = options.batch_size * int(rows.input_ids[0].numel())
        hidden = chain.head.weight.shape[1] if chain.head is not None else 0
        remember = options.steps * options.batch_size > len(rows) and options.loss == "kl"
        remember = remember and 0 < len(rows) * rows.input_ids.shape[1] * hidden * 4 <= KEEP_TEACHER_BYTES
        # Where the solve started from; also the GPTQ baseline. A resumed run brings those of its beginning.
        self.start_codes = start_codes
        # As the steps run: with other kernels for attention the teacher would differ from the student by them alone.
        with self.engine.reproducible():
            if remember and options.teacher_source == "weights":
                rows.remember_teacher()
            self.unseen = unseen_experts(chain, rows.stream())
            if options.start == "gptq" and start_codes is None:
                self.start_codes = self.gptq_codes(grids)
            if None in (options.lr, options.lr_floor, options.curvature, options.linear_until):
                options = self.engine.ranks.share(resolve(options, self._start_kl(grids)))
        wide = torch.float64 if options.compute_dtype == "float64" else torch.float32
        placement = self.engine.placement()
        kept: Kept = "state" if options.teacher_source == "state" else "none"
        if kept == "none" and (placement.where != "resident" or chain.lazy):
            kept = "weights"
        for refs, starts in zip(
            chain.weights,
            start_positions(chain, grids, options, self.start_codes, config.seed),
            strict=True,
        ):
            # One block at a time: its original weights and its wide intermediates are gone before the next.
            placement.add(
                [
                    WeightState(
                        ref.name,
                        grids[ref.name].to(chain.device),
                        ref.matrix(),
                        start,
                        anchored=options.start == "gptq",
                        frozen=ref.name in self.unseen,
                        state=options.state,
                        optimizer=options.optimizer,
                        wide=wide,
                        kept=kept,
                        curvature_width=options.curvature_width if options.curved and ref.has_factors else 0,
                        scales=options.scale_iters > 0,
                    )
                    for ref, start in zip(refs, starts, strict=True)
                ]
            )
            for state in placement.home(len(placement) - 1).states:
                if state.frac.device.type == "cpu":
                    grids[state.name].share_(state.grid)
        boundaries = self.engine.boundary_store(placement)
        # Boundaries that live elsewhere come back as copies, which no kept graph leads to.
        keep = placement.where == boundaries.where == "resident"
        keep = keep and activation_bytes(chain, tokens) <= KEEP_GRAPH_BYTES
        self.solver = Solver(
            chain,
            placement,
            options,
            seed=config.seed,
            keep_graph=keep,
            served=served,
            boundaries=boundaries,
            ranks=self.engine.ranks,
        )
        self._order = row_order(len(rows), config.seed)
        self._rows: list[int] = []  # of a step that has begun; a step that fails does not use them up
        with self.engine.reproducible():
            if remember and options.teacher_source == "state":
                rows.remember_teacher(self.solver.teacher)
            if options.curved:
                self._gather_curvature()
        if fresh:
            self._set_gain(grids)

    def gptq_codes(self, grids: Mapping[str, Grid]) -> Mapping[str, Tensor]:
        """Return GPTQ's codes on the first `gptq_samples` rows."""
        count = min(self.config.gptq_samples, len(self.rows))
        return layerwise_codes(
            self.chain,
            grids,
            self.rows.batches(range(count)),
            "gptq",
            damp=self.config.gptq_damp,
            served=self.served,
            strict=False,
        )

    def _start_kl(self, grids: Mapping[str, Grid]) -> float:
        """Return the mean KL of the starting codes (nearest, unless it starts from GPTQ's) on the first rows."""
        codes = self.start_codes or NearestCodes(self.chain, grids)
        dtype = getattr(torch, self.config.solver.compute_dtype)
        served = served_weights(self.chain, grids, codes, self.served, dtype)
        return mean_kl(self.chain, served, self.rows.batches(range(min(START_KL_ROWS, len(self.rows)))))

    def _gather_curvature(self) -> None:
        """Fill the factors of all states."""
        options, placement = self.config.solver, self.solver.placement
        count = min(options.curvature_samples, len(self.rows))
        generator = label_generator(self.chain.device, self.config.seed + 29)

        def add(index: int, found: Mapping[str, Factors]) -> None:
            for state in placement.home(index).states:
                factors = found.get(state.name)
                if factors is not None and state.curvature_in is not None and state.curvature_out is not None:
                    state.curvature_in += pack_triangles(factors.inputs).to(state.curvature_in)
                    state.curvature_out += pack_triangles(factors.outputs).to(state.curvature_out)

        size = rows_at_once(count, options.batch_size)
        for begin in range(0, count, size):
            rows = range(begin, min(begin + size, count))
            kronecker_factors(
                self.chain,
                self.rows.batches(rows),
                add,
                total=self.rows.tokens(range(count), options.loss),
                width=options.curvature_width,
                generator=generator,
                teacher=self.solver.teacher,
                boundaries=self.solver.boundaries,
            )
        for index in range(len(placement)):
            for state in placement.home(index).states:
                if state.curvature_in is not None and state.curvature_out is not None:
                    energy = triangle_trace(state.curvature_out)
                    state.curvature_in /= torch.where(
                        energy == 0, 1.0, energy
                    )  # of no gradient both are zero
        placement.changed_at_home()

    def _set_gain(self, grids: Mapping[str, Grid]) -> None:
        options = self.config.solver
        if options.kl_weight is not None:
            self.solver.gain = GainControl(published_gain(self.chain, grids, options.kl_weight), None)
            return
        batches = self.rows.batches(range(min(options.batch_size, len(self.rows))))
        with self.engine.reproducible():
            gain = GainControl(calibrate_gain(self.solver, batches), options.saturation)
        # Every rank has computed it alike; one value all the same, should their libraries differ.
        self.solver.gain = self.engine.ranks.share(gain)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.solver.step_number >= self.config.solver.steps

    def advance(self) -> StepRecord:
        """Take the next step."""
        options = self.config.solver
        rows = self._rows = self._rows or [next(self._order) for _ in range(options.batch_size)]
        size = options.micro_batch
        mine = self.engine.ranks.span(-(-len(rows) // size))
        batches = self.rows.batches(rows[mine.start * size : mine.stop * size])
        with self.engine.reproducible():
            record = self.solver.step(batches, self.rows.tokens(rows, options.loss))
        self._rows = []
        return record

    def skip_rows(self, steps: int) -> None:
        """Begin the row order anew, past `steps` steps that a checkpoint already holds."""
        self._order = row_order(len(self.rows), self.config.seed)
        for _ in range(steps * self.config.solver.batch_size):
            next(self._order)

    def codes(self) -> dict[str, Tensor]:
        """Return the rounded codes by module name."""
        return dict(self.coded())

    def coded(self) -> Mapping[str, Tensor]:
        """Return the same without holding them: computed from the state whenever they are asked for."""
        self.solver.check()
        return StateCodes(self.solver.placement)

    def grids(self) -> Mapping[str, Grid]:
        """Return the grids that codes are served on by module name: scales where they have moved to, on the CPU."""
        self.solver.check()
        return StateGrids(self.solver.placement)

    def close(self) -> None:
        """Stop copies, leave no files of the placement behind; states at home stay readable."""
        self.solver.boundaries.close()
        self.solver.placement.close()


def solve(
    chain: Chain,
    grids: Mapping[str, Grid],
    rows: TokenRows,
    config: QuantizeConfig,
    on_step: OnStep | None = None,
    *,
    served: torch.dtype | None = None,
    engine: Engine | None = None,
) -> Solve:
    """Run all steps; the result holds the states and the codes."""
    run = Solve(chain, grids, rows, config, served=served, engine=engine)
    while not run.done:
        record = run.advance()
        if on_step is not None:
            on_step(run.solver, record)
    return run
