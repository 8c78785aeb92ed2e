# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors behind the interface of all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.errors import UserError
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer, Description, Format
from discquant.formats.compressed_tensors import Scheme, check_representable
from discquant.formats.export import export_compressed_tensors
from discquant.formats.load import read_layers
from discquant.grids import Grid


class CompressedTensors:
    """See `coded.Format`."""

    name = "compressed-tensors"

    def detects(self, path: Path) -> bool:
        """Whether config.json says so."""
        try:
            config = read_json(path / "config.json").get("quantization_config")
        except (OSError, UserError):
            return False
        return isinstance(config, dict) and config.get("quant_method") == self.name

    def describe(self, path: Path) -> Description:
        """What the folder holds."""
        raise NotImplementedError

    def read(self, path: Path) -> Iterator[CodedLayer]:
        """Every quantized layer."""
        yield from map(CodedLayer.of, read_layers(path))

    def check(self, shape: tuple[int, int], grid: GridConfig, name: str = "layer") -> None:
        """Refuse widths outside 2..8 and shorter last groups."""
        size = -1 if grid.group_size > shape[1] else grid.group_size
        check_representable(name, shape, Scheme(grid.bits, size, grid.sym))

    def check_grid(self, name: str, grid: Grid) -> None:
        """Refuse grids that are not uniform."""
        CodedLayer(name, torch.zeros(grid.scale.shape[0], 0, dtype=torch.uint8), grid)

    def write(
        self,
        source: Checkpoint,
        out: Path,
        layers: Iterable[CodedLayer],
        *,
        recipe: Mapping[str, Any] | None = None,
        ignore: Iterable[str] = ("lm_head",),
        prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> dict[str, Any]:
        """Write the model."""
        again = None if prove_from is None else (lambda: (layer.linear() for layer in prove_from()))
        return export_compressed_tensors(
            source.path,
            out,
            (layer.linear() for layer in layers),
            recipe=recipe,
            ignore=tuple(ignore),
            prove_from=again,
            shard_bytes=shard_bytes,
        )

    def rewrite(self, path: Path, out: Path, codes: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write the same file with other codes."""
        raise NotImplementedError


FORMAT: Format = CompressedTensors()
