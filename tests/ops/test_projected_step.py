# SPDX-License-Identifier: Apache-2.0
"""projected_step_: bitwise equality of the implementations, the formula against float64, feasibility, counts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.ops import StepCounts, StepOptions, projected_step_, projected_step_deferred_
from discquant.ops._steps import flatten_options
from discquant.ops.reference.counter_rng import counter_uniform, step_key
from discquant.ops.reference.projected_step import decode_frac_ref, encode_frac_ref

OP = torch.ops.discquant.projected_step_.default
OPTIMIZERS = ("adamw", "momentum", "lion", "sgd")
# frac, frac_ref, gradient, first moment, second moment
STORAGES = {
    "8bit": (torch.uint8, torch.uint8, torch.float32, torch.int8, torch.uint8),
    "16bit": (torch.uint16, torch.uint8, torch.bfloat16, torch.int8, torch.uint8),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "f32": (torch.float32, torch.float32, torch.float32, torch.float32, torch.float32),
}
OPTIONS = StepOptions(
    lr=0.03, weight_decay=0.01, step=5, moment_bound=1.5, grad_clamp=0.5, hardening=0.1, seed=3, tensor_id=7,
    first_index=2**31 - 500,
)  # fmt: skip


@pytest.fixture
def make_state(device):
    """Random state with frozen, clipped and ordinary coordinates."""

    def make(shape: tuple[int, int], storage: str, group_size: int = 64) -> dict[str, Tensor]:
        frac_type, ref_type, grad_type, first_type, second_type = STORAGES[storage]
        rows, cols = shape
        ref = torch.randint(0, 254, shape, dtype=torch.uint8)
        ref[:, ::7] = 63  # on the grid: frozen
        ref[:, 3::11] = 189
        frac = torch.rand(shape)
        top = {torch.uint8: 255, torch.uint16: 65535}.get(frac_type)
        groups = 1 if group_size == -1 else max(1, -(-cols // group_size))
        first = torch.randn(shape) * 0.3
        second = torch.rand(shape)
        state = {
            "frac": frac.to(frac_type) if top is None else (frac * top).round().to(torch.int32).to(frac_type),
            "frac_ref": ref if ref_type == torch.uint8 else decode_frac_ref(ref, torch.float32).to(ref_type),
            "weight_grad": (torch.randn(shape) * 0.05).to(grad_type),
            "scale": torch.rand(rows, groups) * 0.1,
            "momentum": (first * 60).clamp(-127, 127).to(torch.int8)
            if first_type == torch.int8
            else first.to(first_type),
            "second_moment": (second * 255).to(torch.uint8)
            if second_type == torch.uint8
            else second.to(second_type),
        }
        return {name: tensor.to(device) for name, tensor in state.items()}

    return make


def _step(
    state: dict[str, Tensor], group_size: int, options: StepOptions, **kwargs: Any
) -> tuple[dict[str, Tensor], StepCounts]:
    """Step on copies; moments that the optimizer does not have are left out."""
    copy = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in state.items()}
    unused = {"sgd": ("momentum", "second_moment"), "adamw": ()}.get(options.optimizer, ("second_moment",))
    passed = {name: None if name in unused else tensor for name, tensor in copy.items()}
    counts = projected_step_(**passed, group_size=group_size, options=options, **kwargs)
    return copy, counts


@pytest.mark.parametrize("impl", ["triton", "cpp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("storage", STORAGES)
def test_equals_reference(storage, optimizer, impl, make_state, assert_equal, device):
    """State, noise and counts equal the reference bit for bit."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(OPTIONS, optimizer=optimizer)
    for shape, group_size in (((9, 301), 64), ((3, 70), -1)):
        state = make_state(shape, storage, group_size)
        expected, expected_counts = _step(state, group_size, options, impl="reference")
        actual, counts = _step(state, group_size, options, impl=impl)
        for name in ("frac", "momentum", "second_moment"):
            assert_equal(actual[name], expected[name], f"{name} {shape}")
        assert counts == expected_counts
        assert not torch.equal(expected["frac"], state["frac"])


