# SPDX-License-Identifier: Apache-2.0
"""anchor_codes: its table read by code and side, whatever the shape, the strides or the slices. Nothing to derive."""

from __future__ import annotations

import importlib

import pytest
import torch

from discquant.ops import _registry as registry
from discquant.ops import anchor_codes

OP = torch.ops.discquant.anchor_codes.default
SHAPES = [(64, 512), (3, 17), (5, 2048), (7, 2051), (300, 9), (24, 96), (1, 1), (0, 5), (5, 0)]
IMPLS = ("reference", "triton")


def _arguments(
    shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, sides, table; the bits that fill up a row's last byte are random too."""
    rows, cols = shape
    numbers = (
        torch.randint(0, 256, size, dtype=torch.uint8) for size in (shape, (rows, -(-cols // 8)), (512,))
    )
    codes, side, table = (t.to(device) for t in numbers)
    return codes, side, table


def _oracle(codes: torch.Tensor, side: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Coordinate by coordinate."""
    wanted = torch.empty_like(codes, device="cpu")
    for row, (numbers, packed) in enumerate(zip(codes.tolist(), side.tolist(), strict=True)):
        for column, number in enumerate(numbers):
            wanted[row, column] = table[256 * (packed[column // 8] >> column % 8 & 1) + number]
    return wanted.to(codes.device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(shape, impl, assert_equal, device):
    arguments = _arguments(shape, device)
    actual = anchor_codes(*arguments, impl=impl)
    assert actual.is_contiguous()
    assert_equal(actual, _oracle(*arguments))


@pytest.mark.parametrize("impl", IMPLS)
def test_every_code_with_either_side(impl, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).expand(2, 256)
    side = torch.tensor([[0], [255]], dtype=torch.uint8, device=device).expand(2, 32)
    table = torch.randperm(512, device=device).to(torch.uint8)
    assert torch.equal(anchor_codes(codes, side, table, impl=impl), table.view(2, 256))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(64, 512), (6, 40)])
def test_any_stride(shape, impl, assert_equal, device):
    """Transposed, and every other element of larger ones."""
    codes, side, table = _arguments(shape, device)
    expected = anchor_codes(codes, side, table, impl="reference")
    wide = torch.full([3 * size for size in shape], 77, dtype=torch.uint8, device=device)[::3, ::3].copy_(
        codes
    )
    levels = torch.zeros(1024, dtype=torch.uint8, device=device)[::2].copy_(table)
    assert_equal(anchor_codes(wide, side.t().contiguous().t(), levels, impl=impl), expected)
    assert_equal(anchor_codes(codes.t().contiguous().t(), side, table, impl=impl), expected)


@pytest.mark.parametrize("limit", [1, 40, 100, 10**9])
def test_slices_of_the_reference(limit, monkeypatch, assert_equal, device):
    """However many rows it takes at once; what it holds meanwhile is of that many coordinates."""
    arguments = _arguments((9, 33), device)
    expected = anchor_codes(*arguments, impl="reference")
    monkeypatch.setattr(importlib.import_module("discquant.ops.reference.anchor_codes"), "SLICE", limit)
    assert_equal(anchor_codes(*arguments, impl="reference"), expected)


def test_choice(monkeypatch, device):
    """The kernel on a GPU, the reference on a CPU."""
    arguments = _arguments((4, 16), device)
    taken: list[str] = []
    before = registry.choose
    monkeypatch.setattr(registry, "choose", lambda *a, **k: taken.append(before(*a, **k)) or taken[-1])
    anchor_codes(*arguments)
    assert taken == ["triton" if device.type == "cuda" else "reference"]


def test_deterministic(assert_equal, device):
    arguments = _arguments((33, 130), device)
    assert_equal(anchor_codes(*arguments, impl="triton"), anchor_codes(*arguments, impl="triton"))


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted, device):
    codes, side, table = _arguments((6, 24), device)
    if permuted:
        codes, side = codes.t().contiguous().t(), side.t().contiguous().t()
    torch.library.opcheck(OP, (codes, side, table))


def test_compile(device):
    def look_up(*arguments):
        return anchor_codes(*arguments, impl="triton") + 1

    compiled = torch.compile(look_up, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 24), (5, 40)):
        arguments = _arguments(shape, device)
        assert torch.equal(compiled(*arguments), look_up(*arguments))


def test_rejects_bad_input(device):
    codes, side, table = _arguments((4, 20), device)
    for error, message, args in (
        (TypeError, "anchor_codes: frac_ref must be of type = Tensor, got NoneType", (None, side, table)),
        (TypeError, "anchor_codes: side must be of type = Tensor, got int", (codes, 3, table)),
        (TypeError, "anchor_codes: table must be of type = Tensor, got list", (codes, side, [0] * 512)),
        (ValueError, r"anchor_codes: frac_ref must have shape = .* got \[20\]", (codes[0], side, table)),
        (ValueError, r"anchor_codes: side must have shape = \[4, 3\], got \[4, 2\]", (codes, side[:, :2], table)),
        (ValueError, r"anchor_codes: table must have shape = \[512\], got \[256\]", (codes, side, table[:256])),
        (ValueError, "anchor_codes: frac_ref must have a dtype of", (codes.float(), side, table)),
        (ValueError, "anchor_codes: side must have a dtype of = .* got torch.bool", (codes, side.bool(), table)),
        (ValueError, "anchor_codes: table must have a dtype of = .* got torch.int32", (codes, side, table.int())),
        (ValueError, "anchor_codes: side must be on the device = .*, got meta", (codes, side.to("meta"), table)),
        (ValueError, "anchor_codes: table must be on the device = .*, got meta", (codes, side, table.to("meta"))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            anchor_codes(*args)
    with pytest.raises(NotImplementedError, match="anchor_codes: impl must cover these arguments = cpp"):
        anchor_codes(codes, side, table, impl="cpp")
    with pytest.raises(ValueError, match="anchor_codes: impl must be one of"):
        anchor_codes(codes, side, table, impl="fast")
