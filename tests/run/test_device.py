# SPDX-License-Identifier: Apache-2.0
"""A run on a GPU: every tensor of it is there. Where there is none, a simulated one stands in (`simulate`)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from discquant import api
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig, StateFormat
from discquant.environment import compute_device
from discquant.errors import ConfigError
from discquant.formats.lazy import settle
from discquant.grids import Grid, place_grid
from discquant.ops import _registry
from discquant.run import pipeline
from discquant.run.allocate import allocate_model
from discquant.run.events import Events, RunStoppedError
from discquant.run.pipeline import Pipeline
from discquant.run.refine import RefinePipeline
from discquant.run.served import apply_layers
from discquant.run.summary import coded_layers
from discquant.solver import solve as solving
from discquant.solver.block import BlockState
from discquant.solver.chain import DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.kronecker import gram, pack_triangles
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.placement import Where
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids
from discquant.solver.solver import StepRecord
from discquant.solver.state import WeightState
from discquant.solver.weight_ref import LAZY, WeightRef

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def _config(dataset: str, **solver: Any) -> QuantizeConfig:
    options = {"iters": 2, "batch_size": 4, "micro_batch": 2, "warmup": 1, **solver}
    return QuantizeConfig(
        grid=GridConfig(3, 32, grid="absmax"), solver=SolverConfig(**options), data=DataConfig(dataset, 8, 16),
        gptq_samples=4, validation_windows=4, checkpoint_every=1,
    )  # fmt: skip


def _codes(out: Path) -> str:
    return hashlib.sha256((out / "codes.safetensors").read_bytes()).hexdigest()


def _stopping_after(step: int) -> Events:
    def stop(record: StepRecord, iters: int) -> None:
        if record.step == step:
            raise RunStoppedError("stopped by the test")

    return Events(step=stop)


def _stopped_and_resumed(model_dir: Path, out: Path, config: QuantizeConfig, where: Where) -> dict[str, Any]:
    """Stop after the second step, of which no checkpoint tells, and continue."""
    with pytest.raises(RunStoppedError, match="by the test"):
        Pipeline(
            model_dir, out, config, engine=Engine(where, device=GPU), events=_stopping_after(2)
        ).execute()
    return Pipeline(model_dir, out, config, engine=Engine(where, device=GPU)).execute()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "optimizer", "teacher", "start"),
    [("u8", "momentum", "state", "gptq"), ("fp32", "adamw", "weights", "random")],
)
def test_a_whole_run_is_on_the_device(
    state: str, optimizer: str, teacher: str, start: str, model_dir: Path, dataset: str, tmp_path: Path,
    simulate: Callable[..., Any],
) -> None:  # fmt: skip
    """From the folder to the proven file: no device is mixed, no heavy operation stays behind; the same bytes from the
    device's memory, from host memory, and resumed.
    """
    config = _config(dataset, state=state, optimizer=optimizer, teacher=teacher, start=start)
    with simulate() as watch:
        whole = Pipeline(model_dir, tmp_path / "whole", config, engine=Engine("host", device=GPU)).execute()
        _stopped_and_resumed(
            model_dir, tmp_path / "stopped", dataclasses.replace(config, baselines=()), "resident"
        )
    assert watch.on_gpu > 10_000
    assert not watch.left_on_cpu
    assert set(whole["methods"]) == {"rtn", "gptq", "discquant"}
    assert whole["phases"][0]["peak_device_bytes"] == 1 << 20
    assert (
        json.loads((tmp_path / "whole" / "config.json").read_text())["identity"]["device"] == "cuda simulated"
    )
    assert _codes(tmp_path / "whole") == _codes(tmp_path / "stopped")


@pytest.mark.slow
def test_refine_is_on_the_device(
    model_dir: Path, dataset: str, tmp_path: Path, simulate: Callable[..., Any]
) -> None:
    config = dataclasses.replace(_config(dataset, iters=1), baselines=())
    Pipeline(model_dir, tmp_path / "run", dataclasses.replace(config, method="rtn")).execute()
    with simulate() as watch:
        summary = RefinePipeline(
            tmp_path / "run" / "compressed-tensors", tmp_path / "refined", model_dir, config,
            engine=Engine("host", device=GPU),
        ).execute()  # fmt: skip
    assert watch.on_gpu > 10_000
    assert summary["refine"]["improved"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["resident", "host"])
def test_grids_of_layers_and_guided_codes_are_of_the_device(
    where: Where, model_dir: Path, dataset: str, tmp_path: Path, simulate: Callable[..., Any]
) -> None:
    """What each layer's choices cost is measured there, and codes for them made there by the energies of gradients."""
    choices = {str(bits): GridConfig(bits, 32, grid="absmax") for bits in (2, 3, 4)}
    config = dataclasses.replace(_config(dataset), baselines=("rtn",), method="guided")
    with simulate() as watch:
        measured = tmp_path / "grids.json"
        found = allocate_model(model_dir, measured, config, choices, 3.6, engine=Engine(where, device=GPU))
        assert watch.on_gpu > 1_000
        run = dataclasses.replace(config, layers=found.layers)
        summary = Pipeline(model_dir, tmp_path / "run", run, engine=Engine(where, device=GPU)).execute()
    assert not watch.left_on_cpu
    assert len({unit.chosen for unit in found.units}) > 1
    assert set(summary["methods"]) == {"rtn", "guided"}


