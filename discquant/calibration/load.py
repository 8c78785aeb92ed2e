# SPDX-License-Identifier: Apache-2.0
"""`load_windows`: calibration windows from whatever the option `dataset` names."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.calibration import documents, sampling
from discquant.calibration.arithmetic import SPLITS, Split, calibration_documents
from discquant.calibration.positions import positions_of
from discquant.calibration.windows import Windows, cut, cut_rows
from discquant.errors import CalibrationError

logger = logging.getLogger(__name__)

# Generators of documents, `f(split, count, seed) -> list[str]`, by the name a user types.
GENERATORS = {"arithmetic": calibration_documents}


def encode(tokenizer: Any, text: str, *, bos: int | None, eos: int | None) -> list[int]:
    """Token ids of one document, with exactly one begin and one end token where the ids are given.

    Args:
        tokenizer: A `transformers` tokenizer; its own adding of special tokens is off.
        text: The document; it may already begin or end with the special token's text.
        bos: Begin token to put first, or None.
        eos: End token to put last, or None.

    Returns:
        The ids; for an empty text none at all.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        return []
    head = [bos] if bos is not None and ids[0] != bos else []
    tail = [eos] if eos is not None and ids[-1] != eos else []
    return [*head, *ids, *tail]


def _generated(name: str, split: Split, wanted: int, seed: int) -> Iterator[tuple[str, str, bool]]:
    generate = GENERATORS[name]
    done, count = 0, max(8, wanted // 48)
    while True:
        texts = generate(split, count, seed)
        for text in texts[done:]:
            yield f"{name}:{split}", text, False
        done, count = len(texts), 2 * count  # a longer list begins with the shorter one


def _split_of(dataset: str) -> Split:
    """The split that the word for a generator's text names; calibration where it names none."""
    name, _, split = dataset.partition(":")
    chosen = next((known for known in SPLITS if known == (split or "calibration")), None)
    if chosen is None:
        raise CalibrationError(f"calibration: the splits of {name} are {', '.join(SPLITS)}, got {split!r}")
    return chosen


def check_named(dataset: str) -> None:
    """Refuse the name of a file that is not there, or of no split: what needs neither model nor tokenizer.

    Raises:
        CalibrationError: So it is.
    """
    of_tokens = token_file(dataset)
    if of_tokens is not None:
        if not of_tokens[0].is_file():
            raise CalibrationError(f"calibration: there is no file {of_tokens[0]}")
    elif dataset.partition(":")[0] in GENERATORS:
        _split_of(dataset)
    elif dataset != "self":
        documents.check_named(dataset)


def check_dataset(
    dataset: str, tokenizer: Any, *, chat_template: bool = False, text_key: str = "text"
) -> None:
    """Look at the beginning of a local file, so that what is wrong with it is found before any long work.

    Args:
        dataset: As for `load_windows`; a data set on the hub is not asked for.
        tokenizer: The model's.
        chat_template: As for `load_windows`.
        text_key: As for `load_windows`.

    Raises:
        CalibrationError: No file, no split of that name, or a first row (of a .txt its first piece) that is no text.
    """
    check_named(dataset)
    if dataset == "self" or dataset.partition(":")[0] in GENERATORS:
        return
    of_tokens = token_file(dataset)
    if of_tokens is not None:
        with _token_rows(*of_tokens):
            return
    found = documents.first_row(dataset)
    if found is not None:
        documents.render(*found, tokenizer, text_key=text_key, chat_template=chat_template)


def _texts(
    dataset: str, tokenizer: Any, *, wanted: int, seed: int, chat_template: bool, text_key: str
) -> Iterator[tuple[str, str, bool]]:
    """(where, text, made by the chat template) of each document; without end for a generator."""
    name = dataset.partition(":")[0]
    if name in GENERATORS:
        yield from _generated(name, _split_of(dataset), wanted, seed)
        return
    for where, row in documents.rows(dataset, seed):
        text, chat = documents.render(where, row, tokenizer, text_key=text_key, chat_template=chat_template)
        yield where, text, chat


def _from_text(
    dataset: str,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    pad_id: int,
    chat_template: bool,
    text_key: str,
) -> tuple[Tensor, Tensor]:
    """Join documents until there are enough tokens, and cut; ids and mask, [windows, seqlen]."""
    if tokenizer is None:
        raise CalibrationError(
            f"calibration: the model has no tokenizer, so {dataset} cannot be read as text; "
            "give token ids (file.safetensors:key) or self"
        )
    bos, eos = (sampling.special_id(name, tokenizer, None) for name in ("bos", "eos"))
    wanted = nsamples * seqlen
    stream: list[int] = []
    read = empty = 0
    for _, text, chat in _texts(
        dataset, tokenizer, wanted=wanted, seed=seed, chat_template=chat_template, text_key=text_key
    ):
        ids = encode(tokenizer, text, bos=bos, eos=None if chat else eos) if text.strip() else []
        read, empty = read + 1, empty + (not ids)
        stream += ids
        if len(stream) >= wanted:
            break
    if not stream:
        raise CalibrationError(f"calibration: {dataset} holds no text ({read} documents, all empty)")
    if len(stream) < seqlen:
        raise CalibrationError(
            f"calibration: {dataset} is too short: {len(stream)} tokens, and one window needs {seqlen}; "
            "give more text or a smaller seqlen"
        )
    logger.info("%s: %d documents read, %d of them empty, %d tokens", dataset, read, empty, len(stream))
    return cut(torch.tensor(stream, dtype=torch.int64), seqlen, pad_id)


def token_file(dataset: str) -> tuple[Path, str] | None:
    """(file, key) if the data set is a safetensors file of token ids; the key may be empty."""
    if dataset.endswith(".safetensors"):
        return Path(dataset), ""
    file, colon, key = dataset.rpartition(":")
    return (Path(file), key) if colon and file.endswith(".safetensors") else None


@contextmanager
def _token_rows(file: Path, key: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The key that is meant, and what reads it; opening reads the header alone."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CalibrationError(f"calibration: there is no file {file}")
    try:
        with safe_open(file, "pt") as opened:
            keys = sorted(opened.keys())
            chosen = key or (keys[0] if len(keys) == 1 else "")
            if chosen not in keys:
                raise CalibrationError(
                    f"calibration: {file} holds {', '.join(keys) or 'nothing'}; name one as file.safetensors:key, "
                    f"got {key!r}"
                )
            yield chosen, functools.partial(opened.get_tensor, chosen)
    except SafetensorError as cause:
        raise CalibrationError(f"calibration: {file} is truncated or corrupt: {cause}") from cause


def check_ids(where: str, dtype: torch.dtype | None, shape: Sequence[int]) -> None:
    """Refuse what are no rows of token ids.

    Raises:
        CalibrationError: So it is.
    """
    whole = dtype is not None and not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if len(shape) not in (1, 2) or not whole:
        raise CalibrationError(
            f"calibration: {where} must be integer token ids [rows, seqlen], got {dtype} {list(shape)}"
        )
    if 0 in shape:
        raise CalibrationError(f"calibration: {where} is empty, {list(shape)}")


def _from_token_file(
    file: Path, key: str, *, seqlen: int, pad: int | None, eos: int | None
) -> tuple[Tensor, Tensor]:
    """Rows of token ids, cut to seqlen where they are longer; ids and mask, [windows, at most seqlen]."""
    with _token_rows(file, key) as (chosen, read):
        rows = read()
    rows = rows.unsqueeze(0) if rows.ndim == 1 else rows
    check_ids(f"{file}:{chosen}", rows.dtype, rows.shape)
    rows = rows.to(torch.int64)
    if int(rows.min()) < 0:
        raise CalibrationError(f"calibration: {file}:{chosen} holds the negative token id {int(rows.min())}")
    mask = text_mask(rows, pad if pad is not None else eos, eos)
    if not bool(mask.any()):
        raise CalibrationError(f"calibration: {file}:{chosen} holds padding alone, {list(rows.shape)}")
    width = rows.shape[1]
    if width < seqlen:
        logger.warning("%s:%s has rows of %d tokens, fewer than seqlen = %d; the windows have %d",
                       file, chosen, width, seqlen, width)  # fmt: skip
    return cut_rows(rows, mask, min(seqlen, width), pad if pad is not None else eos or 0)


def text_mask(rows: Tensor, pad: int | None, eos: int | None) -> Tensor:
    """True but on the padding that closes a row: its last run of `pad`, less the first where that is the end token.

    Args:
        rows: Token ids, [rows, width].
        pad: Padding id; None pads nothing.
        eos: End token.

    Returns:
        bool, same shape.
    """
    if pad is None:
        return torch.ones_like(rows, dtype=torch.bool)
    # True from the last token that is not padding backwards.
    text = (rows != pad).int().flip(1).cummax(dim=1).values.flip(1).bool()
    if pad == eos:
        text = torch.cat([torch.ones_like(text[:, :1]), text[:, :-1]], dim=1) | text
    return text


def _vocabulary(model: Any, tokenizer: Any) -> int | None:
    """Rows of the embedding, or the size the tokenizer claims."""
    if model is not None and hasattr(model, "get_input_embeddings"):
        return int(model.get_input_embeddings().weight.shape[0])
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return int(size) if size is not None else len(tokenizer) if tokenizer is not None else None


def _check(ids: Tensor, *, model: Any, tokenizer: Any, dataset: str) -> None:
    vocabulary = _vocabulary(model, tokenizer)
    largest = int(ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise CalibrationError(
            f"calibration: {dataset} gives the token id {largest}, and the model's vocabulary has {vocabulary}; "
            "the tokenizer does not fit the model"
        )


def given_windows(windows: Windows | Tensor, model: Any) -> Windows:
    """Check windows, or token ids [rows, seqlen], that a caller brings: as the rows of a token file.

    Raises:
        TypeError: Neither windows nor a tensor.
        ValueError: No integers of two dimensions, or a negative id.
        ConfigError: They are longer than the model's positions.
        CalibrationError: Empty, nothing but padding, or ids beyond the vocabulary.
    """
    if not isinstance(windows, (Windows, Tensor)):
        raise TypeError(
            f"calibration: the windows must be of type = Windows or Tensor [rows, seqlen], got {type(windows).__name__}"
        )
    windows = windows if isinstance(windows, Windows) else Windows.make(windows)
    if not windows.tokens:
        raise CalibrationError(
            f"calibration: the windows given hold no token that counts, {list(windows.input_ids.shape)}"
        )
    _check_length(windows.seqlen, model)
    _check(windows.input_ids, model=model, tokenizer=None, dataset="the argument calibration")
    return windows


def _check_length(seqlen: int, model: Any) -> None:
    positions = positions_of(getattr(model, "config", None))
    note = positions.check(seqlen) if positions is not None else None
    if note is not None:
        logger.warning("%s", note)


def load_windows(
    dataset: str,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int = 0,
    model: Any = None,
    chat_template: bool = False,
    text_key: str = "text",
    warn: bool = True,
) -> Windows:
    """Load calibration windows.

    Documents come in a seeded order, each with its begin and end token, joined (attention crosses documents) until
    there are enough tokens, and cut; the tail is padded and masked. The windows then stand in a seeded order.

    Args:
        dataset: `self` (sampled from the model); `arithmetic`, `arithmetic:heldout` (the bundled generator);
            a .txt (one document), .jsonl or .parquet path (key `text_key`, `messages`, or `question` and `answer`);
            `file.safetensors:key`, token ids [rows, width] of any integer dtype, each row cut on its own;
            a `datasets` name, `name:split` or `name:config:split`.
        tokenizer: The model's `transformers` tokenizer; None will do for token ids and `self`.
        nsamples: Windows wanted; fewer come, with a warning, where the data hold no more.
        seqlen: Tokens per window.
        seed: Of document order, window order and samples.
        model: The model, for `self`, and to check token ids against its embedding and seqlen against its positions.
        chat_template: Put plain text and question-answer pairs through the tokenizer's chat template.
        text_key: Key of plain text in .jsonl, .parquet and data sets.
        warn: Warn of fewer windows; a caller that says so itself turns it off.

    Returns:
        The windows, [at most nsamples, seqlen]; narrower where the rows of a token file are.

    Raises:
        ValueError: nsamples or seqlen out of range.
        ConfigError: seqlen is more than the model's positions.
        CalibrationError: Missing, unreadable, empty or too short data, a missing key, ids beyond the vocabulary,
            no tokenizer for text, no model for `self`.
    """
    if nsamples < 1:
        raise ValueError(f"load_windows: nsamples must be at least 1, got {nsamples}")
    if seqlen < 2:
        raise ValueError(f"load_windows: seqlen must be at least 2, got {seqlen}")
    _check_length(seqlen, model)
    pad, eos = (sampling.special_id(name, tokenizer, model) for name in ("pad", "eos"))
    of_tokens = token_file(dataset)
    if dataset == "self":
        ids = sampling.sample(model, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed)
        mask = torch.ones_like(ids, dtype=torch.bool)
    elif of_tokens is not None:
        ids, mask = _from_token_file(*of_tokens, seqlen=seqlen, pad=pad, eos=eos)
    else:
        ids, mask = _from_text(
            dataset,
            tokenizer,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            pad_id=pad if pad is not None else eos or 0,
            chat_template=chat_template,
            text_key=text_key,
        )
    _check(ids, model=model, tokenizer=tokenizer, dataset=dataset)
    if len(ids) < nsamples:
        logger.log(
            logging.WARNING if warn else logging.INFO,
            "%s gives %d windows of %d tokens, fewer than the %d asked for",
            dataset,
            len(ids),
            ids.shape[1],
            nsamples,
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    if of_tokens is None:
        # The padded tail of joined text is used where it is needed, not in place of a full window. Rows of a token
        # file are texts of their own: preferring full ones would prefer long texts.
        order = torch.cat([order[mask[order].all(dim=1)], order[~mask[order].all(dim=1)]])
    order = order[:nsamples]
    windows = Windows.make(ids[order], mask[order], dataset)
    logger.info("%s: %d windows of %d tokens, %d tokens used, %d left over, %d of padding", dataset, len(windows),
                windows.seqlen, windows.tokens, int(mask.sum()) - windows.tokens,
                windows.mask.numel() - windows.tokens)  # fmt: skip
    return windows
