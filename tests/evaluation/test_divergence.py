# SPDX-License-Identifier: Apache-2.0
"""Divergence against an oracle written out position by position, its edge cases, and what counts."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from discquant.calibration import Windows
from discquant.evaluation import compare_models, divergence
from discquant.evaluation.divergence import Divergence, token_measures
from discquant.modules import PackedLinear


class Table(nn.Module):
    """A language model that looks its logits up by token: float32 [vocab, vocab]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.logits[input_ids]


def oracle(original: Any, candidate: Any, windows: Windows) -> dict[str, float]:
    """Loops over windows and positions in Python floats."""
    kls, agree, nll, nll_original, sums = [], [], [], [], []
    for ids, mask in zip(windows.input_ids, windows.mask, strict=True):
        with torch.no_grad():
            rows = [
                torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1).tolist()
                for model in (original, candidate)
            ]
        window = []
        for place in range(len(ids)):
            if not mask[place]:
                continue
            p, q = rows[0][place], rows[1][place]
            window.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            agree.append(p.index(max(p)) == q.index(max(q)))
            if place + 1 < len(ids) and mask[place + 1]:
                nll.append(-q[ids[place + 1]])
                nll_original.append(-p[ids[place + 1]])
        kls += window
        sums.append((math.fsum(window), len(window)))
    mean = math.fsum(kls) / len(kls)
    used = [(total - mean * count) ** 2 for total, count in sums if count]
    return {
        "kl_mean": mean,
        "kl_stderr": math.sqrt(len(used) / (len(used) - 1) * math.fsum(used)) / len(kls),
        "kl_median": statistics.median(kls),
        "kl_p99": float(np.quantile(kls, 0.99)),
        "kl_p999": float(np.quantile(kls, 0.999)),
        "kl_max": max(kls),
        "top1": statistics.fmean(agree),
        "perplexity": math.exp(statistics.fmean(nll)),
        "perplexity_original": math.exp(statistics.fmean(nll_original)),
        "perplexity_ratio": math.exp(statistics.fmean(nll) - statistics.fmean(nll_original)),
        "tokens": len(kls),
        "nonfinite": 0,
    }


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Five windows, one of them with a padded tail, one with a single token, one of nothing but padding."""
    ids = torch.randint(3, 104, (5, 12), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 8:] = mask[3, 1:] = mask[4] = False
    return Windows.make(ids.masked_fill(~mask, 0), mask)


def test_matches_oracle(model: Any, noisy: Any, windows: Windows) -> None:
    found = compare_models(model, {"noisy": noisy}, windows, batch_size=2)["noisy"].to_dict()
    expected = oracle(model, noisy, windows)
    assert expected["kl_mean"] > 0
    # Logits of the two runs differ by float32 rounding of the batch; the amplification is that of the measure itself.
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1000 * torch.finfo(torch.float32).eps), key


def test_itself_is_exactly_zero(model: Any, windows: Windows) -> None:
    found = compare_models(model, {"same": copy.deepcopy(model)}, windows)["same"]
    assert (found.kl_mean, found.kl_stderr, found.kl_max, found.top1) == (0.0, 0.0, 0.0, 1.0)
    assert found.perplexity_ratio == 1.0


def test_candidates_do_not_see_each_other(model: Any, noisy: Any, windows: Windows) -> None:
    together = compare_models(model, {"b": noisy, "a": model}, windows)
    alone = compare_models(model, {"b": noisy}, windows)
    assert list(together) == ["b", "a"]
    assert together["b"] == alone["b"]


def test_original_runs_once_per_batch(model: Any, noisy: Any, windows: Windows) -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return model(input_ids=input_ids).logits

    compare_models(Counting(), {"a": noisy, "b": noisy, "c": noisy}, windows, batch_size=2)
    assert Counting.calls == 2  # three batches, the last of nothing but padding


def test_windows_at_once_by_the_head(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a composite model too, whose own configuration names no vocabulary."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 512}
    with torch.device("meta"):
        composite = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text))
    assert getattr(composite.config, "vocab_size", None) is None
    monkeypatch.setattr(divergence, "LOGITS", 3 * windows.seqlen * 512)
    assert divergence.rows_at_once(composite, windows, 8) == 3
    assert divergence.rows_at_once(torch.nn.Identity(), windows, 2) == 2
    codes, step = torch.zeros(512, 32, dtype=torch.uint8), torch.ones(512, 1)
    composite.lm_head = PackedLinear.from_codes(codes, step, num_bits=4, group_size=32)
    assert divergence.rows_at_once(composite, windows, 8) == 3  # a packed head has no weight


def test_padding_content_is_ignored(model: Any, noisy: Any, windows: Windows) -> None:
    other = Windows.make(windows.input_ids.masked_fill(~windows.mask, 77), windows.mask)
    assert compare_models(model, {"a": noisy}, other) == compare_models(model, {"a": noisy}, windows)


def test_modes_are_restored(model: Any, noisy: Any, windows: Windows) -> None:
    trained = copy.deepcopy(noisy).train()
    compare_models(model, {"a": trained}, windows)
    assert trained.training
    assert not model.training


def test_nonfinite_is_counted_and_never_averaged() -> None:
    """Token 2's logits are broken in the candidate; the other positions measure as if it were not there."""
    torch.manual_seed(0)
    table = torch.randn(5, 5)
    ids = torch.tensor([[0, 1, 2, 3], [4, 2, 1, 0]])
    for bad in (float("nan"), float("inf")):
        broken = table + 0.1 * torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
        whole = copy.deepcopy(broken)
        broken[2, 1] = bad
        found = compare_models(Table(table), {"x": Table(broken)}, Windows.make(ids))["x"]
        assert (found.tokens, found.nonfinite) == (8, 2)
        kept = token_measures(table[[0, 1, 3, 4, 1, 0]], whole[[0, 1, 3, 4, 1, 0]], torch.full((6,), -1))
        assert found.kl_mean == pytest.approx(float(kept.kl.mean()), rel=1e-12)
        assert math.isfinite(found.perplexity)
        other = compare_models(Table(broken), {"x": Table(table)}, Windows.make(ids))["x"]
        assert other.nonfinite == 2