@pytest.mark.parametrize("state", ["u8", "bf16", "fp32"])
def test_curvature_term_of_a_gpu(state: StateFormat, simulate: Callable[..., Any]) -> None:
    """All of it there; factors kept in bfloat16 are multiplied as they are, and E is rounded to that, no more."""
    weight = torch.randn(48, 80)
    grid = place_grid(weight, GridConfig(3, 16))
    held = WeightState(
        "w", grid, weight, torch.rand(48, 80), state=state, optimizer="sgd", kept="state", curvature_width=32
    )
    assert held.curvature_in is not None and held.curvature_out is not None
    for factor, size in ((held.curvature_in, 80), (held.curvature_out, 48)):
        factor.copy_(pack_triangles(gram(torch.randn(200, size), 32)))
    expected = held.curvature_gradient(None, torch.float32)
    assert expected is not None
    with simulate() as watch:
        block = BlockState.pack([held], lambda size: torch.empty(size, dtype=torch.uint8, device=GPU))
        found = block.states[0].curvature_gradient(None, torch.float32)
        assert found is not None and found.device == GPU
    assert not watch.left_on_cpu
    assert found.dtype == torch.float32 and found.is_contiguous()
    lost = float((found - expected).norm() / expected.norm())
    assert lost < 1e-6 if state == "fp32" else 1e-5 < lost < 0.005


