# SPDX-License-Identifier: Apache-2.0
"""Options of a run: frozen dataclasses, validated when they are made, and the two presets."""

from discquant.config.grid import FREE_SCALES, GRID_KINDS, GridConfig, GridKind, GridSearch
from discquant.config.layers import GridOf, GridRules, LayerGrid, names_module, names_none, parse_grid
from discquant.config.run import AS_LAID, DataConfig, Method, QuantizeConfig
from discquant.config.solver import (
    ComputeDtype,
    LossName,
    OptimizerName,
    PresetName,
    SolverConfig,
    Start,
    StateFormat,
    TeacherSource,
    paper_preset,
    preset,
)

__all__ = [
    "AS_LAID", "FREE_SCALES", "GRID_KINDS", "ComputeDtype", "DataConfig", "GridConfig", "GridKind", "GridOf",
    "GridRules", "GridSearch", "LayerGrid", "LossName", "Method", "OptimizerName", "PresetName", "QuantizeConfig",
    "SolverConfig", "Start", "StateFormat", "TeacherSource", "names_module", "names_none",
    "paper_preset", "parse_grid", "preset",
]  # fmt: skip
