# SPDX-License-Identifier: Apache-2.0
"""Measured rates: timed on a real block, kept, found again, used by plans; and a run held against its plan."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CapacityError
from discquant.planning import compare
from discquant.planning.hardware import DEVICES
from discquant.planning.memory import needed
from discquant.planning.plan import Machine, make_plan
from discquant.planning.rates import Rates, keep_rates, load_rates, machine_name, nearest_rates
from discquant.planning.shape import read_shape
from discquant.planning.timing import measure

CONFIG = QuantizeConfig(
    grid=GridConfig(bits=3, group_size=16),
    solver=SolverConfig(iters=4, batch_size=4, micro_batch=2, warmup=1),
    data=DataConfig("text.txt", 8, 16),
)
BLANK = Rates(
    machine="a machine", dtype="float32", state="fp32 adamw", hidden=32, weights=10_000, tokens=32, forward=1e9,
    backward=2e9, matmul=3e9, head=4e9, soft=1e-9, step=2e-9, copy=5e9,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that holds only the config.json of a small model."""
    import transformers

    transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


@pytest.mark.parametrize("state", ["fp32", "u8"])
def test_measure_times_a_real_block(state: str, folder: Path) -> None:
    """Every rate is finite and positive; a clock that never moves twice as fast halves no rate by accident."""
    ticks = iter(range(10_000))
    solver = dataclasses.replace(CONFIG.solver, state=state)  # type: ignore[arg-type]
    config = dataclasses.replace(CONFIG, solver=solver)
    shape = read_shape(folder)
    rates = measure(folder, shape, config, clock=lambda: float(next(ticks)))
    assert rates.weights == shape.largest.weights and rates.tokens == 32 and rates.hidden == 32
    # Each timed call takes one tick, so the rates are the counts themselves.
    scores = 16 * 32
    assert rates.forward == 32 * (2 * shape.largest.weights + 2 * scores)
    assert rates.backward == 32 * (6 * shape.largest.weights + 7 * scores)
    assert rates.head == 32 * 6 * 96 * 32
    assert rates.soft == rates.step == 1 / shape.largest.weights
    assert rates.copy == 1 << 28


@pytest.mark.parametrize(
    ("ignore", "share"),
    [
        ("model.layers.0.*", 1.0), ("model.layers.2.*", 1.0), ("model.layers.[12].*", 1.0),
        ("model.layers.1.mlp.*", 1.0), ("*.mlp.*", 1 / 3), ("down_proj", 7 / 9),
        ("model.layers.1", 1.0), ("mlp", 1 / 3),
    ],
)  # fmt: skip
def test_measure_times_a_usual_block_of_what_is_left(ignore: str, share: float, folder: Path) -> None:
    """Patterns mean what they mean in a run, whichever blocks they leave alone (q to o: 3, gate to down: 6 of 9)."""
    config = dataclasses.replace(CONFIG, ignore=("lm_head", ignore))
    whole = read_shape(folder).largest.weights
    rates = measure(folder, read_shape(folder, config.ignore), config)
    assert rates.weights == pytest.approx(share * whole)


def test_rates_are_kept_and_found(tmp_path: Path) -> None:
    """Another measurement of the same kind replaces the first; a damaged file is as good as none."""
    file = tmp_path / "deep" / "calibration.json"
    assert load_rates(file) == []
    keep_rates(BLANK, file)
    keep_rates(dataclasses.replace(BLANK, weights=80_000), file)
    keep_rates(dataclasses.replace(BLANK, forward=9e9), file)
    kept = load_rates(file)
    assert [entry.weights for entry in kept] == [80_000, 10_000] and kept[1].forward == 9e9

    def find(**changed: Any) -> Rates | None:
        wanted = {
            "machine": "a machine",
            "dtype": "float32",
            "state": "fp32 adamw",
            "weights": 12_000,
            "tokens": 32,
        }
        return nearest_rates(kept, **{**wanted, **changed})

    assert find() == kept[1]
    assert find(weights=70_000) == kept[0]
    assert find(state="u8 momentum") == kept[1]
    assert find(machine="another") is None and find(dtype="bfloat16") is None
    assert find(weights=10_000_000) is None
    file.write_text("{")
    assert load_rates(file) == []


def test_plan_uses_measured_rates(folder: Path) -> None:
    """A measured plan's step follows from the rates alone, and says that it is measured."""
    shape = read_shape(folder)
    machine = Machine(DEVICES["cpu"], 1e12, 1e12)
    assumed = make_plan(shape, CONFIG, machine)
    assert not assumed.measured and "assumed" in assumed.to_dict()["rates"]
    made = make_plan(shape, CONFIG, machine, rates=BLANK)
    tokens, scores = 64, 16 * 32 * 3
    # 4 steps of 4 windows go twice over 8 rows: the teacher is remembered; so small a model keeps its graph.
    expected = (
        tokens * (6 * shape.weights + 7 * scores) / 2e9 + tokens * 6 * 96 * 32 / 4e9 + shape.weights * 3e-9
    )
    sizes = [(32, 32), (32, 32), (16, 32), (16, 32), (64, 32), (64, 32), (32, 64)]  # below the factors' width
    expected += 3 * sum(2 * r * c * (r + c) for r, c in sizes) / 3e9
    # Two micro-batches are added once, 12 bytes in and out at half the weight of a copy; 12 bytes of state are kept.
    expected += shape.weights * (0.5 * 12 + 12) / 5e9
    grams = 3 * sum(2 * (r * r + c * c) for r, c in sizes)
    gathered = 8 * 16 * (6 * shape.weights + 9 * scores + 4 * 96 * 32 + grams) / 2e9
    assert made.step_seconds == pytest.approx(expected)
    assert made.gather_seconds == pytest.approx(gathered)
    assert made.total_seconds == pytest.approx(4 * expected + gathered)
    assert made.to_dict()["rates"] == "measured on this machine"


