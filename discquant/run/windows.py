# SPDX-License-Identifier: Apache-2.0
"""A run's calibration windows: loaded once, kept for whoever continues, split into solved and held-out ones."""

from __future__ import annotations

from pathlib import Path

import torch

from discquant.calibration import Windows, load_windows
from discquant.calibration.enough import check_count
from discquant.calibration.load import token_file
from discquant.config import QuantizeConfig
from discquant.errors import CheckpointError
from discquant.formats.safetensors_file import read_header, read_tensor
from discquant.formats.source import Source
from discquant.run.directory import RunDirectory
from discquant.run.stored import save_tensors_atomic

CALIBRATION = "calibration.safetensors"
LEAST = 2  # windows of a run: to solve on, and to hold out
HELD = "held_out"  # in its header
KEPT = {"input_ids": "I32", "mask": "U8"}  # in it, with the text's source


def run_windows(directory: RunDirectory, config: QuantizeConfig, source: Source) -> Windows:
    """Load the calibration windows, or those that were kept: a resumed run must see the same tokens.

    Raises:
        CalibrationError: See `load_windows`.
        CheckpointError: The kept ones are damaged.
    """
    path = directory.path / CALIBRATION
    if path.exists():
        return _kept_windows(path)
    data = config.data
    windows = load_windows(
        data.dataset,
        source.tokenizer,
        nsamples=data.nsamples + config.validation_windows,
        seqlen=data.seqlen,
        seed=config.seed,
        model=source.model,
        chat_template=data.chat_template,
        text_key=data.text_key,
        warn=False,
    )
    return windows if token_file(data.dataset) else _tail_forward(windows, _held_out(windows, config))


def _tail_forward(windows: Windows, held: int) -> Windows:
    """Put the padded tail of a text before the windows to hold out: it may be a single token, which measures nothing.

    Done when windows are made, not when they are split: a run that was begun otherwise goes on as it was begun.
    """
    last = len(windows) - 1
    if last <= held or bool(windows.mask[last].all()):
        return windows
    return windows.rows([*range(last - held), last, *range(last - held, last)])


def _kept_windows(path: Path) -> Windows:
    """Read the file of `keep_windows`.

    Raises:
        CheckpointError: It is damaged, or holds something else.
    """
    try:
        stored, metadata = read_header(path)
        kinds = {name: info.dtype for name, info in stored.items()}
        source = metadata.get("source")
        if kinds != KEPT or not isinstance(source, str):
            raise CheckpointError(f"{path} must hold {KEPT} and name their source, got {kinds}")
        ids, mask = read_tensor(stored["input_ids"]), read_tensor(stored["mask"])
        windows = Windows.make(ids, mask.bool(), source)
        if metadata.get("digest") not in (None, windows.digest):  # files of earlier versions say none
            raise CheckpointError(f"{path} holds other windows than were written")
        return windows
    except ValueError as error:  # a CheckpointError, too, which names the file
        named = "" if isinstance(error, CheckpointError) else f"{path}: "
        raise CheckpointError(
            f"{named}{error}; these are the windows that the run was begun with: choose another OUT, or remove the "
            "file, and the same command reads the calibration text again"
        ) from error


def keep_windows(directory: RunDirectory, windows: Windows, held_out: int | None = None) -> None:
    """Write the windows where they are not yet, and how many of them, the last ones, are held out."""
    path = directory.path / CALIBRATION
    if not path.exists():
        tensors = {"input_ids": windows.input_ids.int(), "mask": windows.mask.to(torch.uint8)}
        facts = {"source": windows.source, "digest": windows.digest}
        save_tensors_atomic(path, tensors, facts if held_out is None else {**facts, HELD: str(held_out)})


def few_windows(windows: Windows, config: QuantizeConfig) -> str:
    """Say that the text is shorter than what was asked for."""
    wanted = config.data.nsamples + config.validation_windows
    tokens = int(windows.mask.sum())
    return (
        f"{config.data.dataset} gives {len(windows)} windows, {tokens:,} tokens, of the {wanted} windows of "
        f"{config.data.seqlen} asked for: the result is fitted to little text, and measured on less"
    )


def split_windows(
    windows: Windows, config: QuantizeConfig, directory: RunDirectory | None = None
) -> tuple[Windows, Windows]:
    """Return the windows to calibrate on, and those held out: as the run in `directory` was begun, where one was.

    Raises:
        CalibrationError: There are fewer than two.
        CheckpointError: The file of `keep_windows` is damaged.
    """
    check_count(config.data.dataset, len(windows), windows.seqlen, LEAST)
    kept = None if directory is None else _kept_split(directory.path / CALIBRATION, len(windows), config)
    train, validation = windows.split(len(windows) - (kept or _held_out(windows, config)))
    return train, validation


def _held_out(windows: Windows, config: QuantizeConfig) -> int:
    """All that were loaded beyond those to solve on; of text that gives fewer than asked for, at least a fifth."""
    count = len(windows)
    return min(config.validation_windows, max(1, count // 5, count - config.data.nsamples))


def _kept_split(path: Path, count: int, config: QuantizeConfig) -> int | None:
    """Read how many of the kept windows are held out; None where none are kept."""
    if not path.exists():
        return None
    stated = read_header(path)[1].get(HELD)
    if (
        stated is None
    ):  # earlier versions wrote no number: a fifth of what was loaded, however much was asked for
        return min(config.validation_windows, max(1, count // 5))
    if not stated.isdecimal() or not 0 < int(stated) < count:
        raise CheckpointError(
            f"{path} must hold out at least 1 of its {count} windows, and not all: got {stated}"
        )
    return int(stated)
