# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts blocks: fused [experts, rows, columns] parameters as matrices under their checkpoint names.

`transformers` joins the per-expert matrices of a checkpoint when it loads it (`formats.stored` tells where each went).
What chooses and weighs experts is small, decides everything, and is served in full precision: it stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from discquant.formats.stored import checkpoint_parts, fused_parameters
from discquant.solver.counted import counted_rows
from discquant.solver.layers import KINDS, is_transposed, joined
from discquant.solver.weight_ref import WeightRef

# Where a configuration of transformers keeps what `set_experts_implementation` sets.
_KERNEL = "_experts_implementation_internal"


def routes(name: str, layer: nn.Module) -> bool:
    """Say by a layer's name below its block whether it chooses or weighs experts.

    So it does in a router, as the gate of a shared expert, and where it or the module it lies in is a `gate` that gives
    fewer numbers than it takes (one per expert); a `gate` that does not is half of a gated product.
    """
    parts = name.split(".")
    if not isinstance(layer, nn.Linear):
        return False
    if any("router" in part or part == "shared_expert_gate" for part in parts):
        return True
    return "gate" in parts and layer.out_features < layer.in_features


@contextlib.contextmanager
def kept_kernels(model: nn.Module) -> Iterator[None]:
    """Give a model back the implementation of its experts, which `settle_kernel` may change meanwhile."""
    configs = {
        id(config): config for config in (getattr(module, "config", None) for module in model.modules())
    }
    before = [(config, getattr(config, _KERNEL)) for config in configs.values() if hasattr(config, _KERNEL)]
    try:
        yield
    finally:
        for config, kernel in before:
            setattr(config, _KERNEL, kernel)


def settle_kernel(model: nn.Module) -> None:
    """Let a model loop over its experts where the library's grouped product will not do.

    It takes at most float32; and on a GPU it counts tokens by an operation (histc) that torch refuses where the same
    bits are asked for.
    """
    first = next(model.parameters(), None)
    choose = getattr(model, "set_experts_implementation", None)
    loops = first is not None and (first.dtype == torch.float64 or first.is_cuda)
    if choose is not None and loops and next(fused_parameters(model), None) is not None:
        choose("eager")


def expert_refs(
    model: nn.Module,
    root: nn.Module,
    prefix: str,
    selected: Callable[[str], bool],
    *,
    strict: bool = True,
) -> list[WeightRef]:
    """Return the matrices of all fused experts below `root`.

    Args:
        model: The whole model; knows how its checkpoint is laid out.
        root: A block of it.
        prefix: The block's name in the model, "" for the model itself.
        selected: Whether a module of this name is to be quantized; asked for the checkpoint's name and the fused one.
        strict: Refuse experts whose orientation is not declared; otherwise they are passed over.

    Returns:
        Refs in the order of experts.

    Raises:
        NotImplementedError: Fused experts whose orientation is not declared.
    """
    refs: list[WeightRef] = []
    for local, module, key, parameter in fused_parameters(root):
        owner = ".".join(part for part in (prefix, local) if part)
        name = f"{owner}.{key}"
        if not (selected(owner) and selected(name)):
            continue
        transposed = getattr(module, "is_transposed", None)
        if not isinstance(transposed, bool) and not strict:
            continue
        if not isinstance(transposed, bool):
            raise NotImplementedError(
                f"Chain: {name} fuses experts in a way that {type(module).__name__} does not declare; "
                f"leave it alone with --ignore {owner.rpartition('.')[2]}"
            )
        param_name = f"{local}.{key}" if local else key
        parts = checkpoint_parts(model, name, parameter.shape, transposed)
        ordered = sorted(parts.items(), key=lambda item: (item[1].expert, item[1].begin))
        refs += [WeightRef(found, param_name, parameter, part) for found, part in ordered if selected(found)]
    return refs


def layer_names(model: nn.Module, root: nn.Module, prefix: str) -> list[str]:
    """Return the names of all below `root` that can be left alone: layers, experts, and matrices of no layer.

    Args:
        model: The whole model.
        root: A block of it.
        prefix: The block's name in the model, "" for the model itself.
    """
    found = [ref.name for ref in expert_refs(model, root, prefix, lambda name: True, strict=False)]
    for name, module in root.named_modules():
        path = joined(prefix, name)
        if isinstance(module, KINDS) or is_transposed(module):
            found.append(path)
        elif not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            own = module.named_parameters(recurse=False)
            found += [joined(path, key) for key, parameter in own if parameter.ndim > 1]
    return found


class RoutedInputs:
    """Watches one experts module: tokens per expert, and X^T X of what each expert's matrices really get."""

    def __init__(self, module: nn.Module, refs: Sequence[WeightRef], *, hessians: bool) -> None:
        """Start watching.

        Args:
            module: The experts module, called with (hidden_states, top_k_index, top_k_weights).
            refs: Its matrices.
            hessians: Also gather X^T X, rows weighted by the router's weight, which scales the expert's output.
        """
        self.module: Any = module
        self.mask: Tensor | None = None
        self.tokens: dict[int, int] = {}
        self._sums: dict[tuple[int, bool], Tensor] = {}
        self._hessians = hessians
        self._inner = any(ref.param_name.endswith("down_proj") for ref in refs)
        self._handle = module.register_forward_pre_hook(self._see, with_kwargs=True)

    def called(self, ref: WeightRef) -> bool:
        """Say whether a token came to the expert of a matrix."""
        return ref.part is not None and ref.part.expert in self.tokens

    def gathered(self, ref: WeightRef) -> Tensor | None:
        """Return X^T X of a matrix's inputs, float64, [in_features, in_features]; None where no token came."""
        assert ref.part is not None
        return self._sums.get((ref.part.expert, ref.param_name.endswith("down_proj")))

    def _project(self, key: str, expert: int, rows: Tensor) -> Tensor:
        weight = getattr(self.module, key)[expert].detach()
        bias = getattr(self.module, f"{key}_bias")[expert].detach() if self.module.has_bias else None
        return nn.functional.linear(rows, weight.T if self.module.is_transposed else weight, bias)

    def _inside(self, expert: int, rows: Tensor) -> Tensor:
        """Return what the expert's down projection gets, in the model's own activation."""
        if self.module.has_gate:
            gated: Tensor = self.module._apply_gate(self._project("gate_up_proj", expert, rows))
            return gated
        plain: Tensor = self.module.act_fn(self._project("up_proj", expert, rows))
        return plain

    def _add(self, expert: int, inner: bool, rows: Tensor) -> None:
        wide = rows.float()
        product = (wide.T @ wide).double()
        key = (expert, inner)
        self._sums[key] = self._sums[key].add_(product) if key in self._sums else product

    @torch.no_grad()
    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, weights = (counted_rows(value, self.mask) for value in [*args, *kwargs.values()][:3])
        for expert in chosen.unique().tolist():
            if expert < 0 or expert >= self.module.num_experts:
                continue
            token, place = torch.where(chosen == expert)
            self.tokens[expert] = self.tokens.get(expert, 0) + token.numel()
            if not self._hessians:
                continue
            rows, strength = hidden[token], weights[token, place].unsqueeze(1)
            self._add(expert, False, rows * strength)
            if self._inner:
                self._add(expert, True, self._inside(expert, rows) * strength)

    def remove(self) -> None:
        """Stop watching."""
        self._handle.remove()
