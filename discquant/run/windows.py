# SPDX-License-Identifier: Apache-2.0
"""A run's calibration windows: loaded once, kept for whoever continues, split into solved and held-out ones."""

from __future__ import annotations

import torch
from safetensors import safe_open

from discquant.calibration import Windows, load_windows
from discquant.config import QuantizeConfig
from discquant.errors import CalibrationError
from discquant.formats.source import Source
from discquant.run.directory import RunDirectory
from discquant.run.stored import save_tensors_atomic

CALIBRATION = "calibration.safetensors"


def run_windows(directory: RunDirectory, config: QuantizeConfig, source: Source) -> Windows:
    """Load the calibration windows, or those that were kept: a resumed run must see the same tokens.

    Raises:
        CalibrationError: See `load_windows`.
    """
    path = directory.path / CALIBRATION
    if path.exists():
        with safe_open(path, framework="pt") as handle:
            described = handle.metadata()["source"]
            return Windows.make(handle.get_tensor("input_ids"), handle.get_tensor("mask").bool(), described)
    data = config.data
    return load_windows(
        data.dataset,
        source.tokenizer,
        nsamples=data.nsamples + config.validation_windows,
        seqlen=data.seqlen,
        seed=config.seed,
        model=source.model,
        chat_template=data.chat_template,
        text_key=data.text_key,
    )


def keep_windows(directory: RunDirectory, windows: Windows) -> None:
    """Write the windows where they are not yet."""
    path = directory.path / CALIBRATION
    if not path.exists():
        tensors = {"input_ids": windows.input_ids.int(), "mask": windows.mask.to(torch.uint8)}
        save_tensors_atomic(path, tensors, {"source": windows.source})


def few_windows(windows: Windows, config: QuantizeConfig) -> str:
    """Say that the text is shorter than what was asked for."""
    wanted = config.data.nsamples + config.validation_windows
    tokens = int(windows.mask.sum())
    return (
        f"{config.data.dataset} gives {len(windows)} windows, {tokens:,} tokens, of the {wanted} windows of "
        f"{config.data.seqlen} asked for: the result is fitted to little text, and measured on less"
    )


def split_windows(windows: Windows, config: QuantizeConfig) -> tuple[Windows, Windows]:
    """Return the windows to calibrate on, and those held out.

    Raises:
        CalibrationError: There are fewer than two.
    """
    held = min(config.validation_windows, max(1, len(windows) // 5))
    if len(windows) < 2:
        raise CalibrationError(
            f"calibration: {config.data.dataset} gives {len(windows)} window of {windows.seqlen} tokens; "
            "at least 2 are needed (one is held out)"
        )
    train, validation = windows.split(len(windows) - held)
    return train, validation
