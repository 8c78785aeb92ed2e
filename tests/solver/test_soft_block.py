# SPDX-License-Identifier: Apache-2.0
"""A block on the state gives the gradients of the path that writes every weight out, whatever computes the layers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant.grids import Grid, UniformGrid
from discquant.ops import StepOptions, projected_step_, soft_linear_step_
from discquant.ops.reference.soft_weight import expand_groups
from discquant.solver.chain import BlockCall, Chain, DecoderChain, Prepared
from discquant.solver.gradients import block_gradients
from discquant.solver.module_chain import ModuleChain
from discquant.solver.soft_block import SoftWeights, grid_arguments
from discquant.solver.state import WeightState
from discquant.solver.weight_ref import assemble

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dense(
    chain: Chain, states: list[list[WeightState]], dtype: torch.dtype
) -> Callable[[int], dict[str, Tensor]]:
    return lambda b: assemble(chain.weights[b], (state.soft_weight(dtype) for state in states[b]))


def _soft(
    chain: Chain, states: list[list[WeightState]], dtype: torch.dtype, **options: Any
) -> Callable[[int], SoftWeights]:
    return lambda b: SoftWeights(chain.blocks[b], chain.weights[b], states[b], dtype=dtype, **options)


def _gradients(
    chain: Chain, student: Any, batches: list[Prepared], **options: Any
) -> tuple[float, list[dict[str, Tensor]]]:
    found: list[dict[str, Tensor]] = [{} for _ in chain.blocks]
    value = block_gradients(chain, student, batches, found.__setitem__, **options)
    return value, found


def _assert_near(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], relative: float) -> None:
    for block, reference in zip(found, expected, strict=True):
        assert block.keys() == reference.keys()
        for name, grad in reference.items():
            assert block[name].shape == grad.shape
            error = (block[name].double() - grad.double()).abs().max()
            assert error <= relative * grad.double().abs().max(), f"{name}: {error}"


def _chain(model: Any) -> DecoderChain:
    return DecoderChain(model.to(DEVICE))


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("state", ["fp32", "u8"])
@pytest.mark.parametrize("architecture", ["llama-tied-bias", "phi3-fused", "gemma2-softcap"])
def test_equals_the_dense_path_in_float64(
    architecture: str,
    state: str,
    keep_graph: bool,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """Two micro-batches, biases, fused and separate projections: equal to 1e-12, loss included."""
    chain = _chain(make_model(architecture))
    states = make_states(chain, state)
    batches = [chain.prepare(token_ids[rows].to(DEVICE)) for rows in (slice(0, 2), slice(2, 4))]
    double = torch.float64
    loss, expected = _gradients(chain, _dense(chain, states, double), batches, keep_graph=keep_graph)
    soft = _soft(chain, states, double)
    assert len(soft(0)) == 0, "a weight stayed dense"
    value, found = _gradients(chain, soft, batches, keep_graph=keep_graph)
    assert abs(value - loss) <= 1e-12 * abs(loss)
    _assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("state", ["fp32", "u8"])
@pytest.mark.parametrize("kind", ["affine", "affine-bfloat", "act-order"])
def test_other_grids_equal_the_dense_path_in_float64(
    kind: str,
    state: str,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """Floating minimums and scattered groups run on the state, too; the dense weights here need neither of the op."""
    chain = _chain(make_model("llama"))
    states = make_states(chain, state, kind=kind)
    batches = [chain.prepare(token_ids[:2].to(DEVICE))]
    double = torch.float64

    def dense(index: int) -> dict[str, Tensor]:
        made = []
        for held in states[index]:
            grid = held.grid
            if isinstance(grid, UniformGrid) and grid.g_idx is not None and grid.zero_point is not None:
                # A scale for every column.
                parts = (grid.scale[:, grid.g_idx], grid.zero_point[:, grid.g_idx])
                grid = UniformGrid(3, 1, False, *parts)
                made.append(grid.soft_weight(held.q_down, held.frac, double))
            else:
                made.append(Grid.soft_weight(grid, held.q_down, held.frac, double))
        return assemble(chain.weights[index], made)

    loss, expected = _gradients(chain, dense, batches)
    soft = _soft(chain, states, double)
    assert len(soft(0)) == 0, "a weight stayed dense"
    value, found = _gradients(chain, soft, batches)
    assert abs(value - loss) <= 1e-12 * abs(loss)
    _assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("strategy", ["fused", "materialise"])
@pytest.mark.parametrize(
    ("architecture", "state", "kind"),
    [
        ("llama", "u8", "uniform"),
        ("phi3-fused", "fp32", "uniform"),
        ("llama", "u8", "affine"),
        ("phi3-fused", "u8", "act-order"),
    ],
)
def test_kernels_equal_the_dense_path(
    architecture: str,
    state: str,
    kind: str,
    strategy: str,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """float32 through the kernels: the gradients differ by rounding only."""
    chain = _chain(make_model(architecture, torch.float32))
    states = make_states(chain, state, kind=kind)
    batches = [chain.prepare(token_ids[:2].to(DEVICE))]
    single = torch.float32
    loss, expected = _gradients(chain, _dense(chain, states, single), batches)
    value, found = _gradients(chain, _soft(chain, states, single, strategy=strategy, impl="triton"), batches)
    # Three blocks of softmax, norms and products of about 50 terms each lie between a rounding and a gradient.
    bound = 2**12 * torch.finfo(single).eps
    assert abs(value - loss) <= bound * abs(loss)
    _assert_near(found, expected, bound)


@pytest.mark.parametrize("kind", ["uniform", "act-order"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradient_of_frac(
    impl: str,
    kind: str,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """by="frac" is Delta times the gradient by the weight, and a step with scale=None takes it."""
    chain = _chain(make_model("llama", torch.float32))
    states = make_states(chain, kind=kind)
    batches = [chain.prepare(token_ids[:1].to(DEVICE))]
    _, by_weight = _gradients(chain, _soft(chain, states, torch.float32, impl=impl), batches)
    _, by_frac = _gradients(chain, _soft(chain, states, torch.float32, impl=impl, by="frac"), batches)
    for refs, held, weight_grads, frac_grads in zip(chain.weights, states, by_weight, by_frac, strict=True):
        for ref, state in zip(refs, held, strict=True):
            gap, group_size = state.gap()
            gap = expand_groups(gap.float(), group_size, state.shape[1])
            grad = weight_grads[ref.param_name]
            # One rounding apart in the order of the product and the sum over tokens.
            limit = 64 * torch.finfo(torch.float32).eps * float((grad * gap).abs().max())
            assert (frac_grads[ref.param_name] - grad * gap).abs().max() <= limit
    state, grad = states[0][0], by_frac[0][chain.weights[0][0].param_name]
    before = state.frac.clone()
    counts = projected_step_(
        state.frac, state.anchor, grad, None, group_size=-1, options=StepOptions(optimizer="momentum"),
        momentum=state.momentum,
    )  # fmt: skip
    assert counts.live == state.num_live
    assert not torch.equal(state.frac, before)


def _step(state: WeightState, grad_output: Tensor, x: Tensor, impl: str, fused: bool) -> None:
    options = StepOptions(optimizer="momentum", lr=0.02, kl_weight=100.0)
    common: dict[str, Any] = {
        "group_size": state.grid.group_size, "options": options, "momentum": state.momentum, "impl": impl,
    }  # fmt: skip
    if fused:
        soft_linear_step_(grad_output, x, state.frac, state.anchor, state.grid.scale, **common)
    else:
        projected_step_(state.frac, state.anchor, grad_output, state.grid.scale, **common)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_step_in_the_epilogue(
    impl: str,
    make_model: Callable[..., Any],
    token_ids: Tensor,
    make_states: Callable[..., list[list[WeightState]]],
) -> None:
    """Stepping each layer inside backward gives the state of gradients first, steps after; no gradient is left over."""
    results = []
    for fused in (True, False):
        chain = _chain(make_model("phi3-fused", torch.float32))
        states = make_states(chain)
        batch = chain.prepare(token_ids[:2].to(DEVICE))
        left: list[dict[str, Tensor]] = [{} for _ in chain.blocks]

        def on_layer(state: WeightState, grad_output: Tensor, x: Tensor) -> bool:
            _step(state, grad_output, x, impl, True)
            return True

        def sink(
            index: int, grads: dict[str, Tensor], *, fused: bool = fused, states: Any = states,
            chain: Chain = chain, left: Any = left,
        ) -> None:  # fmt: skip
            left[index] = grads
            for ref, state in zip(chain.weights[index], states[index], strict=True):
                if not fused:
                    _step(state, grads[ref.param_name], grads[ref.param_name], impl, False)

        options: dict[str, Any] = {"on_layer": on_layer} if fused else {}
        block_gradients(chain, _soft(chain, states, torch.float32, impl=impl, **options), [batch], sink)
        assert all(not grads for grads in left) == fused
        results.append([state.frac for block in states for state in block])
    for one, other in zip(*results, strict=True):
        if impl == "reference":
            assert torch.equal(one, other)
        else:  # another order of the sum over tokens, times lr and kl_weight
            assert (one - other).abs().max() <= 1e-4


class _Odd(nn.Module):
    """A convolution, a linear layer used twice, one that is never used, and one whose weight is read directly."""

    def __init__(self, direct: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.twice = nn.Linear(16, 16, bias=False)
        self.unused = nn.Linear(16, 5)
        self.direct = nn.Linear(16, 16)
        self.read = direct

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(self.conv(x))))
        if self.read:
            return (hidden @ self.direct.weight).flatten(1)
        return self.direct(hidden).flatten(1)


def _odd(direct: bool = False) -> tuple[ModuleChain, Prepared]:
    chain = ModuleChain(_Odd(direct).double().to(DEVICE))
    return chain, chain.prepare(torch.randn(4, 3, 16, dtype=torch.float64, device=DEVICE))


def test_layers_that_stay_dense_twice_and_unused(make_states: Callable[..., list[list[WeightState]]]) -> None:
    """A convolution keeps its dense weight; two calls of one layer add up; an unused layer gets a zero gradient."""
    chain, batch = _odd()
    states = make_states(chain)
    soft = _soft(chain, states, torch.float64)
    assert set(soft(0)) == {"conv.weight"}
    _, expected = _gradients(chain, _dense(chain, states, torch.float64), [batch])
    _, found = _gradients(chain, soft, [batch])
    _assert_near(found, expected, 1e-12)
    assert not found[0]["unused.weight"].any()
    stepped: list[str] = []

    def on_layer(state: WeightState, grad_output: Tensor, x: Tensor) -> bool:
        stepped.append(state.name)
        return True

    options = {"on_layer": on_layer}
    _, rest = _gradients(chain, _soft(chain, states, torch.float64, **options), [batch])
    assert stepped == ["direct"]
    assert set(rest[0]) == {"conv.weight", "twice.weight", "unused.weight"}
    assert torch.equal(rest[0]["twice.weight"], found[0]["twice.weight"])


def test_dense_weights_go_with_their_visit(
    make_model: Callable[..., Any], token_ids: Tensor, make_states: Callable[..., list[list[WeightState]]]
) -> None:
    """By reference counts: waiting for Python's search for cycles kept a copy of every block on the device."""
    chain = _chain(make_model("llama-tied-bias").float())
    states = make_states(chain)
    make = _soft(chain, states, torch.float32, strategy="materialise")
    alive: list[weakref.ref[Any]] = []
    most = 0

    def soft(index: int) -> SoftWeights:
        nonlocal most
        made = make(index)
        alive.append(weakref.ref(made))
        alive.extend(weakref.ref(layer) for layer in made.layers.values())
        per_visit = 1 + len(made.layers)
        most = max(most, sum(ref() is not None for ref in alive) // per_visit)
        return made

    gc.disable()
    try:
        _gradients(chain, soft, [chain.prepare(token_ids.to(DEVICE))])
        assert len(chain.blocks) > 1 and not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
    assert most <= 2  # the one that is made, and the one that it replaces


def test_reading_a_weight_directly_is_noticed(make_states: Callable[..., list[list[WeightState]]]) -> None:
    """A weight that is read past its layer's forward is NaN, and the loss check names it."""
    chain, batch = _odd(direct=True)
    states = make_states(chain)
    with pytest.raises(ValueError, match="the loss must be finite, got nan"):
        _gradients(chain, _soft(chain, states, torch.float64), [batch])
    assert torch.isfinite(chain.model.direct.weight).all()


def test_modules_are_restored_after_an_error(make_states: Callable[..., list[list[WeightState]]]) -> None:
    chain, _ = _odd()
    weights = _soft(chain, make_states(chain), torch.float64)(0)
    before = dict(chain.model.named_parameters())
    with pytest.raises(RuntimeError), weights.placed():
        chain.run_block(
            0, torch.zeros(1, 2, 3, dtype=torch.float64, device=DEVICE), BlockCall((), {}), weights
        )
    for name, parameter in chain.model.named_parameters():
        assert parameter is before[name]
    assert all("forward" not in module.__dict__ for module in chain.model.modules())


def test_what_the_op_cannot_serve_stays_dense(
    make_model: Callable[..., Any], make_states: Callable[..., list[list[WeightState]]]
) -> None:
    """Another rounding to the served dtype, a grid of another kind, a replaced forward: materialised as before."""
    chain = _chain(make_model("llama", torch.float32))
    states = make_states(chain)
    single, half = torch.float32, torch.bfloat16
    everything = {ref.param_name for ref in chain.weights[0]}
    assert set(_soft(chain, states, single, served=half)(0)) == everything
    assert not _soft(chain, states, half, served=single)(0)
    assert set(_soft(chain, states, half, served=torch.float16)(0)) == everything

    class Other(Grid):
        num_bits, group_size, symmetric, scale = 3, 16, True, states[0][0].grid.scale

        def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
            raise NotImplementedError

        neighbours = columns = dequantize  # type: ignore[assignment]

    assert grid_arguments(Other(), states[0][0].frac) is None
    module = chain.blocks[0].get_submodule(chain.weights[0][0].param_name.rpartition(".")[0])
    module.forward = module.forward  # what an offloading hook does
    assert set(_soft(chain, states, single)(0)) == {chain.weights[0][0].param_name}
    del module.forward


@pytest.mark.parametrize("grad", [False, True])
def test_torchs_encoder_layer_runs_layer_by_layer(
    grad: bool, make_states: Callable[..., list[list[WeightState]]]
) -> None:
    """Its fused path reads weights past the layers, which are NaN meanwhile: also where nothing it sees needs grad."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double().to(DEVICE)
    chain = ModuleChain(model, ["out_proj"])
    batch = chain.prepare(torch.randn(4, 3, 16, dtype=torch.float64, device=DEVICE))
    states = make_states(chain)
    soft = _soft(chain, states, torch.float64)(0)
    assert set(soft.layers) == {"linear1.weight", "linear2.weight"}
    with torch.set_grad_enabled(grad), soft.placed():
        found = chain.run_block(0, batch.hidden, batch.calls[0], soft).detach()
    expected = chain.run_block(
        0, batch.hidden, batch.calls[0], _dense(chain, states, torch.float64)(0)
    ).detach()
    assert (found - expected).abs().max() <= 1e-12
    assert torch.backends.mha.get_fastpath_enabled()


def test_attentions_projection_gets_gradients(make_states: Callable[..., list[list[WeightState]]]) -> None:
    model = (
        nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten())
        .double()
        .to(DEVICE)
    )
    chain = ModuleChain(model)
    batch = chain.prepare(torch.randn(4, 3, 16, dtype=torch.float64, device=DEVICE))
    states = make_states(chain)
    _, expected = _gradients(chain, _dense(chain, states, torch.float64), [batch])
    _, found = _gradients(chain, _soft(chain, states, torch.float64), [batch])
    assert expected[0]["0.self_attn.out_proj.weight"].any()
    _assert_near(found, expected, 1e-12)
