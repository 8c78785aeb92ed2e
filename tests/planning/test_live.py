# SPDX-License-Identifier: Apache-2.0
"""The plan's items against the tensors that are really alive: storages, without the process and its allocator."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from discquant.calibration import Windows
from discquant.calibration.sampling import sample
from discquant.config import DataConfig, GridConfig, Method, QuantizeConfig, SolverConfig
from discquant.evaluation.divergence import compare_models
from discquant.planning.compare import MEMORY_TOLERANCE
from discquant.planning.hardware import DEVICES
from discquant.planning.heap import HEAP
from discquant.planning.memory import phase_peaks, state_bytes
from discquant.planning.plan import Machine, setting_for
from discquant.planning.setting import grid_share, state_of
from discquant.planning.shape import shape_of
from discquant.run.served import apply_layers
from discquant.run.summary import coded_layers
from discquant.solver import solve
from discquant.solver.chain import DecoderChain
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids

ROWS, SEQLEN = 16, 32


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of three blocks, wide against its tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _config(**solver: Any) -> QuantizeConfig:
    options = {"iters": 4, "batch_size": 4, "micro_batch": 2, "warmup": 1, "start": "ref", **solver}
    return QuantizeConfig(
        grid=GridConfig(3, 32),
        solver=SolverConfig(**options),
        data=DataConfig("text.txt", ROWS, SEQLEN),
        gptq_samples=ROWS,
        baselines=(),
    )


def _planned(model: Any, config: QuantizeConfig, phase: str, keep: Callable[[str], bool]) -> float:
    shape = shape_of(model, name="small")
    setting = setting_for(shape, config, "resident", Machine(DEVICES["cpu"], 1e15, 1e15))
    peak = next(peak for peak in phase_peaks(shape, setting) if peak.name == phase)
    return sum(size for item, size in peak.host.items() if keep(item))


def _within(actual: float, planned: float) -> bool:
    return abs(actual / planned - 1) <= MEMORY_TOLERANCE


def _rows(chain: DecoderChain) -> TokenRows:
    ids = torch.randint(3, 256, (ROWS, SEQLEN), generator=torch.Generator().manual_seed(1))
    return TokenRows(chain, ids, None, 2)


HELD_BEFORE = (
    "process", "tokenizer and text", "windows", "original weights", "frozen parameters", "scales", "embedding", HEAP,
    "teacher of the validation windows",
)  # fmt: skip


def test_gptq(model: Any, live_bytes: Any) -> None:
    config = dataclasses.replace(_config(), method="gptq")
    chain = DecoderChain(model)
    grids, rows = lay_grids(chain, config.grid), _rows(chain)
    with live_bytes(model.state_dict().values()) as live:
        layerwise_codes(chain, grids, rows.batches(range(ROWS)), "gptq")
    assert _within(live.peak, _planned(model, config, "start", lambda item: item not in HELD_BEFORE))


@pytest.mark.parametrize("scale_iters", [0, 1])
@pytest.mark.parametrize(("state", "optimizer"), [("u8", "momentum"), ("fp32", "adamw")])
def test_solve(state: str, optimizer: str, scale_iters: int, model: Any, live_bytes: Any) -> None:
    config = _config(state=state, optimizer=optimizer, iters=1, scale_iters=scale_iters)
    chain = DecoderChain(model)
    grids, rows = lay_grids(chain, config.grid), _rows(chain)
    with live_bytes(model.state_dict().values()) as live:
        run = Solve(chain, grids, rows, config)
        while not run.done:
            run.advance()
    assert _within(live.peak, _planned(model, config, "solve", lambda item: item not in HELD_BEFORE))


@pytest.mark.parametrize("method", ["gptq", "discquant"])
def test_eager_attention(method: Method, live_bytes: Any) -> None:
    """Scores and masks of attention that no kernel computes are most of what long windows take."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).eval()  # fmt: skip
    seqlen = 256
    config = dataclasses.replace(
        _config(iters=1, kl_weight=1.0), method=method, data=DataConfig("t.txt", ROWS, seqlen)
    )
    chain = DecoderChain(model)
    ids = torch.randint(3, 64, (ROWS, seqlen), generator=torch.Generator().manual_seed(1))
    grids, rows = lay_grids(chain, config.grid), TokenRows(chain, ids, None, 2)
    with live_bytes(model.state_dict().values()) as live:
        if method == "gptq":
            layerwise_codes(chain, grids, rows.batches(range(ROWS)), "gptq")
        else:
            Solve(chain, grids, rows, config).advance()
    phase = "start" if method == "gptq" else "solve"
    planned = _planned(model, config, phase, lambda item: item not in HELD_BEFORE)
    assert _within(live.peak, planned)


