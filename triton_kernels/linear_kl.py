# SPDX-License-Identifier: Apache-2.0
"""KL divergence behind a frozen head, in chunks of tokens: matmul, one pass for two log-sum-exps, one for KL and d.

Per chunk of C tokens: z = h W^T by cuBLAS with float32 output; one program per token reads both rows of z twice and
writes q - p in the matmul's dtype; one matmul brings it back to the hidden state. 10 C V bytes of scratch in all
(two float32 logits, one 16-bit difference), never tokens x vocabulary; the head's gradient is never computed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import DTYPES, cast

# Upper bound of the scratch: a smaller chunk is taken where `chunk_size` tokens would need more.
SCRATCH_BYTES = 1_100_000_000


@triton.jit
def _cap(raw, bias, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr):
    """Scaled and soft-capped logit and its slope by the raw one; tanh through exp, without libdevice."""
    shifted = raw + bias
    if SOFTCAP == 0.0:
        return shifted * LOGIT_SCALE, tl.full(shifted.shape, LOGIT_SCALE, shifted.dtype)
    else:
        inner = shifted * (LOGIT_SCALE / SOFTCAP)
        decay = tl.exp(-2.0 * tl.abs(inner))
        size = (1.0 - decay) / (1.0 + decay)
        # Near zero the difference cancels: five terms of the series, exact to the last bits below NEAR.
        t = inner * inner
        terms = 0.13333333333333333 + t * (-0.053968253968253968 + t * 0.021869488536155203)
        series = inner * (1.0 + t * (-0.33333333333333333 + t * terms))
        squashed = tl.where(tl.abs(inner) < NEAR, series, tl.where(inner < 0.0, -size, size))
        return squashed * SOFTCAP, LOGIT_SCALE * (1.0 - squashed * squashed)


@triton.jit
def _online(largest, total, value):
    """Next (maximum, sum of exponentials over it), elementwise; an element that has seen only -inf has sum 0."""
    larger = tl.maximum(largest, value)
    origin = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, total * tl.exp(largest - origin) + tl.exp(value - origin)


@triton.jit
def _linear_kl_fwd_kernel(
    kl_ptr, diff_ptr, student_ptr, teacher_ptr, bias_ptr, mask_ptr,
    vocab_size, stride_z, stride_d,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, NEAR: tl.constexpr, UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    ACC: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if HAS_MASK:
        counted = tl.load(mask_ptr + row) != 0
    # Every lane keeps its own maximum and sum: one reduction across the block at the end instead of one per tile.
    lane_max_s = tl.full((BLOCK_V,), float("-inf"), ACC)
    lane_max_t = lane_max_s
    sum_s = tl.zeros((BLOCK_V,), ACC)
    sum_t = tl.zeros((BLOCK_V,), ACC)
    for start in range(0, vocab_size, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        inside = (offs < vocab_size) & counted
        bias = tl.zeros((BLOCK_V,), ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs, mask=inside, other=0).to(ACC)
        z_s, _ = _cap(
            tl.load(student_ptr + row * stride_z + offs, mask=inside, other=0),
            bias,
            LOGIT_SCALE,
            SOFTCAP,
            NEAR,
        )
        z_t, _ = _cap(
            tl.load(teacher_ptr + row * stride_z + offs, mask=inside, other=0),
            bias,
            LOGIT_SCALE,
            SOFTCAP,
            NEAR,
        )
        z_s = tl.where(offs < vocab_size, z_s, float("-inf"))
        z_t = tl.where(offs < vocab_size, z_t, float("-inf"))
        lane_max_s, sum_s = _online(lane_max_s, sum_s, z_s)
        lane_max_t, sum_t = _online(lane_max_t, sum_t, z_t)
    max_s = tl.max(lane_max_s, axis=0)
    max_t = tl.max(lane_max_t, axis=0)
    sum_s = sum_s * tl.exp(lane_max_s - max_s)
    sum_t = sum_t * tl.exp(lane_max_t - max_t)
    # Kept apart from the maxima: their sum would round at the size of the logits.
    log_sum_s = tl.log(tl.sum(sum_s, axis=0))
    log_sum_t = tl.log(tl.sum(sum_t, axis=0))

    kl = tl.zeros((BLOCK_V,), ACC)
    tiles = tl.cdiv(vocab_size, BLOCK_V)
    # Backwards: what the first pass read last still lies in the L2.
    for tile in range(tiles):
        offs = (tiles - 1 - tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        stored = offs < vocab_size
        inside = stored & counted
        bias = tl.zeros((BLOCK_V,), ACC)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs, mask=inside, other=0).to(ACC)
        z_s, slope = _cap(
            tl.load(student_ptr + row * stride_z + offs, mask=inside, other=0),
            bias,
            LOGIT_SCALE,
            SOFTCAP,
            NEAR,
        )
        z_t, _ = _cap(
            tl.load(teacher_ptr + row * stride_z + offs, mask=inside, other=0),
            bias,
            LOGIT_SCALE,
            SOFTCAP,
            NEAR,
        )
        log_q = (z_s - max_s) - log_sum_s
        log_p = (z_t - max_t) - log_sum_t
        p = tl.exp(log_p)
        # A logit of -inf has probability zero and contributes nothing; inf - inf would be NaN. A probability that is
        # NaN stays: a teacher that overflowed must not look like a perfect student.
        kl += tl.where(inside & (p != 0.0), p * (log_p - log_q), 0.0)
        diff = tl.where(inside, (tl.exp(log_q) - p) * (slope * UNIT), 0.0)
        tl.store(diff_ptr + row * stride_d + offs, cast(diff, diff_ptr.dtype.element_ty), mask=stored)
    tl.store(kl_ptr + row, tl.sum(kl, axis=0))


def _matmul(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right with the accumulator's dtype as output; 16-bit operands need cuBLAS for that."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _unit(logit_scale: float, operand: torch.dtype) -> float:
    """Power of two that the differences are stored times: |q - p| * |logit_scale| reaches at most 2^15 with it.

    In float16 most of them would be zero as they are; the other dtypes have the range.
    """
    if operand != torch.float16 or logit_scale == 0.0:
        return 1.0
    return math.ldexp(1.0, 15 - math.frexp(logit_scale)[1])


def chunk_rows(chunk_size: int, vocab_size: int, bytes_per_logit: int) -> int:
    """Tokens per chunk: at most `chunk_size`, scratch at most SCRATCH_BYTES, a multiple of 128 where cut."""
    fit = SCRATCH_BYTES // (bytes_per_logit * vocab_size)
    return chunk_size if chunk_size <= fit else max(128, fit // 128 * 128)


def linear_kl_fwd(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    normalizer: float | None, logit_scale: float, softcap: float | None, chunk_size: int,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch; arguments as `discquant.ops.linear_kl`, already checked. Returns loss, per_token, grad_student."""
    num_tokens, vocab_size = student.shape[0], weight.shape[0]
    acc = torch.float64 if torch.float64 in (student.dtype, weight.dtype) else torch.float32
    operand = weight.dtype if weight.dtype == student.dtype else acc
    head = weight.to(operand)
    # The kernel knows no strides of these two.
    bias, mask = (None if vector is None else vector.contiguous() for vector in (bias, mask))
    per_token = student.new_empty(num_tokens, dtype=acc)
    # As the reference: float16 would lose what is divided by many tokens.
    wide = torch.float32 if student.dtype == torch.float16 else student.dtype
    grad = torch.empty_like(student, dtype=wide, memory_format=torch.contiguous_format)
    unit = _unit(float(logit_scale), operand)
    if normalizer is not None:
        inverse = student.new_full((), 1.0 / normalizer if normalizer else 1.0, dtype=acc)
    elif mask is None:
        inverse = student.new_full((), 1.0 / max(num_tokens, 1), dtype=acc)
    else:
        inverse = 1.0 / mask.sum().clamp(min=1).to(acc)
    # Measured on an H200: 4096 with 16 warps 0.416 ms for 768 rows of 128256, 2048 with 8 warps 0.458. 8192 with 32
    # leaves a multiprocessor one row, more of which the L2 still holds at the second pass: not measured on a GPU.
    block_v = block or min(4096, triton.next_power_of_2(vocab_size))
    rows = chunk_rows(chunk_size, vocab_size, 2 * acc.itemsize + operand.itemsize)
    # Scratch is allocated once; rows start at multiples of 64 bytes whatever the vocabulary, as matmuls like it.
    height, width = min(rows, num_tokens), triton.cdiv(vocab_size, 32) * 32
    z_s = student.new_empty((height, width), dtype=acc)[:, :vocab_size]
    z_t = student.new_empty((height, width), dtype=acc)[:, :vocab_size]
    diff = student.new_empty((height, width), dtype=operand)[:, :vocab_size]
    hidden = student.new_empty((height, student.shape[1]), dtype=acc)
    for start in range(0, num_tokens, rows):
        part = slice(start, min(start + rows, num_tokens))
        count = part.stop - start
        # Not both in one: equal rows at other places of a matmul may round differently, and KL(p | p) would not be 0.
        _matmul(z_s[:count], student[part].to(operand), head.t())
        _matmul(z_t[:count], teacher[part].to(operand), head.t())
        _linear_kl_fwd_kernel[(count,)](
            per_token[part], diff, z_s, z_t, z_s if bias is None else bias, student if mask is None else mask[part],
            vocab_size, z_s.stride(0), diff.stride(0),
            LOGIT_SCALE=float(logit_scale), SOFTCAP=float(softcap or 0.0),
            NEAR=0.02 if acc == torch.float64 else 0.3, UNIT=unit, HAS_BIAS=bias is not None,
            HAS_MASK=mask is not None, ACC=DTYPES[acc], BLOCK_V=block_v, num_warps=min(32, max(8, block_v // 256)),
        )  # fmt: skip
        _matmul(hidden[:count], diff[:count], head)
        torch.mul(hidden[:count], inverse / unit, out=grad[part])  # rounded as it is stored
        if mask is not None:
            # Not by a product: a row of an infinite head times zero is NaN.
            grad[part].masked_fill_(~mask[part].unsqueeze(1), 0.0)
    return per_token.sum() * inverse, per_token, grad
