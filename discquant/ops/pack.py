# SPDX-License-Identifier: Apache-2.0
"""Operators `pack`, `unpack`, `repack`: codes to and from the runtime layouts and the dense stream."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.reference import pack as reference

Layout = Literal["mma", "cpu"]
# Version of both runtime layouts; csrc/packed/layout.h has the same number, and a test compares them.
LAYOUT_VERSION = 1
LAYOUT_CODES: dict[Layout, int] = {"mma": 1, "cpu": 2}
BLOCK_ROWS = (
    reference.BLOCK_ROWS
)  # a whole number of these is one contiguous run of words, scales and zero points
SCALE_ROWS = reference.SCALE_ROWS  # rows whose scales lie side by side, by layout
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _pack_fake(q: Tensor, zero_point: Tensor | None, num_bits: int, group_size: int, layout: int) -> Tensor:
    return q.new_empty((reference.word_count(q.shape[0], q.shape[1], num_bits),), dtype=torch.int32)


def _unpack_fake(words: Tensor, out_features: int, in_features: int, num_bits: int, layout: int) -> Tensor:
    return words.new_empty((out_features, in_features), dtype=torch.uint8)


def _repack_fake(
    words: Tensor, out_features: int, in_features: int, num_bits: int, layout: int, new_layout: int
) -> Tensor:
    return torch.empty_like(words)


def _pack_dense_fake(q: Tensor, num_bits: int) -> Tensor:
    return q.new_empty((q.shape[0], (q.shape[1] * num_bits + 31) // 32), dtype=torch.int32)


def _unpack_dense_fake(words: Tensor, count: int, num_bits: int) -> Tensor:
    return words.new_empty((words.shape[0], count), dtype=torch.uint8)


# C++ owns these on the CPU (csrc/packed/register_cpu.cpp) and, in a CUDA build, on the GPU.
_pack_op = registry.define(
    "pack(Tensor q, Tensor? zero_point, int num_bits, int group_size, int layout) -> Tensor", _pack_fake, None
)
_unpack_op = registry.define(
    "unpack(Tensor words, int out_features, int in_features, int num_bits, int layout) -> Tensor",
    _unpack_fake,
    None,
)
_repack_op = registry.define(
    "repack(Tensor words, int out_features, int in_features, int num_bits, int layout, int new_layout) -> Tensor",
    _repack_fake,
    None,
)
_pack_dense_op = registry.define("pack_dense(Tensor q, int num_bits) -> Tensor", _pack_dense_fake, None)
_unpack_dense_op = registry.define(
    "unpack_dense(Tensor words, int count, int num_bits) -> Tensor", _unpack_dense_fake, None
)


def _require_int(op: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        registry.require(whole and value < 2**31, op, name, "be an int below", 2**31, value)


def check_grid(op: str, num_bits: int, group_size: int, layout: str) -> None:
    """Validate what all packed ops share."""
    _require_int(op, num_bits=num_bits, group_size=group_size)
    registry.require(num_bits in (3, 4), op, "num_bits", "be one of", [3, 4], num_bits)
    known = group_size in (-1, 32, 64) or (group_size > 0 and group_size % 128 == 0)
    registry.require(known, op, "group_size", "be 32, 64, a multiple of 128 or", -1, group_size)
    registry.require(layout in LAYOUT_CODES, op, "layout", "be one of", list(LAYOUT_CODES), layout)


def check_words(op: str, words: Tensor, out_features: int, in_features: int, num_bits: int) -> None:
    """Validate the size of a packed buffer: neither truncated nor overlong."""
    _require_int(op, out_features=out_features, in_features=in_features)
    registry.require(out_features >= 0, op, "out_features", "be at least", 0, out_features)
    registry.require(in_features >= 1, op, "in_features", "be at least", 1, in_features)
    registry.require_dtype(op, "words", words, (torch.int32,))
    expected = [reference.word_count(out_features, in_features, num_bits)]
    registry.require(list(words.shape) == expected, op, "words", "have shape", expected, words.shape)
    registry.require(words.is_contiguous(), op, "words", "have stride", [1], list(words.stride()))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cpp_problem(device: torch.device, operator: str) -> str | None:
    """Say why the compiled extension cannot run `operator` on tensors of `device`, or None if it can."""
    from discquant import _extension

    reason = _extension.failure()
    if reason is not None:
        return reason
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"discquant::{operator}", key):
        return f"the extension was built without {operator} for {device.type} tensors"
    if device.type == "cuda" and _extension.cuda_code(*_capability(device)) is None:
        return f"the extension holds nothing for compute capability {'.'.join(map(str, _capability(device)))}"
    return None


# As in _registry: loading cannot be traced, and torch.compile takes the answer for a constant.
cpp_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(
    op: str, impl: str, device: torch.device, operator: str, *, cpp: str | None = None,
    triton: str | None = "not implemented in Triton", reference: str | None = None,
) -> str:  # fmt: skip
    """Resolve `impl`; `auto` is C++ or CUDA where it covers the arguments and can run, then Triton, then the reference.

    `cpp`, `triton` and `reference` say why these arguments rule the implementation out, None if they do not.

    Raises:
        ValueError: `impl` is not a known word.
        RuntimeError: An explicit implementation cannot run here.
        NotImplementedError: An explicit implementation, or with `auto` every one, does not cover these arguments.
    """
    words = ("auto", "reference", "triton", "cpp")
    registry.require(impl in words, op, "impl", "be one of", list(words), impl)
    if impl == "auto":
        here = cpp_problem(device, operator) if cpp is None else cpp
        if here is None:
            return "cpp"
        if device.type == "cuda" and triton is None and registry.triton_problem(device) is None:
            return "triton"
        if reference is None:
            return "reference"
        raise NotImplementedError(
            f"{op}: an implementation must cover these arguments = cpp or reference, got cpp: {here}; "
            f"reference: {reference}"
        )
    unsupported = {"triton": triton, "cpp": cpp, "reference": reference}.get(impl)
    if unsupported is not None:
        raise NotImplementedError(f"{op}: impl must cover these arguments = {impl}, got {unsupported}")
    problem = None
    if impl != "reference":
        problem = cpp_problem(device, operator) if impl == "cpp" else registry.triton_problem(device)
    if problem is not None:
        raise RuntimeError(f"{op}: impl must be able to run here = {impl}, got {problem}")
    return impl


def pack(
    q: Tensor,
    zero_point: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int,
    layout: Layout,
    impl: str = "auto",
) -> Tensor:
    """Pack codes into a runtime layout, padded to 64 rows and 128 columns with the code of weight zero.

    Args:
        q: Codes below 2 ** num_bits, uint8, [out_features, in_features].
        zero_point: Codes of weight zero, uint8, [out_features, num_groups]; None is 2 ** (num_bits - 1).
        num_bits: 3 or 4.
        group_size: Columns that share a zero point: 32, 64, a multiple of 128, or -1 for the row.
        layout: "mma" (tensor cores) or "cpu" (byte dot products); docs/packed_layout.md.
        impl: "auto" | "reference" | "cpp".

    Returns:
        Words, int32, [padded rows * padded columns * num_bits / 32].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shape, dtype, device or option is wrong, or a code does not fit.
        RuntimeError: The requested impl cannot run here.
    """
    op = "pack"
    registry.require_tensors(op, q=q, zero_point=zero_point)
    check_grid(op, num_bits, group_size, layout)
    registry.require_dtype(op, "q", q, (torch.uint8,))
    registry.require(
        q.dim() == 2 and q.shape[1] > 0, op, "q", "have shape", "[out_features, in_features > 0]", q.shape
    )
    limit = 1 << num_bits
    if q.numel():
        registry.require(int(q.max()) < limit, op, "q", "be below 2 ** num_bits", limit, int(q.max()))
    if zero_point is not None:
        registry.require_dtype(op, "zero_point", zero_point, (torch.uint8,))
        registry.require_groups(op, zero_point, "zero_point", q.shape, group_size)
        registry.require_device(op, q, zero_point=zero_point)
        top = int(zero_point.max()) if zero_point.numel() else 0
        registry.require(top < limit, op, "zero_point", "be below 2 ** num_bits", limit, top)
    if choose(op, impl, q.device, op) == "reference":
        return reference.pack(q, zero_point, num_bits=num_bits, group_size=group_size, layout=layout)
    zero = None if zero_point is None else zero_point.contiguous()
    out: Tensor = _pack_op(q.contiguous(), zero, num_bits, group_size, LAYOUT_CODES[layout])
    return out


def unpack(
    words: Tensor, *, out_features: int, in_features: int, num_bits: int, layout: Layout, impl: str = "auto"
) -> Tensor:
    """Read codes back from a runtime layout.

    Args:
        words: Packed codes, int32, one dimension, exactly as long as the sizes say.
        out_features: Logical rows.
        in_features: Logical columns.
        num_bits: 3 or 4.
        layout: The layout of `words`.
        impl: "auto" | "reference" | "cpp".

    Returns:
        Codes, uint8, [out_features, in_features].

    Raises:
        TypeError: words is not a Tensor.
        ValueError: The buffer is truncated, overlong, strided or of another dtype; an option is unknown.
        RuntimeError: The requested impl cannot run here.
    """
    op = "unpack"
    registry.require_tensors(op, words=words)
    check_grid(op, num_bits, -1, layout)
    check_words(op, words, out_features, in_features, num_bits)
    if choose(op, impl, words.device, op) == "reference":
        return reference.unpack(
            words, out_features=out_features, in_features=in_features, num_bits=num_bits, layout=layout
        )
    out: Tensor = _unpack_op(words, out_features, in_features, num_bits, LAYOUT_CODES[layout])
    return out


def repack(
    words: Tensor, *, out_features: int, in_features: int, num_bits: int, layout: Layout, new_layout: Layout,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Move packed codes from one runtime layout to the other, padding included.

    Args:
        words: Packed codes, int32.
        out_features: Logical rows.
        in_features: Logical columns.
        num_bits: 3 or 4.
        layout: The layout of `words`.
        new_layout: The layout of the result.
        impl: "auto" | "reference" | "cpp".

    Returns:
        Words, int32, the same length.

    Raises:
        TypeError: words is not a Tensor.
        ValueError: The buffer or an option is wrong.
        RuntimeError: The requested impl cannot run here.
    """
    op = "repack"
    registry.require_tensors(op, words=words)
    check_grid(op, num_bits, -1, layout)
    check_grid(op, num_bits, -1, new_layout)
    check_words(op, words, out_features, in_features, num_bits)
    if choose(op, impl, words.device, op) == "reference":
        rows, columns = reference.padded_shape(out_features, in_features)
        codes = reference.unpack(
            words, out_features=rows, in_features=columns, num_bits=num_bits, layout=layout
        )
        return reference.pack(codes, None, num_bits=num_bits, group_size=-1, layout=new_layout)
    codes_in, codes_out = LAYOUT_CODES[layout], LAYOUT_CODES[new_layout]
    out: Tensor = _repack_op(words, out_features, in_features, num_bits, codes_in, codes_out)
    return out