@pytest.mark.slow
def test_steps_through_the_kernels_that_a_gpu_takes(simulate: Callable[..., Any]) -> None:
    """Two steps by the choices made for a GPU, its kernels interpreted: the loss is that of the CPU's own way."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)  # else the loss is no more than its own rounding
    ids = torch.randint(3, 61, (2, 8))
    options = SolverConfig(
        iters=2, batch_size=2, micro_batch=2, warmup=1, start="random", lr=0.1, lr_floor=0.1, kl_weight=100.0,
        state="u8", optimizer="momentum",
    )  # fmt: skip

    def losses(device: torch.device) -> list[float]:
        own = copy.deepcopy(model)
        settle(own, device, stream=False)
        chain = DecoderChain(own)
        grids = lay_grids(chain, GridConfig(4, 32, grid="absmax"))
        run = Solve(chain, grids, TokenRows(chain, ids, None, 2), QuantizeConfig(solver=options))
        return [run.advance().loss for _ in range(2)]

    expected = losses(CPU)
    launched = []
    with simulate(kernels=True) as watch:
        honest = _registry.triton_module

        def seen(stem: str) -> Any:
            launched.append(stem)
            return honest(stem)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_registry, "triton_module", seen)
            actual = losses(GPU)
    # In float32 the rules of a GPU write each weight out and multiply by cuBLAS.
    assert {"soft_weight", "projected_step", "linear_kl"} <= set(launched)
    assert not watch.left_on_cpu
    # Softmax, norms and products of some tens of terms each lie between a rounding and the loss.
    bound = 2**12 * torch.finfo(torch.float32).eps
    for one, other in zip(actual, expected, strict=True):
        assert abs(one - other) <= bound * abs(other)


@pytest.mark.parametrize("teacher", ["weights", "state"])
def test_a_solve_begins_with_the_kernels_of_its_steps(teacher: str, simulate: Callable[..., Any]) -> None:
    """Teacher, GPTQ's codes and the first KL come from where the same bits are asked for; labels are drawn there, too.

    Attention takes other kernels otherwise, and the student would differ from the teacher by them alone.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    options = SolverConfig(
        iters=4, batch_size=2, micro_batch=2, warmup=1, start="gptq", teacher=teacher,  # type: ignore[arg-type]
    )  # fmt: skip
    attention, drawn, asked = [], [], []

    def observe(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            # Every test is in the mode that warns.
            attention.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        elif func is torch.ops.aten.multinomial.default:
            drawn.append(watch.tags.of(args[0]))

    with simulate() as watch:
        settle(model, GPU, stream=False)
        chain = DecoderChain(model)
        grids = lay_grids(chain, GridConfig(4, 32, grid="absmax"))
        rows = TokenRows(chain, torch.randint(3, 61, (4, 8)), None, 2)
        watch.observe = observe
        honest = solving.label_generator
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                solving,
                "label_generator",
                lambda device, seed: (asked.append(device), honest(device, seed))[1],
            )
            Solve(chain, grids, rows, QuantizeConfig(solver=options, gptq_samples=4))
    assert attention and all(attention)
    assert drawn and set(drawn) == {GPU} == set(asked)
    assert not watch.left_on_cpu


def test_fused_experts_come_to_the_device_block_by_block(simulate: Callable[..., Any]) -> None:
    """Weights that no lazy reader covers stay on the CPU and are on the device while their block runs."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(
        "eager"
    )  # the grouped product counts tokens in a way that only a real GPU can
    ids = torch.randint(3, 61, (2, 8))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with simulate() as watch:
        settle(model, GPU, stream=True)
        chain = DecoderChain(model)
        assert chain.lazy
        assert chain.device == GPU
        chain.verify(ids)
        matrices = [p for block in chain.blocks for p in block.parameters() if p.dim() > 1]
        assert {p.device for p in matrices} == {CPU}
        assert {p.device for p in model.parameters()} == {CPU, GPU}
        assert {ref.matrix().device for refs in chain.weights for ref in refs} == {GPU}
        grids = lay_grids(chain, GridConfig(4, 16, grid="absmax"))
        rows = TokenRows(chain, ids, None, 2)
        codes = layerwise_codes(chain, grids, rows.batches(range(2)), "gptq")
        candidate = copy.deepcopy(model)
        apply_layers(candidate, coded_layers(codes, grids), torch.float32)
        with torch.no_grad():
            actual = candidate(input_ids=ids.to(GPU)).logits
            own = model(input_ids=ids.to(GPU)).logits
        assert not watch.left_on_cpu
        assert {codes[name].device for name in codes} == {CPU}
    assert torch.equal(own, expected)
    assert not torch.equal(actual, expected)


def test_python_interface_solves_where_the_model_is(simulate: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(64, 5))
    config = QuantizeConfig(
        grid=GridConfig(4, 8, grid="absmax"), ignore=(),
        solver=SolverConfig(iters=2, batch_size=2, micro_batch=2, warmup=1, start="ref", lr=0.1),
    )  # fmt: skip
    with simulate() as watch:
        model.to(GPU)
        found = api.quantize_module(model, torch.randn(4, 3, 8), config)
        found.apply()
        assert {p.device for p in model.parameters()} == {GPU}
        assert not watch.left_on_cpu
    assert len(found.records) == 2
    assert all(layer.q.device == layer.grid.scale.device == CPU for layer in found.coded_layers())


@pytest.mark.parametrize("forgotten", ["grid", "weight", "ids", "norms"])
def test_a_forgotten_move_is_found(
    forgotten: str, model_dir: Path, dataset: str, tmp_path: Path, simulate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each of the moves that a run needs, taken out again, fails the simulation."""
    if forgotten == "grid":
        monkeypatch.setattr(Grid, "to", lambda self, device: self)
    elif forgotten == "weight":
        monkeypatch.setattr(
            WeightRef, "matrix", lambda self: self.view(getattr(self.parameter, LAZY)()).contiguous()
        )
    elif forgotten == "ids":
        prepare = DecoderChain.prepare
        monkeypatch.setattr(
            DecoderChain, "prepare", lambda self, ids, mask=None: prepare(self, ids.cpu(), mask)
        )
    else:

        def settle_matrices(model: nn.Module, device: torch.device, *, stream: bool) -> None:
            settle(model, device, stream=stream)
            for parameter in model.parameters():
                parameter.data = parameter.data.cpu() if parameter.dim() == 1 else parameter.data

        monkeypatch.setattr(pipeline, "settle", settle_matrices)
    config = dataclasses.replace(_config(dataset), method="gptq", baselines=())
    with simulate(), pytest.raises(AssertionError, match=r"on (cpu|cuda:0)"):
        Pipeline(model_dir, tmp_path / "run", config, engine=Engine("host", device=GPU)).execute()


