# SPDX-License-Identifier: Apache-2.0
"""Which experts the original model never uses on the calibration text: nothing can be learnt about them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from discquant.solver.chain import Chain, Prepared
from discquant.solver.experts import RoutedInputs
from discquant.solver.weight_ref import WeightRef


@torch.no_grad()
def unseen_experts(chain: Chain, batches: Iterable[Prepared]) -> frozenset[str]:
    """Return the names of expert matrices that no counted token reaches in the original model.

    Args:
        chain: Model; without experts nothing is run.
        batches: Micro-batches, made one at a time.

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
    try:
        for owner, refs in owned.items():
            watches[owner] = RoutedInputs(chain.model.get_submodule(owner), refs, hessians=False)
        for batch in batches:
            for watch in watches.values():
                watch.mask = batch.mask
            chain.teacher_output(batch)
    finally:
        for watch in watches.values():
            watch.remove()
    return frozenset(
        ref.name
        for owner, refs in owned.items()
        for ref in refs
        if ref.part is not None and ref.part.expert not in watches[owner].tokens
    )
