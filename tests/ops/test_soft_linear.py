# SPDX-License-Identifier: Apache-2.0
"""soft_linear: the seven properties for both strategies, the teacher's layer, and the step in the epilogue."""

from __future__ import annotations

import dataclasses
import itertools
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
from discquant.ops._steps import flatten_options

OPS = torch.ops.discquant
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
}


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
        tensors = [t.double() if wide and t is not None and t.is_floating_point() else t for t in grid[:5]]
        leaves = [
            t.double().requires_grad_() if wide else t.detach().clone().requires_grad_()
            for t in (x, tensors[1], bias)
        ]
        if wide and dtype == torch.float16:
            # The weight that meets x is rounded to x.dtype by definition: the oracle takes the same weight.
            weight = soft_weight(
                *grid[:4],
                num_bits=4,
                group_size=case["group_size"],
                table=grid.table,
                dtype=dtype,
                impl="reference",
            ).double()
            out = leaves[0] @ weight.t() + leaves[2]
            out = out + 0 * leaves[1].sum()
        else:
            out = soft_linear(
                leaves[0], tensors[0], leaves[1], tensors[2], tensors[3], leaves[2], num_bits=4,
                group_size=case["group_size"], table=tensors[4], strategy=strategy,
                impl="reference" if wide else key,
            )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        results[key] = (out.detach(), grads[0], grads[2], grads[1])
    names = ("y", "x", "bias") if dtype == torch.float16 else ("y", "x", "bias", "frac")
    for i, what in enumerate(names):
        if dtype == torch.float64:
            # The oracle itself rounds in float64: a dot of n terms differs by n rounding errors of its size.
            size = results["oracle"][i].abs().max() if results["oracle"][i].numel() else torch.tensor(0.0)
            error = (results["triton"][i] - results["oracle"][i]).abs()
            bound = max(tokens, rows, cols) * torch.finfo(dtype).eps * (1 + float(size))
            assert not error.numel() or error.max() <= bound, what
        else:
            assert_close(results["triton"][i], results["oracle"][i], results["reference"][i], what)


@pytest.mark.parametrize("strategy", DOUBLE_STRATEGIES)
@pytest.mark.parametrize("table", [False, True])
def test_gradcheck(strategy, table, make_grid, device):
    grid = make_grid((3, 5), frac=torch.float64, scale=torch.float64, group_size=2, table=table)
    frac = (grid.frac * 0.9).requires_grad_()
    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)

    def layer(x, frac, bias):
        return soft_linear(
            x, grid.q_down, frac, grid.scale, None, bias, num_bits=4, group_size=2, table=grid.table,
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


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted, make_grid, device):
    grid = make_grid((6, 32), group_size=16, zero=True)
    x, y = torch.randn(4, 32, device=device), torch.randn(4, 6, device=device)
    q_down, frac = grid.q_down, grid.frac
    if permuted:
        x, y, q_down, frac = (t.t().contiguous().t() for t in (x, y, q_down, frac))
    weight = (q_down, frac, grid.scale, grid.zero_point, None)
    check = torch.library.opcheck
    for strategy in STRATEGIES:
        check(
            OPS.soft_linear_fwd.default, (x, *weight, torch.randn(6, device=device), 4, 16, False, strategy)
        )
        check(OPS.soft_linear_dx.default, (y, *weight, 4, 16, False, strategy))
        check(OPS.soft_linear_dfrac.default, (y, x, q_down, grid.scale, None, 4, 16, torch.float32, strategy))
    codes = torch.randint(0, 256, (2, 6, 32), dtype=torch.uint8, device=device)
    options = flatten_options(StepOptions(optimizer="sgd"))
    state = (codes[0], codes[1], grid.scale, None, None)
    table = torch.sort(torch.randn(16, device=device)).values
    check(OPS.soft_linear_step_.default, (y, x, *state, None, None, 16, *options))
    check(OPS.soft_linear_step_.default, (y, x, *state, q_down, table, 16, *options))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compile(strategy, make_grid, device):
    grid = make_grid((6, 32), group_size=16)

    def layer(x, frac):
        return soft_linear(
            x, grid.q_down, frac, grid.scale, num_bits=4, group_size=16, strategy=strategy, impl="triton"
        ).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 9):
        x = torch.randn(2, tokens, 32, device=device)
        frac, other = (grid.frac.clone().requires_grad_() for _ in range(2))
        out, expected = compiled(x, frac), layer(x, other)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        assert torch.equal(frac.grad, other.grad)


