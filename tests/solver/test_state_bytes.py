# SPDX-License-Identifier: Apache-2.0
"""What the state of a weight holds: the teacher from its bytes, packed flags and places, one blob per block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, SolverConfig
from discquant.grids import AffineGrid, Grid, TableGrid, UniformGrid, place_grid
from discquant.ops import decode_frac_ref
from discquant.ops.reference.anchor_codes import unpack_bits
from discquant.ops.reference.place_outliers import unpack_places
from discquant.planning.traffic import state_layout
from discquant.solver.block import BlockState
from discquant.solver.chain import DecoderChain
from discquant.solver.state import (
    WeightState,
    _outward,
    pack_bits,
    pack_frac_ref,
    pack_places,
)


def test_teacher_from_the_state_is_the_original(make_model: Callable[..., Any]) -> None:
    """Also beyond [-0.5, 1.5], where a searched grid cuts: those weights are kept as they are."""
    chain = DecoderChain(make_model("llama", torch.float32))
    outliers = 0
    for ref in chain.weights[0]:
        weight = ref.matrix().bfloat16().float()
        grid = place_grid(weight, GridConfig(3, 32))
        step = grid.scale.float().repeat_interleave(32, 1)[:, : weight.shape[1]]
        for state, limit in (("u8", 1 / 126), ("fp32", 1e-5)):
            held = WeightState(ref.name, grid, weight, None, state=state, optimizer="momentum", kept="state")  # type: ignore[arg-type]
            found = held.teacher_weight(torch.float32)
            assert found is not None
            assert float(((found - weight).abs() / step).max()) <= limit
            if held.outlier_low is not None:
                assert held.outlier_count is not None
                outliers += held.outlier_low.numel()
                exact = unpack_places(held.outlier_low, held.outlier_count)
                assert torch.equal(found.flatten()[exact], weight.flatten()[exact])
    assert outliers > 0, "no weight lay outside the range of the code: the test shows nothing"


@pytest.mark.parametrize("state", ["u8", "fp32", "bf16"])
@pytest.mark.parametrize("kind", ["uniform", "affine", "table"])
def test_teacher_of_a_group_of_one_level(kind: str, state: str) -> None:
    """A scale of 0 leaves one level, on which every weight counts as lying: the teacher is the weight all the same."""
    weight = torch.randn(16, 256).bfloat16().float() * 0.1
    scale = torch.full((16, 8), 0.0625)
    scale[3, 5] = scale[11, 0] = 0
    grid: Grid
    if kind == "uniform":
        grid = UniformGrid(3, 32, True, scale.bfloat16())
    elif kind == "affine":
        grid = AffineGrid(3, 32, scale, -4 * scale)
    else:
        grid = TableGrid.nf4(8 * scale, 32)
    held = WeightState("w", grid, weight, None, state=state, optimizer="sgd", kept="state")  # type: ignore[arg-type]
    found = held.teacher_weight(torch.float32)
    assert held.frac_ref is not None and found is not None and held.outlier_low is not None
    assert float((found - weight).abs().max()) < 0.01
    level = (scale == 0).repeat_interleave(32, 1)
    assert torch.equal(found[level], weight[level])
    assert not bool(held.live()[level].any())
    # Nothing is kept beside a state whose groups all have a step.
    other = WeightState(
        "w", place_grid(weight, GridConfig(3, 32)), weight, None, state="fp32", optimizer="sgd", kept="state"
    )
    assert other.outlier_low is None and other.weight is None


def test_many_outliers_keep_the_whole_weight() -> None:
    weight = torch.randn(8, 32).bfloat16().float()
    grid = place_grid(weight * 0.2, GridConfig(3, 32))  # most weights lie far beyond its ends
    held = WeightState("w", grid, weight, None, state="u8", optimizer="sgd", kept="state")
    assert held.frac_ref is None
    assert held.weight is not None
    assert held.weight.dtype == torch.bfloat16
    assert torch.equal(held.teacher_weight(torch.float32), weight)  # type: ignore[arg-type]


def test_anchor_from_one_bit_is_the_anchor() -> None:
    """The 8-bit state with its own teacher keeps the side only; within one code it prefers the same point."""
    weight = torch.randn(16, 64)
    weight[0, :9] = 0.0
    grid = place_grid(weight, GridConfig(3, 32))
    frac_ref = grid.neighbours(weight).frac_ref
    side = torch.randint(0, 2, weight.shape).float()
    start = 0.5 * frac_ref.clamp(0, 1) + 0.5 * side
    own, small = (
        WeightState("w", grid, weight, start, anchored=True, state="u8", optimizer="sgd", kept=kept)  # type: ignore[arg-type]
        for kept in ("none", "state")
    )
    assert torch.equal(own.live(), small.live())
    assert int((own.anchor.int() - small.anchor.int()).abs().max()) <= 1
    assert (
        small.nbytes - (grid.scale.numel() * 2) <= weight.numel() * (2.5 + 0.125) + 8 * weight.numel() * 0.1
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_anchor_from_one_bit_in_one_pass(frozen: bool) -> None:
    """Bit for bit what the state made of its bits as whole tensors before there was an op for it."""
    weight = torch.randn(16, 300)
    weight[0, :9] = 0.0
    grid = place_grid(weight, GridConfig(3, 32))
    frac_ref = grid.neighbours(weight).frac_ref
    start = 0.5 * frac_ref.clamp(0, 1) + 0.5 * torch.randint(0, 2, weight.shape)
    held = WeightState(
        "w", grid, weight, start, anchored=True, frozen=frozen, state="u8", optimizer="sgd", kept="state"
    )
    assert held.side is not None and held.frac_ref is not None
    upper = unpack_bits(held.side, 300)
    if frozen:
        expected = torch.where(upper, 189, 63).to(torch.uint8)
    else:
        codes = torch.arange(256, dtype=torch.uint8)
        own = decode_frac_ref(codes, torch.float64)
        table = torch.stack([
            torch.where((own == 0) | (own == 1), codes, pack_frac_ref(_outward(0.5 * own.clamp(0, 1) + 0.5 * side)))
            for side in (0, 1)
        ])  # fmt: skip
        expected = table[upper.long(), held.frac_ref.long()]
        assert not torch.equal(expected, held.frac_ref)
    assert torch.equal(held.anchor, expected)
    assert bool((held.live() == (decode_frac_ref(expected, torch.float32) % 1 != 0)).all())


@pytest.mark.parametrize("width", [1, 8, 45])
def test_pack_bits(width: int) -> None:
    flags = torch.rand(5, width) > 0.5
    packed = pack_bits(flags)
    assert packed.shape == (5, -(-width // 8))
    assert torch.equal(unpack_bits(packed, width), flags)


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 85), (7, 300)])
def test_pack_places(shape: tuple[int, int], share: float) -> None:
    """A byte for each and one per piece, also where all of a piece are set."""
    flags = torch.rand(shape) < share
    low, count = pack_places(flags)
    assert low.dtype == count.dtype == torch.uint8
    assert low.numel() == int(flags.sum()) and count.numel() == -(-flags.numel() // 255)
    assert torch.equal(unpack_places(low, count), flags.flatten().nonzero().flatten())


@pytest.mark.parametrize("grid", [GridConfig(3, 32), GridConfig(4, 32, False), GridConfig(5, -1)])
def test_a_block_is_one_blob(grid: GridConfig) -> None:
    """Sections lie in the order of memory.md, views share the blob's memory, and a copy of the bytes is the block."""
    states = [
        WeightState(
            f"w{rows}", place_grid(weight, grid), weight, None, state="u8", optimizer="adamw", kept="state"
        )
        for rows, weight in ((7, torch.randn(7, 45)), (16, torch.randn(16, 64)))
    ]
    block = BlockState.pack(states)
    first = [state.frac.data_ptr() - block.blob.data_ptr() for state in block.states]
    assert min(first) == block.changing
    for state in block.states:
        for key, tensor in state.held():
            offset = tensor.data_ptr() - block.blob.data_ptr()
            assert 0 <= offset <= block.nbytes - tensor.numel() * tensor.element_size()
            assert (offset >= block.changing) == (key in ("frac", "momentum", "second_moment"))
    copied = block.bind(block.blob.clone())
    block.blob.zero_()
    for one, other in zip(states, copied.states, strict=True):
        for (key, expected), (_, found) in zip(one.held(), other.held(), strict=True):
            assert torch.equal(expected, found), key
    copied.states[0].frac.fill_(3)
    assert int(copied.changed()[: states[0].frac.numel()].min()) == 3


def test_bytes_per_weight_of_the_recommended_layout() -> None:
    """memory.md: 3.5 B with momentum, teacher included; 4.5 with Adam; one more bit where GPTQ's side is preferred."""
    for optimizer, start, expected in (
        ("momentum", "ref", 3.5), ("lion", "ref", 3.5), ("adamw", "ref", 4.5), ("momentum", "gptq", 3.625),
    ):  # fmt: skip
        options = SolverConfig(state="u8", optimizer=optimizer, start=start)  # type: ignore[arg-type]
        weight = torch.rand(64, 256) - 0.5
        grid = place_grid(weight, GridConfig(3, 128, False, "absmax"))
        held = WeightState(
            "w", grid, weight, torch.rand_like(weight), anchored=start == "gptq", state="u8",
            optimizer=options.optimizer, kept="state",
        )  # fmt: skip
        params = sum(t.numel() * t.element_size() for key, t in held.held() if key.startswith("grid."))
        assert held.outlier_low is None
        assert held.nbytes - params == weight.numel() * expected
        layout = state_layout("u8", optimizer, 3, both=start == "gptq")  # the plan's
        assert layout.total == expected
