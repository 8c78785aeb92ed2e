# SPDX-License-Identifier: Apache-2.0
"""Kronecker factors of the KL's curvature, and the term that they add to a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.solver.chain import DecoderChain
from discquant.solver.curvature import Factors, kronecker_factors, rows_at_once
from discquant.solver.kronecker import (
    curvature_gradient,
    triangle_shape,
    unpack_triangles,
)
from discquant.solver.measure import mean_kl
from discquant.solver.module_chain import ModuleChain
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids


def dense(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """The whole factor that its blocks stand for."""
    return torch.block_diag(*blocks)[:size, :size]


def whole_model_factors(
    model: Any, chain: DecoderChain, rows: TokenRows, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same factors from one ordinary backward pass of the whole model, labels drawn in the same order."""
    names = {ref.name for refs in chain.weights for ref in refs}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: seen[name].extend((args[0].detach(), out))
        )
        for name, module in model.named_modules()
        if name in names
    ]
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    embedding = model.get_input_embeddings()
    for begin in range(0, len(rows), rows.micro_batch):
        part = slice(begin, begin + rows.micro_batch)
        ids = rows.input_ids[part]
        mask = torch.ones_like(ids, dtype=torch.bool) if rows.mask is None else rows.mask[part]
        for values in seen.values():
            values.clear()
        inputs = embedding(ids).detach().requires_grad_()
        # Some models scale what the embedding gives; called through input_ids they do it themselves.
        hook = embedding.register_forward_hook(lambda m, args, out, value=inputs: value)
        logits = model(input_ids=ids, use_cache=False).logits
        hook.remove()
        probability = torch.softmax(logits.detach().flatten(0, 1), dim=-1)
        label = torch.multinomial(probability, 1, generator=generator).flatten()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), label, reduction="none")
        outputs = {name: values[1] for name, values in seen.items()}
        grads = torch.autograd.grad((losses * mask.flatten()).sum(), list(outputs.values()))
        for (name, _), grad in zip(outputs.items(), grads, strict=True):
            x, g = seen[name][0].flatten(0, 1), grad.flatten(0, 1)
            before = found.get(name, (torch.zeros(()), torch.zeros(())))
            energy = g.square().sum(dim=1, keepdim=True)
            assert not energy[~mask.flatten()].any()
            found[name] = (before[0] + x.T @ (energy * x), before[1] + g.T @ g)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "architecture", ["llama", "llama-tied-bias", "phi3-fused", "gemma2-softcap", "cohere-logit-scale"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_factors_match_a_whole_model_pass(
    architecture: str, masked: bool, make_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = make_model(architecture)
    chain = DecoderChain(model)
    mask = None
    if masked:
        mask = torch.ones_like(token_ids, dtype=torch.bool)
        mask[0, 5:] = False
        mask[3, 9:] = False
    rows = TokenRows(chain, token_ids, mask, 4)  # one micro-batch: labels are drawn in one order in both
    found: dict[str, Factors] = {}
    order: list[int] = []

    def sink(index: int, factors: dict[str, Factors]) -> None:
        order.append(index)
        found.update(factors)

    total = rows.tokens(range(4), "kl")
    kronecker_factors(
        chain,
        rows.batches(range(4)),
        sink,
        total=total,
        width=1024,
        generator=torch.Generator().manual_seed(11),
    )
    expected = whole_model_factors(model, chain, rows, 11)
    assert order == list(reversed(range(len(chain.blocks))))
    assert found.keys() == expected.keys()
    for name, (inputs, outputs) in expected.items():
        torch.testing.assert_close(found[name].inputs[0], inputs / total, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[name].outputs[0], outputs / total, rtol=1e-9, atol=1e-12)


def make_solve(chain: Any, ids: torch.Tensor, **options: Any) -> Solve:
    """A solve on a 3-bit grid."""
    config = QuantizeConfig(
        grid=GridConfig(3, 16),
        solver=SolverConfig(**{"iters": 6, "batch_size": 4, "micro_batch": 2, "warmup": 1, **options}),
        gptq_samples=4,
    )
    return Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 2), config)


