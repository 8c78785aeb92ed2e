# SPDX-License-Identifier: Apache-2.0
"""Operator `linear_kl`: KL divergence of two next-token distributions behind one frozen head, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops.reference import linear_kl as reference
from discquant.ops.reference.linear_kl import LinearKLResult
from discquant.ops.reference.soft_weight import accumulate_dtype

_OP = "linear_kl"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _fake(student: Tensor, teacher: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if torch.float64 in (student.dtype, weight.dtype) else torch.float32
    return (
        student.new_empty((), dtype=acc),
        student.new_empty(student.shape[0], dtype=acc),
        torch.empty_like(
            student, dtype=reference.gradient_dtype(student), memory_format=torch.contiguous_format
        ),
    )


def _launch(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = registry.triton_module("linear_kl").linear_kl_fwd(*args)
    return out


_op = registry.define(
    "linear_kl(Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor? mask, float? normalizer, "
    "float logit_scale, float? softcap, int chunk_size) -> (Tensor, Tensor, Tensor)",
    _fake,
    _launch,
)


class LinearKLFunction(torch.autograd.Function):
    """The loss is differentiable in `student`; its gradient was computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
        normalizer: float | None, logit_scale: float, softcap: float | None, chunk_size: int, use_triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Compute loss, per-token KL and gradient."""
        loss, per_token, grad = run(
            student, teacher, weight, bias, mask, normalizer, logit_scale, softcap, chunk_size, use_triton
        )
        # The student for `once` alone: its second derivative is what the gradient lacks.
        ctx.save_for_backward(grad, student)
        ctx.dtype = student.dtype
        ctx.mark_non_differentiable(per_token, grad)
        return loss, per_token, grad

    @staticmethod
    @registry.once(_OP)
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient."""
        grad, _ = ctx.saved_tensors
        return ((grads[0] * grad).to(ctx.dtype) if ctx.needs_input_grad[0] else None, *(None,) * 9)


