# SPDX-License-Identifier: Apache-2.0
"""soft_linear: output and gradients against float64 for both strategies, end points, the teacher's layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.ops import (
    StepOptions,
    projected_step_,
    soft_linear,
    soft_linear_dfrac,
    soft_linear_dx,
    soft_linear_step_,
    soft_weight,
)

STRATEGIES = ("fused", "materialise")
# Triton has no float64 matmul of a computed operand on CUDA; the interpreter has.
DOUBLE_STRATEGIES = ("materialise",) if torch.cuda.is_available() else STRATEGIES
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "aligned": ((16, 32, 64), {"group_size": 32}),
    "odd": ((5, 33, 71), {"group_size": 16, "packed": True, "zero": True}),
    "prime-table": ((7, 19, 61), {"group_size": 16, "table": True}),
    "one": ((1, 1, 1), {"group_size": -1}),
    "no-tokens": ((0, 8, 16), {"group_size": -1}),
    "gather": ((3, 17, 100), {"group_size": 48, "zero": True}),
    "many-tiles": ((70, 66, 40), {"group_size": -1, "packed": True}),
    "minimum": ((5, 19, 72), {"group_size": 16, "minimum": torch.float32, "packed": True}),
    "minimum-bfloat": ((3, 17, 40), {"group_size": 16, "minimum": torch.bfloat16}),
    "minimum-half": ((3, 9, 33), {"group_size": -1, "minimum": torch.float16, "packed": True}),
    "index": ((5, 18, 70), {"group_size": 32, "index": True, "zero": True}),
    "index-minimum": ((3, 7, 40), {"group_size": 16, "index": True, "minimum": torch.bfloat16}),
}
# One small grid of each kind.
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"zero": True}, "table": {"table": True}, "minimum": {"minimum": torch.float32},
    "index": {"index": True, "zero": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [(s, d) for d in (torch.float32, torch.float16) for s in STRATEGIES]
    + [(s, torch.float64) for s in DOUBLE_STRATEGIES],
)
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype, strategy, make_grid, assert_close, device):
    """Output and the gradients of x, frac and bias; bfloat16 dots cannot be interpreted and run on a GPU below."""
    (tokens, rows, cols), case = CASES[name]
    base = torch.float64 if dtype == torch.float64 else torch.float32
    grid = make_grid((rows, cols), frac=base, scale=base, **case)
    x, bias = (
        torch.randn(*shape, dtype=torch.float64).to(device, dtype) for shape in ((tokens, cols), (rows,))
    )
    upstream = torch.randn(tokens, rows, dtype=torch.float64).to(device, dtype)
    results = {}
    for key in ("triton", "reference", "oracle"):
        wide = key == "oracle"
        tensors = [t.double() if wide and t is not None and t.is_floating_point() else t for t in grid]
        further = type(grid)(*tensors).further()
        leaves = [
            t.double().requires_grad_() if wide else t.detach().clone().requires_grad_()
            for t in (x, tensors[1], bias)
        ]
        if wide and dtype == torch.float16:
            # The weight that meets x is rounded to x.dtype by definition: the oracle takes the same weight.
            options = {"num_bits": 4, "group_size": case["group_size"], "impl": "reference"}
            weight = soft_weight(
                *grid[:4], **options, table=grid.table, **grid.further(), dtype=dtype
            ).double()
            # Its rounding passes the gradient of frac on unchanged.
            exact = soft_weight(tensors[0], leaves[1], *tensors[2:4], **options, table=tensors[4], **further)
            out = leaves[0] @ (exact + (weight - exact).detach()).t() + leaves[2]
        else:
            out = soft_linear(
                leaves[0], tensors[0], leaves[1], tensors[2], tensors[3], leaves[2], num_bits=4,
                group_size=case["group_size"], table=tensors[4], **further, strategy=strategy,
                impl="reference" if wide else key,
            )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        results[key] = (out.detach(), grads[0], grads[2], grads[1])
    for i, what in enumerate(("y", "x", "bias", "frac")):
        if dtype == torch.float64:
            # The oracle itself rounds in float64: a dot of n terms differs by n rounding errors of its size.
            size = results["oracle"][i].abs().max() if results["oracle"][i].numel() else torch.tensor(0.0)
            error = (results["triton"][i] - results["oracle"][i]).abs()
            bound = max(tokens, rows, cols) * torch.finfo(dtype).eps * (1 + float(size))
            assert not error.numel() or error.max() <= bound, what
        else:
            assert_close(results["triton"][i], results["oracle"][i], results["reference"][i], what)


@pytest.mark.parametrize("strategy", DOUBLE_STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(strategy, kind, make_grid, device):
    grid = make_grid((3, 5), frac=torch.float64, scale=torch.float64, group_size=2, **KINDS[kind])
    frac = (grid.frac * 0.9).requires_grad_()
    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)

    def layer(x, frac, bias):
        return soft_linear(
            x, grid.q_down, frac, *grid[2:4], bias, num_bits=4, group_size=2, table=grid.table, **grid.further(),
            strategy=strategy, impl="triton",
        )  # fmt: skip

    assert torch.autograd.gradcheck(layer, (x, frac, bias))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_grad_subsets(strategy, make_grid, device):
    """Each input alone: its gradient equals the one taken together, the others get none."""
    grid = make_grid((6, 32), group_size=16)
    values = {
        "x": torch.randn(4, 32, device=device),
        "frac": grid.frac,
        "bias": torch.randn(6, device=device),
    }

    def run(wanted):
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in values.items()}
        out = soft_linear(
            leaves["x"], grid.q_down, leaves["frac"], grid.scale, None, leaves["bias"], num_bits=4, group_size=16,
            strategy=strategy, impl="triton",
        )  # fmt: skip
        out.square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    together = run({"x", "frac", "bias"})
    for name in values:
        alone = run({name})
        assert torch.equal(alone.pop(name), together[name])
        assert all(grad is None for grad in alone.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_end_points_and_teacher(strategy, make_grid, device):
    """frac 0 and 1 give a layer on the neighbouring codes; frac_ref codes give the teacher's layer."""
    grid = make_grid((5, 32), frac=torch.uint8, group_size=16, packed=True, zero=True)
    x = torch.eye(32, device=device)
    kwargs: dict[str, Any] = {"num_bits": 4, "group_size": 16}
    for value in (0, 255):
        frac = torch.full_like(grid.frac, value)
        y = soft_linear(x, grid.q_down, frac, *grid[2:4], **kwargs, strategy=strategy, impl="triton")
        assert torch.equal(y.t(), soft_weight(grid.q_down, frac, *grid[2:4], **kwargs, impl="reference"))
    teacher = soft_linear(x, *grid[:4], **kwargs, is_reference=True, strategy=strategy, impl="triton")
    weight = soft_weight(*grid[:4], **kwargs, is_reference=True, impl="reference")
    # The fused kernel decodes codes by a multiplication: the last bit of a position may differ.
    step = grid.scale.max().item() * torch.finfo(torch.float32).eps * 16
    assert (teacher.t() - weight).abs().max() <= step


