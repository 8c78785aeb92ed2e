# SPDX-License-Identifier: Apache-2.0
"""Measure for how many tokens which way to multiply is the fastest on this GPU; rewrite packed_linear_table.json.

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

TOKENS = (17, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
SHAPES = ("8B gate_up", "8B down", "8B qkv")
# Tokens beyond which the kernel for few is not timed: more than 32 launches a call, slow to measure.
HOPELESS = 512


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


def fastest_range(times: dict[int, float], others: dict[int, float]) -> list[int] | None:
    """The longest run of measured numbers of tokens in which `times` are below `others`, as [from, before]."""
    best: list[int] = []
    run: list[int] = []
    for m in sorted(times):
        run = [*run, m] if times[m] < others[m] else []
        best = max(best, run, key=len)
    after = [m for m in sorted(times) if best and m > best[-1]]
    return [best[0], after[0] if after else best[-1] + 1] if best else None


Times = dict[int, float]


def measure(bits: int, deadline: float) -> tuple[Times, Times, Times]:
    """Milliseconds of the kernel for few tokens, dequantise + cuBLAS and the kernel for many, summed over the shapes.

    Raises:
        SystemExit: Out of time.
        AssertionError: A way computes something else: nothing is written then.
    """
    import packed_gpu

    kernel, dense, prefill = (dict.fromkeys(TOKENS, 0.0) for _ in range(3))
    ways = (
        (kernel, packed_gpu.tensor_cores),
        (dense, packed_gpu.dequantised),
        (prefill, packed_gpu.prefill),
    )
    for shape in SHAPES:
        layer = packed_gpu.Layer(*packed_gpu.SHAPES[shape], bits, torch.bfloat16)
        for m in TOKENS:
            if time.monotonic() > deadline:
                raise SystemExit("tune_packed_linear: out of time; give more with --seconds")
            x = torch.randn(m, layer.k, device="cuda").bfloat16()
            gate = packed_gpu.Gate(layer, x)
            graphs = {}
            for found, make in ways:
                if found is kernel and m > HOPELESS:
                    found[m] = float("inf")
                    continue
                calls = make(layer, x)
                gate.check(make.__name__, calls[0])
                graphs[make.__name__] = (found, packed_gpu.Graph(calls))
            times = packed_gpu.times_in_turn([graph for _, graph in graphs.values()], replays=20)
            for (name, (found, _)), values in zip(graphs.items(), times, strict=True):
                value = packed_gpu.quantile(values, 0.5)
                found[m] += value
                print(f"{bits} bits, {shape}, {m} tokens, {name}: {value:.4f} ms", flush=True)
    return kernel, dense, prefill


def write(
    key: str, bounds: dict[str, int], ranges: dict[str, list[int] | None], path: Path = table.PATH
) -> None:
    """Put one device's bounds into the table; a width that they leave out keeps what it had, or the default's."""
    facts = machine()
    document = json.loads(path.read_text(encoding="utf-8"))
    before = document["devices"].get(key, document["devices"]["default"])
    known = set((before["measured"] or {}).get("bits", ())) | set(bounds)
    document["devices"][key] = {
        "measured": {name: facts[name] for name in ("device", "driver", "torch", "commit", "date")}
        | {"bits": sorted(known)},
        "dense_tokens": {**before["dense_tokens"], **bounds},
        "prefill_tokens": {**before["prefill_tokens"], **ranges},
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
    major, minor = torch.cuda.get_device_capability()
    key = f"sm_{major}{minor}"
    bounds: dict[str, int] = {}
    ranges: dict[str, list[int] | None] = {}
    for bits in (3, 4):
        kernel, dense, prefill = measure(bits, deadline)
        bounds[str(bits)] = crossover(kernel, dense)
        others = {m: min(kernel[m], dense[m]) for m in kernel}
        ranges[str(bits)] = fastest_range(prefill, others)
        for m in TOKENS:
            row = "  ".join(f"{found[m] * 1e3:8.1f}" for found in (kernel, dense, prefill))
            print(
                f"{bits} bits, {m:4d} tokens, us of the kernel, dequantise + cuBLAS, the kernel for many: {row}"
            )
        # At once: what is measured is kept, should the time not suffice for the other width.
        write(key, bounds, ranges)
    print(f"{key}: dequantise + cuBLAS from {bounds} tokens, the kernel for many in {ranges}")


if __name__ == "__main__":
    main()
