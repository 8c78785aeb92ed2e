# SPDX-License-Identifier: Apache-2.0
"""What a layer gets and gives whenever it runs, also `out_proj` of torch's attention, whose weight is read past it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

See = Callable[[Tensor, Tensor], None]


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """Keep torch's fused encoder layers off: they read weights past the layers, and give other bits than with grad."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def on_call(model: nn.Module, name: str, see: See, *, paired: bool = False) -> RemovableHandle:
    """Have `see(input, output)` called whenever the layer `name` of a model runs; the handle removes it.

    Of `out_proj` in `nn.MultiheadAttention`, which never calls it, both come from the attention around it. The input
    has a window per row, as masks have it; with `paired` its rows stand as those of the output, which of an attention
    without `batch_first` have a position per row.
    """
    attention = _attention_around(model, name)
    if attention is None:

        def layer_hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            see(args[0] if args else next(iter(kwargs.values())), output)

        return model.get_submodule(name).register_forward_hook(layer_hook, with_kwargs=True)
    around = attention

    def attention_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = _projected(around, args, kwargs)
        turned = x.ndim == 3 and not around.batch_first and not paired
        see(x.transpose(0, 1) if turned else x, output[0])

    return around.register_forward_hook(attention_hook, with_kwargs=True)


def _attention_around(model: nn.Module, name: str) -> nn.MultiheadAttention | None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    plain = isinstance(owner, nn.MultiheadAttention) and type(owner).forward is nn.MultiheadAttention.forward
    return owner if plain and isinstance(owner, nn.MultiheadAttention) and last == "out_proj" else None


@torch.no_grad()
def _projected(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what `out_proj` gets: what the attention gives with the identity in its place, which changes no bit."""
    layer = attention.out_proj
    held = dict(layer._parameters)
    weight = layer.weight.detach()
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    try:
        layer._parameters["weight"] = nn.Parameter(identity, requires_grad=False)
        if layer.bias is not None:
            layer._parameters["bias"] = nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)
        found: Tensor = attention.forward(*args, **kwargs)[0]
    finally:
        layer._parameters.update(held)
    return found