def test_nothing_finite() -> None:
    found = compare_models(
        Table(torch.randn(4, 4)),
        {"x": Table(torch.full((4, 4), float("nan")))},
        Windows.make(torch.tensor([[0, 1]])),
    )["x"]
    assert (found.tokens, found.nonfinite) == (2, 2)
    assert found.to_dict()["kl_mean"] is None
    assert found.to_dict()["perplexity"] is None


def test_zero_probabilities() -> None:
    """Entries that the original masks out add nothing; ones that only the candidate masks out are infinite."""
    logits = torch.tensor([[1.0, 2.0, float("-inf")]])
    same = token_measures(logits, logits.clone(), torch.tensor([-1]))
    assert same.kl.tolist() == [0.0]
    assert same.finite.tolist() == [True]
    wider = torch.tensor([[1.0, 2.0, 0.0]])
    assert bool(token_measures(logits, wider, torch.tensor([-1])).finite.all())
    assert token_measures(wider, logits, torch.tensor([-1])).kl.tolist() == [math.inf]
    assert not bool(token_measures(wider, logits, torch.tensor([-1])).finite.any())


def test_small_divergences_are_exact() -> None:
    """KL far below float32's resolution of log-probabilities: second order in a small shift."""
    torch.manual_seed(0)
    logits = torch.randn(50, 64)
    shift = torch.randint(-1, 2, (50, 64)) * 2.0**-13
    moved = (logits * 2.0**10).round() * 2.0**-10  # so that the shift is exact in float32
    found = token_measures(moved, moved + shift, torch.full((50,), -1)).kl
    probability = torch.softmax(moved.double(), -1)
    variance = (probability * shift**2).sum(-1) - (probability * shift).sum(-1) ** 2
    assert bool(((found - variance / 2).abs() < 1e-3 * variance).all())
    assert float(found.max()) < 1e-7


