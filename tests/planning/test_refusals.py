# SPDX-License-Identifier: Apache-2.0
"""What a plan refuses, in words that tell what would do; and its command, which passes them on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from discquant.calibration.positions import Positions
from discquant.cli import app
from discquant.config import DataConfig, Method, QuantizeConfig
from discquant.errors import CapacityError, CheckpointError, ConfigError, MissingModelError
from discquant.planning import compare
from discquant.planning.hardware import DEVICES, GB, find_device
from discquant.planning.memory import needed, phase_peaks
from discquant.planning.plan import Machine, make_plan, setting_for
from discquant.planning.refusal import _smaller
from discquant.planning.setting import PLACEMENTS
from discquant.planning.shape import ModelShape, read_shape

ROOMY = 1e15
Options = Callable[..., QuantizeConfig]


def test_refusal_names_numbers_and_what_would_fit(shape_70b: ModelShape, options: Options) -> None:
    """What cannot fit is refused: what it needs, what is there, and the nearest options that would do."""
    machine = Machine(DEVICES["4090"], 400 * GB, ROOMY)
    with pytest.raises(
        CapacityError, match=r"G weights .* needs .* device memory \(there are 25.8 GB\)"
    ) as refusal:
        make_plan(shape_70b, options(start="gptq", state="fp32", optimizer="adamw"), machine)
    said = str(refusal.value)
    assert "It would fit with --placement" in said and "--start ref" in said
    flags = said.rpartition("fit with ")[2].split()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    solver = {
        "start": given["--start"],
        "state": given.get("--state", "fp32"),
        "optimizer": given.get("--optimizer", "adamw"),
        "micro_batch": int(given.get("--micro-batch", 2)),
        "batch_size": int(given.get("--batch-size", 8)),
    }
    assert make_plan(shape_70b, options(**solver), machine, placement=given["--placement"])  # type: ignore[arg-type]

    small = Machine(dataclasses.replace(DEVICES["4090"], memory=2 * GB), 4 * GB, 5 * GB)
    with pytest.raises(CapacityError, match=r"No configuration fits; the least demanding .* needs"):
        make_plan(shape_70b, options(), small)


def test_advice_changes_activations_before_anything_else(shape_8b: ModelShape, options: Options) -> None:
    """Where they are kept changes no byte of the result: left out, or elsewhere, before a batch is made smaller."""
    config, roomy = options(batch_size=64), Machine(DEVICES["4090"], ROOMY, ROOMY)

    def advice(machine: Machine, **given: Any) -> dict[str, str]:
        with pytest.raises(CapacityError) as refused:
            make_plan(shape_8b, config, machine, **given)
        flags = str(refused.value).rpartition("fit with ")[2].split()
        return dict(zip(flags[::2], flags[1::2], strict=True))

    asked = advice(roomy, activations="resident")
    assert asked == {"--placement": "host", "--activations": "host"}
    assert make_plan(shape_8b, config, roomy, placement="host", activations="host")
    # Too little host memory for both on the host, too little disk for both there.
    apart = dataclasses.replace(roomy, host=30 * GB, disk=80 * GB)
    assert advice(apart) == {"--placement": "host", "--activations": "disk"}
    assert make_plan(shape_8b, config, apart, placement="host", activations="disk")


@pytest.mark.parametrize("method", ["guided", "gptq"])
def test_advice_for_what_is_rounded_layer_by_layer(
    method: Method, shape_8b: ModelShape, options: Options
) -> None:
    """Fewer windows, and nothing of DiscQuant's; baselines are left out before them."""
    config = dataclasses.replace(
        options(start="gptq", curvature=1.0, state="fp32", optimizer="adamw"), method=method
    )
    device = dataclasses.replace(DEVICES["4090"], memory=10 * GB)
    machine = Machine(device, 64 * GB, ROOMY)
    with pytest.raises(CapacityError) as refused:
        make_plan(shape_8b, config, machine)
    flags = str(refused.value).rpartition("fit with ")[2].split()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given.keys() == {"--placement", "--micro-batch", "--gptq-samples"}
    fewer = dataclasses.replace(config, gptq_samples=int(given["--gptq-samples"]))
    fewer = dataclasses.replace(fewer, solver=dataclasses.replace(fewer.solver, micro_batch=1))
    assert make_plan(shape_8b, fewer, machine, placement=given["--placement"])  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match=r"the least demanding \((resident|host|disk)\) needs"):
        make_plan(shape_8b, config, Machine(dataclasses.replace(device, memory=GB), 64 * GB, ROOMY))
    with pytest.raises(CapacityError, match=r"fit with .* --baselines none --micro-batch 1 --gptq-samples"):
        make_plan(shape_8b, dataclasses.replace(config, baselines=("greedy",)), machine)


