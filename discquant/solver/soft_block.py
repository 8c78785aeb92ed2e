# SPDX-License-Identifier: Apache-2.0
"""One block on the solver's state: its quantized nn.Linear layers run as `soft_linear` on codes, frac and scale.

Backward gives the block's input gradient and, per layer, dY^T x in float32 (never rounded to 16 bits), d frac, or the
projected step at once. Weights that `soft_linear` cannot take (convolutions, fused experts) stay dense.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from discquant.grids import AffineGrid, Grid, UniformGrid
from discquant.ops import (
    soft_linear,
    soft_linear_dfrac,
    soft_linear_dx,
    soft_linear_strategy,
    soft_weight,
    weight_gradient,
)
from discquant.ops._registry import differentiable
from discquant.solver.state import WeightState
from discquant.solver.weight_ref import WeightRef, assemble

_SHORT = (torch.bfloat16, torch.float16)
# Mantissa bits: rounding to a dtype changes nothing where a narrower rounding follows.
_PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
By = Literal["weight", "frac"]


def grid_arguments(grid: Grid, frac: Tensor) -> dict[str, Any] | None:
    """Return what `soft_linear` takes of a grid, by argument, or None.

    None where the op would not give the served bits at frac 0 and 1: positions in float64 on a scale whose products are
    served in float32, and grids of another package.
    """
    scale, minimum, g_idx = grid.scale, None, None
    if isinstance(grid, AffineGrid):
        # Its levels are rounded to `compute` whatever the positions are.
        scale, minimum = grid.in_compute()
    elif frac.dtype == torch.float64 and scale.dtype not in _SHORT:
        return None
    elif isinstance(grid, UniformGrid):
        g_idx = grid.g_idx
    elif grid.table is None:
        return None
    return {
        "scale": scale.float() if minimum is None and scale.dtype == torch.float16 else scale,
        "zero_point": grid.zero_point,
        "table": grid.table,
        "num_bits": grid.num_bits,
        "group_size": grid.group_size,
        "minimum": minimum,
        "g_idx": g_idx,
    }


def step_grid(state: WeightState) -> dict[str, Any]:
    """Return scale and group_size (and codes and table) of a state as the projected steps take them."""
    grid = state.student_grid
    if state.frac.is_cuda and grid.table is not None:
        # The kernel looks the gap up: half a byte per weight in place of a float32 matrix.
        return {
            "scale": grid.scale,
            "group_size": grid.group_size,
            "q_down": state.q_down,
            "table": grid.table,
        }
    gap, group_size = state.gap()
    return {"scale": gap, "group_size": group_size}


def _takes_layer(module: nn.Module) -> bool:
    """Say whether a module is a plain linear layer whose forward may be replaced."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class SoftLayer:
    """One linear layer on its state; collects what its backward passes find.

    Attributes:
        state: The weight's state, read only.
        grad: dY^T x (or d frac), float32 (float64), [out_features, in_features], summed over the passes so far.
    """

    def __init__(
        self, module: nn.Linear, state: WeightState, grid: Mapping[str, Any], owner: SoftWeights
    ) -> None:
        """Bind a module to its state; `grid` from `grid_arguments`."""
        self.module, self.state = module, state
        # Weak: in a cycle the dense weights of every visited block would stay until Python looks for cycles.
        self._owner = weakref.ref(owner)
        self.grid = dict(grid)
        self.grad: Tensor | None = None
        self.calls = 0
        self._dense: Tensor | None = None

    @property
    def owner(self) -> SoftWeights:
        """The mapping that this layer belongs to, which outlives every pass through the block."""
        found = self._owner()
        assert found is not None
        return found

    def _weight(self, stage: str, x: Tensor) -> Tensor | None:
        """Return the weight that this visit of the block shares, None where the op makes it on the fly."""
        strategy = self.owner.strategy
        if strategy == "auto":
            # Without a GPU the op would materialise at every call.
            rows, cols = self.state.shape
            strategy = soft_linear_strategy(x, stage, (rows, cols)) if x.is_cuda else "materialise"
        if strategy == "fused":
            return None
        if self._dense is None:
            # The op, not the grid's own way: what the fused matmul makes tile by tile.
            self._dense = soft_weight(
                self.state.q_down, self.state.frac, **self.grid, dtype=x.dtype, impl=self.owner.impl
            )
        return self._dense

    def forward(self, x: Tensor) -> Tensor:
        """y = x W(frac)^T + b."""
        self.calls += 1
        dense = self._weight("forward", x)
        if dense is not None:
            return nn.functional.linear(x, dense, self.module.bias)
        state = self.state
        return soft_linear(
            x,
            state.q_down,
            state.frac,
            bias=self.module.bias,
            **self.grid,
            strategy="fused",
            impl=self.owner.impl,
        )

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        """dX = dY W(frac)."""
        dense = self._weight("dx", grad_output)
        if dense is not None:
            return grad_output @ dense
        state = self.state
        return soft_linear_dx(
            grad_output, state.q_down, state.frac, **self.grid, strategy="fused", impl=self.owner.impl
        )

    def receive(self, grad_output: Tensor, x: Tensor) -> None:
        """Take the step in the epilogue where that is wanted and exact, else add to the gradient."""
        owner = self.owner
        if owner.on_layer is not None and self.calls == 1 and owner.on_layer(self.state, grad_output, x):
            owner.stepped.add(self.state.name)
            return
        if owner.by == "weight":
            found = weight_gradient(_rows(grad_output), _rows(x))
        else:
            args = {k: self.grid[k] for k in ("scale", "num_bits", "group_size", "table", "g_idx")}
            found = soft_linear_dfrac(grad_output, x, self.state.q_down, **args, impl=owner.impl)
        self.grad = found if self.grad is None else self.grad.add_(found)


