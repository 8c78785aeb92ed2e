# SPDX-License-Identifier: Apache-2.0
"""What comparing a candidate with the original holds (`evaluation.divergence`, a layer above)."""

from __future__ import annotations

from discquant.planning.head import MASKS
from discquant.planning.setting import Setting
from discquant.planning.shape import ModelShape

# Windows and logits at once, logits compared at once in float64.
EVALUATION_ROWS, EVALUATION_LOGITS, EVALUATION_CHUNK = 8, 1 << 28, 1 << 24
COMPARED = 5 * 8.0 + 1  # float64: two log-probabilities, probabilities, two products of them; a mask


def windows_compared(shape: ModelShape, setting: Setting) -> int:
    """Return how many windows pass both models at once."""
    return min(EVALUATION_ROWS, max(1, EVALUATION_LOGITS // (setting.config.data.seqlen * shape.vocab)))


def compared_bytes(shape: ModelShape, setting: Setting) -> float:
    """Return the bytes of one model's logits of these windows."""
    tokens = windows_compared(shape, setting) * setting.config.data.seqlen
    return 1.0 * tokens * shape.vocab * setting.element


def measuring_items(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Return what comparing one candidate with the original holds besides the original and the codes."""
    element, row = setting.element, setting.config.data.seqlen * shape.vocab
    windows = windows_compared(shape, setting)
    copied = float(shape.weights) if setting.whole_model else 2.0 * shape.largest.weights
    tokens, seqlen = windows * setting.config.data.seqlen, setting.config.data.seqlen
    passing = shape.largest.passing_bytes(element, seqlen) * tokens
    weights = {"a candidate's weights": (copied + shape.untouched) * element}
    # The candidate's forward pass beside the original's logits; then both, those that count, and what compares them.
    forward = {
        "logits of both": 2.0 * windows * row * element,
        "activations of a block": passing,
        MASKS: shape.mask_bytes(element, tokens, seqlen),
    }
    compared = {
        "logits of both": 3.0 * windows * row * element + COMPARED * min(EVALUATION_CHUNK, windows * row)
    }
    return weights | max(forward, compared, key=lambda items: sum(items.values()))
