# SPDX-License-Identifier: Apache-2.0
"""Counter-based uniform numbers: a pure function of (key, element index), whatever the tiling or sharding.

The 32-bit mixer is the public "lowbias32" xor-shift-multiply hash (constants 0x7feb352d, 0x846ca68b).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix32(value: int) -> int:
    """Hash one 32-bit integer."""
    value &= _MASK
    value ^= value >> 16
    value = (value * 0x7FEB352D) & _MASK
    value ^= value >> 15
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def stream_key(seed: int, step: int, tensor_id: int, stream: int) -> int:
    """Fold (seed, step, tensor, stream) into one 32-bit key; `stream` separates frac from the moments."""
    key = mix32(seed)
    for word in (step, tensor_id, stream):
        key = mix32(key ^ mix32(word + 0x9E3779B9))
    return key


def counter_uniform(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return `count` float32 numbers in [0, 1): hash(index ^ key) / 2^32 truncated to 24 bits.

    Args:
        key: 32-bit key from `stream_key`.
        start: Index of the first element in the unsharded, row-major tensor, below 2^32.
        count: How many.
        device: Where.

    Returns:
        float32, [count], multiples of 2^-24.
    """
    value = torch.arange(start, start + count, dtype=torch.int64, device=device) & _MASK
    value ^= key
    value ^= value >> 16
    value *= 0x7FEB352D
    value &= _MASK
    value ^= value >> 15
    # The product wraps in int64; its low 32 bits are those of the unsigned product.
    value *= 0x846CA68B
    value &= _MASK
    value ^= value >> 16
    return (value >> 8).to(torch.float32) * 2.0**-24
