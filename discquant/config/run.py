# SPDX-License-Identifier: Apache-2.0
"""A whole run: grid, method, solver, data, output."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from discquant.config.checks import check, names, whole
from discquant.config.grid import FREE_SCALES, GridConfig
from discquant.config.layers import GridRules, LayerGrid
from discquant.config.solver import SolverConfig
from discquant.errors import either

Method = Literal["rtn", "greedy", "gptq", "guided", "discquant"]
AS_LAID = (
    "discquant, scales as laid"  # in a run's summary: the final codes on the grid that they were chosen on
)


@dataclass(frozen=True)
class DataConfig:
    """Calibration text.

    Attributes:
        dataset: `self`, `arithmetic` (its split calibration; `arithmetic:heldout`), a .txt/.jsonl/.parquet path,
            `file.safetensors:key`, or a data set on the hub: `name`, `name:split` or `name:config:split`.
        nsamples: Token windows to solve on; `validation_windows` more are loaded and held out.
        seqlen: Tokens per window.
        chat_template: Put plain text and question-answer pairs through the tokenizer's chat template.
        text_key: Key of plain text in .jsonl, .parquet and data sets.
    """

    dataset: str = "self"
    nsamples: int = 2048
    seqlen: int = 256
    chat_template: bool = False
    text_key: str = "text"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: A field is out of range.
        """
        named = "self, a file of text or token ids, or the name of a data set"
        check("dataset", named, bool(self.dataset.strip()), self.dataset)
        whole("nsamples", 1, self.nsamples)
        whole("seqlen", 8, self.seqlen)
        check("text_key", "a name", bool(self.text_key), self.text_key)


@dataclass(frozen=True)
class QuantizeConfig:
    """A whole run: grid, method, solver, data, output.

    `format` names one or more formats of `formats.registry`, comma separated, or is `none`. `checkpoint_every` None
    paces checkpoints by what they cost (`run.checkpoint`). `layers` gives some modules another grid than `grid`; of two
    rules for a module the later one counts.
    """

    grid: GridConfig = dataclasses.field(default_factory=GridConfig)
    method: Method = "discquant"
    solver: SolverConfig = dataclasses.field(default_factory=SolverConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    format: str = "compressed-tensors"
    ignore: tuple[str, ...] = ("lm_head",)
    gptq_samples: int = 256
    gptq_damp: float = 0.1
    baselines: tuple[Method, ...] = ("rtn", "gptq")
    validation_windows: int = 32
    seed: int = 0
    checkpoint_every: int | None = None
    layers: tuple[LayerGrid, ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: A field is out of range.
        """
        check("method", f"one of {either(get_args(Method))}", self.method in get_args(Method), self.method)
        check(
            "format",
            "format names, comma separated, or none",
            bool(self.formats or self.format == "none"),
            self.format,
        )
        moved = self.solver.scale_iters if self.method == "discquant" else 0
        rules = isinstance(self.layers, tuple) and all(isinstance(rule, LayerGrid) for rule in self.layers)
        check("layers", "a tuple of LayerGrid", rules, self.layers)
        told = f"0; only {either(FREE_SCALES)} grids have free scales"
        for kind in dict.fromkeys(grid.kind for grid in self.grids):
            check(f"scale_iters with kind {kind}", told, moved == 0 or kind in FREE_SCALES, moved)
        for name in ("ignore", "baselines"):
            names(name, getattr(self, name))
        known = all(name in get_args(Method) and name != "discquant" for name in self.baselines)
        check("baselines", "a list of rtn, greedy, gptq, guided", known, self.baselines)
        for name in ("validation_windows", "gptq_samples"):
            whole(name, 1, getattr(self, name))
        if self.checkpoint_every is not None:
            whole("checkpoint_every", 1, self.checkpoint_every)
        check("gptq_damp", "above 0", 0 < self.gptq_damp < math.inf, self.gptq_damp)
        check("seed", "in [0, 2^31)", type(self.seed) is int and 0 <= self.seed < 2**31, self.seed)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats to write, each once, in order; empty for `none`."""
        if self.format == "none":
            return ()
        return tuple(dict.fromkeys(part.strip() for part in self.format.split(",") if part.strip()))

    @property
    def grids(self) -> tuple[GridConfig, ...]:
        """Every grid that a layer may be put on, each once."""
        return tuple(dict.fromkeys((self.grid, *(rule.grid for rule in self.layers))))

    @functools.cached_property
    def grid_of(self) -> GridRules:
        """Which grid each module is put on, by its name."""
        return GridRules(self.grid, self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)
