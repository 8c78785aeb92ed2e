# SPDX-License-Identifier: Apache-2.0
"""Micro-batches: what their blocks are called with, and that it is in memory once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from discquant.solver.chain import DecoderChain, Prepared
from discquant.solver.rows import TokenRows


def masks_of(batches: Sequence[Prepared], length: int) -> dict[int, Tensor]:
    """The tensors [..., length, length] of all calls, by their storage."""
    leaves = [leaf for batch in batches for leaf in tree_leaves(batch.calls) if isinstance(leaf, Tensor)]
    return {t.untyped_storage().data_ptr(): t for t in leaves if t.shape[-2:] == (length, length)}


def test_masks_of_eager_attention_are_held_once(make_model: Callable[..., Any]) -> None:
    """One per kind of attention and size of a micro-batch, not one per micro-batch: they are far wider than states."""
    model = make_model("gemma2-softcap")
    assert model.config._attn_implementation == "eager"
    chain, ids = DecoderChain(model), torch.randint(3, 61, (11, 12))
    rows = TokenRows(chain, ids, None, 2)
    one = masks_of(rows.batches(range(2)), 12)
    assert one and {len(mask) for mask in one.values()} == {2}
    assert len(masks_of(rows.batches(range(10)), 12)) == len(one)
    assert len(masks_of(rows.batches(range(11)), 12)) == 2 * len(one)  # the last has one row
    assert len(masks_of(list(rows.stream()), 12)) == 2 * len(one)
    for number, batch in enumerate(rows.batches(range(11))):
        alone = chain.prepare(ids[2 * number : 2 * number + 2])
        assert torch.equal(chain.teacher_output(batch), chain.teacher_output(alone))


def test_what_differs_stays_apart(make_model: Callable[..., Any]) -> None:
    """What blocks get of the windows themselves is each micro-batch's own."""
    chain, ids = DecoderChain(make_model("llama")), torch.randint(3, 61, (6, 12))
    prepare = chain.prepare

    def with_ids(inputs: Tensor, mask: Tensor | None = None) -> Prepared:
        made = prepare(inputs, mask)
        return made._replace(calls=[call._replace(args=(inputs,)) for call in made.calls])

    chain.prepare = with_ids  # type: ignore[method-assign]
    batches = TokenRows(chain, ids, None, 2).batches(range(6))
    assert all(torch.equal(call.args[0], batch.inputs) for batch in batches for call in batch.calls)
