# SPDX-License-Identifier: Apache-2.0
"""Whether calibration text is enough for a run, as far as its beginning tells: found before long work, not after."""

from __future__ import annotations

import math
from typing import Any

from discquant.calibration import documents
from discquant.calibration.load import check_ids, load_windows, token_file
from discquant.errors import CalibrationError
from discquant.formats.safetensors_file import TORCH_DTYPES, read_header


def check_enough(
    dataset: str,
    tokenizer: Any,
    *,
    windows: int,
    seqlen: int,
    seed: int,
    chat_template: bool = False,
    text_key: str = "text",
) -> None:
    """Refuse text that gives fewer windows than are needed, where that costs no more than a look at its beginning.

    Of token ids the shape is looked at; text is read where the whole file is no longer than a beginning.

    Args:
        dataset: As for `load_windows`, and passed by `check_dataset`.
        tokenizer: The model's.
        windows: How many are needed at least.
        seqlen: As for `load_windows`.
        seed: Likewise; so what is read is read then, too.
        chat_template: Likewise.
        text_key: Likewise.

    Raises:
        CalibrationError: It holds no text or token ids, or too few.
    """
    of_tokens = token_file(dataset)
    if of_tokens is not None:
        file, key = of_tokens
        stored, _ = read_header(file)
        found = stored[key or next(iter(stored))]
        check_ids(f"{file}:{found.name}", TORCH_DTYPES.get(found.dtype), found.shape)
        *rows, width = found.shape
        # At most: rows of padding alone do not count.
        check_count(dataset, math.prod(rows) * -(-width // seqlen), min(seqlen, width), windows)
    elif documents.is_small(dataset):
        loaded = load_windows(
            dataset, tokenizer, nsamples=windows, seqlen=seqlen, seed=seed, chat_template=chat_template,
            text_key=text_key, warn=False,
        )  # fmt: skip
        check_count(dataset, len(loaded), seqlen, windows)


def check_count(dataset: str, count: int, seqlen: int, least: int) -> None:
    """Refuse fewer windows than are needed.

    Raises:
        CalibrationError: So many there are.
    """
    if count < least:
        raise CalibrationError(
            f"calibration: {dataset} gives {count} window of {seqlen} tokens; at least {least} are needed (one is held "
            "out)"
        )
