# SPDX-License-Identifier: Apache-2.0
"""Samples from the model: equal to plain sampling without a cache, independent of batching, seeded, continued."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from discquant.calibration import load_windows, sampling
from discquant.errors import CalibrationError


def naive(model: Any, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """One row at a time, the whole text through the model for every token, the distribution inverted by a loop."""
    uniform = torch.rand(
        (nsamples, seqlen), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    rows = []
    for row in range(nsamples):
        ids = [1]
        for place in range(1, seqlen):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            left = float(uniform[row, place])
            probabilities = torch.softmax(logits.double(), 0).tolist()
            token = 0
            while left >= probabilities[token]:
                left -= probabilities[token]
                token += 1
            ids.append(1 if ids[-1] == 2 else token)
        rows.append(ids)
    return torch.tensor(rows)


def test_matches_sampling_without_cache(model: Any) -> None:
    assert torch.equal(sampling.sample(model, None, nsamples=3, seqlen=12, seed=5), naive(model, 3, 12, 5))


def test_rows_at_once_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = sampling.sample(model, None, nsamples=5, seqlen=16, seed=1)
    monkeypatch.setattr(sampling, "CACHE_BYTES", 1)
    assert sampling.rows_at_once(sampling.cache_elements(model.config), 16, 4) == 1
    assert torch.equal(sampling.sample(model, None, nsamples=5, seqlen=16, seed=1), together)


def test_seed_and_mode(model: Any) -> None:
    model.train()
    one, again, other = (
        load_windows("self", None, nsamples=4, seqlen=12, seed=s, model=model) for s in (1, 1, 2)
    )
    assert model.training
    model.eval()
    assert one.digest == again.digest
    assert one.digest != other.digest
    assert bool((one.input_ids[:, 0] == 1).all())
    assert bool(one.mask.all())


def test_a_new_text_begins_after_the_end(model: Any) -> None:
    ending = copy.deepcopy(model)
    with torch.no_grad():
        ending.lm_head.weight.zero_()  # uniform: the end token comes about every 104th time
    ids = sampling.sample(ending, None, nsamples=60, seqlen=20, seed=0)
    ended = ids[:, :-1] == 2
    assert int(ended.sum()) > 0
    assert bool((ids[:, 1:][ended] == 1).all()), "a begin token follows every end token"
    # Elsewhere both are drawn freely: each 1/104 of some 1130 draws, standard deviation 0.0029.
    for token in (1, 2):
        share = float((ids[:, 1:][~ended] == token).double().mean())
        assert abs(share - 1 / 104) < 5 * 0.0029


def test_draw_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, float("-inf"), 1.0]])
    draws = 20000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    counts = torch.bincount(sampling._draw(logits.expand(draws, -1), uniform), minlength=4) / draws
    # Evenly spaced numbers hit every interval to within one of them.
    assert (
        float((counts - torch.softmax(logits[0], 0)).abs().max())
        <= 1 / draws + torch.finfo(torch.float32).eps
    )
    assert counts[2] == 0
    edges = sampling._draw(
        torch.tensor([[float("-inf"), 0.0, float("-inf")]] * 2),
        torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64),
    )
    assert edges.tolist() == [1, 1]


def test_rejects(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite at position 1"):
        sampling.sample(broken, None, nsamples=2, seqlen=4)
    for bias in ([0.0, float("inf"), float("-inf")], [float("-inf")] * 3):
        head = torch.nn.Linear(32, 3)
        head.bias.data = torch.tensor(bias)
        broken.lm_head = head
        with pytest.raises(CalibrationError, match="not finite at position 1"):
            sampling.sample(broken, None, nsamples=2, seqlen=4)
    head.bias.data = torch.tensor([0.0, 0.0, float("-inf")])
    assert int(sampling.sample(broken, None, nsamples=2, seqlen=8).max()) < 2
    nameless = copy.deepcopy(model)
    nameless.config.bos_token_id = nameless.config.eos_token_id = None
    with pytest.raises(CalibrationError, match="names neither"):
        sampling.sample(nameless, None, nsamples=2, seqlen=4)
