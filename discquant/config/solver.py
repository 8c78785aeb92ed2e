# SPDX-License-Identifier: Apache-2.0
"""How DiscQuant solves: its options, and the two presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from discquant.config.checks import check, positive, whole
from discquant.config.grid import GridConfig
from discquant.errors import either

OptimizerName = Literal["adamw", "momentum", "lion", "sgd"]
StateFormat = Literal["fp32", "bf16", "u8"]
TeacherSource = Literal["auto", "weights", "state"]
PresetName = Literal["default", "paper"]
LossName = Literal["kl", "ce", "mse"]
Start = Literal["random", "ref", "gptq"]
ComputeDtype = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class SolverConfig:
    """How DiscQuant solves for `frac`; the defaults are the `default` preset.

    Attributes:
        preset: Name of the preset these values started from (recorded, not interpreted).
        iters: Optimizer steps.
        batch_size: Token windows per step.
        micro_batch: Windows per forward; part of the configuration because it fixes the order of sums.
        lr: Peak learning rate on `frac`, per step, at most 1 (from one neighbour to the other); None sets it from the
            damage at the start (`schedule.resolve`).
        lr_floor: The learning rate never falls below this share of its peak (after warm-up); None sets it so
            that a coordinate can still reach its vertex.
        warmup: Linear warm-up steps.
        optimizer: Update rule of `projected_step_`.
        betas: Moment decays.
        weight_decay: AdamW decay on `frac`; 0 but for the published recipe.
        loss: `kl`, or the paper's variants `ce` (next-token) and `mse` (block outputs).
        start: `random` uniform; `ref`, the original weight; `gptq`, half-way from it to the neighbour on the side of
            GPTQ's code, which the linear term then prefers instead of the nearest.
        grad_clamp: kappa, the element-wise clamp of the KL gradient.
        kl_weight: rho, the gain on the KL gradient; None sets it from the gradients themselves.
        saturation: Share of coordinates whose KL gradient reaches the clamp when kl_weight is None.
        linear_until: Share of the run after which the linear term is dropped (1 keeps it); None sets it by whether
            there is a curvature term (`schedule.resolve`).
        harden_from: Share of the run at which vertex hardening begins (1 never).
        harden_soft: Hardening weight reached at `harden_until`.
        harden_until: Share of the run at which the final, steep hardening begins.
        harden_final: Hardening weight at the end.
        snap_from: Share of the run after which coordinates are set to their vertex, first those nearest to one,
            all of them by the last step, while the others still move (1 leaves it to the last rounding).
        curvature: Weight of the Kronecker-factored curvature term beside the KL gradient, 0 leaves it out; None sets it
            from the damage at the start (`schedule.resolve`). 1 counts each layer's own curvature twice; more holds
            undecided coordinates against the noise of tokens.
        curvature_until: Share of the run over which the term fades out, linearly: while coordinates are driven to their
            vertices it would hold them in the middle.
        curvature_samples: Token windows that the factors are gathered on.
        curvature_width: Channels per diagonal block of a factor; wider layers keep several blocks.
        scale_iters: Steps after `iters`, with the codes fixed, in which the scales move on the loss; 0 keeps the grid
            as it was laid. Uniform grids, q4_0 and q5_0, whose scales are free numbers.
        scale_lr: Their peak learning rate: a step moves a scale by about this share of itself.
        state: Width of the per-weight state.
        compute_dtype: Dtype of the forward and backward passes; a model given in memory brings its own.
        teacher: Where the original weights come from: `weights` as they are, `state` computed from the grid state,
            which needs no second copy of them; `auto` is `state` with u8 state, else `weights`.
    """

    preset: PresetName = "default"
    iters: int = 512
    batch_size: int = 8
    micro_batch: int = 8
    lr: float | None = None
    lr_floor: float | None = None
    warmup: int = 16
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    loss: LossName = "kl"
    start: Start = "gptq"
    grad_clamp: float = 1.0
    kl_weight: float | None = None
    saturation: float = 0.8
    linear_until: float | None = None
    harden_from: float = 0.15
    harden_soft: float = 1.4
    harden_until: float = 0.85
    harden_final: float = 4.0
    snap_from: float = 0.95
    curvature: float | None = None
    curvature_until: float = 1.0
    curvature_samples: int = 256
    curvature_width: int = 512
    scale_iters: int = 0
    scale_lr: float = 2e-3
    state: StateFormat = "fp32"
    compute_dtype: ComputeDtype = "float32"
    teacher: TeacherSource = "auto"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: A field is out of range.
        """
        for name, least in (
            ("iters", 1), ("batch_size", 1), ("micro_batch", 1), ("warmup", 0), ("scale_iters", 0),
        ):  # fmt: skip
            whole(name, least, getattr(self, name))
        for name, least in (("curvature_samples", 1), ("curvature_width", 16)):
            whole(name, least, getattr(self, name))
        for name in ("lr", "kl_weight"):
            positive(name, getattr(self, name))
        small = self.lr is None or self.lr <= 1
        check(
            "lr", "at most 1, for positions lie in [0, 1] and a step moves them by about lr", small, self.lr
        )
        check("scale_lr", "above 0, at most 0.1", 0 < self.scale_lr <= 0.1, self.scale_lr)
        floor = self.lr_floor
        check("lr_floor", "in [0, 1] or None", floor is None or 0 <= floor <= 1, floor)
        check("grad_clamp", "above 0", self.grad_clamp > 0, self.grad_clamp)
        check("saturation", "in (0, 1)", 0 < self.saturation < 1, self.saturation)
        until = self.linear_until
        check("linear_until", "in [0, 1] or None", until is None or 0 <= until <= 1, until)
        shares = (self.harden_from, self.harden_until)
        check("harden_from <= harden_until", "in [0, 1]", 0 <= shares[0] <= shares[1] <= 1, shares)
        check("snap_from", "in [0, 1]", 0 <= self.snap_from <= 1, self.snap_from)
        weight = self.curvature
        check("curvature", "at least 0 or None", weight is None or 0 <= weight < float("inf"), weight)
        check("curvature_until", "in (0, 1]", 0 < self.curvature_until <= 1, self.curvature_until)
        for name, kind in (
            ("optimizer", OptimizerName),
            ("loss", LossName),
            ("start", Start),
            ("state", StateFormat),
            ("preset", PresetName),
            ("teacher", TeacherSource),
            ("compute_dtype", ComputeDtype),
        ):
            value = getattr(self, name)
            check(name, f"one of {either(get_args(kind))}", value in get_args(kind), value)

    @property
    def steps(self) -> int:
        """All steps of a solve: those that choose codes, and those that move scales."""
        return self.iters + self.scale_iters

    @property
    def curved(self) -> bool:
        """Whether the state holds factors of the curvature; None sets its weight above 0."""
        return self.curvature != 0 and self.loss == "kl"

    @property
    def teacher_source(self) -> Literal["weights", "state"]:
        """Where the teacher comes from, `auto` decided; never by where the state lives."""
        if self.teacher == "auto":
            return "state" if self.state == "u8" else "weights"
        return self.teacher


