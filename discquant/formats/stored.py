# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint holds the parameters of a model, and what reads them one by one.

`transformers` renames some and joins the matrices of experts. Its own conversion, which `save_pretrained` takes back,
tells where each went; no layout is written down here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from discquant.formats.checkpoint import Checkpoint

_FUSED = ("gate_up_proj", "up_proj", "down_proj")


class Part(NamedTuple):
    """Where a matrix lies in a fused parameter: rows `begin` to `end` of expert `expert`.

    `owner` is the module that holds the parameter; `transposed` says that it stores [in_features, out_features].
    """

    owner: str
    expert: int
    begin: int
    end: int
    transposed: bool


def fused_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (module name, module, parameter name, parameter) of every fused expert weight below `root`."""
    for name, module in root.named_modules():
        for key in _FUSED:
            parameter = module._parameters.get(key)
            if parameter is not None and parameter.dim() == 3:
                yield name, module, key, parameter


def checkpoint_parts(model: nn.Module, name: str, shape: torch.Size, transposed: bool) -> dict[str, Part]:
    """Return where each checkpoint tensor of a fused parameter lies in it, by the checkpoint's name.

    The library's reverse conversion is applied to numbered rows: what comes out as one tensor names its rows.
    A checkpoint that holds the parameter fused as well gives one matrix per expert, under `<name>.<expert>`.

    Args:
        model: Knows how its checkpoint is laid out.
        name: Of the parameter in the model.
        shape: Of the parameter, [experts, rows, columns].
        transposed: It holds [in_features, out_features] per expert.
    """
    owner = name.rpartition(".")[0]
    experts, rows = shape[0], shape[2] if transposed else shape[1]
    key = name.rpartition(".")[2]
    fused = {f"{owner}.{e}.{key}": Part(owner, e, 0, rows, transposed) for e in range(experts)}
    if transposed or not hasattr(model, "config"):
        return fused
    from transformers.core_model_loading import revert_weight_conversion

    numbers = torch.arange(experts * rows).view(experts, rows, 1)
    found: dict[str, Part] = {}
    for stored, tensor in revert_weight_conversion(model, {name: numbers}).items():
        flat = tensor.flatten()
        begin, count = int(flat[0]), flat.numel()
        whole = count > rows or not stored.endswith(".weight")
        if whole or not torch.equal(flat, torch.arange(begin, begin + count)):
            return fused
        at = begin % rows
        found[stored.removesuffix(".weight")] = Part(owner, begin // rows, at, at + count, False)
    return found


def stored_name(model: Any, name: str, shape: torch.Size) -> str | None:
    """Return the checkpoint's name of a parameter that is stored as it is; None where it is converted."""
    from transformers.core_model_loading import revert_weight_conversion

    stand_in = torch.empty(shape, device="meta")
    (stored, tensor), *more = revert_weight_conversion(model, {name: stand_in}).items()
    return stored if tensor is stand_in and not more else None


def stored_names(model: Any, shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    """Return `stored_name` of many parameters, of those that are stored as they are; the mapping is made once."""
    from transformers.core_model_loading import revert_weight_conversion

    stand_ins = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    stored = revert_weight_conversion(model, dict(stand_ins)) if stand_ins else {}
    return {names[id(tensor)]: name for name, tensor in stored.items() if id(tensor) in names}


class Reader(Protocol):
    """What reads a parameter: whole, or one expert's matrix of it."""

    def __call__(self) -> Tensor:
        """Read the parameter in its own shape."""

    def matrix(self, part: Part) -> Tensor:
        """Read one expert's [out_features, in_features]."""


class _Whole:
    """Reads a parameter that a checkpoint holds as it is."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
        self._checkpoint, self._name, self._dtype = checkpoint, name, dtype

    def __call__(self) -> Tensor:
        return self._checkpoint.read(self._name).to(self._dtype)

    def matrix(self, part: Part) -> Tensor:
        """Read one expert's [out_features, in_features]; no other is read."""
        found = self._checkpoint.read(self._name, part.expert).to(self._dtype)
        return (found.T if part.transposed else found)[part.begin : part.end].contiguous()


class _Joined:
    """Reads a fused parameter of a checkpoint that holds its parts apart."""

    def __init__(
        self, checkpoint: Checkpoint, parts: Mapping[str, Part], shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self._checkpoint, self._parts, self._shape, self._dtype = checkpoint, dict(parts), shape, dtype
        self._names = {part: name for name, part in parts.items()}

    def __call__(self) -> Tensor:
        whole = torch.empty(self._shape, dtype=self._dtype)
        for name, part in self._parts.items():
            whole[part.expert, part.begin : part.end] = self._checkpoint.read(f"{name}.weight")
        return whole

    def matrix(self, part: Part) -> Tensor:
        """Read one matrix, [out_features, in_features]."""
        return self._checkpoint.read(f"{self._names[part]}.weight").to(self._dtype)


def parameter_readers(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, Reader] | None:
    """Return what reads each parameter of a model, by its name; tied ones once.

    Args:
        model: Of `transformers`, without memory or with.
        checkpoint: Its weights.
        dtype: To read them in.

    Returns:
        None where a parameter is made by more than a new name or a place among fused experts.
    """
    experts = {
        f"{name}.{key}": bool(getattr(module, "is_transposed", False))
        for name, module, key, _ in fused_parameters(model)
    }
    found: dict[str, Reader] = {}
    for name, parameter in model.named_parameters():
        stored: str | None = name
        if name not in checkpoint.tensors:
            stored = None if name in experts else stored_name(model, name, parameter.shape)
        if stored is not None:
            info = checkpoint.tensors.get(stored)
            if info is None or tuple(info.shape) != tuple(parameter.shape):
                return None
            found[name] = _Whole(checkpoint, stored, dtype)
            continue
        parts = checkpoint_parts(model, name, parameter.shape, experts[name]) if name in experts else {}
        held = 0  # elements of the parts
        for key, part in parts.items():
            info = checkpoint.tensors.get(f"{key}.weight")
            if info is None or tuple(info.shape) != (part.end - part.begin, parameter.shape[2]):
                return None
            held += math.prod(info.shape)
        if held != parameter.numel():
            return None
        found[name] = _Joined(checkpoint, parts, parameter.shape, dtype)
    return found