def test_run_against_plan(folder: Path) -> None:
    """Ratios are of peaks and of the median step; the verdicts are at 10 % and 25 %."""
    made = make_plan(
        read_shape(folder), CONFIG, Machine(DEVICES["cpu"], 1e12, 1e12), rates=BLANK, process=1e8
    )
    solve = max(peak.total("host") for peak in made.peaks if peak.name in ("teacher", "start", "solve"))
    highest = needed(list(made.peaks), "host")

    def found(memory: float, time: float) -> dict[str, Any]:
        phases = [
            {"name": "round", "peak_rss_bytes": solve * memory},
            {"name": "evaluate", "peak_rss_bytes": highest * memory},
            {"name": "a phase of its own", "peak_rss_bytes": 1},
        ]
        steps = [{"seconds": made.step_seconds * factor} for factor in (40.0, time, time)]
        return compare.against_plan(made, phases, steps)

    assert [peak.name for peak in made.peaks][3:6] == ["start", "teacher", "solve"]
    good = found(1.05, 0.9)
    assert [row["phase"] for row in good["memory"]] == ["round", "evaluate"]
    assert good["memory"][0]["ratio"] == pytest.approx(1.05, abs=1e-4)
    assert good["step_seconds"]["ratio"] == pytest.approx(0.9, abs=1e-4)
    assert good["within"] == {"memory": True, "time": True}
    assert found(1.12, 1.3)["within"] == {"memory": False, "time": False}
    unmeasured = make_plan(read_shape(folder), CONFIG, Machine(DEVICES["cpu"], 1e12, 1e12))
    assert compare.against_plan(unmeasured, [], [{"seconds": 1.0}])["within"] == {
        "memory": None,
        "time": None,
    }


def test_a_run_that_cannot_fit_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan of a run knows this machine's memory; 10 % above it is not refused."""
    monkeypatch.setenv("DISCQUANT_CACHE", str(tmp_path))
    shape = read_shape(folder)
    made = compare.plan_of_run(shape, CONFIG, process=1e9)
    peak, disk = (needed(list(made.peaks), where) for where in ("host", "disk"))
    monkeypatch.setattr(compare, "host_memory", lambda: peak / 1.09)
    assert compare.plan_of_run(shape, CONFIG, process=1e9, disk=disk / 1.09).setting.placement == "resident"
    with pytest.raises(CapacityError, match="of disk"):
        compare.plan_of_run(shape, CONFIG, process=1e9, disk=disk / 1.2)
    with pytest.raises(CapacityError, match="of host memory"):
        compare.plan_of_run(shape, CONFIG, process=1e9, ranks=2)  # each process holds as much
    monkeypatch.setattr(compare, "host_memory", lambda: peak / 1.2)
    with pytest.raises(CapacityError, match="of host memory"):
        compare.plan_of_run(shape, CONFIG, process=1e9)


def test_auto_beside_a_gpu_counts_no_spare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is free of the device has to hold a tenth more than the plan; pinned host memory cannot be swapped."""
    monkeypatch.setenv("DISCQUANT_CACHE", str(tmp_path))
    shape, free = read_shape(Path(__file__).parent / "configs" / "llama-3.1-8b"), [1e12]
    gpu = torch.device("cuda", 0)
    solver = dataclasses.replace(CONFIG.solver, state="u8", optimizer="momentum", compute_dtype="bfloat16")
    config = dataclasses.replace(CONFIG, solver=solver)
    monkeypatch.setattr(
        compare, "this_device", lambda index: dataclasses.replace(DEVICES["h100"], memory=80e9)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[0]), 80 << 30))
    monkeypatch.setattr(compare, "host_memory", lambda: 1e12)

    def placed(placement: Any = "auto") -> str:
        return compare.plan_of_run(
            shape, config, process=1e9, placement=placement, device=gpu
        ).setting.placement

    def need(placement: Any, where: str) -> float:
        made = compare.plan_of_run(shape, config, process=1e9, placement=placement, device=gpu)
        return needed(list(made.peaks), where)

    resident, host = need("resident", "gpu"), need("host", "host")
    monkeypatch.setattr(compare, "free_host_memory", lambda: 1e12)
    free[0] = 1.11 * resident
    assert placed() == "resident"
    free[0] = 1.08 * resident
    assert placed() == "host"
    monkeypatch.setattr(compare, "free_host_memory", lambda: host / 1.05 - 1e9)
    assert placed() == "disk"  # on a CPU alone, 1.05 times what is free is not refused
    assert placed("host") == "host" and placed("resident") == "resident"


def test_measuring_asks_for_memory_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from discquant.planning import timing

    monkeypatch.setattr(timing, "host_memory", lambda: 1e3)
    with pytest.raises(CapacityError, match="--measure"):
        measure(folder, read_shape(folder), CONFIG)


def test_machine_is_named_with_its_threads() -> None:
    """Rates of one thread are not taken for those of two."""
    assert f"{torch.get_num_threads()} threads" in machine_name() or torch.cuda.is_available()
    assert math.isfinite(DEVICES["cpu"].flops)
