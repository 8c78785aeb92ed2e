# SPDX-License-Identifier: Apache-2.0
"""Operator `soft_linear`: a linear layer on an interpolated weight, with gradients of x, frac and bias.

Two strategies behind one op: *fused* makes the weight tile by tile inside the matmul; *materialise* writes it once
and calls cuBLAS. `soft_linear_table` chooses, from measurements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops._steps import SCALAR_SCHEMA, check_state, flatten_options, launch_arguments
from discquant.ops._weights import check
from discquant.ops.reference import projected_step as step_reference
from discquant.ops.reference import soft_linear as reference
from discquant.ops.reference.projected_step import StepCounts, StepOptions, decode_frac_ref
from discquant.ops.reference.soft_weight import accumulate_dtype
from discquant.ops.soft_linear_table import RULES

_OP = "soft_linear"
X_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STRATEGIES = ("auto", "fused", "materialise")
_WEIGHT = "Tensor q_down, Tensor frac, Tensor scale, Tensor? zero_point, Tensor? table"


def rule(device: torch.device, stage: str, tokens: int) -> tuple[str, str]:
    """Strategy and tile for this device, stage ("forward", "dx", "dfrac", "step") and number of tokens."""
    key = "default"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        exact, family = f"sm_{major}{minor}", f"sm_{major}0"
        # A consumer card of the same family has less shared memory: it keeps the default until it is measured.
        key = exact if exact in RULES else family if minor == 0 and family in RULES else "default"
    strategy, tile = next((s, t) for bound, s, t in RULES[key][stage] if tokens < bound)
    return strategy, tile


def _resolve(
    x: Tensor, stage: str, strategy: str, in_features: int, table: Tensor | None = None
) -> tuple[str, Any]:
    """Strategy and launch configuration for x of [num_tokens, ...]."""
    kernels = registry.triton_module("soft_linear")
    chosen, tile = rule(x.device, stage, x.shape[0])
    if x.is_cuda and x.dtype in (torch.float32, torch.float64) and stage != "step":
        # Without tensor cores the fused kernels spill; cuBLAS has exact float32 and float64.
        chosen, tile = "materialise", "compact"
    if in_features % 16 and stage != "step":
        # Seen ahead of time: rows that start at odd addresses spill in the other tiles.
        tile = "ragged"
    elif table is not None:
        # Seen ahead of time: a table read level by level overflows the shared memory of a larger tile on sm_80.
        tile = "compact"
    configs = kernels.STEP_CONFIGS if stage == "step" else kernels.CONFIGS
    return chosen if strategy == "auto" else strategy, configs[tile]


def _fwd_fake(x: Tensor, q_down: Tensor, frac: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], frac.shape[0]))


def _fwd_launch(
    x: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None,
    bias: Tensor | None, num_bits: int, group_size: int, is_reference: bool, strategy: str,
) -> Tensor:  # fmt: skip
    strategy, config = _resolve(x, "forward", strategy, frac.shape[1], table)
    weight = (q_down, frac, scale, zero_point, table)
    if strategy == "fused":
        out: Tensor = registry.triton_module("soft_linear").soft_linear_fwd(
            x, *weight, bias, num_bits, group_size, is_reference, config
        )
        return out
    dense = registry.triton_module("soft_weight").soft_weight_fwd(
        *weight, num_bits, group_size, x.dtype, is_reference, False
    )
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _dx_fake(grad_output: Tensor, q_down: Tensor, frac: Tensor, *args: Any) -> Tensor:
    return grad_output.new_empty((grad_output.shape[0], frac.shape[1]))


def _dx_launch(
    grad_output: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None,
    table: Tensor | None, num_bits: int, group_size: int, is_reference: bool, strategy: str,
) -> Tensor:  # fmt: skip
    strategy, config = _resolve(grad_output, "dx", strategy, frac.shape[1], table)
    weight = (q_down, frac, scale, zero_point, table)
    if strategy == "fused":
        out: Tensor = registry.triton_module("soft_linear").soft_linear_dx(
            grad_output, *weight, num_bits, group_size, is_reference, config
        )
        return out
    dense = registry.triton_module("soft_weight").soft_weight_fwd(
        *weight, num_bits, group_size, grad_output.dtype, is_reference, False
    )
    return torch.mm(grad_output, dense)


def _dfrac_fake(
    grad_output: Tensor, x: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, strategy: str,
) -> Tensor:  # fmt: skip
    return x.new_empty((grad_output.shape[1], x.shape[1]), dtype=dtype)


def _dfrac_launch(
    grad_output: Tensor, x: Tensor, q_down: Tensor, scale: Tensor, table: Tensor | None,
    num_bits: int, group_size: int, dtype: torch.dtype, strategy: str,
) -> Tensor:  # fmt: skip
    strategy, config = _resolve(x, "dfrac", strategy, x.shape[1], table)
    if strategy == "fused":
        out: Tensor = registry.triton_module("soft_linear").soft_linear_dfrac(
            grad_output, x, q_down, scale, table, num_bits, group_size, dtype, config
        )
        return out
    acc = accumulate_dtype(x)
    if x.dtype == acc:
        weight_grad = torch.mm(grad_output.t(), x)
    elif x.is_cuda:
        weight_grad = torch.mm(grad_output.t(), x, out_dtype=acc)
    else:
        weight_grad = torch.mm(grad_output.t().to(acc), x.to(acc))
    scaled: Tensor = registry.triton_module("soft_weight").soft_weight_bwd(
        weight_grad, q_down, scale, table, num_bits, group_size, dtype
    )
    return scaled


def _step_fake(grad_output: Tensor, *args: Any) -> Tensor:
    return grad_output.new_empty(5, dtype=torch.int64)


def _step_launch(
    grad_output: Tensor, x: Tensor, frac: Tensor, frac_ref: Tensor, scale: Tensor, momentum: Tensor | None,
    second_moment: Tensor | None, group_size: int, *options: Any,
) -> Tensor:  # fmt: skip
    _, config = _resolve(x, "step", "fused", x.shape[1])
    if options[0] == "adamw":
        # Two moments do not fit the registers beside a large accumulator.
        config = registry.triton_module("soft_linear").STEP_CONFIGS["compact"]
    counts: Tensor = registry.triton_module("soft_linear").soft_linear_step(
        grad_output, x, frac, frac_ref, scale, momentum, second_moment, group_size,
        *launch_arguments(*options), config,
    )  # fmt: skip
    return counts


_fwd_op = registry.define(
    f"soft_linear_fwd(Tensor x, {_WEIGHT}, Tensor? bias, int num_bits, int group_size, bool is_reference, "
    "str strategy) -> Tensor",
    _fwd_fake,
    _fwd_launch,
)
_dx_op = registry.define(
    f"soft_linear_dx(Tensor grad_output, {_WEIGHT}, int num_bits, int group_size, bool is_reference, "
    "str strategy) -> Tensor",
    _dx_fake,
    _dx_launch,
)
_dfrac_op = registry.define(
    "soft_linear_dfrac(Tensor grad_output, Tensor x, Tensor q_down, Tensor scale, Tensor? table, int num_bits, "
    "int group_size, ScalarType dtype, str strategy) -> Tensor",
    _dfrac_fake,
    _dfrac_launch,
)
_step_op = registry.define(
    "soft_linear_step_(Tensor grad_output, Tensor x, Tensor(a!) frac, Tensor frac_ref, Tensor scale, "
    f"Tensor(b!)? momentum, Tensor(c!)? second_moment, int group_size, {SCALAR_SCHEMA}) -> Tensor",
    _step_fake,
    _step_launch,
)


class SoftLinearFunction(torch.autograd.Function):
    """soft_linear through the kernels; saves x and the state, never a weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q_down: Tensor, frac: Tensor, scale: Tensor, zero_point: Tensor | None,
        table: Tensor | None, bias: Tensor | None, num_bits: int, group_size: int, is_reference: bool, strategy: str,
    ) -> Tensor:  # fmt: skip
        """Launch the forward pass."""
        ctx.save_for_backward(x if frac.requires_grad else None, q_down, frac, scale, zero_point, table)
        ctx.constants = (num_bits, group_size, is_reference, strategy, None if bias is None else bias.dtype)
        out: Tensor = _fwd_op(
            x, q_down, frac, scale, zero_point, table, bias, num_bits, group_size, is_reference, strategy
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, frac and bias, each only if it is needed."""
        x, q_down, frac, scale, zero_point, table = ctx.saved_tensors
        num_bits, group_size, is_reference, strategy, bias_dtype = ctx.constants
        (grad_output,) = grads
        dx = dfrac = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _dx_op(
                grad_output,
                q_down,
                frac,
                scale,
                zero_point,
                table,
                num_bits,
                group_size,
                is_reference,
                strategy,
            )
        if ctx.needs_input_grad[2]:
            dfrac = _dfrac_op(
                grad_output, x, q_down, scale, table, num_bits, group_size, frac.dtype, strategy
            )
        if ctx.needs_input_grad[6]:
            dbias = grad_output.sum(dim=0, dtype=accumulate_dtype(grad_output)).to(bias_dtype)
        return (dx, None, dfrac, None, None, None, dbias, None, None, None, None)


def _check_x(op: str, name: str, x: Tensor, features: int) -> None:
    registry.require_tensors(op, **{name: x})
    registry.require_dtype(op, name, x, X_DTYPES)
    registry.require(
        x.dim() >= 1 and x.shape[-1] == features, op, name, "have a last dimension of", features, x.shape
    )


def soft_linear(
    x: Tensor,
    q_down: Tensor,
    frac: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_bits: int,
    group_size: int,
    table: Tensor | None = None,
    is_reference: bool = False,
    strategy: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """y = x W(frac)^T + b, with W = scale * (q_down + frac - zero_point) rounded to the dtype of x.

    Args:
        x: Activation, floating, [..., in_features].
        q_down: Lower grid code, uint8, [out_features, in_features] or two 4-bit codes per byte.
        frac: Place between the neighbours, unitless in [0, 1]: floating, or uint8 / uint16 fixed point
            (code / 255, code / 65535), [out_features, in_features].
        scale: Grid step in weight units, floating, [out_features, num_groups].
        zero_point: Code of weight zero, uint8, [out_features, num_groups]; None as in `soft_weight`.
        bias: Floating, [out_features].
        num_bits: Code width, 2 to 8.
        group_size: Columns that share a scale; -1 is the whole row; the last group may be short.
        table: Levels of a look-up grid in ascending order, floating, [2 ** num_bits]; None is uniform.
        is_reference: `frac` holds `frac_ref` (floating, or uint8 code u for (u - 63) / 126): the teacher's layer.
        strategy: "auto" | "fused" (the weight never reaches memory) | "materialise" (one layer, then cuBLAS).
        impl: "auto" | "reference" | "triton".

    Returns:
        Activation in x.dtype, [..., out_features].

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: A gradient of scale or table is asked for, impl="cpp", or float64 is to be fused
            on CUDA (Triton has no such matmul there).
        RuntimeError: The requested impl cannot run here.

    Note:
        Deterministic. Differentiable in x, a floating `frac` and bias. Products accumulate in float32
        (float64 for float64 x). With impl="reference" the strategy has no meaning.

    Source:
        DiscQuant, arXiv 2501.06417, definition of w^x.
    """
    check(_OP, q_down, frac, scale, zero_point, table, num_bits, group_size, None, is_reference)
    _check_x(_OP, "x", x, frac.shape[1])
    registry.require_tensors(_OP, bias=bias)
    registry.require_device(_OP, q_down, x=x, bias=bias)
    if bias is not None:
        registry.require(
            bias.shape == frac.shape[:1], _OP, "bias", "have shape", list(frac.shape[:1]), bias.shape
        )
    registry.require(strategy in STRATEGIES, _OP, "strategy", "be one of", STRATEGIES, strategy)
    if registry.choose(_OP, impl, x.device) == "reference":
        position = decode_frac_ref(frac, accumulate_dtype(frac, scale)) if is_reference else frac
        return reference.soft_linear(
            x,
            q_down,
            position,
            scale,
            zero_point,
            bias,
            num_bits=num_bits,
            group_size=group_size,
            table=table,
        )
    if strategy == "fused" and x.is_cuda and x.dtype == torch.float64:
        raise NotImplementedError(f"{_OP}: strategy must for float64 on CUDA be = 'materialise', got 'fused'")
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = registry.differentiable(
        SoftLinearFunction,
        flat,
        q_down,
        frac,
        scale,
        zero_point,
        table,
        bias,
        num_bits,
        group_size,
        is_reference,
        strategy,
    )
    return y.reshape(*x.shape[:-1], frac.shape[0])


def soft_linear_step_(
    grad_output: Tensor,
    x: Tensor,
    frac: Tensor,
    frac_ref: Tensor,
    scale: Tensor,
    *,
    group_size: int,
    options: StepOptions,
    momentum: Tensor | None = None,
    second_moment: Tensor | None = None,
    impl: str = "auto",
) -> StepCounts:
    """Projected step on the weight gradient dY^T x, which never reaches memory; uniform grids.

    Equal to `projected_step_(frac, frac_ref, dY^T x, scale, ...)` up to the order of the sum over tokens. All
    tokens of the step must be in x: the clamp acts on the whole gradient.

    Args:
        grad_output: Gradient of the layer's output, floating, [..., out_features].
        x: The layer's input, same dtype, [..., in_features].
        frac: Changed in place; see `projected_step_`.
        frac_ref: See `projected_step_`.
        scale: Grid step, [out_features, num_groups].
        group_size: Columns per group, -1 for the row.
        options: Scalars of the step.
        momentum: First moment; changed in place.
        second_moment: Second moment; changed in place.
        impl: "auto" | "reference" | "triton".

    Returns:
        StepCounts over this tensor.

    Raises:
        TypeError: An argument is not a Tensor.
        ValueError: Shapes, dtypes or devices disagree.
        NotImplementedError: float64 with impl="triton", or impl="cpp".
        RuntimeError: The requested impl cannot run here.

    Note:
        Opt-in: it saves memory (no gradient buffer), and time only where measured so.
    """
    op = "soft_linear_step_"
    check_state(op, frac, frac_ref, scale, momentum, second_moment, group_size, options)
    _check_x(op, "grad_output", grad_output, frac.shape[0])
    _check_x(op, "x", x, frac.shape[1])
    registry.require(
        x.dtype == grad_output.dtype, op, "x", "have the dtype of grad_output", grad_output.dtype, x.dtype
    )
    registry.require(
        x.shape[:-1] == grad_output.shape[:-1],
        op,
        "x",
        "have the tokens of grad_output",
        grad_output.shape[:-1],
        x.shape,
    )
    registry.require_device(op, frac, x=x, grad_output=grad_output)
    tensors = (grad_output, x, frac, frac_ref, scale, momentum, second_moment)
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    chosen = registry.choose(
        op, impl, frac.device, triton="float64, which only the reference computes in" if double else None
    )
    flat_y, flat_x = grad_output.reshape(-1, frac.shape[0]), x.reshape(-1, frac.shape[1])
    if chosen == "reference":
        return step_reference.projected_step_(
            frac, frac_ref, reference.weight_gradient(flat_y, flat_x), scale, group_size=group_size,
            options=options, momentum=momentum, second_moment=second_moment,
        )  # fmt: skip
    first = None if options.optimizer == "sgd" else momentum
    second = second_moment if options.optimizer == "adamw" else None
    with torch.no_grad():
        counts = _step_op(
            flat_y, flat_x, frac, frac_ref, scale, first, second, group_size, *flatten_options(options)
        )
    return StepCounts(*counts.tolist())