def test_advice_halves_the_windows_of_a_start(shape_8b: ModelShape, options: Options) -> None:
    """Before the start by GPTQ is given up, and not beside it."""
    config = dataclasses.replace(options(start="gptq"), baselines=("gptq",))
    said = [words for words, _ in _smaller(config, True)]
    assert said[:5] == [*(f"--gptq-samples {n}" for n in (128, 64, 32, 16)), "--start ref --baselines none"]
    assert not any("samples" in words for words in said[4:])


def test_advice_computes_narrower_on_a_gpu(shape_8b: ModelShape, options: Options) -> None:
    """What fits in bfloat16 alone is not said to fit nowhere; a CPU is slow in it and is not told so."""
    narrow, wide = (options(batch_size=1, micro_batch=1, compute_dtype=d) for d in ("bfloat16", "float32"))
    for name in ("4090", "cpu"):
        roomy = Machine(DEVICES[name], ROOMY, ROOMY)
        where = "gpu" if name == "4090" else "host"
        least = needed(list(make_plan(shape_8b, narrow, roomy, placement="disk").peaks), where) * 1.01
        machine = dataclasses.replace(
            roomy,
            device=dataclasses.replace(roomy.device, memory=least if name == "4090" else None),
            host=ROOMY if name == "4090" else least,
        )
        with pytest.raises(CapacityError) as refused:
            make_plan(shape_8b, wide, machine)
        advised = "--compute-dtype bfloat16" in str(refused.value)
        assert advised == (name == "4090") and ("No configuration fits" in str(refused.value)) != advised