def run(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    normalizer: float | None, logit_scale: float, softcap: float | None, chunk_size: int, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the operator or the reference."""
    if use_triton:
        out: tuple[Tensor, Tensor, Tensor] = _op(
            student, teacher, weight, bias, mask, normalizer, logit_scale, softcap, chunk_size
        )
        return out
    return reference.linear_kl(
        student, teacher, weight, bias=bias, mask=mask, normalizer=normalizer, logit_scale=logit_scale,
        softcap=softcap, chunk_size=chunk_size,
    )  # fmt: skip


def _check(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    normalizer: float | None, logit_scale: float, softcap: float | None, chunk_size: int,
) -> None:  # fmt: skip
    registry.require_given(_OP, student=student, teacher=teacher, weight=weight)
    registry.require_tensors(_OP, bias=bias, mask=mask)
    registry.require(
        student.dim() == 2, _OP, "student", "have shape", "[num_tokens, hidden_size]", student.shape
    )
    registry.require_dtype(_OP, "student", student, _DTYPES)
    registry.require_dtype(_OP, "weight", weight, _DTYPES)
    registry.require(
        teacher.shape == student.shape,
        _OP,
        "teacher",
        "have the shape of student",
        student.shape,
        teacher.shape,
    )
    registry.require(
        teacher.dtype == student.dtype,
        _OP,
        "teacher",
        "have the dtype of student",
        student.dtype,
        teacher.dtype,
    )
    registry.require(
        weight.dim() == 2 and weight.shape[1] == student.shape[1],
        _OP, "weight", "have shape [vocab_size, hidden_size]", ["vocab_size", student.shape[1]], weight.shape,
    )  # fmt: skip
    registry.require(weight.shape[0] > 0, _OP, "weight", "have vocab_size at least", 1, weight.shape[0])
    if bias is not None:
        registry.require(
            bias.shape == weight.shape[:1], _OP, "bias", "have shape", list(weight.shape[:1]), bias.shape
        )
        registry.require_dtype(_OP, "bias", bias, _DTYPES)
    if mask is not None:
        registry.require(
            mask.shape == student.shape[:1], _OP, "mask", "have shape", list(student.shape[:1]), mask.shape
        )
        registry.require_dtype(_OP, "mask", mask, (torch.bool,))
    whole = isinstance(chunk_size, int) and chunk_size >= 1
    registry.require(whole, _OP, "chunk_size", "be an integer of at least", 1, chunk_size)
    _check_scalars(accumulate_dtype(student, weight), normalizer, logit_scale, softcap)
    registry.require_device(_OP, student, teacher=teacher, weight=weight, bias=bias, mask=mask)
    registry.require_constant(_OP, "frozen", teacher=teacher, weight=weight, bias=bias)


def _check_scalars(
    dtype: torch.dtype, normalizer: float | None, logit_scale: float, softcap: float | None
) -> None:
    """Each scalar, and what is divided by it, must be a number of the dtype that is computed in."""
    limits = torch.finfo(dtype)
    registry.require_numbers(_OP, float, logit_scale=logit_scale)
    registry.require(
        abs(logit_scale) <= limits.max, _OP, "logit_scale", f"in {dtype} be", "finite", logit_scale
    )
    if normalizer is not None:
        registry.require_numbers(_OP, float, normalizer=normalizer)
        fits = normalizer == 0 or limits.tiny <= normalizer <= limits.max
        expected = f"in {dtype} be finite, as its inverse, and at least"
        registry.require(fits, _OP, "normalizer", expected, 0, normalizer)
    if softcap is not None:
        registry.require_numbers(_OP, float, softcap=softcap)
        fits = limits.tiny <= softcap <= limits.max and abs(logit_scale) / softcap <= limits.max
        expected = f"in {dtype} be None or finite, as logit_scale / softcap, and above"
        registry.require(fits, _OP, "softcap", expected, 0, softcap)


def linear_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 1024,
    impl: str = "auto",
) -> LinearKLResult:
    """Forward KL from teacher to student through a shared head, with its gradient, in chunks of tokens.

    z = cap(logit_scale * (h @ weight^T + bias)); p = softmax(z_teacher), q = softmax(z_student);
    per_token = sum_v p_v (log p_v - log q_v);  loss = sum_t mask_t per_token_t / normalizer;
    grad_student = mask / normalizer * ((q - p) * dz) @ weight.
    Logits are float32 (float64 for float64 input) and never exist for more than `chunk_size` tokens.

    Args:
        student: Last hidden state of the student after the final norm, floating, [num_tokens, hidden_size].
        teacher: The same of the teacher, same shape and dtype.
        weight: Frozen head, floating, [vocab_size, hidden_size].
        bias: Head bias, floating, [vocab_size].
        mask: True where a token counts, bool, [num_tokens]; None counts all.
        normalizer: Divisor of the sum, number of tokens that count in the whole step; None takes this call's;
            0 is taken for 1.
        logit_scale: Factor on the logits, unitless.
        softcap: Gemma's cap: z = softcap * tanh(z / softcap); None for no cap.
        chunk_size: Tokens per chunk; Triton takes fewer where the chunk would need more than 1.1 GB.
        impl: "auto" | "reference" | "triton".

    Returns:
        LinearKLResult; per_token and loss in float32 (float64), grad_student in student.dtype, but in float32
        for float16, whose range it would leave; masked tokens have per_token 0 and gradient 0. The loss is
        differentiable in `student`, once.

    Raises:
        TypeError: An argument is not a Tensor, or a scalar no number.
        ValueError: Shapes, dtypes or devices disagree, or a scalar, or what is divided by it, leaves the range of the
            dtype that is computed in.
        NotImplementedError: A gradient of teacher, weight or bias, or a second derivative, is asked for, or impl="cpp".
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. The softmax differences are taken in float32: bfloat16 logits drown the gradient at
        small KL. No step waits for the device. On CUDA products of float32 operands follow
        `torch.set_float32_matmul_precision`, a switch of the process: below "highest" they are TF32's.

    Source:
        DiscQuant, arXiv 2501.06417, objective; log-sum-exp as usual.
    """
    _check(student, teacher, weight, bias, mask, normalizer, logit_scale, softcap, chunk_size)
    use_triton = registry.choose(_OP, impl, student.device) == "triton"
    args = (student, teacher, weight, bias, mask, normalizer, logit_scale, softcap, chunk_size, use_triton)
    if student.requires_grad and torch.is_grad_enabled():
        return LinearKLResult(*registry.differentiable(LinearKLFunction, *args))
    with torch.no_grad():
        return LinearKLResult(*run(*args))
