# SPDX-License-Identifier: Apache-2.0
"""Which modules packed ones take the place of, and what `from_codes` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.formats.codes import QuantizedLinear
from discquant.modules import FusedProjection, PackedLinear, load_packed

pytestmark = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
Coded = Callable[..., QuantizedLinear]


class Doubled(nn.Linear):
    """A layer whose forward does more than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Another name for the same layer."""


def with_own_forward() -> nn.Linear:
    layer = nn.Linear(64, 32)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def hooked(kind: str) -> nn.Linear:
    layer = nn.Linear(64, 32)
    getattr(layer, kind)(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(64, 32),
        with_own_forward,
        lambda: hooked("register_forward_hook"),
        lambda: hooked("register_forward_pre_hook"),
    ],
)
def test_a_layer_that_does_more_than_multiply_is_refused(coded: Coded, make: Callable[[], nn.Linear]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), make())
    layers = [coded(name, module.weight) for name, module in model.named_children()]
    with pytest.raises(
        ValueError, match=r"load_packed: 1 must be an nn\.Linear of the model, .* without a forward"
    ):
        load_packed(model, layers)
    assert isinstance(model[1], nn.Linear)


def test_a_subclass_that_only_renames_is_packed(coded: Coded) -> None:
    model = nn.Sequential(Renamed(64, 32))
    load_packed(model, [coded("0", model[0].weight)])
    assert type(model[0]) is PackedLinear


def test_a_sibling_that_stays_leaves_the_others_alone(coded: Coded) -> None:
    parent = nn.Module()
    parent.gate_proj, parent.up_proj = nn.Linear(64, 32), Doubled(64, 32)
    assert load_packed(parent, [coded("gate_proj", parent.gate_proj.weight)]).fused == 0
    assert type(parent.gate_proj) is PackedLinear and type(parent.up_proj) is Doubled


def test_a_module_of_several_names_is_replaced_under_all(coded: Coded) -> None:
    """Else the others would keep, and compute, the full-precision weight."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(64, 32), nn.Linear(64, 32)

    model = nn.Module()
    model.first = Inner()
    model.again = model.first.gate_proj
    model.head = nn.Linear(64, 32)
    model.list = nn.ModuleList([model.head, model.first, model.first.up_proj])
    layers = [coded(name, model.get_submodule(name).weight) for name in ("head", "first.gate_proj", "list.2")]
    report = load_packed(model, layers, fuse=False)
    assert report.layers == 3 and not list(model.parameters())
    assert model.list[0] is model.head and model.again is model.first.gate_proj
    assert model.list[2] is model.first.up_proj
    assert {type(m) for m in (model.head, model.again, model.list[2])} == {PackedLinear}


def test_fused_siblings_of_several_names(coded: Coded) -> None:
    model = nn.Module()
    model.block = nn.Module()
    model.block.gate_proj, model.block.up_proj = nn.Linear(64, 32), nn.Linear(64, 32)
    model.up = model.block.up_proj
    layers = [coded(f"block.{name}", module.weight) for name, module in model.block.named_children()]
    expected = layers[1].dequantize(torch.float32)
    assert load_packed(model, layers, mode="exact").fused == 1
    assert model.up is model.block.up_proj and isinstance(model.up, FusedProjection)
    assert torch.equal(model.up.weight, expected) and not list(model.parameters())


@pytest.mark.parametrize("names", [("0", "0"), ("0", "1"), ("",)])
def test_a_layer_is_named_once_and_inside_the_model(coded: Coded, names: tuple[str, ...]) -> None:
    layer = nn.Linear(64, 32)
    model = layer if names == ("",) else nn.Sequential(layer, layer)
    with pytest.raises(ValueError, match=r"must be an nn\.Linear of the model"):
        load_packed(model, [coded(name, layer.weight) for name in names])


GOOD = {
    "q": torch.zeros(8, 64, dtype=torch.uint8), "scale": torch.ones(8, 2), "num_bits": 4, "group_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [[1]]}, TypeError, "q must be of type = Tensor, got list"),
        ({"q": [[1]], "device": "cpu"}, TypeError, "q must be of type = Tensor, got list"),
        ({"scale": [[1.0]]}, TypeError, "scale must be of type = Tensor, got list"),
        ({"scale": None}, TypeError, "scale must be of type = Tensor, got NoneType"),
        ({"zero_point": [[1]]}, TypeError, "zero_point must be of type = Tensor, got list"),
        ({"bias": [1.0]}, TypeError, "bias must be of type = Tensor, got list"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape = \[8\], got \[7\]"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias must have shape = \[8\], got \[1, 8\]"),
        (
            {"bias": torch.zeros(8).int()},
            ValueError,
            "bias must have a dtype that is = floating, got torch.int32",
        ),
    ],
)
def test_from_codes_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"PackedLinear: {message}"):
        PackedLinear.from_codes(**{**GOOD, **change})


@pytest.mark.parametrize("road", ["from_codes", "copy", "assign"])
def test_a_bias_of_any_stride(road: str) -> None:
    bias = torch.randn(16)[::2]
    if road == "from_codes":
        module = PackedLinear.from_codes(**GOOD, bias=bias)
    else:
        module = PackedLinear.from_codes(**GOOD, bias=torch.zeros(8))
        module.load_state_dict({**module.state_dict(), "bias": bias}, assign=road == "assign")
    assert torch.equal(module(torch.zeros(1, 64)), bias[None])
    with pytest.raises(ValueError, match="bias of the loaded state must have a dtype that is = floating"):
        module.load_state_dict({**module.state_dict(), "bias": bias.int()})
