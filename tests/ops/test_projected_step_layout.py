# SPDX-License-Identifier: Apache-2.0
"""projected_step_: the same bytes in whatever parts, tiles, strides and shapes, now or deferred."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from discquant.ops import StepCounts, projected_step_deferred_
from discquant.ops._steps import flatten_options
from discquant.ops.reference.projected_step import decode_frac_ref

OPTIMIZERS = ("adamw", "momentum", "lion", "sgd")


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_independent_of_sharding(impl, make_state, assert_equal, device, take_step, step_options):
    """Stepping row blocks with their first_index gives the same bytes and counts as stepping the whole."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(step_options, optimizer="adamw")
    state = make_state((8, 100), "8bit", 32)
    whole, counts = take_step(state, 32, options, impl=impl)
    totals = [0] * 5
    for begin, end in ((0, 3), (3, 8)):
        part = {name: tensor[begin:end].contiguous() for name, tensor in state.items()}
        shard = dataclasses.replace(options, first_index=options.first_index + begin * 100)
        stepped, part_counts = take_step(part, 32, shard, impl=impl)
        totals = [a + b for a, b in zip(totals, part_counts, strict=True)]
        for name in ("frac", "momentum", "second_moment"):
            assert_equal(stepped[name], whole[name][begin:end], name)
    assert StepCounts(*totals) == counts


def test_independent_of_tiling(make_state, assert_equal, step_options):
    """The launcher's tile changes no byte."""
    from discquant.triton_kernels.projected_step import projected_step_fwd

    from discquant.ops._steps import launch_arguments

    options = dataclasses.replace(step_options, optimizer="momentum")
    state = make_state((6, 90), "8bit", 32)
    results = []
    for block in ((4, 64, 1), (16, 16, 3), (1, 128, 1), (1, 16, 6)):
        copy = {name: tensor.clone() for name, tensor in state.items()}
        counts = projected_step_fwd(
            copy["frac"], copy["frac_ref"], copy["weight_grad"], copy["scale"], copy["momentum"], None, None, None, 32,
            *launch_arguments(*flatten_options(options)), block=block,
        )  # fmt: skip
        results.append((copy["frac"], copy["momentum"], counts))
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert_equal(right, left)


def test_wide_rows_and_weights_of_terms(make_state, assert_equal, take_step, step_options):
    """Rows of many tiles, whole and with an overhang, and terms that are left out where their weight says so."""
    from discquant.triton_kernels.projected_step import _tiling

    # 4096 columns: 16 tiles in one program; 11008: 43, which have no divisor, so two programs and an overhang.
    assert _tiling(4096, 4096, True) == ((1, 256, 16), 1)
    assert _tiling(4096, 11008, True) == ((1, 256, 22), 1)
    for cols, linear, hardening in ((1100, 0.0, 0.0), (1280, 1.0, 0.0), (1100, 0.0, 0.3), (1280, 0.7, 0.3)):
        options = dataclasses.replace(
            step_options, optimizer="lion", linear_weight=linear, hardening=hardening
        )
        state = make_state((3, cols), "8bit")
        expected, counts = take_step(state, 64, options, impl="reference")
        actual, found = take_step(state, 64, options, impl="triton")
        assert found == counts
        for name in ("frac", "momentum"):
            assert_equal(actual[name], expected[name], f"{name} {cols}")


def test_deferred_and_deterministic(make_state, assert_equal, take_step, step_options):
    """The variant that does not wait gives the same state and counts, twice."""
    options = dataclasses.replace(step_options, optimizer="lion")
    state = make_state((5, 64), "8bit")
    expected, counts = take_step(state, 64, options, impl="triton")
    for impl in ("triton", "reference"):
        copy = {name: tensor.clone() for name, tensor in state.items()}
        deferred = projected_step_deferred_(**copy, group_size=64, options=options, impl=impl)
        assert deferred.tolist() == list(counts)
        assert_equal(copy["frac"], expected["frac"])
        assert_equal(copy["second_moment"], state["second_moment"], "lion has no second moment")


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_strides(impl, make_state, assert_equal, device, take_step, step_options):
    """Transposed storage: Triton steps it in place, C++ refuses it by name, auto takes another way."""
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    options = dataclasses.replace(step_options, optimizer="momentum")
    state = make_state((8, 64), "8bit")
    expected, counts = take_step(state, 64, options, impl="reference")
    turned = {name: tensor.t().contiguous().t() for name, tensor in state.items()}
    if impl == "cpp":
        with pytest.raises(NotImplementedError, match=r"projected_step_: .* got a non-contiguous frac"):
            take_step(turned, 64, options, impl="cpp")
        impl = "auto"
    actual, turned_counts = take_step(turned, 64, options, impl=impl)
    assert turned_counts == counts
    assert_equal(actual["frac"], expected["frac"])
    assert_equal(actual["momentum"], expected["momentum"])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1), (7, 13)])
@pytest.mark.parametrize("impl", ["triton", "cpp", "reference"])
def test_small_shapes(shape, impl, make_state, device, take_step, step_options):
    if impl == "cpp" and device.type != "cpu":
        pytest.skip("cpp is for CPU tensors")
    state = make_state(shape, "8bit", -1)
    _, counts = take_step(state, -1, dataclasses.replace(step_options, optimizer="momentum"), impl=impl)
    reference = decode_frac_ref(state["frac_ref"], torch.float32)
    assert counts.live == int(((reference != 0) & (reference != 1)).sum())


@pytest.mark.gpu
def test_llama_shapes_on_gpu(make_state, assert_equal, take_step, step_options):
    for optimizer, storage in itertools.product(OPTIMIZERS, ("8bit", "f32", "bf16")):
        options = dataclasses.replace(step_options, optimizer=optimizer, first_index=0)
        state = make_state((4096, 14336), storage)
        expected, expected_counts = take_step(state, 64, options, impl="reference")
        actual, counts = take_step(state, 64, options, impl="triton")
        assert counts == expected_counts
        for name in ("frac", "momentum", "second_moment"):
            assert_equal(actual[name], expected[name], f"{optimizer} {storage} {name}")
