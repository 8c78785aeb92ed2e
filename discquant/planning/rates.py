# SPDX-License-Identifier: Apache-2.0
"""Measured rates of this machine: kept in a file by `discquant plan --measure`, read by every later plan."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from discquant import environment
from discquant.planning.shape import ModelShape
from discquant.planning.traffic import ATTENTION_BACKWARD, ATTENTION_FORWARD, HEAD_FLOP

FILE = "calibration.json"


@dataclass(frozen=True)
class Rates:
    """What one decoder block of a shape was timed at.

    Attributes:
        machine: Processor or accelerator, threads and torch version: rates hold for no other.
        dtype: Compute dtype.
        state: State format and optimizer, e.g. "fp32 adamw".
        hidden: Width of the block that was timed.
        weights: Weights of that block.
        tokens: Tokens per forward pass.
        forward: FLOP/s of the forward pass, attention counted.
        backward: FLOP/s of forward and backward with gradients of input and weights.
        matmul: FLOP/s of a bare matrix multiplication of the block's largest layer.
        head: FLOP/s of the head's divergence, counted as 6 V H per token.
        soft: Seconds per weight to make student weights.
        step: Seconds per weight of the projected step.
        copy: Bytes/s of a copy, counted once.
    """

    machine: str
    dtype: str
    state: str
    hidden: int
    weights: int
    tokens: int
    forward: float
    backward: float
    matmul: float
    head: float
    soft: float
    step: float
    copy: float


def machine_name() -> str:
    """Return what rates depend on besides the model."""
    import torch

    if torch.cuda.is_available():
        where = torch.cuda.get_device_properties(0).name
    else:
        cpu = environment.facts()["cpu"]
        where = f"{cpu.get('model')} x {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"


def cache_file() -> Path:
    """Return where rates are kept: DISCQUANT_CACHE, else the user's cache folder."""
    named = environment.variable("DISCQUANT_CACHE")
    base = (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "discquant"
    )
    return base / FILE


def load_rates(file: Path | None = None) -> list[Rates]:
    """Return all kept rates; none where the file is absent or damaged (it is only a cache)."""
    path = file or cache_file()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["rates"]
        return [Rates(**entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def keep_rates(rates: Rates, file: Path | None = None) -> Path:
    """Add rates to the file, in place of older ones of the same machine, dtype, state and shape."""
    path = file or cache_file()

    def key(entry: Rates) -> tuple[object, ...]:
        return entry.machine, entry.dtype, entry.state, entry.hidden, entry.weights, entry.tokens

    kept = [entry for entry in load_rates(path) if key(entry) != key(rates)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps({"rates": [asdict(entry) for entry in [*kept, rates]]}, indent=2) + "\n", encoding="utf-8"
    )
    temporary.replace(path)
    return path


def nearest_rates(
    known: Sequence[Rates], *, machine: str, dtype: str, state: str, weights: int, tokens: int
) -> Rates | None:
    """Return the rates of this machine and dtype whose block and pass are most alike, None where there are none.

    A block of another size, another pass and another state format count as distance in that order of weight; rates
    of a block more than eight times larger or smaller are not used.
    """

    def distance(entry: Rates) -> float:
        size = abs(math.log2(max(1, entry.weights) / max(1, weights)))
        length = abs(math.log2(max(1, entry.tokens) / max(1, tokens)))
        return 2 * size + length + (0.5 if entry.state != state else 0.0)

    fitting = [
        entry
        for entry in known
        if entry.machine == machine
        and entry.dtype == dtype
        and abs(math.log2(max(1, entry.weights) / max(1, weights))) <= 3
    ]
    return min(fitting, key=distance) if fitting else None


def measured_step(
    rates: Rates, shape: ModelShape, *, tokens: int, seqlen: int, teacher_known: bool, keep_graph: bool
) -> float:
    """Return seconds of one step from measured rates, for what the engine really does.

    forward: the student, and the teacher unless its last hidden state is remembered.  backward: forward and backward
    of every block, or the backward alone where the graph was kept.  Student weights are made once per pass.
    """
    scores = 1.0 * seqlen * shape.attention * len(shape.blocks)
    single = 2 * shape.active_weights + ATTENTION_FORWARD / 2 * scores
    both = 6 * shape.active_weights + ATTENTION_BACKWARD * scores
    passes = (0 if keep_graph else 1) + (0 if teacher_known else 1)
    blocks = tokens * (passes * single / rates.forward + both / rates.backward)
    head = tokens * HEAD_FLOP * float(shape.head) / rates.head
    made = 1 if keep_graph else 2
    return blocks + head + shape.weights * (made * rates.soft + rates.step)
