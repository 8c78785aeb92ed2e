# SPDX-License-Identifier: Apache-2.0
"""Choice of an implementation: the documented order of auto, and explicit choices that cannot run here."""

from __future__ import annotations

import pytest
import torch
from discquant.triton_kernels import hadamard as hadamard_kernels
from discquant.triton_kernels import projected_step as step_kernels
from discquant.triton_kernels import soft_weight as weight_kernels
from torch import Tensor

from discquant import ops
from discquant.ops import StepOptions, hadamard, projected_step_
from discquant.ops import _registry as registry
from discquant.ops._steps import flatten_options, launch_arguments

CPU = torch.device("cpu")
MATMULS = ("soft_linear", "soft_linear_dx", "soft_linear_dfrac")


def test_auto_order(monkeypatch):
    """CPU: C++ where it covers the arguments, else the reference; the interpreter is never taken by itself."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "cpp_problem", lambda device, operator: None)
    assert registry.choose("op", "auto", CPU, cpp=None, cpp_operator="x") == "cpp"
    assert registry.choose("op", "auto", CPU, cpp="a stride") == "reference"
    monkeypatch.setattr(registry, "cpp_problem", lambda device, operator: "not built")
    assert registry.choose("op", "auto", CPU, cpp=None, cpp_operator="x") == "reference"
    cuda = torch.device("cuda")
    assert registry.choose("op", "auto", cuda) == "triton"
    assert registry.choose("op", "auto", cuda, triton="float64") == "reference"


def test_explicit_choice_never_falls_back(monkeypatch):
    monkeypatch.setattr(registry, "cpp_problem", lambda device, operator: "not built")
    with pytest.raises(RuntimeError, match="op: impl must be able to run here = cpp, got not built"):
        registry.choose("op", "cpp", CPU, cpp=None, cpp_operator="x")
    with pytest.raises(
        NotImplementedError, match="op: impl must cover these arguments = triton, got float64"
    ):
        registry.choose("op", "triton", CPU, triton="float64")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="impl must be able to run here = triton, got tensors are on cpu"):
        hadamard(torch.zeros(2, 4), impl="triton")
    monkeypatch.setattr(registry, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        hadamard(torch.zeros(2, 4), impl="triton")


def test_old_extension_is_named():
    """An extension built before an operator existed says so; it is not taken for a working one."""
    library = torch.library.Library("discquant", "FRAGMENT")
    library.define("operator_of_the_future() -> ()")
    problem = registry.cpp_problem(CPU, "operator_of_the_future")
    assert problem is not None
    assert "build it again" in problem or "_C" in problem
    assert (
        registry.cpp_problem(torch.device("meta"), "x") == "there is no C++ implementation for meta tensors"
    )


def _results(op: str, impl: str, strategy: str, device: torch.device) -> list[Tensor]:
    """Results of an op on seeded float32 arguments, and its gradients where it has some."""
    torch.manual_seed(0)
    q_down = torch.randint(0, 15, (16, 24), dtype=torch.uint8)
    frac, scale, x, dy = torch.rand(16, 24), torch.rand(16, 1), torch.randn(4, 24), torch.randn(4, 16)
    q_down, frac, scale, x, dy = (t.to(device) for t in (q_down, frac, scale, x, dy))
    if op in ("soft_linear_step_", "projected_step_"):
        step = {"group_size": -1, "options": StepOptions(optimizer="sgd", lr=0.01), "impl": impl}
        gradient = (dy, x) if op == "soft_linear_step_" else ()
        rest = (scale,) if op == "soft_linear_step_" else ((dy.unsqueeze(2) * x.unsqueeze(1)).sum(0), scale)
        getattr(ops, op)(*gradient, frac, torch.full_like(frac, 0.3), *rest, **step)
        return [frac]
    grid = {"num_bits": 4, "group_size": -1, "impl": impl}
    if op == "soft_linear_dx":
        return [ops.soft_linear_dx(dy, q_down, frac, scale, strategy=strategy, **grid)]
    if op == "soft_linear_dfrac":
        return [ops.soft_linear_dfrac(dy, x, q_down, scale, strategy=strategy, **grid)]
    leaves = [x.requires_grad_(), frac.requires_grad_()]
    if op == "soft_linear":
        y = ops.soft_linear(x, q_down, frac, scale, bias=scale[:, 0], strategy=strategy, **grid)
    elif op == "soft_weight":
        y = ops.soft_weight(q_down, frac, scale, **grid)
    elif op == "hadamard":
        y = hadamard(x, impl=impl)
    else:
        y = ops.linear_kl(x, x.detach() + 0.1, frac.detach(), impl=impl).loss
    weight = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
    found = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    return [y.detach(), *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize(
    "op", [*MATMULS, "soft_weight", "hadamard", "linear_kl", "soft_linear_step_", "projected_step_"]
)
def test_autocast_changes_nothing(op, impl, device):
    """Results and gradients have the dtypes and the bits of the contract, whatever the caller's autocast."""
    for strategy in ("fused", "materialise") if op in MATMULS and impl == "triton" else ("auto",):
        plain = _results(op, impl, strategy, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            under = _results(op, impl, strategy, device)
        for one, other in zip(under, plain, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other), strategy


class _Recorder:
    """Stands for a kernel; keeps the grids of its launches."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_grids_hold_many_rows(monkeypatch):
    """A GPU takes 65535 blocks along the second dimension of a grid, which no interpreter shows."""
    recorder = _Recorder()
    monkeypatch.setattr(step_kernels, "_projected_step_kernel", recorder)
    for dtype in (torch.uint8, torch.float32):
        frac = torch.empty(128256, 4096, dtype=dtype, device="meta")
        momentum = torch.empty_like(frac, dtype=torch.int8 if dtype == torch.uint8 else dtype)
        options = launch_arguments(*flatten_options(StepOptions(lr=0.1, kl_weight=1.0, optimizer="momentum")))
        grad, scale = torch.empty_like(frac, dtype=torch.float32), torch.empty(128256, 32, device="meta")
        step_kernels.projected_step_fwd(frac, frac, grad, scale, momentum, None, None, None, 128, *options)
    monkeypatch.setattr(hadamard_kernels, "_hadamard_run_kernel", recorder)
    monkeypatch.setattr(hadamard_kernels, "_hadamard_mix_kernel", recorder)
    matrix = torch.empty(28, 28, dtype=torch.int8, device="meta")
    hadamard_kernels.hadamard_fwd(torch.empty(131072, 14336, device="meta"), None, matrix, False)
    monkeypatch.setattr(weight_kernels, "_soft_weight_fwd_kernel", recorder)
    monkeypatch.setattr(weight_kernels, "_soft_weight_bwd_kernel", recorder)
    codes, scale = (
        torch.empty(2**20, 512, dtype=dtype, device="meta") for dtype in (torch.uint8, torch.float32)
    )
    for transpose in (False, True):
        weight_kernels.soft_weight_fwd(codes, codes, scale, None, None, 4, 1, torch.float32, False, transpose)
    weight_kernels.soft_weight_bwd(codes, codes, scale, None, 4, 1, torch.float32)
    assert len(recorder.grids) == 7
    for grid in recorder.grids:
        first, second, third = (*grid, 1, 1)[:3]
        assert first < 2**31 and second <= 65535 and third <= 65535


@pytest.mark.parametrize("impl", ["reference", "triton", "cpp"])
def test_default_device(impl, device):
    """Counts lie where the state does."""
    if impl == "cpp" and registry.cpp_problem(device, "projected_step_cpp2_") is not None:
        return
    state = [torch.full((4, 32), 128, dtype=torch.uint8, device=device) for _ in range(2)]
    state[1].fill_(100)
    grad, scale = torch.ones(4, 32, device=device), torch.ones(4, 1, device=device)
    momentum = torch.zeros(4, 32, dtype=torch.int8, device=device)
    options = StepOptions(lr=0.5, kl_weight=1.0, grad_clamp=1.0, optimizer="momentum", moment_bound=1.0)
    with torch.device("meta"):
        counts = projected_step_(
            *state, grad, scale, group_size=-1, options=options, momentum=momentum, impl=impl
        )
    assert counts.live == counts.saturated == 128 and bool((state[0] != 128).all())
