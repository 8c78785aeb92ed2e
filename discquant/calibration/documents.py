# SPDX-License-Identifier: Apache-2.0
"""Documents from local files and `datasets` names, one at a time in a seeded order.

A file is never read whole unless it is a .txt, which is one document: .jsonl keeps the places of its
lines, .parquet goes by row groups, a hub data set is streamed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from discquant.errors import CalibrationError

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Of files that hold data in other ways; no data set on the hub is called so.
_OTHER_SUFFIXES = frozenset(
    ".arrow .bin .bz2 .csv .gz .html .json .md .ndjson .npy .npz .pickle .pkl .pt .tsv .xml .xz .yaml .zip .zst".split()
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FIRST_PIECE = 1 << 16  # bytes of a text that are read to see that it is one
_HUB_BUFFER = 10_000  # documents that a streamed data set is shuffled within


def _order(count: int, seed: int) -> list[int]:
    return [int(place) for place in np.random.default_rng(seed).permutation(count)]


def _jsonl(path: Path, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    places: list[tuple[int, int]] = []  # (byte, line number)
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                places.append((start, number))
            start += len(line)
        for place in _order(len(places), seed):
            start, number = places[place]
            file.seek(start)
            where = f"{path} line {number}"
            yield where, _parsed(file.readline(), where)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as cause:  # of a number with too many digits, of brackets too deep
        raise CalibrationError(f"calibration: {where} is not JSON: {cause}") from cause
    if not isinstance(row, dict):
        raise CalibrationError(
            f"calibration: {where} must be a JSON object with text, got {type(row).__name__}"
        )
    return row


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as cause:
        raise CalibrationError(
            f"calibration: reading {path} needs pyarrow: pip install 'discquant[data]'"
        ) from cause
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (
        pyarrow.lib.ArrowException,
        OSError,
        ValueError,
    ) as cause:  # a page that is damaged gives any of them
        raise CalibrationError(f"calibration: {path} is not a readable parquet file: {cause}") from cause


def _parquet(path: Path, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with _parquet_file(path) as file:
        for group in _order(file.num_row_groups, seed):
            rows = file.read_row_group(group).to_pylist()
            for place in _order(len(rows), seed + 1 + group):
                yield f"{path} row group {group} row {place}", rows[place]


def _parquet_start(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=1):
            for row in batch.to_pylist():
                yield f"{path} row group 0 row 0", row


def _hub(name: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of `name`, `name:split` or `name:config:split`."""
    try:
        import datasets
    except ImportError as cause:
        raise CalibrationError(
            f"calibration: {name!r} is no local file, and a data set by name needs the datasets package: "
            "pip install 'discquant[data]'"
        ) from cause
    parts = name.split(":")
    if len(parts) > 3 or not all(parts):
        raise CalibrationError(
            f"calibration: a data set is named name, name:split or name:config:split, got {name!r}"
        )
    config = parts[1] if len(parts) == 3 else None
    split = parts[-1] if len(parts) > 1 else "train"
    read = 0
    try:
        stream = datasets.load_dataset(parts[0], config, split=split, streaming=True)
        for row in stream.shuffle(seed=seed, buffer_size=_HUB_BUFFER):
            yield f"{name} row {read}", row
            read += 1
    except Exception as cause:  # whatever the network, the hub or a loader raises means the same to the user
        line = str(cause).partition("\n")[0]
        reason = f"{type(cause).__name__}: {line}" if line else type(cause).__name__
        if read:
            raise CalibrationError(f"calibration: {name} broke off after {read} rows ({reason})") from cause
        raise CalibrationError(
            f"calibration: {name!r} is neither a local .txt, .jsonl, .parquet or file.safetensors:key, nor self or "
            f"arithmetic, nor a data set that can be reached ({reason})"
        ) from cause


def check_named(dataset: str) -> None:
    """Refuse a file that is not there, or of a kind that is not read: what looks like one is not asked of the hub.

    Raises:
        CalibrationError: So it is.
    """
    path, base = Path(dataset), dataset.partition(":")[0]
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise CalibrationError(f"calibration: there is no file {dataset}")
        return
    if path.exists():
        raise CalibrationError(
            f"calibration: {dataset!r} must be a .txt, .jsonl or .parquet file or file.safetensors:key"
        )
    suffix = Path(base).suffix.lower()
    local = dataset.startswith((".", "/", "~")) or (base and not _HUB_NAME.fullmatch(base))
    if local or suffix in _OTHER_SUFFIXES or suffix in SUFFIXES:
        raise CalibrationError(
            f"calibration: there is no file {dataset} (text is a .txt, .jsonl or .parquet file, file.safetensors:key, "
            "self, arithmetic, or the name of a data set on the hub)"
        )


