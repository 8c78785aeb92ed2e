# SPDX-License-Identifier: Apache-2.0
"""Codes of a whole model by module name, held small: two per byte, or not at all but computed when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from discquant.grids import Grid
from discquant.ops import unpack_nibbles
from discquant.solver.chain import Chain
from discquant.solver.placement import Placement
from discquant.solver.state import WeightState, pack_nibbles

NIBBLE_BITS = 4
Found = TypeVar("Found")


class PackedCodes(Mapping[str, Tensor]):
    """Codes by module name; those of up to 4 bits lie two per byte and are unpacked when they are asked for."""

    def __init__(self) -> None:
        """Start empty."""
        self._held: dict[str, tuple[Tensor, int]] = {}  # codes as held, in_features

    def put(self, name: str, q: Tensor, num_bits: int) -> None:
        """Take the codes of a layer.

        Args:
            name: Module name.
            q: uint8, below 2^num_bits, [out_features, in_features].
            num_bits: Width of a code.
        """
        self._held[name] = (pack_nibbles(q) if num_bits <= NIBBLE_BITS and q.numel() else q, q.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.numel() for held, _ in self._held.values())

    def __getitem__(self, name: str) -> Tensor:
        """Return the codes of a layer, uint8, [out_features, in_features]."""
        held, columns = self._held[name]
        return held if held.shape[1] == columns else unpack_nibbles(held, columns)

    def __iter__(self) -> Iterator[str]:
        """Yield module names in the order they came."""
        return iter(self._held)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._held)


class NearestCodes(Mapping[str, Tensor]):
    """Codes of weights rounded to nearest by module name, computed whenever they are asked for."""

    def __init__(self, chain: Chain, grids: Mapping[str, Grid]) -> None:
        """Bind; the chain's weights must stay as they are."""
        self._chain, self._grids = chain, grids
        self._refs = {ref.name: ref for refs in chain.weights for ref in refs}

    def __getitem__(self, name: str) -> Tensor:
        """Return the codes of a layer, uint8, [out_features, in_features], on the CPU."""
        return self._grids[name].to(self._chain.device).nearest(self._refs[name].matrix()).cpu()

    def __iter__(self) -> Iterator[str]:
        """Yield module names in the model's order."""
        return iter(self._refs)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._refs)


class _OfStates(Mapping[str, Found]):
    """Something of every weight's state by module name, computed whenever it is asked for."""

    def __init__(self, placement: Placement) -> None:
        """Bind to the states of a solve, which must stay readable."""
        self._placement = placement
        self._places = {
            state.name: (index, place)
            for index, block in enumerate(placement.homes())
            for place, state in enumerate(block.states)
        }

    def _of(self, state: WeightState) -> Found:
        raise NotImplementedError

    def __getitem__(self, name: str) -> Found:
        """Return that of a layer, on the CPU."""
        index, place = self._places[name]
        found = self._of(self._placement.home(index).states[place])
        self._placement.release(index)
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield module names in the model's order."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._places)


class StateCodes(_OfStates[Tensor]):
    """Codes q_down + round(frac) of a solve, uint8, [out_features, in_features]."""

    def _of(self, state: WeightState) -> Tensor:
        return state.codes().cpu()


class StateGrids(_OfStates[Grid]):
    """Grids that the codes of a solve are served on: scales where they have moved to, on memory of their own."""

    def _of(self, state: WeightState) -> Grid:
        return state.student_grid.to(torch.device("cpu")).copied()