def test_rejects_bad_input(make_grid, device):
    grid = make_grid((4, 64), group_size=32)
    x = torch.randn(3, 64, device=device)
    good: dict[str, Any] = {
        "x": x, "q_down": grid.q_down, "frac": grid.frac, "scale": grid.scale, "num_bits": 4, "group_size": 32,
        "impl": "triton",
    }  # fmt: skip
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "soft_linear: x must be of type = Tensor, got int", {"x": 1}),
        (TypeError, "soft_linear: x must be of type = Tensor, got NoneType", {"x": None}),
        (TypeError, "soft_linear: scale must be of type = Tensor, got float", {"scale": 1.0}),
        (TypeError, "soft_linear: bias must be of type = Tensor, got list", {"bias": [0.0]}),
        (ValueError, r"soft_linear: x must have a last dimension of = 64, got \[3, 63\]", {"x": x[:, :63]}),
        (ValueError, "soft_linear: x must have a dtype of = .* got torch.int32", {"x": x.int()}),
        (ValueError, r"soft_linear: bias must have shape = \[4\], got \[3\]", {"bias": x[:, 0]}),
        (ValueError, "soft_linear: bias must have a dtype of = .* got torch.int32", {"bias": x[0, :4].int()}),
        (ValueError, "soft_linear: strategy must be one of = .* got fast", {"strategy": "fast"}),
        (ValueError, "soft_linear: impl must be one of = .* got 'fast'", {"impl": "fast"}),
        (ValueError, r"soft_linear: scale must have shape .* = \[4, 2\], got \[4, 1\]", {"scale": grid.scale[:, :1]}),
        (ValueError, r"soft_linear: frac must have shape = .* got \[4\]", {"frac": grid.frac[:, 0]}),
        (ValueError, "soft_linear: frac must have a dtype of = .* got torch.int64", {"frac": grid.frac.long()}),
        (ValueError, r"soft_linear: q_down must be .* = \[4, \[64, 32\]\], got \[4, 63\]",
         {"q_down": grid.q_down[:, :63]}),
        (ValueError, "soft_linear: q_down must have a dtype of = .* got torch.float32", {"q_down": grid.frac}),
        (ValueError, "soft_linear: num_bits must be an integer in = 2..8, got 9", {"num_bits": 9}),
        (ValueError, "soft_linear: group_size must be positive or = -1, got 0", {"group_size": 0}),
        (ValueError, r"soft_linear: table must have shape = \[16\], got \[8\]", {"table": x[0, :8]}),
        (ValueError, "soft_linear: frac must as frac_ref not have dtype = torch.uint16",
         {"frac": grid.frac.to(torch.uint16), "is_reference": True}),
        (NotImplementedError, "soft_linear: impl must cover these arguments = cpp", {"impl": "cpp"}),
        (NotImplementedError, "soft_linear: scale must be a constant = requires_grad False, got True",
         {"scale": grid.scale.clone().requires_grad_()}),
    ]  # fmt: skip
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            soft_linear(**{**good, **change})


