# SPDX-License-Identifier: Apache-2.0
"""What is as wide as the vocabulary, and what experts share: the plan's items against tensors that are really alive."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from discquant.config import DataConfig, GridConfig, Method, QuantizeConfig, SolverConfig
from discquant.ops.reference.linear_kl import linear_kl
from discquant.planning.compare import MEMORY_TOLERANCE
from discquant.planning.evaluating import compared_bytes
from discquant.planning.hardware import DEVICES
from discquant.planning.head import label_items, loss_bytes, loss_copy
from discquant.planning.heap import HEAP, HEAP_LIMIT, HEAP_SHARE, heap_items
from discquant.planning.memory import calibrating_items, phase_peaks
from discquant.planning.plan import Machine, setting_for
from discquant.planning.rounding import layerwise_items
from discquant.planning.setting import Setting
from discquant.planning.shape import ModelShape, shape_of
from discquant.solver import losses
from discquant.solver.chain import DecoderChain
from discquant.solver.energies import energies_of
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.rows import TokenRows
from discquant.solver.sampled import label_generator, sampled_gradient
from discquant.solver.solve import lay_grids

ROWS, SEQLEN, VOCAB = 8, 32, 1024
CPU = Machine(DEVICES["cpu"], 1e15, 1e15)
GPU = Machine(DEVICES["h100"], 1e15, 1e15)


def _model(capped: bool) -> Any:
    """Two small blocks before a large vocabulary."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(4)
    made = Gemma2ForCausalLM(Gemma2Config(**sizes)) if capped else LlamaForCausalLM(LlamaConfig(**sizes))
    return made.eval()


def _experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(4)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=4, head_dim=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def _config(method: Method, **solver: Any) -> QuantizeConfig:
    options = {"iters": 1, "batch_size": 4, "micro_batch": 2, "warmup": 1, "start": "ref", **solver}
    return QuantizeConfig(
        grid=GridConfig(3, 16), method=method, solver=SolverConfig(**options),
        data=DataConfig("text.txt", ROWS, SEQLEN), gptq_samples=ROWS, baselines=(),
    )  # fmt: skip


def _planned(model: Any, config: QuantizeConfig, machine: Machine = CPU) -> tuple[ModelShape, Setting]:
    shape = shape_of(model, name="small")
    return shape, setting_for(shape, config, "resident", machine)


def _rows(chain: DecoderChain) -> TokenRows:
    ids = torch.randint(3, 64, (ROWS, SEQLEN), generator=torch.Generator().manual_seed(1))
    return TokenRows(chain, ids, None, 2)


