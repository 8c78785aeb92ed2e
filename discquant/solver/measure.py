# SPDX-License-Identifier: Apache-2.0
"""Forward-only measurement through the chain: mean KL of substituted weights to the original model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from discquant.grids import Grid
from discquant.ops import linear_kl
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import StudentWeights, TeacherWeights
from discquant.solver.losses import counted_tokens, head_chunk, kl_of_logits, positions_per_item
from discquant.solver.weight_ref import assemble


def served_weights(
    chain: Chain,
    grids: Mapping[str, Grid],
    codes: Mapping[str, Tensor],
    served: torch.dtype,
    dtype: torch.dtype,
) -> StudentWeights:
    """Return what gives the weights of a block by parameter name as codes are served: rounded to `served`, in `dtype`.

    Grids and codes may be elsewhere than the chain runs.
    """

    def weights(index: int) -> dict[str, Tensor]:
        refs, device = chain.weights[index], chain.device
        return assemble(
            refs,
            (grids[r.name].to(device).dequantize(codes[r.name].to(device), served).to(dtype) for r in refs),
        )

    return weights


@torch.no_grad()
def mean_kl(
    chain: Chain,
    student: StudentWeights,
    batches: Sequence[Prepared],
    *,
    teacher: TeacherWeights | None = None,
) -> float:
    """Return the mean over counted positions of KL(original || student), in nats.

    Args:
        chain: The model.
        student: Weights of a block by parameter name.
        batches: Micro-batches; those that know the teacher's last hidden state need no teacher.
        teacher: Weights of the teacher's blocks, None where they are the model's own.

    Returns:
        Mean KL; 0.0 where nothing counts.
    """
    hidden = [batch.hidden for batch in batches]
    for index in range(len(chain.blocks)):
        weights = student(index)
        for place, batch in enumerate(batches):
            hidden[place] = chain.run_block(index, hidden[place], batch.calls[index], weights)
    total, count = 0.0, 0
    unknown = [batch for batch in batches if batch.teacher is None]
    found = iter(chain.teacher_outputs(unknown, teacher))
    for h, batch in zip(hidden, batches, strict=True):
        known = batch.teacher if batch.teacher is not None else next(found)
        count += counted_tokens(batch, "kl", chain.head is not None)
        if chain.head is None:
            total += float(kl_of_logits(h, known).double().sum()) / positions_per_item(h)
            continue
        features = chain.finish(h, batch).flatten(0, 1)
        result = linear_kl(
            features,
            chain.finish(known, batch).flatten(0, 1),
            chain.head.weight.to(features.dtype),
            bias=chain.head.bias,
            mask=None if batch.mask is None else batch.mask.flatten(),
            logit_scale=chain.head.logit_scale,
            softcap=chain.head.softcap,
            chunk_size=head_chunk(chain.head.weight.shape[0], features.device),
        )
        total += float(result.per_token.double().sum())
    return total / max(1, count)
