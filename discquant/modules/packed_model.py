# SPDX-License-Identifier: Apache-2.0
"""Put a model on packed layers: swap nn.Linear modules, fusing projections that read the same activations."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from discquant.modules.packed_linear import PackedLinear, autocast_dtype
from discquant.ops.packed_linear import Mode

# Siblings that decoder blocks call with one and the same tensor.
FUSED_SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class CodedLinear(Protocol):
    """What `load_packed` reads of each layer; discquant.formats.codes.QuantizedLinear is one."""

    @property
    def name(self) -> str:
        """Module path."""

    @property
    def q(self) -> Tensor:
        """Codes, uint8, [out_features, in_features]."""

    @property
    def scale(self) -> Tensor:
        """Grid step, [out_features, num_groups]."""

    @property
    def zero_point(self) -> Tensor | None:
        """Codes of weight zero, or None."""

    @property
    def num_bits(self) -> int:
        """Width of a code."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 is the row."""


@dataclass(frozen=True)
class PackedReport:
    """What `load_packed` did: layers packed, fused groups, bytes of packed weights and of the weights replaced.

    `plain` are the file's quantized layers that became ordinary weights, where a file was loaded.
    """

    layers: int
    fused: int
    packed_bytes: int
    replaced_bytes: int
    plain: int = 0


class FusedProjection(nn.Module):
    """One of several projections of the same activations, computed together by its siblings' first caller.

    The first sibling to see a tensor multiplies all rows at once and keeps the result until every sibling has taken its
    part. Each thread has its own result; a tensor that is changed in place or called twice is computed again. What
    torch does not count as a change is not seen: a write through `.data`, or into a tensor made under
    `torch.inference_mode`. In a graph of `torch.compile` every sibling multiplies its own rows.
    """

    def __init__(self, shared: _Shared, index: int) -> None:
        """Only sibling 0 owns the packed rows, so that buffers are counted and saved once."""
        super().__init__()
        # In a tuple, so that nn.Module does not register it; the first sibling registers the packed rows.
        self._shared = (shared,)
        self.index = index
        self.packed = shared.packed if index == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """This sibling's outputs for x [..., in_features]."""
        return self._shared[0].take(x, self.index)

    @property
    def weight(self) -> Tensor:
        """This sibling's weight, made anew at every read; see `PackedLinear.weight`."""
        return self._shared[0].packed.weight_rows(*self._shared[0].rows(self.index))

    def extra_repr(self) -> str:
        """Place among the siblings."""
        sizes = self._shared[0].sizes
        return f"out_features={sizes[self.index]}, sibling {self.index + 1} of {len(sizes)}"


class _Shared:
    """The packed rows of all siblings and, per thread, the outputs not taken yet."""

    def __init__(self, packed: PackedLinear, sizes: list[int]) -> None:
        self.packed = packed
        self.sizes = sizes
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        # The siblings of a copied model must share the copy's rows: memo hands all of them the same object.
        import copy

        twin = _Shared(copy.deepcopy(self.packed, memo), list(self.sizes))
        memo[id(self)] = twin
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"packed": self.packed, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def rows(self, index: int) -> tuple[int, int]:
        first = sum(self.sizes[:index])
        return first, first + self.sizes[index]

    def take(self, x: Tensor, index: int) -> Tensor:
        if torch.compiler.is_compiling():  # nothing can be kept from one call to the next inside a graph
            return self.packed.forward_rows(x, *self.rows(index))
        local = self._local
        version = (None if x.is_inference() else x._version, autocast_dtype(x))
        parts: list[Tensor | None]
        kept, of_version, parts = getattr(local, "kept", (None, None, []))
        if kept is not x or of_version != version or parts[index] is None:
            # An error below must leave nothing behind, least of all the outputs of another input.
            local.kept = (None, None, [])
            parts = list(self.packed(x).split(self.sizes, dim=-1))
            local.kept = (x, version, parts)
        part = parts[index]
        assert part is not None
        parts[index] = None
        if all(other is None for other in parts):
            local.kept = (None, None, [])
        return part


