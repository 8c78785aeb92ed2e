# SPDX-License-Identifier: Apache-2.0
"""Which rows of what a layer gets count in the loss: padding must enter no statistic."""

from __future__ import annotations

from torch import Tensor


def counted_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of a layer's input that stand at counted positions.

    Args:
        x: One row per position, [windows, seqlen, channels] or [windows * seqlen, channels] (experts are called so).
        mask: True where a position counts, bool, [windows, seqlen]; None counts all.

    Returns:
        [rows, channels]; all rows where `x` has not one per position (the tokens of one expert, patches of an image).
    """
    rows = x.flatten(0, -2)
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return rows
    return rows[mask.flatten().to(x.device)]
