# SPDX-License-Identifier: Apache-2.0
"""What layer-wise rounding gathers of a layer's inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from discquant.solver.chain import ModuleChain
from discquant.solver.layerwise import watch_inputs
from discquant.solver.solve import TokenRows


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
