# SPDX-License-Identifier: Apache-2.0
"""Exported checkpoints back into memory: layer by layer as codes, or as a transformers model with plain weights.

Needs no compressed-tensors library.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, MissingModelError
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.coded import Format
from discquant.formats.codes import QuantizedLinear
from discquant.formats.registry import by_name, find
from discquant.formats.safetensors_format import SafetensorsFormat, inert, weights_only
from discquant.formats.source import quiet_library

logger = logging.getLogger(__name__)


def read_layers(path: str | Path) -> Iterator[QuantizedLinear]:
    """The quantized layers of a compressed-tensors directory, one at a time, in the order they lie on disk.

    Raises:
        MissingModelError, CheckpointError: The directory cannot be read.
        NotImplementedError: It is quantized in a way that is not read.
        UnrepresentableError: A layer is no uniform grid of contiguous groups (act-order, NVFP4); `coded.Format.read`
            reads those.
    """
    for layer in by_name("compressed-tensors").read(Path(path)):
        yield layer.linear("read_layers")


def other_tensors(chosen: Format, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file besides its coded layers, under the names of transformers.

    A GGUF file may hold some of them in types that have no codes here (Q6_K embeddings); they come decoded. Of ONNX
    there are none: only files of ours name them so.
    """
    if isinstance(chosen, SafetensorsFormat):
        checkpoint = Checkpoint(path)
        for name in chosen.plain(checkpoint, chosen.layers(checkpoint)):
            yield name, checkpoint.read(name)
        return
    rest = getattr(chosen, "rest", None)
    if rest is not None:
        yield from rest(path)


def configuration_folder(path: str | Path, original: str | Path | None = None) -> Path:
    """Folder whose config.json describes the model in a quantized folder or file: its own, else the original's.

    Args:
        path: The folder or file.
        original: Folder of the model that it was made from; asked where nothing lies beside the file.

    Raises:
        MissingModelError: Neither says what the model is; the message names what can be done.
        CheckpointError: A config.json is no JSON.
    """
    place = Path(path)
    own = place if place.is_dir() else place.parent
    # Downloads often come with a config.json of one line; it does not describe a model.
    if (own / "config.json").is_file() and read_json(own / "config.json").get("architectures"):
        return own
    if original is not None:
        return Path(original)
    raise MissingModelError(
        f"{place} cannot be opened by itself: no config.json {'in it' if place.is_dir() else 'beside it'} describes "
        "its model. Put config.json and tokenizer of the original there, or give the original: "
        f"discquant evaluate ORIGINAL {place}"
    )


def load_quantized(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    original: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A transformers model whose quantized layers hold their dequantized weights, ready to run in `dtype`.

    Args:
        path: A folder or file in one of the registry's formats, written by discquant or another tool.
        dtype: Of the model; None takes the one that config.json names, else float32; of GGUF and ONNX, whose engines
            compute on what a file decodes to in float32, always float32.
        original: Folder of the model that it was made from; needed for files without a config.json of their own.
        trust_remote_code: Passed to transformers; without it a model that brings its own code is refused.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        MissingModelError, CheckpointError: It cannot be read, does not fill the model, or nothing says what it is.
        NotImplementedError: It is quantized in a way that is not read.
    """
    import transformers

    place = Path(path)
    chosen = find(place)
    packed = isinstance(chosen, SafetensorsFormat)  # found by its own config.json
    folder = place if packed else configuration_folder(place, original)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    forget_quantization(config)
    dtype = dtype or (getattr(config, "dtype", None) if packed else None) or torch.float32
    if isinstance(chosen, SafetensorsFormat):
        note_beyond(chosen, Checkpoint(place))
    state = {f"{layer.name}.weight": layer.dequantize(dtype) for layer in chosen.read(place)}
    others = dict(other_tensors(chosen, place))
    idle = {name for name in others if inert(name, functools.partial(others.__getitem__, name))}
    state |= others
    if chosen.name == "onnx":  # where the names are others, the model is not filled, which is told below
        state |= dict(chosen.plain_tensors(place))  # type: ignore[attr-defined]
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None) or transformers.AutoModelForCausalLM
    extra = (
        {"trust_remote_code": True} if trust_remote_code and not hasattr(transformers, architecture) else {}
    )
    with quiet_library():
        model, loaded = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **extra
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(set(loaded[kind]) - idle)
        if wrong:
            raise CheckpointError(f"{path} does not fit {type(model).__name__}: {kind} {wrong[:8]}")
    take_generation_settings(model, folder)
    return model.eval()


def take_generation_settings(model: Any, folder: Path) -> None:
    """Give a model the generation_config.json of a folder, where there is one.

    Raises:
        CheckpointError: It is no JSON object, or transformers refuses what it says.
    """
    import transformers

    if not (folder / "generation_config.json").exists():
        return
    read_json(folder / "generation_config.json")
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as cause:
        raise CheckpointError(f"{folder / 'generation_config.json'}: {cause}") from cause


def forget_quantization(config: Any) -> None:
    """Take from a transformers configuration what it says of quantized weights, which by then are plain."""
    for part in (config, getattr(config, "text_config", None)):
        for entry in ("quantization_config", "quantization"):
            if hasattr(part, entry):
                delattr(part, entry)


def note_beyond(chosen: SafetensorsFormat, checkpoint: Checkpoint) -> None:
    """Warn where a file quantizes more than the weights that a model is loaded with."""
    more = chosen.beyond_weights(checkpoint)
    if more:
        logger.warning("%s: %s", checkpoint.path, weights_only(more))
