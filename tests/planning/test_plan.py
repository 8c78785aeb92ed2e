# SPDX-License-Identifier: Apache-2.0
"""Plans from config.json alone reproduce memory.md's figures, choose what fits, and refuse what cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from discquant.calibration.positions import Positions
from discquant.cli import app
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CapacityError, CheckpointError, ConfigError, MissingModelError
from discquant.planning.hardware import DEVICES, GB, GIB, find_device
from discquant.planning.memory import HEAP, HEAP_SHARE, gptq_bytes, needed, phase_peaks
from discquant.planning.plan import Machine, make_plan, setting_for
from discquant.planning.setting import PLACEMENTS
from discquant.planning.shape import ModelShape, read_shape
from discquant.planning.traffic import (
    factor_bytes,
    grid_bytes_per_weight,
    moved_per_step,
    state_layout,
    step_time,
    tokens_to_hide,
    work_per_token,
)

CONFIGS = Path(__file__).parent / "configs"
TOKENS, SEQLEN = 16384, 2048
ROOMY = 1e15


@pytest.fixture(scope="module")
def shape_8b() -> ModelShape:
    """Return Llama-3.1-8B's sizes."""
    return read_shape(CONFIGS / "llama-3.1-8b")


@pytest.fixture(scope="module")
def shape_70b() -> ModelShape:
    """Return Llama-3.1-70B's sizes."""
    return read_shape(CONFIGS / "llama-3.1-70b")


def options(**solver: Any) -> QuantizeConfig:
    """Return the setting of memory.md: 16384 tokens per step in windows of 2048, bfloat16, u8 momentum."""
    chosen = {
        "state": "u8",
        "optimizer": "momentum",
        "batch_size": TOKENS // SEQLEN,
        "micro_batch": 2,
        "iters": 1024,
        "compute_dtype": "bfloat16",
        "start": "ref",
        "curvature": 0.0,  # memory.md has none
        **solver,
    }
    return QuantizeConfig(
        grid=GridConfig(bits=3, group_size=128),
        solver=SolverConfig(**chosen),
        data=DataConfig("text.txt", 512, SEQLEN),
        baselines=(),
    )


def rounded(value: float, digits: int) -> float:
    """Round as memory.md does."""
    return round(value, digits)