def test_gradient_ops_reject_bad_input(make_grid, device):
    grid = make_grid((4, 64), group_size=32)
    x, dy = torch.randn(3, 64, device=device), torch.randn(3, 4, device=device)
    common: dict[str, Any] = {"num_bits": 4, "group_size": 32, "impl": "triton"}
    bad: list[tuple[Any, type[Exception], str, dict[str, Any]]] = [
        (soft_linear_dx, ValueError, r"soft_linear_dx: grad_output must have a last dimension of = 4, got \[3, 64\]",
         {"grad_output": x}),
        (soft_linear_dx, TypeError, "soft_linear_dx: grad_output must be of type = Tensor", {"grad_output": None}),
        (soft_linear_dx, ValueError, "soft_linear_dx: strategy must be one of", {"strategy": "best"}),
        (soft_linear_dx, NotImplementedError, "soft_linear_dx: impl must cover these arguments = cpp", {"impl": "cpp"}),
        (soft_linear_dfrac, ValueError, r"soft_linear_dfrac: x must have the tokens of .* = \[3\], got \[2, 64\]",
         {"x": x[:2]}),
        (soft_linear_dfrac, ValueError, "soft_linear_dfrac: x must have the dtype of grad_output = torch.float32",
         {"x": x.half()}),
        (soft_linear_dfrac, ValueError, "soft_linear_dfrac: scale must have shape", {"scale": grid.scale[:3]}),
        (soft_linear_dfrac, TypeError, "soft_linear_dfrac: x must be of type = Tensor, got list", {"x": [1.0]}),
    ]  # fmt: skip
    for op, error, message, change in bad:
        inputs = {"grad_output": dy, "q_down": grid.q_down, "scale": grid.scale}
        inputs |= {"frac": grid.frac} if op is soft_linear_dx else {"x": x}
        with pytest.raises(error, match=message):
            op(**{**inputs, **common, **change})


def test_step_rejects_bad_input(device):
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    x, dy = torch.zeros(2, 64, device=device), torch.zeros(2, 4, device=device)
    table = torch.linspace(-1, 1, 16, device=device)
    good: dict[str, Any] = {
        "grad_output": dy, "x": x, "frac": codes, "frac_ref": codes, "scale": torch.ones(4, 2, device=device),
        "group_size": 32, "options": StepOptions(optimizer="sgd"), "impl": "triton",
    }  # fmt: skip
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"soft_linear_step_: x must have the tokens of grad_output = \[2\], got \[1, 64\]", {"x": x[:1]}),
        (ValueError, r"soft_linear_step_: x must have a last dimension of = 64, got \[2, 63\]", {"x": x[:, :63]}),
        (ValueError, "soft_linear_step_: x must have the dtype of grad_output", {"x": x.half()}),
        (TypeError, "soft_linear_step_: options must be of type = StepOptions, got dict", {"options": {}}),
        (ValueError, "soft_linear_step_: momentum must for lion be = a Tensor, got None",
         {"options": StepOptions(optimizer="lion")}),
        (ValueError, "soft_linear_step_: q_down must with a table be = a Tensor, got None", {"table": table}),
        (ValueError, r"soft_linear_step_: table must have a length of = .* got \[15\]",
         {"table": table[:15], "q_down": codes}),
        (ValueError, "soft_linear_step_: q_down must have a dtype of = .* got torch.float32",
         {"table": table, "q_down": codes.float()}),
        (NotImplementedError, "soft_linear_step_: impl must cover these arguments = triton, got float64",
         {"x": x.double(), "grad_output": dy.double()}),
        (NotImplementedError, "soft_linear_step_: impl must cover these arguments = cpp", {"impl": "cpp"}),
    ]  # fmt: skip
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            soft_linear_step_(**{**good, **change})


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


def test_integer_state_gets_no_gradient(make_grid, device):
    grid = make_grid((5, 32), frac=torch.uint8, group_size=16)
    x = torch.randn(3, 32, device=device, requires_grad=True)
    y = soft_linear(x, *grid[:4], num_bits=4, group_size=16, strategy="fused", impl="triton")
    y.sum().backward()
    weight = soft_weight(*grid[:4], num_bits=4, group_size=16, impl="reference")
    assert torch.allclose(x.grad, weight.sum(0).expand(3, -1), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "lion", "sgd"])
