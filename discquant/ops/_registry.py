# SPDX-License-Identifier: Apache-2.0
"""What all op files share: the dispatcher library, the choice of an implementation, the wording of errors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from discquant.ops.reference.settled import settled

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Floating as well: a zero may lie between codes.
ZERO_DTYPES = (torch.uint8, *FLOAT_DTYPES)
INDEX_DTYPES = (torch.int32, torch.int64)
Impl = Literal["auto", "reference", "triton", "cpp"]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # a finder may refuse
        return False


# Looked up once, at import: torch.compile cannot trace the search.
_HAS_TRITON = _installed("triton")

# One library object for the life of the process: dropping it would unregister the operators.
_LIBRARY = torch.library.Library("discquant", "FRAGMENT")


def _on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that runs on the device of its first tensor, which Triton would not look at."""

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        device = next(argument.device for argument in args if isinstance(argument, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launcher(*args)
        return launcher(*args)

    return run


def define(
    schema: str, fake: Callable[..., Any], launcher: Callable[..., Any] | None, keys: Sequence[str] = ("CPU", "CUDA")
) -> Callable[..., Any]:  # fmt: skip
    """Register one operator: its schema, its fake and, unless C++ owns it, its launcher on the devices of `keys`.

    The launcher runs with the device of its first tensor current and with autocast off.

    Returns:
        The handle `torch.ops.discquant.<name>.default`.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"discquant::{name}", fake, lib=_LIBRARY)
    if launcher is not None:
        for key in keys:
            _LIBRARY.impl(name, _on_device(settled(launcher)), key)
    handle: Callable[..., Any] = getattr(torch.ops.discquant, name).default
    return handle


def triton_module(stem: str) -> ModuleType:
    """Import discquant.triton_kernels.<stem>; Triton is loaded only here."""
    return importlib.import_module(f"discquant.triton_kernels.{stem}")


def triton_problem(device: torch.device) -> str | None:
    """Say why Triton kernels cannot run on tensors of `device`, or None if they can."""
    if not _HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors are on {device.type}: move them to a CUDA device, or set TRITON_INTERPRET=1 before importing"


def cpp_problem(device: torch.device, operator: str) -> str | None:
    """Say why the compiled extension cannot run `operator` on tensors of `device`, or None if it can."""
    if device.type != "cpu":
        return f"there is no C++ implementation for {device.type} tensors"
    return _missing(operator)


def _missing(operator: str) -> str | None:
    from discquant import _extension

    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"discquant::{operator}", "CPU"):
        # The check comes first because loading is slow the first time and never needed the second.
        reason = _extension.failure()
        if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"discquant::{operator}", "CPU"
        ):
            reason = f"the extension was built without {operator}; build it again"
        return reason
    return None


# torch.compile cannot trace a look at the dispatcher, and takes the answer for a constant. This is all that
# torch.compiler.assume_constant_result does, but for an import that takes seconds.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(
    op: str, impl: str, device: torch.device, *, triton: str | None = None, cpp: str | None = "not implemented in C++",
    cpp_operator: str = "",
) -> str:  # fmt: skip
    """Resolve `impl`; `triton` and `cpp` say why these arguments rule the implementation out, None if they do not.

    Order of `auto`: C++ on CPU tensors, Triton on CUDA tensors, each where it can run on these arguments; else the
    reference. The interpreter is never chosen by itself.

    Raises:
        ValueError: `impl` is not a known word.
        RuntimeError: An explicit implementation cannot run here.
        NotImplementedError: An explicit implementation does not cover these arguments.
    """
    if impl not in ("auto", "reference", "triton", "cpp"):
        raise ValueError(f"{op}: impl must be one of = 'auto', 'reference', 'triton', 'cpp', got {impl!r}")
    if impl == "auto":
        if device.type == "cpu":
            return "cpp" if cpp is None and cpp_problem(device, cpp_operator) is None else "reference"
        return "triton" if triton is None and triton_problem(device) is None else "reference"
    unsupported = {"triton": triton, "cpp": cpp}.get(impl)
    if unsupported is not None:
        raise NotImplementedError(f"{op}: impl must cover these arguments = {impl}, got {unsupported}")
    problem = None
    if impl != "reference":
        problem = triton_problem(device) if impl == "triton" else cpp_problem(device, cpp_operator)
    if problem is not None:
        raise RuntimeError(f"{op}: impl must be able to run here = {impl}, got {problem}")
    return impl


def differentiable(function: Any, *args: Any) -> Any:
    """function.apply(*args), which torch leaves untyped."""
    return function.apply(*args)


class _TwiceFunction(torch.autograd.Function):
    """A gradient as it is, whose own backward refuses."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        """`sources` are what the gradient depends on."""
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(f"{ctx.op}: order of the derivative must be at most = 1, got 2")


def once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a Function's backward: a second derivative raises NotImplementedError, where it would be wrong.

    torch's `once_differentiable` lets it pass where the incoming gradient is a constant: then a term would be missing.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                results = backward(ctx, *grads)
            # Compiled graphs have no second derivative, and torch says so itself.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return results
            sources = (*grads, *ctx.saved_tensors)
            return tuple(
                None if g is None else differentiable(_TwiceFunction, op, g.requires_grad_(), *sources)
                for g in results
            )

        return run

    return decorate


def require(condition: bool, op: str, argument: str, contract: str, expected: object, actual: object) -> None:
    """Raise ValueError in the format of all ops unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {contract} = {_show(expected)}, got {_show(actual)}")


def require_tensors(op: str, **arguments: object) -> None:
    """Raise TypeError for the first argument that is neither a Tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be of type = Tensor, got {type(value).__name__}")


def require_given(op: str, **arguments: object) -> None:
    """Raise TypeError for the first argument that is not a Tensor; None is not one either."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be of type = Tensor, got {type(value).__name__}")


def require_numbers(op: str, kind: type, **arguments: object) -> None:
    """Raise TypeError for the first argument that is no `kind`, float or int; a float may be given as an integer."""
    for name, value in arguments.items():
        known = isinstance(value, int) or (kind is float and isinstance(value, float))
        if not known or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be of type = {kind.__name__}, got {type(value).__name__}")


def require_constant(op: str, contract: str = "a constant", **arguments: Tensor | None) -> None:
    """Raise NotImplementedError for the first tensor of which a gradient is asked for."""
    for name, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{op}: {name} must be {contract} = requires_grad False, got True")


def require_apart(op: str, argument: str, matrix: Tensor) -> None:
    """Raise ValueError where elements of a matrix that is to be changed share an address: its threads would race."""
    if matrix.is_contiguous():
        return
    (rows, cols), (row, col) = matrix.shape, matrix.stride()
    by_row = row > col * (cols - 1) and (col > 0 or cols == 1)
    by_column = col > row * (rows - 1) and (row > 0 or rows == 1)
    require(
        by_row or by_column, op, argument, "hold each element at", "its own address", f"strides {[row, col]}"
    )


def require_separate(op: str, read: Mapping[str, Tensor | None], **changed: Tensor | None) -> None:
    """Raise ValueError where a matrix that is to be changed shares an address with another one, changed or only read.

    Views side by side do not.
    """
    # Addresses cannot be traced.
    if torch.compiler.is_compiling():
        return
    given, beside = (
        [(name, matrix) for name, matrix in group.items() if matrix is not None and matrix.numel()]
        for group in (changed, read)
    )
    pairs = itertools.chain(itertools.combinations(given, 2), itertools.product(given, beside))
    for (name, matrix), (other, second) in pairs:
        require(not _overlap(matrix, second), op, other, "share no address with", name, "one storage")


def _overlap(left: Tensor, right: Tensor) -> bool:
    """Whether a byte belongs to both matrices."""
    if left.untyped_storage()._cdata != right.untyped_storage()._cdata:
        return False
    # First byte, strides in bytes, byte after the last.
    views = []
    for tensor in (left, right):
        size = tensor.element_size()
        first, strides = tensor.storage_offset() * size, [stride * size for stride in tensor.stride()]
        reach = sum((count - 1) * stride for count, stride in zip(tensor.shape, strides, strict=True))
        views.append((first, strides, first + reach + size))
    (begin, _, end), (other_begin, _, other_end) = views
    if end <= other_begin or other_end <= begin:
        return False
    # Only views between one another's rows or columns come here: look at every byte.
    begin, end = min(begin, other_begin), max(end, other_end)
    taken = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    left_bytes, right_bytes = (
        taken.as_strided((*tensor.shape, tensor.element_size()), (*strides, 1), first - begin)
        for tensor, (first, strides, _) in zip((left, right), views, strict=True)
    )
    left_bytes.fill_(True)
    return bool(right_bytes.any())


def require_group_size(op: str, group_size: int) -> None:
    """Raise ValueError unless it is -1 or a positive integer."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    require(
        whole and (group_size == -1 or group_size > 0), op, "group_size", "be positive or", -1, group_size
    )


def require_device(op: str, first: Tensor, **arguments: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of `first`."""
    for name, value in arguments.items():
        if value is not None:
            require(value.device == first.device, op, name, "be on the device", first.device, value.device)


def require_dtype(op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless the tensor's dtype is allowed."""
    require(tensor.dtype in allowed, op, argument, "have a dtype of", list(allowed), tensor.dtype)


def require_grid(
    op: str, q_down: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    shape: Sequence[int], num_bits: int, group_size: int, minimum: Tensor | None = None, g_idx: Tensor | None = None,
) -> None:  # fmt: skip
    """Check the tensors that describe a grid for a weight of `shape` = [out_features, in_features].

    The entries of `g_idx` are not looked at: on a GPU that would wait for it.
    """
    require(
        isinstance(num_bits, int) and 2 <= num_bits <= 8, op, "num_bits", "be an integer in", "2..8", num_bits
    )
    require_group_size(op, group_size)
    require_codes(op, q_down, shape, num_bits)
    if g_idx is None:
        require_groups(op, scale, "scale", shape, group_size)
    else:
        named = scale.dim() == 2 and scale.shape[0] == shape[0] and scale.shape[1] > 0
        expected = [shape[0], "at least 1"]
        require(named, op, "scale", "with g_idx have shape [out_features, num_groups]", expected, scale.shape)
        require(g_idx.shape == (shape[1],), op, "g_idx", "have shape", [shape[1]], g_idx.shape)
        require_dtype(op, "g_idx", g_idx, INDEX_DTYPES)
    require_dtype(op, "scale", scale, FLOAT_DTYPES)
    for name, offset, dtypes in (
        ("zero_point", zero_point, ZERO_DTYPES),
        ("minimum", minimum, FLOAT_DTYPES),
    ):
        if offset is not None:
            require(
                offset.shape == scale.shape, op, name, "have the shape of scale", scale.shape, offset.shape
            )
            require_dtype(op, name, offset, dtypes)
    if minimum is not None:
        require(zero_point is None, op, "zero_point", "with a minimum be", None, "a Tensor")
        require(table is None, op, "table", "with a minimum be", None, "a Tensor")
    if table is not None:
        require(table.shape == (2**num_bits,), op, "table", "have shape", [2**num_bits], table.shape)
        require(zero_point is None, op, "zero_point", "with a table be", None, "a Tensor")
        require_dtype(op, "table", table, FLOAT_DTYPES)
    require_device(op, q_down, scale=scale, zero_point=zero_point, table=table, minimum=minimum, g_idx=g_idx)


def require_codes(op: str, q_down: Tensor, shape: Sequence[int], num_bits: int) -> None:
    """Check codes, one or two per byte, for a weight of `shape`."""
    rows, cols = shape
    require_dtype(op, "q_down", q_down, (torch.uint8,))
    widths = [cols, (cols + 1) // 2]
    require(
        q_down.dim() == 2 and q_down.shape[0] == rows and q_down.shape[1] in widths,
        op, "q_down", "be [out_features, in_features] or two codes per byte", [rows, widths], q_down.shape,
    )  # fmt: skip
    if q_down.shape[1] != cols:
        require(num_bits <= 4, op, "num_bits", "with two codes per byte be at most", 4, num_bits)


def require_groups(op: str, per_group: Tensor, name: str, shape: Sequence[int], group_size: int) -> None:
    """Check a [out_features, num_groups] tensor."""
    rows, cols = shape
    groups = 1 if group_size == -1 else max(1, -(-cols // group_size))
    require(
        per_group.shape == (rows, groups),
        op,
        name,
        "have shape [out_features, num_groups]",
        [rows, groups],
        per_group.shape,
    )


def _show(value: object) -> object:
    return list(value) if isinstance(value, torch.Size) else value
