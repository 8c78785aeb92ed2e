# SPDX-License-Identifier: Apache-2.0
"""Reports name the grids that layers have: rules for all of them, kinds, runs that have not finished."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from discquant.config import GridConfig, LayerGrid
from discquant.run.told_grids import as_table, grids_told

NAMES = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
LAYERS = [{"name": name, "weights": 100} for name in NAMES]


def options(grid: GridConfig, **rules: GridConfig) -> dict[str, Any]:
    found = [asdict(LayerGrid(name.replace("__", "."), own)) for name, own in rules.items()]
    return {"grid": asdict(grid), "layers": found}


def test_no_grid_is_named_that_no_layer_has() -> None:
    """Rules for every layer: the grid for all others is not told; its layers and weights stand at each."""
    narrow, wide = GridConfig(2, 32), GridConfig(3, -1, sym=False)
    given = {"blocks.0.up": narrow, "blocks.0.down": wide, "blocks.1.up": wide, "blocks.1.down": wide}
    found = options(GridConfig(4, 64), **given)
    told = grids_told({}, found, LAYERS)
    assert told == (
        "on 2 grids: 3 bits, asymmetric, one scale per row, search scales (3 layers, 75.0% of the weights); "
        "2 bits, symmetric, groups of 32, search scales (1 layer, 25.0% of the weights)"
    )
    assert as_table({}, found)["layers"] == "4 rules"
    one = options(GridConfig(4, 64), **dict.fromkeys(given, narrow))
    assert grids_told({}, one, LAYERS) == "at 2 bits, symmetric, groups of 32, search scales"
    unfinished = grids_told({}, found, [])
    assert unfinished == "at 4 bits, symmetric, groups of 64, search scales, but for what 4 rules say"


def test_kinds_are_named() -> None:
    """And the layers whose rows are no whole blocks, which have another grid."""
    assert grids_told({}, options(GridConfig.of_kind("q6_k")), LAYERS).startswith("at q6_k: 6 bits, ")
    laid = [{**layer, "columns": 512} for layer in LAYERS]
    assert grids_told({}, options(GridConfig.of_kind("q6_k")), laid).startswith("at q6_k: 6 bits, ")
    laid[3] |= {"columns": 288}
    told = grids_told({}, options(GridConfig.of_kind("q6_k")), laid)
    assert told.startswith("on 2 grids: q6_k: 6 bits, ") and told.endswith(
        "; q8_0: 8 bits, where rows are no whole blocks of q6_k (1 layer, 25.0% of the weights)"
    )


def test_refining_runs_are_on_the_files_grids() -> None:
    """Runs of earlier versions did not keep them."""
    found = options(GridConfig(5, 32, sym=False))
    config: dict[str, Any] = {"identity": {"refines": {"gguf": "0" * 64}}}
    assert grids_told(config, found, LAYERS) == "on the file's own grids"
    config["file_grids"] = {"Q3_K": 2, "Q4_K": 1}
    assert grids_told(config, found, LAYERS) == "on the file's own grids: Q3_K (2 layers), Q4_K (1 layer)"
    assert as_table(config, found) == {"grid": "the file's own: Q3_K (2 layers), Q4_K (1 layer)"}
