# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding in batches equals decoding each prompt alone; answers are counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from discquant.calibration.arithmetic import problems, prompt
from discquant.evaluation import exact_match
from discquant.evaluation.exact_match import greedy


def alone(model: Any, tokenizer: Any, text: str, max_new_tokens: int) -> str:
    """One prompt, no padding, no cache."""
    ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < max_new_tokens:
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == 2:
                break
            ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_batches_equal_single_prompts(model: Any, tokenizer: Any) -> None:
    texts = ["a", "What is 12+13?", "Question: " + "x" * 40, "What is 12+14?", "zz top", "", "b c"]
    texts.remove("")
    expected = [alone(model, tokenizer, text, 20) for text in texts]
    assert len(set(expected)) > 3, "the texts must not all continue alike"
    for batch_size in (1, 4, 64):
        assert greedy(model, tokenizer, texts, max_new_tokens=20, batch_size=batch_size) == expected


class Script(nn.Module):
    """Writes a fixed text after each prompt, whatever stands before: tests ending, leaving and counting."""

    def __init__(self, tokenizer: Any, lines: dict[str, str], cache: type[Rows] | None = None) -> None:
        super().__init__()
        self.cache = cache or Leaving
        self.dummy = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(eos_token_id=2)
        self.batches: list[int] = []
        self.table = {
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]): [
                *tokenizer(line, add_special_tokens=False)["input_ids"],
                2,
            ]
            for text, line in lines.items()
        }

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Any, use_cache: bool
    ) -> Any:
        cache = past_key_values or self.cache([[] for _ in input_ids])
        for row, new, kept in zip(cache.rows, input_ids, attention_mask, strict=True):
            row += new[kept[-len(new) :].bool()].tolist()
        self.batches.append(len(input_ids))
        logits = torch.zeros(len(input_ids), 1, 104)
        for place, row in enumerate(cache.rows):
            start = next(key for key in self.table if tuple(row[1 : 1 + len(key)]) == key)
            written = len(row) - 1 - len(start)
            line = self.table[start]
            logits[place, 0, line[min(written, len(line) - 1)]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=cache)


class Rows:
    """A cache of the text itself, of which no row leaves."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows


class Leaving(Rows):
    """One whose rows leave."""

    def batch_select_indices(self, kept: torch.Tensor) -> None:
        self.rows = [self.rows[place] for place in kept.tolist()]


def test_rows_leave_when_they_end(tokenizer: Any) -> None:
    model = Script(tokenizer, {"one": "1", "three": "333", "fifty": "5" * 9})
    assert greedy(model, tokenizer, ["three", "one", "fifty"], max_new_tokens=6) == ["333", "1", "555555"]
    assert model.batches == [3, 3, 2, 2, 1, 1]


def test_rows_that_cannot_leave_stay_ended(tokenizer: Any) -> None:
    """What a model goes on to say after its end token is no text, though it be computed."""
    lines = {"one": "1", "three": "333", "fifty": "5" * 9}
    model = Script(tokenizer, lines, Rows)
    for text in ("one", "three"):  # more text, after the end
        line = model.table[tuple(tokenizer(text, add_special_tokens=False)["input_ids"])]
        line += tokenizer("#### 9", add_special_tokens=False)["input_ids"]
    assert greedy(model, tokenizer, ["three", "one", "fifty"], max_new_tokens=6) == ["333", "1", "555555"]
    assert model.batches == [3] * 6


@pytest.mark.parametrize("owner", ["config", "generation_config"])
def test_end_tokens_of_every_owner(owner: str, tokenizer: Any) -> None:
    """Chat models name a second one in their generation settings alone."""
    model = Script(tokenizer, {"one": "1x1"})
    (other,) = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert greedy(model, tokenizer, ["one"], max_new_tokens=6) == ["1x1"]
    setattr(model, owner, SimpleNamespace(eos_token_id=[2, other]))
    assert greedy(model, tokenizer, ["one"], max_new_tokens=6) == ["1"]


def test_exact_match_counts_right_answers(tokenizer: Any) -> None:
    asked = problems("heldout", 4, seed=5)
    lines = {prompt(problem): f"some steps\n#### {problem.answer}\n" for problem in asked}
    lines[prompt(asked[1])] = f"#### {asked[1].answer + 1}\n"
    lines[prompt(asked[2])] = "no answer"
    assert exact_match(Script(tokenizer, lines), tokenizer, asked) == 0.5
    # An answer that is cut off by the limit is not there.
    assert exact_match(Script(tokenizer, lines), tokenizer, asked, max_new_tokens=4) == 0.0


def test_mode_is_restored(model: Any, tokenizer: Any) -> None:
    model.train()
    greedy(model, tokenizer, ["a"], max_new_tokens=1)
    assert model.training
    model.eval()


def test_rejects(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        exact_match(model, tokenizer, [])
    with pytest.raises(ValueError, match="must not be empty"):
        greedy(model, tokenizer, [""])
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        greedy(model, tokenizer, ["a"], max_new_tokens=0, batch_size=4)