def pack_dense(q: Tensor, *, num_bits: int, impl: str = "auto") -> Tensor:
    """Pack each row as a dense stream D_b, the interchange form of GPTQ, compressed-tensors, AutoRound and MLX.

    Args:
        q: Codes below 2 ** num_bits, uint8, [rows, count].
        num_bits: 1 to 8.
        impl: "auto" | "reference" | "cpp".

    Returns:
        Words, int32, [rows, ceil(count * num_bits / 32)].

    Raises:
        TypeError: q is not a Tensor.
        ValueError: Shape, dtype or width is wrong, or a code does not fit.
        RuntimeError: The requested impl cannot run here.
    """
    op = "pack_dense"
    registry.require_tensors(op, q=q)
    registry.require(num_bits in range(1, 9), op, "num_bits", "be in", "1..8", num_bits)
    registry.require_dtype(op, "q", q, (torch.uint8,))
    registry.require(q.dim() == 2, op, "q", "have shape", "[rows, count]", q.shape)
    if q.numel():
        registry.require(
            int(q.max()) < 1 << num_bits, op, "q", "be below 2 ** num_bits", 1 << num_bits, int(q.max())
        )
    if choose(op, impl, q.device, op) == "reference":
        return reference.pack_dense(q, num_bits)
    out: Tensor = _pack_dense_op(q.contiguous(), num_bits)
    return out


