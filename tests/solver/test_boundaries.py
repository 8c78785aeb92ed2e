# SPDX-License-Identifier: Apache-2.0
"""Activations that are kept elsewhere: gone from where they came from, from memory where a disk has them, and in time."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant.solver.boundaries import Boundaries
from discquant.solver.memory import HostArena

AWAY = pytest.mark.parametrize("where", ["host", "disk"])


def settle(store: Boundaries) -> None:
    """Wait for the copies under way."""
    for lane in store._lanes or ():
        lane.wait()


@AWAY
def test_what_has_left_is_held_no_longer(where: Any, tmp_path: Path) -> None:
    """Only the last block's inputs are still where they came from, however many blocks there are."""
    store, given = Boundaries(where, folder=tmp_path), []
    for _ in range(4):
        tensor = torch.randn(3, 5)
        given.append(weakref.ref(tensor))
        store.push([tensor])
        del tensor
    settle(store)
    assert [ref() is None for ref in given] == [True, True, True, False]
    store.pop()
    settle(store)
    assert given[3]() is None
    store.close()


@AWAY
def test_steps_of_any_size(where: Any, tmp_path: Path) -> None:
    """A longer step than the first, a shorter one, and tensors whose bytes end anywhere."""
    store = Boundaries(where, folder=tmp_path)
    for tokens in (1, 333, 7):
        given = [[torch.randn(tokens, 3).bfloat16(), torch.randn(tokens).double()] for _ in range(3)]
        for tensors in given:
            store.push([tensor.clone() for tensor in tensors])
        for tensors in reversed(given):
            assert all(map(torch.equal, tensors, store.pop()))
    store.close()


@AWAY
def test_bytes_are_counted_both_ways(where: Any, tmp_path: Path) -> None:
    store = Boundaries(where, folder=tmp_path)
    for rows in (3, 4):
        store.push([torch.zeros(rows, 5), torch.zeros(rows).bfloat16()])
    assert store.bytes_moved == 2 * 7 * (5 * 4 + 2)
    store.close()


@AWAY
def test_nothing_is_read_before_it_is_written(where: Any, tmp_path: Path) -> None:
    store, leave, found = Boundaries(where, folder=tmp_path), threading.Event(), list[Tensor]()
    given = torch.randn(3, 5)
    _, outward = store._engines()
    outward.submit(lambda: leave.wait(60) and None)
    store.push([given.clone()])
    reading = threading.Thread(target=lambda: found.extend(store.pop()))
    reading.start()
    reading.join(0.2)
    assert not found
    leave.set()
    reading.join(60)
    assert torch.equal(found[0], given)
    store.close()


def in_memory(folder: Path) -> int:
    """Bytes of all activation files that this process has in memory."""
    held, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1].startswith(str(folder)) and words[-1].endswith(".act")
        elif ours and words[0] == "Rss:":
            held += int(words[1]) << 10
    return held


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not tell what maps hold")
def test_what_a_disk_has_is_not_in_memory(tmp_path: Path) -> None:
    """Neither once it is written nor once it is read again: a step of a large model has more than fits."""
    store = Boundaries("disk", folder=tmp_path)
    for _ in range(2):
        store.push([torch.randn(64, 1024)])
        settle(store)
        assert in_memory(tmp_path) == 0
    for _ in range(2):
        store.pop()
        settle(store)
        assert in_memory(tmp_path) == 0
    store.close()


def test_memory_that_is_not_pinned_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostArena, "note", "host memory is not pinned")
    store = Boundaries("host")
    for _ in range(3):
        store.push([torch.zeros(4)])
    assert store.notes == ["host memory is not pinned (activations)"]
    store.close()


@AWAY
def test_no_thread_and_no_file_is_left(where: Any, tmp_path: Path) -> None:
    before = threading.active_count()
    store = Boundaries(where, folder=tmp_path)
    for _ in range(2):
        store.push([torch.zeros(4)])
    store.pop()
    store.close()
    assert threading.active_count() == before and not list(tmp_path.iterdir())
