# SPDX-License-Identifier: Apache-2.0
"""Layer-wise rounding of a whole chain: RTN, or GPTQ / greedy on the inputs that each layer really gets.

guided: GPTQ whose inputs count by how much their tokens matter to the model (`energies`): sum |g|^2 x x^T. After
GuidedQuant (arXiv 2505.07004), which has such sums for groups of outputs; here one serves a whole layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from discquant.config import Method
from discquant.grids import Grid
from discquant.rounding import gptq, greedy
from discquant.solver.calls import on_call
from discquant.solver.chain import Chain, Prepared, WeightRef
from discquant.solver.codes import NearestCodes, PackedCodes
from discquant.solver.counted import counted_rows
from discquant.solver.experts import RoutedInputs
from discquant.solver.measure import served_weights

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
GUIDED_DAMP = 0.2  # of the damping, measured on the bundled model


class _HessianHook:
    """Accumulate X^T X of a layer's input over counted positions; float64 sums of float32 products."""

    def __init__(self, model: nn.Module, name: str, strict: bool, energies: Tensor | None = None) -> None:
        """Start watching; `energies` has one for each row of all calls to come, in the order of the layer's output."""
        self.module, self.name = model.get_submodule(name), name
        self.strict = strict
        self._called = False
        self.hessian: Tensor | None = None
        self.mask: Tensor | None = None
        self.energies = energies
        self._seen = 0
        self._handle = on_call(model, name, self._see, paired=energies is not None)

    def _weighted(self, x: Tensor) -> Tensor:
        """Return the rows of an input, those that count in no loss too: they have no energy."""
        assert self.energies is not None
        rows = x.flatten(0, -2).float()
        energy = self.energies[self._seen : self._seen + len(rows)].to(rows.device)
        self._seen += len(rows)
        if self._seen > len(self.energies):
            self._refuse()
        return rows * energy.sqrt().unsqueeze(1)

    def _rows(self, x: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            if self.module.groups != 1:
                raise NotImplementedError(
                    "layerwise: GPTQ of a grouped convolution is not supported; use rtn"
                )
            unfolded = nn.functional.unfold(
                _padded(self.module, x), self.module.kernel_size, self.module.dilation, 0, self.module.stride
            )
            return unfolded.transpose(1, 2).flatten(0, 1)
        if not isinstance(self.module, nn.Linear):
            raise NotImplementedError(
                f"layerwise: GPTQ of {type(self.module).__name__} is not supported; use rtn"
            )
        return counted_rows(x, self.mask)

    def _see(self, x: Tensor, output: Tensor) -> None:
        self._called = True
        try:
            rows = self._weighted(x.detach()) if self.energies is not None else self._rows(x.detach()).float()
        except NotImplementedError:
            if self.strict or self.energies is not None:
                raise
            return
        product = rows.T @ rows
        self.hessian = product.double() if self.hessian is None else self.hessian.add_(product)

    def called(self, ref: WeightRef) -> bool:
        """Say whether the layer of a weight ever ran."""
        return self._called

    def gathered(self, ref: WeightRef) -> Tensor | None:
        """Return X^T X of a weight's inputs, None where no token came; it is let go: nobody else asks for it."""
        if self.energies is not None and self._called and self._seen != len(self.energies):
            self._refuse()
        hessian, self.hessian = self.hessian, None
        return hessian

    def _refuse(self) -> None:
        raise NotImplementedError(
            f"layerwise: {self.name} gets other rows once the layers before it are rounded, so that none knows its "
            "energy; use gptq"
        )

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()


def _padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what the kernel of a convolution really slides over: its input with its own kind of padding."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # Of torch: last dimension first, both sides of each; "same" is resolved there.
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)


