# SPDX-License-Identifier: Apache-2.0
"""Gradients of the log-likelihood of labels that the model draws itself, passed back block by block.

Their covariance is the Fisher matrix, the curvature of the KL at the original weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from discquant.errors import NonFiniteError
from discquant.ops.reference.linear_kl import cap_logits
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import TeacherWeights
from discquant.solver.losses import head_chunk, positions_per_item


def label_generator(device: torch.device, seed: int) -> torch.Generator:
    """Return what draws labels where their probabilities are: one CPU core takes 5 ms for a token of 128k words."""
    return torch.Generator(device).manual_seed(seed)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or wider as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sampled_gradient(chain: Chain, batch: Prepared, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient, by the last block's output, of minus the log-likelihood of labels that the model draws.

    Where an item of a module has several labels, of 1/sqrt(T) of it (see `kronecker_factors`).

    Raises:
        NonFiniteError: What the head gets is not finite, so that there are no probabilities.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        features = chain.finish(leaf, batch)
    head = chain.head
    flat = features.detach().flatten(0, -2)
    if not bool(torch.isfinite(flat).all()):
        raise NonFiniteError(
            "the model's outputs on the calibration text are not finite: its weights are not, or they exceed the "
            "compute dtype"
        )
    size = flat.shape[1] if head is None else head.weight.shape[0]
    chunk = head_chunk(size, flat.device)
    grad = torch.empty_like(flat)
    mask = None if batch.mask is None else batch.mask.flatten()
    if head is not None:
        # Once for all chunks: of a head in bfloat16 it is a copy twice as large.
        weight = head.weight.to(torch.promote_types(flat.dtype, torch.float32))
    for begin in range(0, flat.shape[0], chunk):
        rows = wide(flat[begin : begin + chunk])
        if head is None:
            logits = rows
            # Of T labels, each with a share of 1/T in the loss: G, a sum of g g^T over them, gets this twice.
            slope = positions_per_item(features) ** -0.5
        else:
            bias = None if head.bias is None else head.bias.to(rows.dtype)
            logits, slope = cap_logits(
                nn.functional.linear(rows, weight, bias), head.logit_scale, head.softcap
            )
            slope = head.logit_scale if slope is None else slope
        pull = torch.softmax(logits, dim=-1)
        del logits  # to draw takes a tensor as large as they are
        label = torch.multinomial(pull, 1, generator=generator)
        pull.scatter_add_(1, label, torch.full_like(label, -1, dtype=pull.dtype))
        pull *= slope
        if head is not None:
            if mask is not None:
                pull *= mask[begin : begin + chunk].unsqueeze(1)
            pull = pull @ weight
        grad[begin : begin + chunk] = pull
    (found,) = torch.autograd.grad(features, leaf, grad.view_as(features))
    return found


def _through(
    chain: Chain,
    index: int,
    hidden: Tensor,
    batch: Prepared,
    weights: Mapping[str, Tensor] | None,
    grad: Tensor,
) -> Tensor | None:
    """Run a block forward and backward; return the gradient by its input, None by one of integers (token ids)."""
    if hidden.is_floating_point():
        # A leaf even at the first block: the weights need no gradient, so nothing else would.
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = chain.run_block(index, leaf, batch.calls[index], weights)
        (found,) = torch.autograd.grad(output, leaf, grad)
        return found
    refs = chain.weights[index]
    own = {ref.param_name: ref.parameter for ref in refs} if weights is None else weights
    leaves = {name: weight.detach().requires_grad_() for name, weight in own.items()}
    with torch.enable_grad():
        output = chain.run_block(index, hidden, batch.calls[index], leaves)
    torch.autograd.grad(output, list(leaves.values()), grad, allow_unused=True)
    return None


def backward_blocks(
    chain: Chain,
    batches: Sequence[Prepared],
    *,
    generator: torch.Generator,
    teacher: TeacherWeights | None = None,
    boundaries: Boundaries | None = None,
) -> Iterator[tuple[int, Callable[[], None]]]:
    """Yield each block, the last first, and what runs it forward and backward on all micro-batches.

    Whoever wants to see something of a block hooks its layers, calls that, and takes the hooks off. It must be called
    before the next block is asked for. Never more than one block's activations exist.

    Args:
        chain: The model.
        batches: Micro-batches.
        generator: Draws the labels (`label_generator` of the chain's device).
        teacher: Original weights of a block by parameter name, None where they are the model's own.
        boundaries: Where block inputs are kept meanwhile.
    """
    boundaries = boundaries or Boundaries()
    boundaries.clear()
    hidden = [batch.hidden for batch in batches]

    def weights_of(index: int) -> Any:
        return None if teacher is None else teacher(index)

    def opened(index: int, weights: Any) -> contextlib.AbstractContextManager[None]:
        return chain.opened(index) if weights is None else contextlib.nullcontext()

    for index in range(len(chain.blocks)):
        if index >= chain.first:
            boundaries.push(hidden)
        weights = weights_of(index)
        with torch.no_grad(), opened(index, weights):
            hidden = [
                chain.run_block(index, h, batch.calls[index], weights)
                for h, batch in zip(hidden, batches, strict=True)
            ]
    grads = [sampled_gradient(chain, batch, h, generator) for batch, h in zip(batches, hidden, strict=True)]
    del hidden

    def run(index: int, inputs: list[Tensor]) -> None:
        weights = weights_of(index)
        with opened(index, weights):
            for position, batch in enumerate(batches):
                found = _through(chain, index, inputs[position], batch, weights, grads[position])
                if found is not None:
                    grads[position] = found

    for index in reversed(range(chain.first, len(chain.blocks))):
        yield index, functools.partial(run, index, boundaries.pop())
