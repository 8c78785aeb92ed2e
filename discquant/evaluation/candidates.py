# SPDX-License-Identifier: Apache-2.0
"""Candidates on disk: run directories, compressed-tensors folders and ordinary model folders, behind one function."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from discquant.errors import MissingModelError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.compressed_tensors import PACKED, SCALE, SHAPE, ZERO
from discquant.formats.safetensors_file import DTYPE_BITS
from discquant.formats.source import open_source, read_config


def bits_per_weight(path: str | Path) -> float | None:
    """Stored bits per weight of the quantized layers, scales and zero points included; of all matrices if none is.

    Args:
        path: A model folder or a run directory.

    Returns:
        Bits; None where the folder holds no safetensors weights.

    Raises:
        MissingModelError, CheckpointError: The folder cannot be read.
    """
    from discquant.run.directory import RunDirectory

    folder = Path(path)
    if RunDirectory.is_run(folder):
        bits = weights = 0
        for layer in RunDirectory(folder).layers():
            zeros = 0 if layer.zero_point is None else layer.zero_point.numel() * layer.num_bits
            bits += (
                layer.q.numel() * layer.num_bits
                + layer.scale.numel() * layer.scale.element_size() * 8
                + zeros
            )
            weights += layer.q.numel()
        return bits / weights if weights else None
    if not any(folder.glob("*.safetensors")):
        return None
    checkpoint = Checkpoint(folder)
    packed = [name.removesuffix(PACKED) for name in checkpoint.tensors if name.endswith(f".{PACKED}")]
    if packed:
        stored = [
            checkpoint.tensors.get(base + suffix) for base in packed for suffix in (PACKED, SCALE, ZERO)
        ]
        weights = sum(int(checkpoint.read(base + SHAPE).prod()) for base in packed)
        return 8 * sum(info.num_bytes for info in stored if info is not None) / weights
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) >= 2]
    weights = sum(math.prod(info.shape) for info in matrices)
    return (
        sum(math.prod(info.shape) * DTYPE_BITS[info.dtype] for info in matrices) / weights
        if weights
        else None
    )


def open_candidate(path: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Any:
    """Load whatever can be evaluated: a run directory, a compressed-tensors folder, or an ordinary model folder.

    Returns:
        A `transformers` model in the dtype of the checkpoint, in eval mode.

    Raises:
        MissingModelError: The path is none of these.
        CheckpointError: A file of it is truncated, corrupt or not read.
    """
    from discquant.run.directory import RunDirectory, load_run_model

    folder = Path(path)
    if RunDirectory.is_run(folder):
        return load_run_model(folder).eval()
    if folder.is_dir() and read_config(folder).get("quantization_config"):
        from discquant.formats.load import load_quantized

        return load_quantized(folder, trust_remote_code=trust_remote_code)
    return open_source(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle).model


def check_candidate(path: str | Path) -> None:
    """Cheap look at a candidate before the original is loaded."""
    from discquant.run.directory import CODES, RunDirectory

    folder = Path(path)
    if not folder.is_dir():
        raise MissingModelError(f"{path} is no model and no run: there is no such folder")
    if RunDirectory.is_run(folder):
        if not (folder / CODES).is_file():
            raise MissingModelError(f"{path} is a run that has not finished; repeat its command to finish it")
        return
    read_config(folder)
