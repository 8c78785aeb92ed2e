# SPDX-License-Identifier: Apache-2.0
"""Bytes and time per step, from config.json alone: memory.md's figures, the curvature's factors, experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from discquant.config import QuantizeConfig, SolverConfig
from discquant.planning.hardware import DEVICES, GB
from discquant.planning.plan import Machine, make_plan
from discquant.planning.shape import ModelShape, read_shape
from discquant.planning.traffic import (
    boundary_bytes,
    factor_bytes,
    grid_bytes_per_weight,
    moved_per_step,
    state_layout,
    step_time,
    tokens_to_hide,
    work_per_token,
)

TOKENS, SEQLEN = 16384, 2048  # of `options`
ROOMY = 1e15
Options = Callable[..., QuantizeConfig]


def test_weights(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section header: 32 x 218.1 M = 6.979e9 and 80 x 855.6 M = 68.451e9; embedding + head 1.05e9 and 2.10e9."""
    for shape, depth, block, total, frozen in (
        (shape_8b, 32, 218.1e6, 6.979e9, 1.05e9),
        (shape_70b, 80, 855.6e6, 68.451e9, 2.10e9),
    ):
        assert len(shape.blocks) == depth
        assert round(shape.largest.weights / 1e6, 1) == block / 1e6
        assert round(shape.weights / 1e9, 3) == total / 1e9
        assert round(shape.frozen / 1e9, 2) == frozen / 1e9


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
    assert round(shape_8b.weights * layout.total / GB, 1) == small
    assert round(shape_70b.weights * layout.total / GB, 1) == large


def test_scales(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section 1: scale and zero add 0.2 / 1.6 GB at g128 and 0.7 / 6.4 GB at g32."""
    for size, small, large in ((128, 0.2, 1.6), (32, 0.7, 6.4)):
        share = grid_bytes_per_weight(size, 4096, sym=False)
        assert round(shape_8b.weights * share / GB, 1) == small
        assert round(shape_70b.weights * share / GB, 1) == large


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
    """Section 4: GB per step in and out; of activations it counts one more (4.4, 21.7) than the engine keeps."""
    layout = state_layout("u8", optimizer, 3)
    for shape, expected, boundary in ((shape_8b, eight, 4.3), (shape_70b, seventy, 21.5)):
        moved = moved_per_step(shape, layout, TOKENS)
        assert (round(moved.total_in / GB), round(moved.out / GB)) == expected
        assert round(moved.boundaries / GB, 1) == boundary


@pytest.mark.parametrize(
    ("device", "forward", "duplex", "serial"),
    [("h100", 6.8, 6.4, 10.0), ("h200", 6.8, 6.4, 10.0), ("a100", 5.8, 5.4, 8.5), ("4090", 3.5, 3.3, 5.2)],
)
def test_tokens_to_hide(
    device: str, forward: float, duplex: float, serial: float, shape_70b: ModelShape
) -> None:
    """Section 4: minimum tokens per step, in thousands."""
    hide = tokens_to_hide(shape_70b, state_layout("u8", "momentum", 3), DEVICES[device])
    assert round(hide.forward / 1e3, 1) == forward
    assert round(hide.duplex / 1e3, 1) == duplex
    assert round(hide.serial / 1e3, 1) == serial
    if device == "h100":
        adam = tokens_to_hide(shape_70b, state_layout("u8", "adamw", 3), DEVICES[device])
        assert round(adam.serial / 1e3, 1) == 13.6


def test_work(shape_8b: ModelShape, shape_70b: ModelShape) -> None:
    """Section 5: 75.9 / 705.6 GFLOP per token; the head is 4.2 % and 0.9 % of it."""
    for shape, total, head in ((shape_8b, 75.9, 4.2), (shape_70b, 705.6, 0.9)):
        work = work_per_token(shape, SEQLEN)
        assert round(work.total / 1e9, 1) == total
        assert round(100 * work.head / work.total, 1) == head


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
        assert round(resident.total, 2 if expected < 3 else 1) == expected
        streamed = step_time(
            work, moved_per_step(shape, layout, TOKENS, offload=False), TOKENS, DEVICES[device]
        )
        assert streamed.total == resident.total
        assert streamed.copy_forward < streamed.forward and streamed.copy_serial < streamed.backward
    assert round(resident.total * 1024 / 3600, 1) == hours_70b


def test_wide_computing_is_slower_and_moves_wider_activations(shape_8b: ModelShape, options: Options) -> None:
    """A GPU's rate in float32 is without TF32; boundaries have the width of computing. A CPU has one rate."""
    for name, device in DEVICES.items():
        roomy = dataclasses.replace(device, memory=None if device.memory is None else ROOMY)
        machine = Machine(roomy, ROOMY, ROOMY)
        made = {
            dtype: make_plan(
                shape_8b, options(compute_dtype=dtype, curvature=None), machine, placement="host"
            )
            for dtype in ("bfloat16", "float32", "float64")
        }
        for dtype, plan in made.items():
            width = {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
            assert plan.moved is not None and plan.moved.boundaries == 32 * TOKENS * 4096 * width
            rate = device.computing(dtype).flops  # type: ignore[arg-type]
            assert plan.step.forward == plan.work.forward * TOKENS / rate
            assert plan.gather_seconds * rate == pytest.approx(made["bfloat16"].gather_seconds * device.flops)
            assert plan.hide.forward * device.flops == pytest.approx(made["bfloat16"].hide.forward * rate)
            assert (dtype in plan.to_dict()["rates"]) == (dtype != "bfloat16" and name != "cpu")
        if name == "cpu":
            assert device.computing("float32") == device.computing("float64") == device
        else:
            assert device.float32 is not None and 1.5 < device.flops / device.float32 < 20


def test_activations_are_kept_from_the_first_quantized_block_on(shape_8b: ModelShape) -> None:
    """What lies below it is only run forward."""
    first, *others = shape_8b.blocks
    whole = boundary_bytes(shape_8b, TOKENS, 2)
    dense = dataclasses.replace(first, matrices=())
    left = dataclasses.replace(shape_8b, blocks=(dense, *others))
    assert boundary_bytes(left, TOKENS, 2) == whole * 31 / 32


def test_factors_come_in_and_never_go_out(shape_8b: ModelShape, options: Options) -> None:
    """The curvature's factors, lower triangles: in u8 two bytes, in both passes and in the slots, none written."""
    machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
    without = make_plan(shape_8b, options(), machine, placement="host")
    made = make_plan(shape_8b, options(curvature=None), machine, placement="host")
    width = SolverConfig().curvature_width
    # Every size of this model is a multiple of the width: blocks of width x width fill rows and columns of each matrix.
    expected = sum(
        (m.rows + m.columns) * (width + 1.0) * m.count for block in shape_8b.blocks for m in block.matrices
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
