# SPDX-License-Identifier: Apache-2.0
"""The packer against an oracle in Python integers, the frozen vectors of the formats, and the library's own packer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from discquant.formats.bitstream import pack, unpack, unpack_per_word, words_for


def oracle(codes: list[int], num_bits: int) -> list[int]:
    """D_b by one big integer: code i at bit i*b, then cut into signed 32-bit words."""
    stream = sum(code << (index * num_bits) for index, code in enumerate(codes))
    words = []
    for _ in range((len(codes) * num_bits + 31) // 32):
        word = stream & 0xFFFFFFFF
        words.append(word - (1 << 32) if word >> 31 else word)
        stream >>= 32
    assert stream == 0
    return words


def oracle_per_word(codes: list[int], num_bits: int) -> list[int]:
    """The layout before 0.18: floor(32 / b) codes a word, first code lowest."""
    held = 32 // num_bits
    return [oracle(codes[start : start + held], num_bits)[0] for start in range(0, len(codes), held)]


def hexadecimal(words: Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist())


def random_codes(rows: int, columns: int, num_bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << num_bits, (rows, columns), generator=generator, dtype=torch.uint8)


cases = st.tuples(st.integers(1, 8), st.integers(0, 5), st.integers(0, 140), st.integers(0, 2**31))


def test_frozen_vectors() -> None:
    eight = torch.arange(8, dtype=torch.uint8)
    assert hexadecimal(pack(eight.repeat(4)[None], 3)) == "88fac688 c688fac6 fac688fa"
    assert hexadecimal(pack(eight[None], 4)) == "76543210"


@pytest.mark.parametrize(
    ("num_bits", "code", "words"),
    [
        (2, 1, "55555555"), (2, 2, "aaaaaaaa"), (4, 7, "77777777"), (4, 8, "88888888"), (8, 127, "7f7f7f7f"),
        (8, 128, "80808080"), (3, 3, "db6db6db b6db6db6 6db6db6d"), (3, 4, "24924924 49249249 92492492"),
    ],
)  # fmt: skip
def test_frozen_zero_words(num_bits: int, code: int, words: str) -> None:
    """The zero-point words of GPTQ v1 and v2."""
    count = 32 if num_bits == 3 else 32 // num_bits
    assert hexadecimal(pack(torch.full((1, count), code, dtype=torch.uint8), num_bits)) == words


@given(cases)
def test_matches_oracle_along_rows(case: tuple[int, int, int, int]) -> None:
    num_bits, rows, columns, seed = case
    codes = random_codes(rows, columns, num_bits, seed)
    words = pack(codes, num_bits)
    assert words.shape == (rows, words_for(columns, num_bits))
    assert words.tolist() == [oracle(row, num_bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, num_bits, columns), codes)


@given(cases)
def test_matches_oracle_along_columns(case: tuple[int, int, int, int]) -> None:
    num_bits, columns, rows, seed = case
    codes = random_codes(rows, columns, num_bits, seed)
    words = pack(codes, num_bits, dim=0)
    assert words.shape == (words_for(rows, num_bits), columns)
    assert words.T.tolist() == [oracle(column, num_bits) for column in codes.T.tolist()]
    assert torch.equal(unpack(words, num_bits, rows, dim=0), codes)


@given(cases)
def test_old_layout_matches_oracle(case: tuple[int, int, int, int]) -> None:
    num_bits, rows, columns, seed = case
    codes = random_codes(rows, columns, num_bits, seed)
    per_row = -(-columns // (32 // num_bits))
    words = torch.tensor([oracle_per_word(row, num_bits) for row in codes.tolist()], dtype=torch.int32)
    words = words.reshape(rows, per_row)
    assert torch.equal(unpack_per_word(words, num_bits, columns), codes)
    assert torch.equal(unpack_per_word(words.T.contiguous(), num_bits, columns, dim=0), codes.T)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_agrees_with_compressed_tensors(num_bits: int, dim: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(37, 101, num_bits, seed=num_bits)
    signed = (codes.to(torch.int16) - (1 << (num_bits - 1))).to(torch.int8)
    assert torch.equal(
        pack(codes, num_bits, dim=dim), helpers.pack_to_int32(signed, num_bits, packed_dim=dim)
    )


def test_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(29, 53, 3, seed=1)
    whole = pack(codes, 3)
    monkeypatch.setattr("discquant.formats.bitstream._CHUNK", 128)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 53), codes)


def test_non_contiguous_input() -> None:
    codes = random_codes(64, 96, 5, seed=2)
    view = codes.T[::2]
    assert torch.equal(pack(view, 5), pack(view.contiguous(), 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack([[1]], 3), TypeError, "pack: codes must be a Tensor, got list"),
        (
            lambda: pack(torch.zeros(1, 8), 3),
            ValueError,
            "pack: codes must have dtype = torch.uint8, got torch.float32",
        ),
        (
            lambda: pack(torch.zeros(8, dtype=torch.uint8), 3),
            ValueError,
            "pack: codes must have 2 dimensions, got 1",
        ),
        (
            lambda: pack(torch.zeros(1, 8, dtype=torch.uint8), 9),
            ValueError,
            r"num_bits must be in \[1, 8\], got 9",
        ),
        (
            lambda: pack(torch.zeros(1, 8, dtype=torch.uint8), 3, dim=2),
            ValueError,
            "dim must be 0 or 1, got 2",
        ),
        (
            lambda: pack(torch.full((1, 8), 8, dtype=torch.uint8), 3),
            ValueError,
            r"below 2\^num_bits = 8, got 8",
        ),
        (lambda: unpack(torch.zeros(1, 4, dtype=torch.int32), 3, 32), ValueError, "= 3 columns, got 4"),
        (
            lambda: unpack_per_word(torch.zeros(1, 3, dtype=torch.int32), 3, 32),
            ValueError,
            "= 4 columns, got 3",
        ),
    ],
)
def test_rejects_bad_input(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
