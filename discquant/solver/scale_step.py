# SPDX-License-Identifier: Apache-2.0
"""Steps that move the scales of a grid on the loss while the codes stay: what is left to win once all is rounded.

A scale is s (1 + e); e starts at 0 and takes AdamW steps without decay. With the served weight W = s (1 + e) (q - z),

    d loss / d e = sum over the columns j of a group of (d loss / d W_j) s (q_j - z),

which the gradient that a block has anyway gives in one pass. 12 bytes per group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from discquant.config import SolverConfig
from discquant.grids import Grid, UniformGrid
from discquant.grids.uniform import MOST_RESCALED

WARMUP = 16  # steps, but no more than a quarter of all
BETAS = (0.9, 0.99)  # second moments must settle within some dozen steps
EPSILON = 1e-20  # gradients of a large model are small: the direction must not depend on their size


def scale_lr(config: SolverConfig, step: int) -> float:
    """Return the learning rate of scale step `step` (1-based): linear warm-up, cosine from 1 to 0, times `scale_lr`."""
    count = config.scale_iters
    warm = min(1.0, step / max(1, min(WARMUP, count // 4)))
    return config.scale_lr * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / count))


def group_sums(values: Tensor, group_size: int, num_groups: int) -> Tensor:
    """Sum over the columns of each group; the last may be short.

    Args:
        values: Floating, [out_features, in_features].
        group_size: Columns of a group; -1 is the row.
        num_groups: Of a row.

    Returns:
        [out_features, num_groups], in the dtype of `values`.
    """
    rows, columns = values.shape
    size = columns if group_size == -1 or num_groups == 1 else group_size
    short = num_groups * size - columns
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    return padded.reshape(rows, num_groups, size).sum(dim=-1)


def scale_gradient(grid: Grid, q: Tensor, grad: Tensor) -> Tensor:
    """Return d loss / d e.

    Args:
        grid: As it was laid, uniform; its groups are contiguous.
        q: Codes, uint8, [out_features, in_features].
        grad: d loss / d W of the served weight, float32 or wider, the same shape.

    Returns:
        float32, [out_features, num_groups].

    Raises:
        ValueError: The grid is of another kind, or its groups are not contiguous.
    """
    if not isinstance(grid, UniformGrid) or grid.g_idx is not None:
        raise ValueError(
            "scale_gradient: grid must be uniform, of contiguous groups, got another kind or g_idx"
        )
    product = grid.dequantize(q, torch.float32).mul_(grad)
    return group_sums(product, grid.group_size, grid.scale.shape[1])


def scale_step_(
    change: Tensor, momentum: Tensor, second_moment: Tensor, grad: Tensor, *, lr: float, step: int
) -> None:
    """Take an AdamW step on the changes, in place.

    Args:
        change: Relative change e of each scale, float32, [out_features, num_groups].
        momentum: First moment of the gradient by e, as `change`.
        second_moment: Second moment, as `change`.
        grad: d loss / d e, as `change`.
        lr: Learning rate; a change moves by about as much.
        step: Scale steps so far, this one included: corrects the bias of both moments.

    Source:
        Kingma and Ba, Adam, arXiv 1412.6980, algorithm 1.
    """
    first, second = BETAS
    momentum.mul_(first).add_(grad, alpha=1 - first)
    second_moment.mul_(second).addcmul_(grad, grad, value=1 - second)
    root = (second_moment / (1 - second**step)).sqrt_().add_(EPSILON)
    change.addcdiv_(momentum, root, value=-lr / (1 - first**step))
    change.clamp_(-MOST_RESCALED, MOST_RESCALED)
