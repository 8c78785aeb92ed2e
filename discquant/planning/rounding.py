# SPDX-License-Identifier: Apache-2.0
"""What rounding layer by layer holds: RTN, GPTQ, guided and greedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from discquant.config import QuantizeConfig
from discquant.planning.head import back_items, label_items, masks
from discquant.planning.setting import Setting
from discquant.planning.shape import Block, Matrix, ModelShape
from discquant.planning.traffic import boundary_bytes

BOUNDARIES = "boundary activations"

WIDE_POSITIONS = (
    6 * 4.0
)  # per weight of a matrix whose neighbours are found: float32 weight, quotient, floor, ...


def gptq_work(matrix: Matrix) -> float:
    """Return what GPTQ of one matrix holds beside its Hessian: the factor, a slice of rows, the codes."""
    from discquant.rounding.gptq import COPIED_COLUMNS, slice_rows

    rows = min(matrix.rows, slice_rows(matrix.columns))
    copied = 2 * 8.0 * matrix.columns * min(matrix.columns, COPIED_COLUMNS)
    work = 8.0 * matrix.columns**2 + max(copied, 17.0 * rows * matrix.columns)
    return work + 1.0 * matrix.rows * matrix.columns


def _hessians(block: Block) -> list[float]:
    """Return the bytes of X^T X by matrix; experts share that of their gate and up projection, which the first has."""
    found, shared = [], set[tuple[int, bool]]()
    for matrix in block.matrices:
        key = (matrix.columns, "down_proj" in matrix.name)
        known = not matrix.plain and key in shared
        found.append(0.0 if known else 8.0 * matrix.columns**2 * matrix.count)
        if not matrix.plain:
            shared.add(key)
    return found


def hessian_bytes(block: Block) -> float:
    """Return what inputs that pass a block leave: X^T X of every layer in float64."""
    return sum(_hessians(block))


def gathering_bytes(block: Block) -> float:
    """Return the same with one product in float32, which is being added."""
    return hessian_bytes(block) + max(4.0 * m.columns**2 for m in block.matrices)


def gptq_bytes(block: Block) -> float:
    """Return what GPTQ of one block holds at most while a layer is rounded, in bytes.

    X^T X of the layer and of those after it, one more for the factor, a slice of rows (float64 twice, codes once) and
    its codes. Those of fused experts stay to the end.
    """
    kept = _hessians(block)
    peak, left = 0.0, sum(kept)
    for matrix, own in zip(block.matrices, kept, strict=True):
        peak = max(peak, left + gptq_work(matrix))
        if matrix.plain:
            left -= own
    return peak


def greedy_bytes(block: Block) -> float:
    """Return what greedy rounding of one block holds: as GPTQ, but one Hessian more and twelve matrices in float64."""
    matrices = block.matrices
    return hessian_bytes(block) + max(8.0 * m.columns**2 + 12 * 8.0 * m.rows * m.columns for m in matrices)


def layerwise_items(shape: ModelShape, setting: Setting, method: str) -> dict[str, float]:
    """Return what rounding layer by layer holds besides weights and codes, at its worst moment."""
    config, element, largest = setting.config, setting.element, shape.largest
    matrix = max(m.rows * m.columns for m in largest.matrices)
    if method == "rtn":
        return {"positions of one matrix": WIDE_POSITIONS * matrix}
    rows = min(config.gptq_samples, config.data.nsamples) * config.data.seqlen
    passing = largest.passing_bytes(element, config.data.seqlen) * setting.micro_tokens
    # The first block's inputs are kept with the batches; beside them those of the block at work.
    always = {
        "hidden states": 2.0 * rows * shape.hidden * element,
        **masks(shape, setting),
        "a matrix as read": matrix * element if setting.streamed else 0.0,
    }
    # Inputs pass a block; it is rounded; they pass it as it is served.
    moments = [
        {"activations of a block": passing, "X^T X and its factor": gathering_bytes(largest)},
        {"X^T X and its factor": greedy_bytes(largest) if method == "greedy" else gptq_bytes(largest)},
        {"activations of a block": passing, "weights as served": 1.0 * largest.weights * element},
    ]
    if method == "guided":
        return max([*({**always, **m} for m in moments), *_energies(shape, setting, rows)], key=_sum)
    return always | max(moments, key=_sum)


def _sum(items: Mapping[str, float]) -> float:
    return sum(items.values())


def energy_items(shape: ModelShape, config: QuantizeConfig) -> dict[str, float]:
    """Return what the energies of the gradients are themselves; they stay with the host."""
    rows = min(config.gptq_samples, config.data.nsamples) * config.data.seqlen
    return {
        "energies of gradients": 4.0
        * rows
        * sum(m.count for b in shape.blocks for m in b.matrices if m.plain)
    }


def energy_tokens(config: QuantizeConfig) -> int:
    """Return how many tokens are taken through the model together where the energies are measured."""
    from discquant.solver.curvature import rows_at_once

    windows = rows_at_once(config.gptq_samples, config.solver.batch_size)
    return min(windows, config.gptq_samples, config.data.nsamples) * config.data.seqlen


def _energies(shape: ModelShape, setting: Setting, rows: int) -> list[dict[str, float]]:
    """Return what measuring the gradients' energies takes beside them, on the device: drawing labels, and back.

    Args:
        shape: The model's sizes.
        setting: Of the run.
        rows: In tokens.
    """
    element, tokens = setting.element, energy_tokens(setting.config)
    always = {
        "hidden states": (1.0 * rows + 3 * tokens) * shape.hidden * element,
        **masks(shape, setting),
        "a matrix as read": 1.0 * shape.largest.weights * element if setting.streamed else 0.0,
        **boundaries(shape, setting, tokens).device,
    }
    return [always | label_items(shape, setting), always | back_items(shape, setting)]


class Kept(NamedTuple):
    """The block inputs of some tokens where they are kept: one of these has an item."""

    device: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]


def boundaries(shape: ModelShape, setting: Setting, tokens: int) -> Kept:
    """Return what the block inputs of `tokens` tokens take; those on the device with what leaves the last block."""
    size = boundary_bytes(shape, tokens, setting.element)
    if setting.boundaries == "disk":
        return Kept({}, {}, {BOUNDARIES: size * setting.ranks})
    if setting.boundaries == "host" and setting.accelerator:
        return Kept({}, {BOUNDARIES: size}, {})
    return Kept(
        {BOUNDARIES: float((len(shape.blocks) + 1) * tokens * shape.hidden * setting.element)}, {}, {}
    )