@pytest.mark.parametrize(
    "case",
    [((40, 30, 100), 64, ""), ((33, 70, 130), 32, "packed"), ((9, 20, 40), 8, "plain"), ((3, 5, 7), -1, "")],
)
def test_step_in_the_epilogue(optimizer, case, make_grid, assert_equal, device):
    """The same bytes and counts as the matmul followed by projected_step_, in the 8-bit layout, tables included.

    x and dY hold small integers, so that the sum over tokens is exact in any order.
    """
    (tokens, rows, cols), group_size, table = case
    grid = make_grid((rows, cols), group_size=group_size, table=bool(table), packed=table == "packed")
    groups = 1 if group_size == -1 else -(-cols // group_size)
    x = torch.randint(-8, 9, (tokens, cols), device=device).float()
    grad_output = torch.randint(-8, 9, (tokens, rows), device=device).float()
    frac, frac_ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=device)
    scale = torch.rand(rows, groups, device=device) * 1e-3
    options = StepOptions(optimizer=optimizer, lr=0.05, step=3, seed=1, tensor_id=4, first_index=77)
    results = []
    for fused in (True, False):
        state = {
            "momentum": None if optimizer == "sgd" else torch.full_like(frac, 5, dtype=torch.int8),
            "second_moment": torch.full_like(frac, 9) if optimizer == "adamw" else None,
        }
        codes = frac.clone()
        common = {"group_size": group_size, "options": options, "impl": "triton", **state}
        if table:
            common |= {"q_down": grid.q_down, "table": grid.table}
        if fused:
            counts = soft_linear_step_(grad_output, x, codes, frac_ref, scale, **common)
        else:
            counts = projected_step_(codes, frac_ref, grad_output.t() @ x, scale, **common)
        results.append((codes, state, counts))
    assert results[0][2] == results[1][2]
    assert_equal(results[0][0], results[1][0], "frac")
    for name in ("momentum", "second_moment"):
        if results[0][1][name] is not None:
            assert_equal(results[0][1][name], results[1][1][name], name)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_ops_equal_autograd(strategy, table, impl, make_grid, device):
    """soft_linear_dx and soft_linear_dfrac give the bits that autograd through soft_linear gives."""
    grid = make_grid((19, 48), group_size=16, packed=True, table=table, zero=not table)
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
    y = soft_linear(x, grid.q_down, frac, grid.scale, grid.zero_point, **kwargs)
    dx, dfrac = torch.autograd.grad(y, (x, frac), grad_output)
    assert torch.equal(soft_linear_dx(grad_output, *grid[:4], **kwargs), dx)
    found = soft_linear_dfrac(grad_output, x.detach(), grid.q_down, grid.scale, **kwargs)
    if impl == "triton":
        assert torch.equal(found, dfrac)
    else:  # the product by the gap and the sum over tokens round in another order
        assert (found - dfrac).abs().max() <= 64 * torch.finfo(torch.float32).eps * dfrac.abs().max()


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
    for tile, config in kernels.CONFIGS.items():
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


@pytest.mark.gpu
def test_step_on_gpu(assert_equal):
    """Every step tile and optimizer at a Llama shape against matmul and separate step."""
    rows, cols, tokens = 4096, 4096, 4096
    x = torch.randint(-4, 5, (tokens, cols), device="cuda").to(torch.bfloat16)
    dy = torch.randint(-4, 5, (tokens, rows), device="cuda").to(torch.bfloat16)
    frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device="cuda")
    scale = torch.rand(rows, cols // 64, device="cuda") * 1e-3
    gradient = torch.mm(dy.t(), x, out_dtype=torch.float32)
    for optimizer, lr in itertools.product(("momentum", "lion", "adamw"), (0.05,)):
        options = dataclasses.replace(StepOptions(), optimizer=optimizer, lr=lr)
        states = []
        for fused in (True, False):
            codes, first = frac.clone(), torch.zeros_like(frac, dtype=torch.int8)
            second = torch.zeros_like(frac)
            common = {"group_size": 64, "options": options, "momentum": first, "second_moment": second}
            if fused:
                soft_linear_step_(dy, x, codes, ref, scale, **common)
            else:
                projected_step_(codes, ref, gradient, scale, **common)
            states.append((codes, first, second))
        for left, right in zip(*states, strict=True):
            assert_equal(left, right, optimizer)