def watch_inputs(
    chain: Chain, refs: Sequence[WeightRef], strict: bool, energies: Mapping[str, Tensor] | None = None
) -> dict[str, _HessianHook | RoutedInputs]:
    """Hook every layer of a block, by the name of its weight; the matrices of one experts module share a hook."""
    hooks: dict[str, _HessianHook | RoutedInputs] = {}
    routed: dict[str, RoutedInputs] = {}
    for ref in refs:
        if ref.part is None:
            hooks[ref.name] = _HessianHook(chain.model, ref.name, strict, (energies or {}).get(ref.name))
            continue
        owner = ref.part.owner
        if owner not in routed:
            members = [other for other in refs if other.part is not None and other.part.owner == owner]
            routed[owner] = RoutedInputs(chain.model.get_submodule(owner), members, hessians=True)
        hooks[ref.name] = routed[owner]
    return hooks


@torch.no_grad()
def layerwise_codes(
    chain: Chain,
    grids: Mapping[str, Grid],
    batches: Sequence[Prepared],
    method: Method,
    *,
    damp: float = 0.01,
    served: torch.dtype = torch.float32,
    strict: bool = True,
    unreached: set[str] | None = None,
    energies: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """Round block after block, each on the outputs of the rounded blocks before it.

    Args:
        chain: Model.
        grids: Grid of each weight by module name.
        batches: Calibration micro-batches.
        method: `rtn`, `gptq`, `guided` or `greedy`.
        damp: Hessian damping.
        served: Dtype to which served weights are rounded.
        strict: Refuse layer kinds whose inputs cannot be gathered; otherwise they are rounded to nearest.
        unreached: Gets the names of weights that gptq and greedy know no input of, and so round to nearest: experts
            that no token came to, layers that were never called (their module reads the weight past them).
        energies: Of `guided`: what `token_energies` gave on the same micro-batches; a layer without is rounded by GPTQ.
        progress: Called with (blocks done, blocks).

    Returns:
        Codes by module name, uint8, [out_features, in_features], on the CPU; held two per byte where they fit, those
        of rtn computed from the weights whenever they are asked for.

    Raises:
        NotImplementedError: A layer kind whose inputs cannot be gathered.
    """
    if method == "rtn":
        return NearestCodes(chain, grids)
    hidden = [batch.hidden for batch in batches]
    unseen = set[str]() if unreached is None else unreached
    codes = PackedCodes()
    past: list[str] = []

    def round_block(index: int, refs: Sequence[WeightRef]) -> None:
        """Round one block; what was gathered for it goes at the end, that of experts only then."""
        hooks = watch_inputs(chain, refs, strict, energies)
        try:
            with chain.opened(index):
                for h, batch in zip(hidden, batches, strict=True):
                    for hook in hooks.values():
                        hook.mask = batch.mask
                    chain.run_block(index, h, batch.calls[index])
        finally:
            for hook in hooks.values():
                hook.remove()
        for ref in refs:
            hessian, grid = hooks[ref.name].gathered(ref), grids[ref.name].to(chain.device)
            matrix = ref.matrix()
            if hessian is None:  # never reached by a token: nothing to learn from
                q = grid.nearest(matrix)
                if not hooks[ref.name].called(ref):
                    unseen.add(ref.name)
                    past.extend([ref.name] if ref.part is None else [])
            else:
                round_matrix = greedy if method == "greedy" else gptq
                # Weighted inputs are fewer in effect, but what is between them is less noise.
                share = GUIDED_DAMP if ref.name in (energies or {}) else 1.0
                q = round_matrix(matrix, hessian, grid, damp=damp * share)
            codes.put(ref.name, q.cpu(), grid.num_bits)
            del hessian, matrix, q

    for index, refs in enumerate(chain.weights):
        round_block(index, refs)
        weights = served_weights(chain, grids, codes, served, refs[0].parameter.dtype)(index) if refs else {}
        for place, batch in enumerate(batches):  # each micro-batch in place of the last
            hidden[place] = chain.run_block(index, hidden[place], batch.calls[index], weights)
        del weights
        if progress is not None:
            progress(index + 1, len(chain.weights))
    if past:
        logger.warning(
            "%s knows no input of %d layers, whose weights the model reads without calling them, and rounds them to "
            "nearest: %s, for one", method, len(past), past[0],
        )  # fmt: skip
    return codes