def _within(actual: float, planned: float) -> bool:
    return abs(actual / planned - 1) <= MEMORY_TOLERANCE


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_holds_what_is_planned(
    capped: bool, chunks: int, dtype: torch.dtype, live_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chunk after another a part is still there; of a narrow head there is a wide copy."""
    chunk = 2 * SEQLEN // chunks + (chunks > 1)
    monkeypatch.setattr(losses, "head_chunk", lambda *given: chunk)
    config = _config("discquant", compute_dtype=str(dtype).removeprefix("torch."))
    shape, setting = _planned(_model(capped), config)
    assert shape.capped is capped
    student, teacher = torch.randn(2, 2 * SEQLEN, 32).to(dtype)
    head = torch.randn(VOCAB, 32).to(dtype)
    with live_bytes([student, teacher, head]) as live:
        linear_kl(student, teacher, head, softcap=30.0 if capped else None, chunk_size=chunk)
    assert _within(live.peak, loss_bytes(shape, setting) + loss_copy(shape, setting))


@pytest.mark.parametrize("capped", [False, True])
def test_drawing_labels_holds_what_is_planned(capped: bool, live_bytes: Any) -> None:
    """Two tensors over the vocabulary, not the ten of a loss; five where its logits are capped, on a device, too."""
    model = _model(capped)
    chain = DecoderChain(model)
    (batch,) = _rows(chain).batches(range(2))
    shape, setting = _planned(model, _config("guided"))
    with live_bytes(model.state_dict().values()) as live:
        sampled_gradient(chain, batch, batch.hidden, label_generator(torch.device("cpu"), 0))
    assert _within(live.peak, sum(label_items(shape, setting).values()))
    on_device = label_items(*_planned(model, _config("guided"), GPU))
    assert on_device["logits"] == label_items(shape, setting)["logits"]


@pytest.mark.parametrize("capped", [False, True])
def test_looking_at_the_chain_holds_what_is_planned(capped: bool, live_bytes: Any) -> None:
    """All logits of one window: most of what reading windows takes."""
    model = _model(capped)
    chain = DecoderChain(model)
    ids = torch.randint(3, 64, (1, SEQLEN))
    with live_bytes(model.state_dict().values()) as live:
        chain.verify(ids)
    planned = calibrating_items(*_planned(model, _config("guided")))
    assert planned["logits of one window"] > 0.8 * live.peak
    assert _within(live.peak, sum(planned.values()))


@pytest.mark.parametrize("capped", [False, True])
def test_guided_holds_what_is_planned(capped: bool, live_bytes: Any) -> None:
    """Labels are drawn while no activations of a block are there."""
    model, config = _model(capped), _config("guided")
    chain = DecoderChain(model)
    batches, grids = _rows(chain).batches(range(ROWS)), lay_grids(chain, config.grid)
    with live_bytes(model.state_dict().values()) as live:
        energies = energies_of(chain, batches, config)
        layerwise_codes(chain, grids, batches, "guided", energies=energies)
    shape, setting = _planned(model, config)
    planned = sum(layerwise_items(shape, setting, "guided").values())
    # The batches' own block inputs were made before.
    assert _within(live.peak, planned - ROWS * SEQLEN * shape.hidden * 4)


def test_gptq_of_experts_holds_what_is_planned(live_bytes: Any) -> None:
    """Gate and up projection share X^T X; it has gone when the block's inputs pass the rounded weights."""
    model, config = _experts(), _config("gptq")
    chain = DecoderChain(model)
    batches, grids = _rows(chain).batches(range(ROWS)), lay_grids(chain, config.grid)
    shape, setting = _planned(model, config)
    with live_bytes(model.state_dict().values()) as live:
        layerwise_codes(chain, grids, batches, "gptq")
    planned = sum(layerwise_items(shape, setting, "gptq").values()) + 0.5 * shape.weights
    assert _within(live.peak, planned - ROWS * SEQLEN * shape.hidden * 4)


def test_codes_to_nearest_are_computed_while_they_are_written() -> None:
    shape = shape_of(_model(False), name="small")
    found = {}
    for method in ("rtn", "gptq"):
        setting = setting_for(shape, _config(method), "resident", CPU)  # type: ignore[arg-type]
        found[method] = {peak.name: peak.host for peak in phase_peaks(shape, setting)}["export"]
    assert found["rtn"]["positions of one matrix"] == 24 * 32 * 64
    assert "positions of one matrix" not in found["gptq"]


def test_the_heap_keeps_no_large_logits() -> None:
    """Above its limit tensors are maps of their own."""
    items = {"logits": 8.0, "logits of both": 4.0, "hidden states": 2.0, "weights as served": 1.0}
    shape, setting = _planned(_model(False), _config("guided"))
    assert heap_items(shape, setting, items)[HEAP] == HEAP_SHARE * 15
    wide = dataclasses.replace(shape, vocab=int(HEAP_LIMIT // (4 * ROWS * SEQLEN)) + 1)
    assert compared_bytes(wide, setting) > HEAP_LIMIT and loss_bytes(wide, setting) < 10 * HEAP_LIMIT
    assert heap_items(wide, setting, items)[HEAP] == HEAP_SHARE * 11
    wide = dataclasses.replace(shape, vocab=1 << 21)
    assert heap_items(wide, setting, items)[HEAP] == HEAP_SHARE * 3
