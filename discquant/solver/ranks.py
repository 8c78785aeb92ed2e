# SPDX-License-Identifier: Apache-2.0
"""Several processes solve one model: each takes a share of a step's micro-batches, all hold the same state.

Gradients are summed in the order of a binary tree over the micro-batches, whoever computes them: a rank owns an aligned
subtree, and ranks join theirs pair by pair. So 1, 2 or 4 ranks give the same bytes. The sum is complete before the
clamp, which acts on the gradient of the whole step.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from discquant.errors import ConfigError, RankLostError

# Rank 0 may read or sample text, measure or export alone for as long. A rank that dies is noticed by its connection.
TIMEOUT = dt.timedelta(days=1)
T = TypeVar("T")
_PLACE = re.compile(r"^\[\S+:\d+\]\s*")


def _reason(error: RuntimeError) -> str:
    """Return a backend's error in few words: gloo's begins with the place in its source, and ends with advice."""
    lines = str(error).splitlines()
    return _PLACE.sub("", lines[0]).partition(". ")[0] if lines else type(error).__name__


class TreeSum:
    """Sum of dictionaries of tensors in the order of a binary tree over their indices.

    Holds one partial sum per set bit of the count: at most log2(count) + 1 at a time.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._parts: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the next index; the tensors are taken over and may be changed."""
        level = 0
        while self._parts and self._parts[-1][0] == level:
            values = _joined(self._parts.pop()[1], values)
            level += 1
        self._parts.append((level, values))

    def total(self) -> dict[str, Tensor]:
        """Return the sum, and forget it; empty where nothing was added."""
        values: dict[str, Tensor] = self._parts.pop()[1] if self._parts else {}
        while self._parts:
            values = _joined(self._parts.pop()[1], values)
        return values


def _joined(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in list(right):
        left[name].add_(right.pop(name))
    return left


class Ranks:
    """This process among those that solve together; alone unless `from_environment` finds others.

    Attributes:
        rank: 0 to world - 1; only rank 0 writes files.
        world: Number of processes, a power of two.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        """Take a place; the process group must exist where `world` is above 1.

        Raises:
            ConfigError: `world` is no power of two: the tree of sums cannot be shared evenly.
        """
        if world & (world - 1):
            raise ConfigError(f"ranks: their number must be a power of two, got {world}")
        self.rank, self.world = rank, world

    @staticmethod
    def local() -> int:
        """Return this process's number among those of the machine; 0 without torchrun."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @classmethod
    def from_environment(cls, device: torch.device | None = None) -> Ranks:
        """Join the processes that torchrun started; alone where it did not.

        Args:
            device: Where this process computes; None is the CPU.

        Raises:
            ConfigError: Several processes were given one GPU, or no torchrun says which of them this is.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"ranks: WORLD_SIZE is {world} without {', '.join(missing)}; start the processes with torchrun "
                "--nproc-per-node, or unset WORLD_SIZE to run alone"
            )
        ranks = cls(int(os.environ["RANK"]), world)
        device = device or torch.device("cpu")
        on_gpu = device.type == "cuda"
        if on_gpu and device.index != cls.local():
            raise ConfigError(
                f"ranks: process {cls.local()} of this machine was given {device}; --device cuda gives each its own"
            )
        if not dist.is_initialized():
            if on_gpu:
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def span(self, count: int) -> range:
        """Return which of `count` micro-batches are this rank's: an aligned subtree.

        Raises:
            ConfigError: A rank would have none.
        """
        whole = 1 << max(0, count - 1).bit_length()
        size = whole // self.world
        if size == 0 or (self.world - 1) * size >= count:
            raise ConfigError(
                f"ranks: {self.world} ranks need at least as many micro-batches in each of their subtrees, got {count} "
                "per step; choose a smaller --micro-batch or fewer ranks"
            )
        return range(self.rank * size, min(count, (self.rank + 1) * size))

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the backends raise subclasses of it, and it itself
            raise RankLostError(
                f"ranks: another rank stopped or cannot be reached ({_reason(error)}); the same command continues"
            ) from error

    def join(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of all ranks in place, pair by pair: neighbours first, then pairs of pairs."""
        step = 1
        while step < self.world:
            partner = self.rank ^ step
            for name in sums:
                mine = sums[name].contiguous()
                other = torch.empty_like(mine)
                with self._together():
                    work = dist.batch_isend_irecv(
                        [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, other, partner)]
                    )
                    for request in work:
                        request.wait()
                # a + b and b + a are the same bits, so both partners hold the same sum.
                sums[name] = mine.add_(other)
            step *= 2

    def gather(self, values: list[T]) -> list[T]:
        """Return the values of all ranks in the order of the ranks."""
        if self.world == 1:
            return values
        found: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(found, values)
        return [value for part in found for value in part]

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank; also a barrier."""
        if self.world == 1:
            return value
        held = [value]
        with self._together():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def close(self) -> None:
        """Leave the group without waiting for the others."""
        if self.world > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
