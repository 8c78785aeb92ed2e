# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint format by name, and the one that a path is of. Modules are imported on first use."""

from __future__ import annotations

import importlib
from pathlib import Path

from discquant.errors import CheckpointError, ConfigError, MissingModelError
from discquant.formats.checkpoint import PICKLES, RUN_MARKER, read_json, stated_quantization
from discquant.formats.coded import Format
from discquant.formats.safetensors_format import SafetensorsFormat

# Name on the command line -> module and the object in it that implements `coded.Format`.
_HOMES = {
    "compressed-tensors": "discquant.formats.compressed_tensors_format:FORMAT",
    "gptq": "discquant.formats.gptq:GPTQ",
    "gptq-v2": "discquant.formats.gptq:GPTQ_V2",
    "autoround": "discquant.formats.autoround:FORMAT",
    "awq": "discquant.formats.awq:FORMAT",
    "mlx": "discquant.formats.mlx:FORMAT",
    "gguf": "discquant.formats.gguf:FORMAT",
    "onnx": "discquant.formats.onnx:FORMAT",
}


def names() -> tuple[str, ...]:
    """Every format's name."""
    return tuple(_HOMES)


def by_name(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: There is none; the message lists those there are.
    """
    home = _HOMES.get(name)
    if home is None:
        raise ConfigError(f"format: there is no format {name!r}; known: {', '.join(_HOMES)}")
    module, _, attribute = home.partition(":")
    found: Format = getattr(importlib.import_module(module), attribute)
    return found


def refuse_run(folder: Path) -> None:
    """Refuse a run directory where a model is wanted, and name the models that it stands for; pass any other folder.

    Raises:
        MissingModelError: It is one.
    """
    try:
        facts = read_json(folder / "config.json")
    except (OSError, CheckpointError):  # whoever reads it says what is wrong with it
        return
    if not facts.get(RUN_MARKER):
        return
    written = [str(folder / name) for name in _HOMES if (folder / name).exists()]
    models = f"what it wrote: {', '.join(written)}" if written else "it has written no model yet"
    raise MissingModelError(
        f"{folder} is a run directory, not a model; {models}; its original: {facts.get('source', 'unknown')}"
    )


def find(path: str | Path) -> Format:
    """The format that a folder or file is of.

    Raises:
        MissingModelError: There is nothing at that path, or a run directory.
        CheckpointError: It is of no format that is read.
    """
    place = Path(path)
    if not place.exists():
        raise MissingModelError(f"{place} is no model: there is nothing there")
    refuse_run(place)
    for name in _HOMES:
        found = by_name(name)
        if found.detects(place):
            return found
    if _ordinary(place):
        raise CheckpointError(
            f"{place} is an ordinary model in full precision, not a quantized one: `discquant quantize` makes one of it"
        )
    raise CheckpointError(f"{place} is in no quantized format that is read; these are: {', '.join(_HOMES)}")


def _ordinary(place: Path) -> bool:
    """Whether this is a folder of a model whose configuration states no quantization, nor a file beside it."""
    if not (place / "config.json").is_file() or any(place.glob("quant*_config.json")):
        return False
    config = read_json(place / "config.json")
    weights = any(any(place.glob(kind)) for kind in ("*.safetensors", *PICKLES))
    return "model_type" in config and weights and not stated_quantization(config)


def quantized(path: str | Path) -> Format | None:
    """The format of a quantized folder or file; None for a folder of ordinary weights, and where nothing is.

    Raises:
        CheckpointError: It is quantized, but in no format that is read.
    """
    place = Path(path)
    # A graph that lies beside torch's weights is another copy of the same model: the folder is opened by those.
    weights = place.is_dir() and any(any(place.glob(kind)) for kind in ("*.safetensors", *PICKLES))
    for name in _HOMES:
        found = by_name(name)
        if (isinstance(found, SafetensorsFormat) or not weights) and found.detects(place):
            return found
    config = place / "config.json"
    if config.is_file() and stated_quantization(read_json(config)):
        return find(place)
    return None


def parse_names(text: str) -> tuple[str, ...]:
    """Format names of a comma-separated option, each once, in order.

    Raises:
        ConfigError: One is unknown, or none is given.
    """
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not chosen:
        raise ConfigError(f"format: name at least one of {', '.join(_HOMES)}")
    for name in chosen:
        if name not in _HOMES:
            raise ConfigError(f"format: there is no format {name!r}; known: {', '.join(_HOMES)}")
    return chosen
