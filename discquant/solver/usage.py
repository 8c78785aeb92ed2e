# SPDX-License-Identifier: Apache-2.0
"""Which experts the original model never uses on the calibration text: nothing can be learnt about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from discquant.solver.chain import Chain, Prepared
from discquant.solver.experts import RoutedInputs
from discquant.solver.weight_ref import WeightRef


def _held_bytes(batch: Prepared) -> int:
    """Return what a micro-batch keeps in memory: its hidden states, and what its blocks are called with."""
    tensors = [leaf for leaf in tree_leaves((batch.hidden, batch.calls)) if isinstance(leaf, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def group_bytes(chain: Chain) -> int:
    """Return how much micro-batches that pass a block together may keep: as much as the largest block's weights.

    A plan counts those several times for the solve (state, student, gradient); nothing of that exists yet.
    """
    return max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in chain.blocks)


def _groups(batches: Iterable[Prepared], most: int) -> Iterator[list[Prepared]]:
    """Yield micro-batches in groups that keep no more than `most` bytes, but of one at least."""
    group: list[Prepared] = []
    room = most
    for batch in batches:
        size = _held_bytes(batch)
        if group and size > room:
            yield group
            group, room = [], most
        group.append(batch)
        room -= size
    if group:
        yield group


@torch.no_grad()
def unseen_experts(chain: Chain, batches: Iterable[Prepared]) -> frozenset[str]:
    """Return the names of expert matrices that no counted token reaches in the original model.

    Args:
        chain: Model; without experts nothing is run.
        batches: Micro-batches, made one at a time; no more are run than it takes to see every expert.

    Returns:
        Names as in `WeightRef`.
    """
    owned: dict[str, list[WeightRef]] = {}
    for refs in chain.weights:
        for ref in refs:
            if ref.part is not None:
                owned.setdefault(ref.part.owner, []).append(ref)
    if not owned:
        return frozenset()
    watches: dict[str, RoutedInputs] = {}

    def unseen() -> frozenset[str]:
        return frozenset(
            ref.name
            for owner, refs in owned.items()
            for ref in refs
            if ref.part is not None and ref.part.expert not in watches[owner].tokens
        )

    try:
        for owner, refs in owned.items():
            watches[owner] = RoutedInputs(chain.model.get_submodule(owner), refs, hessians=False)
        for group in _groups(batches, group_bytes(chain)):
            # Block outermost: where blocks are read from a file or come to the device, each does once per group.
            for index in range(len(chain.blocks)):
                with chain.opened(index):
                    for place, batch in enumerate(group):
                        for watch in watches.values():
                            watch.mask = batch.mask
                        hidden = chain.run_block(index, batch.hidden, batch.calls[index])
                        group[place] = batch._replace(hidden=hidden)
            if not unseen():
                break
    finally:
        for watch in watches.values():
            watch.remove()
    return unseen()
