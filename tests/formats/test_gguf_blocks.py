# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGUF types against the gguf package, which shares no code with ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discquant.config import GRID_KINDS
from discquant.errors import UnrepresentableError
from discquant.formats.gguf_blocks import pack_blocks, replace_codes, unpack_blocks
from discquant.formats.gguf_fit import fit_grid, grid_of
from discquant.formats.gguf_types import BY_NUMBER, TYPES, BlockType
from discquant.grids import AffineGrid, UniformGrid
from discquant.grids.gguf import place_gguf

gguf = pytest.importorskip("gguf")
KINDS = tuple(TYPES.values())


def random_bytes(kind: BlockType, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Any bytes make a tensor, but for scales that are NaN or infinite."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, blocks, kind.size), dtype=np.uint8)
    for _, place in kind.halves:
        half = generator.standard_normal((rows, blocks)).astype(np.float16)
        raw[..., place : place + 2] = half[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def test_table_is_the_package_s() -> None:
    for kind in KINDS:
        qtype = gguf.GGMLQuantizationType[kind.name]
        assert qtype.value == kind.number and BY_NUMBER[kind.number] is kind
        assert gguf.GGML_QUANT_SIZES[qtype] == (kind.columns, kind.size)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=20)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_any_file_decodes_bit_for_bit_and_packs_again(
    kind: BlockType, rows: int, blocks: int, seed: int
) -> None:
    raw = random_bytes(kind, rows, blocks, seed)
    q, parts = unpack_blocks(kind, raw)
    theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind.name])
    ours = grid_of(kind, parts).dequantize(q, torch.float32).numpy()
    np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32))
    assert torch.equal(pack_blocks(kind, q, parts), raw)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_replacing_codes_leaves_every_other_byte(kind: BlockType, seed: int) -> None:
    raw = random_bytes(kind, 3, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**kind.num_bits, (3, 2 * kind.columns), generator=generator, dtype=torch.uint8)
    new = replace_codes(kind, raw, q)
    codes = torch.zeros(kind.size, dtype=torch.bool)
    for start, stop in kind.codes:
        codes[start:stop] = True
    changed = (new != raw).reshape(3, 2, kind.size)
    assert not bool(changed[..., ~codes].any()) and bool(changed[..., codes].any())
    assert torch.equal(unpack_blocks(kind, new)[0], q)
    with pytest.raises(ValueError, match="shape"):
        replace_codes(kind, raw, q[:, :-1])


@pytest.mark.parametrize("name", [name for name in TYPES if name.lower() in GRID_KINDS])
def test_placed_grids_fit_their_type_exactly(name: str) -> None:
    weight = torch.randn(6, 512) * 0.02
    weight[0, :256] = 0
    grid = place_gguf(weight, name.lower())
    q = grid.nearest(weight)
    kind, parts, offset = fit_grid(grid, 512)
    assert (kind.name, offset) == (name, 0)
    decoded = gguf.dequantize(pack_blocks(kind, q, parts).numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(decoded, grid.dequantize(q, torch.float32).numpy())


@settings(max_examples=30)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([32, 64, 128, -1]),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_symmetric_grids_of_any_width_are_exact(bits: int, group: int, blocks: int, seed: int) -> None:
    columns = 32 * blocks
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else -(-columns // group)
    scale = (torch.rand(3, groups, generator=generator) + 0.01).bfloat16()
    grid = UniformGrid(bits, group, True, scale)
    q = torch.randint(0, 2**bits, (3, columns), generator=generator, dtype=torch.uint8)
    kind, parts, offset = fit_grid(grid, columns)
    assert kind.name == ("Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0")
    decoded = gguf.dequantize(
        pack_blocks(kind, q + offset, parts).numpy(), gguf.GGMLQuantizationType[kind.name]
    )
    # Numerically equal: the sign of a zero may differ where codes are not widened evenly.
    np.testing.assert_array_equal(decoded, grid.dequantize(q, torch.float32).numpy())


def test_integer_zero_points_fit_where_they_are_exact() -> None:
    scale = torch.full((2, 2), 0.25).bfloat16()
    zero = torch.tensor([[3, 9], [0, 15]], dtype=torch.uint8)
    grid = UniformGrid(4, 32, False, scale, zero)
    q = torch.randint(0, 16, (2, 64), dtype=torch.uint8)
    kind, parts, offset = fit_grid(grid, 64)
    assert (kind.name, offset) == ("Q4_1", 0)
    decoded = gguf.dequantize(pack_blocks(kind, q, parts).numpy(), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(decoded, grid.dequantize(q, torch.float32).numpy())


def test_affine_grids_take_the_smallest_type_that_holds_them() -> None:
    """Float16 scales were laid for a type that has them; others are kept as multiples where they are some."""
    d, numbers = torch.full((2, 1), 0.01).half().float(), torch.arange(1, 17).expand(2, 16)
    for bits, group, scale, name in (
        (2, 16, d * numbers.clamp(max=15), "Q2_K"), (2, 32, d * numbers[:, :8], "Q2_K"),
        (2, 32, d * 3 * numbers[:, :8], "Q4_K"), (3, 32, d * numbers[:, :8], "Q4_K"),
        (5, 32, d * numbers[:, :8], "Q5_K"),
        (4, 32, (d * numbers[:, :8]).half(), "Q4_1"),
        (5, 32, (d * numbers[:, :8]).half(), "Q5_1"),
        (5, 64, d * numbers[:, :4], "Q5_K"),
    ):  # fmt: skip
        grid = AffineGrid(bits, group, scale, -scale)
        q = torch.randint(0, 2**bits, (2, 256), dtype=torch.uint8)
        kind, parts, offset = fit_grid(grid, 256)
        assert (kind.name, offset) == (name, 0)
        decoded = gguf.dequantize(pack_blocks(kind, q, parts).numpy(), gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(decoded, grid.dequantize(q, torch.float32).numpy())


def test_refuses_what_no_type_holds() -> None:
    ones = torch.ones(1, 8)
    with pytest.raises(UnrepresentableError, match="whole 32-column blocks"):
        fit_grid(UniformGrid(4, -1, True, ones[:, :1]), 172)
    with pytest.raises(UnrepresentableError, match="scale per 32 columns"):
        fit_grid(UniformGrid(4, 8, True, ones), 64)
    with pytest.raises(UnrepresentableError, match="float16"):
        fit_grid(UniformGrid(4, 32, True, ones[:, :1] / 3), 32)
    irrational = torch.rand(1, 16) + 1
    with pytest.raises(UnrepresentableError, match="kind q3_k"):
        fit_grid(UniformGrid(3, 16, True, irrational), 256)
    with pytest.raises(UnrepresentableError, match="kind q6_k"):
        fit_grid(UniformGrid(6, 16, True, irrational), 256)
    for bits, words in ((4, "kind q4_1 or q4_k"), (5, "kind q5_1 or q5_k")):
        with pytest.raises(UnrepresentableError, match=words):
            fit_grid(AffineGrid(bits, 32, irrational[:, :8], -irrational[:, 8:]), 256)
    with pytest.raises(UnrepresentableError, match=r"Q2_K \(4-bit multiples of a float16\); .*kind q2_k"):
        fit_grid(AffineGrid(2, 16, irrational, -irrational), 256)
    with pytest.raises(UnrepresentableError, match="no GGUF type"):
        fit_grid(AffineGrid(6, 32, ones, ones), 256)
    with pytest.raises(ValueError, match="below"):
        pack_blocks(TYPES["Q4_0"], torch.full((1, 32), 16, dtype=torch.uint8), {"d": ones[:, :1].half()})
