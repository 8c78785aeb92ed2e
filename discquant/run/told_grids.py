# SPDX-License-Identifier: Apache-2.0
"""The grids of a run in words, for reports and manifests: which there are, and how many layers have each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from discquant.config import GRID_KINDS, GridConfig, GridRules
from discquant.formats.coded import LayerFacts
from discquant.formats.scheme import Scheme
from discquant.grids.gguf import SUPER_KINDS, gguf_kind

OWN = "the file's own"


def kinds_of_file(rows: Iterable[LayerFacts], name: str) -> dict[str, int]:
    """Count the layers of a file by their grid in words.

    Args:
        rows: Its layers.
        name: Its format; a block type of GGUF says width, group and symmetry by its name.
    """
    counts: dict[str, int] = {}
    for row in rows:
        words = row.kind if name == "gguf" else str(Scheme.of_facts(row))
        counts[words] = counts.get(words, 0) + 1
    return counts


def of_file(options: Mapping[str, Any], kinds: Mapping[str, int] | None) -> dict[str, Any]:
    """Return a refining run's options with the file's grids in place of the one that stood for them.

    Args:
        options: As config.json has them.
        kinds: See `kinds_of_file`; None where the run did not keep them.
    """
    told = f"{OWN}: {_counted(kinds)}" if kinds else OWN
    return {key: told if key == "grid" else value for key, value in options.items() if key != "layers"}


def as_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options from its config.json for the manifest of what is exported from it."""
    options: dict[str, Any] = dict(config["identity"]["config"])
    return of_file(options, config.get("file_grids")) if _refines(config) else options


def as_table(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options with grids of many layers in few words, for a table."""
    if _refines(config):
        return of_file(options, config.get("file_grids"))
    rules = len(options.get("layers") or ())
    return {**options, "layers": f"{rules} rule{'s' * (rules > 1)}"} if rules else dict(options)


def grids_told(
    config: Mapping[str, Any], options: Mapping[str, Any], layers: Iterable[Mapping[str, Any]]
) -> str:
    """Say what grids a run's layers are on, to follow the method's name.

    Args:
        config: config.json.
        options: The run's options in it; `grid` must be there.
        layers: The summary's table of layers; empty for a run that has not finished.
    """
    if _refines(config):
        kinds = config.get("file_grids")
        return "on the file's own grids" + (f": {_counted(kinds)}" if kinds else "")
    grid_of = GridRules.of_dict(dict(options))
    found: dict[str, list[int]] = {}
    for layer in layers:
        words = _laid(grid_of(str(layer["name"])), layer)
        found.setdefault(words, []).append(int(layer.get("weights") or 0))
    if not found:
        rules = len(options.get("layers") or ())
        but = f", but for what {rules} rule{'s say' if rules > 1 else ' says'}" if rules else ""
        return f"at {_words(GridConfig(**options['grid']))}{but}"
    if len(found) == 1:
        return f"at {next(iter(found))}"
    total = max(1, sum(map(sum, found.values())))
    parts = [
        f"{words} ({len(own)} layer{'s' * (len(own) > 1)}, {sum(own) / total:.1%} of the weights)"
        for words, own in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    return f"on {len(found)} grids: {'; '.join(parts)}"


def _refines(config: Mapping[str, Any]) -> bool:
    return "refines" in (config.get("identity") or {})


def _counted(kinds: Mapping[str, int]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{words} ({count} layer{'s' * (count > 1)})" for words, count in kinds.items())


def _words(grid: GridConfig) -> str:
    groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    facts = f"{grid.bits} bits, {'symmetric' if grid.sym else 'asymmetric'}, {groups}, {grid.grid} scales"
    return facts if grid.kind == "uniform" else f"{grid.kind}: {facts}"


def _laid(grid: GridConfig, layer: Mapping[str, Any]) -> str:
    """A layer's grid in words: rows that are no whole blocks of a kind are on another one than was asked for."""
    columns = layer.get("columns")  # earlier versions did not keep it
    if columns is None or grid.kind not in SUPER_KINDS:
        return _words(grid)
    kind = gguf_kind(grid.kind, int(columns))
    if kind == grid.kind:
        return _words(grid)
    bits, _, _ = GRID_KINDS.get(kind, (8, 32, True))
    return f"{kind}: {bits} bits, where rows are no whole blocks of {grid.kind}"