@pytest.mark.parametrize("passes", [2, 3, 4, 7, 8, 16])
def test_gradients_of_micro_batches(
    passes: int, model: Any, live_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree of sums holds one per level, beside the one that is being made: log2 of the micro-batches more."""
    monkeypatch.setattr(solve, "KEEP_GRAPH_BYTES", 0)
    seqlen = 8  # a block's gradient is larger than all its activations
    # So many steps that the teacher is remembered.
    config = _config(
        batch_size=passes,
        micro_batch=1,
        iters=32,
        curvature=0.0,
        kl_weight=1.0,
        state="u8",
        optimizer="momentum",
    )
    config = dataclasses.replace(config, data=DataConfig("text.txt", ROWS, seqlen))
    chain = DecoderChain(model)
    ids = torch.randint(3, 256, (ROWS, seqlen), generator=torch.Generator().manual_seed(1))
    run = Solve(chain, lay_grids(chain, config.grid), TokenRows(chain, ids, None, 1), config)
    run.advance()  # makes what later steps find
    with live_bytes(model.state_dict().values()) as live:
        run.advance()
    before = ("state", "teacher's last hidden states", *HELD_BEFORE)
    planned = _planned(model, config, "solve", lambda item: item not in before)
    assert _within(live.peak, planned)


@pytest.mark.parametrize(("state", "optimizer"), [("u8", "momentum"), ("fp32", "adamw")])
@pytest.mark.parametrize(("curvature", "width"), [(None, 512), (None, 64), (1.0, 96), (0.0, 512)])
def test_state(state: str, optimizer: str, curvature: float | None, width: int, model: Any) -> None:
    """Every byte of the placement is planned: sizes are multiples of its alignment, no position is an outlier."""
    moved = 0 if curvature is None else 4
    config = _config(
        state=state, optimizer=optimizer, curvature=curvature, curvature_width=width, scale_iters=moved
    )
    config = dataclasses.replace(config, grid=GridConfig(3, 32, grid="absmax"))
    chain = DecoderChain(model)
    shape = shape_of(model, name="small")
    setting = setting_for(shape, config, "resident", Machine(DEVICES["cpu"], 1e15, 1e15))
    placement = Solve(chain, lay_grids(chain, config.grid), _rows(chain), config).solver.placement
    scales = shape.weights * grid_share(shape, config)
    assert placement.nbytes == state_bytes(shape, setting) + scales
    largest = max(placement.home(index).nbytes for index in range(len(placement)))
    assert largest * len(placement) == placement.nbytes


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 64), (2, -1)])
def test_state_beside_a_searched_grid(bits: int, group: int, model: Any) -> None:
    """Weights that the scale clips too far for an 8-bit place are planned as many as normal weights have."""
    config = dataclasses.replace(_config(state="u8", optimizer="momentum"), grid=GridConfig(bits, group))
    shape = shape_of(model, name="small")
    setting = setting_for(shape, config, "resident", Machine(DEVICES["cpu"], 1e15, 1e15))
    model = copy.deepcopy(model).bfloat16().float()  # as most originals are stored
    chain = DecoderChain(model)
    run = Solve(chain, lay_grids(chain, config.grid), _rows(chain), config)
    planned = state_bytes(shape, setting) + shape.weights * grid_share(shape, config)
    assert state_of(shape.blocks, setting).outliers > 0
    assert run.solver.placement.nbytes == pytest.approx(planned, rel=0.01)


def test_sampling(model: Any, live_bytes: Any) -> None:
    """As many rows side by side as the run takes: with the held-out ones, as far as their cache allows."""
    config = dataclasses.replace(_config(), data=DataConfig("self", ROWS, SEQLEN))
    with live_bytes(model.state_dict().values()) as live:
        sample(model, None, nsamples=ROWS + config.validation_windows, seqlen=SEQLEN)
    planned = _planned(model, config, "calibrate", lambda item: item not in HELD_BEFORE)
    assert _within(live.peak, planned)
    many = dataclasses.replace(config, data=DataConfig("self", 2048, SEQLEN))
    assert (
        _planned(model, many, "calibrate", lambda item: item == "keys and values")
        == 2 * 3 * 64 * SEQLEN * 4 * 256
    )


def test_comparing(model: Any, live_bytes: Any) -> None:
    config = dataclasses.replace(_config(), method="rtn")
    chain = DecoderChain(model)
    grids = lay_grids(chain, config.grid)
    codes = layerwise_codes(chain, grids, [], "rtn")
    ids = torch.randint(3, 256, (8, SEQLEN))
    with live_bytes(model.state_dict().values()) as live:
        candidate = apply_layers(copy.deepcopy(model), coded_layers(codes, grids), torch.float32)
        compare_models(model, {"rtn": candidate}, Windows.make(ids, torch.ones_like(ids).bool(), "made up"))
    assert _within(live.peak, _planned(model, config, "evaluate", lambda item: item not in HELD_BEFORE))