@pytest.mark.parametrize(
    ("name", "built", "count", "words"),
    [
        ("cuda", None, 0, "built without CUDA"),
        ("cuda", "12.8", 0, "sees no GPU"),
        ("cuda:3", "12.8", 2, "cuda:0 to cuda:1"),
        ("gpu", "12.8", 2, "must be auto, cpu, cuda or cuda:N"),
        ("cuda:", "12.8", 2, "must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, built: str | None, count: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=words):
        compute_device(name)
    assert compute_device("cpu") == CPU
    assert compute_device("auto", 1) == (torch.device("cuda", 1) if count else CPU)
    if count:
        assert compute_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_real_gpu_gives_the_same_bytes_from_every_placement(
    compute_dtype: str, model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    """Twice resident, once resumed; from host memory and from disk; and about as good as the CPU's."""
    config = _config(
        dataset, iters=12, compute_dtype=compute_dtype, state="u8", optimizer="momentum", teacher="state"
    )
    found, divergences = set(), []
    places: tuple[Where, ...] = ("resident", "resident", "host", "disk")
    for number, where in enumerate(places):
        out = tmp_path / str(number)
        summary = Pipeline(model_dir, out, config, engine=Engine(where, device=GPU)).execute()
        divergences.append(summary["methods"]["discquant"]["kl_mean"])
        found.add(_codes(out))
    _stopped_and_resumed(model_dir, tmp_path / "stopped", config, "resident")
    found.add(_codes(tmp_path / "stopped"))
    assert len(found) == 1
    on_cpu = Pipeline(model_dir, tmp_path / "cpu", config).execute()["methods"]
    assert max(divergences) < on_cpu["rtn"]["kl_mean"]


@pytest.mark.gpu
def test_real_gpu_refines(model_dir: Path, dataset: str, tmp_path: Path) -> None:
    config = dataclasses.replace(_config(dataset, iters=12), baselines=())
    Pipeline(model_dir, tmp_path / "run", dataclasses.replace(config, method="rtn")).execute()
    file = tmp_path / "run" / "compressed-tensors"
    summary = RefinePipeline(file, tmp_path / "out", model_dir, config, engine=Engine(device=GPU)).execute()
    assert summary["refine"]["improved"]
