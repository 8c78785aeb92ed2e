# SPDX-License-Identifier: Apache-2.0
"""soft_linear: the seven properties for both strategies, the teacher's layer, and the step in the epilogue."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from discquant.ops import StepOptions, projected_step_, soft_linear, soft_linear_step_, soft_weight
from discquant.ops._steps import flatten_options
from discquant.ops.soft_linear import rule
from discquant.ops.soft_linear_table import RULES

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
    check(OPS.soft_linear_step_.default, (y, x, codes[0], codes[1], grid.scale, None, None, 16, *options))


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
        (TypeError, "soft_linear: x must be of type = Tensor, got NoneType|soft_linear: x must be", {"x": 1}),
        (ValueError, r"soft_linear: x must have a last dimension of = 64, got \[3, 63\]", {"x": x[:, :63]}),
        (ValueError, "soft_linear: x must have a dtype of", {"x": x.int()}),
        (ValueError, r"soft_linear: bias must have shape = \[4\], got \[3\]", {"bias": x[:, 0]}),
        (ValueError, "soft_linear: strategy must be one of", {"strategy": "fast"}),
        (ValueError, "soft_linear: scale must have shape", {"scale": grid.scale[:, :1]}),
        (NotImplementedError, "soft_linear: impl must cover these arguments = cpp", {"impl": "cpp"}),
    ]
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            soft_linear(**{**good, **change})
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"soft_linear_step_: x must have the tokens of grad_output = \[2\]"):
        soft_linear_step_(
            torch.zeros(2, 4, device=device), x, codes, codes, grid.scale, group_size=32,
            options=StepOptions(optimizer="sgd"),
        )  # fmt: skip


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
@pytest.mark.parametrize("case", [((40, 30, 100), 64), ((33, 70, 130), 32), ((3, 5, 7), -1)])
def test_step_in_the_epilogue(optimizer, case, assert_equal, device):
    """The same bytes and counts as the matmul followed by projected_step_, in the 8-bit layout.

    x and dY hold small integers, so that the sum over tokens is exact in any order.
    """
    (tokens, rows, cols), group_size = case
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


def test_table_covers_everything():
    """Every rule set ends without a bound and names tiles that exist, for every stage."""
    from discquant.triton_kernels.soft_linear import CONFIGS, STEP_CONFIGS

    for name, stages in RULES.items():
        assert set(stages) == {"forward", "dx", "dfrac", "step"}, name
        for stage, rules in stages.items():
            assert rules[-1][0] == float("inf")
            assert [r[0] for r in rules] == sorted(r[0] for r in rules)
            for _, strategy, tile in rules:
                assert strategy in STRATEGIES
                assert tile in (STEP_CONFIGS if stage == "step" else CONFIGS)
    assert rule(torch.device("cpu"), "forward", 1) == RULES["default"]["forward"][0][1:]


def test_deterministic(make_grid, device):
    grid = make_grid((33, 64), frac=torch.uint8)
    x = torch.randn(20, 64, device=device)
    for strategy in STRATEGIES:
        first, second = (
            soft_linear(x, *grid[:4], num_bits=4, group_size=32, strategy=strategy, impl="triton")
            for _ in range(2)
        )
        assert torch.equal(first, second)


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
