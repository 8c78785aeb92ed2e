# SPDX-License-Identifier: Apache-2.0
"""Candidates on disk: run directories, quantized folders and files, ordinary model folders, behind one function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from discquant.errors import CheckpointError, MissingModelError
from discquant.formats.bits import file_bits_per_weight
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.load import load_quantized
from discquant.formats.registry import quantized
from discquant.formats.safetensors_file import DTYPE_BITS
from discquant.formats.source import Source, is_run, open_source, read_config, resolve

logger = logging.getLogger(__name__)
CODES, SUMMARY = "codes.safetensors", "summary.json"  # of a run directory


def bits_per_weight(path: str | Path) -> float | None:
    """Stored bits per weight of the quantized layers as `formats.bits` counts them; of all matrices if none is.

    Args:
        path: A model folder or file in any format that is read, or a run directory.

    Returns:
        Bits; None where there are no weights to count (a hub name, pickles, a run without summary).

    Raises:
        MissingModelError, CheckpointError, NotImplementedError: It cannot be read.
    """
    place = Path(path)
    if is_run(place):
        if not (place / SUMMARY).is_file():
            return None
        bits = read_json(place / SUMMARY).get("sizes", {}).get("bits_per_weight")
        return None if bits is None else float(bits)
    chosen = quantized(place)
    if chosen is not None:
        return file_bits_per_weight(chosen, place)
    if not any(place.glob("*.safetensors")):
        return None
    matrices = [info for info in Checkpoint(place).tensors.values() if len(info.shape) >= 2]
    weights = sum(math.prod(info.shape) for info in matrices)
    bits_of = sum(math.prod(info.shape) * DTYPE_BITS[info.dtype] for info in matrices)
    return bits_of / weights if weights else None


def open_candidate(
    path: str | Path,
    *,
    original: str | Path | None = None,
    open_run: Callable[[Path, str | Path | None], Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """Load whatever can be evaluated: a run directory, a quantized folder or file, or an ordinary model folder.

    Args:
        path: The folder or file.
        original: Where the model is that it was made from: of a run, None is where it was (`run_original`); of a GGUF
            or ONNX file, asked for what config.json says where none lies beside it.
        open_run: Gives the model of a run directory, from its path and `original`
            (`discquant.run.served.load_run_model`). It is handed in because runs evaluate, so evaluation must not
            import them.
        trust_remote_code: As for `open_source`.
        allow_pickle: As for `open_source`.

    Returns:
        A `transformers` model in the dtype of the checkpoint, in eval mode.

    Raises:
        MissingModelError: The path is none of these.
        CheckpointError: A file of it is truncated, corrupt or not read.
        ValueError: A run directory, and no `open_run`.
    """
    place = Path(path)
    if is_run(place):
        if open_run is None:
            raise ValueError(f"evaluate: open_run must be given to load the run directory {path}, got None")
        return open_run(place, original).eval()
    if quantized(place) is not None:
        return load_quantized(place, original=original, trust_remote_code=trust_remote_code)
    return open_source(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle).model


def candidate_original(path: str | Path, source: Source) -> Path | None:
    """Where the model is that a candidate was made from, as `open_candidate` wants it; `source` is what it is held to.

    A run knows its original by digest, so `source` stands in for it wherever either has moved. A run of another
    original is opened with that one, and a warning says so.

    Returns:
        Folder of `source`, or None for a run that was made from another model, which is where it was.

    Raises:
        MissingModelError: A run was made from another model, and that is gone.
        CheckpointError: The model at the run's own place is `source`, and it has changed since.
    """
    place = Path(path)
    if not is_run(place):
        return source.path
    config = read_json(place / "config.json")
    if config.get("identity", {}).get("source_digest") == source.digest:
        return source.path
    own = Path(str(config.get("source")))
    if own.resolve() == source.path.resolve():
        raise CheckpointError(f"evaluate: the model at {own} has changed since the run in {path}")
    if not own.is_dir() and not config.get("quantized"):  # a refined file stands alone
        raise MissingModelError(
            f"evaluate: the run in {path} was made from another model than {source.path}, and that is not at {own} any "
            "more; put it back, or give it as ORIGINAL"
        )
    logger.warning("note: the run in %s was made from %s, not from %s", path, own, source.path)
    return None


def vocabulary(path: str | Path) -> int | None:
    """How many tokens a model knows by its config.json, without a weight being opened.

    Returns:
        Rows of the embedding; None where no configuration says so, and of a run, which its original decides.
    """
    place = Path(path).expanduser()
    file = (place if place.is_dir() else place.parent) / "config.json"
    if not place.exists() or not file.is_file():
        return None
    config = read_json(file)
    inner = config.get("text_config")
    size = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return size if type(size) is int else None


def check_candidate(path: str | Path) -> None:
    """Look at a candidate before anything is loaded.

    Raises:
        MissingModelError: The path is no model and no finished run.
        CheckpointError: Its weights are pickled, truncated or corrupt by their headers.
    """
    place = Path(path)
    if is_run(place):
        if not (place / CODES).is_file():
            raise MissingModelError(f"{path} is a run that has not finished; repeat its command to finish it")
        return
    if quantized(place) is None:
        folder = resolve(path)
        read_config(folder)
        if any(folder.glob("*.safetensors")):
            Checkpoint(folder)
