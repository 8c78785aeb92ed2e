# SPDX-License-Identifier: Apache-2.0
"""Grids of GGUF types: stored exactly as they are used, and no worse than the simple quantizers."""

from __future__ import annotations

import pytest
import torch

from discquant.config import GRID_KINDS, GridConfig, GridKind
from discquant.errors import UnrepresentableError
from discquant.formats.gguf_types import TYPES
from discquant.grids import AffineGrid, TableGrid, UniformGrid, place_grid
from discquant.grids.gguf import FALLBACK, SUPER_KINDS, gguf_kind, place_gguf
from discquant.grids.table import IQ4_LEVELS, SIGNED_KINDS

KINDS = tuple(kind for kind in GRID_KINDS if kind.upper() in TYPES)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    gauss = torch.randn(24, 512, generator=generator) * 0.02
    heavy = torch.distributions.StudentT(3.0).sample((24, 512)) * 0.02
    return {"gauss": gauss, "heavy": heavy, "positive": gauss.abs() + 0.1, "negative": -gauss.abs() - 0.01}


def squared_error(grid: UniformGrid | AffineGrid, weight: torch.Tensor) -> float:
    rounded = grid.dequantize(grid.nearest(weight), torch.float32)
    return float((rounded - weight).double().square().sum())


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1"])
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
    ) * (1 + 1e-6 if kind in SUPER_KINDS else 1)


def from_the_ends(weight: torch.Tensor, kind: str) -> float:
    """Squared error of scales laid on each group's ends, then rounded to the type's integers: nothing is sought."""
    bits, group, symmetric = GRID_KINDS[kind]
    most, top = (1 << SUPER_KINDS[kind]) - 1, (1 << bits) - 1
    values = weight.reshape(-1, 256 // group, group)
    if kind in SIGNED_KINDS:
        levels = torch.tensor(IQ4_LEVELS)
        end = values.abs().amax(-1)
        d = (end.amax(-1, keepdim=True) / 127 / (most // 2)).half().float()
        scale = (d * torch.round(end / 127 / d).clamp(1, most // 2)).unsqueeze(-1)
        found = scale * levels[(values.unsqueeze(-1) / scale.unsqueeze(-1) - levels).abs().argmin(-1)]
    elif symmetric:
        low = -(top + 1) // 2
        end = values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)
        d = (end.abs().amax(-1, keepdim=True) / -low / (most // 2)).half().float()
        scale = (d * torch.round(end / low / d).clamp(-(most // 2), most // 2)).unsqueeze(-1)
        scale = torch.where(scale == 0, d.unsqueeze(-1), scale)
        found = scale * torch.round(values / scale).clamp(low, -low - 1)
    else:
        depth, span = (
            -values.amin(-1).clamp(max=0),
            values.amax(-1).clamp(min=0) - values.amin(-1).clamp(max=0),
        )
        d, dmin = ((x.amax(-1, keepdim=True) / most).half().float() for x in (span / top, depth))
        scale = (d * torch.round(span / top / d).clamp(1, most)).unsqueeze(-1)
        minimum = -(dmin * torch.round(depth / dmin.clamp(min=2.0**-24))).unsqueeze(-1)
        found = scale * torch.round((values - minimum) / scale).clamp(0, top) + minimum
    return float((found - values).double().square().sum())


@pytest.mark.parametrize("kind", SUPER_KINDS)
@pytest.mark.parametrize("name", ["gauss", "heavy", "positive", "negative"])
def test_k_types_beat_scales_from_the_ends(kind: GridKind, name: str) -> None:
    weight = weights()[name]
    assert squared_error(place_gguf(weight, kind), weight) < 0.95 * from_the_ends(weight, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_those_of_the_types(kind: GridKind) -> None:
    weight = weights()["heavy"]
    grid = place_gguf(weight, kind)
    bits, group, symmetric = GRID_KINDS[kind]
    assert (grid.num_bits, grid.group_size, grid.symmetric) == (bits, group, symmetric)
    assert grid.scale.shape == (24, 512 // group) and not bool((grid.scale == 0).any())
    assert grid.scale.dtype == (torch.float32 if kind in (*SUPER_KINDS, "iq4_nl") else torch.float16)
    if isinstance(grid, AffineGrid):
        assert grid.minimum.shape == grid.scale.shape and bool((grid.scale > 0).all())
        assert kind not in SUPER_KINDS or bool((grid.minimum <= 0).all())
    else:
        assert bool((grid.scale < 0).any()) and bool((grid.scale > 0).any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-6, 1.0, 60000.0])
def test_constant_rows(kind: str, value: float) -> None:
    weight = torch.full((2, 256), value)
    grid = place_gguf(weight, kind)
    rounded = grid.dequantize(grid.nearest(weight), torch.float32)
    assert bool(torch.isfinite(rounded).all())
    # One level can always be laid close to a single value; float16 gives it 11 bits, below its range 2^-24 steps, of
    # which Q2_K has fifteen at most, and of which levels of the IQ4 table are up to 24 apart.
    steps = 2 if kind == "q2_k" else 12 if kind in SIGNED_KINDS else 1
    assert float((rounded - weight).abs().max()) <= abs(value) * 2**-6 + steps * 2.0**-24


def test_rows_that_are_no_multiple_of_256_fall_back() -> None:
    assert [gguf_kind(kind, 640) for kind in KINDS] == [FALLBACK.get(kind, kind) for kind in KINDS]
    assert [gguf_kind(kind, 768) for kind in KINDS] == list(KINDS)
    weight = torch.randn(4, 640)
    for kind, (bits, type_) in {
        "q2_k": (4, UniformGrid), "q3_k": (4, UniformGrid), "q4_k": (4, AffineGrid), "q5_k": (5, AffineGrid),
        "q6_k": (8, UniformGrid), "iq4_xs": (4, TableGrid),
    }.items():  # fmt: skip
        grid = place_gguf(weight, kind)
        assert type(grid) is type_ and (grid.num_bits, grid.group_size) == (bits, 32)
        assert torch.equal(grid.scale, grid.scale.half().to(grid.scale.dtype))
        assert squared_error(grid, weight) < float(weight.square().sum()) * 4.0 ** (2 - bits)
    with pytest.raises(UnrepresentableError, match=r"down_proj: Q4_0 .* 172 columns .* ignore"):
        gguf_kind("q4_0", 172, "down_proj")
    with pytest.raises(UnrepresentableError, match="48 columns"):
        gguf_kind("q4_k", 48)


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        place_gguf(torch.zeros(3, 4, 32), "q4_0")
    with pytest.raises(ValueError, match="finite"):
        place_gguf(torch.full((1, 32), float("nan")), "q4_0")
    for sign in (1, -1):
        with pytest.raises(ValueError, match="at most"):
            place_gguf(torch.full((1, 32), sign * 1e6), "q4_0")


def test_rows_are_independent_of_how_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights()["heavy"]
    for kind in KINDS:
        whole = place_gguf(weight, kind)
        with monkeypatch.context() as patch:
            patch.setattr("discquant.grids.gguf._CHUNK", 512 * 5)
            pieces = place_gguf(weight, kind)
        assert torch.equal(whole.scale, pieces.scale)
        if isinstance(whole, AffineGrid):
            assert isinstance(pieces, AffineGrid) and torch.equal(whole.minimum, pieces.minimum)
