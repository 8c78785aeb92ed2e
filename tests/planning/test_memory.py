# SPDX-License-Identifier: Apache-2.0
"""Bytes of each phase on device, host and disk: memory.md's figures, what they are made of, what makes them grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discquant.config import DataConfig, GridConfig, QuantizeConfig
from discquant.planning.hardware import DEVICES, GB, GIB
from discquant.planning.heap import HEAP, HEAP_SHARE
from discquant.planning.memory import needed, phase_peaks, tree_bytes
from discquant.planning.plan import Machine, make_plan, setting_for
from discquant.planning.rounding import gptq_bytes
from discquant.planning.setting import PLACEMENTS
from discquant.planning.shape import ModelShape, read_shape

SEQLEN = 2048  # of `options`
ROOMY = 1e15
Options = Callable[..., QuantizeConfig]


def test_working_set(shape_8b: ModelShape, shape_70b: ModelShape, options: Options) -> None:
    """Section 1, working set with the state on the host: about 7 and 21 GB; the parts that are exact, exactly."""
    for shape, slots, weights, gradient, head, total in (
        (shape_8b, 2.3, 0.87, 0.87, 1.05, 7.0),
        (shape_70b, 9.0, 3.4, 3.4, 2.1, 21.0),
    ):
        config = options(micro_batch=1)
        machine = Machine(DEVICES["h100"], ROOMY, ROOMY)
        solve = {p.name: p for p in phase_peaks(shape, setting_for(shape, config, "host", machine))}["solve"]
        digits = 2 if shape is shape_8b else 1
        # The slots carry the scales as well, 2 bytes per 128 weights, and 3 of every weight that the grid clips far,
        # beside one for every 255 weights.
        besides = 3 * shape.largest.weights * (2 / 128 + 3 * 0.022 + 1 / 255)
        assert round((solve.gpu["block slots"] - besides) / GB, 1) == slots
        assert round(solve.gpu["student and teacher weights"] / GB, digits) == weights
        # Of eight micro-batches up to four are in memory, which that section has in one.
        partial = 3 * 4.0 * shape.largest.weights
        assert round((solve.gpu["weight gradient"] - partial) / GB, digits) == gradient
        assert round(shape.head * 2 / GB, 2 if shape is shape_8b else 1) == head
        assert round(solve.gpu["logits"] / GB, 2) == 1.05
        # That section has no input embedding; here it is on the device, too. The engine keeps what a step replaces
        # as well, as far as that is small.
        embedding, undo = 2 * (shape.frozen - shape.head), solve.gpu["bytes to undo a step"]
        assert (solve.total("gpu") - embedding - undo - partial) / GB == pytest.approx(total, rel=0.15)
        # That section counts what leaves the last block, too (4.4 and 21.7), which the engine does not keep.
        assert round(solve.host["boundary activations"] / GB, 1) == (4.3 if shape is shape_8b else 21.5)


def test_issue_targets(shape_8b: ModelShape, shape_70b: ModelShape, options: Options) -> None:
    """8B at 16k tokens within 20 GiB of device memory, 70B within 40, also from GPTQ's codes, with both baselines.

    The host of 70B takes 270 GiB in every phase with the curvature's factors, the default, at 3 and 4 bits in groups of
    64 and 128. No byte on the disk but checkpoints, codes and the result.
    """
    machine = Machine(DEVICES["h100"], 400 * GIB, ROOMY)
    for shape, limit in ((shape_8b, 20 * GIB), (shape_70b, 40 * GIB)):
        for start, baselines in (("ref", ()), ("gptq", ("rtn", "gptq"))):
            config = dataclasses.replace(options(start=start, curvature=None), baselines=baselines)
            made = make_plan(shape, config, machine, placement="host")
            assert needed(list(made.peaks), "gpu") <= limit or start == "gptq"
            for bits, group_size in ((3, 64), (3, 128), (4, 64), (4, 128)):
                other = dataclasses.replace(config, grid=GridConfig(bits, group_size))
                assert (
                    needed(phase_peaks(shape, setting_for(shape, other, "host", machine)), "host")
                    <= 270 * GIB
                )
            assert made.setting.placement == "host" and not made.warnings
            files = {item for peak in made.peaks for item, size in peak.disk.items() if size}
            expected = {"checkpoints (three)", "exported models", "a shard's spool", "codes"}
            assert files == expected | ({"codes at the start"} if start == "gptq" else set())


def test_sums_of_gradients_are_the_worst_of_all_passes() -> None:
    """Without a look at each pass: a step of 10^12 windows is planned as fast as one of 8."""
    for passes in (*range(1, 70), 127, 128, 129):
        for gradient, kept in ((1.0, 0.0), (1.0, 3.0), (7.0, 1e3), (0.0, 5.0)):
            slow = max(gradient * (1 + done.bit_count()) - kept * done / passes for done in range(passes))
            assert tree_bytes(gradient, kept, passes) == slow
    assert tree_bytes(1.0, 0.0, 10**12) == 1 + 39


def test_gptq_of_a_70b_block(shape_70b: ModelShape) -> None:
    """The 28672-wide layer: two [28672, 28672] in float64 and little else."""
    two = 2 * 8 * 28672**2
    assert two < gptq_bytes(shape_70b.largest) < 1.15 * two


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_activations_are_where_they_are_asked_for(
    gpu: bool, placement: str, shape_8b: ModelShape, options: Options
) -> None:
    """Apart from the state: in the memory that holds them, in what moves, and in what fits."""
    config = options(batch_size=64, micro_batch=1, compute_dtype="bfloat16" if gpu else "float32")
    machine = Machine(DEVICES["h200" if gpu else "cpu"], ROOMY, ROOMY)
    found, size = {}, 64 * SEQLEN * 4096 * (2.0 if gpu else 4.0)
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
            assert made.moved is not None and made.moved.boundaries == size * 32
    places = {"resident": "gpu" if gpu else "host", "host": "host", "disk": "disk"}
    for activations in PLACEMENTS:
        leaves = activations == "disk" or (activations == "host" and gpu)
        kept = size * (32 if leaves else 33)  # what leaves the last block never leaves the device
        assert found[activations] == {
            where: kept if where == places[activations] else 0.0 for where in ("gpu", "host", "disk")
        }
    assert found[None] == found[placement]


def test_every_format_is_on_the_disk(shape_8b: ModelShape, options: Options) -> None:
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


def test_more_of_anything_needs_no_less(shape_8b: ModelShape, options: Options) -> None:
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


def test_allocator_and_text(shape_8b: ModelShape, tiny_llama_dir: Path, options: Options) -> None:
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
