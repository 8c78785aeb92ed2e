# SPDX-License-Identifier: Apache-2.0
"""What a run rounds: the original, the grids of its weights, and the text that chooses and that measures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from discquant.calibration import Windows
from discquant.config import Method, QuantizeConfig
from discquant.formats.source import Source
from discquant.grids import Grid
from discquant.solver.chain import Chain
from discquant.solver.energies import energies_of
from discquant.solver.engine import Engine
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.rows import TokenRows

Codes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """Everything that is known before the first weight is rounded; nothing of it changes.

    Attributes:
        source: The original model.
        chain: The same as a chain of blocks.
        grids: Grid of every weight, as it was laid.
        served: Dtype that engines dequantize to.
        rows: Calibration rows.
        held: Windows that calibration does not see.
    """

    source: Source
    chain: Chain
    grids: Mapping[str, Grid]
    served: torch.dtype
    rows: TokenRows
    held: Windows

    def layerwise(
        self, method: Method, config: QuantizeConfig, engine: Engine, *, strict: bool = True
    ) -> Codes:
        """Return the codes of RTN, GPTQ, guided GPTQ or greedy descent: see `layerwise_codes`."""
        count = 0 if method == "rtn" else min(config.gptq_samples, len(self.rows))
        batches, energies = self.rows.batches(range(count)), None
        if method == "guided":
            with contextlib.closing(engine.boundaries()) as boundaries, engine.reproducible():
                energies = energies_of(self.chain, batches, config, boundaries)
        return layerwise_codes(
            self.chain, self.grids, batches, method, damp=config.gptq_damp, served=self.served, strict=strict,
            energies=energies,
        )  # fmt: skip
