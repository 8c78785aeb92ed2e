# SPDX-License-Identifier: Apache-2.0
"""Ranks that would start from different codes are told before the first step."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.config import QuantizeConfig
from discquant.errors import ResumeError
from discquant.run import solving
from discquant.run.directory import RunDirectory
from discquant.run.events import Events, StopSignal
from discquant.run.solving import Solving, keep_start
from discquant.run.work import Codes, Work
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows


class _Rank:
    """One of two ranks in threads, which can gather and share."""

    world = 2

    def __init__(self, rank: int, values: list[Any], together: threading.Barrier) -> None:
        self.rank, self.first, self._values, self._together = rank, rank == 0, values, together

    def gather(self, values: list[Any]) -> list[Any]:
        self._values[self.rank] = values
        self._together.wait()
        found = [value for part in self._values for value in part]
        self._together.wait()
        return found

    def share(self, value: Any) -> Any:
        return self.gather([value])[0]


class _Begun(Exception):
    """The solve would begin."""


class _Lazy(Mapping[str, Tensor]):
    """Codes that are computed when they are asked for; counts how often."""

    def __init__(self, codes: dict[str, Tensor]) -> None:
        self.codes, self.asked = codes, 0

    def __getitem__(self, name: str) -> Tensor:
        self.asked += 1
        return self.codes[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.codes)

    def __len__(self) -> int:
        return len(self.codes)


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where the solve is made."""

    def stop(*given: Any, **named: Any) -> None:
        raise _Begun

    monkeypatch.setattr(solving, "Solve", stop)


def _run(folder: Path, ranks: Any, codes: Codes | None) -> Exception:
    """How a rank ends that starts from these codes unless its directory holds others."""
    engine = dataclasses.replace(Engine(), ranks=ranks)
    rows = TokenRows(None, torch.zeros(2, 4, dtype=torch.int64), None, 1)  # type: ignore[arg-type]
    run = Solving(RunDirectory(folder), QuantizeConfig(), engine, Events(), StopSignal())
    nothing: Any = None
    with pytest.raises((_Begun, ResumeError)) as caught:
        run.run(Work(nothing, nothing, {}, torch.float32, rows, nothing), choose_start=lambda: codes)
    return caught.value


def _two(folders: list[Path], codes: list[Codes | None]) -> list[Exception]:
    together, values = threading.Barrier(2, timeout=60), [None, None]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        ranks = (_Rank(rank, values, together) for rank in range(2))
        return list(pool.map(_run, folders, ranks, codes))


def _codes() -> dict[str, Tensor]:
    return {name: torch.randint(0, 8, (4, 6), dtype=torch.uint8) for name in ("a", "b")}


@pytest.mark.usefixtures("begins")
def test_other_codes_are_told(tmp_path: Path) -> None:
    """One code of one layer differs, or one rank has none: every rank hears whose codes differ."""
    codes = _codes()
    other = {**codes, "b": codes["b"].clone()}
    other["b"][3, 5] ^= 1
    given: Codes | None
    for number, given in enumerate((other, {"a": codes["a"]}, None)):
        folders = [tmp_path / f"{number}-{rank}" for rank in range(2)]
        for error in _two(folders, [codes, given]):
            assert isinstance(error, ResumeError)
            assert "different codes (rank 0: " in str(error) and "rank 1: " in str(error)
    assert "rank 1: none" in str(error)


@pytest.mark.usefixtures("begins")
def test_the_same_codes_begin(tmp_path: Path) -> None:
    """Read by one rank, computed by the other; none at all; and a single rank hashes nothing."""
    codes = _codes()
    folders = [tmp_path / "0", tmp_path / "1"]
    assert all(isinstance(end, _Begun) for end in _two(folders, [None, None]))
    keep_start(RunDirectory(folders[0]), codes)
    assert all(isinstance(end, _Begun) for end in _two(folders, [None, _Lazy(codes)]))
    keep_start(RunDirectory(folders[1]), {**codes, "a": 7 - codes["a"]})
    assert all(isinstance(end, ResumeError) for end in _two(folders, [None, None]))
    alone, lazy = Engine().ranks, _Lazy(codes)
    assert isinstance(_run(tmp_path, alone, lazy), _Begun)
    assert lazy.asked == 3 * len(codes), "written once: for shapes, digests and content"
