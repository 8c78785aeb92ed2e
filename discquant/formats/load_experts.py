# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint calls otherwise than the model that is loaded from it: renamed tensors, and matrices of experts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from discquant.errors import CheckpointError
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.stored import Part, checkpoint_parts, fused_parameters, stored_names
from discquant.modules import PackedExperts, PackedLinear, PackedReport, follows_grouped_product
from discquant.modules.packed_model import pack_group, same_grid
from discquant.ops.packed_linear import Mode


def renamed(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The model's name of each tensor of a file that it holds as it is, by the file's name."""
    wanted = set(keys)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.state_dict(keep_vars=True))
    fused = {f"{name}.{key}" for name, _, key, _ in fused_parameters(model)}
    found = {name: name for name in own if name in wanted}
    others = {
        name: value.shape
        for name, value in own.items()
        if name not in found and name not in fused and isinstance(value, Tensor)
    }
    for name, stored in stored_names(model, others).items():
        if stored in wanted:
            found.setdefault(stored, name)
    return found


class Experts:
    """Gathers the matrices of a model's fused experts, which a file names one by one, and puts them in their place.

    A block with packed matrices gets `PackedExperts`, one without its fused tensors.

    Attributes:
        dtype: Compute dtype.
        device: Where packed matrices go; None is the CPU.
        mode: As for `packed_linear`.
        layers, packed_bytes, replaced_bytes: As in `PackedReport`, so far.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype, device: torch.device | None, mode: Mode
    ) -> None:
        """Find the experts of a model.

        Args:
            model: Of transformers, on the meta device.
            dtype: Compute dtype.
            device: Where packed matrices go; None is the CPU.
            mode: As for `packed_linear`.
        """
        self.model, self.dtype, self.device, self.mode = model, dtype, device, mode
        self._parts: dict[str, tuple[str, Part]] = {}
        self._made: dict[str, dict[str, list[nn.Module | None]]] = {}
        self._waiting: dict[tuple[str, str, int], dict[int, QuantizedLinear | Tensor]] = {}
        self.layers = self.packed_bytes = self.replaced_bytes = 0
        for owner, module, key, parameter in fused_parameters(model):
            if follows_grouped_product(module):
                self._made.setdefault(owner, {})[key] = [None] * parameter.shape[0]
                parts = checkpoint_parts(model, f"{owner}.{key}", parameter.shape, transposed=False)
                self._parts |= {name: (key, part) for name, part in parts.items()}

    @property
    def names(self) -> Collection[str]:
        """Modules of the file, without `.weight`."""
        return self._parts.keys()

    def shape(self, name: str) -> tuple[int, int]:
        """[out_features, in_features] of a matrix, by its name in the file."""
        key, part = self._parts[name]
        return part.end - part.begin, self._fused(part.owner, key).shape[2]

    def around(self, coded: Collection[str]) -> tuple[list[tuple[str, str]], list[str]]:
        """Where the experts lie that a file quantizes some of, and the names of their matrices that it does not.

        Args:
            coded: Names of matrices in the file.

        Returns:
            (module, parameter) of each fused tensor, and names in the file.
        """
        owners = {part.owner for name, (_, part) in self._parts.items() if name in coded}
        inside = {
            name: (part.owner, key) for name, (key, part) in self._parts.items() if part.owner in owners
        }
        return sorted(set(inside.values())), [name for name in inside if name not in coded]

    def add(self, name: str, matrix: QuantizedLinear | Tensor) -> None:
        """Take a matrix over: codes that the kernels cover, or a weight.

        Raises:
            CheckpointError: It has another shape than the model's.
        """
        key, part = self._parts[name]
        found = matrix.shape if isinstance(matrix, Tensor) else matrix.q.shape
        if tuple(found) != self.shape(name):
            raise CheckpointError(
                f"{name} has the shape {list(found)}, the model makes it {list(self.shape(name))}"
            )
        waiting = self._waiting.setdefault((part.owner, key, part.expert), {})
        waiting[part.begin] = matrix
        rows = sum((held if isinstance(held, Tensor) else held.q).shape[0] for held in waiting.values())
        if rows < self._fused(part.owner, key).shape[1]:
            return
        del self._waiting[part.owner, key, part.expert]
        made = self._made[part.owner]
        made[key][part.expert] = self._layer([waiting[begin] for begin in sorted(waiting)])
        if all(layer is not None for layers in made.values() for layer in layers):
            self._settle(part.owner, {key: [*filter(None, layers)] for key, layers in made.items()})
            del self._made[part.owner]

    def added_to(self, report: PackedReport, quantized: int) -> PackedReport:
        """What `load_packed` did and what was packed here, of so many layers that the file quantizes."""
        layers = report.layers + self.layers
        return PackedReport(
            layers,
            report.fused,
            report.packed_bytes + self.packed_bytes,
            report.replaced_bytes + self.replaced_bytes,
            quantized - layers,
        )

    def _fused(self, owner: str, key: str) -> nn.Parameter:
        return getattr(self.model.get_submodule(owner), key)  # type: ignore[no-any-return]

    def _layer(self, group: list[QuantizedLinear | Tensor]) -> nn.Module:
        """One layer of all rows: packed where all have codes on one grid."""
        codes = [matrix for matrix in group if isinstance(matrix, QuantizedLinear)]
        if len(codes) == len(group) and same_grid(codes):
            packed = pack_group(codes, [None] * len(codes), self.device, self.mode, self.dtype)
            self.layers += len(codes)
            self.packed_bytes += packed.packed_bytes
            self.replaced_bytes += packed.out_features * packed.in_features * self.dtype.itemsize
            return packed
        weight = torch.cat([
            matrix if isinstance(matrix, Tensor) else CodedLayer.of(matrix).dequantize(self.dtype)
            for matrix in group
        ])  # fmt: skip
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def _settle(self, owner: str, made: dict[str, list[nn.Module]]) -> None:
        module: Any = self.model.get_submodule(owner)
        if not any(isinstance(layer, PackedLinear) for layers in made.values() for layer in layers):
            for key, layers in made.items():
                whole = torch.stack([layer.weight for layer in layers])  # type: ignore[misc]
                setattr(module, key, nn.Parameter(whole, requires_grad=False))
            return
        first = "gate_up_proj" if module.has_gate else "up_proj"
        parent, _, child = owner.rpartition(".")
        setattr(
            self.model.get_submodule(parent), child, PackedExperts(module, made[first], made["down_proj"])
        )