@pytest.mark.parametrize("impl", ["triton", "cpp"])
@pytest.mark.parametrize("packed", [False, True])
def test_table_grid(packed, impl, make_state, make_grid, assert_equal, device):
    """On a look-up grid the factor is scale * (T[q + 1] - T[q]): bit for bit a step with that factor written out."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(OPTIONS, optimizer="momentum")
    state = make_state((6, 70), "8bit", 16)
    grid = make_grid((6, 70), group_size=16, table=True, packed=packed)
    codes = grid.codes.long()
    gap = state["scale"].repeat_interleave(16, dim=1)[:, :70] * (grid.table[codes + 1] - grid.table[codes])
    expected, counts = _step({**state, "scale": gap}, 1, options, impl="reference")
    for chosen in (impl, "reference"):
        given = {**state, "q_down": grid.q_down, "table": grid.table}
        actual, found = _step(given, 16, options, impl=chosen)
        assert found == counts
        assert_equal(actual["frac"], expected["frac"], chosen)
        assert_equal(actual["momentum"], expected["momentum"], chosen)


@pytest.mark.parametrize("impl", ["triton", "cpp", "reference"])
def test_gradient_by_frac(impl, make_state, assert_equal, device):
    """scale=None takes the gradient as d frac: the same as a scale of one."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(OPTIONS, optimizer="lion")
    state = make_state((5, 33), "8bit", -1)
    state["scale"] = torch.ones_like(state["scale"])
    expected, counts = _step(state, -1, options, impl="reference")
    copy = {name: tensor.clone() for name, tensor in state.items()}
    del copy["second_moment"], copy["scale"]
    found = projected_step_(**copy, scale=None, group_size=16, options=options, impl=impl)
    assert found == counts
    assert_equal(copy["frac"], expected["frac"])
    assert_equal(copy["momentum"], expected["momentum"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matches_oracle(optimizer, make_state, assert_close):
    """float32 state against the formula in float64."""
    options = dataclasses.replace(OPTIONS, optimizer=optimizer)
    state = make_state((5, 96), "f32", 32)
    actual, _ = _step(state, 32, options, impl="triton")
    baseline, _ = _step(state, 32, options, impl="reference")
    wide, _ = _step({name: tensor.double() for name, tensor in state.items()}, 32, options, impl="reference")
    for name in ("frac", "momentum", "second_moment"):
        assert_close(actual[name], wide[name], baseline[name], name)


def test_formula_by_hand(device):
    """One coordinate per case, worked out by hand: momentum with b1 = 0, clamped, linear, projected."""
    frac = torch.tensor([[0.5, 0.5, 0.02, 0.4, 1.0, 0.3]], dtype=torch.float64, device=device)
    frac_ref = torch.tensor([[0.25, 0.75, 0.25, 0.25, 1.0, 1.5]], dtype=torch.float64, device=device)
    grad = torch.tensor([[0.001, -0.1, 0.0, 0.0, 5.0, 0.0]], dtype=torch.float64, device=device)
    scale = torch.full((1, 1), 2.0, dtype=torch.float64, device=device)
    options = StepOptions(optimizer="momentum", lr=0.1, betas=(0.0, 0.999), kl_weight=100.0, grad_clamp=1.0)
    counts = projected_step_(
        frac, frac_ref, grad, scale, group_size=-1, options=options, momentum=torch.zeros_like(frac)
    )
    # g: 0.2 + 0.5; -1 (clamped) - 0.5; 0.5 (to the wall); 0.5; frozen; frac_ref clamps to 1, so -1
    expected = torch.tensor([[0.43, 0.65, 0.0, 0.35, 1.0, 0.4]], dtype=torch.float64, device=device)
    assert (frac - expected).abs().max() < 1e-15
    assert counts == StepCounts(live=5, fractional=4, moved=1, saturated=1, nan=0)


def test_adamw_is_torchs():
    """Bias corrections in rate and epsilon give what torch.optim.AdamW gives, in float64, away from the walls."""
    place = torch.rand(3, 50, dtype=torch.float64) * 0.4 + 0.3
    theirs = torch.nn.Parameter(place.clone())
    # An epsilon that shows.
    kwargs = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.05}
    optimizer = torch.optim.AdamW([theirs], **kwargs)
    state = {"momentum": torch.zeros_like(place), "second_moment": torch.zeros_like(place)}
    reference, scale = torch.full_like(place, 0.4), torch.ones(3, 1, dtype=torch.float64)
    for step in range(1, 9):
        grad = torch.randn(3, 50, dtype=torch.float64) * 0.03
        options = StepOptions(kl_weight=1.0, grad_clamp=9.0, linear_weight=0.0, step=step, **kwargs)
        projected_step_(place, reference, grad, scale, group_size=-1, options=options, **state)
        theirs.grad = grad
        optimizer.step()
        assert (place - theirs).abs().max() < 1e-14
    assert 0 < place.min() and place.max() < 1


@pytest.mark.parametrize("impl", ["reference", "triton", "cpp"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_feasible_and_frozen(optimizer, impl, make_state, device):
    """frac stays in [0, 1] under huge gradients; frozen coordinates never move; NaN and Inf leave theirs alone."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    for storage in ("8bit", "f32"):
        state = make_state((4, 64), storage, 32)
        state["weight_grad"] = state["weight_grad"] * 1e30
        state["weight_grad"][1, 1], state["weight_grad"][1, 2] = float("nan"), float("inf")
        reference = decode_frac_ref(state["frac_ref"], torch.float32)
        frozen = (reference == 0) | (reference == 1)
        after, counts = _step(state, 32, dataclasses.replace(OPTIONS, optimizer=optimizer, lr=3.0), impl=impl)
        assert torch.equal(after["frac"][frozen], state["frac"][frozen])
        for name in ("frac", "momentum", "second_moment"):
            assert torch.equal(after[name][1, 1:3], state[name][1, 1:3]), name
        assert counts.nan == 2
        assert counts.live == int((~frozen).sum())
        if storage == "f32":
            assert after["frac"].min() >= 0
            assert after["frac"].max() <= 1


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_independent_of_sharding(impl, make_state, assert_equal, device):
    """Stepping row blocks with their first_index gives the same bytes and counts as stepping the whole."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(OPTIONS, optimizer="adamw")
    state = make_state((8, 100), "8bit", 32)
    whole, counts = _step(state, 32, options, impl=impl)
    totals = [0] * 5
    for begin, end in ((0, 3), (3, 8)):
        part = {name: tensor[begin:end].contiguous() for name, tensor in state.items()}
        shard = dataclasses.replace(options, first_index=options.first_index + begin * 100)
        stepped, part_counts = _step(part, 32, shard, impl=impl)
        totals = [a + b for a, b in zip(totals, part_counts, strict=True)]
        for name in ("frac", "momentum", "second_moment"):
            assert_equal(stepped[name], whole[name][begin:end], name)
    assert StepCounts(*totals) == counts


def test_independent_of_tiling(make_state, assert_equal):
    """The launcher's tile changes no byte."""
    from discquant.triton_kernels.projected_step import projected_step_fwd

    from discquant.ops._steps import launch_arguments

    options = dataclasses.replace(OPTIONS, optimizer="momentum")
    state = make_state((6, 90), "8bit", 32)
    results = []
    for block in ((4, 64, 1), (16, 16, 3), (1, 128, 1), (1, 16, 6)):
        copy = {name: tensor.clone() for name, tensor in state.items()}
        counts = projected_step_fwd(
            copy["frac"], copy["frac_ref"], copy["weight_grad"], copy["scale"], copy["momentum"], None, None, None, 32,
            *launch_arguments(*flatten_options(options)), block=block,
        )  # fmt: skip
        results.append((copy["frac"], copy["momentum"], counts))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert_equal(right, left)


def test_wide_rows_and_weights_of_terms(make_state, assert_equal):
    """Rows of many tiles, whole and with an overhang, and terms that are left out where their weight says so."""
    from discquant.triton_kernels.projected_step import _tiling

    # 4096 columns: 16 tiles in one program; 11008: 43, which have no divisor, so two programs and an overhang.
    assert _tiling(4096, 4096, True) == ((1, 256, 16), 1)
    assert _tiling(4096, 11008, True) == ((1, 256, 22), 1)
    for cols, linear, hardening in ((1100, 0.0, 0.0), (1280, 1.0, 0.0), (1100, 0.0, 0.3), (1280, 0.7, 0.3)):
        options = dataclasses.replace(OPTIONS, optimizer="lion", linear_weight=linear, hardening=hardening)
        state = make_state((3, cols), "8bit")
        expected, counts = _step(state, 64, options, impl="reference")
        actual, found = _step(state, 64, options, impl="triton")
        assert found == counts
        for name in ("frac", "momentum"):
            assert_equal(actual[name], expected[name], f"{name} {cols}")


@pytest.mark.parametrize("impl", ["reference", "triton", "cpp"])
def test_stochastic_rounding_is_unbiased(impl, device):
    """The mean of many rounded steps is the exact step: 0.3 of a code up, within five standard errors."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    shape = (64, 256)
    frac = torch.full(shape, 100, dtype=torch.uint8, device=device)
    frac_ref = torch.full(shape, 0.25, device=device)
    options = StepOptions(optimizer="sgd", lr=0.3 / 255 * 2, linear_weight=-1.0)  # g = -0.5: up by 0.3 codes
    projected_step_(
        frac, frac_ref, torch.zeros(shape, device=device), torch.ones(64, 1, device=device), group_size=-1,
        options=options, impl=impl,
    )  # fmt: skip
    up = frac.double().mean() - 100
    assert set(frac.unique().tolist()) == {100, 101}
    assert abs(up - 0.3) < 5 * (0.21 / frac.numel()) ** 0.5


def test_noise_is_the_documented_one(device):
    """floor(value + u) with u = counter_uniform(key, index): the kernel's codes from the generator's numbers."""
    frac = torch.full((4, 32), 0, dtype=torch.uint8, device=device)
    ref = torch.full((4, 32), 0.5, device=device)
    options = StepOptions(
        optimizer="sgd", lr=1.0, hardening=-10.4 / 255, linear_weight=0.0, seed=9, step=4, tensor_id=2
    )
    projected_step_(
        frac, ref, torch.zeros(4, 32, device=device), torch.ones(4, 1, device=device), group_size=-1,
        options=options, impl="triton",
    )  # fmt: skip
    noise = counter_uniform(step_key(9, 4, 2), 0, 128, torch.device("cpu")).view(4, 32)
    moved = torch.tensor(10.4 / 255) * 255
    assert torch.equal(frac.cpu(), torch.floor(moved + noise).to(torch.uint8))


def test_deferred_and_deterministic(make_state, assert_equal):
    """The variant that does not wait gives the same state and counts, twice."""
    options = dataclasses.replace(OPTIONS, optimizer="lion")
    state = make_state((5, 64), "8bit")
    expected, counts = _step(state, 64, options, impl="triton")
    for impl in ("triton", "reference"):
        copy = {name: tensor.clone() for name, tensor in state.items()}
        deferred = projected_step_deferred_(**copy, group_size=64, options=options, impl=impl)
        assert deferred.tolist() == list(counts)
        assert_equal(copy["frac"], expected["frac"])
        assert_equal(copy["second_moment"], state["second_moment"], "lion has no second moment")


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_strides(impl, make_state, assert_equal, device):
    """Transposed storage: Triton steps it in place, C++ refuses it by name, auto takes another way."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(OPTIONS, optimizer="momentum")
    state = make_state((8, 64), "8bit")
    expected, counts = _step(state, 64, options, impl="reference")
    turned = {name: tensor.t().contiguous().t() for name, tensor in state.items()}
    if impl == "cpp":
        with pytest.raises(NotImplementedError, match=r"projected_step_: .* got a non-contiguous frac"):
            _step(turned, 64, options, impl="cpp")
        impl = "auto"
    actual, turned_counts = _step(turned, 64, options, impl=impl)
    assert turned_counts == counts
    assert_equal(actual["frac"], expected["frac"])
    assert_equal(actual["momentum"], expected["momentum"])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1), (7, 13)])