def unpack_dense(words: Tensor, *, count: int, num_bits: int, impl: str = "auto") -> Tensor:
    """Read rows of a dense stream D_b.

    Args:
        words: int32, [rows, ceil(count * num_bits / 32)].
        count: Codes of a row.
        num_bits: 1 to 8.
        impl: "auto" | "reference" | "cpp".

    Returns:
        Codes, uint8, [rows, count].

    Raises:
        TypeError: words is not a Tensor.
        ValueError: The buffer is truncated or overlong, or of another dtype; a number is out of range.
        RuntimeError: The requested impl cannot run here.
    """
    op = "unpack_dense"
    registry.require_tensors(op, words=words)
    registry.require(num_bits in range(1, 9), op, "num_bits", "be in", "1..8", num_bits)
    registry.require(count >= 0, op, "count", "be at least", 0, count)
    registry.require_dtype(op, "words", words, (torch.int32,))
    width = (count * num_bits + 31) // 32
    fits = words.dim() == 2 and words.shape[1] == width
    registry.require(fits, op, "words", "have shape", f"[rows, {width}]", words.shape)
    if choose(op, impl, words.device, op) == "reference":
        return reference.unpack_dense(words, count=count, num_bits=num_bits)
    out: Tensor = _unpack_dense_op(words.contiguous(), count, num_bits)
    return out


