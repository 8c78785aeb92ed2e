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

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain, Prepared
from discquant.solver.sampled import sampled_gradient
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
    known: Collection[str] = (),
    done: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Return <E, s_window> of every candidate error of every weight.

    Args:
        chain: The model; nothing of it changes.
        windows: Of one row each.
        errors: Called once per block, the last first, while the block's weights are in memory.
        generator: Draws the labels; on the chain's device.
        boundaries: Where block inputs are kept meanwhile.
        known: Names of weights whose products are there already; of a block of those nothing is computed but the
            gradient that passes it.
        done: Called with each block and its products.

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
    for index in reversed(range(chain.first, len(chain.blocks))):
        inputs, refs = boundaries.pop(), chain.weights[index]
        if all(ref.name in known for ref in refs):
            refs = []
        with chain.opened(index):
            candidates = errors(index, inputs) if refs else []
            products = [torch.zeros(len(e), len(windows), dtype=torch.float64) for e in candidates]
            own = _weights(refs)
            for place, window in enumerate(windows):
                values, below = _gradients(chain, index, inputs[place], window, own, grads[place])
                if below is not None:
                    grads[place] = below
                for product, error, grad in zip(
                    products, candidates, take_matrices(refs, values), strict=True
                ):
                    product[:, place] = _products(error, grad)
        of_block = {ref.name: product for ref, product in zip(refs, products, strict=True)}
        found |= of_block
        if done is not None:
            done(index, of_block)
    return found


def _gradients(
    chain: Chain, index: int, hidden: Tensor, window: Prepared, own: Mapping[str, Tensor], pull: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the gradients of a block's weights, and by its input; None by the first one's, which nothing needs."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in own.items()}
    hidden = hidden.detach().requires_grad_(index > chain.first)
    targets = [*leaves.values(), *([hidden] if index > chain.first else [])]
    if not targets:
        return {}, None
    with torch.enable_grad():
        output = chain.run_block(index, hidden, window.calls[index], leaves)
    made = torch.autograd.grad(output, targets, pull, allow_unused=True)
    # A weight may be unused: an expert that no token of the window chose.
    filled = [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(targets, made, strict=True)
    ]
    return dict(zip(leaves, filled, strict=False)), filled[-1] if index > chain.first else None


def _weights(refs: Sequence[WeightRef]) -> dict[str, Tensor]:
    """Return the weights of a block by parameter name; read where they are not in memory, or not where it runs."""
    if any(hasattr(ref.parameter, LAZY) or ref.device not in (None, ref.parameter.device) for ref in refs):
        return assemble(refs, (ref.matrix() for ref in refs))
    return {ref.param_name: ref.parameter.detach() for ref in refs}


def _products(errors: Tensor, grad: Tensor) -> Tensor:
    """Return <E, grad> of each error; products and sums in float32 or wider, whatever the errors are kept in."""
    wide = grad.flatten().to(torch.promote_types(grad.dtype, torch.float32))
    return torch.stack([torch.dot(error.flatten().to(wide.dtype), wide) for error in errors]).double().cpu()
