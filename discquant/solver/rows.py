# SPDX-License-Identifier: Apache-2.0
"""Calibration rows: their order over the steps, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from discquant.config import LossName
from discquant.solver.chain import BlockCall, Chain, Prepared
from discquant.solver.gradients import TeacherWeights
from discquant.solver.losses import counted_tokens


def row_order(num_rows: int, seed: int) -> Iterator[int]:
    """Yield row numbers for ever: a new seeded permutation for each pass over the data."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from torch.randperm(num_rows, generator=generator).tolist()
        epoch += 1


@dataclass
class TokenRows:
    """Calibration rows and how to cut them into micro-batches; remembers the teacher's last hidden state.

    Attributes:
        chain: The model.
        input_ids: Token ids (or a module's inputs), [rows, ...].
        mask: Positions that count, bool, or None.
        micro_batch: Rows per micro-batch.
    """

    chain: Chain
    input_ids: Tensor
    mask: Tensor | None
    micro_batch: int
    _teacher: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.input_ids.shape[0])

    def remember_teacher(self, teacher: TeacherWeights | None = None) -> None:
        """Compute the teacher's last block output of every row once, in a fixed order."""
        self._teacher = torch.cat(self.chain.teacher_outputs(self.batches(range(len(self))), teacher))

    def tokens(self, rows: Sequence[int], loss: LossName) -> int:
        """Return how many positions of the rows count in a loss."""
        index = torch.tensor(list(rows))
        ids, mask = self.input_ids[index], None if self.mask is None else self.mask[index]
        return counted_tokens(Prepared(ids, [], ids, mask), loss, self.chain.head is not None)

    def stream(self) -> Iterator[Prepared]:
        """Yield micro-batches of all rows, made one at a time."""
        return self._made(range(len(self)))

    def batches(self, rows: Sequence[int]) -> list[Prepared]:
        """Return micro-batches of the given rows, in order; what all their blocks are called with exists once."""
        return list(self._made(rows))

    def _made(self, rows: Sequence[int]) -> Iterator[Prepared]:
        calls: list[BlockCall] = []
        for begin in range(0, len(rows), self.micro_batch):
            index = torch.tensor(list(rows[begin : begin + self.micro_batch]))
            device = self.chain.device
            mask = None if self.mask is None else self.mask[index].to(device)
            prepared = self.chain.prepare(self.input_ids[index].to(device), mask)
            if self._teacher is not None:
                prepared = prepared._replace(teacher=self._teacher[index.to(self._teacher.device)])
            calls = _shared(prepared.calls, calls)
            yield prepared._replace(calls=calls)


def _shared(calls: list[BlockCall], before: list[BlockCall]) -> list[BlockCall]:
    """Return a micro-batch's calls with the tensors of the one before in place of equal ones.

    Masks of eager attention are [windows, 1, seqlen, seqlen] in the dtype of computing, far more than hidden states.
    """
    (own, form), (others, other_form) = tree_flatten(calls), tree_flatten(before)
    if form != other_form:
        return calls
    equal: dict[tuple[int, int], bool] = {}  # all blocks get the same few

    def chosen(one: Any, other: Any) -> Any:
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return one
        pair = (id(one), id(other))
        if pair not in equal:
            like = (one.dtype, one.device, one.stride()) == (other.dtype, other.device, other.stride())
            equal[pair] = like and torch.equal(one, other)
        return other if equal[pair] else one

    made: list[BlockCall] = tree_unflatten([chosen(*pair) for pair in zip(own, others, strict=True)], form)
    return made
