# SPDX-License-Identifier: Apache-2.0
"""Operators `packed_linear` and `dequantize_packed`: a linear layer straight from 3- or 4-bit codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from discquant.ops import _packed_paths as paths
from discquant.ops import _registry as registry
from discquant.ops.pack import LAYOUT_CODES, SCALE_DTYPES, Layout, check_grid, check_words, choose
from discquant.ops.reference import pack as packing
from discquant.ops.reference import packed_linear as reference

Mode = Literal["auto", "a15", "a8", "fp32", "exact"]
MODES: tuple[Mode, ...] = ("auto", "a15", "a8", "fp32", "exact")
_CPU_MODES = {"a8": 0, "a15": 1, "fp32": 2}
# Instruction sets of the CPU kernels, worst first; -1 in the operator is the best that the processor has.
ISAS = ("scalar", "avx2", "avx512", "avx512vnni", "amx")
X_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GRID = "int out_features, int in_features, int num_bits, int group_size"


def _linear_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    out_features: int, in_features: int, num_bits: int, group_size: int, mode: int, isa: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _triton_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    out_features: int, in_features: int, num_bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _triton_launch(*args: Any) -> Tensor:
    out: Tensor = registry.triton_module("packed_linear").packed_linear_fwd(*args)
    return out


def _read_memory_fake(t: Tensor, streams: int, prefetch: bool) -> Tensor:
    return t.new_empty((1,), dtype=torch.int32)


_linear_op = registry.define(
    f"packed_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {_GRID}, "
    "int mode, int isa) -> Tensor",
    _linear_fake,
    None,
)
_triton_op = registry.define(
    f"packed_linear_triton(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {_GRID}) -> Tensor",
    _triton_fake,
    _triton_launch,
)
# Reads a tensor once as fast as loads go: the roof that the benchmark divides by.
_read_memory_op = registry.define(
    "read_memory(Tensor t, int streams, bool prefetch) -> Tensor", _read_memory_fake, None
)


def check_packed(
    op: str, words: Tensor, scale: Tensor, zero_point: Tensor | None, out_features: int, in_features: int,
    num_bits: int, group_size: int, layout: str,
) -> None:  # fmt: skip
    """Validate a packed weight: dtypes, exact sizes, one device."""
    registry.require_tensors(op, words=words, scale=scale, zero_point=zero_point)
    check_grid(op, num_bits, group_size, layout)
    check_words(op, words, out_features, in_features, num_bits)
    registry.require_dtype(op, "scale", scale, SCALE_DTYPES)
    side = packing.SCALE_ROWS[layout]
    rows = packing.padded_shape(out_features, in_features)[0]
    expected = [rows // side, packing.group_count(in_features, group_size), side]
    registry.require(list(scale.shape) == expected, op, "scale", "have shape", expected, scale.shape)
    registry.require(scale.is_contiguous(), op, "scale", "be", "contiguous", list(scale.stride()))
    if zero_point is not None:
        registry.require_dtype(op, "zero_point", zero_point, (torch.uint8,))
        fits = zero_point.shape == scale.shape and zero_point.is_contiguous()
        registry.require(
            fits, op, "zero_point", "be contiguous with the shape of scale", expected, zero_point.shape
        )
    registry.require_device(op, words, scale=scale, zero_point=zero_point)


def modes_on(device: torch.device) -> tuple[Mode, ...]:
    """The modes that there are on a device: those of integer or float32 activations are kernels for the CPU."""
    # On meta there are no numbers, only shapes.
    return MODES if device.type in ("cpu", "meta") else ("auto", "exact")


def _cpp_problem(
    mode: str, layout: str, device: torch.device, isa: str | None = None, batch_invariant: bool = False
) -> str | None:
    if device.type == "cpu":
        if mode == "exact" and isa is not None:
            return f"isa {isa!r} in exact mode: its matmul is torch's"
        if mode == "exact" and batch_invariant:
            return "batch_invariant in exact mode on the CPU: torch's matmul sums by the batch"
        fits = layout == "cpu" or mode == "exact"
        return None if fits else f"layout {layout!r} on the CPU: repack to 'cpu'"
    if layout != "mma":
        return f"layout {layout!r} on {device.type}: repack to 'mma'"
    return None if isa is None else f"isa {isa!r} on {device.type}: it is of the CPU's kernels"


def _triton_problem(
    mode: str, layout: str, isa: str | None = None, batch_invariant: bool = False
) -> str | None:
    if layout != "mma":
        return f"layout {layout!r}: repack to 'mma'"
    if mode not in ("auto", "exact"):
        return f"mode {mode!r}: it is for the CPU"
    if isa is not None:
        return f"isa {isa!r}: it is of the CPU's kernels"
    return "batch_invariant: its tiles go by the batch" if batch_invariant else None


def _reference_problem(mode: str, device: torch.device, isa: str | None, batch_invariant: bool) -> str | None:
    if device.type == "meta":
        return None
    if mode in ("a15", "a8"):
        return f"mode {mode!r}: it takes activations as they are"
    if isa is not None:
        return f"isa {isa!r}: it has none"
    return "batch_invariant: its matmul sums by the batch" if batch_invariant else None


def dequantize_packed(
    words: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, out_features: int, in_features: int,
    num_bits: int, group_size: int, layout: Layout, dtype: torch.dtype, rows: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Rebuild the served weight bit for bit: scale * (q - zero_point) in float32, then one rounding.

    Args:
        words: Packed codes, int32, one dimension.
        scale: Packed grid step in weight units, floating, [padded rows / R, num_groups, R].
        zero_point: Packed codes of weight zero, uint8, same shape; None is 2 ** (num_bits - 1).
        out_features: Logical rows.
        in_features: Logical columns.
        num_bits: 3 or 4.
        group_size: Columns that share a scale: 32, 64, a multiple of 128, or -1 for the row.
        layout: The layout of `words`.
        dtype: float32, float16 or bfloat16.
        rows: First row (a multiple of 16) and the row after the last; None is all.
        impl: "auto" | "reference" | "cpp".

    Returns:
        Weight in dtype, [rows, in_features].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: A buffer has the wrong size, dtype, stride or device; an option is out of range.
        RuntimeError: The requested impl cannot run here.
    """
    op = "dequantize_packed"
    check_packed(op, words, scale, zero_point, out_features, in_features, num_bits, group_size, layout)
    registry.require(dtype in X_DTYPES, op, "dtype", "be one of", list(X_DTYPES), dtype)
    first, last = (0, out_features) if rows is None else rows
    inside = 0 <= first <= last <= out_features and first % 16 == 0
    registry.require(
        inside, op, "rows", "be a range from a multiple of 16 within", [0, out_features], [first, last]
    )
    if choose(op, impl, words.device, op) == "reference":
        weight = reference.dequantize_packed(
            words, scale, zero_point, out_features=out_features, in_features=in_features, num_bits=num_bits,
            group_size=group_size, layout=layout, dtype=dtype,
        )  # fmt: skip
        return weight[first:last]
    out: Tensor = paths.dequantize_op(
        words, scale, zero_point, out_features, in_features, num_bits, group_size, LAYOUT_CODES[layout],
        first, last, dtype,
    )  # fmt: skip
    return out


