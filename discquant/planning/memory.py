# SPDX-License-Identifier: Apache-2.0
"""Peak memory of each phase on the device, the host and the disk, item by item (memory.md section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from discquant.config import QuantizeConfig
from discquant.planning.shape import Block, ModelShape
from discquant.planning.traffic import StateLayout, grid_bytes_per_weight, state_layout

Placement = Literal["resident", "host", "disk"]
PLACEMENTS: tuple[Placement, ...] = ("resident", "host", "disk")
SLOTS = 3  # one block arriving, one at work, one leaving
CHUNK = 1024  # tokens whose logits exist at once
EVALUATION_ROWS, EVALUATION_LOGITS = 8, 1 << 28  # of evaluation.divergence, a layer above


@dataclass
class PhasePeak:
    """Peak of one phase in bytes, by item; on a machine without an accelerator everything is on the host."""

    name: str
    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)

    def total(self, where: str) -> float:
        """Return the sum of "gpu", "host" or "disk"."""
        items: Mapping[str, float] = getattr(self, where)
        return float(sum(items.values()))


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
        experts: The model has fused experts, which block-wise loading does not read.
    """

    config: QuantizeConfig
    placement: Placement = "resident"
    accelerator: bool = False
    element: int = 4
    process: float = 0.0
    stored: int = 2
    experts: bool = False

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
        return not self.streamed or self.experts or self.config.data.dataset == "self"

    @property
    def layout(self) -> StateLayout:
        """Bytes per weight of the state."""
        solver = self.config.solver
        return state_layout(
            solver.state,
            solver.optimizer,
            self.config.grid.bits,
            both=self.teacher_in_state and solver.start == "gptq",
            weight=float(self.stored) if self.streamed and not self.teacher_in_state else 0.0,
        )

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.config.solver.batch_size * self.config.data.seqlen

    @property
    def micro_tokens(self) -> int:
        """Tokens per forward pass."""
        return min(self.config.solver.micro_batch, self.config.solver.batch_size) * self.config.data.seqlen


def grid_share(shape: ModelShape, config: QuantizeConfig) -> float:
    """Return bytes of scales and zero points per weight, on average over the model."""
    grid = config.grid
    total = sum(
        matrix.weights * grid_bytes_per_weight(grid.group_size, matrix.columns, grid.sym)
        for block in shape.blocks
        for matrix in block.matrices
    )
    return total / max(1, shape.weights)


def keeps_graph(shape: ModelShape, setting: Setting) -> bool:
    """Return whether the engine keeps the activations of all blocks instead of recomputing each (its own rule)."""
    from discquant.solver.solve import KEEP_GRAPH_BYTES

    outputs = sum(m.rows * m.count for block in shape.blocks for m in block.matrices)
    return setting.placement == "resident" and outputs * setting.tokens * 4 * 3 <= KEEP_GRAPH_BYTES


def remembers_teacher(shape: ModelShape, setting: Setting) -> bool:
    """Return whether the engine keeps the teacher's last hidden state of every row (its own rule)."""
    from discquant.solver.solve import KEEP_TEACHER_BYTES

    options, data = setting.config.solver, setting.config.data
    repeats = options.iters * options.batch_size > data.nsamples and options.loss == "kl"
    return repeats and data.nsamples * data.seqlen * shape.hidden * 4 <= KEEP_TEACHER_BYTES


def gptq_bytes(block: Block) -> float:
    """Return what GPTQ of one block holds: X^T X of every layer in float64, and the work on the largest.

    On the largest layer: five further [columns, columns] and four [rows, columns] in float64 (a damped and permuted
    copy, its factor, inverse and inverse factor; positions, codes, scales and zero points).
    """
    held = sum(8.0 * m.columns**2 * m.count for m in block.matrices)
    work = max(5 * 8.0 * m.columns**2 + 4 * 8.0 * m.rows * m.columns for m in block.matrices)
    return held + work


def _logit_tensors(shape: ModelShape, setting: Setting) -> float:
    """Return entries of all tensors over the vocabulary that exist at once in the head: 2 on a device, 10 here."""
    from discquant.solver.losses import head_chunk

    if setting.accelerator:
        return 2.0 * min(CHUNK, setting.micro_tokens) * shape.vocab
    return 10.0 * min(head_chunk(shape.vocab, torch.device("cpu")), setting.micro_tokens) * shape.vocab


