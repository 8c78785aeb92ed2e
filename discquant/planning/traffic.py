# SPDX-License-Identifier: Apache-2.0
"""Work, bytes moved and time of one optimizer step (memory.md sections 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from discquant.config import GridConfig, QuantizeConfig
from discquant.planning.hardware import Device
from discquant.planning.shape import Block, Matrix, ModelShape

# 2 FLOP per weight and token for each: teacher, student; recompute, input gradient, weight gradient.
FORWARD_FLOP, BACKWARD_FLOP = 4, 6
# Causal attention costs 2 s d per token forward; its backward 2.5 times that (scores are computed again).
ATTENTION_FORWARD, ATTENTION_BACKWARD = 4, 7
HEAD_FLOP = 6
# By code width: shares of weights more than half a step beyond a searched grid's ends.
OUTLIER_SHARES = {2: 0.06, 3: 0.022, 4: 0.0100, 5: 0.0055, 6: 0.005, 7: 0.0012, 8: 0.001}

SCALE_BYTES = 12.0  # of a group: what moves its scale
# Scales and minima of a group, by kind: float32 beside the block scales of a file where those are narrower.
GROUP_BYTES = {
    "nf4": 4.0, "mxfp4": 5.0, "nvfp4": 5.0, "q4_0": 2.0, "q4_1": 4.0, "q5_0": 2.0, "q5_1": 4.0,
    "iq4_nl": 4.0, "iq4_xs": 4.0, "q2_k": 8.0, "q3_k": 4.0, "q4_k": 8.0, "q5_k": 8.0, "q6_k": 4.0,
}  # fmt: skip


@dataclass(frozen=True)
class StateLayout:
    """Bytes per weight of the solver's state.

    Attributes:
        name: For tables.
        code: Lower neighbour.
        frac_ref: Original position.
        frac: Current position.
        moments: Optimizer state.
        side: What the linear term prefers, where that is not the original position and both are kept.
        weight: The original weight, where it travels with the state.
        outliers: Weights beyond the range of an 8-bit `frac_ref`, kept beside it.
        scales: What moves the scales.
    """

    name: str
    code: float
    frac_ref: float
    frac: float
    moments: float
    side: float = 0.0
    weight: float = 0.0
    outliers: float = 0.0
    scales: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.moments + self.side + self.scales

    @property
    def forward(self) -> float:
        """What the forward pass needs: teacher and student."""
        return self.code + self.frac_ref + self.frac + self.weight + self.outliers

    @property
    def written(self) -> float:
        """What a step changes."""
        return self.frac + self.moments + self.scales


def outlier_bytes(grid: GridConfig, state: str) -> float:
    """Return expected bytes per weight of what a searched scale clips too far for `frac_ref` in u8; 0 without any.

    Place in a byte, value in bfloat16, and a byte for every piece of the matrix; shares measured on normal weights,
    groups of 32 to the row (those of a Student's t of 5 degrees are alike).
    """
    if (
        state != "u8" or grid.grid != "search" or grid.kind in ("nf4", "mxfp4", "nvfp4", "iq4_nl", "iq4_xs")
    ):  # tables: one in a thousand
        return 0.0
    from discquant.ops.reference.place_outliers import OUTLIER_PIECE

    return 3.0 * OUTLIER_SHARES[grid.bits] + 1.0 / OUTLIER_PIECE


def scale_bytes(grid: GridConfig, config: QuantizeConfig) -> float:
    """Return bytes per weight of what moves the scales; 0 where they stay, or there is one per row, next to nothing."""
    size = grid.group_size
    moves = config.method == "discquant" and config.solver.scale_iters > 0 and size > 0
    return SCALE_BYTES / size if moves else 0.0


def code_bytes(bits: int, state: str) -> float:
    """Return bytes of a code as a state holds it: two to a byte in u8, up to 4 bits wide."""
    return 0.5 if state == "u8" and bits <= 4 else 1.0


def state_layout(
    state: str,
    optimizer: str,
    bits: int,
    *,
    both: bool = False,
    weight: float = 0.0,
    outliers: float = 0.0,
    scales: float = 0.0,
) -> StateLayout:
    """Return bytes per weight of a state format and optimizer.

    u8: code in 4 bits up to 4 bits wide, one byte each for the rest.  fp32, bf16: one byte for the code, 4 or 2 for the
    rest.

    Args:
        state: Format.
        optimizer: Decides the moments.
        bits: Code width.
        both: The original position and another one, which the linear term prefers, are kept: one bit more in u8.
        weight: Bytes of the original weight where that travels with the state.
        outliers: As of `outlier_bytes`.
        scales: As of `scale_bytes`.
    """
    size = {"u8": 1.0, "bf16": 2.0, "fp32": 4.0}[state]
    code = code_bytes(bits, state)
    moments = {"sgd": 0, "momentum": 1, "lion": 1, "adamw": 2}[optimizer]
    side = (0.125 if state == "u8" else size) if both else 0.0
    return StateLayout(
        f"{state} {optimizer}", code, size, size, moments * size, side, weight, outliers, scales
    )


def grid_bytes_per_weight(group_size: int, columns: int, sym: bool, kind: str = "uniform") -> float:
    """Return bytes of scales, and of zero points or minima, per weight.

    Uniform: bfloat16 scales, and uint8 zero points of asymmetric grids; other kinds as their grids hold them.
    """
    size = columns if group_size == -1 else min(group_size, columns)
    return GROUP_BYTES.get(kind, 2.0 if sym else 3.0) / size


def factor_entries(matrices: Sequence[Matrix], config: QuantizeConfig) -> float:
    """Return the entries of the curvature's factors of some matrices as whole blocks; 0 without the term."""
    from discquant.solver.kronecker import factor_shape

    if config.method != "discquant" or not config.solver.curved:
        return 0.0
    width = config.solver.curvature_width
    return float(
        sum(
            math.prod(factor_shape(size, width)) * matrix.count
            for matrix in matrices
            if matrix.plain
            for size in (matrix.rows, matrix.columns)
        )
    )


def factor_bytes(blocks: Sequence[Block], config: QuantizeConfig) -> float:
    """Return bytes of the curvature's factors of some blocks, as the state holds them; 0 without the term."""
    from discquant.solver.engine import curvature_bytes

    if config.method != "discquant":
        return 0.0
    return float(
        sum(
            curvature_bytes((matrix.rows, matrix.columns), config.solver) * matrix.count
            for block in blocks
            for matrix in block.matrices
            if matrix.plain
        )
    )


def _curved(shape: ModelShape, config: QuantizeConfig) -> list[tuple[int, int, int, int, int]]:
    """Return rows, columns, the widths of either's factor blocks, and count of each matrix that has factors."""
    if config.method != "discquant" or not config.solver.curved:
        return []
    width = config.solver.curvature_width
    return [
        (m.rows, m.columns, min(m.rows, width), min(m.columns, width), m.count)
        for block in shape.blocks
        for m in block.matrices
        if m.plain
    ]


def curvature_work(shape: ModelShape, config: QuantizeConfig) -> float:
    """Return FLOP per step of G E H, whatever the tokens; 0 without the term."""
    return sum(
        2.0 * rows * columns * (g + h) * count for rows, columns, g, h, count in _curved(shape, config)
    )


def gathering_work(shape: ModelShape, config: QuantizeConfig) -> float:
    """Return FLOP per token of gathering the factors; 0 without the term.

    6 per active weight (forward, forward again, input gradient) and as much attention as those take, the head's
    logits and their gradient, and x x^T and g g^T within their blocks.
    """
    found = _curved(shape, config)
    if not found:
        return 0.0
    scores = 1.0 * config.data.seqlen * shape.attention * len(shape.blocks)
    grams = sum(2.0 * (rows * g + columns * h) * count for rows, columns, g, h, count in found)
    attention = (ATTENTION_FORWARD / 2 + ATTENTION_BACKWARD) * scores
    return 6 * shape.active_weights + attention + 4.0 * shape.head + grams


@dataclass(frozen=True)
class Work:
    """FLOP per token: in the blocks forward and backward, and in the head; `step` is per step, whatever its tokens."""

    forward: float
    backward: float
    head: float
    step: float = 0.0

    @property
    def total(self) -> float:
        """All of it per token."""
        return self.forward + self.backward + self.head


def work_per_token(shape: ModelShape, seqlen: int, *, step: float = 0.0) -> Work:
    """Return FLOP per token: 10 per active weight, causal attention, and 6 V H for the head; `step` is passed on."""
    scores = 1.0 * seqlen * shape.attention * len(shape.blocks)
    return Work(
        FORWARD_FLOP * shape.active_weights + ATTENTION_FORWARD * scores,
        BACKWARD_FLOP * shape.active_weights + ATTENTION_BACKWARD * scores,
        HEAD_FLOP * float(shape.head),
        step,
    )


@dataclass(frozen=True)
class Moved:
    """Bytes moved per step between the host (or disk) and the device."""

    forward_in: float
    backward_in: float
    out: float
    boundaries: float

    @property
    def total_in(self) -> float:
        """Towards the device, boundaries apart."""
        return self.forward_in + self.backward_in


def moved_per_step(
    shape: ModelShape,
    layout: StateLayout,
    tokens: int,
    *,
    grid: float = 0.0,
    factors: float = 0.0,
    element: int = 2,
    offload: bool = True,
    prefix: bool = True,
) -> Moved:
    """Return bytes per step of a streamed model.

    Args:
        shape: The model.
        layout: State.
        tokens: Per step.
        grid: Bytes of scales and zero points per weight, which travel with the codes.
        factors: Bytes of the curvature's factors of the model, which come in and never change.
        element: Bytes per element of computing.
        offload: Whether the student's block inputs leave the device; they go out and come back.
        prefix: The forward pass fetches only what it reads, not the moments.
    """
    weights = float(shape.weights)
    return Moved(
        weights * (layout.forward + grid) if prefix else weights * (layout.total + grid) + factors,
        weights * (layout.total + grid) + factors,
        weights * layout.written,
        boundary_bytes(shape, tokens, element) if offload else 0.0,
    )


def boundary_bytes(shape: ModelShape, tokens: int, element: int) -> float:
    """Return the bytes of the block inputs of a step: they go out, and come back.

    The engine keeps those of every block from the first with weights to quantize on; none of what leaves the last.
    """
    first = next((index for index, block in enumerate(shape.blocks) if block.weights), 0)
    return float((len(shape.blocks) - first) * tokens * shape.hidden * element)


@dataclass(frozen=True)
class HidingTokens:
    """Tokens per step from which transfers hide behind the work.

    forward; backward with both directions at once (duplex), or one after the other (serial, the safe figure).
    """

    forward: float
    duplex: float
    serial: float


def tokens_to_hide(
    shape: ModelShape, layout: StateLayout, device: Device, *, factors: float = 0.0, prefix: bool = True
) -> HidingTokens:
    """Return bytes per weight / (FLOP per weight and token) * FLOP rate / link rate, per device.

    `factors` are bytes of the curvature's factors of the model. Of a mixture of experts every weight is moved and only
    the active ones work, which raises it in proportion.
    """
    ratio = device.flops / device.link * shape.weights / max(1.0, shape.active_weights)
    total = layout.total + factors / max(1, shape.weights)
    return HidingTokens(
        (layout.forward if prefix else total) / FORWARD_FLOP * ratio,
        max(total, layout.written) / BACKWARD_FLOP * ratio,
        (total + layout.written) / BACKWARD_FLOP * ratio,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: work of the passes and the head, transfers, and what the step takes."""

    forward: float
    backward: float
    head: float
    copy_forward: float
    copy_duplex: float
    copy_serial: float
    total: float


def step_time(work: Work, moved: Moved | None, tokens: int, device: Device) -> StepTime:
    """Return the time of a step; each pass takes the longer of its work and its transfers (serial: the safe figure)."""
    forward, backward = (
        work.forward * tokens / device.flops,
        (work.backward * tokens + work.step) / device.flops,
    )
    head = work.head * tokens / device.flops
    if moved is None:
        return StepTime(forward, backward, head, 0.0, 0.0, 0.0, forward + backward + head)
    link = device.link
    ahead = max(moved.forward_in, moved.boundaries) / link
    duplex = max(moved.backward_in + moved.boundaries, moved.out) / link
    serial = (moved.backward_in + moved.out + moved.boundaries) / link
    total = max(forward, ahead) + max(backward, serial) + head
    return StepTime(forward, backward, head, ahead, duplex, serial, total)
