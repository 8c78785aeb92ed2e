# SPDX-License-Identifier: Apache-2.0
"""Windows: content, digest, selection; cutting loses no token and pads only behind the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from discquant.calibration.windows import Windows, cut, cut_rows


def test_digest_is_of_the_content() -> None:
    ids = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    same = Windows.make(ids.to(torch.int16), mask, "elsewhere")
    base = Windows.make(ids)
    assert base.digest == same.digest
    changed = ids.clone()
    changed[2, 3] += 1
    masked = mask.clone()
    masked[2, 3] = False
    others = [
        Windows.make(changed),
        Windows.make(ids, masked),
        Windows.make(ids.view(4, 3)),
        Windows.make(ids[:2]),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


def test_rows_and_split() -> None:
    ids = torch.arange(20).view(5, 4)
    mask = ids % 7 != 0
    windows = Windows.make(ids, mask, "here")
    for index in ([3, 1], torch.tensor([3, 1])):
        picked = windows.rows(index)
        assert torch.equal(picked.input_ids, ids[[3, 1]])
        assert torch.equal(picked.mask, mask[[3, 1]])
        assert picked.source == "here"
    first, rest = windows.split(2)
    assert (len(first), len(rest), rest.seqlen) == (2, 3, 4)
    assert torch.equal(torch.cat([first.input_ids, rest.input_ids]), ids)
    assert [len(part) for part in windows.split(5)] == [5, 0]
    assert [len(part) for part in windows.split(0)] == [0, 5]
    assert windows.tokens == int(mask.sum())
    assert windows.rows(slice(0, 5)).digest == windows.digest


def test_keeps_its_content_when_the_source_changes() -> None:
    ids, mask = torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.bool)
    windows = Windows.make(ids, mask)
    ids[0, 0], mask[0, 0] = 99, False
    assert windows.input_ids[0, 0] == 0 and windows.mask[0, 0]


@pytest.mark.parametrize(
    "ids,mask,words",
    [
        (torch.zeros(3), None, "[rows, seqlen]"),
        (torch.zeros(2, 3), None, "integers"),
        (torch.zeros(2, 3, dtype=torch.bool), None, "integers"),
        (torch.tensor([[1, -1]]), None, "at least 0"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), "mask must be bool"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool), "mask must be bool"),
    ],
)
def test_rejects_bad_input(ids: torch.Tensor, mask: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        Windows.make(ids, mask)
    assert words in str(raised.value)


@pytest.mark.parametrize("n", [-1, 3])
def test_split_rejects(n: int) -> None:
    with pytest.raises(ValueError, match="n must be in"):
        Windows.make(torch.zeros(2, 3, dtype=torch.int64)).split(n)


@given(tokens=st.integers(1, 60), seqlen=st.integers(2, 16))
def test_cut_loses_nothing(tokens: int, seqlen: int) -> None:
    stream = torch.arange(1, tokens + 1)
    ids, mask = cut(stream, seqlen, pad_id=0)
    assert torch.equal(ids[mask], stream)
    assert torch.equal(mask, ids != 0)
    assert len(ids) == -(-tokens // seqlen)
    # Padding only at the end of the last window: causal attention then needs no attention mask.
    assert bool(mask[:-1].all())
    assert bool((mask[-1].int().diff() <= 0).all())


@given(rows=st.integers(1, 5), width=st.integers(2, 30), seqlen=st.integers(2, 30))
def test_cut_rows_loses_nothing(rows: int, width: int, seqlen: int) -> None:
    seqlen = min(seqlen, width)
    tokens = torch.arange(1, rows * width + 1).view(rows, width)
    text = torch.ones_like(tokens, dtype=torch.bool)
    text[0, width // 2 :] = False
    ids, mask = cut_rows(tokens, text, seqlen, pad_id=0)
    assert torch.equal(ids[mask], tokens[text])
    assert bool(mask.any(dim=1).all())


def test_padding_is_what_was_asked_for() -> None:
    """A model's own padding token, say."""
    ids, mask = cut(torch.arange(1, 6), 4, pad_id=77)
    assert ids.tolist() == [[1, 2, 3, 4], [5, 77, 77, 77]] and mask.tolist()[1] == [True, False, False, False]
    ids, _ = cut_rows(torch.arange(1, 6)[None], torch.ones(1, 5, dtype=torch.bool), 4, pad_id=77)
    assert ids.tolist() == [[1, 2, 3, 4], [5, 77, 77, 77]]
