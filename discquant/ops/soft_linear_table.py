# SPDX-License-Identifier: Apache-2.0
"""Which strategy and tile `soft_linear` takes: rules by device, pass, number of tokens and size of the weight.

The rules are data, soft_linear_table.json; `python benchmarks/tune_soft_linear.py` measures them on the GPU at hand.
Rules whose `measured` is null are a first guess (materialise from 1024 tokens on), not measured on a GPU; a device the
table does not name takes those of "default".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 2
STAGES = ("forward", "dx", "dfrac", "step")
CHOICES = ("fused", "materialise")
PATH = Path(__file__).with_name("soft_linear_table.json")


class Rule(NamedTuple):
    """Holds below both bounds (None is no bound); the first rule of a list that holds decides."""

    tokens_below: float | None
    weights_below: float | None
    strategy: str
    tile: str


class Device(NamedTuple):
    """Rules of one compute capability; `measured` names device, date, commit and versions, None for a first guess."""

    measured: dict[str, str] | None
    rules: dict[str, tuple[Rule, ...]]


def parse(document: Any) -> dict[str, Device]:
    """Read the table's JSON document.

    Raises:
        ValueError: Another format version, an unknown stage or strategy, or rules that do not cover every size.
    """
    found = document.get("format") if isinstance(document, Mapping) else None
    if found != FORMAT:
        raise ValueError(f"soft_linear_table: format must be {FORMAT}, got {found!r}; tune again")
    table = {}
    for key, entry in document["devices"].items():
        rules = {stage: tuple(Rule(*rule) for rule in entry[stage]) for stage in STAGES}
        for stage, listed in rules.items():
            if not listed or listed[-1][:2] != (None, None):
                raise ValueError(f"soft_linear_table: the last {stage} rule of {key} must have no bound")
            if any(rule.strategy not in CHOICES for rule in listed):
                raise ValueError(f"soft_linear_table: a {stage} rule of {key} must choose one of {CHOICES}")
        table[key] = Device(entry["measured"], rules)
    if "default" not in table:
        raise ValueError("soft_linear_table: it must hold rules for the device 'default'")
    return table


def render(table: Mapping[str, Device]) -> str:
    """Return the JSON document of a table, one rule list per line."""
    devices = []
    for key, device in table.items():
        lines = [f'      "measured": {json.dumps(device.measured)}']
        lines += [f'      "{stage}": {json.dumps(device.rules[stage])}' for stage in STAGES]
        devices.append(f'    "{key}": {{\n' + ",\n".join(lines) + "\n    }")
    return f'{{\n  "format": {FORMAT},\n  "devices": {{\n' + ",\n".join(devices) + "\n  }\n}\n"


@functools.cache
def load() -> dict[str, Device]:
    """Return the installed table."""
    return parse(json.loads(PATH.read_text(encoding="utf-8")))


def device_key(capability: tuple[int, int] | None, table: Mapping[str, Device]) -> str:
    """Return whose rules a device takes: "sm_<major><minor>" where the table knows it, else "default".

    A consumer card has less shared memory than the data-centre card of its family, so families share no rules.

    Args:
        capability: CUDA compute capability, None for a CPU.
        table: Known devices.
    """
    key = "default" if capability is None else f"sm_{capability[0]}{capability[1]}"
    return key if key in table else "default"


def pick(rules: Sequence[Rule], tokens: int, weights: int) -> tuple[str, str]:
    """Return strategy and tile of the first rule that holds."""
    for rule in rules:
        below = rule.tokens_below is None or tokens < rule.tokens_below
        if below and (rule.weights_below is None or weights < rule.weights_below):
            return rule.strategy, rule.tile
    raise AssertionError("the last rule has no bound")


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def rule(device: torch.device, stage: str, tokens: int, weights: int) -> tuple[str, str]:
    """Return strategy and tile for a device and one pass.

    Args:
        device: Where the tensors are.
        stage: "forward", "dx", "dfrac" or "step".
        tokens: Rows of the activation.
        weights: Elements of the weight.
    """
    table = load()
    return pick(table[device_key(_capability(device), table)].rules[stage], tokens, weights)


def source(device: torch.device) -> str:
    """Say where a device's rules come from: the measurement, or that there is none."""
    table = load()
    measured = table[device_key(_capability(device), table)].measured
    if measured is None:
        return "not measured on a GPU"
    return "measured on " + ", ".join(str(value) for value in measured.values())