def test_integer_state_gets_no_gradient(make_grid, assert_close, device):
    grid = make_grid((5, 32), frac=torch.uint8, group_size=16)
    kwargs = {"num_bits": 4, "group_size": 16}
    grads = []
    for impl in ("triton", "reference"):
        x = torch.randn(3, 32, device=device, requires_grad=True)
        soft_linear(x, *grid[:4], **kwargs, strategy="fused", impl=impl).sum().backward()
        grads.append(x.grad)
    weight = soft_weight(*grid[:2], grid.scale.double(), **kwargs, impl="reference")
    assert_close(grads[0], weight.sum(0).expand(3, -1), grads[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_sums_over_tokens_are_float32(impl, make_grid, device):
    """Gradients of float32 frac and bias leave float16's range and keep what it would round."""
    grid = make_grid((4, 8), group_size=-1)
    frac, bias = grid.frac.clone().requires_grad_(), torch.zeros(4, device=device, requires_grad=True)
    x = torch.randn(3000, 8, device=device).half() + 30
    options = {"num_bits": 4, "group_size": -1, "strategy": "materialise", "impl": impl}
    grad = torch.rand(3000, 4, device=device).half()
    soft_linear(x, grid.q_down, frac, grid.scale, None, bias, **options).backward(grad)
    eps = 64 * torch.finfo(torch.float32).eps
    for found, exact in (
        (frac.grad, grid.scale.double() * (grad.double().t() @ x.double())),
        (bias.grad, grad.double().sum(0)),
    ):
        assert (found - exact).abs().max() <= eps * exact.abs().max()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_rows_of_packed_codes(impl, device):
    q_down = torch.zeros(0, 4, dtype=torch.uint8, device=device)
    frac, scale, x = (torch.zeros(*shape, device=device) for shape in ((0, 8), (0, 1), (2, 8)))
    kwargs = {"num_bits": 4, "group_size": -1, "impl": impl}
    table = torch.arange(16.0, device=device)
    assert soft_weight(q_down, frac, scale, **kwargs).shape == (0, 8)
    assert soft_linear(x, q_down, frac, scale, **kwargs).shape == (2, 0)
    assert soft_linear_dfrac(x[:, :0], x, q_down, scale, table=table, **kwargs).shape == (0, 8)
    step = {"group_size": -1, "options": StepOptions(optimizer="sgd"), "impl": impl}
    assert projected_step_(frac, frac, frac, scale, q_down=q_down, table=table, **step).live == 0


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(3, 0), (0, 5)])
def test_no_features(shape, strategy, impl, make_grid, device):
    """A layer without inputs gives its bias, one without outputs a gradient of zero, as dense layers do."""
    rows, cols = shape
    grid = make_grid(shape, group_size=-1)
    kwargs = {"num_bits": 4, "group_size": -1, "strategy": strategy, "impl": impl}
    x = torch.randn(2, 4, cols, device=device, requires_grad=True)
    frac, bias = grid.frac.clone().requires_grad_(), torch.randn(rows, device=device)
    y = soft_linear(x, grid.q_down, frac, grid.scale, bias=bias, **kwargs)
    assert torch.equal(y, bias.expand(2, 4, rows))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and frac.grad.shape == shape
    dy = torch.ones_like(y)
    assert torch.equal(soft_linear_dx(dy, *grid[:3], **kwargs), torch.zeros_like(x))
    assert soft_linear_dfrac(dy, x.detach(), grid.q_down, grid.scale, **kwargs).shape == shape
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    options = StepOptions(optimizer="sgd")
    step = {"group_size": -1, "options": options, "impl": impl}
    assert soft_linear_step_(dy, x.detach(), codes, codes, grid.scale, **step).live == 0


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_ops_equal_autograd(strategy, kind, impl, make_grid, device):
    """soft_linear_dx and soft_linear_dfrac give the bits that autograd through soft_linear gives."""
    grid = make_grid((19, 48), group_size=16, packed=True, **KINDS[kind])
    x = torch.randn(2, 5, 48, device=device, requires_grad=True)
    grad_output = torch.randn(2, 5, 19, device=device)
    frac = grid.frac.clone().requires_grad_()
    kwargs: dict[str, Any] = {
        "num_bits": 4,
        "group_size": 16,
        "table": grid.table,
        "strategy": strategy,
        "impl": impl,
    }
    y = soft_linear(x, grid.q_down, frac, grid.scale, grid.zero_point, **kwargs, **grid.further())
    dx, dfrac = torch.autograd.grad(y, (x, frac), grad_output)
    assert torch.equal(soft_linear_dx(grad_output, *grid[:4], **kwargs, **grid.further()), dx)
    found = soft_linear_dfrac(grad_output, x.detach(), grid.q_down, grid.scale, **kwargs, g_idx=grid.g_idx)
    if impl == "triton":
        assert torch.equal(found, dfrac)
    else:  # the product by the gap and the sum over tokens round in another order
        assert (found - dfrac).abs().max() <= 64 * torch.finfo(torch.float32).eps * dfrac.abs().max()


