# SPDX-License-Identifier: Apache-2.0
"""Losses at the head: value, and gradient by the student's last hidden state, one micro-batch at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from discquant.config import LossName
from discquant.ops import linear_kl
from discquant.ops.reference.linear_kl import cap_logits
from discquant.solver.chain import Chain, Prepared

# On the CPU the logits of a chunk and what is derived from them are ten float32 tensors of this size at most.
LOGIT_BYTES = 1 << 27


def head_chunk(vocab_size: int, device: torch.device, most: int = 1024) -> int:
    """Return how many tokens' logits may exist at once: fewer for a large vocabulary on the CPU.

    Decided by the vocabulary alone, so that it is the same on every machine; Triton bounds its own chunks.
    """
    return most if device.type != "cpu" else min(most, max(16, LOGIT_BYTES // (4 * vocab_size)))


class HeadLoss(NamedTuple):
    """Sum of the loss over this micro-batch divided by the step's token count, float64, [], and its gradient."""

    loss: Tensor
    grad: Tensor


def counted_tokens(prepared: Prepared, loss: LossName, has_head: bool) -> int:
    """Return how many positions of a micro-batch enter the mean (CE has no target at the last position)."""
    if not has_head:
        return int(prepared.inputs.shape[0]) if prepared.mask is None else int(prepared.mask.sum())
    mask = _mask(prepared)
    return int(mask[:, 1:].sum()) if loss == "ce" else int(mask.sum())


def _mask(prepared: Prepared) -> Tensor:
    if prepared.mask is not None:
        return prepared.mask
    return torch.ones(prepared.inputs.shape[:2], dtype=torch.bool, device=prepared.inputs.device)


def kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) along the last dimension, in float32 or float64."""
    log_q = torch.log_softmax(student.float() if student.dtype != torch.float64 else student, dim=-1)
    log_p = torch.log_softmax(teacher.to(log_q.dtype), dim=-1)
    # A class of probability zero contributes nothing, to the gradient neither, also where both logits are -inf.
    p = log_p.exp()
    gap = log_p.masked_fill(p == 0, 0.0) - log_q.masked_fill(p == 0, 0.0)
    return (p * gap).sum(dim=-1)


def positions_per_item(logits: Tensor) -> int:
    """Return over how many positions the loss of one item of a module is a mean: T of logits [items, T, classes]."""
    return max(1, logits.shape[1:-1].numel())


def _module_kl(student: Tensor, teacher: Tensor, normalizer: float) -> HeadLoss:
    """KL of a module whose output is already logits."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        loss = kl_of_logits(leaf, teacher).sum() / (normalizer * positions_per_item(leaf))
    (grad,) = torch.autograd.grad(loss, leaf)
    return HeadLoss(loss.detach().double(), grad)


def _cross_entropy(
    chain: Chain, features: Tensor, prepared: Prepared, normalizer: float, chunk: int
) -> HeadLoss:
    """Next-token cross entropy in chunks of tokens; gradient by `features`."""
    head = chain.head
    assert head is not None
    mask = _mask(prepared)
    targets = torch.where(mask[:, 1:], prepared.inputs[:, 1:], torch.full_like(prepared.inputs[:, 1:], -100))
    flat = features[:, :-1].reshape(-1, features.shape[-1])
    grad = torch.zeros_like(features)
    grad_flat = torch.zeros_like(flat)
    total = 0.0
    for start in range(0, flat.shape[0], chunk):
        rows = slice(start, start + chunk)
        with torch.enable_grad():
            leaf = flat[rows].detach().requires_grad_()
            raw = torch.nn.functional.linear(leaf, head.weight.to(leaf.dtype), head.bias)
            logits, _ = cap_logits(
                raw if raw.dtype == torch.float64 else raw.float(), head.logit_scale, head.softcap
            )
            loss = (
                torch.nn.functional.cross_entropy(logits, targets.reshape(-1)[rows], reduction="sum")
                / normalizer
            )
        total += loss.item()
        (grad_flat[rows],) = torch.autograd.grad(loss, leaf)
    grad[:, :-1] = grad_flat.view_as(grad[:, :-1])
    return HeadLoss(grad.new_full((), total, dtype=torch.float64), grad)


def head_loss(
    chain: Chain,
    prepared: Prepared,
    student: Tensor,
    teacher: Tensor,
    *,
    loss: LossName,
    normalizer: float,
    chunk_size: int = 1024,
) -> HeadLoss:
    """Return the loss of one micro-batch and its gradient by the student's last block output.

    kl: sum_t KL(teacher_t || student_t) / normalizer.  ce: sum of next-token cross entropies / normalizer.
    mse: zero here; its gradient enters at the block boundaries (`gradients.block_gradients`).

    Args:
        chain: The model.
        prepared: The micro-batch.
        student: Last block's output of the student, floating, [windows, seqlen, hidden_size].
        teacher: The same of the teacher.
        loss: Which loss.
        normalizer: Counted tokens of the whole step.
        chunk_size: Tokens whose logits exist at once, at most; see `head_chunk`.

    Returns:
        HeadLoss with a gradient of the shape of `student`.
    """
    if loss == "mse":
        return HeadLoss(student.new_zeros((), dtype=torch.float64), torch.zeros_like(student))
    if chain.head is None:
        return _module_kl(student, teacher, normalizer)
    chunk_size = head_chunk(chain.head.weight.shape[0], student.device, chunk_size)
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        features = chain.finish(leaf, prepared)
    if loss == "ce":
        value, grad = _cross_entropy(chain, features.detach(), prepared, normalizer, chunk_size)
    else:
        with torch.no_grad():
            target = chain.finish(teacher, prepared)
        head = chain.head
        result = linear_kl(
            features.detach().flatten(0, 1),
            target.flatten(0, 1),
            head.weight.to(features.dtype),
            bias=head.bias,
            mask=None if prepared.mask is None else prepared.mask.flatten(),
            normalizer=normalizer,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            chunk_size=chunk_size,
        )
        value, grad = result.loss.double(), result.grad_student.view_as(features)
    (grad_hidden,) = torch.autograd.grad(features, leaf, grad)
    return HeadLoss(value, grad_hidden)
