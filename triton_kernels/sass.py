# SPDX-License-Identifier: Apache-2.0
"""Machine instructions per element of an elementwise kernel, counted in its disassembly: a proxy where there is no GPU.

A loop's body counts once per trip, everything else once per program. Hopper issues 128 lanes' instructions per clock
and SM; of conversions and reciprocals (`slow`) it may do no more than 16.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_SLOW = re.compile(r"(?:@!?U?P\w+ )?(?:MUFU|I2F|F2I|F2F|FRND|POPC|FLO)\b")
_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")


def disassemble(cubin: bytes) -> str:
    """SASS of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-c", file.name], check=True, capture_output=True, text=True)
    return done.stdout


def per_element(sass: str, elements: int, trips: int) -> tuple[float, float]:
    """Instructions and slow ones per element; `elements` of one thread and trip, `trips` of the longest loop."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label, instruction = re.match(r"\s*(\.L_\w+):", line), _LINE.match(line)
        if label:
            labels[label[1]] = len(lines)
        elif instruction and instruction[1] != "NOP":
            lines.append(instruction[1])
    begin = end = 0
    for number, line in enumerate(lines):
        target = re.search(r"\bBRA `\((\.L_\w+)\)", line)
        start = labels.get(target[1], number) if target else number
        if number - start > end - begin:
            begin, end = start, number + 1
    slow = [_SLOW.match(line) is not None for line in lines]
    weights = [trips if begin <= number < end else 1 for number in range(len(lines))]
    total = elements * trips
    return sum(weights) / total, sum(w for w, s in zip(weights, slow, strict=True) if s) / total