def test_zero_and_other_losses_have_no_factors(
    make_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    for options in ({"curvature": 0.0}, {"loss": "ce"}, {"loss": "mse"}):
        run = make_solve(DecoderChain(make_model("llama", torch.float32)), token_ids, **options)
        assert all(state.curvature_in is None for block in run.solver.states for state in block)


@pytest.mark.parametrize("state", ["fp32", "u8"])
@pytest.mark.parametrize("width", [16, 1024])
def test_term_reaches_the_step(
    state: str, width: int, make_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    """The gradient of a step is that of the tokens plus the weighted term."""
    chain = DecoderChain(make_model("llama", torch.float32))
    run = make_solve(chain, token_ids, curvature=2.0, state=state, curvature_width=width)
    solver = run.solver
    ref, weight_state = chain.weights[1][0], solver.states[1][0]
    assert weight_state.curvature_in is not None
    assert weight_state.curvature_out is not None
    assert weight_state.curvature_in.shape == triangle_shape(ref.matrix().shape[1], width)
    inputs, outputs = (unpack_triangles(t) for t in (weight_state.curvature_in, weight_state.curvature_out))
    error = weight_state.soft_weight(torch.float32) - (
        ref.matrix() if state == "fp32" else weight_state.teacher_weight(torch.float32)
    )
    grad = torch.randn(weight_state.shape)
    term = dense(outputs.float(), error.shape[0]) @ error @ dense(inputs.float(), error.shape[1])
    found = solver.with_curvature(ref, weight_state, grad, 2.0)
    torch.testing.assert_close(found, grad + 2.0 * term)
    # On a CPU the bits of the plain formula.
    own = weight_state.curvature_gradient(ref.matrix(), torch.float32)
    assert own is not None
    assert torch.equal(own, curvature_gradient(error, inputs.float(), outputs.float()))
    before = weight_state.frac.clone()
    run.advance()
    assert not torch.equal(before, weight_state.frac)


def test_a_module_without_head_has_factors_of_its_linear_layers(token_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 5),
    )
    run = make_solve(ModuleChain(model), torch.randn(4, 1, 4, 4), start="ref")
    with_factors = {state.name for state in run.solver.states[0] if state.curvature_in is not None}
    assert with_factors == {"3", "5"}
    assert all(
        bool(state.curvature_in.any()) for state in run.solver.states[0] if state.curvature_in is not None
    )
    run.advance()


def test_a_shared_layer_counts_its_rows_once() -> None:
    """A layer that sees R rows for each item of the loss: the sum over the R rows of x x^T (x) g g^T, not R^2."""
    torch.manual_seed(1)
    rows_per_item = 5

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 4).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).sum(dim=1)

    model = Mean()
    chain = ModuleChain(model)
    inputs = torch.randn(64, rows_per_item, 3, dtype=torch.float64)
    found: dict[str, Factors] = {}
    batch = chain.prepare(inputs)
    kronecker_factors(
        chain, [batch], lambda index, factors: found.update(factors), total=64, width=16,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    # Every row of an item gets the gradient of the item's logits.
    probability = torch.softmax(model(inputs), dim=-1).detach()
    label = torch.multinomial(probability, 1, generator=torch.Generator().manual_seed(2))
    g = probability - torch.nn.functional.one_hot(label.flatten(), 4)
    torch.testing.assert_close(found["layer"].outputs[0], rows_per_item * g.T @ g / 64)
    x, energy = inputs.flatten(0, 1), g.square().sum(dim=1).repeat_interleave(rows_per_item)
    torch.testing.assert_close(found["layer"].inputs[0], x.T @ (energy[:, None] * x) / 64)


def quadratic(error: torch.Tensor, factors: Factors) -> float:
    """1/2 <E, G E A> / trace(G)."""
    trace = torch.diagonal(factors.outputs, dim1=1, dim2=2).sum()
    return 0.5 * float((error * curvature_gradient(error, *factors)).sum() / trace)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3)])
