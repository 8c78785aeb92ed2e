# SPDX-License-Identifier: Apache-2.0
"""What a configuration says of a folder's quantization, and where tensors of GPTQ, AWQ and AutoRound contradict it.

Their readers take widths and groups from the shapes, which cannot be wrong; engines take them from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from discquant.errors import CheckpointError, UserError
from discquant.formats.checkpoint import Checkpoint, read_json, stated_quantization
from discquant.formats.layout import StoredLayer
from discquant.formats.patterns import matches

# Where AutoGPTQ and AutoAWQ left the configuration before it went into config.json (2023).
OLD = ("quantize_config.json", "quant_config.json")
_SPECIAL = set("*+?^$()[]{}|\\")


def quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantization_config of config.json, else the file of OLD that says the width, by its tool's name for it.

    Raises:
        CheckpointError: There is neither.
    """
    name = stated_in(checkpoint)
    said = stated_quantization(checkpoint.config())
    if name != "config.json":
        said = read_json(checkpoint.path / name)
    if not isinstance(said, dict):
        raise CheckpointError(f"{checkpoint.path} is not quantized: config.json has no quantization_config")
    return said


def stated_in(checkpoint: Checkpoint) -> str:
    """Name of the file that `quantization` reads."""
    if stated_quantization(checkpoint.config()) is not None:
        return "config.json"
    there = [name for name in OLD if (checkpoint.path / name).is_file()]
    # A folder may hold both, one of them left over: AWQ's is told from others by its entry "w_bit".
    if OLD[1] in there and "w_bit" in read_json(checkpoint.path / OLD[1]):
        return OLD[1]
    return there[0] if OLD[0] in there else "config.json"


def old_quantization(path: Path, name: str, codes: str) -> dict[str, Any] | None:
    """What an old folder says of itself in the file `name`; None where it is no such folder. Never an error.

    Args:
        path: Of the folder.
        name: One of OLD.
        codes: Suffix of the tensors that hold codes, of which it must have some.
    """
    if not (path / name).is_file():
        return None
    try:
        checkpoint = Checkpoint(path)
        if stated_in(checkpoint) != name or not any(key.endswith(f".{codes}") for key in checkpoint.tensors):
            return None
        return quantization(checkpoint)
    except (OSError, UserError):
        return None


def override(said: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What a configuration says of one module on top of all: GPTQ's `dynamic`, AutoRound's `extra_config`.

    Returns:
        The entries; None where it says that the module is not quantized.
    """
    dynamic, extra = said.get("dynamic"), said.get("extra_config")
    for pattern, own in dynamic.items() if isinstance(dynamic, dict) else ():
        if matches(pattern.removeprefix("+:").removeprefix("-:"), name):
            return None if pattern.startswith("-:") else _table(own)
    if not isinstance(extra, dict):
        return {}
    if name in extra:
        return _table(extra[name])
    patterns = (key for key in extra if _SPECIAL & set(key) and matches(key, name, anywhere=True))
    return _table(extra.get(next(patterns, ""), {}))


def contradictions(
    said: Mapping[str, Any], bits: int, group_size: int, layers: Iterable[StoredLayer]
) -> Iterator[str]:
    """Yield a sentence for every width and group that the configuration says and the tensors have not.

    Args:
        said: The configuration.
        bits: Its width for all modules.
        group_size: Its columns per group for all modules, -1 for the row.
        layers: The file's layers, by their shapes.
    """
    found: dict[str, list[str]] = {}
    for stored in layers:
        columns, held = stored.shape[1], stored.scheme
        own = override(said, stored.name)
        if own is None:
            found.setdefault("{are} not quantized, but {they} {are}", []).append(stored.name)
            continue
        width, size = own.get("bits", bits), own.get("group_size", group_size)
        row = type(size) is not int or size < 1 or size >= columns
        if width != held.num_bits or (1 if row else -(-columns // size)) != held.groups(columns):
            actual = f"{held.num_bits} bits {_per(held.group_size)}"
            text = f"{{have}} {width} bits {_per(size)}, but {{their}} shapes are those of {actual}"
            found.setdefault(text, []).append(stored.name)
    for text, names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        for several, single in (("are", "is"), ("they", "it"), ("have", "has"), ("their", "its")):
            text = text.replace(f"{{{several}}}", several if more else single)
        yield f"the configuration says that {names[0]}{more} {text}: engines go by the configuration"


def _per(size: object) -> str:
    return "per row" if size in (-1, None) else f"in groups of {size}"


def _table(entries: object) -> Mapping[str, Any]:
    return entries if isinstance(entries, dict) else {}
