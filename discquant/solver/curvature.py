# SPDX-License-Identifier: Apache-2.0
"""Kronecker-factored curvature of the KL at the original weights, gathered from the model's own samples.

Near the original weight W, KL(W + E) is about 1/2 <E, F E> with the Fisher matrix F. For one layer y = W x, whose
output receives the log-likelihood gradient g of a sampled text, F is about E[g g^T] (x) E[|g|^2 x x^T] / E|g|^2: the
gradient of the quadratic, G E H (`kronecker`), is known without the noise of a step's few tokens. A token counts in
E[x x^T] by the energy of its gradient: inputs and gradients are not independent (before `down_proj` inputs are largest
where gradients are small), and so the product has the trace of E[g g^T (x) x x^T].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from discquant.solver.boundaries import Boundaries
from discquant.solver.calls import See, on_call
from discquant.solver.chain import Chain, Prepared
from discquant.solver.gradients import TeacherWeights
from discquant.solver.kronecker import gram
from discquant.solver.sampled import backward_blocks, wide
from discquant.solver.weight_ref import WeightRef

logger = logging.getLogger(__name__)


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


class _Watch:
    """Hooks of one block's linear layers, which bring inputs and output gradients together."""

    def __init__(self, chain: Chain, refs: Sequence[WeightRef], width: int) -> None:
        self.width = width
        self._sums: dict[str, Factors] = {}
        self._changed: set[str] = set()
        self._handles = []
        for ref in refs:
            module = None if ref.part is not None else chain.model.get_submodule(ref.name)
            if isinstance(module, nn.Linear):
                self._handles.append(on_call(chain.model, ref.name, self._hook(ref.name), paired=True))

    def _hook(self, name: str) -> See:
        def see(x: Tensor, output: Tensor) -> None:
            if not output.requires_grad:  # computed from constants, or where no gradient is kept
                return
            rows = x.detach().flatten(0, -2)
            version = rows._version

            def add(grad: Tensor) -> None:
                if rows._version == version:
                    self._add(name, rows, grad.detach().flatten(0, -2))
                else:
                    self._changed.add(name)

            output.register_hook(add)

        return see

    def _add(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        grads = wide(grads)
        energy = grads.square().sum(dim=1)
        weighted = wide(inputs) * energy.sqrt().unsqueeze(1)
        made = Factors(gram(weighted, self.width), gram(grads, self.width))
        before = self._sums.get(name)
        self._sums[name] = (
            made if before is None else Factors(*(a + b for a, b in zip(before, made, strict=True)))
        )

    def take(self, total: int) -> dict[str, Factors]:
        """Stop watching; return the factors of the layers that were reached, divided by `total`."""
        for handle in self._handles:
            handle.remove()
        for name in sorted(self._changed):
            logger.warning("curvature: the model changes the input of %s in place; it has no term", name)
        return {
            name: Factors(*(factor * (1 / total) for factor in found))
            for name, found in self._sums.items()
            if name not in self._changed
        }


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
        Convolutions and experts have no factors, nor has a layer that no gradient reaches, or whose input the model
        changes in place afterwards (a warning names it). Never more than one block's activations exist.

    Source:
        KFAC, arXiv 1503.05671.
    """
    for index, run in backward_blocks(
        chain, batches, generator=generator, teacher=teacher, boundaries=boundaries
    ):
        watch = _Watch(chain, chain.weights[index], width)
        try:
            run()
        finally:
            factors = watch.take(total)
        on_block(index, factors)
