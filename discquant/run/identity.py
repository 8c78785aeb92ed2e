# SPDX-License-Identifier: Apache-2.0
"""What two runs must have in common to be one: everything that determines the bytes of the result."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

import discquant
from discquant.calibration.load import token_file
from discquant.config import QuantizeConfig
from discquant.environment import device_name, versions
from discquant.formats.source import Source

PIECE = 1 << 24  # bytes of a file hashed at a time
# Raised whenever a run would come out in other bytes than before: a run that an earlier state of the code began is then
# refused, not finished half in each way. By the kind of device, as not every change concerns both.
ARITHMETIC = {"cpu": 7, "cuda": 8}


def told_options(config: QuantizeConfig) -> dict[str, Any]:
    """Return the options that a manifest tells: all but where checkpoints were taken, which changes nothing."""
    return {key: value for key, value in config.to_dict().items() if key != "checkpoint_every"}


def run_identity(source: Source, config: QuantizeConfig, device: torch.device) -> dict[str, Any]:
    """Return everything that determines the bytes of the result.

    Baselines are only measured, and where checkpoints are taken changes nothing.

    The processor does too, in the last bits of sums; as machines are often exchanged between two parts of a run,
    another one is told (`Pipeline`) and not refused.
    """
    installed = versions()
    return {
        "config": {key: value for key, value in told_options(config).items() if key != "baselines"},
        "source_digest": source.digest,
        "data_digest": file_digest(config.data.dataset),
        "discquant": discquant.__version__,
        "arithmetic": ARITHMETIC[device.type],
        "torch": torch.__version__,
        "transformers": installed["transformers"],
        "triton": installed["triton"] if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def file_digest(dataset: str) -> str | None:
    """Hash a local calibration file, so that a changed one is noticed on resuming."""
    of_tokens = token_file(dataset)
    path = Path(dataset) if of_tokens is None else of_tokens[0]
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as handle:  # in pieces: it may be larger than memory
        while piece := handle.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
