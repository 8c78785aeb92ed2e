# SPDX-License-Identifier: Apache-2.0
"""`discquant inspect`: what a file is, how large, which engines serve it and what would break."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from discquant.config import GridRules
from discquant.formats import registry
from discquant.formats.bits import bits_per_weight, grid_bits
from discquant.formats.coded import Description, LayerFacts
from discquant.formats.engines import AS_OF, engine_rows, problems
from discquant.formats.scheme import Scheme
from discquant.grids.fused import experts_of
from discquant.run.checks import holds
from discquant.run.directory import CODES, RunDirectory


def describe(path: Path) -> Description:
    """What a run directory or a quantized model is.

    Raises:
        MissingModelError, CheckpointError, NotImplementedError: It cannot be read.
    """
    if not RunDirectory.is_run(path):
        return registry.find(path).describe(path)
    run = RunDirectory(path)
    grid_of = GridRules.of_dict(run.config()["identity"]["config"])
    name, served = _served(run)
    rows = []
    for layer in run.coded_layers():
        scheme = Scheme.of_grid(layer.grid)
        shape = (layer.q.shape[0], layer.q.shape[1])
        bits = grid_bits(layer.grid, shape, grid_of(layer.name).kind)
        stored = -(-bits // 8)
        if layer.name in served:
            stored, bits = served[layer.name].stored_bytes, served[layer.name].weight_bits
        facts = (scheme.label, scheme.num_bits, scheme.group_size, scheme.symmetric, stored, bits)
        rows.append(LayerFacts(layer.name, shape, *facts))
    sizes = "a dense file with 16-bit scales" if name is None else f"its {name} file"
    use = "export it to serve it"
    if name is None and rows and not any(_held(other, rows, grid_of) for other in registry.names()):
        kinds = " and ".join(dict.fromkeys(grid_of(row.name).kind for row in rows))
        use = f"no format holds its {kinds} codes, generate and evaluate open it"
    notes = (f"a run directory: {use}; sizes are those of {sizes}",)
    return Description("run", tuple(rows), 0, (path / CODES).stat().st_size, notes)


def _held(name: str, rows: Iterable[LayerFacts], grid_of: GridRules) -> bool:
    """Whether a format can hold every layer of a run, as far as shapes and kinds tell."""
    different = {(row.shape, grid_of(row.name)): row.name for row in rows}
    return all(holds(name, layer, shape, grid, torch.bfloat16) for (shape, grid), layer in different.items())


def _served(run: RunDirectory) -> tuple[str | None, dict[str, LayerFacts]]:
    """The first format that a run wrote, and the layers of its file; the run's own report counts them too."""
    name = next(iter(run.formats()), None)
    if name is None or not (run.path / name).exists():
        return None, {}
    return name, {row.name: row for row in registry.by_name(name).describe(run.path / name).layers}


def inspect(path: Path) -> dict[str, Any]:
    """Everything `discquant inspect` says, as plain data.

    Raises:
        MissingModelError, CheckpointError, NotImplementedError: It cannot be read.
    """
    found = describe(path)
    schemes = {row.name: Scheme.of_facts(row) for row in found.layers}
    shapes = {row.name: row.shape for row in found.layers}
    weights = sum(rows * columns for rows, columns in shapes.values())
    return {
        "format": found.format,
        "schemes": list(dict.fromkeys(str(scheme) for scheme in schemes.values())),
        "layers": [asdict(row) for row in found.layers],
        "quantized_weights": weights,
        "bits_per_weight": bits_per_weight((row.weight_bits, row.shape) for row in found.layers),
        "untouched_bytes": found.untouched_bytes,
        "file_bytes": found.file_bytes,
        "engines": engine_rows(found.format, schemes),
        "engines_as_of": AS_OF,
        "problems": [*problems(found.format, schemes, shapes, found.plain), *found.problems],
        "notes": list(found.notes),
    }


def print_report(found: Mapping[str, Any]) -> None:
    """Print what `inspect` found."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    bits = found["bits_per_weight"]
    console.print(
        f"{found['format']}: {'; '.join(found['schemes']) or 'no quantized layer'}\n"
        f"{found['quantized_weights']:,} quantized weights, "
        f"{'no' if bits is None else f'{bits:.3f}'} bits per weight; {found['file_bytes']:,} bytes in files, "
        f"{found['untouched_bytes']:,} of them not quantized",
        highlight=False,
    )
    table = Table()
    for column in ("module", "shape", "kind", "group", "symmetric", "bytes"):
        table.add_column(column, justify="right" if column in ("group", "bytes") else "left", overflow="fold")
    for row, count in _experts_together(found["layers"]):
        size = "row" if row["group_size"] == -1 else str(row["group_size"])
        shape = f"{f'{count} of ' if count > 1 else ''}{row['shape'][0]} x {row['shape'][1]}"
        symmetric = "yes" if row["symmetric"] else "no"
        table.add_row(escape(row["name"]), shape, row["kind"], size, symmetric, f"{row['stored_bytes']:,}")
    console.print(table)
    engines = Table(title=f"Engines, as of {found['engines_as_of']}")
    for column in ("engine", "serves it", "note"):
        engines.add_column(column)
    for row in found["engines"]:
        engines.add_row(row["engine"], row["verdict"], row["note"])
    if found["engines"]:
        console.print(engines)
    for kind in ("problems", "notes"):
        for text in found[kind]:
            said = f"{'would break: ' if kind == 'problems' else 'note: '}{text}"
            console.print(said, highlight=False, markup=False)  # it quotes the file


def _experts_together(layers: Iterable[Mapping[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Rows to print and of how many matrices each is: those of a layer's experts that are alike are one row."""
    found: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}
    for row in layers:
        name, experts = row["name"], experts_of(row["name"])
        if experts is not None:
            name = f"{experts}.*.{name[len(experts) + 1 :].partition('.')[2]}"
        facts = (name, *row["shape"], row["kind"], row["group_size"], row["symmetric"])
        if facts not in found:
            found[facts] = dict(row), 1  # one that is alike to no other keeps its number
        else:
            last, count = found[facts]
            total = last["stored_bytes"] + row["stored_bytes"]
            found[facts] = {**last, "name": name, "stored_bytes": total}, count + 1
    return list(found.values())
