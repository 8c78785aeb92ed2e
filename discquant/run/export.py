# SPDX-License-Identifier: Apache-2.0
"""`discquant export`: the codes of a finished run, or of a quantized model, into further formats.

Everything that can be refused is refused for every format before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discquant.errors import CheckpointError, ConfigError, MissingModelError, OutputExistsError
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.coded import CodedLayer
from discquant.formats.output import MANIFEST, check_target, check_writable
from discquant.formats.rewrite import file_facts, weight_files
from discquant.formats.safetensors_file import TORCH_DTYPES
from discquant.formats.safetensors_format import SafetensorsFormat, beyond_weights
from discquant.formats.scheme import Scheme
from discquant.formats.source import model_digest, refuse_quantized, resolve
from discquant.formats.write import weight_shape
from discquant.run.checks import plan_formats
from discquant.run.derive import check_unscaled
from discquant.run.directory import SUMMARY, RunDirectory
from discquant.run.told_grids import as_recipe


@dataclass(frozen=True)
class Solved:
    """Where codes come from.

    Attributes:
        source: The original model.
        layers: Gives every layer, as often as it is called.
        recipe: For manifest and card; `summary` in it is the run's summary.json.
        home: Folder that receives a folder per format if the user names none.
        dropped: What the codes' file quantizes besides weights, which no written file does; "" where nothing.
    """

    source: Checkpoint
    layers: Callable[[], Iterator[CodedLayer]]
    recipe: dict[str, Any]
    home: Path
    dropped: str = ""


def open_solved(path: Path, original: str | None = None) -> Solved:
    """Open a run directory, or a quantized model together with its original.

    Args:
        path: The run, or a model in any format that is read.
        original: The original model; a run knows its own.

    Raises:
        MissingModelError: There is no such thing, or the run has no final codes.
        CheckpointError: A file cannot be read, the run's original has changed since, the quantized model does not
            derive from `original` or that is quantized too, or the run refined a file of scaled weights.
        ConfigError: A quantized model without `original`.
    """
    if not RunDirectory.is_run(path):
        chosen = registry.find(path)
        if original is None:
            raise ConfigError(
                f"export: {path} is a {chosen.name} model; name the model it was made from with --original"
            )
        home = path.parent / f"{path.stem}-formats"
        folder = resolve(original)
        refuse_quantized(folder)
        source = Checkpoint(folder)
        check_unscaled(chosen, path, source)
        recipe: dict[str, Any] = {"converted_from": file_facts(chosen.name, path, weight_files(path))}
        dropped = beyond_weights(chosen, path)
        return Solved(source, lambda: chosen.read(path), recipe, home, dropped=dropped)
    run = RunDirectory(path)
    config = run.config()
    identity = config["identity"]
    source = Checkpoint(resolve(original or config["source"]))
    if model_digest(source.sha256(), source.config()) != identity["source_digest"]:
        raise CheckpointError(
            f"export: the model at {source.path} is not the one that the run in {path} rounded"
        )
    recipe = as_recipe(config)
    if (path / SUMMARY).is_file():
        recipe["summary"] = read_json(path / SUMMARY)
    dropped = ""
    if config.get("quantized"):
        _check_basis(run, recipe.get("summary"))
        refined = recipe["summary"]["refine"]
        # Where no better codes were found, those of the file stand in another format, and nothing was rounded.
        file = refined.get("file") or {"name": Path(config["quantized"]).name, "format": refined["format"]}
        recipe["refined_from" if refined["improved"] else "converted_from"] = file
        written = path / str(recipe["format"])
        if written.is_dir():
            dropped = beyond_weights(registry.find(written), written)
    return Solved(source, run.coded_layers, recipe, path, dropped=dropped)


def _check_basis(run: RunDirectory, summary: dict[str, Any] | None) -> None:
    """Refuse a refined file whose weights were scaled: its codes belong to norms that only that file has."""
    if summary is None:
        raise MissingModelError(f"export: {run.path} has not finished; repeat its command to finish it")
    folded = summary["refine"]["derivation"]["folded"]
    if folded:
        raise CheckpointError(
            f"export: the file that {run.path} refined has scaled weights ({folded[0]} and {len(folded) - 1} more "
            "modules); its codes do not fit the original's other tensors. Use the refined file in the run itself"
        )


def export(
    path: Path,
    names: Sequence[str],
    out: Path | None = None,
    *,
    original: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Path]:
    """Write a run or a quantized model in each of the named formats, one after the other.

    Args:
        path: Run directory, or a quantized model.
        names: Formats of the registry.
        out: Parent of a folder per format; None is the run itself.
        original: See `open_solved`.
        say: Receives notes and what was written.

    Returns:
        Folder of every format.

    Raises:
        UnrepresentableError: A format cannot hold a grid or shape; nothing has been written then.
        PermissionError: A folder cannot be written there.
        UserError: See `open_solved` and `formats.write.write_model`.
    """
    if out is not None:
        check_writable(out, out)  # before the original is hashed
    solved = open_solved(path, original)
    targets = {name: (out or solved.home) / name for name in names}
    _preflight(solved, targets, say)
    if solved.dropped:
        say(
            f"note: the file quantizes activations ({solved.dropped}); what is written quantizes weights alone"
        )
    for name, target in targets.items():
        registry.by_name(name).write(
            solved.source,
            target,
            solved.layers(),
            recipe=solved.recipe,
            prove_from=solved.layers,
        )
        say(f"{name}: {target}")
    return targets


def _preflight(solved: Solved, targets: dict[str, Path], say: Callable[[str], None]) -> None:
    """Ask every format about every layer, one layer in memory at a time."""
    chosen = {name: registry.by_name(name) for name in targets}
    there = {name for name, target in targets.items() if target.is_file() or (target / MANIFEST).exists()}
    if there and (missing := [name for name in targets if name not in there]):
        raise OutputExistsError(
            f"export: {', '.join(str(targets[name]) for name in targets if name in there)} exists already; write what "
            f"is not there yet with --format {','.join(missing)}, or choose another --out"
        )
    for name, target in targets.items():
        check_target(target)
        check_writable(target, target.parent)
        for warning in chosen[name].check_source(solved.source):
            say(f"note: {name}: {warning}")
    schemes: dict[str, Scheme] = {}
    for layer in solved.layers():
        shape = weight_shape(solved.source, layer.name)
        scheme = schemes[layer.name] = Scheme.of_grid(layer.grid)
        served = TORCH_DTYPES[solved.source.tensors[f"{layer.name}.weight"].dtype]
        for found in chosen.values():
            if isinstance(found, SafetensorsFormat):
                found.check_scheme(layer.name, shape, scheme)
                found.check_grid(layer.name, layer.grid, served)
            else:
                found.check_grid(layer.name, layer.grid)
    plan_formats(solved.source, targets, schemes, say)
