# SPDX-License-Identifier: Apache-2.0
"""Which of the ways to multiply by a packed weight a GPU takes, by the number of tokens.

`dense_tokens`: from how many on it dequantises the weight and calls cuBLAS instead of the kernel for few tokens.
`prefill_tokens`: [from, before] tokens for which the kernel for many is faster than both; null is never.

Data, packed_linear_table.json, by compute capability and width; `python benchmarks/tune_packed_linear.py` measures it
on the GPU at hand and writes for which widths (`bits` of `measured`). An entry whose `measured` is null is a first
guess from published kernels, not measured on a GPU; a device that is not named takes that of "default".
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
PATH = Path(__file__).with_name("packed_linear_table.json")


def parse(document: Any) -> dict[str, dict[str, Any]]:
    """Read the table's JSON document.

    Raises:
        ValueError: Another format version, no entry "default", a bound that is no positive integer, or a range of
            tokens that is neither null nor two rising integers, the first above 0.
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
            tokens = entry["prefill_tokens"].get(bits)
            rising = isinstance(tokens, list) and [type(one) for one in tokens] == [int, int]
            if tokens is not None and not (rising and 0 < tokens[0] < tokens[1]):
                raise ValueError(
                    f"packed_linear_table: prefill_tokens of {key} at {bits} bits must be null or [from, before], "
                    f"got {tokens!r}"
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


def prefills(device: torch.device, num_bits: int, tokens: int) -> bool:
    """Whether `device` takes the kernel for many tokens, where the scales allow it."""
    found: list[int] | None = _of(device)["prefill_tokens"][str(num_bits)]
    return found is not None and found[0] <= tokens < found[1]
