# SPDX-License-Identifier: Apache-2.0
"""Reference of `place_outliers_`: values to places that are counted piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

# So many weights in a row count theirs in one byte, and each is found within them by one byte.
OUTLIER_PIECE = 255


def unpack_places(low: Tensor, count: Tensor) -> Tensor:
    """Return the flat indices, ascending, int64; nothing is read from the device.

    Args:
        low: Places within their pieces, uint8, [number of places].
        count: How many each piece has, uint8, [pieces].
    """
    pieces = torch.arange(0, OUTLIER_PIECE * count.numel(), OUTLIER_PIECE, device=count.device)
    return pieces.repeat_interleave(count.long(), output_size=low.numel()).add_(low)


def place_outliers_(weight: Tensor, low: Tensor, count: Tensor, value: Tensor) -> None:
    """Write `value` where places say, in place; see `discquant.ops.place_outliers_`."""
    weight.view(-1)[unpack_places(low, count)] = value.to(weight.dtype)
