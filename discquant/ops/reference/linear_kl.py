# SPDX-License-Identifier: Apache-2.0
"""Reference of `linear_kl`: KL divergence of two next-token distributions behind one frozen head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from discquant.ops.reference.settled import settled
from discquant.ops.reference.soft_weight import accumulate_dtype


class LinearKLResult(NamedTuple):
    """Loss (scalar), KL per token in nats [num_tokens], gradient of the loss [num_tokens, hidden_size]."""

    loss: Tensor
    per_token: Tensor
    grad_student: Tensor


def gradient_dtype(student: Tensor) -> torch.dtype:
    """Dtype of `grad_student`: that of the student, but float32 for float16, whose smallest number is 6e-8."""
    return torch.float32 if student.dtype == torch.float16 else student.dtype


def cap_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scale and soft-cap logits; return them with d(capped)/d(raw), None where that is `logit_scale`."""
    if softcap is None:
        return logits * logit_scale, None
    squashed = torch.tanh(logits * (logit_scale / softcap))
    return softcap * squashed, logit_scale * (1 - squashed.square())


@settled
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
) -> LinearKLResult:
    """Forward KL through a shared head with its gradient, in chunks; the contract is `discquant.ops.linear_kl`.

    Note:
        The softmax differences are taken in float32 (float64): bfloat16 logits drown the gradient at small KL.

    Source:
        DiscQuant, arXiv 2501.06417, objective; log-sum-exp as usual.
    """
    compute = accumulate_dtype(student, weight)
    num_tokens = student.shape[0]
    counted = torch.ones(num_tokens, dtype=torch.bool, device=student.device) if mask is None else mask
    # A tensor, where it is one: reading it would wait for the device.
    divisor = counted.sum().clamp(min=1).to(compute) if normalizer is None else float(normalizer) or 1.0
    per_token = student.new_zeros(num_tokens, dtype=compute)
    grad = torch.zeros_like(student, dtype=gradient_dtype(student))
    head = weight.to(compute)
    offset = None if bias is None else bias.to(compute)
    for start in range(0, num_tokens, chunk_size):
        rows = slice(start, start + chunk_size)
        raw_s = torch.nn.functional.linear(student[rows].to(compute), head, offset)
        raw_t = torch.nn.functional.linear(teacher[rows].to(compute), head, offset)
        z_s, slope = cap_logits(raw_s, logit_scale, softcap)
        z_t, _ = cap_logits(raw_t, logit_scale, softcap)
        log_q = torch.log_softmax(z_s, dim=-1)
        log_p = torch.log_softmax(z_t, dim=-1)
        p = log_p.exp()
        keep = counted[rows].to(compute)
        # where, not a product: a padded token may hold an infinite or NaN logit.
        # An entry of probability zero contributes nothing, also where both logits are -inf; one that is NaN is kept.
        kl = torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(dim=-1)
        per_token[rows] = torch.where(counted[rows], kl, torch.zeros_like(kl))
        d_logits = (log_q.exp() - p) * (logit_scale if slope is None else slope)
        d_hidden = (d_logits @ head) * (keep / divisor).unsqueeze(1)
        grad[rows] = torch.where(counted[rows].unsqueeze(1), d_hidden, torch.zeros_like(d_hidden)).to(
            grad.dtype
        )
    return LinearKLResult(per_token.sum() / divisor, per_token, grad)
