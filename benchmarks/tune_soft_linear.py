# SPDX-License-Identifier: Apache-2.0
"""Measure every strategy and tile of soft_linear on this GPU and rewrite discquant/ops/soft_linear_table.py.

`python benchmarks/tune_soft_linear.py [--seconds 240]`. The other capabilities' rules are kept as they are.
"""

from __future__ import annotations

import argparse
import pprint
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import DEVICE, GPU, machine, sample

from discquant.ops import soft_linear_table

TABLE = Path(soft_linear_table.__file__)
TOKENS = (128, 512, 1024, 2048, 4096, 8192, 16384)
SHAPES = ((28672, 4096), (4096, 14336))
# A fused tile must win by this much to be chosen: materialising is the better known path.
MARGIN = 0.97


def _bodies(shape: tuple[int, int], tokens: int) -> dict[str, dict[tuple[str, str], Callable[[], Any]]]:
    from discquant.triton_kernels import soft_linear as kernels

    rows, cols = shape
    q = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=DEVICE) & 0xEE
    frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(rows, cols // 64, device=DEVICE) * 0.01).bfloat16()
    x = torch.randn(tokens, cols, device=DEVICE).bfloat16()
    dy = torch.randn(tokens, rows, device=DEVICE).bfloat16()
    ops, state = torch.ops.discquant, (q, frac, scale, None, None)
    single = torch.float32
    key, plain = ("materialise", "compact"), "materialise"
    bodies: dict[str, dict[tuple[str, str], Callable[[], Any]]] = {
        "forward": {key: lambda: ops.soft_linear_fwd(x, *state, None, 4, 64, False, plain)},
        "dx": {key: lambda: ops.soft_linear_dx(dy, *state, 4, 64, False, plain)},
        "dfrac": {key: lambda: ops.soft_linear_dfrac(dy, x, q, scale, None, 4, 64, single, plain)},
        "step": {},
    }
    for name, config in kernels.CONFIGS.items():
        key = ("fused", name)
        bodies["forward"][key] = lambda c=config: kernels.soft_linear_fwd(x, *state, None, 4, 64, False, c)
        bodies["dx"][key] = lambda c=config: kernels.soft_linear_dx(dy, *state, 4, 64, False, c)
        bodies["dfrac"][key] = lambda c=config: kernels.soft_linear_dfrac(
            dy, x, q, scale, None, 4, 64, single, c
        )
    from discquant.ops._steps import flatten_options, launch_arguments
    from discquant.ops.reference.projected_step import StepOptions

    options = launch_arguments(*flatten_options(StepOptions(optimizer="momentum")))
    first = torch.zeros_like(frac, dtype=torch.int8)
    for name, config in kernels.STEP_CONFIGS.items():
        bodies["step"][("fused", name)] = lambda c=config: kernels.soft_linear_step(
            dy, x, frac, ref, scale, first, None, 64, *options, c
        )
    return bodies


def _measure(deadline: float) -> dict[str, dict[int, dict[tuple[str, str], float]]]:
    """stage -> tokens -> choice -> milliseconds summed over the shapes."""
    found: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    for tokens in TOKENS:
        for shape in SHAPES:
            for stage, bodies in _bodies(shape, tokens).items():
                for choice, body in bodies.items():
                    if time.monotonic() > deadline:
                        raise SystemExit("tune_soft_linear: out of time; give more with --seconds")
                    try:
                        times = sample(body, seconds=0.1, most=20)
                        value = times[len(times) // 2]
                    except Exception as cause:  # a tile that does not fit this GPU is not a candidate
                        print(f"{stage} {choice} {shape}: {type(cause).__name__}", file=sys.stderr)
                        value = float("inf")
                    row = found.setdefault(stage, {}).setdefault(tokens, {})
                    row[choice] = row.get(choice, 0.0) + value
    return found


def rules(found: dict[int, dict[tuple[str, str], float]]) -> tuple[tuple[float, str, str], ...]:
    """Best choice per number of tokens, neighbours with the same choice merged; bounds lie between measured sizes."""
    chosen = []
    for tokens in sorted(found):
        fixed = found[tokens].get(("materialise", "compact"), float("inf"))
        best = min(found[tokens], key=lambda choice: found[tokens][choice])
        if best[0] == "fused" and found[tokens][best] > MARGIN * fixed:
            best = ("materialise", "compact")
        chosen.append((tokens, best))
    merged: list[tuple[float, str, str]] = []
    for i, (_, best) in enumerate(chosen):
        bound = float("inf") if i + 1 == len(chosen) else chosen[i + 1][0]
        if merged and merged[-1][1:] == best:
            merged[-1] = (bound, *best)
        else:
            merged.append((bound, *best))
    return tuple(merged)


def write(table: dict[str, Any], measured: dict[str, str]) -> None:
    """Rewrite the table's module; its docstring and types stay."""
    text = TABLE.read_text()
    head = text[: text.index("# capability -> device name")]
    body = pprint.pformat(table, width=100, sort_dicts=False).replace("inf)", "ALL)").replace("(inf", "(ALL")
    TABLE.write_text(
        f"{head}# capability -> device name, date and commit of the measurement.\n"
        f"MEASURED: dict[str, str] = {pprint.pformat(measured, width=100)}\n\n"
        f"RULES: dict[str, dict[str, tuple[Rule, ...]]] = {body}\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    options = parser.parse_args()
    if not GPU:
        raise SystemExit("tune_soft_linear: no CUDA device")
    found = _measure(time.monotonic() + options.seconds)
    major, minor = torch.cuda.get_device_capability()
    key = f"sm_{major}{minor}"
    table = {**soft_linear_table.RULES, key: {stage: rules(found[stage]) for stage in found}}
    facts = machine()
    write(
        table, {**soft_linear_table.MEASURED, key: f"{facts['device']}, {facts['date']}, {facts['commit']}"}
    )
    print(pprint.pformat(table[key]))


if __name__ == "__main__":
    main()