@pytest.mark.parametrize("impl", ["triton", "cpp", "reference"])
def test_small_shapes(shape, impl, make_state, device):
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    state = make_state(shape, "8bit", -1)
    _, counts = _step(state, -1, dataclasses.replace(OPTIONS, optimizer="momentum"), impl=impl)
    reference = decode_frac_ref(state["frac_ref"], torch.float32)
    assert counts.live == int(((reference != 0) & (reference != 1)).sum())


@pytest.mark.parametrize("storage", ["8bit", "f32"])
def test_opcheck(storage, make_state):
    for optimizer in ("adamw", "sgd"):
        state = make_state((4, 48), storage, 16)
        first = None if optimizer == "sgd" else state["momentum"]
        second = None if optimizer == "sgd" else state["second_moment"]
        arguments = (
            state["frac"],
            state["frac_ref"],
            state["weight_grad"],
            state["scale"],
            first,
            second,
            None,
            None,
            16,
        )
        torch.library.opcheck(
            OP, (*arguments, *flatten_options(dataclasses.replace(OPTIONS, optimizer=optimizer)))
        )


def test_compile(make_state, assert_equal):
    options = dataclasses.replace(OPTIONS, optimizer="momentum")

    def step(frac, frac_ref, grad, scale, momentum):
        return projected_step_deferred_(
            frac, frac_ref, grad * 2, scale, group_size=16, options=options, momentum=momentum, impl="triton"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 64), (6, 48)):
        state = make_state(shape, "8bit", 16)
        del state["second_moment"]
        other = {name: tensor.clone() for name, tensor in state.items()}
        assert_equal(compiled(*state.values()), step(*other.values()))
        assert_equal(state["frac"], other["frac"])


