# SPDX-License-Identifier: Apache-2.0
"""What is refused before any long work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from discquant.calibration.documents import SUFFIXES
from discquant.calibration.enough import check_enough
from discquant.calibration.load import check_dataset, token_file
from discquant.config import GridConfig, QuantizeConfig, names_none
from discquant.errors import CalibrationError, CheckpointError, ConfigError, UnrepresentableError
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import DEFAULT_SHARD_BYTES
from discquant.formats.export import plan_export
from discquant.formats.output import check_space, missing_part
from discquant.formats.safetensors_file import TORCH_DTYPES
from discquant.formats.safetensors_format import SafetensorsFormat
from discquant.formats.scheme import Scheme
from discquant.formats.source import Source, pickled_files
from discquant.formats.stored import stored_name
from discquant.formats.write import weight_shape
from discquant.grids import Grid, place_grid
from discquant.solver.chain import Chain, WeightRef
from discquant.solver.experts import layer_names
from discquant.solver.solve import lay_grid

PROBE_ROWS = 64


def check_ignore(model: torch.nn.Module, ignore: tuple[str, ...]) -> None:
    """Refuse an ignore entry that names nothing.

    Args:
        model: The model.
        ignore: Patterns. Those of modules that are left alone anyway (a norm, a vision tower) are as good as any.
            `lm_head` is never refused: it is there by default, and not every model calls its head so.

    Raises:
        ConfigError: It matches no module and no expert; the message lists some that exist.
    """
    names = [name for name, _ in model.named_modules() if name] + layer_names(model, model, "")
    for pattern in names_none((pattern for pattern in ignore if pattern != "lm_head"), names):
        raise ConfigError(f"no module matches --ignore {pattern!r}; last names here: {_last_names(names)}")


def _last_names(names: Iterable[str]) -> str:
    """What a pattern may say: the last parts of the names, without numbers."""
    return ", ".join(sorted({last for name in names if not (last := name.rpartition(".")[2]).isdigit()}))


def check_groups(chain: Chain, config: QuantizeConfig) -> None:
    """Refuse groups that are wider than every weight they are for, and rules for layers that there are not.

    Raises:
        ConfigError: So they are; -1 asks for one group per row.
    """
    shapes = {ref.name: ref.shape for refs in chain.weights for ref in refs}
    for pattern in names_none((rule.modules for rule in config.layers), shapes):
        raise ConfigError(
            f"no quantized layer matches --layer-grid {pattern!r}; last names here: {_last_names(shapes)}"
        )
    for grid in config.grids:
        widest = max((shape[1] for name, shape in shapes.items() if config.grid_of(name) == grid), default=0)
        if grid.kind == "uniform" and widest and grid.group_size > widest:
            raise ConfigError(
                f"quantize: --group-size must be at most the widest row = {widest}, or -1 for whole rows, "
                f"got {grid.group_size}"
            )


def _first_of_each(chain: Chain, config: QuantizeConfig) -> list[WeightRef]:
    """The first weight on each grid."""
    found: dict[GridConfig, WeightRef] = {}
    for ref in (ref for refs in chain.weights for ref in refs):
        found.setdefault(config.grid_of(ref.name), ref)
    return list(found.values())


def check_formats(
    source: Source, chain: Chain, config: QuantizeConfig, out: Path, say: Callable[[str], None]
) -> None:
    """Refuse what an output format cannot hold before anything is computed; say what some engines will refuse.

    Whether a format holds scales and offsets shows only in their values, so a grid is laid on some rows of the first
    weight. What it refuses, the grid of the whole weight would be refused for as well.

    Args:
        source: The original.
        chain: The same as a chain.
        config: The run's options.
        out: The run directory; what has been exported there already is not asked about again.
        say: Takes each note.

    Raises:
        UnrepresentableError: A format cannot hold a grid or shape, or the checkpoint has other names than the model.
        OutputExistsError, DiskSpaceError: See `plan_formats`.
        CheckpointError: Weights are pickled: formats are written beside the original's safetensors.
        ValueError: The first weight is not finite; the message names it.
    """
    if not config.formats:
        return
    if pickled_files(source.path):
        raise CheckpointError(
            f"quantize: {source.path} holds pickled weights, and --format {config.format} copies from safetensors: "
            "take --format none (the codes stay in the run directory, which generate and evaluate open with "
            "--allow-pickle), or convert the original with save_pretrained() on a machine you trust"
        )
    original = Checkpoint(source.path)
    _check_names(source, original, chain)
    targets: dict[str, Path] = {}
    shapes = {ref.name: ref.shape for refs in chain.weights for ref in refs}
    probe = {
        first.name: lay_grid(first, config.grid_of(first.name), PROBE_ROWS)
        for first in _first_of_each(chain, config)
    }
    check_shapes(shapes, config, lambda name: check_grids(source, (name,), probe))
    for name in config.formats:
        chosen, target = registry.by_name(name), out / name
        if target.exists():
            continue  # a resumed run that had already exported
        targets[name] = target
        for warning in chosen.check_source(original):
            say(f"note: {name}: {warning}")
    schemes = {layer: Scheme.planned(shape, config.grid_of(layer)) for layer, shape in shapes.items()}
    plan_formats(original, targets, schemes, say)
    check_grids(source, config.formats, probe)


def check_shapes(
    shapes: Mapping[str, tuple[int, int]],
    config: QuantizeConfig,
    check_laid: Callable[[str], None],
) -> None:
    """Refuse bits, groups and kinds of grids that a format cannot hold; for a format's own kind, name those that can.

    Args:
        shapes: Of every weight.
        config: The run's options.
        check_laid: Asks a format about a grid that was laid; only about those of a format's own kind.

    Raises:
        UnrepresentableError: So it is.
    """

    def ask(name: str) -> None:
        for layer, shape in shapes.items():
            registry.by_name(name).check(shape, config.grid_of(layer), layer)

    def refusal(name: str) -> UnrepresentableError | None:
        try:
            ask(name)
            check_laid(name)
        except UnrepresentableError as error:
            return error
        return None

    kinds = dict.fromkeys(config.grid_of(layer).kind for layer in shapes)
    for name in config.formats:
        if all(kind == "uniform" for kind in kinds):
            ask(name)
            continue
        found = refusal(name)
        if found is not None:
            holders = [other for other in registry.names() if refusal(other) is None]
            holders.sort(key=lambda other: other != "gguf")  # whose block types the q kinds are
            instead = f"give one that can ({', '.join(holders)})" if holders else "no format can; give none"
            raise UnrepresentableError(
                f"quantize: --format {name} cannot hold this model in --kind {' and '.join(kinds)}; {instead}"
                f"{', or none' if holders else ''} (the codes stay in the run directory): {found}"
            ) from found


def check_planned(chain: Chain, config: QuantizeConfig, dtype: torch.dtype) -> None:
    """Refuse what `check_groups` and `check_formats` refuse of a model whose weights are not there.

    Args:
        chain: The model; nothing of it is read but shapes.
        config: The run's options.
        dtype: Of the weights in the checkpoint.

    Raises:
        ConfigError, UnrepresentableError: See there.
    """
    check_groups(chain, config)
    shapes = {ref.name: ref.shape for refs in chain.weights for ref in refs}
    firsts = _first_of_each(chain, config)

    def check_laid(name: str) -> None:
        for first in firsts:
            _check_drawn(name, first.name, first.shape[1], config.grid_of(first.name), dtype)

    check_shapes(shapes, config, check_laid)


def _check_drawn(name: str, layer: str, columns: int, grid: GridConfig, dtype: torch.dtype) -> None:
    """Ask a format about a grid laid on drawn weights: of a format's own kind any tell whether another can hold it.

    Raises:
        UnrepresentableError: It cannot.
    """
    drawn = torch.randn(PROBE_ROWS, columns, generator=torch.Generator().manual_seed(0))
    laid, chosen = place_grid(drawn, grid), registry.by_name(name)
    if isinstance(chosen, SafetensorsFormat):
        chosen.check_grid(layer, laid, dtype)
    else:
        chosen.check_grid(layer, laid)


def holds(name: str, layer: str, shape: tuple[int, int], grid: GridConfig, dtype: torch.dtype) -> bool:
    """Say whether a format can hold a grid of a layer, as far as shapes and kinds tell.

    Args:
        name: Of the format.
        layer: Module path.
        shape: Of its weight.
        grid: The grid.
        dtype: Of the weights in the checkpoint.
    """
    try:
        registry.by_name(name).check(shape, grid, layer)
        if grid.kind != "uniform":
            _check_drawn(name, layer, shape[1], grid, dtype)
    except UnrepresentableError:
        return False
    return True


def _check_names(source: Source, original: Checkpoint, chain: Chain) -> None:
    """Refuse a model that its library renames while it loads it: codes bear the names of the model in memory."""
    for ref in (ref for refs in chain.weights for ref in refs if ref.part is None):
        key = f"{ref.name}.weight"
        if key in original.tensors:
            continue
        stored = stored_name(source.model, key, ref.parameter.shape)
        if stored in original.tensors:
            raise UnrepresentableError(
                f"export: {key} of {type(source.model).__name__} is {stored} in {source.path}, and formats are written "
                "under the checkpoint's names, which a run does not keep: take --format none (the codes stay in the "
                "run directory, which generate and evaluate open), or a checkpoint of the language model alone"
            )


def plan_formats(
    source: Checkpoint, targets: Mapping[str, Path], schemes: Mapping[str, Scheme], say: Callable[[str], None]
) -> None:
    """Refuse before any work what cannot be written after it, one format beside the other; say what engines refuse.

    Args:
        source: The original.
        targets: Where each format goes.
        schemes: Of every module that will be quantized.
        say: Takes each note.

    Raises:
        MissingModelError, CheckpointError, UnrepresentableError, OutputExistsError: See `formats.export.plan_export`.
        DiskSpaceError: There is no room for all of them.
    """
    written = spool = 0
    for name, target in targets.items():
        chosen = registry.by_name(name)
        if not isinstance(chosen, SafetensorsFormat):
            written += chosen.space(source, schemes)
            widths = {
                (scheme.num_bits, scheme.symmetric, scheme.group_size)
                for scheme in schemes.values()
                if scheme.kind == "int"
            }
            for wider in dict.fromkeys(chosen.stored_wider(*width) for width in sorted(widths)):
                if wider:
                    say(f"note: {name}: {wider}")
            continue
        plan = plan_export(source.path, target, schemes, name)
        written += plan.weight_bytes
        spool = max(spool, min(plan.weight_bytes, DEFAULT_SHARD_BYTES))
        for warning in plan.warnings:
            say(f"note: {name}: {warning}")
    if targets:
        check_space(next(iter(targets.values())).parent, written + spool)


def check_grids(source: Source, formats: Iterable[str], grids: Mapping[str, Grid]) -> None:
    """Ask every format whether it can hold the laid grids.

    Args:
        source: The original; engines compute in the dtype of its weights.
        formats: Names of formats.
        grids: By module name.

    Raises:
        UnrepresentableError: Scales or offsets have no place in a format, or the checkpoint holds no such matrix.
    """
    for name in formats:
        chosen = registry.by_name(name)
        if not isinstance(chosen, SafetensorsFormat):
            for layer, grid in grids.items():
                chosen.check_grid(layer, grid)
            continue
        original = Checkpoint(source.path)
        for layer, grid in grids.items():
            weight_shape(original, layer)
            chosen.check_grid(layer, grid, TORCH_DTYPES[original.tensors[f"{layer}.weight"].dtype])


def check_written(out: Path, formats: Iterable[str]) -> None:
    """Refuse a format's folder in a run directory that has been damaged since it was written.

    Raises:
        CheckpointError: A file is gone or has another size; the message names it, and what to remove.
    """
    for folder in (out / name for name in formats):
        missing = missing_part(folder) if folder.is_dir() else None
        if missing is not None:
            raise CheckpointError(
                f"run: {folder} has been damaged since it was written: {missing}; remove that folder, and the same "
                "command writes it anew"
            )


def check_text(source: Source, config: QuantizeConfig, *, windows: int) -> None:
    """Refuse text that no tokenizer reads, a file that is not there, no text at its beginning, or too little.

    Args:
        source: The original.
        config: Which text, and the run's seed.
        windows: How many are needed at least.

    Raises:
        CalibrationError: So it is.
    """
    data, dataset = config.data, config.data.dataset
    if source.tokenizer is None and dataset != "self" and token_file(dataset) is None:
        raise CalibrationError(f"calibration: {source.path} has no tokenizer to read {dataset} with")
    rendered: Any = {"chat_template": data.chat_template, "text_key": data.text_key}
    check_dataset(dataset, source.tokenizer, **rendered)
    check_enough(dataset, source.tokenizer, windows=windows, seqlen=data.seqlen, seed=config.seed, **rendered)


def text_file(dataset: str) -> Path | None:
    """Return the file that the word for calibration text names; None where it names none."""
    of_tokens = token_file(dataset)
    if of_tokens is not None:
        return of_tokens[0]
    return Path(dataset) if Path(dataset).suffix.lower() in SUFFIXES else None
