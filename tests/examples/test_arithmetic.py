# SPDX-License-Identifier: Apache-2.0
"""The generator of word problems: disjoint splits, right arithmetic, the same problems on every machine."""

from __future__ import annotations

import hashlib
import re

import pytest

from discquant.calibration.arithmetic import (
    END,
    LARGEST,
    SPLITS,
    TEXT_SHARE,
    Split,
    calibration_documents,
    document,
    extract_answer,
    problems,
    prompt,
    stdlib_text,
)

STEP = re.compile(r"(\d+)([-+*])(\d+)(?:: ([\d ]+))? = (\d+)")


def test_splits_share_no_problem() -> None:
    """Thousands of problems per split, of several seeds, without one in common."""
    questions = {
        split: {problem.question for seed in range(3) for problem in problems(split, 2000, seed)}
        for split in SPLITS
    }
    assert all(len(found) > 5000 for found in questions.values())
    assert not questions["train"] & questions["heldout"]
    assert not questions["train"] & questions["calibration"]
    assert not questions["calibration"] & questions["heldout"]


def test_splits_of_the_library_share_no_document() -> None:
    """Modules are split whole; only boilerplate that modules share word for word could recur, and none may."""
    texts = {split: set(stdlib_text(split)) for split in SPLITS}
    assert all(len(found) > 200 for found in texts.values())
    for one, other in (("train", "heldout"), ("train", "calibration"), ("calibration", "heldout")):
        assert not {text for text in texts[one] & texts[other] if len(text) > 200}  # type: ignore[index]


def check_columns(left: int, operator: str, right: int, columns: list[str], result: int) -> None:
    """Each column's last digit is the result's, and the columns, weighted by place, make up the result."""
    assert len(columns) == max(len(str(left)), len(str(right)))
    values = [int(column) for column in columns]
    for place, value in enumerate(values):
        assert value % 10 == result // 10**place % 10
        pair = sum(number // 10**place % 10 * (1 if operator == "+" else -1) for number in (right,))
        pair += left // 10**place % 10
        # The rest is the carry or borrow, of which there is one from the column before at most.
        assert (value - pair) in ((0, 1) if operator == "+" else (0, -1, 10, 9))
    assert all(value < 20 if operator == "+" else value < 10 for value in values)
    digits = "".join(str(value % 10) for value in reversed(values))
    carried = "1" if operator == "+" and values[-1] > 9 else ""
    assert int(carried + digits) == result


@pytest.mark.parametrize("split", SPLITS)
def test_worked_steps_are_right(split: Split) -> None:
    """Each step holds, each operand is in the question or an earlier result, the last result is the answer."""
    for problem in problems(split, 2000, seed=7):
        *steps, final = problem.solution.split("\n")
        assert 2 <= len(steps) <= 6
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        for step in steps:
            match = STEP.fullmatch(step)
            assert match, step
            left, operator, right, columns, result = (
                int(match[1]),
                match[2],
                int(match[3]),
                match[4],
                int(match[5]),
            )
            assert {"+": left + right, "-": left - right, "*": left * right}[operator] == result
            assert {left, right} <= known, problem
            assert 0 <= result <= LARGEST
            assert (columns is None) == (operator == "*")
            if columns:
                check_columns(left, operator, right, columns.split(" "), result)
            known.add(result)
        assert result == problem.answer
        assert final == f"#### {problem.answer}"


def test_every_number_of_the_question_is_used() -> None:
    """No story holds a number that its solution forgets."""
    for problem in problems("calibration", 1000, seed=3):
        used = {
            number for step in STEP.findall(problem.solution) for number in (step[0], step[2])
        }  # the operands
        assert set(re.findall(r"\d+", problem.question)) <= used, problem


def test_a_story_has_one_meaning() -> None:
    """The hero never trades with himself, and the same question never has two answers."""
    answers: dict[str, int] = {}
    for problem in problems("train", 3000, seed=5):
        assert answers.setdefault(problem.question, problem.answer) == problem.answer
        hero = problem.question.split()[0]
        assert not re.search(rf"\b(to|from|by|with) {hero}\b", problem.question), problem


def test_frozen_vector() -> None:
    """Problems are the same on every machine: a digest of 300 of them, and one in full."""
    text = "".join(document(problem) for split in SPLITS for problem in problems(split, 100, seed=11))
    assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == "b41b31224bde4b93"
    first = problems("heldout", 1)[0]
    assert document(first) == (
        "Question: A shop has 5 cases with 8 nuts each and 68 loose nuts. How many nuts are there now?\n"
        "Answer:\n"
        "5*8 = 40\n"
        "40+68: 8 10 = 108\n"
        "#### 108\n"
        "</s>"
    )


def test_a_longer_list_begins_with_the_shorter() -> None:
    """So that 60 of the 500 held-out problems are the first 60."""
    assert problems("heldout", 200)[:60] == problems("heldout", 60)
    assert problems("heldout", 60) != problems("heldout", 60, seed=1)


def test_document_holds_the_prompt() -> None:
    """A document is what the model reads, then what it should write."""
    problem = problems("heldout", 1)[0]
    assert document(problem) == f"{prompt(problem)}{problem.solution}\n{END}"
    assert extract_answer(document(problem)) == problem.answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("1 + 2 = 3\n#### 3\n", 3), ("#### 44\n#### 45", 44), ("####7", 7), ("#### -3", -3), ("44", None), ("####", None),
     ("", None), ("#### many", None)],
)  # fmt: skip
def test_extract_answer(text: str, answer: int | None) -> None:
    """The first final line counts; nothing else does."""
    assert extract_answer(text) == answer


def test_calibration_documents_hold_the_mix() -> None:
    """30 % of the characters are text, at every length worth the name, and no problem of another split."""
    documents = calibration_documents("calibration", 600)
    assert documents == calibration_documents("calibration", 600)
    assert documents[:200] == calibration_documents("calibration", 200)
    assert documents != calibration_documents("calibration", 600, seed=1)
    assert all(text.endswith(END) for text in documents)
    stories = {document(problem) for problem in problems("calibration", 600)}
    texts = set(stdlib_text("calibration") + stdlib_text("train"))
    assert all(text in stories or text in texts for text in documents)
    for count in (100, 600):
        characters = sum(map(len, documents[:count]))
        share = sum(len(text) for text in documents[:count] if text in texts) / characters
        # One document more or less is all that a prefix can be off by.
        assert abs(share - TEXT_SHARE) <= 1000 / characters


@pytest.mark.parametrize("function", [problems, calibration_documents])
def test_bad_arguments(function) -> None:  # type: ignore[no-untyped-def]
    """A wrong split and a negative count are refused in one sentence."""
    with pytest.raises(ValueError, match="split must be one of train, calibration, heldout, got 'test'"):
        function("test", 1)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        function("train", -1)
    with pytest.raises(ValueError, match="split must be one of"):
        stdlib_text("test")  # type: ignore[arg-type]
    assert function("heldout", 0) == []