def test_refusal_shows_the_machine_and_its_margin(
    shape_8b: ModelShape, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may take a tenth more than its plan's memory: the message has the true figure, and the margin apart."""
    monkeypatch.setattr(compare, "host_memory", lambda: 20 * GB)
    monkeypatch.setattr(compare, "free_host_memory", lambda: 20 * GB)
    config = options(compute_dtype="float32")
    for placement in ("resident", "auto"):
        with pytest.raises(CapacityError) as refused:
            compare.plan_of_run(shape_8b, config, process=0.4e9, placement=placement, disk=2 * GB)  # type: ignore[arg-type]
        said = str(refused.value)
        assert "(there are 20.0 GB; up to 10% more is let through)" in said
        assert "(2.0 GB are free; up to 10% more is let through)" in said and "22.0 GB" not in said
    with pytest.raises(CapacityError, match=r"\(there are 20\.0 GB\), .* \(2\.0 GB are free\)"):
        make_plan(shape_8b, config, Machine(DEVICES["cpu"], 20 * GB, 2 * GB))


def test_advice_fits_and_gives_every_rank_its_share(shape_8b: ModelShape, options: Options) -> None:
    """Fewer windows than ranks are no advice, nor a batch for hidden transfers that there is no room for."""
    config, roomy = options(micro_batch=8), Machine(DEVICES["4090"], ROOMY, ROOMY, ranks=4)
    enough = min(
        needed(phase_peaks(shape_8b, setting_for(shape_8b, options(micro_batch=2), placement, roomy)), "gpu")
        for placement in PLACEMENTS
    )
    tight = dataclasses.replace(roomy, device=dataclasses.replace(DEVICES["4090"], memory=1.001 * enough))
    with pytest.raises(CapacityError) as refused:
        make_plan(shape_8b, config, tight)
    flags = str(refused.value).rpartition("fit with ")[2].split()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    micro, batch = int(given["--micro-batch"]), int(given.get("--batch-size", 8))
    assert -(-batch // micro) >= 4
    advised = options(batch_size=batch, micro_batch=micro)
    assert make_plan(shape_8b, advised, tight, placement=given["--placement"])  # type: ignore[arg-type]

    few, roomy = options(batch_size=2, micro_batch=1), Machine(DEVICES["h100"], ROOMY, ROOMY)
    (warning,) = make_plan(shape_8b, few, roomy, placement="host").warnings
    assert "e.g. --batch-size" in warning
    host = max(peak.total("host") for peak in make_plan(shape_8b, few, roomy, placement="host").peaks)
    (warning,) = make_plan(
        shape_8b, few, dataclasses.replace(roomy, host=1.001 * host), placement="host"
    ).warnings
    assert "too few for the transfers to hide" in warning and "--batch-size" not in warning


def test_bad_input(tmp_path: Path) -> None:
    """Each is one sentence that names what is wrong."""
    with pytest.raises(MissingModelError, match=r"has no config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CheckpointError, match="cannot be used"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be used"):
        read_shape(tmp_path)
    with pytest.raises(ConfigError, match=r"--gpu must be one of .*h100.*, got 'abacus'"):
        find_device("abacus")
    assert find_device("RTX-4090") is DEVICES["4090"]


def test_windows_fit_the_positions(shape_8b: ModelShape, options: Options, configs: Path) -> None:
    """Plan and run refuse the same: a run asks its plan before it opens a weight."""
    config = dataclasses.replace(options(), data=DataConfig("text.txt", 512, 131073))
    machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
    with pytest.raises(ConfigError, match="at most the model's 131072 positions, got 131073"):
        make_plan(shape_8b, config, machine)
    stretched = dataclasses.replace(shape_8b, positions=Positions(1024, 4096))
    found = make_plan(stretched, options(), machine).warnings
    assert any("longer than the model's 1024 positions" in text for text in found)
    line = ["plan", str(configs / "llama-3.1-8b"), "--gpu", "h100", "--seqlen", "200000"]
    refused = CliRunner().invoke(app, line)
    assert isinstance(refused.exception, ConfigError)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configs: Path) -> None:
    """Both outputs of the command agree with each other; no weight file exists in the folder it reads."""
    monkeypatch.setenv("DISCQUANT_CACHE", str(tmp_path))
    line = ["plan", str(configs / "llama-3.1-8b"), "--bits", "3", "--gpu", "4090", "--seqlen", "2048"]
    line += [
        "--batch-size",
        "8",
        "--micro-batch",
        "1",
        "--host-memory",
        "64",
        "--disk",
        "500",
        "--dataset",
        "text.txt",
    ]
    done = CliRunner().invoke(app, [*line, "--json"], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert facts["placement"] == "host" and facts["state"] == "u8 momentum"
    assert facts["curvature_flop_per_step"] > 0
    assert facts["flop_per_step"] == facts["flop_per_token"] * 16384 + facts["curvature_flop_per_step"]
    assert [phase["name"] for phase in facts["phases"]] == [
        "open", "grid", "calibrate", "start", "solve", "export", "evaluate",
    ]  # fmt: skip
    for phase in facts["phases"]:
        assert phase["gpu_bytes"] == pytest.approx(sum(phase["items"]["gpu"].values()))
    shown = CliRunner().invoke(app, line, catch_exceptions=False)
    assert shown.exit_code == 0 and "Transfers hide from" in shown.stdout
    refused = CliRunner().invoke(app, [*line, "--gpu-memory", "1", "--host-memory", "2"])
    assert isinstance(refused.exception, CapacityError)
    # What the plan has filled in for a GPU is part of the advice: quantize with that alone is the same plan.
    tight = [*line, "--gpu-memory", "16", "--activations", "resident"]
    advice = str(CliRunner().invoke(app, tight).exception).rpartition("fit with ")[2].split()
    assert advice[-6:] == ["--state", "u8", "--optimizer", "momentum", "--compute-dtype", "bfloat16"]
    followed = CliRunner().invoke(app, [*line, "--gpu-memory", "16", *advice])
    assert followed.exit_code == 0
    apart = CliRunner().invoke(app, [*line, "--activations", "disk", "--format", "none", "--json"])
    disk = json.loads(apart.stdout)["phases"][-1]["items"]["disk"]
    assert json.loads(apart.stdout)["activations"] == "disk" and disk["exported models"] == 0
    assert isinstance(CliRunner().invoke(app, [*line, "--activations", "moon"]).exception, ConfigError)
    for option in ("--gpu-memory", "--host-memory", "--disk"):
        for value in ("inf", "nan", "1e308", "0"):
            refused = CliRunner().invoke(app, [*line, option, value, "--json"])
            assert isinstance(refused.exception, ConfigError) and "above 0 and finite" in str(
                refused.exception
            )
    nothing = CliRunner().invoke(app, [*line, "--ignore", "nothing_here"])
    assert isinstance(nothing.exception, ConfigError) and "down_proj" in str(nothing.exception)
