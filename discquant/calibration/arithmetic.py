# SPDX-License-Identifier: Apache-2.0
"""Multi-step arithmetic word problems with worked steps, and the standard library's text beside them.

The bundled model is trained, calibrated and judged on what this module generates. A problem's split
is a hash of its own question, so no two splits can share a problem whatever the seeds are.
Pure Python: nothing here needs torch, a network or a file outside the Python installation.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "heldout"]

SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")
END = "</s>"  # the end-of-sequence token of the bundled tokenizer, which closes every document
TEXT_SHARE = 0.3  # share of the characters of `calibration_documents` that is not problems
TEXT_CHARACTERS = 700  # a text document is cut at the line end before this, about 256 tokens
LARGEST = 999  # no value of a solution is above it

NAMES = (
    "Ada Alan Anna Ben Carl Clara Dan Diana Emma Erik Eva Finn Grace Hugo Ida Ivan Jack Julia Karl Kate Leo "
    "Lena Lily Marco Maria Max Mia Nina Noah Olga Omar Otto Paul Petra Rosa Ruth Sam Sara Tim Tom Uma Vera Zoe"
).split()
THINGS = (
    "apples books bottles buttons cakes candles cards coins cups eggs flowers keys lamps lemons letters "
    "marbles nails nuts oranges pears pencils pens photos plates plums seeds shells songs stamps stickers "
    "stones tickets tiles toys tulips"
).split()
BOXES = "bags baskets boxes bowls cases crates jars packs rows sacks shelves trays".split()
GOODS = "bag ball book brush candle card chair clock cup hat jar kite lamp map mug pan pen plate ring rug toy".split()

_FINAL = re.compile(r"####\s*(-?\d+)")


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question: The story and what is asked, one line.
        solution: One line per step, `a*b = c` or, with each column's value from the units on, `96+19: 15 11 = 115`;
            then `#### answer`.
        answer: The number asked for, 0 to 999.
    """

    question: str
    solution: str
    answer: int


@dataclass
class _Story:
    """A story under construction: sentences so far, worked steps so far, and the running total."""

    sentences: list[str]
    steps: list[str]
    total: int

    def step(self, left: int, operator: str, right: int) -> int:
        """Work `left operator right`, keep the line, return the result."""
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        columns = "" if operator == "*" else f": {_columns(left, operator, right)}"
        self.steps.append(f"{left}{operator}{right}{columns} = {result}")
        return result


def _columns(left: int, operator: str, right: int) -> str:
    """The value of each column from the units on: `15 11` for 96+19, carry added; `6 9 0` for 115-19, borrow taken.

    The digits and the carry that make a value are left for the model to keep in mind.
    """
    values, carry = [], 0
    for place in range(max(len(str(left)), len(str(right)))):
        one, two = left // 10**place % 10, right // 10**place % 10
        if operator == "+":
            value = one + two + carry
            carry = value // 10
        else:
            value = one - two - carry
            carry = int(value < 0)
            value += 10 * carry
        values.append(str(value))
    return " ".join(values)


def _amount(rng: random.Random) -> int:
    """A number worth calculating with: two digits, one time in five three."""
    return rng.randint(100, 399) if rng.random() < 0.2 else rng.randint(11, 99)


def _article(noun: str) -> str:
    return f"An {noun}" if noun[0] in "aeiou" else f"A {noun}"


def _gain(story: _Story, rng: random.Random, thing: str) -> None:
    amount = _amount(rng)
    giver = _other(story, rng)
    verb = rng.choice((f"gets {amount} more from {giver}", f"finds {amount} more", f"buys {amount} more",
                       f"is given {amount} {thing} by {giver}", f"adds {amount} {thing}"))  # fmt: skip
    story.sentences.append(f"{_then(story, rng)} {verb}.")
    story.total = story.step(story.total, "+", amount)


def _loss(story: _Story, rng: random.Random, thing: str) -> None:
    amount = rng.randint(11, min(story.total - 1, 299 if rng.random() < 0.2 else 99))
    taker = _other(story, rng)
    verb = rng.choice((f"gives {amount} to {taker}", f"loses {amount} of them", f"sells {amount} {thing}",
                       f"puts away {amount}", f"leaves {amount} {thing} with {taker}"))  # fmt: skip
    story.sentences.append(f"{_then(story, rng)} {verb}.")
    story.total = story.step(story.total, "-", amount)


def _bundle(story: _Story, rng: random.Random, thing: str) -> None:
    count, each = rng.randint(2, 9), rng.randint(3, 12)
    box = rng.choice(BOXES)
    product = story.step(count, "*", each)
    if product < story.total and rng.random() < 0.5:
        verb = rng.choice(
            (f"sells {count} {box} of {each} {thing}", f"gives away {count} {box} with {each} in each")
        )
        story.total = story.step(story.total, "-", product)
    else:
        verb = rng.choice(
            (f"buys {count} {box} of {each} {thing}", f"finds {count} {box} with {each} in each")
        )
        story.total = story.step(story.total, "+", product)
    story.sentences.append(f"{_then(story, rng)} {verb}.")


