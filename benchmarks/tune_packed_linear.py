# SPDX-License-Identifier: Apache-2.0
"""Measure from how many tokens dequantise + cuBLAS beats our kernel on this GPU; rewrite packed_linear_table.json.

`python benchmarks/tune_packed_linear.py [--seconds 120]`. The other capabilities' entries are kept as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import GPU, machine

from discquant.ops import packed_linear_table as table

TOKENS = (17, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SHAPES = ("8B gate_up", "8B down", "8B qkv")


def crossover(kernel: dict[int, float], dense: dict[int, float]) -> int:
    """Smallest measured number of tokens from which the dense path stays faster; one past the largest if it never is.

    Args:
        kernel: Milliseconds of our kernel by number of tokens, summed over shapes.
        dense: The same of dequantise + cuBLAS.
    """
    tokens = sorted(kernel)
    bound = tokens[-1] + 1
    for m in reversed(tokens):
        if kernel[m] <= dense[m]:
            break
        bound = m
    return bound


def measure(bits: int, deadline: float) -> tuple[dict[int, float], dict[int, float]]:
    """Milliseconds of both paths by number of tokens, summed over the shapes.

    Raises:
        SystemExit: Out of time.
    """
    import packed_gpu

    kernel, dense = dict.fromkeys(TOKENS, 0.0), dict.fromkeys(TOKENS, 0.0)
    for shape in SHAPES:
        layer = packed_gpu.Layer(*packed_gpu.SHAPES[shape], bits, torch.bfloat16)
        for m in TOKENS:
            if time.monotonic() > deadline:
                raise SystemExit("tune_packed_linear: out of time; give more with --seconds")
            x = torch.randn(m, layer.k, device="cuda").bfloat16()
            for found, make in ((kernel, packed_gpu.tensor_cores), (dense, packed_gpu.dequantised)):
                values = packed_gpu.times(make(layer, x), replays=20)
                found[m] += values[len(values) // 2]
    return kernel, dense


def write(key: str, bounds: dict[str, int], path: Path = table.PATH) -> None:
    """Put one device's bounds into the table."""
    facts = machine()
    document = json.loads(path.read_text(encoding="utf-8"))
    document["devices"][key] = {
        "measured": {name: facts[name] for name in ("device", "driver", "torch", "commit", "date")},
        "dense_tokens": bounds,
    }
    table.parse(document)
    lines = [f'    "{name}": {json.dumps(entry)}' for name, entry in document["devices"].items()]
    body = ",\n".join(lines)
    path.write_text(f'{{\n  "format": {table.FORMAT},\n  "devices": {{\n{body}\n  }}\n}}\n', encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    if not GPU:
        raise SystemExit("tune_packed_linear: no CUDA device")
    deadline = time.monotonic() + options.seconds
    bounds = {str(bits): crossover(*measure(bits, deadline)) for bits in (3, 4)}
    major, minor = torch.cuda.get_device_capability()
    write(f"sm_{major}{minor}", bounds)
    print(f"sm_{major}{minor}: dequantise + cuBLAS from {bounds} tokens")


if __name__ == "__main__":
    main()
