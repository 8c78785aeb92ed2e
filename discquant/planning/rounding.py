# SPDX-License-Identifier: Apache-2.0
"""What rounding layer by layer holds: RTN, GPTQ, guided and greedy."""

from __future__ import annotations

from typing import NamedTuple

from discquant.config import QuantizeConfig
from discquant.planning.setting import Setting, logit_tensors
from discquant.planning.shape import Block, Matrix, ModelShape
from discquant.planning.traffic import boundary_bytes

BOUNDARIES = "boundary activations"
MASKS = "masks of attention"

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


def gptq_bytes(block: Block) -> float:
    """Return what GPTQ of one block holds at most, in bytes.

    While inputs pass: X^T X of every layer in float64 and one float32 product. While a layer is rounded: its own and
    those of the layers after it, one more for the factor, a slice of rows (float64 twice, codes once) and its codes.
    Those of fused experts stay to the end.
    """
    kept = [8.0 * m.columns**2 * m.count for m in block.matrices]
    peak = sum(kept) + max(4.0 * m.columns**2 for m in block.matrices)
    left = sum(kept)
    for matrix, own in zip(block.matrices, kept, strict=True):
        peak = max(peak, left + gptq_work(matrix))
        if matrix.active == 1:
            left -= own
    return peak


def greedy_bytes(block: Block) -> float:
    """Return what greedy rounding of one block holds: as GPTQ, but one Hessian more and twelve matrices in float64."""
    held = sum(8.0 * m.columns**2 * m.count for m in block.matrices)
    return held + max(8.0 * m.columns**2 + 12 * 8.0 * m.rows * m.columns for m in block.matrices)


def layerwise_items(shape: ModelShape, setting: Setting, method: str) -> dict[str, float]:
    """Return what rounding layer by layer holds besides weights and codes."""
    config, element, largest = setting.config, setting.element, shape.largest
    matrix = max(m.rows * m.columns for m in largest.matrices)
    if method == "rtn":
        return {"positions of one matrix": WIDE_POSITIONS * matrix}
    rows = min(config.gptq_samples, config.data.nsamples) * config.data.seqlen
    # The first block's inputs are kept with the batches; beside them those of the block at work.
    rounding = {
        "hidden states": 2.0 * rows * shape.hidden * element,
        "activations of a block": largest.passing_bytes(element, config.data.seqlen) * setting.micro_tokens,
        MASKS: shape.mask_bytes(element, setting.micro_tokens, config.data.seqlen),
        "a matrix as read": matrix * element if setting.streamed else 0.0,
        "X^T X and its factor": greedy_bytes(largest) if method == "greedy" else gptq_bytes(largest),
    }
    if method != "guided":
        return rounding
    return max(rounding, _energies(shape, setting, rows), key=lambda items: sum(items.values()))


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


def _energies(shape: ModelShape, setting: Setting, rows: int) -> dict[str, float]:
    """Return what measuring the gradients' energies takes beside them, on the device; `rows` in tokens."""
    element, tokens = setting.element, energy_tokens(setting.config)
    seqlen, largest = setting.config.data.seqlen, shape.largest
    saved = largest.saved_bytes(element, setting.accelerator, seqlen)
    back = largest.back_bytes(element, seqlen) * setting.micro_tokens
    logits = float(logit_tensors(shape, setting) * (4 if element < 8 else 8))
    return {
        "hidden states": (1.0 * rows + 3 * tokens) * shape.hidden * element,
        "activations of a block": saved * setting.micro_tokens,
        MASKS: shape.mask_bytes(element, setting.micro_tokens, seqlen),
        "a matrix as read": 1.0 * shape.largest.weights * element if setting.streamed else 0.0,
        "logits": logits,
        "gradients of activations": max(0.0, back - logits),  # when the logits are gone
        "head in float32": head_copy(shape, setting),
        **boundaries(shape, setting, tokens).device,
    }


def head_copy(shape: ModelShape, setting: Setting) -> float:
    """Return the bytes of a copy of the head in float32, which labels are drawn with where it is narrower."""
    return 4.0 * shape.vocab * shape.hidden if setting.element < 4 else 0.0


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
