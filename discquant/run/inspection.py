# SPDX-License-Identifier: Apache-2.0
"""`discquant inspect`: what a file is, how large, which engines serve it and what would break."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from discquant.formats import registry
from discquant.formats.coded import Description, LayerFacts
from discquant.formats.engines import AS_OF, engine_rows, problems
from discquant.formats.scheme import Scheme
from discquant.run.directory import CODES, RunDirectory


def describe(path: Path) -> Description:
    """What a run directory or a quantized model is.

    Raises:
        MissingModelError, CheckpointError, NotImplementedError: It cannot be read.
    """
    if not RunDirectory.is_run(path):
        return registry.find(path).describe(path)
    rows = []
    for layer in RunDirectory(path).coded_layers():
        scheme = Scheme.of_grid(layer.grid)
        grid = layer.grid
        # As a dense file would store it: codes, 16-bit scales, zero points of num_bits.
        bits = layer.q.numel() * grid.num_bits + grid.scale.numel() * 16
        bits += 0 if grid.zero_point is None else grid.zero_point.numel() * grid.num_bits
        shape = (layer.q.shape[0], layer.q.shape[1])
        rows.append(
            LayerFacts(
                layer.name,
                shape,
                scheme.label,
                scheme.num_bits,
                scheme.group_size,
                scheme.symmetric,
                -(-bits // 8),
            )
        )
    notes = ("a run directory: export it to serve it; sizes are those of a dense file with 16-bit scales",)
    return Description("run", tuple(rows), 0, (path / CODES).stat().st_size, notes)


def inspect(path: Path) -> dict[str, Any]:
    """Everything `discquant inspect` says, as plain data.

    Raises:
        MissingModelError, CheckpointError, NotImplementedError: It cannot be read.
    """
    found = describe(path)
    schemes = {row.name: scheme_of(row) for row in found.layers}
    shapes = {row.name: row.shape for row in found.layers}
    weights = sum(rows * columns for rows, columns in shapes.values())
    stored = sum(row.stored_bytes for row in found.layers)
    return {
        "format": found.format,
        "schemes": list(dict.fromkeys(str(scheme) for scheme in schemes.values())),
        "layers": [asdict(row) for row in found.layers],
        "quantized_weights": weights,
        "bits_per_weight": 8 * stored / weights if weights else None,
        "untouched_bytes": found.untouched_bytes,
        "file_bytes": found.file_bytes,
        "engines": engine_rows(found.format, schemes),
        "engines_as_of": AS_OF,
        "problems": [*problems(found.format, schemes, shapes), *found.problems],
        "notes": list(found.notes),
    }


def scheme_of(row: LayerFacts) -> Scheme:
    """The scheme behind a row's `kind`, which carries its width (`int3`)."""
    kind = next((name for name in ("int", "affine") if row.kind == f"{name}{row.num_bits}"), row.kind)
    return Scheme(row.num_bits, row.group_size, row.symmetric, kind)


def print_report(found: Mapping[str, Any]) -> None:
    """Print what `inspect` found."""
    from rich.console import Console
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
    for row in found["layers"]:
        size = "row" if row["group_size"] == -1 else str(row["group_size"])
        shape = f"{row['shape'][0]} x {row['shape'][1]}"
        symmetric = "yes" if row["symmetric"] else "no"
        table.add_row(row["name"], shape, row["kind"], size, symmetric, f"{row['stored_bytes']:,}")
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
            console.print(f"{'would break: ' if kind == 'problems' else 'note: '}{text}", highlight=False)
