# SPDX-License-Identifier: Apache-2.0
"""What a run tells its caller, and how signals stop it: between two steps, so that nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from discquant.solver.solver import StepRecord


class RunStoppedError(BaseException):
    """SIGTERM or SIGINT arrived; the run can be continued. Like KeyboardInterrupt, no library's `except` takes it.

    Attributes:
        signal: Its number; SIGTERM where another rank got it.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        """Keep the number beside the message."""
        super().__init__(message)
        self.signal = int(number)


@dataclass
class Events:
    """What a caller may listen to; every callback is optional."""

    phase: Callable[[str], None] | None = None
    step: Callable[[StepRecord, int], None] | None = None
    message: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        """Pass one line on."""
        if self.message is not None:
            self.message(text)


def _stopped(number: int) -> RunStoppedError:
    return RunStoppedError(f"stopped by {signal.Signals(number).name}; the same command continues", number)


class StopSignal:
    """Turns SIGTERM and SIGINT into RunStoppedError; within `deferred` into a flag, so that a step can be finished."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._defer = False
        self._previous: dict[int, Any] = {}

    def _catch(self, number: int, frame: object) -> None:
        self.caught = number
        if not self._defer:
            raise _stopped(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals; the caller looks at `caught`, and what it has not seen is raised when the block ends.

        Raises:
            RunStoppedError: A signal arrived, and the block ended all the same.
        """
        self._defer = True
        try:
            yield
        finally:
            self._defer = False
        if self.caught is not None:
            raise _stopped(self.caught)

    def __enter__(self) -> StopSignal:
        self.caught = None  # of an earlier use
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
