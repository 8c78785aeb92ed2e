# SPDX-License-Identifier: Apache-2.0
"""Byte-level tokenizers by the names under which llama.cpp holds their expressions.

The expressions are those of the models' own tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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


def read(folder: Path, expression: str, whole_words: bool) -> GgufVocabulary:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": [["a", "b"]],
        "ignore_merges": whole_words,
    }
    data = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return read_vocabulary(folder, 4)


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
