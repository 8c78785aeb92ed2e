# SPDX-License-Identifier: Apache-2.0
"""NVFP4's global scale is one for all that an engine fuses: experts of a fused parameter and streamed weights, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant.config import GridConfig
from discquant.grids.fused import FUSED
from discquant.solver.solve import lay_grids
from discquant.solver.weight_ref import LAZY, Part, WeightRef

NVFP4 = GridConfig.of_kind("nvfp4")


def chain_of(*refs: WeightRef) -> Any:
    return SimpleNamespace(weights=[list(refs)])


def scale_of(grids: dict[str, Any], name: str) -> float:
    return float(grids[name].tensor_scale)


def plain(name: str, largest: float) -> WeightRef:
    weight = torch.randn(16, 32).clamp(-1, 1)
    weight[3, 5] = largest
    return WeightRef(name, f"{name}.weight", nn.Parameter(weight, requires_grad=False))


def test_experts_and_their_halves() -> None:
    """Matrices of one parameter, by the names of their checkpoint; experts are not fused with one another."""
    fused = torch.randn(2, 32, 32)
    fused[0, 20, 0], fused[1, 2, 0] = 50.0, -70.0
    parameter = nn.Parameter(fused, requires_grad=False)
    refs = [
        WeightRef(
            f"mlp.experts.{e}.{name}",
            "mlp.experts.gate_up_proj",
            parameter,
            Part("mlp.experts", e, *rows, False),
        )
        for e in (0, 1)
        for name, rows in (("w1", (0, 16)), ("w3", (16, 32)))
    ]
    grids = lay_grids(chain_of(*refs), NVFP4)
    scales = [scale_of(grids, ref.name) for ref in refs]
    assert scales[0] == scales[1] != scales[2] == scales[3]
    for ref in refs:  # what is common covers each
        weight, grid = ref.matrix(), grids[ref.name]
        error = (grid.dequantize(grid.nearest(weight), torch.float32) - weight).abs().max()
        assert error <= weight.abs().max() / 4


@pytest.mark.parametrize("members", FUSED, ids=lambda names: names[0])
def test_every_set_that_engines_fuse(members: tuple[str, ...]) -> None:
    refs = [plain(f"layer.{name}", 3.0 + i) for i, name in enumerate(members)]
    other = plain("layer.o_proj", 40.0)
    grids = lay_grids(chain_of(*refs, other), NVFP4)
    assert len({scale_of(grids, ref.name) for ref in refs}) == 1
    assert scale_of(grids, "layer.o_proj") != scale_of(grids, refs[0].name)


def test_streamed_weights() -> None:
    """Weights that are read when they are needed get the scales of those in memory."""
    held = [plain("attn.q_proj", 3.0), plain("attn.k_proj", -9.0), plain("attn.o_proj", 20.0)]
    streamed = []
    for ref in held:
        hollow = nn.Parameter(torch.empty(ref.shape, device="meta"), requires_grad=False)
        value: Tensor = ref.parameter.detach()
        setattr(hollow, LAZY, lambda value=value: value)
        streamed.append(WeightRef(ref.name, ref.param_name, hollow))
    one, two = lay_grids(chain_of(*held), NVFP4), lay_grids(chain_of(*streamed), NVFP4)
    assert {name: scale_of(one, name) for name in one} == {name: scale_of(two, name) for name in two}
    assert scale_of(one, "attn.q_proj") == scale_of(one, "attn.k_proj") != scale_of(one, "attn.o_proj")


def test_a_weight_that_is_not_finite_is_named() -> None:
    refs = plain("attn.q_proj", 1.0), plain("attn.k_proj", float("inf"))
    with pytest.raises(ValueError, match=r"attn\.k_proj\.weight"):
        lay_grids(chain_of(*refs), NVFP4)
