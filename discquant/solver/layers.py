# SPDX-License-Identifier: Apache-2.0
"""Which layers of a module are quantized, and which weights stay as they are for being none of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from discquant.config import names_module

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def joined(prefix: str, name: str) -> str:
    """Return the name in the model of what has `name` below `prefix`."""
    return ".".join(part for part in (prefix, name) if part)


def selected(name: str, ignore: Sequence[str]) -> bool:
    """Say whether no entry of `ignore` (a name, a last name part, a glob pattern) covers this module."""
    return not any(names_module(pattern, name) for pattern in ignore)


def quantizable_modules(root: nn.Module, prefix: str, ignore: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return (name below `root`, module) of its linear and convolution layers that are not ignored.

    Raises:
        NotImplementedError: The weight of one is computed from other parameters (weight_norm, pruning, LoRA).
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in root.named_modules():
        if not isinstance(module, KINDS) or not selected(joined(prefix, name), ignore):
            continue
        if not isinstance(module.weight, nn.Parameter):
            raise NotImplementedError(
                f"Chain: {joined(joined(prefix, name), 'weight')} is no parameter but computed from others; make it "
                "one first (torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') for "
                "parametrizations.weight_norm and its like), or ignore the layer"
            )
        found.append((name, module))
    return found


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is `transformers`' Conv1D."""
    wanted = ("transformers.pytorch_utils", "Conv1D")
    return any((kind.__module__, kind.__name__) == wanted for kind in type(module).__mro__)


def transposed_modules(root: nn.Module, prefix: str, ignore: Sequence[str]) -> list[str]:
    """Return the names of layers that `transformers` keeps as [in_features, out_features] (Conv1D), if not ignored."""
    return [
        joined(prefix, name)
        for name, module in root.named_modules()
        if is_transposed(module) and selected(joined(prefix, name), ignore)
    ]


def refuse_transposed(names: Sequence[str]) -> None:
    """Refuse a model whose blocks have such layers.

    Raises:
        NotImplementedError: There are some.
    """
    if names:
        raise NotImplementedError(
            f"Chain: {names[0]} ({len(names)} such layers) is a transformers.pytorch_utils.Conv1D, GPT-2's layer with "
            "the weight transposed, and only nn.Linear is quantized: put an nn.Linear with weight.T in its place, or "
            "ignore such layers"
        )


def full_precision(
    root: nn.Module, quantized: Collection[nn.Parameter], ignore: Sequence[str]
) -> Iterator[str]:
    """Yield the names of matrices that no quantized layer holds: attention's in_proj_weight, a position table, say.

    Vectors (also with axes of length 1), embeddings, and what is ignored are not among them.
    """
    known = {id(parameter) for parameter in quantized}
    for prefix, module in root.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            wide = sum(size > 1 for size in parameter.shape) >= 2
            names = (prefix, joined(prefix, key))
            if wide and id(parameter) not in known and all(selected(name, ignore) for name in names):
                yield joined(prefix, key)
