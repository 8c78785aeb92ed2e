# SPDX-License-Identifier: Apache-2.0
"""How much each token matters to each layer: the energy of the gradient that its output receives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from discquant.config import QuantizeConfig
from discquant.solver.boundaries import Boundaries
from discquant.solver.calls import on_call
from discquant.solver.chain import Chain, Prepared
from discquant.solver.curvature import rows_at_once
from discquant.solver.memory import HostArena
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
        Convolutions and experts have none, nor has a layer that no gradient reaches. Of a language model every call
        must have a row for each token: a router may send other tokens once the blocks before are rounded.
    """
    # Of a language model every token is a row.
    tokens = [] if chain.head is None else [batch.inputs.numel() for batch in batches]
    linear = [
        ref.name
        for refs in chain.weights
        for ref in refs
        if ref.part is None and isinstance(chain.model.get_submodule(ref.name), nn.Linear)
    ]
    found = {name: _Rows(tokens) for name in linear}
    for begin in range(0, len(batches), at_once):
        part = batches[begin : begin + at_once]
        for index, run in backward_blocks(chain, part, generator=generator, boundaries=boundaries):
            handles = [
                on_call(chain.model, ref.name, found[ref.name].see, paired=True)
                for ref in chain.weights[index]
                if ref.name in found
            ]
            try:
                run()
            finally:
                for handle in handles:
                    handle.remove()
    energies = {name: rows.values[: rows.used] for name, rows in found.items() if rows.whole}
    return {name: rows.div_(rows.mean()) for name, rows in energies.items() if bool(rows.any())}


class _Rows:
    """The energies of one layer, those of each call in the place of its forward pass.

    In memory of their own, of which pages exist that are written: what is small and stays would keep the C library's
    heap from giving back what is large and goes, and of a layer that is never called, or of an expert, there is none.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        """Give room for a row of every token; more is made where there are more.

        Args:
            tokens: Of each micro-batch; empty where rows are no tokens.
        """
        self.values, self.used = HostArena(4 * sum(tokens), pin=False).tensor.view(torch.float32), 0
        self.calls: list[int] = []
        self._tokens = list(tokens)
        self._lost = False

    @property
    def whole(self) -> bool:
        """Whether every call had a row for each token, as often in every micro-batch."""
        if not self._tokens:
            return True
        times = len(self.calls) // len(self._tokens)
        return self.calls == [tokens for tokens in self._tokens for _ in range(times)]

    def see(self, x: Tensor, output: Tensor) -> None:
        """Keep the energies of the gradient that this output will get; zeros where none comes."""
        self.calls.append(output.shape[:-1].numel())
        self._lost = self._lost or (bool(self._tokens) and self.calls[-1] not in self._tokens)
        if self._lost:  # an expert's: nobody will ask for them
            self.values, self.used = torch.zeros(0), 0
            return
        begin, self.used = self.used, self.used + self.calls[-1]
        if self.used > len(self.values):
            self.values = torch.cat((self.values, torch.zeros(self.used - len(self.values))))
        end = self.used

        def keep(grad: Tensor) -> None:
            if self._lost:
                return
            self.values[begin:end] = wide(grad.detach().flatten(0, -2)).square().sum(dim=1)

        if output.requires_grad:
            output.register_hook(keep)


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
