# SPDX-License-Identifier: Apache-2.0
"""GPTQ guided by gradients: each token counts by the energy of the gradient that the layer's output receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import discquant
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.planning.hardware import DEVICES
from discquant.planning.memory import phase_peaks
from discquant.planning.plan import Machine, setting_for
from discquant.planning.shape import shape_of
from discquant.rounding import gptq
from discquant.run.pipeline import Pipeline
from discquant.solver.chain import DecoderChain
from discquant.solver.energies import _Rows, energies_of, token_energies
from discquant.solver.layerwise import GUIDED_DAMP, layerwise_codes
from discquant.solver.module_chain import ModuleChain
from discquant.solver.rows import TokenRows
from discquant.solver.sampled import label_generator, sampled_gradient
from discquant.solver.solve import lay_grids

CPU = torch.device("cpu")


def rows_of(chain: DecoderChain, masked: bool = False) -> TokenRows:
    ids = torch.randint(3, 61, (6, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if masked:
        mask[2, 5:] = False
    return TokenRows(chain, ids, mask, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_energies_are_those_of_the_gradients(masked: bool, make_model: Callable[..., Any]) -> None:
    """Against autograd through the whole model, on the same labels; in order, mean 1, none where nothing counts."""
    chain = DecoderChain(make_model("llama", torch.float32))
    rows = rows_of(chain, masked)
    batches = rows.batches(range(6))
    found = token_energies(chain, batches, at_once=3, generator=label_generator(CPU, 5))
    generator = label_generator(CPU, 5)
    pulls = [sampled_gradient(chain, batch, chain.teacher_output(batch), generator) for batch in batches]
    name = chain.weights[0][-1].name
    seen: list[torch.Tensor] = []
    handle = chain.model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out))
    energies = []
    for batch, pull in zip(batches, pulls, strict=True):
        seen.clear()
        with torch.enable_grad():
            hidden = batch.hidden.detach().requires_grad_()
            for index, call in enumerate(batch.calls):
                hidden = chain.run_block(index, hidden, call)
            (grad,) = torch.autograd.grad(hidden, seen, pull)
        energies.append(grad.flatten(0, 1).square().sum(dim=1))
    handle.remove()
    expected = torch.cat(energies)
    torch.testing.assert_close(found[name], expected / expected.mean(), rtol=1e-4, atol=1e-6)
    assert found.keys() == {ref.name for refs in chain.weights for ref in refs}
    assert all(rows.shape == (72,) and float(rows.mean()) == pytest.approx(1) for rows in found.values())
    if masked:
        assert not found[name].view(6, 12)[2, 5:].any() and bool(found[name].view(6, 12)[2, :5].all())
    # However many are taken together.
    alone = token_energies(chain, batches, at_once=1, generator=label_generator(CPU, 5))
    assert all(torch.allclose(found[key], alone[key], rtol=1e-5) for key in found)


@pytest.mark.parametrize("at_once", [1, 3])
def test_energies_of_a_module_are_wide_and_in_order(at_once: int) -> None:
    """Gradients of a bfloat16 module are bfloat16; their squares and sums are not."""
    torch.manual_seed(0)
    chain = ModuleChain(torch.nn.Sequential(torch.nn.Linear(8, 5)).bfloat16())
    batches = [chain.prepare(torch.randn(rows, 8).bfloat16()) for rows in (64, 16, 32)]
    (found,) = token_energies(chain, batches, at_once=at_once, generator=label_generator(CPU, 3)).values()
    generator = label_generator(CPU, 3)
    grads = [sampled_gradient(chain, batch, chain.teacher_output(batch), generator) for batch in batches]
    expected = torch.cat(grads).float().square().sum(dim=1)
    torch.testing.assert_close(found, expected / expected.mean())


def test_a_step_may_be_smaller_than_a_micro_batch(make_model: Callable[..., Any]) -> None:
    """Energies are then measured a micro-batch at a time."""
    chain = DecoderChain(make_model("llama", torch.float32))
    batches = rows_of(chain).batches(range(6))
    small, equal = (
        QuantizeConfig(gptq_samples=6, solver=SolverConfig(batch_size=size, micro_batch=2)) for size in (1, 2)
    )
    found, expected = energies_of(chain, batches, small), energies_of(chain, batches, equal)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], rows) for name, rows in expected.items())


def test_the_first_layer_is_gptq_on_weighted_inputs(make_model: Callable[..., Any]) -> None:
    chain = DecoderChain(make_model("llama", torch.float32))
    rows, grid = rows_of(chain, masked=True), GridConfig(3, 16)
    batches, grids = rows.batches(range(6)), lay_grids(chain, grid)
    energies = token_energies(chain, batches, at_once=3, generator=label_generator(CPU, 5))
    codes = layerwise_codes(chain, grids, batches, "guided", damp=0.1, energies=energies)
    ref = chain.weights[0][0]
    inputs: list[torch.Tensor] = []
    handle = chain.model.get_submodule(ref.name).register_forward_hook(
        lambda m, args, out: inputs.append(args[0])
    )
    for batch in batches:
        chain.run_block(0, batch.hidden, batch.calls[0])
    handle.remove()
    x = torch.cat([part.flatten(0, 1) for part in inputs]).double()
    hessian = x.T @ (energies[ref.name].double()[:, None] * x)
    assert torch.equal(codes[ref.name], gptq(ref.matrix(), hessian, grids[ref.name], damp=0.1 * GUIDED_DAMP))
    plain = layerwise_codes(chain, grids, batches, "gptq", damp=0.1)
    assert any(not torch.equal(codes[name], plain[name]) for name in codes)
    # Without energies a layer is GPTQ's, its damping too.
    none = layerwise_codes(chain, grids, batches, "guided", damp=0.1, energies={})
    assert all(torch.equal(none[name], plain[name]) for name in plain)


def test_everywhere_a_method_is_named(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    """In memory, in a run, as a baseline and streamed: the same codes; convolutions are rounded as by GPTQ."""
    from safetensors.torch import save_file

    model = make_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 61, (12, 12), generator=torch.Generator().manual_seed(1))
    save_file({"text": ids.int()}, tmp_path / "tokens.safetensors")
    config = QuantizeConfig(
        grid=GridConfig(3, 16), method="guided", format="none", baselines=("rtn",), gptq_samples=8,
        validation_windows=4,
        data=DataConfig(f"{tmp_path / 'tokens.safetensors'}:text", 8, 12),
        solver=SolverConfig(iters=2, batch_size=2, micro_batch=2, warmup=1),
    )  # fmt: skip
    from discquant.run.directory import RunDirectory
    from discquant.solver.engine import Engine

    Pipeline(tmp_path / "model", tmp_path / "out", config).execute()
    expected = {layer.name: layer.q for layer in RunDirectory(tmp_path / "out").coded_layers()}
    Pipeline(tmp_path / "model", tmp_path / "disk", config, engine=Engine("disk")).execute()
    streamed = {layer.name: layer.q for layer in RunDirectory(tmp_path / "disk").coded_layers()}
    assert expected.keys() == streamed.keys() and all(torch.equal(expected[n], streamed[n]) for n in expected)
    inside = discquant.quantize(model, config=config, calibration=ids[:8])
    assert expected.keys() == inside.codes.keys()
    beside = dataclasses.replace(config, method="discquant", baselines=("gptq", "guided"))
    summary = Pipeline(tmp_path / "model", tmp_path / "solved", beside).execute()
    assert set(summary["methods"]) == {"gptq", "guided", "discquant"}
    assert "guided GPTQ" in (tmp_path / "solved" / "report.md").read_text()
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    chain = ModuleChain(net)
    batches = TokenRows(chain, torch.randn(4, 1, 4, 4), None, 2).batches(range(4))  # type: ignore[arg-type]
    assert energies_of(chain, batches, config).keys() == {"2"}
    done = discquant.quantize_module(
        net, torch.randn(4, 1, 4, 4), dataclasses.replace(config, grid=GridConfig(4, -1))
    )
    assert done.codes.keys() == {"0", "2"}


def test_the_plan_counts_the_energies(make_model: Callable[..., Any]) -> None:
    shape = shape_of(make_model("llama", torch.float32), name="small")

    def start(method: Any, samples: int) -> dict[str, float]:
        config = QuantizeConfig(method=method, gptq_samples=samples, data=DataConfig("text.txt", 4096, 256))
        setting = setting_for(shape, config, "resident", Machine(DEVICES["cpu"], 1e15, 1e15))
        return next(peak for peak in phase_peaks(shape, setting) if peak.name == "start").host

    layers = sum(m.count for block in shape.blocks for m in block.matrices)
    assert start("guided", 256)["energies of gradients"] == 4 * 256 * 256 * layers
    assert "energies of gradients" not in start("gptq", 256)
    assert sum(start("guided", 256).values()) > sum(start("gptq", 256).values())


def test_an_attention_s_rows_meet_their_energies_in_either_layout() -> None:
    """`out_proj` of torch's attention, windows or positions first: the same codes."""

    class Net(torch.nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first)
            self.head = torch.nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.attention.batch_first
            turned = x if first else x.transpose(0, 1)
            found = self.attention(turned, turned, turned, need_weights=False)[0]
            return self.head((found if first else found.transpose(0, 1)).square().mean(dim=1))

    inputs = torch.randn(12, 4, 16) * torch.logspace(0, 1, 4)[:, None]
    made = []
    for batch_first in (True, False):
        chain = ModuleChain(Net(batch_first))
        batches = TokenRows(chain, inputs, None, 4).batches(range(12))
        grids = lay_grids(chain, GridConfig(3, 16))
        energies = token_energies(chain, batches, at_once=2, generator=label_generator(CPU, 5))
        assert energies["attention.out_proj"].shape == (48,)
        made.append(layerwise_codes(chain, grids, batches, "guided", energies=energies))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_layer_without_gradient_has_no_energies() -> None:
    """The query of a pooling head is computed from a parameter alone: rounded as by GPTQ, without a curvature term."""

    class Pool(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.start = torch.nn.Parameter(torch.randn(1, 2, 16))
            self.query, self.key, self.out = (torch.nn.Linear(16, size) for size in (16, 16, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = self.query(self.start).expand(len(x), -1, -1)
            found = torch.nn.functional.scaled_dot_product_attention(query, self.key(x), x)
            return self.out(found.mean(dim=1))

    x = torch.randn(16, 12, 16)
    solver = SolverConfig(iters=2, batch_size=8, micro_batch=8, warmup=1)
    for method in ("guided", "discquant"):
        config = QuantizeConfig(
            grid=GridConfig(3, -1), method=method, ignore=(), solver=solver, gptq_samples=16,  # type: ignore[arg-type]
        )  # fmt: skip
        assert len(list(discquant.quantize_module(Pool(), x, config).layers())) == 3
    chain = ModuleChain(Pool())
    batches = TokenRows(chain, x, None, 8).batches(range(16))
    found = token_energies(chain, batches, at_once=2, generator=label_generator(CPU, 5))
    assert set(found) == {"key", "out"}


class Routed(torch.nn.Module):
    """Experts of plain linear layers, as models' own code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(32, 4, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        chosen = self.gate(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            (at,) = torch.where(chosen == index)
            out = out.index_add(0, at, expert(rows[at]))
        return out.view_as(x)


def test_experts_of_plain_layers_have_no_energies(make_model: Callable[..., Any]) -> None:
    """Other tokens may come to them once the blocks before are rounded; they are GPTQ's."""
    model = make_model("llama", torch.float32)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Routed()
    chain = DecoderChain(model)
    batches, grids = rows_of(chain).batches(range(6)), lay_grids(chain, GridConfig(3, 16))
    energies = token_energies(chain, batches, at_once=3, generator=label_generator(CPU, 5))
    names = {ref.name for refs in chain.weights for ref in refs}
    assert {name for name in names if "experts" in name} == names - set(energies)
    assert set(layerwise_codes(chain, grids, batches, "guided", energies=energies)) == names
    # Where other rows come than energies were measured of, none is taken for another's.
    name = chain.weights[0][0].name
    short = {**energies, name: energies[name][:-1]}
    with pytest.raises(NotImplementedError, match=f"{name} gets other rows"):
        layerwise_codes(chain, grids, batches, "guided", energies=short)


def test_an_expert_s_rows_take_no_room() -> None:
    """Not even those of its first call, which all tokens came to; what comes back of them changes nothing."""
    rows, weight = _Rows([4, 4]), torch.randn(3, 2, requires_grad=True)
    outputs = [torch.randn(count, 3) @ weight for count in (4, 2, 4)]
    for output in outputs[:1]:
        rows.see(output, output)
    assert len(rows.values) == 8 and not rows.values.any()
    for output in outputs[1:]:
        rows.see(output, output)
    torch.autograd.backward([output.sum() for output in outputs])
    assert len(rows.values) == rows.used == 0 and not rows.whole


def test_a_layer_that_is_called_again_gets_room() -> None:
    rows, weight = _Rows([4, 4]), torch.randn(3, 2, requires_grad=True)
    for scale in range(4):
        output = torch.randn(4, 3) @ weight
        rows.see(output, output)
        (output * (scale + 1)).sum().backward()
    expected = 2 * torch.tensor([1.0, 4.0, 9.0, 16.0]).repeat_interleave(4)
    assert rows.whole and torch.equal(rows.values[: rows.used], expected)
