# SPDX-License-Identifier: Apache-2.0
"""Counter-based uniform numbers: a pure function of (key, element index), whatever the tiling or sharding.

Keys are mixed with the public "lowbias32" xor-shift-multiply hash (constants 0x7feb352d, 0x846ca68b). Elements have a
shorter hash of the same kind, three products and two shifts, since every instruction per element shows in the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Last odd factor per stream: frac, first moment, second moment.
STREAMS = (1, 0x27D4EB2F, 0x165667B1)


def mix32(value: int) -> int:
    """Hash one 32-bit integer."""
    value &= _MASK
    value ^= value >> 16
    value = (value * 0x7FEB352D) & _MASK
    value ^= value >> 15
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def step_key(seed: int, step: int, tensor_id: int) -> int:
    """Fold (seed, step, tensor) into one 32-bit key."""
    key = mix32(seed)
    for word in (step, tensor_id):
        key = mix32(key ^ mix32(word + 0x9E3779B9))
    return key


def counter_uniform(key: int, start: int, count: int, device: torch.device, stream: int = 0) -> Tensor:
    """Return `count` float32 numbers in [0, 1): the upper 16 bits of a hash of (index, key), over 2^16.

    Args:
        key: 32-bit key from `step_key`.
        start: Index of the first element in the unsharded, row-major tensor, below 2^32.
        count: How many.
        device: Where.
        stream: 0, 1 or 2; the streams of one element share the hash and differ in its last product.

    Returns:
        float32, [count], multiples of 2^-16: 16 bits decide a rounding with a bias of 2^-17 of a code below 256,
        whose sum with them is exact enough never to reach the next integer by itself. With wider codes the sum rounds
        in float32: from 2^14 on a code that is an integer already goes up once in 2^10 times, from 2^15 on once in
        2^9, a bias of 3e-8 in [0, 1].
    """
    # Products wrap in int64; their low 32 bits are those of the unsigned product.
    value = torch.arange(start, start + count, dtype=torch.int64, device=device) & _MASK
    value *= 0x9E3779B1
    value &= _MASK
    value ^= (value >> 15) ^ key
    value *= 0x85EBCA6B
    value &= _MASK
    value ^= value >> 13
    value *= 0xC2B2AE35
    value &= _MASK
    value *= STREAMS[stream]
    value &= _MASK
    return (value >> 16).to(torch.float32) * 2.0**-16
