# SPDX-License-Identifier: Apache-2.0
"""Layouts against an oracle written from docs/packed_layout.md in plain Python integers, code by code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from discquant import _extension
from discquant.ops import pack as packing

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=CPP)]
LAYOUTS = ["cpu", "mma"]


def codes(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


def oracle_dense(row: list[int], bits: int) -> list[int]:
    """One big integer, cut into 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    return [(stream >> (32 * w)) & 0xFFFFFFFF for w in range((len(row) * bits + 31) // 32)]


def oracle_cpu(grid: list[list[int]], bits: int) -> list[int]:
    """Blocks of 32 rows x 128 k; in it, per 32 k: the words of rows 0 to 15, then of rows 16 to 31."""
    words = [0] * (len(grid) * len(grid[0]) * bits // 32)
    per_quad = 4 if bits == 4 else 3
    k_blocks = len(grid[0]) // 128
    for n, row in enumerate(grid):
        for k, code in enumerate(row):
            block = (n // 32) * k_blocks + k // 128
            quad, word, place = k % 128 // 32, k % 32 // 8, k % 8
            nibble = {0: 0, 1: 2, 2: 4, 3: 6, 4: 1, 5: 3, 6: 5, 7: 7}[place]
            first = block * 1024 * bits // 8 + (quad * 2 + n % 32 // 16) * per_quad * 16 + n % 16
            put(words, first, 16, bits, word, nibble, code)
    return words


def oracle_mma(grid: list[list[int]], bits: int) -> list[int]:
    """Blocks of 64 rows x 128 k, four tiles; lanes as in the PTX table of the A operand of mma.m16n8k16."""
    words = [0] * (len(grid) * len(grid[0]) * bits // 32)
    k_blocks = len(grid[0]) // 128
    for tile_row in range(len(grid) // 16):
        for tile_k in range(k_blocks):
            tile = (((tile_row // 4) * k_blocks + tile_k) * 4 + tile_row % 4) * 64 * bits
            for lane in range(32):
                group, thread = lane // 4, lane % 4
                for step in range(8):
                    # a0,a1 (group, 2t..), a2,a3 (group + 8, 2t..), a4,a5 (group, 2t+8..), a6,a7 (group + 8, 2t+8..).
                    for a in range(8):
                        n = tile_row * 16 + group + (8 if a in (2, 3, 6, 7) else 0)
                        k = tile_k * 128 + step * 16 + thread * 2 + a % 2 + (8 if a >= 4 else 0)
                        nibble = a // 2 + 4 * (a % 2)
                        code = grid[n][k]
                        if bits == 4:
                            words[tile + step // 4 * 128 + lane * 4 + step % 4] |= code << (4 * nibble)
                        else:
                            at = [tile + lane * 4 + i for i in range(4)] + [
                                tile + 128 + lane * 2 + i for i in (0, 1)
                            ]
                            trio = at[:3] if step < 4 else at[3:]
                            put_three(words, trio, step % 4, nibble, code)
    return words


def put(words: list[int], first: int, stride: int, bits: int, word: int, nibble: int, code: int) -> None:
    if bits == 4:
        words[first + word * stride] |= code << (4 * nibble)
    else:
        put_three(words, [first, first + stride, first + 2 * stride], word, nibble, code)


def put_three(words: list[int], trio: list[int], word: int, nibble: int, code: int) -> None:
    """Words 0 to 2 keep their code in the low bits of the nibble; bit c of word 3's code is the top bit in word c."""
    if word < 3:
        words[trio[word]] |= code << (4 * nibble)
    else:
        for c in range(3):
            words[trio[c]] |= (code >> c & 1) << (4 * nibble + 3)


ORACLES: dict[str, Callable[[list[list[int]], int], list[int]]] = {"cpu": oracle_cpu, "mma": oracle_mma}


def unsigned(words: Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in words.flatten().tolist()]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3, 4])
def test_matches_oracle(bits: int, layout: str, impl: str) -> None:
    q = codes(128, 256, bits)
    words = packing.pack(q, num_bits=bits, group_size=128, layout=layout, impl=impl)
    assert unsigned(words) == ORACLES[layout](q.tolist(), bits)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_vectors(impl: str) -> None:
    """formats.md section 1, and one word of each tile written out by hand."""
    q = (torch.arange(32) % 8).to(torch.uint8)[None]
    assert [f"{w:08x}" for w in unsigned(packing.pack_dense(q, num_bits=3, impl=impl))] == [
        "88fac688",
        "c688fac6",
        "fac688fa",
    ]
    assert f"{unsigned(packing.pack_dense(q[:, :8], num_bits=4, impl=impl))[0]:08x}" == "76543210"
    row = torch.zeros(64, 128, dtype=torch.uint8)
    row[0, :8] = torch.arange(8)
    cpu = packing.pack(row, num_bits=4, group_size=-1, layout="cpu", impl=impl)
    assert f"{unsigned(cpu)[0]:08x}" == "73625140"
    mma = packing.pack(row, num_bits=4, group_size=-1, layout="mma", impl=impl)
    assert [f"{unsigned(mma)[4 * lane]:08x}" for lane in range(4)] == [
        "00010000",
        "00030002",
        "00050004",
        "00070006",
    ]


@pytest.mark.parametrize("impl", IMPLS)
@given(
    rows=st.integers(0, 70), columns=st.integers(1, 300), bits=st.sampled_from([3, 4]),
    layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_round_trip(impl: str, rows: int, columns: int, bits: int, layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    q = codes(rows, columns, bits)
    words = packing.pack(q, num_bits=bits, group_size=-1, layout=layout, impl=impl)
    sizes = {"out_features": rows, "in_features": columns, "num_bits": bits}
    assert torch.equal(packing.unpack(words, **sizes, layout=layout, impl=impl), q)
    other = "mma" if layout == "cpu" else "cpu"
    moved = packing.repack(words, **sizes, layout=layout, new_layout=other, impl=impl)
    assert torch.equal(moved, packing.pack(q, num_bits=bits, group_size=-1, layout=other, impl=impl))
    assert torch.equal(packing.repack(moved, **sizes, layout=other, new_layout=layout, impl=impl), words)


@pytest.mark.parametrize("impl", IMPLS)
@given(rows=st.integers(0, 5), count=st.integers(0, 100), bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_dense_round_trip(impl: str, rows: int, count: int, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = codes(rows, count, bits)
    words = packing.pack_dense(q, num_bits=bits, impl=impl)
    for row, stored in zip(q.tolist(), words.tolist(), strict=True):
        assert [w & 0xFFFFFFFF for w in stored] == oracle_dense(row, bits)
    assert torch.equal(packing.unpack_dense(words, count=count, num_bits=bits, impl=impl), q)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_the_zero_point(layout: str, impl: str) -> None:
    zero_point = torch.randint(0, 16, (5, 2), dtype=torch.uint8)
    words = packing.pack(codes(5, 100, 4), zero_point, num_bits=4, group_size=64, layout=layout, impl=impl)
    padded = packing.unpack(words, out_features=64, in_features=128, num_bits=4, layout=layout, impl=impl)
    assert torch.equal(padded[:5, 100:], zero_point[:, 1:].expand(5, 28))
    assert not padded[5:].any()
    words = packing.pack(codes(5, 100, 3), num_bits=3, group_size=64, layout=layout, impl=impl)
    padded = packing.unpack(words, out_features=64, in_features=128, num_bits=3, layout=layout, impl=impl)
    assert (padded[:5, 100:] == 4).all() and (padded[5:] == 4).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_round_trip(layout: str) -> None:
    scale = torch.randn(70, 3)
    packed = packing.pack_groups(scale, layout=layout)
    side = {"cpu": 32, "mma": 64}[layout]
    assert packed.shape == (128 // side, 3, side)
    for n in (0, 17, 69):
        assert torch.equal(packed[n // side, :, n % side], scale[n])
    assert torch.equal(packing.unpack_groups(packed, out_features=70), scale)


@CPP
def test_layout_version() -> None:
    assert _extension.load().build_facts()["layout_version"] == packing.LAYOUT_VERSION


@CPP
@pytest.mark.parametrize("layout", [1, 2])
def test_opcheck(layout: int) -> None:
    q = codes(10, 40, 3)
    ops = torch.ops.discquant
    torch.library.opcheck(ops.pack.default, (q, None, 3, 32, layout))
    words = ops.pack(q, None, 3, 32, layout)
    torch.library.opcheck(ops.unpack.default, (words, 10, 40, 3, layout))
    torch.library.opcheck(ops.repack.default, (words, 10, 40, 3, layout, 3 - layout))
    torch.library.opcheck(ops.pack_dense.default, (q, 3))
    torch.library.opcheck(ops.unpack_dense.default, (ops.pack_dense(q, 3), 40, 3))


GOOD = {"num_bits": 4, "group_size": 32, "layout": "cpu"}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1],), GOOD, TypeError, "q must be of type = Tensor, got list"),
        ((torch.zeros(4, 4),), GOOD, ValueError, "q must have a dtype of"),
        ((torch.zeros(4, dtype=torch.uint8),), GOOD, ValueError, "q must have shape"),
        ((torch.zeros(4, 0, dtype=torch.uint8),), GOOD, ValueError, "q must have shape"),
        ((torch.full((2, 2), 16, dtype=torch.uint8),), GOOD, ValueError, "q must be below .* = 16, got 16"),
        ((torch.zeros(2, 2, dtype=torch.uint8),), GOOD | {"num_bits": 5}, ValueError, "num_bits must be one of"),
        ((torch.zeros(2, 2, dtype=torch.uint8),), GOOD | {"group_size": 48}, ValueError, "group_size must be"),
        ((torch.zeros(2, 2, dtype=torch.uint8),), GOOD | {"layout": "gpu"}, ValueError, "layout must be one of"),
        ((torch.zeros(2, 2, dtype=torch.uint8),), GOOD | {"impl": "cuda"}, ValueError, "impl must be one of"),
        ((torch.zeros(2, 2, dtype=torch.uint8),), GOOD | {"impl": "triton"}, NotImplementedError, "impl must cover"),
        (
            (torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 1), 16, dtype=torch.uint8)), GOOD, ValueError,
            "zero_point must be below",
        ),
        (
            (torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)), GOOD, ValueError,
            "zero_point must have shape",
        ),
    ],
)  # fmt: skip
def test_pack_rejects_bad_input(
    arguments: tuple, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"pack: {message}"):
        packing.pack(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w[:-1], ValueError, r"words must have shape = \[1024\], got \[1023\]"),
        (lambda w: torch.cat([w, w[:1]]), ValueError, r"words must have shape = \[1024\], got \[1025\]"),
        (lambda w: w.long(), ValueError, "words must have a dtype of"),
        (lambda w: torch.stack([w, w], 1)[:, 0], ValueError, "words must have stride"),
        (lambda w: w.view(2, -1), ValueError, "words must have shape"),
        (lambda w: w.tolist(), TypeError, "words must be of type = Tensor"),
    ],
)
def test_unpack_rejects_bad_buffers(change: Callable, error: type[Exception], message: str) -> None:
    words = packing.pack(codes(20, 30, 4), num_bits=4, group_size=32, layout="cpu")
    with pytest.raises(error, match=f"unpack: {message}"):
        packing.unpack(change(words), out_features=20, in_features=30, num_bits=4, layout="cpu")


def test_unpack_dense_rejects_bad_buffers() -> None:
    with pytest.raises(ValueError, match=r"unpack_dense: words must have shape = \[rows, 3\], got \[1, 2\]"):
        packing.unpack_dense(torch.zeros(1, 2, dtype=torch.int32), count=32, num_bits=3)
    with pytest.raises(ValueError, match="unpack_dense: count must be at least = 0, got -1"):
        packing.unpack_dense(torch.zeros(1, 2, dtype=torch.int32), count=-1, num_bits=3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scales_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="pack_groups: per_group must be = finite"):
        packing.pack_groups(torch.tensor([[1.0, bad]]), layout="cpu")


@CPP
def test_operators_check_for_themselves() -> None:
    """A caller that goes round the public functions gets an error, not a read past the end."""
    ops = torch.ops.discquant
    words = packing.pack(codes(64, 128, 4), num_bits=4, group_size=32, layout="cpu")
    for call in (
        lambda: ops.unpack(words[:-1], 64, 128, 4, 2),
        lambda: ops.unpack(words, 65, 128, 4, 2),
        lambda: ops.unpack(words, 64, 128, 4, 7),
        lambda: ops.unpack(words, -1, 128, 4, 2),
        lambda: ops.repack(words.float(), 64, 128, 4, 1, 2),
        lambda: ops.pack(codes(4, 4, 4) + 16, None, 4, 32, 1),
        lambda: ops.pack_dense(codes(4, 4, 4), 9),
        lambda: ops.unpack_dense(words.view(1, -1), 5, 3),
    ):
        with pytest.raises(RuntimeError):
            call()
