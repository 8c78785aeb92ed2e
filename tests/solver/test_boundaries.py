# SPDX-License-Identifier: Apache-2.0
"""Activations kept elsewhere: gone from where they came from, and from memory where a disk has them; none too early."""

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
from discquant.solver.placement import Lane

AWAY = pytest.mark.parametrize("where", ["host", "disk"])


def settle(store: Boundaries) -> None:
    """Wait for the copies under way."""
    for lane in store._lanes or ():
        lane.wait()


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_what_is_taken_out_is_what_was_put_in(where: str, tmp_path: Path) -> None:
    store = Boundaries(where, folder=tmp_path)  # type: ignore[arg-type]
    for step in range(2):
        given = [[torch.randn(2, 3 + step), torch.randn(4).bfloat16()] for _ in range(5)]
        for tensors in given:
            store.push([tensor.clone() for tensor in tensors])
        for tensors in reversed(given):
            for expected, found in zip(tensors, store.pop(), strict=True):
                assert torch.equal(expected, found)
    store.push(given[0])
    store.clear()
    store.push(given[1])
    assert torch.equal(store.pop()[0], given[1][0])
    store.close()


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_a_step_that_failed_half_way_leaves_nothing(where: Any, tmp_path: Path) -> None:
    """Neither in memory nor in the way of the next one, which may have fewer blocks."""
    store = Boundaries(where, folder=tmp_path)
    given = torch.randn(3, 5)
    kept = weakref.ref(given)
    for tensor in (given, torch.randn(3, 5), torch.randn(3, 5)):
        store.push([tensor])
    store.pop()
    del given, tensor
    store.clear()
    assert kept() is None
    for count in (1, 2):
        again = [torch.randn(3, 5) for _ in range(count)]
        for tensor in again:
            store.push([tensor.clone()])
        for tensor in reversed(again):
            assert torch.equal(store.pop()[0], tensor)
    assert len(list(tmp_path.iterdir())) == (3 if where == "disk" else 0)
    store.close()


@AWAY
def test_what_was_taken_out_stays_when_its_place_is_used_again(where: Any, tmp_path: Path) -> None:
    store, given = Boundaries(where, folder=tmp_path), torch.randn(3, 5)
    store.push([given.clone()])
    (found,) = store.pop()
    store.push([torch.zeros(3, 5)])
    store.close()
    assert torch.equal(found, given)


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


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_let_go_under_a_copy(fails: bool, streams: list[Any]) -> None:
    """After a failed step and at the end the copies under way have ended, those after a failed one, too."""
    store = Boundaries("host")
    store._lanes = (Lane(torch.device("cuda")), Lane(torch.device("cuda")))
    for _ in range(3):
        store.push([torch.randn(4, 4)])
    store.pop()
    assert any(stream.under_way for stream in streams)
    if fails:
        store._bring(0)

        def refuse() -> None:
            raise RuntimeError("a copy that fails")

        store._lanes[1].submit(refuse)
    store.clear()
    assert not any(stream.under_way for stream in streams)
    store.close()


def test_inputs_live_until_their_copy_has_ended(streams: list[Any]) -> None:
    """A GPU copies after the call: the memory must not go to others meanwhile."""
    store = Boundaries("host")
    store._lanes = (Lane(torch.device("cuda")), Lane(torch.device("cuda")))
    outward = streams[1]
    store.push([torch.randn(4, 4)])
    settled = store._sent[0]
    assert settled is not None and settled.result() and outward.under_way
    store.pop()
    assert not outward.under_way
    store.close()
