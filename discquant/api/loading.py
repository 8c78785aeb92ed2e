# SPDX-License-Identifier: Apache-2.0
"""The Python API: load what was written."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from discquant import _extension
from discquant.environment import compute_device
from discquant.errors import ConfigError, MissingModelError, either
from discquant.formats.checkpoint import read_json, stated_quantization
from discquant.formats.registry import quantized as quantized_format
from discquant.formats.safetensors_format import SafetensorsFormat
from discquant.formats.source import open_source
from discquant.ops.packed_linear import MODES, Mode, modes_on
from discquant.run.directory import RunDirectory
from discquant.run.served import load_run_model


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    mode: Mode | Literal["plain"] = "exact",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load an exported model, a run directory (its exported model, else its original with the codes), or an original.

    Quantized layers of 3 and 4 bits stay packed in memory, where the compiled extension is there and the kernels cover
    the grid (groups of 32, 64, a multiple of 128, or the row); all others become ordinary weights. So do those of MLX,
    GGUF and ONNX: their own engines serve them, here they are decoded.

    Args:
        path: Folder, or a GGUF or ONNX file with config.json beside it.
        dtype: Compute dtype; None keeps the checkpoint's, for GGUF and ONNX float32.
        mode: "exact": logits are those of the rounded model, bit for bit. "auto": the fast kernels. On the CPU a matmul
            then errs by at most the sum over its blocks of 2^-15 * largest activation * absolute weights, plus float32
            rounding; on a GPU it is a float32 sum over weights in the compute dtype. "a15", "a8", "fp32": on the CPU,
            see `packed_linear`. "plain": ordinary weights for all.
        device: None is the CPU.
        trust_remote_code: Allow a model that brings code of its own; that code then runs.
        allow_pickle: Read .bin weights of an original with torch's restricted loader.

    Returns:
        A `transformers` model with the served weights.

    Raises:
        FileNotFoundError: No model there, or nothing says what the model in a file is.
        ValueError: A damaged checkpoint, an unknown mode or one that the device has not, or a device that is not there.
        RuntimeError: "a15", "a8" or "fp32" without the compiled extension.

    Note:
        Threads may call it at once. transformers sets the default dtype of the whole process while it builds a model.
    """
    if mode not in (*MODES, "plain"):
        raise ConfigError(f"load: mode must be one of {either((*MODES, 'plain'))}, got {mode!r}")
    target = None if device is None else _device_there(device)
    known = (*modes_on(target or torch.device("cpu")), "plain")
    if mode not in known:
        raise ConfigError(
            f"load: mode on {target} must be one of {either(known)}, got {mode!r} (for the CPU)"
        )
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    model = _open_model(Path(path), dtype, mode, target, trust)
    give_back()
    return model if target is None else model.to(target)


def give_back() -> None:
    """Return freed memory to the system where the C library (glibc) would keep it: what loading took for a while."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)


def _device_there(device: torch.device | str) -> torch.device:
    """The device that an argument means, once it is known to be there.

    Raises:
        ConfigError: torch knows no such device, has it not, or it holds no numbers (meta).
    """
    try:
        found = torch.device(device)
        if found.type == "cuda":
            compute_device(str(found))
        torch.empty(0, device=found)
    except (AssertionError, ImportError, RuntimeError, TypeError) as cause:  # torch raises all of them
        raise ConfigError(f"load: device must be one that torch has here, got {device!r}") from cause
    if found.type == "meta":
        raise ConfigError(f"load: device must hold numbers, got {device!r}")
    return found


def _open_model(
    place: Path,
    dtype: torch.dtype | None,
    mode: Mode | Literal["plain"],
    device: torch.device | None,
    trust: Mapping[str, bool],
) -> nn.Module:
    from discquant.formats.load import load_quantized
    from discquant.formats.load_packed import load_packed_model

    own_code = trust["trust_remote_code"]
    if RunDirectory.is_run(place):
        exported = served_directory(place)
        if exported is None:
            return load_run_model(
                place, dtype, trust_remote_code=own_code, allow_pickle=trust["allow_pickle"]
            )
        place = exported
    chosen = quantized_format(place)
    if chosen is None:
        if not (place / "config.json").is_file():
            raise MissingModelError(f"load: {place} is neither a model nor a run directory")
        original: nn.Module = open_source(place, dtype=dtype, **trust).model
        return original
    if mode != "plain" and isinstance(chosen, SafetensorsFormat):
        if mode not in ("auto", "exact"):
            _extension.load()  # a kernel that is asked for by name is not left out without a word
        packed: nn.Module | None = None
        if _extension.available():
            packed = load_packed_model(place, dtype, mode=mode, device=device, trust_remote_code=own_code)
        if packed is not None:
            return packed
    loaded: nn.Module = load_quantized(place, dtype, original=original_of(place), trust_remote_code=own_code)
    return loaded


def served_directory(run: Path) -> Path | None:
    """Return the exported model of a run that is run in this process, None where it wrote none of that kind.

    MLX, GGUF and ONNX are not: their engines compute with other roundings than the solver's model has. MLX is where the
    original is gone.

    Raises:
        ConfigError: `run` is no run directory.
    """
    if not RunDirectory.is_run(run):
        raise ConfigError(f"{run} is no run directory")
    found = RunDirectory(run)
    folders = [run / name for name in found.formats()]
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    for folder in folders:
        if stated_quantization(read_json(folder / "config.json")):
            return folder
    if Path(found.config()["source"]).exists() or found.config().get("quantized"):
        return None
    # Without the original the codes are no model: then rather what stands alone.
    return next((folder for folder in folders if quantized_format(folder) is not None), None)


def original_of(place: Path) -> Path | None:
    """Return the original model of a folder or file in a run directory; None elsewhere, and where it is gone."""
    for parent in place.absolute().parents[:2]:  # a file lies in the folder of its format
        if RunDirectory.is_run(parent):
            original = Path(RunDirectory(parent).config()["source"])
            return original if original.is_dir() else None
    return None