@pytest.mark.parametrize("chunk", [1, 104 * 7])
def test_chunks_change_nothing(
    chunk: int, model: Any, noisy: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from discquant.evaluation import divergence

    before = compare_models(model, {"a": noisy}, windows)
    monkeypatch.setattr(divergence, "CHUNK", chunk)
    after = compare_models(model, {"a": noisy}, windows)["a"].to_dict()
    for key, value in before["a"].to_dict().items():
        assert after[key] == pytest.approx(value, rel=1e-12), key


def test_one_window_has_no_standard_error(model: Any, noisy: Any, windows: Windows) -> None:
    found = compare_models(model, {"a": noisy}, windows.rows([0]))["a"]
    assert math.isnan(found.kl_stderr)
    assert found.to_dict()["kl_stderr"] is None


def test_an_enormous_perplexity_is_no_crash() -> None:
    sure = torch.tensor([[2000.0, 0.0], [0.0, 2000.0]])
    found = compare_models(Table(-sure), {"x": Table(sure)}, Windows.make(torch.tensor([[0, 1]])))["x"]
    assert isinstance(found, Divergence)
    assert found.perplexity == math.inf
    assert found.to_dict()["perplexity"] is None


def test_rejects(model: Any, noisy: Any, windows: Windows) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        compare_models(model, {"a": noisy}, windows, batch_size=0)
    with pytest.raises(ValueError, match="must hold a token that counts"):
        compare_models(model, {"a": noisy}, windows.rows([4]))
    with pytest.raises(ValueError, match="the original's vocabulary = 104, got 5"):
        compare_models(model, {"a": Table(torch.zeros(104, 5))}, windows)


def test_a_position_without_target_must_be_finite_too() -> None:
    """Nothing but the KL tells there that the original's logits are no numbers, and it must not be taken for 0."""
    broken, whole = torch.tensor([[1.0, math.nan, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    for one, other in ((broken, whole), (whole, broken)):
        assert not token_measures(one, other, torch.tensor([-1])).finite.any()


def test_a_text_that_the_original_holds_impossible_is_left_out() -> None:
    """Its KL is finite, and the perplexity of the original would be infinite for all text."""
    original, candidate = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[1.0, 2.0, 0.0]])
    found = token_measures(original, candidate, torch.tensor([2]))
    assert found.kl.isfinite().all() and not found.finite.any()


def test_the_first_token_of_a_vocabulary_is_text() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    found = token_measures(logits, logits.flip(1), torch.tensor([0]))
    assert found.nll_original.item() == pytest.approx(-math.log(torch.softmax(logits[0].double(), 0)[0]))
    assert found.nll.item() == pytest.approx(-math.log(torch.softmax(logits[0].double(), 0)[2]))


def test_windows_of_padding_change_no_error(model: Any, noisy: Any, windows: Windows) -> None:
    """Wherever they stand: the standard error is over windows that have something to say."""
    first = compare_models(model, {"a": noisy}, windows.rows([4, 0, 1, 2, 3]))["a"]
    without = compare_models(model, {"a": noisy}, windows.rows([0, 1, 2, 3]))["a"]
    assert first.to_dict() == pytest.approx(without.to_dict(), rel=1e-9)


def test_broken_positions_do_not_agree() -> None:
    """Top-1 is over the finite positions alone."""
    table = torch.eye(3) * 5
    broken = table.clone()
    broken[2, 0] = math.inf
    found = compare_models(Table(table), {"x": Table(broken)}, Windows.make(torch.tensor([[0, 1, 2, 2]])))[
        "x"
    ]
    assert (found.nonfinite, found.top1) == (2, 1.0)


def test_dropout_is_off_while_it_is_measured(model: Any, windows: Windows) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.dropout(model(input_ids=input_ids).logits)

    found = compare_models(Dropping().train(), {"a": Dropping().train()}, windows)["a"]
    assert (found.kl_mean, found.nonfinite) == (0.0, 0)


def test_one_window_at_least_is_taken_at_once(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long windows of a large vocabulary have more logits than may exist at once."""
    monkeypatch.setattr(divergence, "LOGITS", windows.seqlen - 1)
    assert divergence.rows_at_once(nn.Identity(), windows, 8) == 1


def test_a_vocabulary_must_hold_the_largest_token(model: Any, noisy: Any, windows: Windows) -> None:
    """Of ids up to 103, the embedding must have 104 rows."""
    largest = int(windows.input_ids.max())
    short = copy.deepcopy(noisy)
    short.get_input_embeddings().weight = nn.Parameter(noisy.get_input_embeddings().weight[:largest].clone())
    with pytest.raises(ValueError, match=f"got the token id {largest} and a vocabulary of {largest}"):
        compare_models(model, {"a": short}, windows)