@pytest.mark.parametrize("kind", ["minimum", "index"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_end_points_of_other_grids(strategy, kind, make_grid, device):
    """frac 0 and 1 give a layer on the served weights of the neighbouring codes, bit for bit."""
    grid = make_grid((5, 32), frac=torch.uint8, group_size=16, packed=True, **KINDS[kind])
    x = torch.eye(32, device=device)
    kwargs: dict[str, Any] = {"num_bits": 4, "group_size": 16, **grid.further()}
    for value in (0, 255):
        frac = torch.full_like(grid.frac, value)
        y = soft_linear(x, grid.q_down, frac, *grid[2:4], **kwargs, strategy=strategy, impl="triton")
        assert torch.equal(y.t(), soft_weight(grid.q_down, frac, *grid[2:4], **kwargs, impl="reference"))


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_teacher_from_the_state(strategy, storage, make_grid, assert_close, device):
    """y = x W^T with W made from frac_ref, inside and outside [0, 1]: no second copy of the weight is needed."""
    grid = make_grid((21, 64), group_size=32, packed=True, zero=True)
    codes = torch.randint(0, 256, (21, 64), dtype=torch.uint8, device=device)
    frac_ref = codes if storage == torch.uint8 else (codes.float() - 63) / 126
    x = torch.randn(6, 64, device=device)
    args = (grid.q_down, frac_ref, grid.scale, grid.zero_point)
    kwargs: dict[str, Any] = {"num_bits": 4, "group_size": 32, "is_reference": True}
    steps = grid.scale.double().repeat_interleave(32, dim=1)
    zeros = grid.zero_point.double().repeat_interleave(32, dim=1)
    oracle = x.double() @ (steps * (grid.codes.double() - zeros + (codes.double() - 63) / 126)).t()
    baseline = soft_linear(x, *args, **kwargs, impl="reference")
    assert_close(soft_linear(x, *args, **kwargs, strategy=strategy, impl="triton"), oracle, baseline)


@pytest.mark.parametrize("kind", ["minimum", "index"])
def test_other_grids_are_deterministic(kind, make_grid, device):
    grid = make_grid((33, 64), frac=torch.uint8, **KINDS[kind])
    x, dy = torch.randn(20, 64, device=device), torch.randn(20, 33, device=device)
    kwargs: dict[str, Any] = {"num_bits": 4, "group_size": 32, "strategy": "fused", "impl": "triton"}
    runs = [
        (
            soft_linear(x, *grid[:4], **kwargs, **grid.further()),
            soft_linear_dx(dy, *grid[:4], **kwargs, **grid.further()),
            soft_linear_dfrac(dy, x, grid.q_down, grid.scale, **kwargs, g_idx=grid.g_idx),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_deterministic(make_grid, device):
    """Two runs, bit for bit: output, both gradients, and the state after an epilogue step."""
    grid = make_grid((33, 64), frac=torch.uint8)
    x, dy = torch.randn(20, 64, device=device), torch.randn(20, 33, device=device)
    kwargs: dict[str, Any] = {"num_bits": 4, "group_size": 32, "impl": "triton"}
    for strategy in STRATEGIES:
        runs = []
        for _ in range(2):
            frac = grid.frac.clone()
            outputs = [
                soft_linear(x, *grid[:4], **kwargs, strategy=strategy),
                soft_linear_dx(dy, *grid[:4], **kwargs, strategy=strategy),
                soft_linear_dfrac(dy, x, grid.q_down, grid.scale, **kwargs, strategy=strategy),
            ]
            counts = soft_linear_step_(
                dy, x, frac, grid.frac, grid.scale, group_size=32, options=StepOptions(optimizer="sgd", lr=0.01),
                impl="triton",
            )  # fmt: skip
            runs.append([*outputs, frac, torch.tensor(counts)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), strategy


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile_on_gpu(dtype, make_grid, assert_close):
    """Every tile of the fused kernels at Llama shapes, forward and both gradients."""
    from discquant.triton_kernels import soft_linear as kernels
    from discquant.triton_kernels.soft_linear_tiles import CONFIGS

    rows, cols, tokens = 4096, 14336, 2048
    grid = make_grid((rows, cols), frac=torch.uint8, group_size=64, packed=True, zero=True)
    x = torch.randn(tokens, cols, device="cuda", dtype=dtype)
    dy = torch.randn(tokens, rows, device="cuda", dtype=dtype)
    weight = soft_weight(*grid[:4], num_bits=4, group_size=64, dtype=dtype, impl="reference")
    slope = grid.scale.double().repeat_interleave(64, dim=1)
    oracles = (
        x.double() @ weight.double().t(),
        dy.double() @ weight.double(),
        dy.double().t() @ x.double() * slope,
    )
    baselines = (x @ weight.t(), dy @ weight, (dy.t() @ x).float() * slope.float())
    capability = torch.cuda.get_device_capability()
    for tile, config in CONFIGS.items():
        if tile == "wide" and capability[0] < 9:
            continue
        weight_args = (*grid[:4], None)
        actual = (
            kernels.soft_linear_fwd(x, *weight_args, None, 4, 64, False, config),
            kernels.soft_linear_dx(dy, *weight_args, 4, 64, False, config),
            kernels.soft_linear_dfrac(dy, x, grid.q_down, grid.scale, None, 4, 64, torch.float32, config),
        )
        for value, oracle, baseline, what in zip(
            actual, oracles, baselines, ("y", "dx", "dfrac"), strict=True
        ):
            assert_close(value, oracle, baseline, f"{tile} {what}")
