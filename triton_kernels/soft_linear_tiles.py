# SPDX-License-Identifier: Apache-2.0
"""Tiles of the matmuls of soft_linear.py, and which of them stands in where the one asked for would not fit.

What does not fit was seen ahead of time, by aot.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Tile of the output, depth of a step of the inner loop, and the launch."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Safest first; `compact` runs anywhere, the others want the shared memory of a data-centre GPU.
CONFIGS = {
    "compact": Config(64, 64, 32, 4, 2),
    "ragged": Config(64, 64, 32, 8, 2),  # for rows at odd addresses, whose loads take more registers
    "narrow": Config(64, 32, 32, 8, 2),  # and with look-ups in a table yet more
    "square": Config(128, 128, 32, 8, 3),
    "deep": Config(128, 128, 64, 8, 3),
    "wide": Config(128, 256, 64, 8, 3),
}
# Tiles that only the shared memory of sm_90 holds in every variant.
LARGE = ("deep", "wide")
STEP_CONFIGS = {
    "compact": CONFIGS["compact"],
    "ragged": CONFIGS["narrow"],
    "square": Config(128, 128, 64, 8, 3),
}


def fitting_tile(tile: str, in_features: int, has_table: bool, indexed: bool = False) -> str:
    """`tile` of CONFIGS, or the one that this width, a look-up table or an index of groups needs."""
    if in_features % 16:
        # Rows that start at odd addresses spill in the other tiles.
        return "narrow" if has_table else "ragged"
    # A table read level by level overflows the shared memory of a larger tile on sm_80.
    if has_table:
        return "compact"
    # A scale read for each weight takes the registers that a large accumulator leaves.
    return "square" if indexed and tile in LARGE else tile


def fitting_step_tile(tile: str, in_features: int, optimizer: str, plain: bool) -> str:
    """`tile` of STEP_CONFIGS, or the one that this step needs; `plain` is 8-bit state on a uniform grid."""
    if in_features % 16:
        return "ragged"
    # Two moments, look-ups or wide state do not fit the registers beside a large accumulator.
    return tile if plain and optimizer != "adamw" else "compact"
