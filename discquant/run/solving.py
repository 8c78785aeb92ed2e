# SPDX-License-Identifier: Apache-2.0
"""The solve of a run: begun or continued, checkpointed, watched on held-out text, stopped by signals between steps."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from discquant.calibration import Windows
from discquant.config import QuantizeConfig
from discquant.errors import ResumeError
from discquant.run.checkpoint import Checkpointer, has_checkpoint, load_checkpoint
from discquant.run.directory import RunDirectory, write_atomic
from discquant.run.events import Events, RunStoppedError, StopSignal
from discquant.run.phases import resident_bytes
from discquant.run.stored import StoredCodes, digest_codes, keep_codes
from discquant.run.summary import START, frac_histogram
from discquant.run.work import Codes, Work
from discquant.solver.engine import Engine
from discquant.solver.measure import mean_kl
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve
from discquant.solver.solver import StepRecord

VALIDATIONS = 16  # per run
VALIDATION_ROWS = 8
START_CODES = "start_codes.safetensors"


def kept_start(directory: RunDirectory) -> Codes | None:
    """Return the codes that this run started from, read from their file one by one; None where it has none."""
    path = directory.path / START_CODES
    return StoredCodes(path) if path.exists() else None


def keep_start(directory: RunDirectory, codes: Codes) -> None:
    """Write the codes that this run starts from, one layer in memory at a time."""
    keep_codes(directory.path / START_CODES, codes)


def _moved(solve: Solve) -> dict[str, float]:
    """Return what has been moved so far, and how long was waited for it."""
    placement = solve.solver.placement
    return {
        "bytes_in": placement.bytes_in,
        "bytes_out": placement.bytes_out,
        "boundary_bytes": solve.solver.boundaries.bytes_moved,
        "waited_seconds": placement.waited,
    }


def _by_rank(values: Sequence[object]) -> str:
    """Tell one value per rank."""
    return ", ".join(
        f"rank {rank}: {'none' if value is None else value}" for rank, value in enumerate(values)
    )


class Solving:
    """Takes the steps of one solve that are left.

    Attributes:
        solve: The solve, once it is begun.
        checkpoints: What checkpoints cost, once all steps are taken.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: QuantizeConfig,
        engine: Engine,
        events: Events,
        stop: StopSignal,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind; nothing is computed yet. `beat` is called after every step."""
        self.directory, self.config, self.engine, self.events = directory, config, engine, events
        self.solve: Solve | None = None
        self.checkpoints: dict[str, Any] | None = None
        self._steps = 0  # taken by this process
        self._moved: dict[str, float] = {}  # by them
        self._said: set[str] = set()
        self._stop, self._beat = stop, beat
        self._writer: Checkpointer | None = None
        self._folder = directory.path / "checkpoints"

    def run(self, work: Work, *, choose_start: Callable[[], Codes | None]) -> Solve:
        """Begin or continue, and take every step.

        Args:
            work: The model, its grids, the text to choose by and the windows to watch the solve on.
            choose_start: Gives the codes that a fresh solve starts from; None where it starts from the weights.

        Returns:
            The finished solve.

        Raises:
            ResumeError: There are checkpoints and none can be read, or the ranks have other windows or other codes to
                start from than each other.
            CheckpointError: The codes that the solve began with are damaged.
            RunStoppedError: A signal arrived; what was reached, be it the last step, is in a checkpoint.
        """
        ranks = self.engine.ranks
        fresh = bool(ranks.share(not has_checkpoint(self._folder)))
        self._check_same_text(work.rows)
        start = kept_start(self.directory)
        if start is None:
            with self.engine.reproducible():  # as the steps that go on from there
                start = choose_start()
            if start is not None and ranks.first:
                keep_start(self.directory, start)
                start = kept_start(self.directory)  # from now on in the file only
        self._check_same_start(start)
        solve = self.solve = Solve(
            work.chain, work.grids, work.rows, self.config, served=work.served, fresh=fresh, start_codes=start,
            engine=self.engine,
        )  # fmt: skip
        self._say_notes(solve)
        if not fresh:
            self._restore(solve)
        if solve.solver.step_number:
            self.events.say(f"continuing after step {solve.solver.step_number}")
        if ranks.first:
            self._lead(solve, work.held, fresh)
        else:
            self._follow(solve)
        return solve

    def _check_same_text(self, rows: TokenRows) -> None:
        """See that every rank has read the same calibration windows: each opens the run directory by itself.

        Raises:
            ResumeError: They have not.
        """
        found = self.engine.ranks.gather([Windows.make(rows.input_ids, rows.mask).digest])
        if len(set(found)) > 1:
            raise ResumeError(
                f"run: the ranks read different calibration windows from {self.directory.path} "
                f"({_by_rank([digest[:12] for digest in found])}); give every rank the same files"
            )

    def _check_same_start(self, codes: Codes | None) -> None:
        """See that every rank starts from the same codes: each computes them, or reads them from its run directory.

        Raises:
            ResumeError: They do not.
        """
        if self.engine.ranks.world == 1:
            return  # hashing reads every layer
        found = self.engine.ranks.gather([None if codes is None else digest_codes(codes)])
        if len(set(found)) > 1:
            raise ResumeError(
                f"run: the ranks start from different codes "
                f"({_by_rank([digest and digest[:12] for digest in found])}); give every rank the same "
                f"{self.directory.path / START_CODES}, and the same versions of torch on one kind of machine"
            )

    def _restore(self, solve: Solve) -> None:
        """Load the newest checkpoint that every rank can read: ranks at different steps would add up in vain.

        Raises:
            ResumeError: There is none.
        """
        newest = math.inf
        while True:
            step = load_checkpoint(self._folder, solve, newest)
            found = self.engine.ranks.gather([step])
            if len(set(found)) == 1 and step is not None:
                return
            readable = [one for one in found if one is not None]
            if len(readable) < len(found):
                told = f" by every rank ({_by_rank(found)})" if readable else ""
                raise ResumeError(
                    f"run: no checkpoint in {self._folder} can be read{told}; remove that folder to start again"
                )
            newest = min(readable)
            self.events.say(f"note: the ranks can read different checkpoints ({_by_rank(found)})")

    def moved(self) -> dict[str, float] | None:
        """Return what a step of this process moved between the compute device and where state and activations live.

        Bytes of state in and out, of activations both ways, and seconds that the solve waited for a block; None where
        all are resident, or no step was taken.
        """
        if self.solve is None or not self._steps:
            return None
        if self.solve.solver.placement.where == self.solve.solver.boundaries.where == "resident":
            return None
        return {name: value / self._steps for name, value in self._moved.items()}

    def _advance(self, solve: Solve) -> StepRecord:
        before = _moved(solve)
        record = solve.advance()
        self._steps += 1
        # What is computed before and between the steps (gain, curvature, validations) moves blocks, too.
        for name, value in _moved(solve).items():
            self._moved[name] = self._moved.get(name, 0.0) + value - before[name]
        self._say_notes(solve)
        return record

    def _say_notes(self, solve: Solve) -> None:
        """Say what placing state and activations found, each once; activations have homes from the first step on."""
        for note in (*solve.solver.placement.notes, *solve.solver.boundaries.notes):
            if note not in self._said:
                self._said.add(note)
                self.events.say(f"note: {note}")

    def close(self) -> None:
        """Let a checkpoint that is under way end, stop copies, remove the placement's files."""
        if self._writer is not None:
            self._writer.close()
        if self.solve is not None:
            self.solve.close()

    def _lead(self, solve: Solve, held: Windows, fresh: bool) -> None:
        """Take the steps; write metrics, validations and checkpoints."""
        self.directory.truncate_metrics(solve.solver.step_number)
        writer = self._writer = Checkpointer(self._folder, solve, self.config.checkpoint_every)
        sample = TokenRows(
            solve.chain, held.input_ids[:VALIDATION_ROWS], held.mask[:VALIDATION_ROWS], VALIDATION_ROWS
        )
        if not solve.done:
            sample.remember_teacher()  # windows and original stay: once, not at every validation
        if fresh:
            histogram = json.dumps({"histogram": frac_histogram(solve)})  # for the report
            write_atomic(self.directory.path / START, histogram + "\n")
            self._validate(solve, sample)
        writer.begin(fresh=fresh)
        steps, chosen = self.config.solver.steps, self.config.solver.iters
        interval = max(1, steps // VALIDATIONS)
        started = time.perf_counter()
        with self._stop.deferred():
            while not solve.done:
                begin = time.perf_counter()
                record = self._advance(solve)
                seconds = round(time.perf_counter() - begin, 4)
                stopping = self._stopping()
                writer.check()
                self.directory.append_metrics(
                    {**asdict(record), "seconds": seconds, "rss_bytes": resident_bytes()}
                )
                self._beat()
                if record.step % interval == 0 or record.step == chosen or solve.done:
                    self._validate(solve, sample)
                if self.events.step is not None:
                    self.events.step(record, steps)
                if writer.due(record.step) or solve.done or stopping:
                    writer.save()
                if stopping:
                    writer.wait()
                    raise self._stopped(record.step)
            writer.wait()
        self.checkpoints = writer.summary(time.perf_counter() - started)

    def _follow(self, solve: Solve) -> None:
        """Take every step that the first rank takes."""
        with self._stop.deferred():
            while not solve.done:
                record = self._advance(solve)
                if self._stopping():
                    raise self._stopped(record.step)

    def _stopping(self) -> bool:
        """Whether a signal has reached any rank."""
        return any(self.engine.ranks.gather([self._stop.caught or 0]))

    def _stopped(self, step: int) -> RunStoppedError:
        caught = self._stop.caught
        by = signal.Signals(caught).name if caught is not None else "a signal to another rank"
        return RunStoppedError(
            f"stopped by {by} after step {step} of {self.config.solver.steps}; the same command continues",
            caught or signal.SIGTERM,
        )

    def _validate(self, solve: Solve, sample: TokenRows) -> None:
        batches = sample.batches(range(len(sample)))
        self.directory.append_metrics(
            {
                "kind": "validation",
                "step": solve.solver.step_number,
                "kl_soft": mean_kl(solve.chain, solve.solver.student, batches),
                "kl_rounded": mean_kl(solve.chain, solve.solver.rounded, batches),
            }
        )
