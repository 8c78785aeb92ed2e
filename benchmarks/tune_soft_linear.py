# SPDX-License-Identifier: Apache-2.0
"""Measure every strategy and tile of soft_linear on this GPU and rewrite discquant/ops/soft_linear_table.json.

`python benchmarks/tune_soft_linear.py [--seconds 170] [--table FILE]`. Rules of other devices are kept. A measured
number of tokens stands for all up to the next one; what the time did not reach is left out.
--dry-run times small shapes wherever the kernels run (also interpreted) and prints the rules, writing nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from harness import DEVICE, GPU, machine, sample

from discquant.ops import soft_linear_table as tables
from discquant.ops.soft_linear_table import Device, Rule

Choice = tuple[str, str]
# stage -> size of the weight -> tokens -> choice -> milliseconds
Found = dict[str, dict[int, dict[int, dict[Choice, float]]]]
# The middle first: what most runs use is measured even when the time is short.
TOKENS = (4096, 16384, 1024, 8192, 2048, 512, 128)
SHAPES = ((28672, 4096), (4096, 4096))
SMALL_TOKENS, SMALL_SHAPES = (64, 16), ((64, 32), (32, 32))
MATERIALISE: Choice = ("materialise", "compact")
# A fused tile must win by this much to be chosen: materialising is the better known path.
MARGIN = 0.97


def _bodies(shape: tuple[int, int], tokens: int) -> dict[str, dict[Choice, Callable[[], Any]]]:
    from discquant.triton_kernels import soft_linear as kernels
    from discquant.triton_kernels import soft_linear_tiles as tiles

    from discquant.ops import projected_step_deferred_
    from discquant.ops._steps import flatten_options, launch_arguments
    from discquant.ops.reference.projected_step import StepOptions
    from discquant.ops.reference.soft_linear import weight_gradient

    rows, cols = shape
    group = min(64, cols)
    dtype = torch.bfloat16 if GPU else torch.float32
    q = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=DEVICE) & 0xEE
    frac, ref = torch.randint(0, 256, (2, rows, cols), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(rows, cols // group, device=DEVICE) * 0.01).bfloat16()
    x = torch.randn(tokens, cols, device=DEVICE).to(dtype)
    dy = torch.randn(tokens, rows, device=DEVICE).to(dtype)
    ops, state, single = torch.ops.discquant, (q, frac, scale, None, None), torch.float32
    options = StepOptions(optimizer="momentum")
    first = torch.zeros_like(frac, dtype=torch.int8)
    plain = "materialise"
    bodies: dict[str, dict[Choice, Callable[[], Any]]] = {
        "forward": {MATERIALISE: lambda: ops.soft_linear_fwd(x, *state, None, 4, group, False, plain)},
        "dx": {MATERIALISE: lambda: ops.soft_linear_dx(dy, *state, 4, group, False, plain)},
        "dfrac": {MATERIALISE: lambda: ops.soft_linear_dfrac(dy, x, q, scale, None, 4, group, single, plain)},
        "step": {MATERIALISE: lambda: projected_step_deferred_(
            frac, ref, weight_gradient(dy, x), scale, group_size=group, options=options, momentum=first, impl="triton"
        )},
    }  # fmt: skip
    # Other tiles need more shared memory than the device has, as the ahead-of-time check knows.
    large = not GPU or torch.cuda.get_device_capability()[0] == 9
    for name, config in tiles.CONFIGS.items():
        if name in tiles.LARGE and not large:
            continue
        key = ("fused", name)
        bodies["forward"][key] = lambda c=config: kernels.soft_linear_fwd(x, *state, None, 4, group, False, c)
        bodies["dx"][key] = lambda c=config: kernels.soft_linear_dx(dy, *state, 4, group, False, c)
        bodies["dfrac"][key] = lambda c=config: kernels.soft_linear_dfrac(
            dy, x, q, scale, None, 4, group, single, c
        )
    launch = launch_arguments(*flatten_options(options))
    for name, config in tiles.STEP_CONFIGS.items():
        bodies["step"][("fused", name)] = lambda c=config: kernels.soft_linear_step(
            dy, x, frac, ref, scale, first, None, None, None, group, *launch, c
        )
    return bodies


def _measurements(dry: bool) -> Iterator[tuple[str, int, int, Choice, Callable[[], Any]]]:
    for tokens in SMALL_TOKENS if dry else TOKENS:
        for shape in SMALL_SHAPES if dry else SHAPES:
            for stage, bodies in _bodies(shape, tokens).items():
                for choice, body in bodies.items():
                    yield stage, shape[0] * shape[1], tokens, choice, body


def measure(deadline: float, dry: bool) -> Found:
    """Time every choice until the deadline; a token count that was not finished for all shapes is dropped."""
    found: Found = {}
    done: set[int] = set()
    current: int | None = None
    for stage, weights, tokens, choice, body in _measurements(dry):
        if current not in (None, tokens):
            done.add(current)
        current = tokens
        if time.monotonic() > deadline:
            print(
                f"tune_soft_linear: out of time at {tokens} tokens, {len(done)} of the token counts measured"
            )
            break
        try:
            times = sample(body, seconds=0.02 if dry else 0.08, most=3 if dry else 15)
            value = times[len(times) // 2]
        except Exception as cause:  # a tile that does not fit this GPU is not a candidate
            print(f"{stage} {choice} {tokens} tokens: {type(cause).__name__}", file=sys.stderr)
            value = float("inf")
        found.setdefault(stage, {}).setdefault(weights, {}).setdefault(tokens, {})[choice] = value
    else:
        done.add(current or 0)
    return {
        stage: {size: {t: v for t, v in by.items() if t in done} for size, by in sizes.items()}
        for stage, sizes in found.items()
    }


def best(row: dict[Choice, float]) -> Choice:
    """The fastest choice; a fused one only if it beats the plain path by the margin.

    The tile is that of the fastest fused kernel in any case: strategy="fused" asks for it by name.
    """
    fixed = row.get(MATERIALISE, float("inf"))
    fused = {
        tile: value for (strategy, tile), value in row.items() if strategy == "fused" and value < float("inf")
    }
    if not fused:
        return MATERIALISE
    tile = min(fused, key=lambda key: fused[key])
    return ("fused" if fused[tile] <= MARGIN * fixed else "materialise", tile)


def rules(sizes: dict[int, dict[int, dict[Choice, float]]]) -> tuple[Rule, ...]:
    """Rules of one stage: bounds on tokens and on the weight's size lie between what was measured.

    A measured number of tokens stands for all from it up to the next measured one; fewer than the least take its rule.
    """
    ordered = sorted(sizes)
    tokens = sorted(set.intersection(*(set(sizes[size]) for size in ordered)))
    if not tokens:
        raise ValueError(
            "tune_soft_linear: no number of tokens was measured for every shape; give more --seconds"
        )
    found: list[Rule] = []
    for i, count in enumerate(tokens):
        below = None if i + 1 == len(tokens) else tokens[i + 1]
        picks = [best(sizes[size][count]) for size in ordered]
        group = [
            Rule(
                below,
                None if last == len(ordered) - 1 else round((ordered[last] * ordered[last + 1]) ** 0.5),
                *pick,
            )
            for last, pick in enumerate(picks)
            # A size with the choice of the next larger one is covered by that one's rule.
            if last == len(ordered) - 1 or pick != picks[last + 1]
        ]
        # The same choices as at the tokens before: widen their bound.
        previous = found[-len(group) :]
        same = [rule[1:] for rule in previous] == [rule[1:] for rule in group] and (
            len({rule.tokens_below for rule in previous}) == 1
            and (len(found) == len(group) or found[-len(group) - 1].tokens_below != previous[0].tokens_below)
        )
        if same:
            found[-len(group) :] = group
        else:
            found += group
    return tuple(found)


def device_entry(found: Found) -> Device:
    """The table's entry of this machine."""
    facts = machine()
    measured = {name: facts[name] for name in ("device", "date", "commit", "driver", "torch", "triton")}
    return Device(measured, {stage: rules(found[stage]) for stage in tables.STAGES})


def write(path: Path, key: str, entry: Device) -> None:
    """Put one device's entry into a table file, the others kept; the file is replaced at once or not at all."""
    table = tables.parse(json.loads(path.read_text(encoding="utf-8")))
    text = tables.render({**table, key: entry})
    tables.parse(json.loads(text))
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--table", type=Path, default=tables.PATH, help="file to rewrite")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not GPU and not options.dry_run:
        raise SystemExit("tune_soft_linear: no CUDA device (--dry-run works without one)")
    entry = device_entry(measure(time.monotonic() + options.seconds, options.dry_run))
    key = "default"
    if GPU:
        major, minor = torch.cuda.get_device_capability()
        key = f"sm_{major}{minor}"
    if not options.dry_run:
        write(options.table, key, entry)
    print(tables.render({key: entry}))


if __name__ == "__main__":
    main()
