# SPDX-License-Identifier: Apache-2.0
"""What layer-wise rounding gathers of a layer's inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant.config import GridConfig
from discquant.solver.layerwise import layerwise_codes, watch_inputs
from discquant.solver.module_chain import ModuleChain
from discquant.solver.rows import TokenRows
from discquant.solver.solve import lay_grids


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 0},
        {"padding": (2, 1), "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
)
def test_hessian_of_a_convolution(mode: Any, options: dict[str, Any]) -> None:
    """e H e^T is the squared output of the convolution with the kernel e, whatever its padding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), bias=False, padding_mode=mode, **options), nn.Flatten())
    chain = ModuleChain(model)
    (batch,) = TokenRows(chain, torch.randn(5, 3, 9, 8), None, 5).batches(range(5))
    (hook,) = watch_inputs(chain, chain.weights[0], strict=True).values()
    output = chain.teacher_output(batch)
    hook.remove()
    hessian = hook.gathered(chain.weights[0][0])
    assert hessian is not None
    kernel = model[0].weight.detach().flatten(1).double()
    expected = output.view(5, 4, -1).double().square().sum(dim=(0, 2))
    torch.testing.assert_close(((kernel @ hessian) * kernel).sum(dim=1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_hessian_of_attentions_projection(batch_first: bool, bias: bool) -> None:
    """torch's attention reads the weight of `out_proj` past the layer; its inputs are gathered all the same."""
    attention = nn.MultiheadAttention(12, 2, bias=bias, batch_first=batch_first)
    if bias:
        nn.init.normal_(attention.out_proj.bias)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, key=x, value=x)[0]

    chain = ModuleChain(Attending())
    (batch,) = TokenRows(chain, torch.randn(4, 5, 12), None, 4).batches(range(4))
    (hook,) = watch_inputs(chain, chain.weights[0], strict=True).values()
    output = chain.teacher_output(batch).detach()
    hook.remove()
    ref = chain.weights[0][0]
    assert ref.name == "attention.out_proj" and hook.called(ref)
    hessian = hook.gathered(ref)
    assert hessian is not None
    weight = attention.out_proj.weight.detach().double()
    plain = (output - attention.out_proj.bias.detach() if bias else output).flatten(0, 1).double()
    torch.testing.assert_close(weight @ hessian @ weight.T, plain.T @ plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(chain.teacher_output(batch), output)


def test_a_layer_whose_weight_is_read_past_it_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(input=x @ self.read.weight)

    chain = ModuleChain(Reading())
    grids = lay_grids(chain, GridConfig(3, 32))
    batches = TokenRows(chain, torch.randn(64, 32), None, 32).batches(range(64))
    unreached: set[str] = set()
    codes = layerwise_codes(chain, grids, batches, "gptq", unreached=unreached)
    assert unreached == {"read"} and "read, for one" in caplog.text
    near = layerwise_codes(chain, grids, batches, "rtn")
    assert torch.equal(codes["read"], near["read"]) and not torch.equal(codes["called"], near["called"])
