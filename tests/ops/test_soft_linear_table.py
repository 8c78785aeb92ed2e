# SPDX-License-Identifier: Apache-2.0
"""The table of strategies: its format, its look-ups, and what an unknown device gets."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from discquant.ops import soft_linear_table as tables
from discquant.ops.soft_linear_table import Device, Rule


def document() -> dict[str, Any]:
    return json.loads(tables.PATH.read_text())


def test_installed_table_covers_everything() -> None:
    """Every rule names a tile that exists, bounds ascend, and rendering what was read gives it back."""
    from discquant.triton_kernels.soft_linear_tiles import CONFIGS, STEP_CONFIGS

    table = tables.load()
    assert tables.parse(json.loads(tables.render(table))) == table
    for device in table.values():
        for stage, rules in device.rules.items():
            bounds = [rule.tokens_below for rule in rules if rule.tokens_below is not None]
            assert bounds == sorted(bounds)
            assert all(rule.tile in (STEP_CONFIGS if stage == "step" else CONFIGS) for rule in rules)


def test_unmeasured_device_takes_the_documented_default() -> None:
    table = tables.load()
    assert tables.device_key(None, table) == "default"
    for unknown in ((8, 6), (8, 9), (9, 1), (12, 0), (7, 5)):
        assert tables.device_key(unknown, table) == "default"
    assert tables.device_key((9, 0), table) == "sm_90"
    # The default: fused below 1024 tokens, materialise from there on; the step apart from the matmul.
    cpu = torch.device("cpu")
    assert tables.rule(cpu, "forward", 1023, 10**8) == ("fused", "compact")
    assert tables.rule(cpu, "dx", 1024, 10**8) == ("materialise", "compact")
    assert tables.rule(cpu, "step", 1, 1) == ("materialise", "compact")
    assert tables.source(cpu) == "not measured on a GPU"


def test_first_rule_that_holds_decides() -> None:
    rules = [
        Rule(512, 1000, "fused", "a"),
        Rule(512, None, "fused", "b"),
        Rule(None, None, "materialise", "c"),
    ]
    assert tables.pick(rules, 511, 999) == ("fused", "a")
    assert tables.pick(rules, 511, 1000) == ("fused", "b")
    assert tables.pick(rules, 512, 1) == ("materialise", "c")


def test_measured_entry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tables.load()["default"]
    table = {"default": Device({"device": "Some GPU", "date": "2026-01-01"}, entry.rules)}
    monkeypatch.setattr(tables, "load", lambda: table)
    assert tables.source(torch.device("cpu")) == "measured on Some GPU, 2026-01-01"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=1), "format must be 2, got 1; tune again"),
        (lambda d: d.pop("format"), "format must be 2, got None"),
        (lambda d: d["devices"]["default"]["dx"].pop(), "the last dx rule of default must have no bound"),
        (lambda d: d["devices"]["default"].update(step=[]), "the last step rule of default"),
        (lambda d: d["devices"].pop("default"), "must hold rules for the device 'default'"),
        (
            lambda d: d["devices"]["sm_80"].update(dfrac=[[None, None, "guess", "compact"]]),
            "a dfrac rule of sm_80 must choose one of",
        ),
    ],
)
def test_rejects_a_table_it_cannot_read(change: Any, message: str) -> None:
    changed = copy.deepcopy(document())
    change(changed)
    with pytest.raises(ValueError, match=message):
        tables.parse(changed)