def first_row(dataset: str) -> tuple[str, dict[str, Any]] | None:
    """The first row of a local file as it stands there, at a cost that does not grow with the file.

    Returns:
        Where it stands, for messages, and the row (of a .txt its first piece); None of a data set on the hub, and where
        there is none.

    Raises:
        CalibrationError: Missing or unreadable file.
    """
    check_named(dataset)
    path = Path(dataset)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return None
    if suffix == ".txt":
        with path.open("rb") as file:
            piece = file.read(_FIRST_PIECE)
        try:
            # The last character may go on behind the piece.
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(piece, final=len(piece) < _FIRST_PIECE)
        except UnicodeDecodeError as cause:
            raise CalibrationError(f"calibration: {dataset} is not UTF-8 text: {cause}") from cause
        return str(path), {"text": text}
    if suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    return where, _parsed(line, where)
        return None
    return next(_parquet_start(path), None)


def is_small(dataset: str) -> bool:
    """Whether a data set is a local file that can be read whole for what its beginning would cost."""
    path = Path(dataset)
    return path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size <= _FIRST_PIECE


def rows(dataset: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set in a seeded order.

    Args:
        dataset: Path of a .txt, .jsonl or .parquet file, or a `datasets` name.
        seed: Of the order.

    Yields:
        Where the row stands, for messages, and the row; a .txt is one row {"text": its content}.

    Raises:
        CalibrationError: Missing, unreadable or empty file; a data set that cannot be reached, or breaks off.
    """
    check_named(dataset)
    path = Path(dataset)
    if path.suffix.lower() not in SUFFIXES:
        yield from _hub(dataset, seed)
        return
    if path.suffix.lower() == ".txt":
        try:
            # A byte-order mark is no text.
            yield str(path), {"text": path.read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as cause:
            raise CalibrationError(f"calibration: {dataset} is not UTF-8 text: {cause}") from cause
    elif path.suffix.lower() == ".jsonl":
        yield from _jsonl(path, seed)
    else:
        yield from _parquet(path, seed)


def _chat(where: str, messages: list[dict[str, str]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"calibration: {where} needs a chat template, and the model's tokenizer has none; "
            "use plain text (key text) instead"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as cause:  # templates are programs of their authors and raise what they like
        raise CalibrationError(f"calibration: {where} does not fit the chat template: {cause}") from cause


def render(
    where: str, row: dict[str, Any], tokenizer: Any, *, text_key: str, chat_template: bool
) -> tuple[str, bool]:
    """Turn a row into text.

    Args:
        where: Where the row stands, for messages.
        row: Holds `text_key`, or `messages` (list of role and content), or `question` and `answer`.
        tokenizer: Its chat template renders `messages` always, the others if `chat_template`.
        text_key: Key of plain text.
        chat_template: Wrap plain text as a user's message, question and answer as a dialogue.

    Returns:
        The text, and whether the chat template made it (and so closed it as the model expects).

    Raises:
        CalibrationError: No known key, a value of the wrong type, no chat template, or half a surrogate pair.
    """
    text, chat = _rendered(where, row, tokenizer, text_key=text_key, chat_template=chat_template)
    try:
        text.encode()  # tokenizers take what UTF-8 can hold; JSON can name more
    except UnicodeEncodeError as cause:
        raise CalibrationError(f"calibration: {where} holds what is no Unicode text: {cause}") from cause
    return text, chat


def _rendered(
    where: str, row: dict[str, Any], tokenizer: Any, *, text_key: str, chat_template: bool
) -> tuple[str, bool]:
    """See `render`."""
    text = row.get(text_key)
    question, answer, messages = row.get("question"), row.get("answer"), row.get("messages")
    if isinstance(text, str):
        if chat_template:
            return _chat(where, [{"role": "user", "content": text}], tokenizer), True
        return text, False
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return _chat(where, messages, tokenizer), True
    if isinstance(question, str) and isinstance(answer, str):
        if chat_template:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return _chat(where, turns, tokenizer), True
        return f"Question: {question}\nAnswer: {answer}", False
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in sorted(row.items())) or "nothing"
    raise CalibrationError(
        f"calibration: {where} must hold {text_key} (text), messages, or question and answer, got {found}"
    )
