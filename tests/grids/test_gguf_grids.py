# SPDX-License-Identifier: Apache-2.0
"""Grids of GGUF types: stored exactly as they are used, and no worse than the simple quantizers."""

from __future__ import annotations

import pytest
import torch

from discquant.config import GridConfig, GridKind
from discquant.errors import UnrepresentableError
from discquant.grids import AffineGrid, UniformGrid, place_grid
from discquant.grids.gguf import gguf_kind, place_gguf, place_q3_k, place_q4_0, place_q4_1, place_q4_k

KINDS: tuple[GridKind, ...] = ("q4_0", "q4_1", "q4_k", "q3_k")


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    gauss = torch.randn(24, 512, generator=generator) * 0.02
    heavy = torch.distributions.StudentT(3.0).sample((24, 512)) * 0.02
    return {"gauss": gauss, "heavy": heavy, "positive": gauss.abs() + 0.1, "negative": -gauss.abs() - 0.01}


def squared_error(grid: UniformGrid | AffineGrid, weight: torch.Tensor) -> float:
    rounded = grid.dequantize(grid.nearest(weight), torch.float32)
    return float((rounded - weight).double().square().sum())


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
@pytest.mark.parametrize("name", ["gauss", "heavy", "positive", "negative"])
def test_no_worse_than_the_package_quantizer(kind: GridKind, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = weights()[name]
    qtype = gguf.GGMLQuantizationType[kind.upper()]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), qtype), qtype))
    bar = float((theirs - weight).double().square().sum())
    config = GridConfig.of_kind(kind)
    assert squared_error(place_grid(weight, config), weight) <= bar
    # The first candidate is the package's own scale, so even without a search nothing is lost.
    assert squared_error(place_gguf(weight, kind, search=False), weight) <= bar


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gauss", "heavy", "positive", "negative"])
def test_search_never_loses(kind: str, name: str) -> None:
    weight = weights()[name]
    assert squared_error(place_gguf(weight, kind), weight) <= squared_error(
        place_gguf(weight, kind, search=False), weight
    ) * (1 + 1e-6 if kind in ("q4_k", "q3_k") else 1)


def test_scales_are_those_of_the_types() -> None:
    weight = weights()["heavy"]
    for grid in (place_q4_0(weight), place_q4_1(weight)):
        assert grid.scale.dtype == torch.float16 and grid.scale.shape == (24, 16)
        assert not bool((grid.scale == 0).any())
    q4_k, q3_k = place_q4_k(weight), place_q3_k(weight)
    assert q4_k.scale.shape == q4_k.minimum.shape == (24, 16) and q3_k.scale.shape == (24, 32)
    assert bool((q4_k.scale > 0).all()) and bool((q4_k.minimum <= 0).all())
    assert not bool((q3_k.scale == 0).any()) and bool((q3_k.scale < 0).any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-6, 1.0, 60000.0])
def test_constant_rows(kind: str, value: float) -> None:
    weight = torch.full((2, 256), value)
    grid = place_gguf(weight, kind)
    rounded = grid.dequantize(grid.nearest(weight), torch.float32)
    assert bool(torch.isfinite(rounded).all())
    # One level can always be laid close to a single value; float16 gives it 11 bits, below its range 2^-24 steps.
    assert float((rounded - weight).abs().max()) <= abs(value) * 2**-6 + 2.0**-24


def test_rows_that_are_no_multiple_of_256_fall_back() -> None:
    assert [gguf_kind(kind, 640) for kind in KINDS] == ["q4_0", "q4_1", "q4_1", "q4_0"]
    assert [gguf_kind(kind, 768) for kind in KINDS] == list(KINDS)
    weight = torch.randn(4, 640)
    assert isinstance(place_gguf(weight, "q4_k"), AffineGrid)
    fallback = place_gguf(weight, "q3_k")
    assert isinstance(fallback, UniformGrid) and fallback.num_bits == 4
    with pytest.raises(UnrepresentableError, match=r"down_proj: Q4_0 .* 172 columns .* ignore"):
        gguf_kind("q4_0", 172, "down_proj")


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        place_gguf(torch.zeros(3, 4, 32), "q4_0")
    with pytest.raises(ValueError, match="finite"):
        place_gguf(torch.full((1, 32), float("nan")), "q4_0")
    with pytest.raises(ValueError, match="at most"):
        place_gguf(torch.full((1, 32), 1e6), "q4_0")


def test_rows_are_independent_of_how_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights()["heavy"]
    for kind in KINDS:
        whole = place_gguf(weight, kind)
        with monkeypatch.context() as patch:
            patch.setattr("discquant.grids.gguf._CHUNK", 512 * 5)
            pieces = place_gguf(weight, kind)
        assert torch.equal(whole.scale, pieces.scale)
