# SPDX-License-Identifier: Apache-2.0
"""Options of a run arrive where they are used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from discquant.config import QuantizeConfig
from discquant.run import pipeline


@pytest.mark.parametrize("method", ["gptq", "greedy", "rtn"])
def test_layerwise_codes_get_the_damping_and_the_windows(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many windows as GPTQ is to have; nearest codes need none."""
    seen: list[tuple[Any, ...]] = []

    def watched(*given: Any, **named: Any) -> None:
        seen.append((*given, named))

    class Rows(list[int]):
        def batches(self, rows: range) -> list[int]:
            return [self[place] for place in rows]

    monkeypatch.setattr(pipeline, "layerwise_codes", watched)
    run = SimpleNamespace(
        config=QuantizeConfig(gptq_damp=0.37, gptq_samples=3), _served=lambda source: torch.float16
    )
    pipeline.Pipeline._layerwise(run, "chain", {}, Rows([4, 5, 6, 7]), method, None)  # type: ignore[arg-type]
    ((chain, grids, batches, named, options),) = seen
    assert (chain, grids, named) == ("chain", {}, method)
    assert batches == ([] if method == "rtn" else [4, 5, 6])
    assert options == {"damp": 0.37, "served": torch.float16, "strict": True, "energies": None}
