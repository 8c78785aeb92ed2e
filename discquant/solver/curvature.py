# SPDX-License-Identifier: Apache-2.0
"""Kronecker-factored curvature of the KL at the original weights, gathered from the model's own samples.

Near the original weight W, KL(W + E) is about 1/2 <E, F E> with the Fisher matrix F. For one layer y = W x, whose
output receives the log-likelihood gradient g of a sampled text, F is about E[g g^T] (x) E[|g|^2 x x^T] / E|g|^2: the
gradient of the quadratic, G E H (`kronecker`), is known without the noise of a step's few tokens. A token counts in
E[x x^T] by the energy of its gradient: inputs and gradients are not independent (before `down_proj` inputs are largest
where gradients are small), and so the product has the trace of E[g g^T (x) x x^T].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from discquant.ops.reference.linear_kl import cap_logits
from discquant.solver.boundaries import Boundaries
from discquant.solver.calls import See, on_call
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import TeacherWeights
from discquant.solver.kronecker import gram
from discquant.solver.losses import head_chunk, positions_per_item
from discquant.solver.weight_ref import WeightRef


class Factors(NamedTuple):
    """A = sum |g|^2 x x^T and G = sum g g^T of one weight, as the diagonal blocks that are kept; H = A / trace(G).

    Sums, so that those of several calls add up; the trace of G is sum |g|^2.

    Floating, [blocks, width, width]; the last block is padded with zeros where the width does not divide.
    """

    inputs: Tensor
    outputs: Tensor


# A factor is a sum of at most so many parts. In bfloat16, as a narrow state holds it, 128 of them lose about a percent,
# less than the factors' own noise; from 256 on a part is half a unit in the last place of the sum, and more are lost.
MOST_PARTS = 128

FactorSink = Callable[[int, dict[str, Factors]], None]


def rows_at_once(samples: int, batch_size: int) -> int:
    """Return on how many windows factors are gathered at once: as many as a step takes, or what MOST_PARTS asks for."""
    return max(batch_size, -(-samples // MOST_PARTS))


def label_generator(device: torch.device, seed: int) -> torch.Generator:
    """Return what draws labels where their probabilities are: one CPU core takes 5 ms for a token of 128k words."""
    return torch.Generator(device).manual_seed(seed)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sampled_gradient(chain: Chain, batch: Prepared, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient, by the last block's output, of minus the log-likelihood of labels that the model draws.

    Where an item of a module has several labels, of 1/sqrt(T) of it (see `kronecker_factors`).
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        features = chain.finish(leaf, batch)
    head = chain.head
    flat = features.detach().flatten(0, -2)
    size = flat.shape[1] if head is None else head.weight.shape[0]
    chunk = head_chunk(size, flat.device)
    grad = torch.empty_like(flat)
    mask = None if batch.mask is None else batch.mask.flatten()
    for begin in range(0, flat.shape[0], chunk):
        rows = _wide(flat[begin : begin + chunk])
        if head is None:
            logits = rows
            # Of T labels, each with a share of 1/T in the loss: G, a sum of g g^T over them, gets this twice.
            slope = positions_per_item(features) ** -0.5
        else:
            weight = head.weight.to(rows.dtype)
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


class _Watch:
    """Hooks of one block's linear layers, which bring inputs and output gradients together."""

    def __init__(self, chain: Chain, refs: Sequence[WeightRef], width: int) -> None:
        self.width = width
        self._sums: dict[str, Factors] = {}
        self._handles = []
        for ref in refs:
            module = None if ref.part is not None else chain.model.get_submodule(ref.name)
            if isinstance(module, nn.Linear):
                self._handles.append(on_call(chain.model, ref.name, self._hook(ref.name)))

    def _hook(self, name: str) -> See:
        def see(x: Tensor, output: Tensor) -> None:
            rows = x.detach().flatten(0, -2)
            output.register_hook(lambda grad: self._add(name, rows, grad.detach().flatten(0, -2)))

        return see

    def _add(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        grads = _wide(grads)
        energy = grads.square().sum(dim=1)
        weighted = _wide(inputs) * energy.sqrt().unsqueeze(1)
        made = Factors(gram(weighted, self.width), gram(grads, self.width))
        before = self._sums.get(name)
        self._sums[name] = (
            made if before is None else Factors(*(a + b for a, b in zip(before, made, strict=True)))
        )

    def take(self, total: int) -> dict[str, Factors]:
        """Stop watching; return the factors of the layers that were reached, divided by `total`."""
        for handle in self._handles:
            handle.remove()
        return {
            name: Factors(*(factor * (1 / total) for factor in found)) for name, found in self._sums.items()
        }


def _gradients(
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


def kronecker_factors(
    chain: Chain,
    batches: Sequence[Prepared],
    on_block: FactorSink,
    *,
    total: int,
    width: int,
    generator: torch.Generator,
    teacher: TeacherWeights | None = None,
    boundaries: Boundaries | None = None,
) -> None:
    """Gather the factors of every linear layer on some micro-batches, block by block from the last.

    A = sum of |g|^2 x x^T and G = sum of g g^T over the rows that a layer sees, g = d(-log p(sampled label)) / dy, both
    divided by `total`; over several calls they add up. A module with logits [items, T, classes], whose loss is the mean
    over an item's T labels, has 1/T of them.

    Args:
        chain: The model.
        batches: Micro-batches.
        on_block: Receives (block index, factors by module name), float32, to be added up over calls.
        total: Counted positions of all calls together.
        width: Channels per diagonal block that is kept.
        generator: Draws the labels (`label_generator` of the chain's device).
        teacher: Original weights of a block by parameter name, None where they are the model's own.
        boundaries: Where block inputs are kept meanwhile.

    Note:
        Convolutions and experts have no factors. Never more than one block's activations exist.

    Source:
        KFAC, arXiv 1503.05671.
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
    for index in reversed(range(chain.first, len(chain.blocks))):
        watch = _Watch(chain, chain.weights[index], width)
        inputs, weights = boundaries.pop(), weights_of(index)
        try:
            with opened(index, weights):
                for position, batch in enumerate(batches):
                    found = _gradients(chain, index, inputs[position], batch, weights, grads[position])
                    if found is not None:
                        grads[position] = found
        finally:
            factors = watch.take(total)
        on_block(index, factors)
