# SPDX-License-Identifier: Apache-2.0
"""The run directory: configuration with fingerprint, metrics, codes; every write is atomic.

config.json  metrics.jsonl  calibration.safetensors  checkpoints/  codes.safetensors  summary.json  report.md
<format>/ (the served model, one folder per format)
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, MissingModelError, OutputExistsError, ResumeError
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.lazy import reader_of, substitute
from discquant.formats.output import sync_path
from discquant.formats.safetensors_file import read_header, read_tensor
from discquant.grids import Grid
from discquant.grids.storage import restore, store
from discquant.run.stored import Given, save_tensors_atomic
from discquant.solver.weight_ref import WeightRef

CONFIG, METRICS, CODES, SUMMARY = "config.json", "metrics.jsonl", "codes.safetensors", "summary.json"
MARKER = "discquant_run"


def write_atomic(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    sync_path(path.parent)


class RunDirectory:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        """Bind to a path; nothing is written yet."""
        self.path = path

    @staticmethod
    def is_run(path: Path) -> bool:
        """Return whether `path` holds a run."""
        try:
            return bool(json.loads((path / CONFIG).read_text(encoding="utf-8")).get(MARKER))
        except (OSError, ValueError, AttributeError):
            return False

    def config(self) -> dict[str, Any]:
        """Return the recorded configuration.

        Raises:
            MissingModelError: `path` is no run directory.
        """
        if not self.is_run(self.path):
            raise MissingModelError(f"run: {self.path} is not a run directory of discquant")
        loaded: dict[str, Any] = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        return loaded

    def recorded_threads(self) -> int | None:
        """Return the CPU threads that the run here was begun with, None where there is no run."""
        if not self.is_run(self.path):
            return None
        found = self.config().get("identity", {}).get("threads")
        return found if type(found) is int and found > 0 else None

    def check(self, identity: Mapping[str, Any], *, resume: bool) -> bool:
        """See whether this run may be made or continued here; nothing is written.

        Args:
            identity: Everything that determines the result's bytes.
            resume: Whether continuing is allowed.

        Returns:
            True if an earlier part of this run is there.

        Raises:
            OutputExistsError: The directory is not empty and holds no run, or resuming is not allowed.
            ResumeError: It holds a different run; the message names what differs.
        """
        # A run killed at its very first write leaves only a temporary file.
        if not self.path.exists() or all(entry.name == f".{CONFIG}.tmp" for entry in self.path.iterdir()):
            return False
        if not self.is_run(self.path):
            raise OutputExistsError(f"quantize: {self.path} is not empty and holds no run of discquant")
        if not resume:
            raise OutputExistsError(
                f"quantize: {self.path} already holds a run; choose another OUT or --resume"
            )
        changed = _differences(self.config()["identity"], json.loads(json.dumps(identity)))
        if changed:
            raise ResumeError(
                f"quantize: {self.path} holds another run; different: {'; '.join(changed)}. "
                "Repeat the command that made it, or choose another OUT"
            )
        return True

    def start(self, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Make the directory and write config.json: `record` and `identity`."""
        self.path.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(identity))
        write_atomic(
            self.path / CONFIG, json.dumps({MARKER: 1, **record, "identity": plain}, indent=2) + "\n"
        )

    def truncate_metrics(self, step: int) -> None:
        """Drop metric lines after `step` (a killed run wrote them after its last checkpoint)."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if entry["step"] <= step:
                kept.append(line)
        write_atomic(path, "".join(line + "\n" for line in kept))

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_atomic(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    @property
    def complete(self) -> bool:
        """Whether the run reached its end (the summary is written last)."""
        return (self.path / SUMMARY).exists()

    def save_codes(self, codes: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> None:
        """Write final codes with their grids, one layer in memory at a time."""
        tensors: dict[str, Given] = {}
        header: dict[str, Any] = {}
        for name in codes:
            parts, header[name] = store(grids[name])
            tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
            tensors[f"{name}.q"] = functools.partial(codes.__getitem__, name)
        save_tensors_atomic(self.path / CODES, tensors, {"layers": json.dumps(header, sort_keys=True)})

    def coded_layers(self) -> Iterator[CodedLayer]:
        """Yield the final codes with their grids, one layer at a time.

        Raises:
            MissingModelError: The run has not finished.
        """
        path = self.path / CODES
        if not path.exists():
            raise MissingModelError(
                f"run: {self.path} has no final codes yet; repeat its command to finish it"
            )
        # Not through a memory map: pages of a map stay resident until it is closed, so that memory would grow with
        # the model.
        stored, metadata = read_header(path)
        keys: dict[str, list[str]] = {}
        for key in stored:
            name, _, part = key.rpartition(".")
            keys.setdefault(name, []).append(part)
        for name, facts in json.loads(metadata["layers"]).items():
            parts = {part: read_tensor(stored[f"{name}.{part}"]) for part in keys[name]}
            yield CodedLayer(name, parts.pop("q"), restore(parts, facts))

    def layers(self) -> Iterator[QuantizedLinear]:
        """Yield the final codes of a run on uniform grids, one layer at a time.

        Raises:
            MissingModelError: The run has not finished.
            UnrepresentableError: A grid is not uniform; `coded_layers` gives all kinds.
        """
        for layer in self.coded_layers():
            yield layer.linear()


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted({*found, *wanted}):
        name = f"{prefix}{key}"
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += _differences(old, new, f"{name}.")
        elif old != new:
            changed.append(f"{name} was {old!r}, is {new!r}")
    return changed


def served_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which a checkpoint's weights are served, from its config.json; float32 if it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _served(layer: CodedLayer | QuantizedLinear, served: torch.dtype, weight: Tensor) -> Callable[[], Tensor]:
    dtype, shape = weight.dtype, weight.shape
    return lambda: layer.dequantize(served).to(dtype).reshape(shape)


def _served_experts(
    model: torch.nn.Module,
    refs: Sequence[WeightRef],
    layers: Sequence[CodedLayer | QuantizedLinear],
    served: torch.dtype,
) -> Callable[[], Tensor]:
    """Return what reads a fused parameter: each part from its codes, what has none from where it was read before."""
    name, dtype, shape = refs[0].param_name, refs[0].parameter.dtype, refs[0].parameter.shape
    covered = sum(ref.matrix_size for ref in refs) == refs[0].parameter.numel()
    before = None if covered else reader_of(model, name)

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype) if before is None else before().to(dtype)
        for ref, layer in zip(refs, layers, strict=True):
            ref.view(whole).copy_(layer.dequantize(served))
        return whole

    return read


@torch.no_grad()
def apply_layers(
    model: torch.nn.Module, layers: Iterable[CodedLayer | QuantizedLinear], served: torch.dtype
) -> torch.nn.Module:
    """Overwrite the weights of `model` in place with what is served: the codes' product, rounded to `served`.

    Raises:
        CheckpointError: A layer does not exist in the model or has another shape.
    """
    from discquant.solver.experts import expert_refs

    # Experts are fused in memory and separate in the checkpoint, whose names the layers bear.
    experts = {ref.name: ref for ref in expert_refs(model, model, "", lambda name: True, strict=False)}
    unread: dict[str, list[tuple[WeightRef, CodedLayer | QuantizedLinear]]] = {}
    for layer in layers:
        if layer.name in experts:
            ref = experts[layer.name]
            if ref.parameter.is_meta:
                unread.setdefault(ref.param_name, []).append((ref, layer))
                continue
            weight = ref.view(ref.parameter)
        else:
            try:
                weight = model.get_submodule(layer.name).weight  # type: ignore[assignment]
            except AttributeError as error:
                raise CheckpointError(f"run: the model has no module {layer.name}") from error
        if weight.is_meta:
            substitute(model, f"{layer.name}.weight", _served(layer, served, weight))
            continue
        value = layer.dequantize(served).to(weight.dtype)
        if value.numel() != weight.numel():
            raise CheckpointError(
                f"run: {layer.name} has {list(weight.shape)} in the model, {list(value.shape)} in codes"
            )
        weight.copy_(value.reshape(weight.shape))
    for name, parts in unread.items():
        refs, codes = zip(*parts, strict=True)
        substitute(model, name, _served_experts(model, refs, codes, served))
    return model


def load_run_model(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    original: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> torch.nn.Module:
    """Return the original model of a run with its final codes in place.

    Args:
        path: The run.
        dtype: Of the model; None is the original's.
        original: Where the run's original is now; None is where it was.
        trust_remote_code: As for `open_source`; what the run was made with is allowed again.
        allow_pickle: Likewise.

    Raises:
        MissingModelError: `path` is no finished run, or its original model is gone.
        CheckpointError: The original model has changed since, or `original` is another.
    """
    from discquant.formats.source import open_source

    run = RunDirectory(Path(path))
    config = run.config()
    home = Path(original or config["source"])
    refined = refined_model(run)
    if refined is not None:
        # Its codes may stand for weights scaled per channel, with norms that only the file has.
        from discquant.formats.load import load_quantized

        loaded: torch.nn.Module = load_quantized(
            refined,
            dtype,
            original=home if home.is_dir() else None,
            trust_remote_code=trust_remote_code,
        )
        return loaded
    if original is None and not home.is_dir():
        raise MissingModelError(
            f"run: the original model of {path} is not at {home} any more, and its codes alone are no model. Put it "
            f"back, or write a model that stands alone: discquant export {path} --format compressed-tensors "
            "--original MODEL"
        )
    summary = json.loads((run.path / SUMMARY).read_text(encoding="utf-8")) if run.complete else {}
    if summary.get("refine", {}).get("derivation", {}).get("folded"):
        raise CheckpointError(
            f"run: the file that {path} refined has scaled weights; its codes do not fit the original, and the refined "
            "file is gone"
        )
    source = open_source(
        home,
        dtype=dtype,
        trust_remote_code=trust_remote_code or bool(config.get("trust_remote_code")),
        allow_pickle=allow_pickle or bool(config.get("allow_pickle")),
    )
    if source.digest != config["identity"]["source_digest"]:
        raise CheckpointError(
            f"run: the model at {home} has changed since the run in {path}"
            if original is None
            else f"run: the model at {home} is not the one that the run in {path} rounded"
        )
    return apply_layers(source.model, run.coded_layers(), served_dtype(source.config))


def refined_model(run: RunDirectory) -> Path | None:
    """Return the file or folder that a run of refine wrote; None of other runs, and where it is not there (yet).

    Raises:
        MissingModelError: There is no run.
    """
    config = run.config()
    if not config.get("quantized"):
        return None
    folder = run.path / str(config["identity"]["config"]["format"])
    file = run.path / Path(config["quantized"]).name
    return next((place for place in (folder, file) if place.exists()), None)
