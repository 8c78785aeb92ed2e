# SPDX-License-Identifier: Apache-2.0
"""Exact gradients of the loss, block by block: never more than one block's weight gradient exists.

forward: all micro-batches through teacher and student block, keeping the student's block inputs;
head: loss and gradient at the last boundary; backward: recompute each block from the last.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from discquant.config import LossName
from discquant.solver.boundaries import Boundaries
from discquant.solver.chain import Chain, Prepared
from discquant.solver.losses import counted_tokens, head_loss
from discquant.solver.ranks import Ranks, TreeSum
from discquant.solver.soft_block import SoftWeights

StudentWeights = Callable[[int], Mapping[str, Tensor]]
TeacherWeights = Callable[[int], Mapping[str, Tensor] | None]
BlockSink = Callable[[int, dict[str, Tensor]], None]


class _Forward:
    """The student's forward pass: boundaries always, and the blocks' graphs where `keep_graph` asks for them."""

    def __init__(
        self,
        chain: Chain,
        student: StudentWeights,
        batches: Sequence[Prepared],
        keep_graph: bool,
        boundaries: Boundaries,
    ) -> None:
        self.chain, self.student, self.batches, self.keep_graph = chain, student, batches, keep_graph
        self.inputs = boundaries
        self.first = chain.first
        self.outputs: list[list[Tensor]] = []
        self.leaves: list[dict[str, Tensor]] = []

    def _leaves(self, index: int) -> dict[str, Tensor]:
        weights = self.student(index)
        if isinstance(weights, SoftWeights):
            return weights.with_leaves()
        return {name: w.detach().requires_grad_() for name, w in weights.items()}

    def _call(self, index: int, hidden: Tensor, batch: Prepared, weights: Mapping[str, Tensor]) -> Tensor:
        soft = weights.placed() if isinstance(weights, SoftWeights) else contextlib.nullcontext()
        with soft:
            return self.chain.run_block(index, hidden, batch.calls[index], weights)

    def run(self, index: int, hidden: list[Tensor]) -> list[Tensor]:
        """Run block `index` on all micro-batches; return detached outputs."""
        if not self.keep_graph or index < self.first:
            if index >= self.first:
                self.inputs.push(hidden)
            with torch.no_grad():
                weights = self.student(index)
                return [
                    self._call(index, h, batch, weights)
                    for h, batch in zip(hidden, self.batches, strict=True)
                ]
        leaves = self._leaves(index)
        hidden = [h.detach().requires_grad_(index > self.first) for h in hidden]
        with torch.enable_grad():
            outputs = [
                self._call(index, h, batch, leaves) for h, batch in zip(hidden, self.batches, strict=True)
            ]
        self.inputs.push(hidden)
        self.outputs.append(outputs)
        self.leaves.append(leaves)
        return [h.detach() for h in outputs]

    def backward(self, index: int, grads: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the gradients at the inputs of block `index` and of its weights, summed over micro-batches.

        A sum is taken in the order of a binary tree over the micro-batches, so that ranks can share it.
        """
        leaves = self.leaves.pop() if self.keep_graph else self._leaves(index)
        outputs = self.outputs.pop() if self.keep_graph else None
        inputs = self.inputs.pop()
        tree = TreeSum()
        for position, batch in enumerate(self.batches):
            hidden = inputs[position]
            if outputs is None:
                hidden = hidden.detach().requires_grad_(index > self.first)
                with torch.enable_grad():
                    output = self._call(index, hidden, batch, leaves)
            else:
                output = outputs[position]
            trigger = [leaves.trigger] if isinstance(leaves, SoftWeights) else []
            targets = ([hidden] if index > self.first else []) + list(leaves.values())
            # A weight may be unused on this micro-batch (an expert that no token chose).
            found = list(torch.autograd.grad(output, targets + trigger, grads[position], allow_unused=True))
            del found[len(targets) :]
            if index > self.first:
                grad_input = found.pop(0)
                grads[position] = torch.zeros_like(hidden) if grad_input is None else grad_input
            sums = {name: _wide(leaf, grad) for (name, leaf), grad in zip(leaves.items(), found, strict=True)}
            if isinstance(leaves, SoftWeights):
                sums |= leaves.take_gradients()
            del found
            tree.add(sums)
        return grads, tree.total()


def _counted(gap: Tensor, batch: Prepared, has_head: bool) -> Tensor:
    """Return a difference of hidden states, zero at positions that do not count."""
    if batch.mask is None or not has_head:
        return gap
    return gap.masked_fill(~batch.mask.unsqueeze(-1), 0.0)


def _wide(leaf: Tensor, grad: Tensor | None) -> Tensor:
    """Return a gradient in float32 or wider, zeros where the weight was not used."""
    if grad is None:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
    return grad if grad.dtype == torch.float64 else grad.float()