def test_the_quadratic_is_the_measured_kl(shape: tuple[int, ...]) -> None:
    """1/2 <E, G E H> of one layer of a module against its mean KL, also where an item has several rows of logits."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12, bias=False)).double()
    chain = ModuleChain(model)
    batch = chain.prepare(torch.randn(600, *shape, 16, dtype=torch.float64))
    found: dict[str, Factors] = {}
    kronecker_factors(
        chain, [batch], lambda index, factors: found.update(factors), total=600, width=16,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    error = 1e-2 * torch.randn(12, 16, dtype=torch.float64)
    kl = mean_kl(chain, lambda index: {"0.weight": model[0].weight.detach() + error}, [batch])
    assert 0.85 < quadratic(error, found["0"]) / kl < 1.15


def test_inputs_count_by_the_energy_of_their_gradients() -> None:
    """Where the largest inputs have the smallest gradients: the KL, and not many times it."""

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 12, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) / x.square().mean(dim=-1, keepdim=True)

    torch.manual_seed(3)
    model = Gated()
    chain = ModuleChain(model)
    inputs = (
        torch.randn(3000, 16, dtype=torch.float64) * torch.logspace(0, 1, 3000, dtype=torch.float64)[:, None]
    )
    batch = chain.prepare(inputs)
    found: dict[str, Factors] = {}
    kronecker_factors(
        chain, [batch], lambda index, factors: found.update(factors), total=3000, width=16,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    factors = found["layer"]
    error = 1e-2 * torch.randn(12, 16, dtype=torch.float64)
    kl = mean_kl(chain, lambda index: {"layer.weight": model.layer.weight.detach() + error}, [batch])
    assert 0.8 < quadratic(error, factors) / kl < 1.25
    plain = Factors(inputs.T @ inputs / 3000 * torch.diagonal(factors.outputs[0]).sum(), factors.outputs[0])
    assert quadratic(error, Factors(plain.inputs[None], plain.outputs[None])) / kl > 5


def test_a_module_of_token_ids_has_factors(token_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(61, 8), torch.nn.Linear(8, 8), torch.nn.Flatten(), torch.nn.Linear(96, 5)
    )
    run = make_solve(ModuleChain(model), token_ids, start="ref")
    assert all(
        bool(state.curvature_out.any()) for state in run.solver.states[0] if state.curvature_out is not None
    )
    run.advance()


def test_narrow_factors_of_many_windows(make_model: Callable[..., Any]) -> None:
    """A bfloat16 sum of 512 parts would lose a tenth: steps of one window gather on more at once."""
    ids = torch.randint(3, 61, (512, 4), generator=torch.Generator().manual_seed(1))
    found = []
    for state in ("fp32", "bf16"):
        chain = DecoderChain(make_model("llama", torch.float32), ["*.layers.0.*", "*.layers.1.*"])
        run = make_solve(
            chain, ids, state=state, start="ref", batch_size=1, micro_batch=4, curvature_samples=512
        )
        found.append(run.solver.states[2])
    for wide, narrow in zip(*found, strict=True):
        for one, other in (
            (wide.curvature_in, narrow.curvature_in),
            (wide.curvature_out, narrow.curvature_out),
        ):
            assert one is not None and other is not None and other.dtype == torch.bfloat16
            assert float((one - other).norm() / one.norm()) < 0.03
    assert rows_at_once(256, 8) == 8 and rows_at_once(256, 1) == 2 and rows_at_once(4096, 8) == 32
    assert (
        rows_at_once(128, 1) == 1 and rows_at_once(129, 1) == 2
    )  # never more parts than these lose nothing in


def test_same_seed_same_factors(make_model: Callable[..., Any], token_ids: torch.Tensor) -> None:
    runs = [make_solve(DecoderChain(make_model("llama", torch.float32)), token_ids) for _ in range(2)]
    for one, other in zip(*(run.solver.states[0] for run in runs), strict=True):
        assert one.curvature_out is not None
        assert other.curvature_out is not None
        assert torch.equal(one.curvature_out, other.curvature_out)


def test_published_recipe_has_no_curvature() -> None:
    from discquant.config import preset

    assert preset("paper", GridConfig(3, 64)).curvature == 0
    with pytest.raises(ValueError, match="curvature"):
        dataclasses.replace(SolverConfig(), curvature=-1.0)


def test_attentions_projection_has_factors() -> None:
    """Also that of torch's own attention, which never calls it: inputs and gradients come from the attention."""
    torch.manual_seed(5)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()

    class Attending(torch.nn.Module):
        def __init__(self, project: bool) -> None:
            super().__init__()
            self.attention = attention
            self.project = torch.nn.Linear(8, 8).double() if project else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.attention(x, x, x, need_weights=False)[0]
            return found if self.project is None else self.project(found)

    def factors(model: torch.nn.Module, name: str) -> Factors:
        found: dict[str, Factors] = {}
        chain = ModuleChain(model)
        kronecker_factors(
            chain, [chain.prepare(inputs)], lambda index, given: found.update(given), total=6, width=16,
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        return found[name]

    inputs = torch.randn(6, 5, 8, dtype=torch.float64)
    within = factors(Attending(False), "attention.out_proj")
    # The same function with its projection in a layer of its own, after the identity.
    model = Attending(True)
    assert model.project is not None
    model.project.load_state_dict(attention.out_proj.state_dict())
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(8))
        attention.out_proj.bias.zero_()
    for one, other in zip(within, factors(model, "project"), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_an_attention_are_paired_in_either_layout() -> None:
    """`out_proj` of torch's attention, windows or positions first: each input with the gradient of its own output."""

    class Net(torch.nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
            self.head = torch.nn.Linear(8, 5).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.attention.batch_first
            turned = x if first else x.transpose(0, 1)
            found = self.attention(turned, turned, turned, need_weights=False)[0]
            return self.head((found if first else found.transpose(0, 1)).square().mean(dim=1))

    inputs = torch.randn(6, 4, 8, dtype=torch.float64) * torch.logspace(0, 1, 4, dtype=torch.float64)[:, None]
    made: list[dict[str, Factors]] = []
    for batch_first in (True, False):
        found: dict[str, Factors] = {}
        chain = ModuleChain(Net(batch_first))
        kronecker_factors(
            chain, [chain.prepare(inputs)], lambda index, factors, found=found: found.update(factors),  # type: ignore[misc]
            total=6, width=16, generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        made.append(found)
    assert made[0].keys() == made[1].keys() == {"attention.out_proj", "head"}
    for name in made[0]:
        for one, other in zip(made[0][name], made[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
