# SPDX-License-Identifier: Apache-2.0
"""What an error of a weight costs in KL, of many candidate errors at once, from the model's own samples.

Near the original weight W, KL(W + E) is about 1/2 E[<E, s>^2], s the gradient of the log-likelihood of a sampled
label: the Fisher matrix as a quadratic form. The labels of a window's tokens are drawn independently and the mean of s
is zero, so that the products of different tokens cancel in expectation, and one gradient per window serves for all its
tokens: 1/2 sum over windows of <E, s_window>^2, divided by the tokens, has the right mean. Unlike Kronecker factors
(`solver.curvature`) it does not take inputs and gradients of a layer for independent, which they are not where few
inputs are large, as before `down_proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain, Prepared
from discquant.solver.curvature import sampled_gradient
from discquant.solver.weight_ref import LAZY, WeightRef, assemble, take_matrices

# (block, its inputs per window) -> candidate errors of each of its weights, [candidates, out_features, in_features].
Errors = Callable[[int, list[Tensor]], list[Tensor]]


def projections(
    chain: Chain,
    windows: Sequence[Prepared],
    errors: Errors,
    *,
    generator: torch.Generator,
    boundaries: Boundaries | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return <E, s_window> of every candidate error of every weight.

    Args:
        chain: The model; nothing of it changes.
        windows: Of one row each.
        errors: Called once per block, the last first, while the block's weights are in memory.
        generator: Draws the labels; on the chain's device.
        boundaries: Where block inputs are kept meanwhile.
        progress: Called with (blocks done, blocks).

    Returns:
        float64, [candidates, windows], on the CPU, by module name; zero where no token of a window came (an expert).

    Note:
        Never more than one block's errors, one block's gradient and one window's activations exist.
    """
    boundaries = boundaries or Boundaries()
    boundaries.clear()
    hidden = [window.hidden for window in windows]
    for index in range(len(chain.blocks)):
        if index >= chain.first:
            boundaries.push(hidden)
        with torch.no_grad(), chain.opened(index):
            hidden = [chain.run_block(index, h, w.calls[index]) for h, w in zip(hidden, windows, strict=True)]
    grads = [sampled_gradient(chain, w, h, generator) for w, h in zip(windows, hidden, strict=True)]
    del hidden
    found: dict[str, Tensor] = {}
    blocks = range(chain.first, len(chain.blocks))
    for index in reversed(blocks):
        inputs, refs = boundaries.pop(), chain.weights[index]
        with chain.opened(index):
            candidates = errors(index, inputs)
            sums = [torch.zeros(len(e), len(windows), dtype=torch.float64) for e in candidates]
            own = {name: weight.requires_grad_() for name, weight in _weights(refs).items()}
            for place, window in enumerate(windows):
                leaf = inputs[place].detach()
                targets = list(own.values())
                if leaf.is_floating_point():
                    targets.append(leaf.requires_grad_())
                with torch.enable_grad():
                    output = chain.run_block(index, leaf, window.calls[index], own)
                made = list(torch.autograd.grad(output, targets, grads[place], allow_unused=True))
                if leaf.is_floating_point():
                    below = made.pop()
                    grads[place] = torch.zeros_like(leaf) if below is None else below
                values = {
                    name: torch.zeros_like(leaf_) if grad is None else grad
                    for (name, leaf_), grad in zip(own.items(), made, strict=True)
                }
                for total, error, grad in zip(sums, candidates, take_matrices(refs, values), strict=True):
                    total[:, place] = _products(error, grad)
        found |= {ref.name: total for ref, total in zip(refs, sums, strict=True)}
        if progress is not None:
            progress(len(blocks) - (index - chain.first), len(blocks))
    return found


def _weights(refs: Sequence[WeightRef]) -> dict[str, Tensor]:
    """Return the weights of a block by parameter name; read where they are not in memory."""
    if any(hasattr(ref.parameter, LAZY) or ref.device is not None for ref in refs):
        return assemble(refs, (ref.matrix() for ref in refs))
    return {ref.param_name: ref.parameter.detach() for ref in refs}


def _products(errors: Tensor, grad: Tensor) -> Tensor:
    """Return <E, grad> of each error; products and sums in float32 or wider, whatever the errors are kept in."""
    wide = grad.flatten().to(torch.promote_types(grad.dtype, torch.float32))
    return torch.stack([torch.dot(error.flatten().to(wide.dtype), wide) for error in errors]).double().cpu()
