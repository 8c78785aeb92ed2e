# SPDX-License-Identifier: Apache-2.0
"""From how many tokens on a GPU dequantises a packed weight and calls cuBLAS instead of its own kernel.

Data, packed_linear_table.json, by compute capability and width; `python benchmarks/tune_packed_linear.py` measures it
on the GPU at hand. An entry whose `measured` is null is a first guess from published kernels, not measured on a GPU; a
device that is not named takes that of "default".
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
PATH = Path(__file__).with_name("packed_linear_table.json")


def parse(document: Any) -> dict[str, dict[str, Any]]:
    """Read the table's JSON document.

    Raises:
        ValueError: Another format version, no entry "default", or a bound that is no positive integer.
    """
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"packed_linear_table: format must be {FORMAT}, got {found!r}; tune again")
    table: dict[str, dict[str, Any]] = document["devices"]
    if "default" not in table:
        raise ValueError("packed_linear_table: it must hold an entry for the device 'default'")
    for key, entry in table.items():
        for bits in ("3", "4"):
            bound = entry["dense_tokens"].get(bits)
            if type(bound) is not int or bound < 1:
                raise ValueError(
                    f"packed_linear_table: dense_tokens of {key} at {bits} bits must be a positive integer, "
                    f"got {bound!r}"
                )
    return table


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """The installed table."""
    return parse(json.loads(PATH.read_text(encoding="utf-8")))


def entry(capability: tuple[int, int] | None) -> dict[str, Any]:
    """What holds for a CUDA compute capability; "default" for one that the table does not name."""
    table = load()
    key = "default" if capability is None else f"sm_{capability[0]}{capability[1]}"
    return table.get(key, table["default"])


@functools.cache
def _of(device: torch.device) -> dict[str, Any]:
    return entry(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def dense_tokens(device: torch.device, num_bits: int) -> int:
    """Tokens from which `device` dequantises and calls cuBLAS."""
    bound: int = _of(device)["dense_tokens"][str(num_bits)]
    return bound