def load_packed(
    model: nn.Module, layers: Iterable[CodedLinear], *, device: torch.device | str | None = None,
    mode: Mode = "auto", fuse: bool = True,
) -> PackedReport:  # fmt: skip
    """Replace nn.Linear modules by packed ones, one at a time, so that no full-precision copy of a weight survives.

    A module that has several names is replaced under all of them. The model may be built on the meta device: only the
    modules that `layers` does not name need real weights.

    Args:
        model: Any module tree; changed in place.
        layers: Codes per module (name, q, scale, zero_point, num_bits, group_size), e.g. QuantizedLinear; consumed one
            by one, so a generator keeps the peak at a few layers.
        device: Where the packed layers go; None is where the codes are.
        mode: As for `packed_linear`.
        fuse: Compute q/k/v and gate/up of a block together where their grids agree: for blocks that hand siblings one
            and the same tensor and write nothing into it in between.

    Returns:
        Counts and bytes.

    Raises:
        ValueError: A name is no nn.Linear of the model that `is_replaceable`, or one for the second time; a shape
            differs, a bias has no values, or the grid is not one that the kernels cover (3 or 4 bits; group 32, 64, a
            multiple of 128, or the row).
    """
    waiting: dict[str, CodedLinear] = {}
    count = fused = packed_bytes = replaced_bytes = 0
    linear = _places(model)
    places: dict[str, list[tuple[nn.Module, str]]] = {}

    def place(group: list[CodedLinear]) -> None:
        nonlocal count, fused, packed_bytes
        biases = [_bias(model, layer) for layer in group]
        weight = model.get_submodule(group[0].name).weight
        assert isinstance(weight, Tensor)
        packed = pack_group(group, biases, device, mode, weight.dtype)
        shared = _Shared(packed, [member.q.shape[0] for member in group])
        for index, layer in enumerate(group):
            new = packed if len(group) == 1 else FusedProjection(shared, index)
            for holder, name in places.pop(layer.name):
                setattr(holder, name, new)
        count += len(group)
        fused += len(group) > 1
        packed_bytes += packed.packed_bytes

    for layer in layers:
        replaced_bytes += _check(model, layer, linear)
        # Taken out, so that nothing here keeps its weight.
        places[layer.name] = linear.pop(model.get_submodule(layer.name))
        parent, _, child = layer.name.rpartition(".")
        siblings = next((names for names in FUSED_SETS if child in names), ()) if fuse else ()
        names = [f"{parent}.{name}" if parent else name for name in siblings]
        if not siblings or not all(_is_linear(model, name) for name in names):
            place([layer])
            continue
        waiting[layer.name] = layer
        if all(name in waiting for name in names):
            group = [waiting.pop(name) for name in names]
            if same_grid(group) and len({_bias(model, member) is None for member in group}) == 1:
                place(group)
            else:
                for member in group:
                    place([member])
    for layer in waiting.values():
        place([layer])
    return PackedReport(count, fused, packed_bytes, replaced_bytes)


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every nn.Linear inside the model with all its (parent, name)."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                found.setdefault(child, []).append((parent, name))
    return found


def is_replaceable(module: nn.Module) -> bool:
    """Whether a packed layer computes what the module does: nn.Linear's own forward, and no hook beside it."""
    own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return own and "forward" not in vars(module) and not (module._forward_hooks or module._forward_pre_hooks)


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return is_replaceable(model.get_submodule(name))
    except AttributeError:
        return False


def _check(model: nn.Module, layer: CodedLinear, linear: Container[nn.Module]) -> int:
    """Bytes of the weight that `layer` replaces."""
    if not _is_linear(model, layer.name) or model.get_submodule(layer.name) not in linear:
        raise ValueError(
            f"load_packed: {layer.name} must be an nn.Linear of the model, named once, without a forward of its own or "
            "forward hooks"
        )
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    if list(weight.shape) != list(layer.q.shape):
        raise ValueError(
            f"load_packed: codes of {layer.name} must have shape = {list(weight.shape)}, got {list(layer.q.shape)}"
        )
    return weight.numel() * weight.element_size()


def _bias(model: nn.Module, layer: CodedLinear) -> Tensor | None:
    given = getattr(layer, "bias", None)
    bias = given if given is not None else model.get_submodule(layer.name).bias
    if bias is None:
        return None
    assert isinstance(bias, Tensor)
    if bias.device.type == "meta":
        raise ValueError(
            f"load_packed: the bias of {layer.name} must be loaded before its weight, got a meta tensor"
        )
    return bias.detach()


def same_grid(group: Sequence[CodedLinear]) -> bool:
    """Whether one packed layer can hold the rows of all."""

    def kind(layer: CodedLinear) -> tuple[object, ...]:
        grid = (layer.num_bits, layer.group_size, layer.zero_point is None, layer.scale.dtype)
        return (*grid, layer.q.shape[1], layer.q.device)

    return len({kind(layer) for layer in group}) == 1


def pack_group(
    group: Sequence[CodedLinear], biases: Sequence[Tensor | None], device: torch.device | str | None, mode: Mode,
    dtype: torch.dtype,
) -> PackedLinear:  # fmt: skip
    """One packed layer of the rows of all, which are on one grid."""
    first = group[0]
    zeros = [layer.zero_point for layer in group if layer.zero_point is not None]
    present = [bias for bias in biases if bias is not None]
    return PackedLinear.from_codes(
        torch.cat([layer.q for layer in group]) if len(group) > 1 else first.q,
        torch.cat([layer.scale for layer in group]),
        torch.cat(zeros) if zeros else None,
        torch.cat(present) if present else None,
        num_bits=first.num_bits, group_size=first.group_size, device=device, mode=mode, compute_dtype=dtype,
    )  # fmt: skip
