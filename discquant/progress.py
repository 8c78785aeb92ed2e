# SPDX-License-Identifier: Apache-2.0
"""Progress on the terminal: phase, loss, share rounded, time left; plain lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from discquant.solver.solver import StepRecord

PLAIN_EVERY = 16


class ProgressBar:
    """Shows phases as lines and solver steps as a bar."""

    def __init__(self, loss: str = "KL") -> None:
        """Create without drawing; `loss` is the name of what a step reports."""
        self.loss = loss
        self.console = Console(stderr=True)
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("solve"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                f"{loss} "
                "{task.fields[loss]:.4f}  rounded {task.fields[rounded]:.1%}  moved {task.fields[moved]:.1%}"
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )

    def __enter__(self) -> ProgressBar:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; a bar that was never begun would leave an empty line."""
        if self._task is not None:
            self._bar.stop()

    def phase(self, name: str) -> None:
        """Announce a phase."""
        if self._task is not None:
            self._bar.stop()
        self.console.print(f"[bold]{name}[/bold]")

    def message(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False)

    def step(self, record: StepRecord, total: int) -> None:
        """Show a solver step."""
        if not self.console.is_terminal:
            if record.step % PLAIN_EVERY == 0 or record.step == total:
                self.message(
                    f"step {record.step}/{total}  {self.loss} {record.loss:.4f}  rounded {1 - record.fractional:.1%}  "
                    f"moved {record.moved:.1%}"
                )
            return
        loss, rounded, moved = record.loss, 1 - record.fractional, record.moved
        if self._task is None:
            self._task = self._bar.add_task("solve", total=total, loss=loss, rounded=rounded, moved=moved)
            self._bar.start()
        self._bar.update(self._task, completed=record.step, loss=loss, rounded=rounded, moved=moved)
