# SPDX-License-Identifier: Apache-2.0
"""What "auto" takes and the references, as the kernels: one graph, and no look at a number that a device computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from discquant.ops import (
    StepOptions,
    linear_kl,
    projected_step_deferred_,
    soft_linear_step_deferred_,
    soft_weight,
)

OPTIONS = StepOptions(lr=0.03, step=5, seed=3)
STEP: dict[str, Any] = {"group_size": 16, "options": OPTIONS}
NAMES = ("soft_weight", "projected_step_deferred_", "soft_linear_step_deferred_", "linear_kl")


def _call(name: str, impl: str, state: dict[str, Tensor]) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of tensors alone, and its arguments."""
    device = state["frac"].device
    if name == "soft_weight":
        codes = torch.randint(0, 15, (4, 48), dtype=torch.uint8, device=device)
        weight = {"num_bits": 4, "group_size": 16, "impl": impl}
        return lambda *args: soft_weight(*args, **weight), [codes, state["frac"], state["scale"]]
    if name == "linear_kl":
        student, teacher, head = torch.randn(4, 8), torch.randn(4, 8), torch.randn(11, 8)
        mask = torch.tensor([True, False, True, True])
        return (
            lambda student, teacher, head, mask: tuple(
                linear_kl(student, teacher, head, mask=mask, impl=impl)
            ),
            [tensor.to(device) for tensor in (student, teacher, head, mask)],
        )
    step = {**STEP, "impl": impl}
    if name == "projected_step_deferred_":
        return (
            lambda frac, ref, grad, scale, first, second: projected_step_deferred_(
                frac, ref, grad, scale, momentum=first, second_moment=second, **step
            ),
            list(state.values()),
        )
    grad_output, x = torch.randn(3, 4, device=device), torch.randn(3, 48, device=device)
    rest = [state[key] for key in ("frac", "frac_ref", "scale", "momentum", "second_moment")]
    return (
        lambda grad_output, x, frac, ref, scale, first, second: soft_linear_step_deferred_(
            grad_output, x, frac, ref, scale, momentum=first, second_moment=second, **step
        ),
        [grad_output, x, *rest],
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_compile(name, impl, make_state, assert_equal):
    torch._dynamo.reset()
    function, arguments = _call(name, impl, make_state((4, 48), "8bit", 16))
    copies = [tensor.clone() for tensor in arguments]
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*copies)
    expected = function(*arguments)
    for left, right in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        assert_equal(left, right)
    for left, right in zip(copies, arguments, strict=True):
        assert_equal(left, right)


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number of the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_references_read_no_number(name, make_state):
    """On a GPU each would wait for it."""
    function, arguments = _call(name, "reference", make_state((4, 48), "8bit", 16))
    with _NoReads():
        function(*arguments)
