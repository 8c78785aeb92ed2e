# SPDX-License-Identifier: Apache-2.0
"""What the C library keeps of memory that was freed, between tensors that are still there."""

from __future__ import annotations

from collections.abc import Mapping

from discquant.planning.evaluating import compared_bytes
from discquant.planning.head import logit_bytes
from discquant.planning.setting import Setting
from discquant.planning.shape import ModelShape

# glibc serves tensors up to this size from one heap and keeps what was freed between younger ones: by the same runs
# this share of what a phase holds for a moment. Larger ones are maps of their own, which go back at once.
HEAP, HEAP_LIMIT, HEAP_SHARE = "kept by the allocator", 1 << 25, 0.35
OF_WEIGHTS = frozenset(
    (
        "student and teacher weights", "teacher weights", "weight gradient", "another rank's gradient of a matrix",
        "curvature of a matrix", "anchor of a matrix", "bytes to undo a step", "block slots", "factors of a block",
        "positions of one matrix", "state of a block unpacked", "a matrix as read", "X^T X and its factor",
        "a candidate's weights", "weights as served",
    )
)  # fmt: skip


def heap_items(shape: ModelShape, setting: Setting, items: Mapping[str, float]) -> dict[str, float]:
    """Return what the C library keeps between tensors of a phase on a CPU: of activations and of weights it serves."""
    if setting.accelerator:
        return {}
    matrices = shape.largest.matrices
    small = sum(m.weights for m in matrices if m.rows * m.columns * setting.element <= HEAP_LIMIT)
    of_weights = small / max(1, shape.largest.weights)
    # Most activations are as wide as the hidden state; a few wider ones between them do not keep the heap tidy.
    of_activations = float(shape.hidden * setting.micro_tokens * setting.element <= HEAP_LIMIT)
    over_vocabulary = {
        "logits": logit_bytes(shape, setting),
        "logits of both": compared_bytes(shape, setting),
    }

    def share(name: str) -> float:
        if name in OF_WEIGHTS:
            return of_weights
        return float(over_vocabulary[name] <= HEAP_LIMIT) if name in over_vocabulary else of_activations

    return {HEAP: HEAP_SHARE * sum(size * share(name) for name, size in items.items())}
