# SPDX-License-Identifier: Apache-2.0
"""Operators `packed_linear` and `dequantize_packed`: a linear layer straight from 3- or 4-bit codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.pack import LAYOUT_CODES, SCALE_DTYPES, Layout, check_grid, check_words, choose
from discquant.ops.reference import pack as packing
from discquant.ops.reference import packed_linear as reference

Mode = Literal["auto", "a15", "a8", "fp32", "exact"]
MODES = ("auto", "a15", "a8", "fp32", "exact")
_CPU_MODES = {"a8": 0, "a15": 1, "fp32": 2}
# Instruction sets of the CPU kernels, worst first; -1 in the operator is the best that the processor has.
ISAS = ("scalar", "avx2", "avx512", "avx512vnni")
X_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tokens from which a GPU dequantises and calls cuBLAS; a guess from published kernels, not measured on a GPU.
CUBLAS_TOKENS = 129
# Tokens of the split kernel, whose sums do not depend on the batch.
SPLIT_TOKENS = 16
# Rows dequantised at a time in the exact mode: the scratch stays below this many weights.
_PANEL_WEIGHTS = 1 << 24

_GRID = "int out_features, int in_features, int num_bits, int group_size"


def _linear_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    out_features: int, in_features: int, num_bits: int, group_size: int, mode: int, isa: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _mma_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, workspace: Tensor,
    out_features: int, in_features: int, num_bits: int, group_size: int, exact: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _workspace_size_fake(words: Tensor, out_features: int, in_features: int) -> int:
    raise NotImplementedError(
        "packed_workspace_size: words must be on a GPU, not traced: call it outside the graph"
    )


def _triton_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    out_features: int, in_features: int, num_bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _triton_launch(*args: Any) -> Tensor:
    out: Tensor = registry.triton_module("packed_linear").packed_linear_fwd(*args)
    return out


def _dequantize_fake(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, out_features: int, in_features: int, num_bits: int,
    group_size: int, layout: int, row_begin: int, row_end: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return words.new_empty((row_end - row_begin, in_features), dtype=dtype)


def _stream_read_fake(t: Tensor) -> Tensor:
    return t.new_empty((1,), dtype=torch.int32)


_linear_op = registry.define(
    f"packed_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {_GRID}, "
    "int mode, int isa) -> Tensor",
    _linear_fake,
    None,
)
_dequantize_op = registry.define(
    f"dequantize_packed(Tensor words, Tensor scale, Tensor? zero_point, {_GRID}, int layout, "
    "int row_begin, int row_end, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    None,
)
# Tensor cores: up to 16 tokens split along K through the workspace, more without.
_mma_op = registry.define(
    "packed_linear_mma(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor(a!) workspace, "
    f"{_GRID}, bool exact) -> Tensor",
    _mma_fake,
    None,
)
_workspace_size_op = registry.define(
    "packed_workspace_size(Tensor words, int out_features, int in_features) -> int",
    _workspace_size_fake,
    None,
)
_triton_op = registry.define(
    f"packed_linear_triton(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {_GRID}) -> Tensor",
    _triton_fake,
    _triton_launch,
)
# Reads a tensor once as fast as loads go: the roof that the benchmark divides by.
_stream_read_op = registry.define("stream_read(Tensor t) -> Tensor", _stream_read_fake, None)


def _check_weight(
    op: str, words: Tensor, scale: Tensor, zero_point: Tensor | None, out_features: int, in_features: int,
    num_bits: int, group_size: int, layout: str,
) -> None:  # fmt: skip
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


def _cpp_problem(mode: str, layout: str, device: torch.device) -> str | None:
    if device.type == "cpu" and layout != "cpu" and mode != "exact":
        return f"layout {layout!r} on the CPU: repack to 'cpu'"
    if device.type != "cpu" and layout != "mma":
        return f"layout {layout!r} on {device.type}: repack to 'mma'"
    if device.type != "cpu" and mode not in ("auto", "exact"):
        return f"mode {mode!r} on {device.type}: it is for the CPU"
    return None


def _triton_problem(mode: str, layout: str) -> str | None:
    if layout != "mma":
        return f"layout {layout!r}: repack to 'mma'"
    return None if mode in ("auto", "exact") else f"mode {mode!r}: it is for the CPU"


# One workspace per device and stream, grown when a larger weight comes; calls on one stream follow one another.
_workspaces: dict[tuple[int, int], Tensor] = {}


def _workspace(words: Tensor, out_features: int, in_features: int) -> Tensor:
    size: int = _workspace_size_op(words, out_features, in_features)
    key = (words.device.index, torch.cuda.current_stream(words.device).cuda_stream)
    kept = _workspaces.get(key)
    if kept is None or kept.numel() < size:
        # Zero before the first use: it begins with counters that the kernel leaves at zero.
        kept = _workspaces[key] = torch.zeros(size, dtype=torch.int32, device=words.device)
    return kept


def _gpu(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int, exact: bool, batch_invariant: bool,
) -> Tensor:  # fmt: skip
    """Choose among the split kernel, the tiled one and dequantise + cuBLAS."""
    tokens = x.shape[0]
    # The tiled kernel, and `exact`, multiply by the scale in the dtype of x: exact only if the scale has it.
    rounded = exact or (tokens > SPLIT_TOKENS and not batch_invariant)
    dense = tokens >= CUBLAS_TOKENS and not batch_invariant
    if x.dtype == torch.float32 or dense or (rounded and scale.dtype != x.dtype):
        return _exact(
            x, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size, "mma"
        )
    columns = -(-in_features // 8) * 8
    if columns != in_features:
        x = torch.nn.functional.pad(x, (0, columns - in_features))
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if x.stride(0) != in_features or x.stride(1) != 1 else x.clone()
    workspace = _workspace(words, out_features, columns)
    grid = (out_features, columns, num_bits, group_size, exact)
    parts = x.split(SPLIT_TOKENS) if batch_invariant else (x,)
    ys = [_mma_op(part, words, scale, zero_point, bias, workspace, *grid) for part in parts]
    return torch.cat(ys) if len(ys) > 1 else ys[0]


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
    _check_weight(op, words, scale, zero_point, out_features, in_features, num_bits, group_size, layout)
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
    out: Tensor = _dequantize_op(
        words, scale, zero_point, out_features, in_features, num_bits, group_size, LAYOUT_CODES[layout],
        first, last, dtype,
    )  # fmt: skip
    return out


def _exact(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int, layout: Layout,
) -> Tensor:  # fmt: skip
    """Panels of rows: dequantise to the dtype of x, multiply with the library's own matmul."""
    step = max(16, _PANEL_WEIGHTS // in_features // 16 * 16)
    panels = []
    for first in range(0, out_features, step):
        last = min(first + step, out_features)
        weight = dequantize_packed(
            words, scale, zero_point, out_features=out_features, in_features=in_features, num_bits=num_bits,
            group_size=group_size, layout=layout, dtype=x.dtype, rows=(first, last), impl="cpp",
        )  # fmt: skip
        panels.append(torch.nn.functional.linear(x, weight, None if bias is None else bias[first:last]))
    return torch.cat(panels, dim=1) if len(panels) != 1 else panels[0]


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
            ordinary matmul). "auto" on a GPU is the tensor-core kernel.
        impl: "auto" | "reference" | "triton" | "cpp".
        batch_invariant: On a GPU use the split kernel for every number of tokens, so that a row's result does
            not depend on its batch. The CPU modes a15, a8 and fp32 are so always.
        isa: One of ISAS to force the CPU kernels of an instruction set; None is the best there is.

    Returns:
        dtype of x, [..., out_features].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: A buffer has the wrong size, dtype, stride or device; an option is unknown.
        NotImplementedError: The requested impl does not cover this mode or layout; a gradient is asked for.
        RuntimeError: The requested impl cannot run here.

    Note:
        a15 and a8 give the same bits on every instruction set, batch size and thread count; fp32 too.
        A NaN or infinity in x makes the outputs of its row NaN.
    """
    op = "packed_linear"
    registry.require_tensors(op, x=x, bias=bias)
    _check_weight(op, words, scale, zero_point, out_features, in_features, num_bits, group_size, layout)
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
    operator = op if x.device.type == "cpu" else "packed_linear_mma"
    cpp = _cpp_problem(mode, layout, x.device)
    chosen = choose(op, impl, x.device, operator, cpp=cpp, triton=_triton_problem(mode, layout))
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
        y = _gpu(
            rows, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size, mode == "exact",
            batch_invariant,
        )  # fmt: skip
    elif mode == "exact":
        y = _exact(
            rows, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size, layout
        )
    else:
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = _linear_op(
            rows, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size,
            _CPU_MODES["a15" if mode == "auto" else mode], -1 if isa is None else ISAS.index(isa),
        )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)
