# SPDX-License-Identifier: Apache-2.0
"""Per-weight state: float32 and the 8-bit layout."""

from __future__ import annotations

import pytest
import torch

from discquant.config import GridConfig
from discquant.grids import place_grid
from discquant.ops import decode_frac_ref
from discquant.solver.state import WeightState, pack_frac_ref, pack_nibbles


def _weight() -> torch.Tensor:
    weight = torch.randn(7, 45)
    weight[0, :5] = 0.0  # on the grid
    return weight


@pytest.mark.parametrize("state", ["fp32", "u8"])
@pytest.mark.parametrize("bits", [3, 5])
def test_codes_and_start(state: str, bits: int) -> None:
    """Starting at the weight and rounding at once is rounding to nearest; the soft weight is the weight."""
    weight = _weight()
    grid = place_grid(weight, GridConfig(bits, 32, True, "absmax"))
    held = WeightState("w", grid, weight, None, state=state, optimizer="adamw")  # type: ignore[arg-type]
    q_down, frac_ref = grid.neighbours(weight)
    assert torch.equal(held.codes_down(), q_down)
    clear = (frac_ref - 0.5).abs() > 1 / 255
    assert torch.equal(held.codes()[clear], grid.nearest(weight)[clear])
    inside = (frac_ref >= 0) & (frac_ref <= 1)
    tolerance = 1e-6 if state == "fp32" else 1 / 255
    step = grid.scale.float().repeat_interleave(32, 1)[:, :45]
    error = (held.soft_weight(torch.float32) - weight).abs() / step
    assert float(error[inside].max()) <= tolerance + 1e-5


def test_bytes_per_weight() -> None:
    """The 8-bit layout: 3.5 bytes per weight with momentum, 4.5 with AdamW, 13 and 17 in float32, plus scales."""
    weight = torch.randn(64, 128)
    grid = place_grid(weight, GridConfig(3, 128))
    scales = 64 * 2
    for optimizer, small, wide in (
        ("momentum", 3.5, 13),
        ("lion", 3.5, 13),
        ("adamw", 4.5, 17),
        ("sgd", 2.5, 9),
    ):
        for state, per_weight in (("u8", small), ("fp32", wide), ("bf16", (wide + 1) // 2)):
            held = WeightState("w", grid, weight, None, state=state, optimizer=optimizer)  # type: ignore[arg-type]
            assert held.nbytes == weight.numel() * per_weight + scales, (optimizer, state)


def test_frozen_is_exactly_on_the_grid_in_both_layouts() -> None:
    weight = _weight()
    grid = place_grid(weight, GridConfig(3, 32))
    one, other = (
        WeightState("w", grid, weight, None, state=state, optimizer="sgd")  # type: ignore[arg-type]
        for state in ("fp32", "u8")
    )
    third = WeightState("w", grid, weight, None, state="bf16", optimizer="sgd")
    assert torch.equal(one.live(), other.live())
    assert torch.equal(one.live(), third.live())
    assert int((~one.live()).sum()) >= 5
    assert one.num_live == int(one.live().sum())


def test_frac_ref_code_keeps_near_and_on_apart() -> None:
    values = torch.tensor([0.0, 1e-4, -1e-4, 1.0, 1 - 1e-4, 0.5, -0.5, 1.5, -3.0, 9.0])
    decoded = decode_frac_ref(pack_frac_ref(values), torch.float32)
    on_grid = (decoded == 0) | (decoded == 1)
    assert on_grid.tolist() == [True, False, False, True, False, False, False, False, False, False]
    assert (
        decoded - values.clamp(-0.5, 1.5)
    ).abs().max() <= 1 / 126 + 1.01e-4  # one code and the distance to the grid point


def test_pack_nibbles_odd_width() -> None:
    q = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    assert pack_nibbles(q).tolist() == [[0x21, 0x0F]]
