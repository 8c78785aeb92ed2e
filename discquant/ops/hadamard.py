# SPDX-License-Identifier: Apache-2.0
"""Operator `hadamard`: randomized Hadamard rotation along the last dimension, with its inverse; orthogonal."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.hadamard_tables import CPU, factor, hadamard_matrix
from discquant.ops.reference import hadamard as reference

_OP = "hadamard"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A run of the Triton kernel changes hands through shared memory: so much every GPU has. And a program holds a column of
# all runs.
_RUN_BYTES = 65536
_MAX_RUNS = 2048


def _matrix(size: int, device: torch.device) -> Tensor:
    factors = factor(size)
    assert factors is not None
    matrix = hadamard_matrix(factors[0])
    assert matrix is not None
    return matrix.to(device)


def _runs(x: Tensor) -> int:
    """Runs that the Triton kernel makes of the last dimension: K, times what is too long of the power of two."""
    factors = factor(x.shape[-1])
    assert factors is not None
    return x.shape[-1] // min(factors[1], _RUN_BYTES // (8 if x.dtype == torch.float64 else 4))


@functools.lru_cache(maxsize=64)
def _mixing_matrix(size: int, runs: int, device: torch.device) -> Tensor:
    """[runs, runs] matrix across the kernel's runs, kept: a copy from the host at every launch would stop the stream.

    Where a run is shorter than the power of two, Sylvester's matrix is a Kronecker product of smaller ones: the first
    goes to the matrix across runs. Made on the CPU, so that the copy is done before any stream reads it, and by the
    launcher alone: below every mode whose tensors must not be kept.
    """
    matrix = _matrix(size, CPU)
    rest = runs // matrix.shape[0]
    if rest > 1:
        matrix = torch.kron(matrix, reference.sylvester(torch.eye(rest, dtype=torch.int8, device=CPU)))
    return matrix.to(device)


def _fake(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    matrix = _mixing_matrix(x.shape[-1], _runs(x), x.device)
    out: Tensor = registry.triton_module("hadamard").hadamard_fwd(flat, signs, matrix, inverse)
    return out.reshape(x.shape)


_op = registry.define("hadamard(Tensor x, Tensor? signs, bool inverse) -> Tensor", _fake, _launch)


class HadamardFunction(torch.autograd.Function):
    """The rotation is orthogonal: its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor | None, inverse: bool, use_triton: bool) -> Tensor:
        """Rotate."""
        ctx.save_for_backward(signs)
        ctx.constants = (inverse, use_triton)
        if use_triton:
            out: Tensor = _op(x, signs, inverse)
            return out
        return reference.hadamard(x, signs, _matrix(x.shape[-1], x.device), inverse).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Rotate the other way, by this Function: right for derivatives of every order."""
        (signs,) = ctx.saved_tensors
        inverse, use_triton = ctx.constants
        nothing = (None, None, None)
        if not ctx.needs_input_grad[0]:
            return (None, *nothing)
        return (registry.differentiable(HadamardFunction, grads[0], signs, not inverse, use_triton), *nothing)


def hadamard(x: Tensor, signs: Tensor | None = None, *, inverse: bool = False, impl: str = "auto") -> Tensor:
    """y = H (signs * x) / sqrt(n) along the last dimension; the inverse is signs * (H^T y) / sqrt(n).

    Args:
        x: Floating, [..., n]; n = K * 2^m with K from `hadamard_tables` (1, 12, 20, 28, 36, 52, 92, 108, 172, ...).
        signs: +1 or -1 each, int8 or floating, [n]; stored with what was rotated. None is all +1.
        inverse: Undo the rotation by the same signs.
        impl: "auto" | "reference" | "triton".

    Returns:
        Rotated tensor, same shape and dtype, contiguous; norms along the last dimension are kept.

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shape, dtype or device of an argument is wrong, or no matrix of size n is known.
        NotImplementedError: A gradient of signs is asked for; impl="cpp", or impl="triton" with over 2048 runs of up to
            16384 values (8192 in float64).
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Differentiable in x, any number of times. Computed in float32 (float64 for float64), rounded
        once at the end.

    Source:
        Randomized Hadamard transform; matrices by Sylvester, Paley and Williamson.
    """
    registry.require_given(_OP, x=x)
    registry.require_tensors(_OP, signs=signs)
    registry.require_dtype(_OP, "x", x, _DTYPES)
    registry.require(x.dim() >= 1, _OP, "x", "have at least dimensions", 1, x.dim())
    factors = factor(x.shape[-1])
    registry.require(
        factors is not None, _OP, "x", "have a last dimension with a known matrix", "K * 2^m", x.shape
    )
    if signs is not None:
        registry.require(
            signs.shape == x.shape[-1:], _OP, "signs", "have shape", list(x.shape[-1:]), signs.shape
        )
        registry.require_dtype(_OP, "signs", signs, (torch.int8, *_DTYPES))
        registry.require_device(_OP, x, signs=signs)
        registry.require_constant(_OP, signs=signs)
    unsupported = f"{_runs(x)} runs" if _runs(x) > _MAX_RUNS else None
    use_triton = registry.choose(_OP, impl, x.device, triton=unsupported) == "triton"
    out: Tensor = registry.differentiable(HadamardFunction, x, signs, inverse, use_triton)
    return out
