# SPDX-License-Identifier: Apache-2.0
"""Reference of `anchor_codes`: codes looked up by the code of `frac_ref` and one bit beside it, rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Coordinates looked up at once: an index has four bytes of each, beside the bits unpacked.
SLICE = 1 << 20


def unpack_bits(packed: Tensor, in_features: int) -> Tensor:
    """Booleans of bits that lie eight per byte along the rows, lowest first, [out_features, in_features]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> places) & 1).flatten(1)[:, :in_features].bool()


def anchor_codes(frac_ref: Tensor, side: Tensor, table: Tensor) -> Tensor:
    """Return table[256 * side + frac_ref], uint8, [out_features, in_features]; see `discquant.ops.anchor_codes`."""
    out = torch.empty_like(frac_ref, memory_format=torch.contiguous_format)
    rows, cols = frac_ref.shape
    step = max(1, SLICE // max(1, cols))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        index = frac_ref[part].int().add_(unpack_bits(side[part], cols), alpha=256)
        out[part] = table[index]
    return out
