# SPDX-License-Identifier: Apache-2.0
"""Forward-only measurement through the chain: mean KL of substituted weights to the original model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from discquant.ops import linear_kl
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import StudentWeights
from discquant.solver.losses import counted_tokens, head_chunk, kl_of_logits


@torch.no_grad()
def mean_kl(chain: Chain, student: StudentWeights, batches: Sequence[Prepared]) -> float:
    """Return the mean over counted positions of KL(original || student), in nats.

    Args:
        chain: Model whose own weights are the teacher.
        student: Weights of a block by parameter name.
        batches: Micro-batches.

    Returns:
        Mean KL; 0.0 where nothing counts.
    """
    hidden = [batch.hidden for batch in batches]
    for index in range(len(chain.blocks)):
        weights = student(index)
        hidden = [
            chain.run_block(index, h, b.calls[index], weights) for h, b in zip(hidden, batches, strict=True)
        ]
    total, count = 0.0, 0
    for h, batch in zip(hidden, batches, strict=True):
        teacher = batch.teacher if batch.teacher is not None else chain.teacher_output(batch)
        count += counted_tokens(batch, "kl", chain.head is not None)
        if chain.head is None:
            per_item = kl_of_logits(h, teacher)
            total += float(per_item.double().sum()) / max(1, per_item.numel() // per_item.shape[0])
            continue
        features = chain.finish(h, batch).flatten(0, 1)
        result = linear_kl(
            features,
            chain.finish(teacher, batch).flatten(0, 1),
            chain.head.weight.to(features.dtype),
            bias=chain.head.bias,
            mask=None if batch.mask is None else batch.mask.flatten(),
            logit_scale=chain.head.logit_scale,
            softcap=chain.head.softcap,
            chunk_size=head_chunk(chain.head.weight.shape[0], features.device),
        )
        total += float(result.per_token.double().sum())
    return total / max(1, count)
