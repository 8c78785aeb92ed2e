# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `discquant allocate`, which opens a model, reads windows, and measures block by block."""

from __future__ import annotations

import dataclasses

from discquant.config import QuantizeConfig
from discquant.planning.head import label_items, masks
from discquant.planning.heap import heap_items
from discquant.planning.memory import (
    CUBLAS_WORKSPACE,
    LIBRARIES,
    PhasePeak,
    calibrating_items,
    model_items,
    phase_peaks,
    placed,
    reading_items,
    text_items,
)
from discquant.planning.rounding import WIDE_POSITIONS, boundaries, gptq_work, hessian_bytes
from discquant.planning.setting import Setting
from discquant.planning.shape import ModelShape

# Of a matrix's error: codes, and float32 of the weight, of what the codes serve and of their difference.
ERROR_BYTES = 1 + 3 * 4.0


def options(config: QuantizeConfig) -> QuantizeConfig:
    """Return a configuration as its plan takes it: no solve, no files, one window at a time."""
    solver = dataclasses.replace(config.solver, batch_size=1, micro_batch=1, start="ref")
    return dataclasses.replace(config, method="gptq", format="none", baselines=(), solver=solver)


def peaks_of(shape: ModelShape, setting: Setting) -> list[PhasePeak]:
    """Return the peak of each phase of a run, or of `allocate`: open, calibrate, allocate."""
    if setting.allocating is None:
        return phase_peaks(shape, setting)
    config, data = setting.config, setting.config.data
    device, held = model_items(shape, setting)
    at_device, at_host = reading_items(shape, setting)
    peaks = [placed("open", setting, device | at_device, held | at_host, {})]
    text, lists = text_items(config)
    held |= text | {"windows": data.nsamples * data.seqlen * 8.0}
    if setting.accelerator:
        held["GPU libraries"], device["cuBLAS workspace"] = LIBRARIES, CUBLAS_WORKSPACE
    drawn = calibrating_items(shape, setting)
    peaks.append(placed("calibrate", setting, device | drawn, held | lists, {}))
    kept = boundaries(shape, setting, data.nsamples * data.seqlen)
    layers = sum(m.count for block in shape.blocks for m in block.matrices)
    # What is measured is kept in memory, and written whole after each block beside what was written before.
    measured = 8.0 * setting.allocating.choices * data.nsamples * layers
    moment = max(_moments(shape, setting, bool(kept.device)), key=lambda items: sum(items.values()))
    # What stays is no work of the C library's heap.
    brief = {name: size for name, size in moment.items() if name != "hidden states"}
    found = placed(
        "allocate",
        setting,
        device | moment | kept.device | heap_items(shape, setting, brief),
        held | kept.host | {"what is measured": measured},
        kept.disk | {"OUT.unfinished (two)": 2 * (measured + held["windows"])},
    )
    return [*peaks, found]


def _moments(shape: ModelShape, setting: Setting, here: bool) -> list[dict[str, float]]:
    """Return what may be the most that measuring holds beside the model, by item.

    Forward through a block, labels drawn behind the last, the errors of a block, its gradients.

    Args:
        shape: The model's sizes.
        setting: Of the work.
        here: Whether block inputs are kept where the blocks run; then they are among those.
    """
    assert setting.allocating is not None
    element, largest, tokens = setting.element, shape.largest, setting.config.data.seqlen
    row = float(setting.config.data.nsamples * tokens * shape.hidden * element)
    matrix = float(max(m.rows * m.columns for m in largest.matrices))
    own = float(largest.weights * element) if setting.streamed else 0.0
    candidates = 2.0 * setting.allocating.choices * largest.weights
    # Embeddings stay with the windows. Kept here they are the first block's inputs, and of all inputs there is one
    # more than blocks: what a block gives, or the gradients. Kept elsewhere, a block's inputs come beside the next's.
    copied = here and setting.boundaries != "resident"
    passing, pulled = (0.0, 0.0) if here and not copied else (3 * row, 4 * row)
    hessians = hessian_bytes(largest) if setting.allocating.hessians else 0.0
    rounding = max(gptq_work(m) for m in largest.matrices) if setting.allocating.hessians else 0.0
    wide = 4.0 if element < 4 else 0.0
    forward = {
        "hidden states": passing,
        "activations of a block": largest.passing_bytes(element, tokens) * tokens,
        **masks(shape, setting),
        "a block as read": own,
    }
    head = {
        "hidden states": passing + (0.0 if passing else row),
        **label_items(shape, setting),
    }
    errors = {
        "hidden states": pulled,
        "a block as read": own,
        "errors of a block": candidates,
        "X^T X and its factor": hessians + rounding,
        "a matrix's error": max(WIDE_POSITIONS, ERROR_BYTES + (element if setting.streamed else 0)) * matrix,
    }
    gradients = {
        "hidden states": pulled,
        "a block as read": own,
        "errors of a block": candidates,
        "gradient of a block": float(largest.weights * element),
        "a matrix's error": (4.0 + wide) * matrix,
        "activations of a block": largest.saved_bytes(element, setting.accelerator, tokens) * tokens,
        "gradients of activations": largest.back_bytes(element, tokens) * tokens,
        **masks(shape, setting),
    }
    return [forward, head, errors, gradients]
