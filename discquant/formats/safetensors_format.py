# SPDX-License-Identifier: Apache-2.0
"""What all formats of safetensors files share: reading layer by layer, writing, rewriting codes.

A format adds its `Layout`. Everything a file claims is checked
against the lengths in its headers before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.config import GridConfig
from discquant.errors import CheckpointError, UnrepresentableError, UserError
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.coded import DEFAULT_SHARD_BYTES, CodedLayer, Description, Format, LayerFacts
from discquant.formats.layout import Layout, StoredLayer
from discquant.formats.rewrite import Finish, rewrite_model
from discquant.formats.safetensors_file import TensorInfo
from discquant.formats.scheme import Scheme
from discquant.formats.write import write_model
from discquant.grids import Grid


class SafetensorsFormat(Layout):
    """A format whose files are `*.safetensors` beside a config.json; see `coded.Format`."""

    def detects(self, path: Path) -> bool:
        """See `coded.Format`."""
        try:
            return self.claims(read_json(path / "config.json"))
        except (OSError, UserError):
            return False

    def describe(self, path: Path) -> Description:
        """See `coded.Format`."""
        checkpoint = Checkpoint(path)
        rows, used, layers = [], 0, list(self.layers(checkpoint))
        for stored in layers:
            scheme = stored.scheme
            rows.append(
                LayerFacts(
                    stored.name,
                    stored.shape,
                    scheme.label,
                    scheme.num_bits,
                    scheme.group_size,
                    scheme.symmetric,
                    stored.stored_bytes,
                    8 * sum(row.num_bytes for key, row in stored.tensors.items() if key not in self.aside),
                )
            )
            used += stored.stored_bytes
        total = sum(info.num_bytes for info in checkpoint.tensors.values())
        files = {info.file for info in checkpoint.tensors.values()}
        size = sum(file.stat().st_size for file in files)
        problems = list(self.problems(checkpoint))
        if not rows:
            problems.insert(0, f"the configuration says {self.name}, but no layer is quantized")
        plain = tuple(
            key.removesuffix(".weight")
            for key in self.plain(checkpoint, layers)
            if key.endswith(".weight") and len(checkpoint.tensors[key].shape) == 2
        )
        notes = tuple(self.notes(checkpoint))
        return Description(self.name, tuple(rows), total - used, size, notes, tuple(problems), plain)

    def notes(self, checkpoint: Checkpoint) -> Iterator[str]:
        """What a user should know about a file, from headers and configuration."""
        more = self.beyond_weights(checkpoint)
        if more:
            yield weights_only(more)

    def beyond_weights(self, checkpoint: Checkpoint) -> str:
        """What a file quantizes besides weights, in a few words, "" where nothing; kept, but not computed here."""
        return ""

    def passive(self, checkpoint: Checkpoint, coded: Collection[str]) -> set[str]:
        """Tensors of a file that belong to `beyond_weights`; `coded` are the modules with codes."""
        return set()

    def plain(self, checkpoint: Checkpoint, layers: Iterable[StoredLayer]) -> list[str]:
        """Names of a file's tensors that are weights without codes: norms, embeddings, biases, in file order."""
        coded = {stored.name: stored for stored in layers}
        used = {f"{name}.{suffix}" for name, stored in coded.items() for suffix in stored.tensors}
        used |= self.passive(checkpoint, coded)
        return [name for name in checkpoint.tensors if name not in used]

    def problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """What contradicts itself in a file or would break in engines, as far as schemes alone do not show it."""
        return iter(())

    def read(self, path: Path) -> Iterator[CodedLayer]:
        """See `coded.Format`."""
        for stored in self.layers(Checkpoint(path)):
            yield self.decoded(stored)

    def decoded(self, stored: StoredLayer) -> CodedLayer:
        """`decode`, with every objection of the grid told as damage of the file.

        Raises:
            CheckpointError: The tensors hold no grid (NaN scales, say).
        """
        try:
            return self.decode(stored)
        except (UserError, NotImplementedError):
            raise
        except ValueError as cause:
            raise CheckpointError(f"{stored.name}: {cause}") from cause

    def check(self, shape: tuple[int, int], grid: GridConfig, name: str = "layer") -> None:
        """See `coded.Format`."""
        self.check_scheme(name, shape, Scheme.planned(shape, grid))

    def check_grid(self, name: str, grid: Grid, served: torch.dtype = torch.bfloat16) -> None:
        """See `coded.Format`: encodes the grid with no codes in it; `served` as for `encode`."""
        rows, groups = grid.scale.shape
        columns = groups * grid.group_size if grid.group_size > 0 else 32
        # The smallest matrix that has this grid's scales: codes are all zero, which is cheap to pack.
        self.encode(CodedLayer(name, torch.zeros(rows, columns, dtype=torch.uint8), grid), served)

    def check_source(self, source: Checkpoint) -> list[str]:
        """See `coded.Format`: any model has a place here."""
        return []

    def stored_wider(self, bits: int, symmetric: bool = True, group_size: int = -1) -> str:
        """See `coded.Format`; what engines make of a width is among the warnings of the plan."""
        return ""

    def space(self, source: Checkpoint, schemes: Mapping[str, Scheme]) -> int:
        """See `coded.Format`: the original and one shard's spool; `export.plan_export` is exact."""
        total = sum(info.num_bytes for info in source.tensors.values())
        return total + min(total, DEFAULT_SHARD_BYTES)

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
        """See `coded.Format`."""
        return write_model(
            self,
            source,
            out,
            layers,
            recipe=recipe,
            prove_from=prove_from,
            shard_bytes=shard_bytes,
        )

    def rewrite(
        self, path: Path, out: Path, codes: Mapping[str, Tensor], *, finish: Finish | None = None
    ) -> dict[str, Any]:
        """See `coded.Format`."""
        return rewrite_model(self, path, out, codes, finish)