def block_gradients(
    chain: Chain,
    student: StudentWeights,
    batches: Sequence[Prepared],
    on_block: BlockSink,
    *,
    loss: LossName = "kl",
    chunk_size: int = 1024,
    keep_graph: bool = False,
    teacher: TeacherWeights | None = None,
    boundaries: Boundaries | None = None,
    ranks: Ranks | None = None,
    tokens: int | None = None,
) -> float:
    """Compute the loss of a step and hand each block's weight gradient to `on_block`, last block first.

    It ends at the first block with weights to quantize; what lies below it is only run forward.

    The gradient of block b is that of the whole step (all micro-batches summed) when `on_block(b, ...)` is
    called; the block is not visited again, so the callee may change the block's weights at once.

    Args:
        chain: The model.
        student: Returns the student's weights of a block by parameter name; called in the forward and again
            in the backward pass of each block (once with `keep_graph`), with the same result.
        batches: Micro-batches of this rank; their order fixes the order of sums.
        on_block: Receives (block index, gradient by parameter name), float32 or wider.
        loss: Which loss.
        chunk_size: Tokens whose logits exist at once, at most.
        keep_graph: Keep the student's activations instead of recomputing each block: a fifth less work, the
            same bits, memory for the activations of the whole model.
        teacher: Returns the teacher's weights of a block by parameter name, None where they are the model's own;
            called right after `student` in the forward pass.
        boundaries: Where the student's block inputs are kept; None keeps them as they are.
        ranks: Who else computes micro-batches of this step; None is nobody.
        tokens: Counted tokens of the whole step, None where `batches` are all of it.

    Returns:
        The loss, mean over the counted tokens of all batches.

    Raises:
        ValueError: No token counts, or the loss is not finite.
    """
    depth = len(chain.blocks)
    ranks = ranks or Ranks()
    boundaries = boundaries or Boundaries()
    boundaries.clear()
    own = sum(counted_tokens(batch, loss, chain.head is not None) for batch in batches)
    total = float(own if tokens is None else tokens)
    if total == 0:
        raise ValueError("block_gradients: no token of the step counts in the loss")
    forward = _Forward(chain, student, batches, keep_graph, boundaries)
    pulls: list[list[Tensor]] = []  # mse only: gradient entering at each block's output
    known = loss != "mse" and all(batch.teacher is not None for batch in batches)
    teacher_hidden = [
        batch.teacher if known and batch.teacher is not None else batch.hidden for batch in batches
    ]
    student_hidden = [batch.hidden for batch in batches]
    squares: list[Tensor | float] = [0.0 for _ in batches]  # mse only: each micro-batch's share of the loss
    for index in range(depth):
        student_hidden = forward.run(index, student_hidden)
        if loss == "ce" or known:
            continue
        with torch.no_grad():
            weights = None if teacher is None else teacher(index)
            with chain.opened(index) if weights is None else contextlib.nullcontext():
                teacher_hidden = [
                    chain.run_block(index, h, batch.calls[index], weights)
                    for h, batch in zip(teacher_hidden, batches, strict=True)
                ]
            if loss == "mse":
                gaps = [
                    _counted(s - t, batch, chain.head is not None)
                    for s, t, batch in zip(student_hidden, teacher_hidden, batches, strict=True)
                ]
                # Entries of a position that counts; without a head that is a whole item.
                counts = [total * depth * gap.shape[1 if chain.head is None else 2 :].numel() for gap in gaps]
                squares = [
                    square + gap.double().square().sum() / count
                    for square, gap, count in zip(squares, gaps, counts, strict=True)
                ]
                pulls.append([gap * (2 / count) for gap, count in zip(gaps, counts, strict=True)])
    grads: list[Tensor] = []
    losses: list[Tensor] = []
    for batch, s, t, square in zip(batches, student_hidden, teacher_hidden, squares, strict=True):
        part = head_loss(chain, batch, s, t, loss=loss, normalizer=total, chunk_size=chunk_size)
        losses.append(part.loss + square)
        grads.append(part.grad)
    # The only wait for the device in a step before its end; summed in the order of micro-batches, whatever the ranks.
    value: float = sum(ranks.gather(torch.stack(losses).tolist() if losses else []))
    if not math.isfinite(value):
        raise ValueError(f"block_gradients: the loss must be finite, got {value}")
    del student_hidden, teacher_hidden

    for index in reversed(range(chain.first, depth)):
        if loss == "mse":
            grads = [g + pull for g, pull in zip(grads, pulls.pop(), strict=True)]
        grads, sums = forward.backward(index, grads)
        ranks.join(sums)
        on_block(index, sums)
        del sums
    return value
