# SPDX-License-Identifier: Apache-2.0
"""From a model folder to a proven file: checks, calibration, grids, rounding, export, proof, report.

Every stage leaves its result in the run directory; the same command again continues where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from discquant.calibration import Windows
from discquant.calibration.load import check_named
from discquant.config import Method, QuantizeConfig
from discquant.environment import cpu_name
from discquant.formats import registry
from discquant.formats.bits import file_bits_per_weight
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.lazy import is_lazy, settle
from discquant.formats.source import Source, check_output_dir, open_source
from discquant.grids import Grid
from discquant.planning.shape import ModelShape
from discquant.run.checks import (
    check_formats,
    check_grids,
    check_groups,
    check_ignore,
    check_text,
    check_written,
)
from discquant.run.choices import fallback_notes
from discquant.run.directory import REPORT, SUMMARY, RunDirectory
from discquant.run.events import Events, RunStoppedError, StopSignal
from discquant.run.identity import run_identity, told_options
from discquant.run.lock import locked
from discquant.run.phases import PHASES, Phases
from discquant.run.planned import compare_run, place_run, plan_run
from discquant.run.served import served_dtype
from discquant.run.solving import Solving
from discquant.run.stored import room_for
from discquant.run.summary import beaten, coded_layers, summarize_run, weight_bytes
from discquant.run.windows import CALIBRATION, LEAST, few_windows, keep_windows, run_windows, split_windows
from discquant.run.work import Codes, Work
from discquant.solver.chain import Chain, DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids

__all__ = ["Events", "Pipeline", "RunStoppedError"]

COMPLETE = "complete"
STATE = "state"  # files of a placement on disk, within the run directory


class Pipeline:
    """One run from a model folder; `execute` does everything that is left to do.

    Attributes:
        blockwise: Whether the original's weights may stay on disk and be read block by block.
    """

    blockwise = True

    def __init__(
        self,
        model_path: str | Path,
        out: str | Path,
        config: QuantizeConfig,
        *,
        resume: bool = True,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        events: Events | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Name inputs and output; nothing is read yet. `engine`: where and how; None is the CPU, resident."""
        self.model_path, self.config, self.resume = str(model_path), config, resume
        self.directory = RunDirectory(Path(out).expanduser())
        self.trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        self.events = events or Events()
        self._stop = StopSignal()
        self.engine = dataclasses.replace(engine or Engine())  # a run settles what its caller left open
        self.phases = Phases(self.engine.device)
        if self.engine.folder is None:
            self.engine.folder = self.directory.path / STATE
        self._shape: ModelShape | None = None
        self._solving = Solving(
            self.directory, self.config, self.engine, self.events, self._stop, beat=self.phases.beat
        )

    def execute(self) -> dict[str, Any]:
        """Run to the end.

        Returns:
            The summary (also summary.json).

        Raises:
            UserError: Bad input, found before any long work.
            RunStoppedError: A signal arrived; the same command continues.
        """
        if self.config.method == "discquant":
            options = self.config.solver
            self.engine.ranks.span(-(-options.batch_size // options.micro_batch))  # every rank needs a share
        with room_for(self.directory.path), contextlib.ExitStack() as held, self._stop:
            return self._execute(held) if self.engine.ranks.first else self._follow(held)

    def _hold(self, held: contextlib.ExitStack) -> None:
        """Keep every other process out of the run directory, and remove what a killed run has left of its placement.

        Nothing reads those files again, for checkpoints hold what counts.
        """
        held.enter_context(locked(self.directory.path))
        shutil.rmtree(self.directory.path / STATE, ignore_errors=True)
        held.callback(self._close)

    def _close(self) -> None:
        """Stop the solve; remove the files of this rank's placement on disk."""
        self._solving.close()
        folder = self.directory.path / STATE
        shutil.rmtree(folder / f"rank-{self.engine.ranks.rank}", ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank is not done yet
            folder.rmdir()

    def _follow(self, held_open: contextlib.ExitStack) -> dict[str, Any]:
        """Take part in the solve of another rank; nothing is written."""
        source = self._open()
        chain = self._chain(source)
        if self.engine.ranks.share(None) == COMPLETE:
            return {}
        # While the first rank lays its own: they can be an hour's work.
        grids = self._grids(chain, source) if self.config.method == "discquant" else {}
        self.engine.ranks.share(None)
        held_open.callback(self._close)  # from here on the first rank holds the directory
        windows = run_windows(self.directory, self.config, source)
        train, held = split_windows(windows, self.config, self.directory)
        if self.config.method == "discquant":
            self._solve(self._work(source, chain, grids, train, held))
        return {}

    def _execute(self, held_open: contextlib.ExitStack) -> dict[str, Any]:
        check_output_dir(self.directory.path, self.resume)
        for name in self.config.formats:
            registry.by_name(name)
        check_named(self.config.data.dataset)  # before the original is hashed
        with self._phase("open"):
            source = self._open()
            if self._lazy() and not is_lazy(source.model):
                self.events.say(
                    "note: the original cannot be read block by block; it stays in memory as a whole"
                )
            chain = self._chain(source)
            self._check_formats(source, chain)
            check_text(source, self.config, windows=LEAST)
            identity = self._identity(source)
            continued = self.directory.check(identity, resume=self.resume)
            if continued:
                self._hold(held_open)
                check_written(self.directory.path, self.config.formats)
        if continued and self.directory.complete and self._exported():
            self.engine.ranks.share(COMPLETE)
            return self._completed()
        self.engine.ranks.share("opened")
        if continued:
            self.phases.keep(self.directory.path / PHASES)
            self._say_processor()
        plan = plan_run(source.model, self._shape, self.config, self.engine, self.directory.path)
        for warning in plan.warnings:
            self.events.say(f"note: {warning}")
        # Before the text, which may be long work: a format that cannot hold a grid is found here.
        with self._phase("grid"):
            grids = self._grids(chain, source)
        with self._phase("calibrate"):
            windows = run_windows(self.directory, self.config, source)
            train, held = split_windows(windows, self.config, self.directory)
            if len(windows) < self.config.data.nsamples + self.config.validation_windows:
                self.events.say(f"note: {few_windows(windows, self.config)}")
            chain.verify(train.input_ids[:1])
            if not continued:  # nothing has been written before all input is known to be good
                self._hold(held_open)
                self.directory.check(identity, resume=self.resume)  # nobody else was faster
                self.directory.start(self._record(source), identity)
                self.phases.keep(self.directory.path / PHASES)
            keep_windows(self.directory, windows, len(held))
            self.engine.ranks.share("calibrated")
        work, solve = self._work(source, chain, grids, train, held), None
        with self._phase("round"):
            codes: Codes
            served_grids: Mapping[str, Grid] = grids  # the others are measured on the grids as they were laid
            if self.config.method == "discquant":
                solve = self._solve(work)
                codes = solve.coded()
                if self.config.solver.scale_iters:
                    served_grids = solve.grids()
                    check_grids(source, self.config.formats, served_grids)
            else:
                codes = self._layerwise(work, self.config.method)
            codes = self._final(codes)
            self.directory.save_codes(codes, served_grids)
        with self._phase("evaluate"):
            baselines = self._baselines(work, codes, solve)
            summary = summarize_run(self.directory, work, served_grids, codes, baselines, solve)
            if (better := beaten(summary)) is not None:
                self.events.say(f"note: {better}")
        with self._phase("export"):
            self._export(work, codes, served_grids, summary)
        summary["phases"], summary["processes"] = self.phases.total(), self.phases.processes
        summary["checkpoints"] = self._solving.checkpoints
        summary["plan"] = compare_run(plan, self.directory, self.phases.records, self.events.say)
        if solve is not None:
            summary["plan"]["moved_per_step"] = self._solving.moved()
        self.directory.write_summary(summary)
        self._report()
        return summary

    def _completed(self) -> dict[str, Any]:
        """Return the summary of a run that has ended before; it may have been stopped while its report was drawn."""
        path = self.directory.path
        self.events.say(f"{path} is complete already")
        summary = read_json(path / SUMMARY)
        unmeasured = [name for name in self.config.baselines if name not in summary["methods"]]
        if unmeasured:
            self.events.say(
                f"note: it was made without --baselines {','.join(unmeasured)}, and a complete run is not measured "
                "again; give another OUT to compare with them"
            )
        if not (path / REPORT).exists():
            self._report()
        return summary

    def _exported(self) -> bool:
        """Whether every format that was asked for is there."""
        return all((self.directory.path / name).exists() for name in self.config.formats)

    def _chain(self, source: Source) -> DecoderChain:
        """Return the original model as a chain, where it is to run."""
        check_ignore(source.model, self.config.ignore)
        self._settle(source.model)
        chain = DecoderChain(source.model, self.config.ignore)
        check_groups(chain, self.config)
        if chain.routers:
            few = ", ".join(chain.routers[:2])
            self.events.say(
                f"note: {len(chain.routers)} layers choose or weigh experts and stay in full precision: {few}, ..."
            )
        return chain

    def _settle(self, model: torch.nn.Module) -> None:
        """Bring the model to the compute device: whole, or its blocks one by one where the engine says so."""
        apart = self.engine.device.type == "cuda"
        settle(model, self.engine.device, stream=apart and self.engine.streamed)

    def _check_formats(self, source: Source, chain: Chain) -> None:
        """Refuse what an output format cannot hold before anything is computed; say which types are replaced."""
        refs = (ref for own in chain.weights for ref in own)
        for note in fallback_notes((ref.name, ref.shape, self.config.grid_of(ref.name)) for ref in refs):
            self.events.say(f"note: {note}")
        check_formats(source, chain, self.config, self.directory.path, self.events.say)

    def _identity(self, source: Source) -> dict[str, Any]:
        """Everything that determines the bytes of the result."""
        return run_identity(source, self.config, self.engine.device)

    def _record(self, source: Source) -> dict[str, Any]:
        """Return what config.json holds besides the identity."""
        return {"source": str(source.path.resolve()), **self.trust, "cpu": cpu_name()}

    def _say_processor(self) -> None:
        """Say that a run goes on on another processor than it was begun on."""
        before, here = self.directory.config().get("cpu"), cpu_name()
        if before not in (None, here):
            self.events.say(
                f"note: this run was begun on {before}, and this is {here}: sums may differ in their last bits, so "
                "it may end in other bytes than it would have there"
            )

    def _grids(self, chain: Chain, source: Source) -> dict[str, Grid]:
        """Lay the grids and ask every format whether it can hold them, before anything is rounded."""
        grids = lay_grids(chain, self.config.grid_of)
        check_grids(source, self.config.formats, grids)
        return grids

    def _served(self, source: Source) -> torch.dtype:
        """Return the dtype that engines dequantize to."""
        return served_dtype(source.config)

    def _work(
        self, source: Source, chain: Chain, grids: Mapping[str, Grid], train: Windows, held: Windows
    ) -> Work:
        rows = TokenRows(chain, train.input_ids, train.mask, self.config.solver.micro_batch)
        return Work(source, chain, grids, self._served(source), rows, held)

    def _final(self, codes: Codes) -> Codes:
        """Return the codes to write, from those that rounding gave."""
        return codes

    def _baselines(self, work: Work, codes: Codes, solve: Solve | None) -> dict[str, Codes]:
        """Return the codes of what the result is compared with, by name."""
        found: dict[str, Codes] = {}
        for name in self.config.baselines:
            known = solve.start_codes if solve is not None and name == "gptq" else None
            if name == self.config.method:
                known = codes
            found[name] = known or self._layerwise(work, name)
        return found

    def _phase(self, name: str) -> Any:
        if self.events.phase is not None:
            self.events.phase(name)
        return self.phases.phase(name)

    def _open(self) -> Source:
        """Plan the run, so that the engine knows where the state lives, and open the original accordingly.

        The first rank plans for all, before any has opened a model: each by itself would count the others' memory.
        """
        where = self.engine.where
        if self.engine.ranks.first:
            plan = place_run(
                self.model_path,
                self.config,
                self.engine,
                self.directory.path,
                blockwise=self.blockwise,
                trust_remote_code=self.trust["trust_remote_code"],
            )
            if plan is not None:
                where, self._shape = plan.setting.placement, plan.shape
            elif where == "auto":
                where = "resident"  # what config.json alone does not build, no block of it can be read alone
        self.engine.where = self.engine.ranks.share(where)
        return open_source(self.model_path, dtype=self._compute_dtype(), lazy=self._lazy(), **self.trust)

    def _lazy(self) -> bool:
        """Whether original weights stay on disk: not where the calibration text is yet to be sampled from the model."""
        sampled = self.config.data.dataset == "self" and not (self.directory.path / CALIBRATION).exists()
        return self.blockwise and self.engine.streamed and not sampled

    def _compute_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.config.solver.compute_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _layerwise(self, work: Work, method: Method, *, strict: bool = True) -> Codes:
        return work.layerwise(method, self.config, self.engine, strict=strict)

    def _solve(self, work: Work) -> Solve:
        return self._solving.run(work, choose_start=lambda: self._choose_start(work))

    def _choose_start(self, work: Work) -> Codes | None:
        """Return codes to start from, None where the solve starts from the weights."""
        if self.config.solver.start != "gptq":
            return None
        return self._layerwise(work, "gptq", strict=False)

    def _export(self, work: Work, codes: Codes, grids: Mapping[str, Grid], summary: dict[str, Any]) -> None:
        """Write every format that is not there yet: each is written whole and proven before it gets its name."""
        sizes = {}
        for name in self.config.formats:
            target = self.directory.path / name
            if not target.exists():
                registry.by_name(name).write(
                    Checkpoint(work.source.path),
                    target,
                    coded_layers(codes, grids),
                    recipe={**told_options(self.config), "summary": summary},
                    prove_from=lambda: coded_layers(codes, grids),
                )
            sizes[name] = weight_bytes(target)
        summary["sizes"]["packed_bytes"] = next(iter(sizes.values()), None)
        # What is served counts: a format may store codes or scales wider.
        for name in self.config.formats[:1]:
            summary["sizes"]["bits_per_weight"] = file_bits_per_weight(
                registry.by_name(name), self.directory.path / name
            )
        summary["sizes"]["formats"] = sizes

    def _report(self) -> None:
        from discquant.run.report import write_report

        write_report(self.directory.path)
