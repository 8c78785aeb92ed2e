# SPDX-License-Identifier: Apache-2.0
"""Another choice from figures that are there: edited ones, and sizes on the edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from discquant.allocation import Allocation, Unit
from discquant.config import GridConfig
from discquant.errors import CheckpointError
from discquant.run.allocate import choose_again


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found["units"][0]["damage"].pop("2"),
        lambda found: found["units"][0]["damage"].update({"2": "0.1"}),
        lambda found: found["units"][0]["damage"].update({"2": None}),
        lambda found: found["units"][0]["damage"].update({"2": float("nan")}),
        lambda found: found["units"][0]["bits_per_weight"].update({"2": "x"}),
        lambda found: found["units"][0]["bits_per_weight"].clear(),
        lambda found: found["units"][0]["damage"].update({"2": -1e-9}),
        lambda found: found["units"][0]["damage"].update({"2": True}),
        lambda found: found["units"][0]["bits_per_weight"].update({"2": 0}),
        lambda found: found["units"][0].update(weights=0),
        lambda found: found["units"][0].update(weights=True),
        lambda found: found["units"][0].update(modules="model"),
        lambda found: found["units"].clear(),
        lambda found: found["choices"].pop("2"),
    ],
)
def test_edited_figures_are_refused(tmp_path: Path, edit: Any) -> None:
    grids = {word: {"grid": {"bits": int(word), "group_size": 32}} for word in ("2", "4")}
    figures = {"bits_per_weight": {"2": 2.5, "4": 4.5}, "damage": {"2": 0.5, "4": 0.1}}
    unit = {"name": "a", "modules": ["a"], "weights": 64, "chosen": "4", **figures}
    found: dict[str, Any] = {"discquant_allocation": 1, "choices": grids, "units": [unit], "layers": []}
    path = tmp_path / "grids.json"
    path.write_text(json.dumps(found))
    assert choose_again(path, tmp_path / "good.json", 4.5).units[0].chosen == "4"
    edit(found)
    path.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="figures cannot be read"):
        choose_again(path, tmp_path / "x.json", 4.5)


def test_a_size_that_is_one_choice_s_average_holds_it() -> None:
    """A mean over weights is a quotient that rounding may put below the bits it was made of."""
    grids = {word: GridConfig(int(word), 32) for word in ("3", "4")}
    units = tuple(
        Unit(f"u{size}", (f"u{size}",), size, {"3": (3 * size + 7) / size, "4": (4 * size + 7) / size},
             {"3": 1.0, "4": 0.5}, "3")
        for size in range(1, 60, 2)
    )  # fmt: skip
    for count in range(1, len(units)):
        found = Allocation(units[:count], grids)
        for word in grids:
            size = found.bits(word)
            assert size is not None and {unit.chosen for unit in found.at(size).units} == {word}
    assert {unit.chosen for unit in found.at(1e308).units} == {"4"}
