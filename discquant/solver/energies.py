# SPDX-License-Identifier: Apache-2.0
"""How much each token matters to each layer: the energy of the gradient that its output receives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from discquant.config import QuantizeConfig
from discquant.solver.boundaries import Boundaries
from discquant.solver.calls import See, on_call
from discquant.solver.chain import Chain, Prepared
from discquant.solver.curvature import rows_at_once
from discquant.solver.sampled import backward_blocks, label_generator, wide


def token_energies(
    chain: Chain,
    batches: Sequence[Prepared],
    *,
    at_once: int,
    generator: torch.Generator,
    boundaries: Boundaries | None = None,
) -> dict[str, Tensor]:
    """Return |g|^2 of every row that a linear layer gives, g = d(-log p(sampled label)) / dy, with mean 1.

    Args:
        chain: The model.
        batches: Micro-batches.
        at_once: Micro-batches that are taken through the model together; their block inputs exist at once.
        generator: Draws the labels (`label_generator` of the chain's device).
        boundaries: Where block inputs are kept meanwhile.

    Returns:
        float32, [rows of all micro-batches], on the CPU, by module name; rows in the order of the forward passes.
        Convolutions and experts have none, nor has a layer that no gradient reaches.
    """
    found: dict[str, list[Tensor]] = {}
    for begin in range(0, len(batches), at_once):
        part = batches[begin : begin + at_once]
        for index, run in backward_blocks(chain, part, generator=generator, boundaries=boundaries):
            handles = []
            for ref in chain.weights[index]:
                if ref.part is None and isinstance(chain.model.get_submodule(ref.name), nn.Linear):
                    see = _keeper(found.setdefault(ref.name, []))
                    handles.append(on_call(chain.model, ref.name, see, paired=True))
            try:
                run()
            finally:
                for handle in handles:
                    handle.remove()
    joined = {name: torch.cat(rows) for name, rows in found.items() if rows}
    return {name: rows / rows.mean() for name, rows in joined.items() if bool(rows.any())}


def energies_of(
    chain: Chain, batches: Sequence[Prepared], config: QuantizeConfig, boundaries: Boundaries | None = None
) -> dict[str, Tensor]:
    """Return `token_energies` as a run of these options takes them: as many windows at once as for the curvature."""
    rows = rows_at_once(config.gptq_samples, config.solver.batch_size)
    return token_energies(
        chain,
        batches,
        at_once=max(1, rows // config.solver.micro_batch),
        generator=label_generator(chain.device, config.seed + 37),
        boundaries=boundaries,
    )


def _keeper(rows: list[Tensor]) -> See:
    """Return what keeps a layer's energies, each call's in the place of its forward pass."""

    def see(x: Tensor, output: Tensor) -> None:
        place = len(rows)
        rows.append(torch.zeros(output.shape[:-1].numel()))  # of a call that no gradient reaches

        def keep(grad: Tensor) -> None:
            rows[place] = wide(grad.detach().flatten(0, -2)).square().sum(dim=1).float().cpu()

        output.register_hook(keep)

    return see