def test_weights(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section header: 32 x 218.1 M = 6.979e9 and 80 x 855.6 M = 68.451e9; embedding + head 1.05e9 and 2.10e9."""
    for shape, depth, block, total, frozen in (
        (shape_8b, 32, 218.1e6, 6.979e9, 1.05e9),
        (shape_70b, 80, 855.6e6, 68.451e9, 2.10e9),
    ):
        assert len(shape.blocks) == depth
        assert rounded(shape.largest.weights / 1e6, 1) == block / 1e6
        assert rounded(shape.weights / 1e9, 3) == total / 1e9
        assert rounded(shape.frozen / 1e9, 2) == frozen / 1e9


@pytest.mark.parametrize(
    ("state", "optimizer", "per_weight", "small", "large"),
    [
        ("u8", "momentum", 3.5, 24.4, 239.6),
        ("u8", "adamw", 4.5, 31.4, 308.0),
        ("u8", "sgd", 2.5, 17.4, 171.1),
    ],
)
def test_state_bytes(
    state: str,
    optimizer: str,
    per_weight: float,
    small: float,
    large: float,
    shape_8b: ModelShape,
    shape_70b: ModelShape,
) -> None:
    """Section 1: bytes per weight and in all."""
    layout = state_layout(state, optimizer, 3)
    assert layout.total == per_weight
    assert rounded(shape_8b.weights * layout.total / GB, 1) == small
    assert rounded(shape_70b.weights * layout.total / GB, 1) == large


def test_scales(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section 1: scale and zero add 0.2 / 1.6 GB at g128 and 0.7 / 6.4 GB at g32."""
    for size, small, large in ((128, 0.2, 1.6), (32, 0.7, 6.4)):
        share = grid_bytes_per_weight(size, 4096, sym=False)
        assert rounded(shape_8b.weights * share / GB, 1) == small
        assert rounded(shape_70b.weights * share / GB, 1) == large


@pytest.mark.parametrize(
    ("optimizer", "eight", "seventy"),
    [("sgd", (35, 7), (342, 68)), ("momentum", (42, 14), (411, 137)), ("adamw", (49, 21), (479, 205))],
)
def test_bytes_per_step(
    optimizer: str,
    eight: tuple[int, int],
    seventy: tuple[int, int],
    shape_8b: ModelShape,
    shape_70b: ModelShape,
) -> None:
    """Section 4: GB per step in and out, and boundary activations 4.4 / 21.7."""
    layout = state_layout("u8", optimizer, 3)
    for shape, expected, boundary in ((shape_8b, eight, 4.4), (shape_70b, seventy, 21.7)):
        moved = moved_per_step(shape, layout, TOKENS)
        assert (round(moved.total_in / GB), round(moved.out / GB)) == expected
        assert rounded(moved.boundaries / GB, 1) == boundary


@pytest.mark.parametrize(
    ("device", "forward", "duplex", "serial"),
    [("h100", 6.8, 6.4, 10.0), ("h200", 6.8, 6.4, 10.0), ("a100", 5.8, 5.4, 8.5), ("4090", 3.5, 3.3, 5.2)],
)
def test_tokens_to_hide(
    device: str, forward: float, duplex: float, serial: float, shape_70b: ModelShape
) -> None:
    """Section 4: minimum tokens per step, in thousands."""
    hide = tokens_to_hide(shape_70b, state_layout("u8", "momentum", 3), DEVICES[device])
    assert rounded(hide.forward / 1e3, 1) == forward
    assert rounded(hide.duplex / 1e3, 1) == duplex
    assert rounded(hide.serial / 1e3, 1) == serial
    if device == "h100":
        adam = tokens_to_hide(shape_70b, state_layout("u8", "adamw", 3), DEVICES[device])
        assert rounded(adam.serial / 1e3, 1) == 13.6


def test_work(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section 5: 75.9 / 705.6 GFLOP per token; the head is 4.2 % and 0.9 % of it."""
    for shape, total, head in ((shape_8b, 75.9, 4.2), (shape_70b, 705.6, 0.9)):
        work = work_per_token(shape, SEQLEN)
        assert rounded(work.total / 1e9, 1) == total
        assert rounded(100 * work.head / work.total, 1) == head


@pytest.mark.parametrize(
    ("device", "seconds_8b", "seconds_70b", "hours_70b"),
    [("h100", 2.07, 19.3, 5.5), ("a100", 5.4, 50.3, 14.3), ("4090", 8.9, 82.6, 23.5)],
)
def test_step_time(
    device: str,
    seconds_8b: float,
    seconds_70b: float,
    hours_70b: float,
    shape_8b: ModelShape,
    shape_70b: ModelShape,
) -> None:
    """Section 5: step seconds and hours of 1024 steps; at 16384 tokens the transfers of D3.5 hide."""
    layout = state_layout("u8", "momentum", 3)
    for shape, expected in ((shape_8b, seconds_8b), (shape_70b, seconds_70b)):
        work = work_per_token(shape, SEQLEN)
        resident = step_time(work, None, TOKENS, DEVICES[device])
        assert rounded(resident.total, 2 if expected < 3 else 1) == expected
        streamed = step_time(
            work, moved_per_step(shape, layout, TOKENS, offload=False), TOKENS, DEVICES[device]
        )
        assert streamed.total == resident.total
        assert streamed.copy_forward < streamed.forward and streamed.copy_serial < streamed.backward
    assert rounded(resident.total * 1024 / 3600, 1) == hours_70b


def test_working_set(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section 1, working set with the state on the host: about 7 and 21 GB; the parts that are exact, exactly."""
    for shape, slots, weights, gradient, head, total in (
        (shape_8b, 2.3, 0.87, 0.87, 1.05, 7.0),
        (shape_70b, 9.0, 3.4, 3.4, 2.1, 21.0),
    ):
        config = options(micro_batch=1)
        machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
        solve = {p.name: p for p in phase_peaks(shape, setting_for(shape, config, "host", machine))}["solve"]
        digits = 2 if shape is shape_8b else 1
        # The slots carry the scales as well, 2 bytes per 128 weights.
        assert rounded((solve.gpu["block slots"] - 3 * shape.largest.weights * 2 / 128) / GB, 1) == slots
        assert rounded(solve.gpu["student and teacher weights"] / GB, digits) == weights
        # Of eight micro-batches up to four are in memory, which that section has in one.
        partial = 3 * 4.0 * shape.largest.weights
        assert rounded((solve.gpu["weight gradient"] - partial) / GB, digits) == gradient
        assert rounded(shape.head * 2 / GB, 2 if shape is shape_8b else 1) == head
        assert rounded(solve.gpu["logits"] / GB, 2) == 1.05
        # That section has no input embedding; here it is on the device, too. The engine keeps what a step replaces
        # as well, as far as that is small.
        embedding, undo = 2 * (shape.frozen - shape.head), solve.gpu["bytes to undo a step"]
        assert (solve.total("gpu") - embedding - undo - partial) / GB == pytest.approx(total, rel=0.15)
        assert rounded(solve.host["boundary activations"] / GB, 1) == (4.4 if shape is shape_8b else 21.7)


def test_issue_targets(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """8B at 16k tokens within 20 GiB of device memory, 70B within 40; its host within 270 GiB in every phase.

    With the curvature's factors; also from GPTQ's codes, with both baselines. No byte on the disk but checkpoints,
    codes and the result.
    """
    machine = Machine(DEVICES["h100"], 400 * GIB, ROOMY)
    for shape, limit in ((shape_8b, 20 * GIB), (shape_70b, 40 * GIB)):
        for start, baselines in (("ref", ()), ("gptq", ("rtn", "gptq"))):
            config = dataclasses.replace(options(start=start, curvature=None), baselines=baselines)
            made = make_plan(shape, config, machine, placement="host")
            assert needed(list(made.peaks), "gpu") <= limit or start == "gptq"
            assert all(peak.total("host") <= 270 * GIB for peak in made.peaks)
            assert made.setting.placement == "host" and not made.warnings
            files = {item for peak in made.peaks for item, size in peak.disk.items() if size}
            expected = {"checkpoints (three)", "exported models", "a shard's spool", "codes"}
            assert files == expected | ({"codes at the start"} if start == "gptq" else set())


def test_gptq_of_a_70b_block(shape_70b: ModelShape) -> None:
    """The 28672-wide layer: two [28672, 28672] in float64 and little else."""
    two = 2 * 8 * 28672**2
    assert two < gptq_bytes(shape_70b.largest) < 1.15 * two


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_activations_are_where_they_are_asked_for(gpu: bool, placement: str, shape_8b: ModelShape) -> None:
    """Apart from the state: in the memory that holds them, in what moves, and in what fits."""
    config = options(batch_size=64, micro_batch=1, compute_dtype="bfloat16" if gpu else "float32")
    machine = Machine(DEVICES["h200" if gpu else "cpu"], ROOMY, ROOMY)
    found = {}
    for activations in (None, *PLACEMENTS):
        made = make_plan(shape_8b, config, machine, placement=placement, activations=activations)  # type: ignore[arg-type]
        solve = next(peak for peak in made.peaks if peak.name == "solve")
        found[activations] = {
            where: getattr(solve, where).get("boundary activations", 0.0) for where in ("gpu", "host", "disk")
        }
        assert made.to_dict()["activations"] == (activations or placement)
        leaves = activations == "disk" or (activations == "host" and gpu)
        if placement == "resident":
            assert (made.moved is not None) == leaves
        if leaves:
            assert made.moved is not None and made.moved.boundaries == 33 * 64 * SEQLEN * 4096 * 2.0
    size = 33 * 64 * SEQLEN * 4096 * (2.0 if gpu else 4.0)
    places = {"resident": "gpu" if gpu else "host", "host": "host", "disk": "disk"}
    for activations in PLACEMENTS:
        assert found[activations] == {
            where: size if where == places[activations] else 0.0 for where in ("gpu", "host", "disk")
        }
    assert found[None] == found[placement]


def test_activations_decide_what_fits(shape_8b: ModelShape) -> None:
    config = options(batch_size=64, micro_batch=1, compute_dtype="float32")
    least = needed(
        phase_peaks(
            shape_8b,
            setting_for(shape_8b, config, "host", Machine(DEVICES["cpu"], ROOMY, ROOMY), activations="disk"),
        ),
        "host",
    )
    tight = Machine(DEVICES["cpu"], 1.01 * least, ROOMY)
    assert (
        make_plan(shape_8b, config, tight, placement="host", activations="disk").setting.boundaries == "disk"
    )
    for activations in (None, "host", "resident"):
        with pytest.raises(CapacityError):
            make_plan(shape_8b, config, tight, placement="host", activations=activations)  # type: ignore[arg-type]
    with pytest.raises(CapacityError):
        make_plan(
            shape_8b, config, dataclasses.replace(tight, disk=1e11), placement="host", activations="disk"
        )


def test_every_format_is_on_the_disk(shape_8b: ModelShape) -> None:
    """The models, of one shard's spool beside the last; none where the codes stay in the run directory."""
    machine = Machine(DEVICES["cpu"], ROOMY, ROOMY)

    def written(formats: str) -> dict[str, float]:
        config = dataclasses.replace(options(), format=formats)
        peaks = phase_peaks(shape_8b, setting_for(shape_8b, config, "resident", machine))
        return next(peak.disk for peak in peaks if peak.name == "export")

    one, three, none = written("gptq"), written("gptq,awq,mlx"), written("none")
    assert three["exported models"] == 3 * one["exported models"] > 3e9
    assert three["a shard's spool"] == one["a shard's spool"] > 3e9
    assert none["exported models"] == none["a shard's spool"] == 0.0


def test_placement_is_the_first_that_fits(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Resident on a big device, host memory on a small one, the disk where host memory is small as well."""
    config = options()
    for shape, device, host, expected in (
        (shape_8b, "h200", 64 * GB, "resident"),
        (shape_8b, "4090", 64 * GB, "host"),
        (shape_8b, "4090", 20 * GB, "disk"),
        (shape_70b, "h200", 350 * GB, "host"),
        (shape_70b, "h200", 100 * GB, "disk"),
    ):
        made = make_plan(shape, config, Machine(DEVICES[device], host, ROOMY))
        assert made.setting.placement == expected, (shape.name, device)
        assert [o.fits for o in made.options if o.state == "u8 momentum" and o.placement == expected] == [
            True
        ]
        assert {option.placement for option in made.options} == set(PLACEMENTS)


def test_auto_leaves_a_tenth_of_the_device(shape_8b: ModelShape) -> None:
    """Only where nothing else fits, or a placement is named, the device is filled to the last byte."""
    device, config = DEVICES["h100"], options()
    made = {
        p: make_plan(shape_8b, config, Machine(device, ROOMY, ROOMY), placement=p).peaks for p in PLACEMENTS
    }
    peak = needed(list(made["resident"]), "gpu")
    little = 0.99 * needed(list(made["host"]), "host")
    least = 0.99 * needed(list(made["disk"]), "disk")
    for room, host, disk, expected in (
        (1.11, ROOMY, ROOMY, "resident"),
        (1.09, ROOMY, ROOMY, "host"),
        (1.01, little, ROOMY, "disk"),
        (1.01, little, least, "resident"),
    ):
        machine = Machine(dataclasses.replace(device, memory=room * peak), host, disk)
        chosen = make_plan(shape_8b, config, machine)
        assert chosen.setting.placement == expected, (room, host)
        assert any("--placement resident takes it" in text for text in chosen.warnings) == (
            expected != "resident"
        )
        assert make_plan(shape_8b, config, machine, placement="resident").setting.placement == "resident"


def test_refusal_names_numbers_and_what_would_fit(shape_70b: ModelShape) -> None:
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


def test_too_few_tokens_is_a_warning_with_the_number(shape_70b: ModelShape) -> None:
    """Following the warning's advice removes it."""
    machine = Machine(DEVICES["h100"], 400 * GB, ROOMY)
    made = make_plan(shape_70b, options(batch_size=2), machine, placement="host")
    (warning,) = made.warnings
    assert "4096 tokens per step are too few" in warning and "10,000 are needed" in warning
    advised = int(warning.partition("--batch-size ")[2].split(";")[0])
    assert not make_plan(shape_70b, options(batch_size=advised), machine, placement="host").warnings
    assert make_plan(shape_70b, options(batch_size=advised - 1), machine, placement="host").warnings


def test_ranks_share_a_step_and_a_machine(shape_8b: ModelShape) -> None:
    """Each has its share of the tokens and its own device; host memory and disk are the machine's."""
    config, roomy = options(curvature=None), Machine(DEVICES["4090"], ROOMY, ROOMY)
    alone = make_plan(shape_8b, config, roomy, placement="disk")
    four = make_plan(shape_8b, config, dataclasses.replace(roomy, ranks=4), placement="disk")
    assert (four.setting.tokens, four.setting.step_tokens) == (
        alone.setting.tokens // 4,
        alone.setting.tokens,
    )
    assert four.step.forward == pytest.approx(alone.step.forward / 4)
    assert four.exchanged == 2 * 4 * shape_8b.weights and alone.exchanged == 0
    state = [{peak.name: peak for peak in made.peaks}["solve"].disk for made in (alone, four)]
    assert state[1]["state"] == 4 * state[0]["state"]
    # Each gathers the curvature's factors on all windows of a step; without them it keeps its share of a step's.
    assert state[1]["boundary activations"] == pytest.approx(4 * state[0]["boundary activations"])
    plain = options(curvature=0.0)
    for made in (roomy, dataclasses.replace(roomy, ranks=4)):
        steps = {peak.name: peak for peak in make_plan(shape_8b, plain, made, placement="disk").peaks}
        assert steps["solve"].disk["boundary activations"] == pytest.approx(state[0]["boundary activations"])
    host = max(peak.total("host") for peak in four.peaks)
    with pytest.raises(CapacityError):
        make_plan(shape_8b, config, Machine(DEVICES["4090"], 3.9 * host, ROOMY, ranks=4), placement="disk")
    assert make_plan(shape_8b, config, Machine(DEVICES["4090"], 4.1 * host, ROOMY, ranks=4), placement="disk")


def test_more_of_anything_needs_no_less(shape_8b: ModelShape) -> None:
    """Wider state, more tokens, more blocks: no peak shrinks."""
    machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
    for placement in PLACEMENTS:

        def peaks(shape: ModelShape, config: QuantizeConfig, policy: Any = placement) -> list[float]:
            found = phase_peaks(shape, setting_for(shape, config, policy, machine))
            return [peak.total(where) for peak in found for where in ("gpu", "host", "disk")]

        base = peaks(shape_8b, options())
        deeper = dataclasses.replace(shape_8b, blocks=shape_8b.blocks * 2)
        for more in (
            peaks(shape_8b, options(optimizer="adamw")),
            peaks(shape_8b, options(state="fp32")),
            peaks(shape_8b, options(batch_size=32)),
            peaks(shape_8b, options(batch_size=16, micro_batch=4)),  # fewer passes alone hold fewer sums
            peaks(deeper, options()),
        ):
            assert all(a >= b for a, b in zip(more, base, strict=True)) and more != base


def test_factors_come_in_and_never_go_out(shape_8b: ModelShape) -> None:
    """The curvature's factors: two bytes in u8, in both passes and in the slots; no byte written, none without them."""
    machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
    without = make_plan(shape_8b, options(), machine, placement="host")
    made = make_plan(shape_8b, options(curvature=None), machine, placement="host")
    width = SolverConfig().curvature_width
    # Every size of this model is a multiple of the width: blocks of width x width fill rows and columns of each matrix.
    expected = 2.0 * sum(
        (m.rows + m.columns) * width * m.count for block in shape_8b.blocks for m in block.matrices
    )
    assert factor_bytes(shape_8b.blocks, options(curvature=None)) == expected
    assert made.moved is not None and without.moved is not None
    assert made.moved.total_in - without.moved.total_in == 2 * expected
    assert made.moved.out == without.moved.out
    found, before = ({p.name: p for p in plan.peaks}["solve"] for plan in (made, without))
    assert found.host["state"] - before.host["state"] == expected
    assert found.gpu["block slots"] - before.gpu["block slots"] == 3 * expected / len(shape_8b.blocks)
    assert made.hide.serial > without.hide.serial and made.step_seconds > without.step_seconds
    assert made.gather_seconds > 0 and without.gather_seconds == 0
    curved = options(curvature=None)
    for other in (options(), options(curvature=None, loss="mse"), dataclasses.replace(curved, method="gptq")):
        assert factor_bytes(shape_8b.blocks, other) == 0


def test_experts_move_whole_and_work_in_part(tmp_path: Path) -> None:
    """Of 8 experts 2 work per token: the work counts those, memory and traffic all, and hiding needs more tokens."""
    import transformers

    transformers.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=512,
    ).save_pretrained(tmp_path)  # fmt: skip
    shape = read_shape(tmp_path)
    attention = 2 * 64 * 64 + 2 * 64 * 32
    assert shape.largest.weights == attention + 8 * 3 * 64 * 128
    assert shape.largest.active_weights == attention + 2 * 3 * 64 * 128
    layout = state_layout("u8", "momentum", 3)
    dense = layout.forward / 4 * DEVICES["h100"].flops / DEVICES["h100"].link
    ratio = shape.weights / shape.active_weights
    assert tokens_to_hide(shape, layout, DEVICES["h100"]).forward == pytest.approx(dense * ratio)


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


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both outputs of the command agree with each other; no weight file exists in the folder it reads."""
    monkeypatch.setenv("DISCQUANT_CACHE", str(tmp_path))
    line = ["plan", str(CONFIGS / "llama-3.1-8b"), "--bits", "3", "--gpu", "4090", "--seqlen", "2048"]
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
    apart = CliRunner().invoke(app, [*line, "--activations", "disk", "--format", "none", "--json"])
    disk = json.loads(apart.stdout)["phases"][-1]["items"]["disk"]
    assert json.loads(apart.stdout)["activations"] == "disk" and disk["exported models"] == 0
    assert isinstance(CliRunner().invoke(app, [*line, "--activations", "moon"]).exception, ConfigError)
    nothing = CliRunner().invoke(app, [*line, "--ignore", "nothing_here"])
    assert isinstance(nothing.exception, ConfigError) and "down_proj" in str(nothing.exception)


def test_windows_fit_the_positions(shape_8b: ModelShape) -> None:
    """Plan and run refuse the same: a run asks its plan before it opens a weight."""
    config = dataclasses.replace(options(), data=DataConfig("text.txt", 512, 131073))
    machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
    with pytest.raises(ConfigError, match="at most the model's 131072 positions, got 131073"):
        make_plan(shape_8b, config, machine)
    stretched = dataclasses.replace(shape_8b, positions=Positions(1024, 4096))
    found = make_plan(stretched, options(), machine).warnings
    assert any("longer than the model's 1024 positions" in text for text in found)
    line = ["plan", str(CONFIGS / "llama-3.1-8b"), "--gpu", "h100", "--seqlen", "200000"]
    refused = CliRunner().invoke(app, line)
    assert isinstance(refused.exception, ConfigError)


def test_allocator_and_text(shape_8b: ModelShape, tiny_llama_dir: Path) -> None:
    """A CPU's heap keeps a share of small tensors' momentary bytes, of no larger ones; only text has token lists."""
    small, config = read_shape(tiny_llama_dir), options(compute_dtype="float32")
    cpu, gpu = Machine(DEVICES["cpu"], ROOMY, ROOMY), Machine(DEVICES["h100"], ROOMY, ROOMY)

    def phases(shape: ModelShape, machine: Machine, dataset: str = "text.txt") -> dict[str, dict[str, float]]:
        chosen = dataclasses.replace(config, data=DataConfig(dataset, 512, 256))
        peaks = phase_peaks(shape, setting_for(shape, chosen, "resident", machine))
        return {peak.name: peak.host for peak in peaks}

    found = phases(small, cpu)
    grid, solve = found["grid"], found["solve"]
    kept = {item for item in found["export"] if item != "one layer packed"}
    momentary = sum(size for item, size in solve.items() if item not in kept and item != HEAP)
    assert solve[HEAP] == pytest.approx(HEAP_SHARE * momentary)
    assert HEAP not in grid and grid["tokenizer and text"] > 0 and found["calibrate"]["token lists"] > 0
    assert all(HEAP not in items for shape in (small, shape_8b) for items in phases(shape, gpu).values())
    # Of a large model only the key and value matrices are small enough, a few percent of it.
    large = phases(shape_8b, cpu).values()
    assert 0 < max(items.get(HEAP, 0) / sum(items.values()) for items in large) < 0.02
    tokens = phases(small, cpu, "ids.safetensors:ids")
    assert tokens["grid"]["tokenizer and text"] == 0 == tokens["calibrate"]["token lists"]
