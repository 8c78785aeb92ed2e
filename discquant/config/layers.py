# SPDX-License-Identifier: Apache-2.0
"""Grids of single layers: rules that name modules, and which grid a module gets by them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, get_args

from discquant.config.checks import check
from discquant.config.grid import GRID_KINDS, GridConfig, GridKind

GridOf = Callable[[str], GridConfig]
SPEC = (
    "a width (4), also with a group size (4g32), a kind (q6_k), or KEY=VALUE of bits, group_size, sym, grid and kind, "
    "comma separated"
)


def _paths(name: str) -> list[str]:
    """The names of a module and of all around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _words(name: str) -> set[str]:
    """The patterns without glob letters that cover a module."""
    return {*_paths(name), *name.split(".")}


def _is_glob(pattern: str) -> bool:
    return any(letter in pattern for letter in "*?[")


def names_module(pattern: str, name: str) -> bool:
    """Say whether a pattern covers a module: names it or one around it, by name, last part of that, or glob pattern."""
    return pattern in _words(name) or (
        _is_glob(pattern) and any(fnmatch(path, pattern) for path in _paths(name))
    )


def names_none(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the patterns that cover none of some modules; quick where many patterns are plain names."""
    names = list(names)
    words = {word for name in names for word in _words(name)}
    paths = {path for name in names for path in _paths(name)}
    return [
        pattern
        for pattern in patterns
        if pattern not in words and not (_is_glob(pattern) and any(fnmatch(path, pattern) for path in paths))
    ]


@dataclass(frozen=True)
class LayerGrid:
    """A grid for the modules that a pattern names.

    Attributes:
        modules: A module's name, its last part, or a glob pattern, as in `ignore`; covers what is below it, too.
        grid: Their grid.
    """

    modules: str
    grid: GridConfig

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: A field is out of range.
        """
        check(
            "modules",
            "a name or a pattern",
            isinstance(self.modules, str) and bool(self.modules),
            self.modules,
        )
        check("grid", "a GridConfig", isinstance(self.grid, GridConfig), self.grid)

    @classmethod
    def parse(cls, text: str, base: GridConfig) -> LayerGrid:
        """Read `PATTERN:SPEC`, as `down_proj:4`, `v_proj:q6_k` or `*.layers.0.*:bits=8,group_size=32`.

        Args:
            text: The rule.
            base: Grid of all other modules; a uniform rule takes from it what it does not say itself.

        Raises:
            ValueError: It cannot be read, or a value is out of range.
        """
        modules, _, spec = text.rpartition(":")
        check("a grid for some layers", f"PATTERN:SPEC, SPEC {SPEC}", bool(modules and spec), text)
        return cls(modules, parse_grid(spec, base))


def parse_grid(spec: str, base: GridConfig) -> GridConfig:
    """Read a grid: a width (`4`, `4g32`), a kind, or `KEY=VALUE` pairs; what a uniform one leaves out is as in `base`.

    Raises:
        ValueError: It cannot be read, or a value is out of range.
    """
    found: dict[str, Any] = {}
    # 4g32 is short for two of them.
    written = re.sub(r"(^|,)\s*(\d+)g(-?\d+)\s*(?=,|$)", r"\1bits=\2,group_size=\3", spec)
    for part in (part.strip() for part in written.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = ("bits", part) if _is_number(part) else ("kind", part)
        said = key not in found and value and key in {field.name for field in dataclasses.fields(GridConfig)}
        check("a layer's grid", SPEC, bool(said), spec)
        if key in ("bits", "group_size"):
            check(key, "an integer", _is_number(value.removeprefix("-")), value)
            found[key] = int(value)
        elif key == "sym":
            check(key, "true or false", value in ("true", "false"), value)
            found[key] = value == "true"
        else:
            found[key] = value
    kind = found.pop("kind", "uniform")
    check("kind", f"one of {', '.join(get_args(GridKind))}", kind in get_args(GridKind), kind)
    bits, group_size, sym = GRID_KINDS.get(kind, (base.bits, base.group_size, base.sym))
    fixed = {"bits": bits, "group_size": group_size, "sym": sym, "grid": base.grid}
    return GridConfig(**{**fixed, **found}, kind=kind)


class GridRules:
    """Which grid each module is put on: that of the last rule that covers it, else the one for all."""

    def __init__(self, grid: GridConfig, layers: Sequence[LayerGrid] = ()) -> None:
        """Take the grid for all, and rules; of two that cover a module the later one counts."""
        self._grid = grid
        # A list of every layer's grid (as `allocate` writes) is of plain names: those are looked up, not matched.
        self._exact = {rule.modules: (place, rule.grid) for place, rule in enumerate(layers)}
        self._patterns = [(place, rule) for place, rule in enumerate(layers) if _is_glob(rule.modules)]
        self._known: dict[str, GridConfig] = {}
        self._shares: dict[tuple[str, ...], tuple[tuple[GridConfig, float], ...]] = {}

    def __call__(self, name: str) -> GridConfig:
        """Return the grid of a module."""
        if name not in self._known:
            known = [self._exact[word] for word in _words(name) if word in self._exact]
            place, found = max(known, key=lambda rule: rule[0], default=(-1, self._grid))
            for later, rule in self._patterns:
                if later > place and names_module(rule.modules, name):
                    place, found = later, rule.grid
            self._known[name] = found
        return self._known[name]

    def shares(self, names: tuple[str, ...]) -> tuple[tuple[GridConfig, float], ...]:
        """Return the grids of some modules, each with its share of them; of none, the grid for all."""
        if not self._exact or not names:
            return ((self._grid, 1.0),)
        if names not in self._shares:
            counts = Counter(map(self, names))
            self._shares[names] = tuple((grid, count / len(names)) for grid, count in counts.items())
        return self._shares[names]

    @classmethod
    def of_dict(cls, config: Mapping[str, Any]) -> GridRules:
        """Return the rules of a run's configuration as its JSON has them."""
        layers = [
            LayerGrid(rule["modules"], GridConfig(**rule["grid"])) for rule in config.get("layers") or ()
        ]
        return cls(GridConfig(**config["grid"]), layers)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
