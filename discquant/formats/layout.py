# SPDX-License-Identifier: Apache-2.0
"""What a format of safetensors files says about itself: how its tensors hold one layer, and its configuration.

Writing, rewriting and proof need no more of a format than this; `safetensors_format` adds them to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.safetensors_file import TensorInfo, read_tensor
from discquant.formats.scheme import Scheme


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer as a file holds it; `tensors` by suffix, `zero_offset` what stored zero points lack."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    tensors: Mapping[str, TensorInfo]
    zero_offset: int = 0

    def read(self, suffix: str) -> Tensor:
        """One of its tensors.

        Raises:
            CheckpointError: It is missing, or of a dtype that no file of this kind has.
        """
        if suffix not in self.tensors:
            raise CheckpointError(f"{self.name}.{suffix} is missing from the checkpoint")
        return read_tensor(self.tensors[suffix])

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


class Layout(ABC):
    """How one format's files look, `*.safetensors` beside a config.json."""

    name: str
    codes: str  # suffix of the tensor that holds the codes, and nothing else
    # Suffixes of tensors that a matrix or column has once: no part of bits per weight.
    aside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = {"format": "pt"}  # of every written file

    @abstractmethod
    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this format."""

    @abstractmethod
    def layers(self, checkpoint: Checkpoint) -> Iterator[StoredLayer]:
        """The quantized layers, checked by shapes and dtypes, their weights unread.

        Raises:
            CheckpointError, NotImplementedError: As `coded.Format.read`.
        """

    @abstractmethod
    def decode(self, stored: StoredLayer) -> CodedLayer:
        """Codes and grid of a layer."""

    @abstractmethod
    def repack(self, stored: StoredLayer, q: Tensor) -> Tensor:
        """The tensor `codes` of a layer with other codes, in the layout that the file has."""

    @abstractmethod
    def check_scheme(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Refuse a layout that the format cannot hold."""

    @abstractmethod
    def encode(self, layer: CodedLayer, served: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a layer by suffix; `served` is the dtype of the weight they replace."""

    @abstractmethod
    def encoded_bytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """Bytes that `encode` will need."""

    @abstractmethod
    def configure(
        self, config: dict[str, Any], schemes: Mapping[str, Scheme], ignored: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """Tell engines: edit config.json in place; return further JSON files by name.

        Args:
            config: config.json of the original.
            schemes: Scheme of every quantized module.
            ignored: Full names of matrices that stay as they are, see `write.unquantized`.

        Raises:
            UnrepresentableError: The format cannot state these layers together, or its engine cannot load them.
        """

    def requires(self, schemes: Mapping[str, Scheme]) -> dict[str, str | None]:
        """Least versions of libraries that read what is written, for the manifest."""
        return {}
