# SPDX-License-Identifier: Apache-2.0
"""Too little text is found by a look at its beginning, with the words of whoever would read it all."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from discquant.calibration import documents, load_windows
from discquant.calibration.enough import check_enough
from discquant.errors import CalibrationError

SEQLEN = 8


def _refused(dataset: str, tokenizer: Any, windows: int = 2) -> str:
    """What is said of a data set; nothing where it may be enough."""
    try:
        check_enough(dataset, tokenizer, windows=windows, seqlen=SEQLEN, seed=0)
    except CalibrationError as error:
        return str(error)
    return ""


def _text(path: Path, *texts: str) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("".join(texts))
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_is_counted_in_tokens(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    """A token per character, one before and one behind; what is refused as empty or short is so when it is loaded."""
    named = functools.partial(_text, tmp_path / f"a{suffix}")
    load = functools.partial(load_windows, tokenizer=tokenizer, nsamples=4, seqlen=SEQLEN)
    for texts in ((), (" ", "\n"), ("abc",)):
        dataset = named(*texts)
        with pytest.raises(CalibrationError) as raised:
            load(dataset)
        assert _refused(dataset, tokenizer) == str(raised.value) == _refused(dataset, tokenizer, windows=1)
    exact, enough = named("abcdef"), "abcdefg"
    assert "gives 1 window of 8 tokens; at least 2 are needed" in _refused(exact, tokenizer)
    assert _refused(exact, tokenizer, windows=1) == ""
    assert _refused(named(enough), tokenizer) == ""


def test_a_long_text_is_not_read(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything asked of the hub, of a generator or of the model."""
    dataset = _text(tmp_path / "a.txt", "abc")
    monkeypatch.setattr(documents, "_FIRST_PIECE", 2)
    monkeypatch.setattr(documents, "rows", lambda *given: pytest.fail("read"))
    assert [_refused(name, tokenizer) for name in (dataset, "self", "arithmetic", "owner/name")] == [""] * 4


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(1, 8), "must be integer token ids"),
        (torch.zeros(2, 2, 8, dtype=torch.int32), "must be integer token ids"),
        (torch.zeros(0, 8, dtype=torch.int32), "is empty, [0, 8]"),
        (torch.zeros(3, 0, dtype=torch.int32), "is empty, [3, 0]"),
        (torch.zeros(8, dtype=torch.int32), "gives 1 window of 8 tokens"),
        (torch.zeros(1, 5, dtype=torch.int32), "gives 1 window of 5 tokens"),
        (torch.zeros(9, dtype=torch.int32), ""),
        (torch.zeros(2, 5, dtype=torch.uint8), ""),
        (torch.zeros(1, 17, dtype=torch.int64), ""),
    ],
)
@pytest.mark.parametrize("key", ["", ":ids"])
def test_token_ids_are_counted_by_their_shape(
    ids: torch.Tensor, words: str, key: str, tmp_path: Path
) -> None:
    save_file({"ids": ids}, tmp_path / "a.safetensors")
    told = _refused(f"{tmp_path / 'a.safetensors'}{key}", None)
    assert words in told and bool(words) == bool(told)