def pack_groups(per_group: Tensor, *, layout: Layout) -> Tensor:
    """Put scales or zero points in the kernels' order, rows padded with zeros.

    Args:
        per_group: Scale (floating) or zero point (uint8), [out_features, num_groups].
        layout: "mma" (R = 64 rows side by side) or "cpu" (R = 32).

    Returns:
        Same dtype, [padded rows / R, num_groups, R], contiguous.

    Raises:
        TypeError: per_group is not a Tensor.
        ValueError: Wrong shape or dtype, a scale is not finite, the layout is unknown.
    """
    op = "pack_groups"
    registry.require_tensors(op, per_group=per_group)
    registry.require(layout in LAYOUT_CODES, op, "layout", "be one of", list(LAYOUT_CODES), layout)
    registry.require(per_group.dim() == 2, op, "per_group", "have shape", "[rows, groups]", per_group.shape)
    registry.require_dtype(op, "per_group", per_group, (*SCALE_DTYPES, torch.uint8))
    if per_group.is_floating_point():
        finite = bool(torch.isfinite(per_group).all())
        registry.require(finite, op, "per_group", "be", "finite", "NaN or infinity")
    return reference.pack_groups(per_group, layout)


def unpack_groups(packed: Tensor, *, out_features: int) -> Tensor:
    """Inverse of `pack_groups`.

    Args:
        packed: [padded rows / R, num_groups, R].
        out_features: Logical rows.

    Returns:
        [out_features, num_groups].

    Raises:
        TypeError: packed is not a Tensor.
        ValueError: It has not three dimensions or too few rows.
    """
    op = "unpack_groups"
    registry.require_tensors(op, packed=packed)
    fits = packed.dim() == 3 and packed.shape[0] * packed.shape[2] >= out_features
    registry.require(
        fits, op, "packed", "have shape", f"[B, groups, R] with B * R >= {out_features}", packed.shape
    )
    return reference.unpack_groups(packed, out_features)