def beyond_weights(chosen: Format, path: Path) -> str:
    """What a quantized model quantizes besides weights, see `SafetensorsFormat.beyond_weights`."""
    return chosen.beyond_weights(Checkpoint(path)) if isinstance(chosen, SafetensorsFormat) else ""


def weights_only(more: str) -> str:
    """The sentence for a file that quantizes more than weights."""
    return (
        f"activations are quantized too ({more}); they stay in full precision here, only weights are decoded"
    )


def inert(name: str, read: Callable[[], Tensor]) -> bool:
    """Whether a tensor changes nothing in a model that lacks it: tools write biases of zeros, and rotary tables."""
    return name.endswith("rotary_emb.inv_freq") or (name.endswith(".bias") and not bool(read().any()))


def grouped(
    checkpoint: Checkpoint, marker: str, suffixes: Iterable[str]
) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Modules that have a tensor `marker`, in file order, with those of `suffixes` that exist."""
    wanted = tuple(suffixes)
    for key in checkpoint.tensors:
        name, _, suffix = key.rpartition(".")
        if suffix == marker and name:
            found = {
                other: checkpoint.tensors[f"{name}.{other}"]
                for other in wanted
                if f"{name}.{other}" in checkpoint.tensors
            }
            yield name, found


def expect(
    name: str, tensors: Mapping[str, TensorInfo], suffix: str, dtypes: str, shape: tuple[int, ...]
) -> None:
    """Hold a tensor's header to what the layer needs.

    Args:
        name: Module path, for the message.
        tensors: Its tensors by suffix.
        suffix: Which one.
        dtypes: Allowed dtypes as safetensors spells them, separated by blanks.
        shape: What it must have.

    Raises:
        CheckpointError: It is missing or different.
    """
    info = tensors.get(suffix)
    if info is None:
        raise CheckpointError(f"{name}.{suffix} is missing from the checkpoint")
    if info.dtype not in dtypes.split():
        raise CheckpointError(
            f"{name}.{suffix} must have dtype {' or '.join(dtypes.split())}, got {info.dtype}"
        )
    if info.shape != shape:
        raise CheckpointError(f"{name}.{suffix} must have shape {list(shape)}, got {list(info.shape)}")


def expect_matrix(name: str, tensors: Mapping[str, TensorInfo], suffix: str, dtypes: str) -> tuple[int, int]:
    """Shape of a tensor that must be a matrix with at least one element.

    Raises:
        CheckpointError: It is missing, of another dtype, or no such matrix.
    """
    info = tensors.get(suffix)
    expect(name, tensors, suffix, dtypes, () if info is None else info.shape)
    assert info is not None
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(f"{name}.{suffix} must be a matrix, got shape {list(info.shape)}")
    return info.shape[0], info.shape[1]


def integer(table: Mapping[str, Any], key: str, where: str, low: int, high: int) -> int:
    """A whole number of a configuration.

    Raises:
        CheckpointError: It is missing, no whole number, or outside [low, high].
    """
    value = table.get(key)
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{where}: {key} must be a whole number from {low} to {high}, got {value!r}")
    return value


def exact(name: str, what: str, values: Tensor, dtype: torch.dtype, format_name: str) -> Tensor:
    """`values` in the dtype that a format stores, without loss.

    Raises:
        UnrepresentableError: A value is no number of that dtype.
    """
    stored = values.to(dtype)
    if not torch.equal(stored.double(), values.double()):
        raise UnrepresentableError(
            f"{format_name}: {name}: {what} must be exact in {dtype}; choose representable {what}s before rounding"
        )
    return stored.contiguous()


def uniform(layer: CodedLayer, format_name: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point (uint8, filled in where symmetric) of a layer whose format holds uniform grids.

    Raises:
        UnrepresentableError: Its grid is another, or its groups are not contiguous.
    """
    linear = layer.linear(format_name)
    zero = linear.zero_point
    if zero is None:
        zero = torch.full(linear.scale.shape, 1 << (linear.num_bits - 1), dtype=torch.uint8)
    return linear.scale, zero.to(torch.uint8)
