# SPDX-License-Identifier: Apache-2.0
"""What every format reads and writes: codes of one layer with the grid of its file, and the facts `inspect` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.errors import UnrepresentableError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.codes import QuantizedLinear
from discquant.grids import Grid, UniformGrid

DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """Codes of one linear layer on the grid of its file.

    Attributes:
        name: Module path as transformers names it, without `.weight`.
        q: Codes, uint8, [out_features, in_features], in the rows and columns of the original weight whatever the file
            does with them.
        grid: The file's grid; its `dequantize` computes what the format's engine computes.

    Raises:
        TypeError: q is not a Tensor, or grid is no Grid.
        ValueError: q is not a uint8 matrix; the message names the module.
    """

    name: str
    q: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.q, Tensor):
            raise TypeError(f"{self.name}: q must be a Tensor, got {type(self.q).__name__}")
        if not isinstance(self.grid, Grid):
            raise TypeError(f"{self.name}: grid must be a Grid, got {type(self.grid).__name__}")
        if self.q.dtype != torch.uint8 or self.q.dim() != 2:
            raise ValueError(
                f"{self.name}: q must be uint8 of 2 dimensions, got {self.q.dtype} of shape {list(self.q.shape)}"
            )

    @classmethod
    def of(cls, layer: QuantizedLinear) -> CodedLayer:
        """The same layer, its scale and zero point as a uniform grid."""
        grid = UniformGrid(layer.num_bits, layer.group_size, layer.symmetric, layer.scale, layer.zero_point)
        return cls(layer.name, layer.q, grid)

    def linear(self, format_name: str = "this format") -> QuantizedLinear:
        """The same layer for a format of uniform grids, which the message names.

        Raises:
            UnrepresentableError: The grid is not uniform, or its groups are not contiguous (act-order).
        """
        grid = self.grid
        if not isinstance(grid, UniformGrid):
            raise UnrepresentableError(
                f"{format_name}: {self.name}: only uniform grids have a place here, got {type(grid).__name__}"
            )
        if grid.g_idx is not None:
            raise UnrepresentableError(
                f"{format_name}: {self.name}: its groups are not contiguous columns (act-order)"
            )
        return QuantizedLinear(self.name, self.q, grid.scale, grid.zero_point, grid.num_bits, grid.group_size)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The served weight, rounded once to `dtype`, [out_features, in_features]."""
        return self.grid.dequantize(self.q, dtype)


@dataclass(frozen=True)
class LayerFacts:
    """One row of `inspect`, known from headers and configuration alone.

    Attributes:
        name: Module path as transformers names it.
        shape: (out_features, in_features).
        kind: What the codes are, e.g. `int4`, `nvfp4`, `Q4_K`.
        num_bits: Width of a code.
        group_size: Columns per scale; -1 is the whole row.
        symmetric: Whether zero is the same code everywhere by definition.
        stored_bytes: Everything the file keeps for this layer's weight.
        weight_bits: Those of it that count per weight, see `formats.bits`.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    num_bits: int
    group_size: int
    symmetric: bool
    stored_bytes: int
    weight_bits: int


@dataclass(frozen=True)
class Description:
    """What a file is.

    Attributes:
        format: Name in the registry.
        layers: Its quantized layers in file order.
        untouched_bytes: Bytes of all other tensors.
        file_bytes: Bytes of all weight files.
        notes: What a user should know, one sentence each (act-order, an old layout, ...).
        problems: What contradicts itself or would break in engines, one sentence each.
        plain: Matrices without codes, by their modules, where engines join some with others.
    """

    format: str
    layers: tuple[LayerFacts, ...]
    untouched_bytes: int
    file_bytes: int
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


class Format(Protocol):
    """One checkpoint format. Paths are folders, or single files where the format is one file."""

    name: str

    def detects(self, path: Path) -> bool:
        """Whether `path` is of this format; cheap, and False (never an error) for anything else."""
        ...

    def describe(self, path: Path) -> Description:
        """What the file is, from headers and configuration.

        Raises:
            CheckpointError, MissingModelError, NotImplementedError: It cannot be read.
        """
        ...

    def read(self, path: Path) -> Iterator[CodedLayer]:
        """Every quantized layer, one at a time, in file order.

        Raises:
            CheckpointError, MissingModelError: The file is damaged.
            NotImplementedError: It uses a part of the format that is not read.
            UnrepresentableError: Its grid is one that discquant has no codes for.
        """
        ...

    def check(self, shape: tuple[int, int], grid: GridConfig, name: str = "layer") -> None:
        """Refuse before any work what `write` could not hold.

        Args:
            shape: (out_features, in_features).
            grid: Which grid the weight will be put on.
            name: Module path, for the message.

        Raises:
            UnrepresentableError: The format has no place for this grid or shape.
        """
        ...

    def check_grid(self, name: str, grid: Grid) -> None:
        """Refuse, once grids are laid and before any rounding, a grid whose scales or zero points have no place.

        Raises:
            UnrepresentableError: The message names the module and what would fit.
        """
        ...

    def check_source(self, source: Checkpoint) -> list[str]:
        """Refuse before any work a model whose architecture or tokenizer has no place; return warnings.

        Raises:
            UnrepresentableError, CheckpointError: The message says what is in the way.
        """
        ...

    def stored_wider(self, bits: int, symmetric: bool = True, group_size: int = -1) -> str:
        """Say so if codes of this width on a uniform grid take the room of wider ones; else empty.

        Args:
            bits: Of a code.
            symmetric: The grid has no zero points.
            group_size: Columns per scale, -1 for whole rows.
        """
        ...

    def space(self, source: Checkpoint, schemes: Mapping[str, Any]) -> int:
        """Bytes of disk that `write` takes at most, what it joins the result from included.

        Args:
            source: The original.
            schemes: `formats.scheme.Scheme` of every module that will be quantized.
        """
        ...

    def write(
        self,
        source: Checkpoint,
        out: Path,
        layers: Iterable[CodedLayer],
        *,
        recipe: Mapping[str, Any] | None = None,
        prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> dict[str, Any]:
        """Write the model: `layers` replace their weights, everything else is taken over byte for byte.

        Streamed, one layer in memory at a time; `out` appears under its name only when it is complete and, with
        prove_from (the layers a second time), proven by a decoder that shares no code with the packer.

        Returns:
            The manifest, which also lies beside the model.

        Raises:
            UnrepresentableError: A layer fits neither the source nor the format.
            OutputExistsError, DiskSpaceError, ProofError, CheckpointError: See `formats.export`.
        """
        ...

    def rewrite(
        self,
        path: Path,
        out: Path,
        codes: Mapping[str, Tensor],
        *,
        finish: Callable[[Path], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Write a folder with the same files but other codes, by module path, uint8, [out_features, in_features].

        Only code bytes change; the returned manifest holds the byte diff that proves it. `finish` gets the folder
        before it appears under its name, may complete it (`formats.refined`), and gives the manifest then.

        Raises:
            UnrepresentableError: A name is no quantized layer of the file, or a code or shape does not fit.
            OutputExistsError, ProofError, CheckpointError: As for `write`.
        """
        ...
