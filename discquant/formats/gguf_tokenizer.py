# SPDX-License-Identifier: Apache-2.0
"""A tokenizer in GGUF: byte-level BPE as `gpt2`, SentencePiece-style BPE with byte fallback as `llama`.

Read from tokenizer.json alone, which every fast tokenizer writes; special tokens and chat template through the gguf
package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from discquant.errors import UnrepresentableError
from discquant.formats.checkpoint import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """Words that change from upper to lower case once, with an ending; digits; the rest."""
    words = (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    return "|".join((*(rf"[^\r\n\p{{L}}\p{{N}}]?{word}{ending}" for word in words), digits, _REST))


# llama.cpp splits text by name, not by expression: the names whose expressions it holds, where a word that is a token
# is taken whole (`ignore_merges`) and where it is not.
_SPLITS = {
    _LLAMA3: ("llama-bpe", "dbrx"),
    _LLAMA3.replace("{1,3}", ""): (None, "qwen2"),
    _GPT2: (None, "gpt-2"),
    _cased("", r"\p{N}"): ("tekken", None),
    _cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"): (None, "gpt-4o"),
}


@dataclass
class GgufVocabulary:
    """What goes into the file's metadata.

    Attributes:
        model: `gpt2`, `llama`, or `no_vocab`.
        pre: llama.cpp's name of the splitting of text into words.
        tokens: Text by id.
        types: Kind by id (normal, control, ...).
        scores: Merge priority by id, highest first; `llama` only.
        merges: Pairs in order, joined by a space; `gpt2` only.
        space_prefix: Whether a space is put before the text; `llama` only.
        warnings: What an engine may do differently, one sentence each.
    """

    model: str
    pre: str = "default"
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = True
    warnings: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, vocab_size: int) -> GgufVocabulary:
    """The tokenizer of a model folder, padded to the rows of its embedding.

    Raises:
        UnrepresentableError: It is of a kind that GGUF files of these models do not hold, or has ids beyond the
            embedding.
        CheckpointError: tokenizer.json is no JSON object.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
            raise UnrepresentableError(
                f"{folder}: the tokenizer is not in tokenizer.json; load it with transformers and save it again"
            )
        return GgufVocabulary("no_vocab", warnings=["the model has no tokenizer: engines get token ids only"])
    data = read_json(file)
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise UnrepresentableError(
            f"{file}: a tokenizer of type {model.get('type')!r} is not written, only BPE"
        )
    found = _sentencepiece(data, model) if model.get("byte_fallback") else _byte_level(data, model, str(file))
    by_id = {number: text for text, number in model["vocab"].items()}
    added = {row["id"]: row for row in data.get("added_tokens") or []}
    by_id |= {number: row["content"] for number, row in added.items()}
    if by_id and max(by_id) >= vocab_size:
        raise UnrepresentableError(f"{file}: token {max(by_id)} has no row in an embedding of {vocab_size}")
    ranks = _ranks(model) if found.model == "llama" else {}
    for number in range(vocab_size):
        text = by_id.get(number)
        found.tokens.append(f"[PAD{number}]" if text is None else text)
        found.types.append(_type(text, added.get(number), found.model, model.get("unk_token")))
        if found.model == "llama":
            # Engines merge the pair whose result scores highest; what no merge makes never competes.
            found.scores.append(-float(ranks.get(text or "", len(ranks))))
    return found


def _type(text: str | None, added: Mapping[str, Any] | None, model: str, unknown: str | None) -> int:
    if text is None:
        return UNUSED
    if model == "llama" and text == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    if model == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return BYTE
    return NORMAL


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for row in model.get("merges") or []:
        left, right = row.split(" ", 1) if isinstance(row, str) else row
        found.append((str(left), str(right)))
    return found


def _ranks(model: Mapping[str, Any]) -> dict[str, int]:
    """Place of the first merge that makes each token."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model)):
        ranks.setdefault(left + right, rank)
    return ranks


def _sentencepiece(data: Mapping[str, Any], model: Mapping[str, Any]) -> GgufVocabulary:
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")], ensure_ascii=False)
    # The space goes in front by a normalizer (Prepend) or a pre-tokenizer (Metaspace, unless told never to).
    prefix = '"Prepend"' in text or ('"Metaspace"' in text and '"never"' not in text)
    return GgufVocabulary("llama", "default", space_prefix=prefix)


def _byte_level(data: Mapping[str, Any], model: Mapping[str, Any], file: str) -> GgufVocabulary:
    steps = data.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" not in kinds:
        raise UnrepresentableError(
            f"{file}: BPE without bytes (neither ByteLevel nor byte_fallback) is not written"
        )
    found = GgufVocabulary("gpt2", merges=[f"{left} {right}" for left, right in _pairs(model)])
    byte_level = next(step for step in steps if step.get("type") == "ByteLevel")
    expressions = [(step.get("pattern") or {}).get("Regex") for step in steps if step.get("type") == "Split"]
    whole = byte_level.get("use_regex", True)
    if kinds == ["ByteLevel"] and whole:
        found.pre = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and whole:
        found.pre = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not whole and expressions[0] in _SPLITS:
        names = _SPLITS[expressions[0]]
        name = names[0 if model.get("ignore_merges") else 1]
        found.pre = name or names[0] or names[1] or ""
        if name is None:
            own = bool(model.get("ignore_merges"))
            found.warnings.append(
                f"the tokenizer's ignore_merges is {own}, that of llama.cpp's {found.pre} {not own}: some words may be "
                "split differently"
            )
    else:
        found.warnings.append(
            f"the tokenizer splits text by {kinds}, for which llama.cpp has no known name: tokenizer.ggml.pre is "
            "`default`, and text may be split differently; token ids are unaffected"
        )
    if byte_level.get("add_prefix_space"):
        found.warnings.append("the tokenizer puts a space before the text, which llama.cpp does not for gpt2")
    return found