def packed_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    in_features: int,
    num_bits: int,
    group_size: int,
    layout: Layout,
    mode: Mode = "auto",
    impl: str = "auto",
    isa: str | None = None,
    batch_invariant: bool = False,
    settled: bool = False,
) -> Tensor:
    """Multiply by a packed weight: y = x W^T + bias with W = scale * (q - zero_point).

    Args:
        x: Activations, float32, float16 or bfloat16, [..., in_features].
        words: Packed codes (`pack`), int32, one dimension.
        scale: Packed grid step in weight units (`pack_groups`), floating, [padded rows / R, num_groups, R].
        zero_point: Packed codes of weight zero, uint8, same shape; None is 2 ** (num_bits - 1).
        bias: dtype of x, [out_features].
        out_features: Logical rows of the weight.
        in_features: Logical columns.
        num_bits: 3 or 4.
        group_size: Columns that share a scale: 32, 64, a multiple of 128, or -1 for the row.
        layout: The layout of `words`: "cpu" for the CPU kernels, "mma" for CUDA and Triton.
        mode: On the CPU "a15" (activations as 15-bit integers per block, the default of "auto"), "a8" (8 bits),
            "fp32" (float32 activations); everywhere "exact" (the weight rounded to the dtype of x, then an
            ordinary matmul). "auto" on a GPU is the kernel for few tokens, whose scales multiply float32 sums, and
            for more tokens, by a measured table, one that rounds the weight as "exact" does.
        impl: "auto" | "reference" | "triton" | "cpp".
        batch_invariant: A row's result does not depend on its batch: on a GPU the kernel for few tokens takes every
            number. The CPU kernels of a15, a8 and fp32 are so always.
        settled: Promise that the kernel before this one in the stream does not write words, scale or zero_point:
            from sm_90 on they are read while it still runs. False is always right.
        isa: One of ISAS to force the CPU kernels of an instruction set; None is the best there is.

    Returns:
        dtype of x, [..., out_features].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: A buffer has the wrong size, dtype, stride or device; an option is unknown.
        NotImplementedError: The requested impl, or with "auto" any, does not cover the mode, layout, isa or
            batch_invariant that is asked for; a gradient is; batch_invariant on a GPU with float32 x, with a weight
            too large for the kernel, or in exact mode with scales of another dtype than x.
        RuntimeError: The requested impl cannot run here.

    Note:
        The CPU kernels of a15, a8 and fp32 give the same bits on every instruction set, batch size and thread count,
        where all threads flush subnormals of float32 or none does (`torch.set_flush_denormal` is of one thread).
        "exact" on the CPU ignores autocast and keeps a scratch per calling thread, of the largest weight's size in the
        dtype of x; a weight above 640 MiB there is multiplied by parts of its rows, which may sum in another order.
        A NaN in x makes all outputs of its row NaN. So does an infinity in a15 and a8; in the other modes and on a GPU
        it makes them infinite or NaN, as its products with the weights are.
    """
    op = "packed_linear"
    registry.require_tensors(op, x=x, bias=bias)
    check_packed(op, words, scale, zero_point, out_features, in_features, num_bits, group_size, layout)
    registry.require_dtype(op, "x", x, X_DTYPES)
    fits = x.dim() >= 1 and x.shape[-1] == in_features
    registry.require(fits, op, "x", "have shape [..., in_features]", ["...", in_features], x.shape)
    registry.require_device(op, words, x=x, bias=bias)
    if bias is not None:
        registry.require(bias.dtype == x.dtype, op, "bias", "have the dtype of x", x.dtype, bias.dtype)
        fits = list(bias.shape) == [out_features] and bias.is_contiguous()
        registry.require(fits, op, "bias", "be contiguous with shape", [out_features], bias.shape)
    registry.require(mode in MODES, op, "mode", "be one of", list(MODES), mode)
    registry.require(isa is None or isa in ISAS, op, "isa", "be None or one of", list(ISAS), isa)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise NotImplementedError(
            f"{op}: x must be a constant = requires_grad False, got True (inference only)"
        )
    if mode not in modes_on(x.device):
        raise NotImplementedError(
            f"{op}: mode on {x.device.type} must be one of = {list(modes_on(x.device))}, got {mode!r} (for the CPU)"
        )
    if batch_invariant and x.device.type != "cpu":
        # cuBLAS, which these would need, chooses its order of summation by the batch.
        covered = x.dtype != torch.float32 and (mode != "exact" or scale.dtype == x.dtype)
        if not covered:
            raise NotImplementedError(
                f"{op}: batch_invariant must go with float16 or bfloat16 x (in exact mode, scales of the same dtype) "
                f"= True, got x of {x.dtype} and scales of {scale.dtype}"
            )
    on_cpu = "dequantize_packed_into" if mode == "exact" else op
    operator = on_cpu if x.device.type == "cpu" else "packed_linear_mma"
    chosen = choose(
        op, impl, x.device, operator, cpp=_cpp_problem(mode, layout, x.device, isa, batch_invariant),
        triton=_triton_problem(mode, layout, isa, batch_invariant),
        reference=_reference_problem(mode, x.device, isa, batch_invariant),
    )  # fmt: skip
    rows = x.reshape(-1, in_features)
    if chosen == "reference":
        y = reference.packed_linear(
            rows, words, scale, zero_point, bias, out_features=out_features, in_features=in_features,
            num_bits=num_bits, group_size=group_size, layout=layout, exact=mode == "exact",
        )  # fmt: skip
    elif chosen == "triton":
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y = _triton_op(rows, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size)
    elif x.device.type != "cpu":
        y = paths.gpu_op(
            rows, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size, mode == "exact",
            batch_invariant, settled,
        )  # fmt: skip
    elif mode == "exact":
        y = paths.exact_op(
            x, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size,
            LAYOUT_CODES[layout],
        )  # fmt: skip
    else:
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = _linear_op(
            rows, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size,
            _CPU_MODES["a15" if mode == "auto" else mode], -1 if isa is None else ISAS.index(isa),
        )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)
