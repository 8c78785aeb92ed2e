# SPDX-License-Identifier: Apache-2.0
"""What differs between two quantized files outside their codes: nothing may, after refine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

CODES = ("qweight", "weight_packed", "weight")
# Bytes of a block that hold codes, by GGUF type: the rest is scales and minima.
CODE_BYTES = {
    "Q4_0": (18, slice(2, 18)), "Q4_1": (20, slice(4, 20)), "Q5_0": (22, slice(2, 22)), "Q5_1": (24, slice(4, 24)),
    "Q8_0": (34, slice(2, 34)), "Q2_K": (84, slice(16, 80)), "Q3_K": (110, slice(0, 96)), "Q4_K": (144, slice(16, 144)),
    "Q5_K": (176, slice(16, 176)), "Q6_K": (210, slice(0, 192)), "IQ4_NL": (18, slice(2, 18)),
    "IQ4_XS": (136, slice(8, 136)),
}  # fmt: skip


def outside_codes(before: Path, after: Path) -> list[str]:
    """Names of tensors, fields and files that differ and are not codes; files that only `after` has do not count."""
    if before.is_file():
        return _gguf(before, after)
    changed = []
    for path in sorted(before.iterdir()):
        other = after / path.name
        if not other.exists():
            changed.append(f"{path.name} is gone")
        elif path.suffix == ".safetensors":
            changed += _safetensors(path, other)
        elif path.is_file() and path.suffix != ".md" and path.read_bytes() != other.read_bytes():
            changed.append(path.name)
    return changed


def _safetensors(before: Path, after: Path) -> list[str]:
    changed = []
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        if list(old.keys()) != list(new.keys()):
            return [f"{before.name}: keys"]
        for name in old.keys():  # noqa: SIM118 (not a dict)
            left, right = old.get_tensor(name), new.get_tensor(name)
            same = left.dtype == right.dtype and left.shape == right.shape
            same = same and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (left, right)))
            quantized = left.dtype in (torch.int32, torch.uint8, torch.uint32)
            if not same and not (name.rpartition(".")[2] in CODES and quantized):
                changed.append(name)
    return changed


def _gguf(before: Path, after: Path) -> list[str]:
    import gguf

    old, new = gguf.GGUFReader(before), gguf.GGUFReader(after)
    if old.data_offset != new.data_offset:
        return ["header length"]
    head = [np.fromfile(path, dtype=np.uint8, count=old.data_offset) for path in (before, after)]
    changed = [] if np.array_equal(*head) else ["header"]
    for left, right in zip(old.tensors, new.tensors, strict=True):
        kind = left.tensor_type.name
        a, b = (np.ascontiguousarray(t.data).view(np.uint8).reshape(-1) for t in (left, right))
        if kind in CODE_BYTES:
            size, codes = CODE_BYTES[kind]
            a, b = (np.delete(x.reshape(-1, size), np.r_[codes], axis=1) for x in (a, b))
        if not np.array_equal(a, b):
            changed.append(left.name)
    return changed
