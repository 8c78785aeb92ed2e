# SPDX-License-Identifier: Apache-2.0
"""From a model folder to a proven file: checks, calibration, grids, rounding, export, proof, report.

Every stage leaves its result in the run directory; the same command again continues where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import discquant
from discquant.calibration import Windows, load_windows
from discquant.config import Method, QuantizeConfig
from discquant.errors import CalibrationError, ConfigError, ResumeError
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.export import plan_export
from discquant.formats.safetensors_format import SafetensorsFormat
from discquant.formats.scheme import Scheme
from discquant.formats.source import Source, check_output_dir, open_source
from discquant.grids import Grid
from discquant.run.checkpoint import Checkpointer, has_checkpoint, load_checkpoint
from discquant.run.directory import RunDirectory, served_dtype, write_atomic
from discquant.run.phases import Phases, resident_bytes
from discquant.run.planned import compare_run, plan_run
from discquant.run.stored import Given, StoredCodes, save_tensors_atomic
from discquant.run.summary import START, coded_layers, frac_histogram, summarize_run
from discquant.solver.chain import Chain, DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.measure import mean_kl
from discquant.solver.solve import Solve, TokenRows, lay_grids
from discquant.solver.solver import StepRecord

VALIDATIONS = 16  # per run
VALIDATION_ROWS = 8
CALIBRATION = "calibration.safetensors"
START_CODES = "start_codes.safetensors"
COMPLETE = "complete"


class RunStoppedError(RuntimeError):
    """SIGTERM or SIGINT arrived; the run can be continued."""


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


class _StopSignal:
    """Turns SIGTERM and SIGINT into RunStoppedError; within `deferred` into a flag, so that a step can be finished."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._defer = False
        self._previous: dict[int, Any] = {}

    def _catch(self, number: int, frame: object) -> None:
        self.caught = number
        if not self._defer:
            raise RunStoppedError(f"stopped by {signal.Signals(number).name}; the same command continues")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals; the caller looks at `caught`."""
        self._defer = True
        try:
            yield
        finally:
            self._defer = False

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def check_ignore(chain_model: torch.nn.Module, ignore: tuple[str, ...]) -> None:
    """Refuse an ignore entry that names nothing.

    Raises:
        ConfigError: It matches no module; the message lists some that exist.
    """
    from fnmatch import fnmatch

    names = [name for name, module in chain_model.named_modules() if name]
    for pattern in ignore:
        if pattern == "lm_head":  # ignored by default; not every model calls its head so
            continue
        if not any(pattern in (name, name.rpartition(".")[2]) or fnmatch(name, pattern) for name in names):
            known = sorted(
                {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
            )
            raise ConfigError(
                f"quantize: no module matches --ignore {pattern!r}; last names here: {', '.join(known)}"
            )


class Pipeline:
    """One run from a model folder; `execute` does everything that is left to do."""

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
        """Name inputs and output; nothing is read yet. `engine` changes no byte of the result."""
        self.model_path, self.config, self.resume = str(model_path), config, resume
        self.directory = RunDirectory(Path(out).expanduser())
        self.trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        self.events = events or Events()
        self.phases = Phases()
        self._stop = _StopSignal()
        self.engine = engine or Engine()
        if self.engine.folder is None:
            self.engine.folder = self.directory.path / "state"
        self._open: Solve | None = None
        self._checkpoints: dict[str, Any] | None = None

    def execute(self) -> dict[str, Any]:
        """Run to the end.

        Returns:
            The summary (also summary.json).

        Raises:
            UserError: Bad input, found before any long work.
            RunStoppedError: A signal arrived; the same command continues.
        """
        try:
            with self._stop:
                return self._execute() if self.engine.ranks.first else self._follow()
        finally:
            if self._open is not None:
                self._open.close()

    def _follow(self) -> dict[str, Any]:
        """Take part in the solve of another rank; nothing is written."""
        source = open_source(self.model_path, dtype=self._compute_dtype(), lazy=self._lazy(), **self.trust)
        chain = self._chain(source)
        if self.engine.ranks.share(None) == COMPLETE:
            return {}
        train, held = self._split(self._windows(source))
        if self.config.method == "discquant":
            rows = TokenRows(chain, train.input_ids, train.mask, self.config.solver.micro_batch)
            self._solve(chain, self._grids(chain), rows, held, source)
        return {}

    def _execute(self) -> dict[str, Any]:
        check_output_dir(self.directory.path, self.resume)
        for name in self.config.formats:
            registry.by_name(name)
        with self._phase("open"):
            source = open_source(
                self.model_path, dtype=self._compute_dtype(), lazy=self._lazy(), **self.trust
            )
            chain = self._chain(source)
            self._check_formats(source, chain)
            self._refuse_early(source)
            identity = self._identity(source)
            continued = self.directory.check(identity, resume=self.resume)
        if continued and self.directory.complete:
            self.events.say(f"{self.directory.path} is complete already")
            self.engine.ranks.share(COMPLETE)
            return dict(json.loads((self.directory.path / "summary.json").read_text(encoding="utf-8")))
        plan = plan_run(source.model, self.config, placement=self.engine.where)
        with self._phase("calibrate"):
            windows = self._windows(source)
            train, held = self._split(windows)
            chain.verify(train.input_ids[:1])
            if not continued:  # nothing has been written before all input is known to be good
                self.directory.start(self._record(source), identity)
            self._keep_windows(windows)
            self.engine.ranks.share("calibrated")
        with self._phase("grid"):
            grids = self._grids(chain)
        rows = TokenRows(chain, train.input_ids, train.mask, self.config.solver.micro_batch)
        solve: Solve | None = None
        with self._phase("round"):
            codes: Mapping[str, Tensor]
            if self.config.method == "discquant":
                solve = self._solve(chain, grids, rows, held, source)
                codes = solve.coded()
            else:
                codes = self._layerwise(chain, grids, rows, self.config.method, source)
            codes = self._final(codes, grids)
            self.directory.save_codes(codes, grids)
        with self._phase("evaluate"):
            baselines = self._baselines(chain, grids, rows, codes, solve, source)
            summary = summarize_run(
                self.directory, source, chain, grids, codes, baselines, held, solve, self._served(source)
            )
        with self._phase("export"):
            self._export(source, codes, grids, summary)
        summary["phases"] = self.phases.records
        summary["checkpoints"] = self._checkpoints
        summary["plan"] = compare_run(plan, self.directory, self.phases.records, self.events.say)
        self.directory.write_summary(summary)
        self._report()
        return summary

    def _chain(self, source: Source) -> DecoderChain:
        """Return the original model as a chain."""
        check_ignore(source.model, self.config.ignore)
        return DecoderChain(source.model, self.config.ignore)

    def _record(self, source: Source) -> dict[str, Any]:
        """Return what config.json holds besides the identity."""
        return {"source": str(source.path.resolve()), **self.trust}

    def _grids(self, chain: Chain) -> dict[str, Grid]:
        """Lay the grids and ask every format whether it can hold them, before anything is rounded."""
        grids = lay_grids(chain, self.config.grid)
        for name in self.config.formats:
            chosen = registry.by_name(name)
            for layer, grid in grids.items():
                chosen.check_grid(layer, grid)
        return grids

    def _served(self, source: Source) -> torch.dtype:
        """Return the dtype that engines dequantize to."""
        return served_dtype(source.config)

    def _final(self, codes: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> Mapping[str, Tensor]:
        """Return the codes to write, from those that rounding gave."""
        return codes

    def _baselines(
        self,
        chain: Chain,
        grids: Mapping[str, Grid],
        rows: TokenRows,
        codes: Mapping[str, Tensor],
        solve: Solve | None,
        source: Source,
    ) -> dict[str, Mapping[str, Tensor]]:
        """Return the codes of what the result is compared with, by name."""
        found: dict[str, Mapping[str, Tensor]] = {}
        for name in self.config.baselines:
            known = solve.start_codes if solve is not None and name == "gptq" else None
            if name == self.config.method:
                known = codes
            found[name] = known or self._layerwise(chain, grids, rows, name, source)
        return found

    def _phase(self, name: str) -> Any:
        if self.events.phase is not None:
            self.events.phase(name)
        return self.phases.phase(name)

    def _lazy(self) -> bool:
        """Whether original weights stay on disk: not where the calibration text is yet to be sampled from the model."""
        sampled = self.config.data.dataset == "self" and not (self.directory.path / CALIBRATION).exists()
        return self.engine.streams(Path(self.model_path)) and not sampled

    def _compute_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.config.solver.compute_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _check_formats(self, source: Source, chain: Chain) -> None:
        """Refuse what an output format cannot hold before anything is computed."""
        shapes = {ref.name: ref.matrix().shape for refs in chain.weights for ref in refs}
        for name in self.config.formats:
            chosen, target = registry.by_name(name), self.directory.path / name
            for layer, (rows, columns) in shapes.items():
                chosen.check((rows, columns), self.config.grid, layer)
            if target.exists():
                continue  # a resumed run that had already exported
            if not isinstance(chosen, SafetensorsFormat):
                # Formats that rebuild the model (GGUF, ONNX) ask for an architecture and tokenizer they know.
                for warning in chosen.check_source(Checkpoint(source.path)):
                    self.events.say(f"note: {warning}")
                continue
            schemes = {
                layer: Scheme.planned((rows, columns), self.config.grid)
                for layer, (rows, columns) in shapes.items()
            }
            for warning in plan_export(source.path, target, schemes, name).warnings:
                self.events.say(f"note: {warning}")

    def _refuse_early(self, source: Source) -> None:
        dataset = self.config.data.dataset
        if source.tokenizer is None and dataset != "self" and ".safetensors:" not in dataset:
            raise CalibrationError(f"calibration: {source.path} has no tokenizer to read {dataset} with")

    def _identity(self, source: Source) -> dict[str, Any]:
        """Everything that determines the bytes of the result; the baselines are only measured."""
        return {
            "config": {key: value for key, value in self.config.to_dict().items() if key != "baselines"},
            "source_digest": source.digest,
            "data_digest": _file_digest(self.config.data.dataset),
            "discquant": discquant.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def _windows(self, source: Source) -> Windows:
        """Load the calibration windows, or those that were kept: a resumed run must see the same tokens."""
        path = self.directory.path / CALIBRATION
        if path.exists():
            with safe_open(path, framework="pt") as handle:
                described = handle.metadata()["source"]
                return Windows.make(
                    handle.get_tensor("input_ids"), handle.get_tensor("mask").bool(), described
                )
        data = self.config.data
        return load_windows(
            data.dataset,
            source.tokenizer,
            nsamples=data.nsamples + self.config.validation_windows,
            seqlen=data.seqlen,
            seed=self.config.seed,
            model=source.model,
        )

    def _keep_windows(self, windows: Windows) -> None:
        path = self.directory.path / CALIBRATION
        if not path.exists():
            tensors = {"input_ids": windows.input_ids.int(), "mask": windows.mask.to(torch.uint8)}
            save_tensors_atomic(path, tensors, {"source": windows.source})

    def _split(self, windows: Windows) -> tuple[Windows, Windows]:
        held = min(self.config.validation_windows, max(1, len(windows) // 5))
        if len(windows) < 2:
            raise CalibrationError(
                f"calibration: {self.config.data.dataset} gives {len(windows)} window of {windows.seqlen} tokens; "
                "at least 2 are needed (one is held out)"
            )
        train, validation = windows.split(len(windows) - held)
        return train, validation

    def _layerwise(
        self,
        chain: Chain,
        grids: Mapping[str, Grid],
        rows: TokenRows,
        method: Method,
        source: Source,
        *,
        strict: bool = True,
    ) -> Mapping[str, Tensor]:
        batches = rows.batches(range(min(self.config.gptq_samples, len(rows)))) if method != "rtn" else []
        return layerwise_codes(
            chain,
            grids,
            batches,
            method,
            damp=self.config.gptq_damp,
            served=self._served(source),
            strict=strict,
        )

    def _solve(
        self, chain: Chain, grids: Mapping[str, Grid], rows: TokenRows, held: Windows, source: Source
    ) -> Solve:
        folder = self.directory.path / "checkpoints"
        ranks = self.engine.ranks
        fresh = bool(ranks.share(not has_checkpoint(folder)))
        start = self._start_codes()
        if start is None:
            start = self._choose_start(chain, grids, rows, source)
            if start is not None and ranks.first:
                self._save_start_codes(start)
                start = self._start_codes()  # from now on in the file only
        solve = Solve(
            chain,
            grids,
            rows,
            self.config,
            served=self._served(source),
            fresh=fresh,
            start_codes=start,
            engine=self.engine,
        )
        self._open = solve
        for note in solve.solver.placement.notes:
            self.events.say(f"note: {note}")
        if not fresh and load_checkpoint(folder, solve) is None:
            raise ResumeError(
                f"quantize: no checkpoint in {folder} can be read; remove that folder to start again"
            )
        if solve.solver.step_number:
            self.events.say(f"continuing after step {solve.solver.step_number}")
        if not ranks.first:
            self._advance_with_others(solve)
            return solve
        self.directory.truncate_metrics(solve.solver.step_number)
        writer = Checkpointer(folder, solve)
        sample = TokenRows(
            chain, held.input_ids[:VALIDATION_ROWS], held.mask[:VALIDATION_ROWS], VALIDATION_ROWS
        )
        watched = sample.batches(range(len(sample)))
        if fresh:
            self._save_start(solve)
            self._validate(solve, watched)
            writer.save()
        iters = self.config.solver.iters
        interval = max(1, iters // VALIDATIONS)
        stop = self._stop
        started = time.perf_counter()
        with stop.deferred():
            while not solve.done:
                begin = time.perf_counter()
                record = solve.advance()
                seconds = round(time.perf_counter() - begin, 4)
                stopping = any(ranks.gather([stop.caught or 0]))
                writer.check()
                self.directory.append_metrics(
                    {**asdict(record), "seconds": seconds, "rss_bytes": resident_bytes()}
                )
                if record.step % interval == 0 or solve.done:
                    self._validate(solve, watched)
                if self.events.step is not None:
                    self.events.step(record, iters)
                if record.step % self.config.checkpoint_every == 0 or solve.done or stopping:
                    writer.save()
                if stopping and not solve.done:
                    writer.wait()
                    raise self._stopped(record.step)
        writer.wait()
        self._checkpoints = writer.summary(time.perf_counter() - started)
        return solve

    def _stopped(self, step: int) -> RunStoppedError:
        caught = self._stop.caught
        by = signal.Signals(caught).name if caught is not None else "a signal to another rank"
        return RunStoppedError(
            f"stopped by {by} after step {step} of {self.config.solver.iters}; the same command continues"
        )

    def _advance_with_others(self, solve: Solve) -> None:
        """Take every step that the first rank takes."""
        with self._stop.deferred():
            while not solve.done:
                record = solve.advance()
                if any(self.engine.ranks.gather([self._stop.caught or 0])) and not solve.done:
                    raise self._stopped(record.step)

    def _choose_start(
        self, chain: Chain, grids: Mapping[str, Grid], rows: TokenRows, source: Source
    ) -> Mapping[str, Tensor] | None:
        """Return codes to start from, None where the solve starts from the weights."""
        if self.config.solver.start != "gptq":
            return None
        return self._layerwise(chain, grids, rows, "gptq", source, strict=False)

    def _start_codes(self) -> Mapping[str, Tensor] | None:
        """Return the codes that this run started from, None where it has not."""
        path = self.directory.path / START_CODES
        return StoredCodes(path) if path.exists() else None

    def _save_start_codes(self, codes: Mapping[str, Tensor]) -> None:
        given: dict[str, Given] = {name: functools.partial(codes.__getitem__, name) for name in codes}
        save_tensors_atomic(self.directory.path / START_CODES, given, {})

    def _save_start(self, solve: Solve) -> None:
        """Keep the histogram of `frac` at the start for the report."""
        write_atomic(self.directory.path / START, json.dumps({"histogram": frac_histogram(solve)}) + "\n")

    def _validate(self, solve: Solve, batches: list[Any]) -> None:
        self.directory.append_metrics(
            {
                "kind": "validation",
                "step": solve.solver.step_number,
                "kl_soft": mean_kl(solve.chain, solve.solver.student, batches),
                "kl_rounded": mean_kl(solve.chain, solve.solver.rounded, batches),
            }
        )

    def _export(
        self,
        source: Source,
        codes: Mapping[str, Tensor],
        grids: Mapping[str, Grid],
        summary: dict[str, Any],
    ) -> None:
        """Write every format that is not there yet: each is written whole and proven before it gets its name."""
        sizes = {}
        for name in self.config.formats:
            target = self.directory.path / name
            if not target.exists():
                registry.by_name(name).write(
                    Checkpoint(source.path),
                    target,
                    coded_layers(codes, grids),
                    recipe={**self.config.to_dict(), "summary": summary},
                    ignore=self.config.ignore,
                    prove_from=lambda: coded_layers(codes, grids),
                )
            sizes[name] = weight_bytes(target)
        summary["sizes"]["packed_bytes"] = next(iter(sizes.values()), None)
        summary["sizes"]["formats"] = sizes

    def _report(self) -> None:
        from discquant.run.report import write_report

        write_report(self.directory.path)


def weight_bytes(path: Path) -> int:
    """Return the bytes of all weight files of an exported model, a folder or one file."""
    if path.is_file():
        return path.stat().st_size
    kinds = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data")
    return sum(file.stat().st_size for kind in kinds for file in path.glob(kind))


def _file_digest(dataset: str) -> str | None:
    """Hash a local calibration file, so that a changed one is noticed on resuming."""
    import hashlib

    path = Path(
        dataset.partition(".safetensors:")[0] + ".safetensors" if ".safetensors:" in dataset else dataset
    )
    if not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
