# SPDX-License-Identifier: Apache-2.0
"""A model directory, read shard by shard without loading it: headers are validated on opening, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, MissingModelError, NonFiniteError, UnrepresentableError
from discquant.formats.safetensors_file import TensorInfo, read_bytes, read_header, read_tensor

INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 100_000_000  # a tokenizer's or an index's largest is a few tens of MB
RUN_MARKER = "discquant_run"  # key that config.json of a run directory has
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint:
    """The weights of one model directory, sharded or not.

    Attributes:
        path: The directory.
        tensors: Every tensor by name, in the order of shards and of their data.

    Raises:
        MissingModelError: There is no such directory, or it holds no weights, or a shard of the index is missing.
        CheckpointError: The weights are pickled, or a file is truncated or corrupt, or the index contradicts it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise MissingModelError(f"{self.path} is no model: there is no such directory")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._shards():
            for name, info in read_header(file)[0].items():
                if name in self.tensors:
                    raise CheckpointError(f"{file}: {name} is also in {self.tensors[name].file.name}")
                self.tensors[name] = info
        self._check_index()

    def _shards(self) -> list[Path]:
        index = self.path / INDEX
        if index.exists():
            names = sorted(set(self._weight_map().values()))
            # An index is data from elsewhere: it must not lead out of the directory.
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors") or len(name) > 200:
                    raise CheckpointError(
                        f"{index}: {name!r} is no name of a safetensors file in this directory"
                    )
                if not (self.path / name).exists():
                    raise MissingModelError(
                        f"{self.path} is incomplete: {name}, which {INDEX} names, is missing"
                    )
            return [self.path / name for name in names]
        single = self.path / "model.safetensors"
        files = [single] if single.exists() else sorted(self.path.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(file.name for pattern in PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.path}: {pickles[0]} is a pickle, which can run code when read; only safetensors are read: "
                "convert it on a machine you trust with save_pretrained()"
            )
        raise MissingModelError(f"{self.path} is no model: it holds no *.safetensors")

    def _weight_map(self) -> dict[str, str]:
        table = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(table, dict) or not table or not all(type(file) is str for file in table.values()):
            raise CheckpointError(f"{self.path / INDEX}: weight_map must be a non-empty object of file names")
        return table

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for name, file in self._weight_map().items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{self.path / INDEX}: {name} is not in {file}")

    def config(self) -> dict[str, Any]:
        """The parsed config.json.

        Raises:
            MissingModelError: There is none.
            CheckpointError: It is no JSON object.
        """
        if not (self.path / "config.json").exists():
            raise MissingModelError(f"{self.path} is no model: it has no config.json")
        return read_json(self.path / "config.json")

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor in memory of its own, or one entry of its first dimension.

        Raises:
            KeyError: There is no such tensor.
        """
        info = self.tensors[name]
        return read_tensor(info if index is None else info.entry(index))

    def iterate(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one at a time, in the order they lie on disk."""
        for name, info in self.tensors.items():
            yield name, read_tensor(info)

    def sha256(self) -> str:
        """Hash of names, dtypes, shapes and bytes of all tensors; the same however they are sharded or ordered."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
            for piece in read_bytes(info):
                digest.update(piece)
        return digest.hexdigest()

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read floating tensors one by one and stop at the first NaN or infinity.

        Raises:
            NonFiniteError: The message names the tensor, the count and the first place.
        """
        for name in self.tensors if names is None else names:
            check_finite(name, self.read(name))


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or an infinity.

    Raises:
        NonFiniteError: The message names the tensor, the count and the first place.
    """
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:
        tensor = tensor.float()
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count:
        place = torch.nonzero(bad)[0].tolist()
        raise NonFiniteError(f"{name} holds {count} values that are NaN or infinite, the first at {place}")


def stated_quantization(config: Mapping[str, Any]) -> Any:
    """What a config.json says of its quantization: its own entry, else that of a composite model's text model."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    return config.get("quantization_config") or inner


def check_unquantized(source: Checkpoint) -> None:
    """Refuse an original that holds codes already.

    Raises:
        UnrepresentableError: Its configuration says so.
    """
    if stated_quantization(source.config()):
        raise UnrepresentableError(
            f"{source.path} is quantized already: export starts from the original model"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{file}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, got {type(value).__name__}")
    return value