def _working(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """What one step needs besides state and weights."""
    largest, element, tokens = shape.largest, setting.element, setting.tokens
    keep = keeps_graph(shape, setting)
    depth = len(shape.blocks)
    wide = 4 if element < 8 else 8
    saved = largest.saved_elements * element
    # The teacher's weights are made beside the student's, unless the loaded model is the teacher.
    sides = 2 if setting.teacher_in_state or setting.streamed else 1
    students = depth if keep else 1
    # Micro-batches are summed in float32 (the GPU kernels accumulate in place).
    summed = setting.tokens > setting.micro_tokens or element < wide
    gradient = float(wide + (element if summed and not setting.accelerator else 0))
    return {
        "student and teacher weights": float(sides + students - 1) * largest.weights * element,
        "weight gradient": gradient * largest.weights,
        "activations of a block": saved * (tokens * depth if keep else setting.micro_tokens),
        "hidden states": 4.0 * tokens * shape.hidden * element,
        "logits": _logit_tensors(shape, setting) * wide,
    }


def phase_peaks(shape: ModelShape, setting: Setting) -> list[PhasePeak]:
    """Return the peak of each phase: open, calibrate, grid, teacher, start, solve, export, evaluate, in that order.

    `teacher` and `start` are there where the run has them: the teacher's last hidden states remembered, GPTQ.
    """
    config, layout, element = setting.config, setting.layout, setting.element
    grid = grid_share(shape, config)
    weights, largest = float(shape.weights), shape.largest
    matrix = max(m.rows * m.columns for m in largest.matrices)
    frozen = shape.untouched * float(element)
    own = weights * element if setting.whole_model else 0.0
    grids, state = weights * grid, weights * layout.total
    windows = config.data.nsamples * config.data.seqlen * 8.0
    slots = SLOTS * largest.weights * (layout.total + grid)
    boundaries = float((len(shape.blocks) + 1) * setting.tokens * shape.hidden * element)
    teacher = (
        config.data.nsamples * config.data.seqlen * shape.hidden * 4.0
        if remembers_teacher(shape, setting)
        else 0.0
    )
    started = config.method == "discquant" and config.solver.start == "gptq"
    codes = weights if started else 0.0
    device: dict[str, float] = {"frozen parameters": frozen}
    held: dict[str, float] = {"process": setting.process}
    stored: dict[str, float] = {}
    if setting.whole_model:
        device["original weights"] = own

    def peak(name: str, at_device: dict[str, float], at_host: dict[str, float]) -> PhasePeak:
        on_device, on_host = {**device, **at_device}, {**held, **at_host}
        if not setting.accelerator:
            return PhasePeak(name, {}, {**on_host, **on_device}, dict(stored))
        return PhasePeak(name, on_device, on_host, dict(stored))

    peaks = [peak("open", {"largest matrix as read": matrix * (shape.file_bytes + element)}, {})]
    sampled = config.data.dataset == "self"
    # Rows are sampled side by side within a cache of this size (calibration.sampling.CACHE_BYTES).
    cache = 2.0 * largest.saved_elements * setting.micro_tokens + 256.0 * shape.vocab * 12 if sampled else 0.0
    peaks.append(peak("calibrate", {"sampling": cache}, {"windows": windows}))
    held["windows"] = windows
    (held if setting.accelerator and setting.placement != "resident" else device)["scales"] = grids
    peaks.append(peak("grid", {"searching scales": 6 * 4.0 * matrix}, {}))
    if config.method == "discquant" and teacher:
        # All rows enter, pass block by block, and are joined: each time two sets exist beside the result.
        passing = {
            "hidden states": 2 * teacher,
            "activations of a block": largest.saved_elements * element * setting.micro_tokens,
        }
        peaks.append(peak("teacher", {**passing, "teacher's last hidden states": teacher}, {}))
        device["teacher's last hidden states"] = teacher
    if started or config.method in ("gptq", "greedy"):
        rows = min(config.gptq_samples, config.data.nsamples) * config.data.seqlen
        extra = {
            "hidden states": 2.0 * rows * shape.hidden * element,
            "activations of a block": largest.saved_elements * element * setting.micro_tokens,
            "X^T X and its factor": gptq_bytes(largest),
        }
        peaks.append(peak("start", extra, {"codes": weights}))
    if config.method == "discquant":
        held["codes at the start"] = codes
        work = _working(shape, setting)
        where = {"resident": device, "host": held, "disk": stored}[setting.placement]
        where["state"] = state
        if setting.placement == "disk":
            stored["boundary activations"] = boundaries
        if setting.placement == "resident" or not setting.accelerator:
            work["boundary activations"] = boundaries if setting.placement != "disk" else 0.0
        elif setting.placement == "host":
            held["boundary activations"] = boundaries
        if setting.placement != "resident":
            work["block slots"] = slots
        stored["checkpoints (two)"] = 2 * weights * layout.written
        peaks.append(peak("solve", work, {}))
        held.pop("boundary activations", None)
        stored.pop("boundary activations", None)
    bits = config.grid.bits / 8.0
    stored["exported model"] = weights * (bits + grid) + shape.untouched * float(shape.file_bytes)
    peaks.append(peak("export", {}, {"codes": weights, "one layer packed": matrix * (2 + bits)}))
    row = config.data.seqlen * shape.vocab
    # The original's logits, the candidate's, and those of its positions that count.
    logits = 3.0 * min(EVALUATION_ROWS, max(1, EVALUATION_LOGITS // row)) * row * element
    copied = weights * element if setting.whole_model else 2.0 * largest.weights * element
    baselines = sum(1 for name in config.baselines if name not in ("gptq" if started else "", config.method))
    peaks.append(
        peak(
            "evaluate",
            {"a candidate's weights": copied, "logits of both": logits},
            {"codes": weights * (1 + baselines)},
        )
    )
    return peaks


def needed(peaks: list[PhasePeak], where: str) -> float:
    """Return the largest peak of any phase on "gpu", "host" or "disk"."""
    return max(peak.total(where) for peak in peaks)