def paper_preset(bits: int, group_size: int) -> SolverConfig:
    """Return the published recipe: AdamW on random start, rho 200, kappa and lr of its table, cosine to 0.

    Source:
        method.md section 3 (the official configuration files); Llama-3.1-8B column without rotation,
        nearest listed group size for others.
    """
    table = {(3, 0): (0.05, 0.5), (3, 64): (0.05, 1.0), (3, 32): (0.1, 0.5)}
    table |= {(4, 0): (0.05, 1.0), (4, 64): (0.05, 1.0), (4, 32): (0.1, 0.5)}
    listed_group = 32 if 0 < group_size <= 32 else 64 if 0 < group_size <= 64 else 0
    lr, kappa = table[(3 if bits <= 3 else 4, listed_group)]
    return SolverConfig(
        preset="paper",
        iters=1024,
        batch_size=8,
        lr=lr,
        lr_floor=0.0,
        warmup=128,
        optimizer="adamw",
        betas=(0.9, 0.999),
        weight_decay=0.01,
        start="random",
        grad_clamp=kappa,
        kl_weight=200.0,
        linear_until=1.0,
        harden_from=1.0,
        harden_soft=0.0,
        harden_until=1.0,
        harden_final=0.0,
        snap_from=1.0,
        curvature=0.0,
        state="bf16",
    )


def preset(name: PresetName, grid: GridConfig) -> SolverConfig:
    """Return the solver configuration of a preset for a grid.

    Raises:
        ValueError: Unknown preset.
    """
    check("preset", f"one of {either(get_args(PresetName))}", name in get_args(PresetName), name)
    return paper_preset(grid.bits, grid.group_size) if name == "paper" else SolverConfig()