def _other(story: _Story, rng: random.Random) -> str:
    """Anyone but the person whom the story is about."""
    return rng.choice([name for name in NAMES if name != story.sentences[0].split()[0]])


def _then(story: _Story, rng: random.Random) -> str:
    """How the next event's sentence opens."""
    return rng.choice(("Then {0}", "Later {0}", "Next, {0}", "{0} also")).format(
        story.sentences[0].split()[0]
    )


def _running_total(rng: random.Random) -> tuple[str, list[str], int]:
    """Someone has things, and three to five events change how many."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start = _amount(rng)
    story = _Story([f"{name} {rng.choice(('has', 'starts with', 'owns'))} {start} {thing}."], [], start)
    for _ in range(rng.randint(3, 5)):
        events: list[Callable[[_Story, random.Random, str], None]] = [_gain]
        if story.total > 20:
            events.append(_loss)
        if len(story.steps) < 5:  # a bundle takes two steps, and a problem has at most six
            events.append(_bundle)
        if len(story.steps) < 6:
            rng.choice(events)(story, rng, thing)
    story.sentences.append(f"How many {thing} does {name} have {rng.choice(('now', 'in the end', 'left'))}?")
    return " ".join(story.sentences), story.steps, story.total


def _comparison(rng: random.Random) -> tuple[str, list[str], int]:
    """Two or three people own things relative to each other; how many together?"""
    first, second, third = rng.sample(NAMES, 3)
    thing = rng.choice(THINGS)
    verb = rng.choice(("has", "collects", "counts", "sells"))
    one, difference = _amount(rng), rng.randint(11, 99)
    more = one <= difference or rng.random() < 0.5
    story = _Story([f"{first} {verb} {one} {thing}."], [], 0)
    story.sentences.append(f"{second} {verb} {difference} {'more' if more else 'fewer'} than {first}.")
    two = story.step(one, "+" if more else "-", difference)
    total = story.step(one, "+", two)
    if rng.random() < 0.5:
        three = _amount(rng)
        story.sentences.append(f"{third} {verb} {three}.")
        total = story.step(total, "+", three)
    story.sentences.append(f"How many {thing} is that {rng.choice(('together', 'in all', 'altogether'))}?")
    return " ".join(story.sentences), story.steps, total


def _shopping(rng: random.Random) -> tuple[str, list[str], int]:
    """Two kinds of goods at a price each; the total, or the change."""
    name = rng.choice(NAMES)
    one, two = rng.sample(GOODS, 2)
    price_one, price_two = rng.randint(3, 12), rng.randint(3, 12)
    count_one, count_two = rng.randint(2, 9), rng.randint(2, 5)
    story = _Story(
        [f"{_article(one)} costs {price_one} coins and {_article(two).lower()} {price_two}."], [], 0
    )
    story.sentences.append(
        f"{name} {rng.choice(('buys', 'takes', 'orders'))} {count_one} {one}s and {count_two} {two}s"
    )
    left, right = story.step(count_one, "*", price_one), story.step(count_two, "*", price_two)
    total = story.step(left, "+", right)
    if rng.random() < 0.6:
        paid = min(LARGEST, total + rng.randint(1, 150))
        story.sentences[-1] += f" and pays with {paid} coins."
        story.sentences.append(f"How many coins does {name} get back?")
        total = story.step(paid, "-", total)
    else:
        story.sentences[-1] += "."
        story.sentences.append(f"What does {name} pay?")
    return " ".join(story.sentences), story.steps, total


def _containers(rng: random.Random) -> tuple[str, list[str], int]:
    """Full boxes and loose things beside them, of which some may go."""
    thing, box = rng.choice(THINGS), rng.choice(BOXES)
    count, each, loose = rng.randint(2, 9), rng.randint(3, 12), _amount(rng)
    place = rng.choice(("A shop", "A farm", "A school", "A store", "A club", "A library"))
    story = _Story([f"{place} has {count} {box} with {each} {thing} each and {loose} loose {thing}."], [], 0)
    total = story.step(story.step(count, "*", each), "+", loose)
    if rng.random() < 0.7:
        gone = rng.randint(11, min(99, total - 1))
        story.sentences.append(
            rng.choice((f"{gone} are sold.", f"{gone} of them break.", f"{gone} are given away."))
        )
        total = story.step(total, "-", gone)
        if rng.random() < 0.4:
            new = rng.randint(11, 99)
            story.sentences.append(f"{new} new ones come in.")
            total = story.step(total, "+", new)
    story.sentences.append(f"How many {thing} are there {rng.choice(('now', 'in the end'))}?")
    return " ".join(story.sentences), story.steps, total


_FAMILIES = (_running_total, _running_total, _comparison, _shopping, _containers)


def _split_of(text: str) -> Split:
    """The split that a question or a module name belongs to: 80 / 10 / 10 by its BLAKE2b digest."""
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 10
    return "heldout" if bucket == 0 else "calibration" if bucket == 1 else "train"


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """Generate `count` different problems of one split.

    Args:
        split: "train", "calibration" or "heldout"; no question is in two of them.
        count: How many, 0 or more. A longer list begins with the shorter one of the same seed.
        seed: Any integer; the same on every machine and Python version from 3.10.

    Returns:
        The problems, no question twice.

    Raises:
        ValueError: `split` is none of the three, or `count` is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"problems: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if count < 0:
        raise ValueError(f"problems: count must be at least 0, got {count}")
    rng = random.Random(f"{split}:{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        question, steps, answer = rng.choice(_FAMILIES)(rng)
        # A story whose numbers left the range is dropped whole: clipping one would bend its arithmetic.
        if not 0 <= answer <= LARGEST or any(
            int(number) > LARGEST for number in re.findall(r"\d+", " ".join(steps))
        ):
            continue
        if question not in found and _split_of(question) == split:
            found[question] = Problem(question, "\n".join([*steps, f"#### {answer}"]), answer)
    return list(found.values())


def prompt(problem: Problem) -> str:
    """What the model is given: the question, and the word after which its solution begins."""
    return f"Question: {problem.question}\nAnswer:\n"


def document(problem: Problem) -> str:
    """The whole text of a problem as the model was trained on it: prompt, solution, end token."""
    return f"{prompt(problem)}{problem.solution}\n{END}"


def extract_answer(text: str) -> int | None:
    """The final answer that a text gives.

    Args:
        text: What the model wrote; anything after the first `####` line is ignored.

    Returns:
        The number behind the first `####`, or None where there is none.
    """
    match = _FINAL.search(text)
    return int(match.group(1)) if match else None


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Every source file of the standard library with the name of its top-level module, sorted."""
    # Tables, generated data, tests and what distributions move into packages of their own.
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "turtledemo",
               "ensurepip", "pydoc_data", "__pycache__", "tkinter", "distutils", "__phello__"}  # fmt: skip
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skipped.intersection(parts) and not any("-" in part for part in parts) and parts[0][0] != "_":
            yield parts[0].removesuffix(".py"), path


def stdlib_text(split: Split) -> list[str]:
    """English and code that every machine has: the source and docstrings of Python's standard library.

    Args:
        split: Which modules; a module (a package with all its files) is wholly in one split.

    Returns:
        Documents of at most about 700 characters, cut at line ends, each closed by the end token.

    Raises:
        ValueError: `split` is none of the three.
        FileNotFoundError: This Python has no standard library in source form.

    Note:
        The text is that of the running Python, so it differs between Python versions. Problems do not.
    """
    if split not in SPLITS:
        raise ValueError(f"stdlib_text: split must be one of {', '.join(SPLITS)}, got {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for module, path in _modules(root):
        if _split_of(module) != split:
            continue
        piece: list[str] = []
        size = 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if size and size + len(line) > TEXT_CHARACTERS:
                documents.append("".join(piece) + END)
                piece, size = [], 0
            piece.append(line[:TEXT_CHARACTERS])
            size += len(piece[-1])
        if size:
            documents.append("".join(piece) + END)
    if not documents:
        raise FileNotFoundError(f"stdlib_text: no Python sources of the {split} split under {root}")
    return documents


def calibration_documents(split: Split, count: int, seed: int = 0) -> list[str]:
    """The mix that the bundled model was trained on: problems, and text for 30 % of the characters.

    Args:
        split: Where both the problems and the text come from. Calibration reads the training split's text too: a tenth
            of the modules is so little that a solve learns it by heart.
        count: How many documents.
        seed: Chooses the problems and the order of the text.

    Returns:
        The documents in the order to read them in, each closed by the end token.

    Raises:
        ValueError: As `problems`.
        FileNotFoundError: As `stdlib_text`.
    """
    stories = iter(problems(split, count, seed))
    texts = stdlib_text(split)
    if split == "calibration":
        texts += stdlib_text("train")
    random.Random(f"{split}:{seed}:text").shuffle(texts)
    documents: list[str] = []
    used = text_characters = characters = 0
    for _ in range(count):
        # Whichever kind is behind its share comes next, so that every prefix is mixed.
        if text_characters < TEXT_SHARE * characters:
            text = texts[used % len(texts)]
            used += 1
            text_characters += len(text)
        else:
            text = document(next(stories))
        characters += len(text)
        documents.append(text)
    return documents
