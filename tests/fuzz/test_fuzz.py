# SPDX-License-Identifier: Apache-2.0
"""A few hundred damaged files of each format; `make fuzz` takes ten thousand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from discquant.formats import registry

COUNT = 200


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_harness", Path(__file__).with_name("harness.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", registry.names())
def test_damaged_files_are_read_or_refused(harness: ModuleType, tmp_path: Path, name: str) -> None:
    result = harness.fuzz(name, COUNT, tmp_path)
    assert not result.failures, result.failures[:5]
    # Some damage goes unseen (a flipped code is a code); most must not.
    assert result.cases == COUNT and sum(result.refused.values()) > COUNT // 4


def test_the_harness_notices(harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash, a hang and a blow-up of memory are each found."""
    import torch

    result = harness.Result()

    def crash(chosen: object, path: Path) -> None:
        raise KeyError("weight")

    def hang(chosen: object, path: Path) -> None:
        while True:
            pass

    def blow(chosen: object, path: Path) -> None:
        torch.empty(1 << 33, dtype=torch.uint8)

    monkeypatch.setattr(harness, "SECONDS", 0.2)
    with harness.limits():
        for number, bad in enumerate((crash, hang, blow)):
            monkeypatch.setattr(harness, "consume", bad)
            harness.check(None, tmp_path, result, number)
    assert [failure["case"] for failure in result.failures] == [0, 1, 2]
    assert "KeyError" in result.failures[0]["error"] and "TookTooLong" in result.failures[1]["error"]