class _SoftLayerFunction(torch.autograd.Function):
    """A layer whose weight is no leaf: backward hands (dY, x) to the layer. `trigger` only asks for that call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, layer: SoftLayer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        grad_output = grads[0].contiguous()
        # First, so that a step in the epilogue does not change the weight that dX needs.
        dx = ctx.layer.input_gradient(grad_output) if ctx.needs_input_grad[0] else None
        ctx.layer.receive(grad_output, x)
        return dx, None, None


class SoftWeights(dict[str, Tensor]):
    """A block's student weights: those that stay dense by parameter name, the others as `layers` on the state.

    `gradients.block_gradients` takes it wherever it takes a mapping of dense weights.
    """

    def __init__(
        self,
        block: nn.Module,
        refs: Sequence[WeightRef],
        states: Sequence[WeightState],
        *,
        dtype: torch.dtype,
        served: torch.dtype | None = None,
        by: By = "weight",
        strategy: str = "auto",
        impl: str = "auto",
        on_layer: Callable[[WeightState, Tensor, Tensor], bool] | None = None,
    ) -> None:
        """Decide for each weight of a block.

        Args:
            block: The block whose parameters `refs` name.
            refs: Its weights.
            states: Their states, in the same order.
            dtype: Dtype of the forward and backward passes.
            served: Dtype in which the file is dequantized; None is `dtype`. Where rounding to it first matters,
                every weight stays dense.
            by: "weight": gradients are dY^T x, and the step multiplies by Delta itself (no pass of its own);
                "frac": gradients are Delta * dY^T x, for `projected_step_` with scale=None.
            strategy: "auto" by the table, "fused", or "materialise" (one dense weight per layer and visit, shared
                by recomputation and input gradient).
            impl: Implementation of the ops.
            on_layer: May take the step of a layer from (state, dY, x) during backward and then returns True: no
                gradient is made. Only exact with one micro-batch per step on one rank. A layer that is called more
                than once always gets a gradient.
        """
        self.by, self.strategy, self.impl, self.on_layer = by, strategy, impl, on_layer
        self.stepped: set[str] = set()
        self.layers: dict[str, SoftLayer] = {}
        # float32, on the states' device: without it, a block whose input needs no gradient would have no graph.
        self.trigger = torch.zeros((), device=states[0].frac.device if states else None, requires_grad=True)
        exact = served is None or (_PRECISION[served] >= _PRECISION[dtype] and (served, dtype) != _MIXED)
        dense: list[tuple[WeightRef, WeightState]] = []
        for ref, state in zip(refs, states, strict=True):
            module = block.get_submodule(ref.param_name.rpartition(".")[0]) if ref.part is None else block
            grid = grid_arguments(state.student_grid, state.frac)
            if exact and ref.part is None and grid is not None and _takes_layer(module):
                assert isinstance(module, nn.Linear)
                self.layers[ref.param_name] = SoftLayer(module, state, grid, self)
            else:
                dense.append((ref, state))
        rounded = (state.soft_weight(served or dtype).to(dtype) for _, state in dense)
        super().__init__(assemble([ref for ref, _ in dense], rounded))

    def with_leaves(self) -> SoftWeights:
        """Make the dense weights leaves of a graph, in place; return self."""
        for name, weight in self.items():
            self[name] = weight.detach().requires_grad_()
        return self

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """Within the block, the layers' modules run on the state.

        Their own weights are NaN meanwhile: code that reads a weight past the layer's forward cannot go unnoticed.
        """
        saved = {name: layer.module._parameters["weight"] for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                module = layer.module
                nan = torch.full((), torch.nan, dtype=module.weight.dtype, device=module.weight.device)
                module._parameters["weight"] = nn.Parameter(
                    nan.expand(module.weight.shape), requires_grad=False
                )
                module.__dict__["forward"] = _forward_of(layer, self.trigger)
            yield
        finally:
            for name, weight in saved.items():
                module = self.layers[name].module
                module.__dict__.pop("forward", None)
                module._parameters["weight"] = weight

    def take_gradients(self) -> dict[str, Tensor]:
        """Return and forget the layers' gradients by parameter name; zero where no token came, none where stepped."""
        found = {}
        for name, layer in self.layers.items():
            if layer.state.name in self.stepped and layer.grad is None:
                continue
            wide = torch.float64 if layer.state.frac.dtype == torch.float64 else torch.float32
            found[name] = torch.zeros_like(layer.state.frac, dtype=wide) if layer.grad is None else layer.grad
            layer.grad = None
        return found


# float16 and bfloat16 are not subsets of one another.
_MIXED = (torch.float16, torch.bfloat16)


def _forward_of(layer: SoftLayer, trigger: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = differentiable(_SoftLayerFunction, x, trigger, layer)
        return y

    return forward
