# SPDX-License-Identifier: Apache-2.0
"""Options of a run arrive where they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from discquant.config import Method, QuantizeConfig
from discquant.run import work
from discquant.solver.engine import Engine


@pytest.mark.parametrize("method", ["gptq", "greedy", "guided", "rtn"])
def test_layerwise_codes_get_the_damping_and_the_windows(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many windows as GPTQ is to have; nearest codes need none, and only guided ones energies."""
    seen: list[tuple[Any, ...]] = []

    def watched(*given: Any, **named: Any) -> None:
        seen.append((*given, named))

    class Rows(list[int]):
        def batches(self, rows: range) -> list[int]:
            return [self[place] for place in rows]

    monkeypatch.setattr(work, "layerwise_codes", watched)
    monkeypatch.setattr(work, "energies_of", lambda chain, batches, *_: f"energies of {batches}")
    nothing: Any = None
    rows: Any = Rows([4, 5, 6, 7])
    given = work.Work(nothing, "chain", {}, torch.float16, rows, nothing)  # type: ignore[arg-type]
    given.layerwise(method, QuantizeConfig(gptq_damp=0.37, gptq_samples=3), Engine())
    ((chain, grids, batches, named, options),) = seen
    assert (chain, grids, named) == ("chain", {}, method)
    assert batches == ([] if method == "rtn" else [4, 5, 6])
    energies = "energies of [4, 5, 6]" if method == "guided" else None
    assert options == {"damp": 0.37, "served": torch.float16, "strict": True, "energies": energies}