def test_rejects_bad_input(make_state):
    state = make_state((4, 64), "8bit", 32)
    good: dict[str, Any] = {**state, "group_size": 32, "options": OPTIONS, "impl": "triton"}
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "projected_step_: frac must be of type = Tensor, got list", {"frac": [1.0]}),
        (TypeError, "projected_step_: options must be of type = StepOptions, got dict", {"options": {}}),
        (
            ValueError,
            r"projected_step_: frac_ref must have the shape of frac = \[4, 64\], got \[4, 63\]",
            {"frac_ref": state["frac_ref"][:, :63]},
        ),
        (
            ValueError,
            r"projected_step_: scale must have shape .* = \[4, 2\], got \[4, 1\]",
            {"scale": state["scale"][:, :1]},
        ),
        (TypeError, "projected_step_: scale must be of type = Tensor, got float", {"scale": 1.0}),
        (TypeError, "projected_step_: weight_grad must be of type = Tensor, got int", {"weight_grad": 1}),
        (
            ValueError,
            "projected_step_: table must without scale be = None, got a Tensor",
            {"scale": None, "table": torch.linspace(-1, 1, 16)},
        ),
        (
            ValueError,
            "projected_step_: q_down must with a table be = a Tensor, got None",
            {"table": torch.linspace(-1, 1, 16)},
        ),
        (
            ValueError,
            "projected_step_: weight_grad must have the shape of frac",
            {"weight_grad": state["weight_grad"][1:]},
        ),
        (ValueError, "projected_step_: weight_grad must have a dtype of", {"weight_grad": state["frac"]}),
        (ValueError, "projected_step_: frac must have a dtype of", {"frac": state["frac"].int()}),
        (ValueError, "projected_step_: momentum must for adamw be = a Tensor, got None", {"momentum": None}),
        (
            ValueError,
            "projected_step_: second_moment must have a dtype of",
            {"second_moment": state["momentum"]},
        ),
        (
            ValueError,
            "projected_step_: optimizer must be one of",
            {"options": dataclasses.replace(OPTIONS, optimizer="adagrad")},
        ),  # type: ignore[arg-type]
        (
            ValueError,
            "projected_step_: lr must be = finite, got nan",
            {"options": dataclasses.replace(OPTIONS, lr=float("nan"))},
        ),
        (
            ValueError,
            "projected_step_: step must be at least = 1, got 0",
            {"options": dataclasses.replace(OPTIONS, step=0)},
        ),
        (
            ValueError,
            "projected_step_: first_index must keep indices in",
            {"options": dataclasses.replace(OPTIONS, first_index=2**32 - 1)},
        ),
        (
            ValueError,
            "projected_step_: frac_ref must be on the device = .*, got meta",
            {"frac_ref": state["frac_ref"].to("meta")},
        ),
        (
            ValueError,
            r"projected_step_: betas must be two numbers in = \[0, 1\), got \(1.0, 0.5\)",
            {"options": dataclasses.replace(OPTIONS, betas=(1.0, 0.5))},
        ),
        (
            ValueError,
            "projected_step_: eps must be at least = 0, got -1",
            {"options": dataclasses.replace(OPTIONS, eps=-1.0)},
        ),
        (
            ValueError,
            "projected_step_: weight_decay must be finite and at least = 0, got -0.1",
            {"options": dataclasses.replace(OPTIONS, weight_decay=-0.1)},
        ),
        (
            ValueError,
            "projected_step_: grad_clamp must be at least = 0, got -1",
            {"options": dataclasses.replace(OPTIONS, grad_clamp=-1.0)},
        ),
        (
            ValueError,
            "projected_step_: moment_bound must be above = 0, got 0",
            {"options": dataclasses.replace(OPTIONS, moment_bound=0.0)},
        ),
        (ValueError, "projected_step_: group_size must be positive or = -1, got -2", {"group_size": -2}),
        (TypeError, "projected_step_: frac_ref must be of type = Tensor, got NoneType", {"frac_ref": None}),
        (
            NotImplementedError,
            "projected_step_: impl must cover these arguments = triton, got float64",
            {"weight_grad": state["weight_grad"].double()},
        ),
    ]
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            projected_step_(**{**good, **change})


def test_frac_ref_code(assert_equal):
    """Round trip of every code; 0, 1/2 and 1 exact; what does not fit is refused."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert_equal(encode_frac_ref(decode_frac_ref(codes, torch.float32)), codes)
    assert_equal(
        encode_frac_ref(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([63, 126, 189], dtype=torch.uint8)
    )
    for value in (-0.51, 1.53):
        with pytest.raises(ValueError, match="encode_frac_ref: frac_ref must lie in"):
            encode_frac_ref(torch.tensor([value]))


@pytest.mark.gpu
def test_llama_shapes_on_gpu(make_state, assert_equal):
    for optimizer, storage in itertools.product(OPTIMIZERS, ("8bit", "f32", "bf16")):
        options = dataclasses.replace(OPTIONS, optimizer=optimizer, first_index=0)
        state = make_state((4096, 14336), storage)
        expected, expected_counts = _step(state, 64, options, impl="reference")
        actual, counts = _step(state, 64, options, impl="triton")
        assert counts == expected_counts
        for name in ("frac", "momentum", "second_moment"):
            assert_equal(actual[name], expected[name], f"{optimizer} {storage} {name}")
