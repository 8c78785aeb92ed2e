# SPDX-License-Identifier: Apache-2.0
"""Tokenizers in GGUF: byte-level ones by the names of their expressions, SentencePiece ones by scores of pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from discquant.errors import UnrepresentableError
from discquant.formats.gguf_tokenizer import GgufVocabulary, read_vocabulary

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


PIECES = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8}


def vocabulary(folder: Path, data: dict[str, Any], rows: int = 12) -> GgufVocabulary:
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return read_vocabulary(folder, rows)


def byte_level(*steps: dict[str, Any], whole_words: bool = False) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": [["a", "b"]],
        "ignore_merges": whole_words,
    }
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps]}, "model": model}


def read(folder: Path, expression: str, whole_words: bool) -> GgufVocabulary:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return vocabulary(folder, byte_level(split, level, whole_words=whole_words))


def sentence_pieces() -> dict[str, Any]:
    return {
        "added_tokens": [{"id": n, "content": t, "special": True} for t, n in PIECES.items() if n < 3],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": PIECES, "merges": ["a b", "▁ ab"],
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "expression, whole_words, name",
    [
        (LLAMA3, True, "llama-bpe"),
        (LLAMA3, False, "dbrx"),  # Phi-4
        (QWEN2, False, "qwen2"),
        (TEKKEN, True, "tekken"),  # Mistral Nemo
        (GPT4O, False, "gpt-4o"),  # Phi-4-mini
    ],
)
def test_an_expression_has_its_name(expression: str, whole_words: bool, name: str, tmp_path: Path) -> None:
    found = read(tmp_path, expression, whole_words)
    assert (found.model, found.pre, found.warnings) == ("gpt2", name, [])


@pytest.mark.parametrize("expression, whole_words, name", [(QWEN2, True, "qwen2"), (TEKKEN, False, "tekken")])
def test_words_that_llama_cpp_takes_otherwise_are_told(
    expression: str, whole_words: bool, name: str, tmp_path: Path
) -> None:
    found = read(tmp_path, expression, whole_words)
    assert found.pre == name
    assert found.warnings == [
        f"the tokenizer's ignore_merges is {whole_words}, that of llama.cpp's {name} {not whole_words}: some words may "
        "be split differently"
    ]


def test_steps_that_llama_cpp_knows_by_a_name(tmp_path: Path) -> None:
    level = {"type": "ByteLevel", "use_regex": True}
    assert (
        vocabulary(tmp_path, byte_level({"type": "Digits", "individual_digits": True}, level)).pre == "smollm"
    )
    assert vocabulary(tmp_path, byte_level(level)).pre == "gpt-2"
    other = vocabulary(tmp_path, byte_level({"type": "Punctuation"}, level))
    assert other.pre == "default" and "split differently" in other.warnings[0]


def test_the_earlier_merge_scores_higher(tmp_path: Path) -> None:
    """What no merge makes comes last; a control token, a byte and a row without a token are told apart."""
    found = vocabulary(tmp_path, sentence_pieces())
    assert found.model == "llama" and found.space_prefix
    assert found.types == [2, 3, 3, 6, 1, 1, 1, 1, 1, 5, 5, 5]
    assert found.scores[7] > found.scores[8] > found.scores[5] == found.scores[4]


def test_gemma_puts_no_space_before_the_text(tmp_path: Path) -> None:
    data = sentence_pieces()
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    data["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    assert not vocabulary(tmp_path, data).space_prefix


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError, match="no row"):
        vocabulary(tmp_path, sentence_pieces(), rows=8)
    with pytest.raises(UnrepresentableError, match="WordPiece"):
        vocabulary(tmp_path, {"model": {"type": "WordPiece"}})
    (tmp_path / "tokenizer.json").unlink()
    assert read_vocabulary(tmp_path, 8).model == "no_vocab"
