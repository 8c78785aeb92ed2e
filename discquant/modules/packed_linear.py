# SPDX-License-Identifier: Apache-2.0
"""`PackedLinear`: a linear layer whose only weight is its 3- or 4-bit codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from discquant.ops import pack as packing
from discquant.ops.packed_linear import MODES, Mode, dequantize_packed, packed_linear


def layout_for(device: torch.device) -> packing.Layout:
    """The layout that kernels of a device read: "cpu" on the CPU, "mma" elsewhere."""
    return "cpu" if device.type == "cpu" else "mma"


class PackedLinear(nn.Module):
    """y = x W^T + bias with W = scale * (q - zero_point), straight from packed codes; inference only.

    Moving the module between CPU and GPU repacks the codes; casting it leaves the scales as they are.

    Attributes:
        words: Packed codes, int32, one dimension.
        scale: Packed grid step, floating, [padded rows / R, num_groups, R].
        zero_point: Packed codes of weight zero, uint8, same shape, or None.
        bias: [out_features] or None.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, words: Tensor, scale: Tensor, zero_point: Tensor | None = None, bias: Tensor | None = None, *,
        out_features: int, in_features: int, num_bits: int, group_size: int, layout: packing.Layout,
        mode: Mode = "auto",
    ) -> None:  # fmt: skip
        """Hold buffers that are packed already; `from_codes` packs."""
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"PackedLinear: mode must be one of = {list(MODES)}, got {mode!r}")
        self.out_features, self.in_features = out_features, in_features
        self.num_bits, self.group_size = num_bits, group_size
        self.layout: packing.Layout = layout
        self.mode: Mode = mode
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)
        self._settled = False

    @classmethod
    def from_codes(
        cls, q: Tensor, scale: Tensor, zero_point: Tensor | None = None, bias: Tensor | None = None, *,
        num_bits: int, group_size: int, device: torch.device | str | None = None, mode: Mode = "auto",
    ) -> PackedLinear:  # fmt: skip
        """Pack codes.

        Args:
            q: Codes below 2 ** num_bits, uint8, [out_features, in_features].
            scale: Grid step in weight units, float32, float16 or bfloat16, [out_features, num_groups].
            zero_point: Codes of weight zero, uint8, [out_features, num_groups]; None is 2 ** (num_bits - 1).
            bias: [out_features] or None.
            num_bits: 3 or 4.
            group_size: Columns that share a scale: 32, 64, a multiple of 128, or -1 for the row.
            device: Where the module lives; None is the device of q.
            mode: As for `packed_linear`.

        Returns:
            The module.

        Raises:
            TypeError: An argument is not a Tensor.
            ValueError: Shapes, dtypes or ranges disagree, or a scale is not finite.
        """
        target = q.device if device is None else torch.device(device)
        layout = layout_for(target)
        words = packing.pack(q, zero_point, num_bits=num_bits, group_size=group_size, layout=layout)
        groups = 1 if group_size == -1 else -(-q.shape[1] // group_size)
        if list(scale.shape) != [q.shape[0], groups]:
            raise ValueError(
                f"PackedLinear: scale must have shape = {[q.shape[0], groups]}, got {list(scale.shape)}"
            )
        zero = None if zero_point is None else packing.pack_groups(zero_point, layout=layout)
        module = cls(
            words.to(target), packing.pack_groups(scale, layout=layout).to(target),
            None if zero is None else zero.to(target), None if bias is None else bias.detach().to(target),
            out_features=q.shape[0], in_features=q.shape[1], num_bits=num_bits, group_size=group_size,
            layout=layout, mode=mode,
        )  # fmt: skip
        module.settle()
        return module

    def settle(self) -> None:
        """Wait until the buffers are written; from then on kernels may read them ahead of time.

        Call it after a write to the buffers from outside; moving the module and `from_codes` do it themselves.
        """
        if self.words.device.type == "cuda":
            torch.cuda.synchronize(self.words.device)
        self._settled = True

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in_features] by the weight."""
        return packed_linear(
            x, self.words, self.scale, self.zero_point, self.bias, out_features=self.out_features,
            in_features=self.in_features, num_bits=self.num_bits, group_size=self.group_size, layout=self.layout,
            mode=self.mode, settled=self._settled,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The served weight, [out_features, in_features]; a fresh full-size tensor, not kept."""
        return dequantize_packed(
            self.words, self.scale, self.zero_point, out_features=self.out_features, in_features=self.in_features,
            num_bits=self.num_bits, group_size=self.group_size, layout=self.layout, dtype=dtype,
        )  # fmt: skip

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales, zero points and bias."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Sizes and grid."""
        grid = f"num_bits={self.num_bits}, group_size={self.group_size}, symmetric={self.zero_point is None}"
        sizes = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{sizes}, {grid}, layout={self.layout}, mode={self.mode}"

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict must say besides the buffers."""
        return {
            "layout_version": packing.LAYOUT_VERSION, "layout": self.layout, "out_features": self.out_features,
            "in_features": self.in_features, "num_bits": self.num_bits, "group_size": self.group_size,
        }  # fmt: skip

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check that a loaded state fits this module; buffers of the other layout are repacked.

        Raises:
            ValueError: Another layout version, size or grid; a scale that is not finite.
        """
        if self.scale.device.type != "meta" and not bool(torch.isfinite(self.scale).all()):
            raise ValueError("PackedLinear: scale of the loaded state must be = finite, got NaN or infinity")
        for key, mine in self.get_extra_state().items():
            if key != "layout" and state.get(key) != mine:
                raise ValueError(
                    f"PackedLinear: {key} of the loaded state must be = {mine}, got {state.get(key)}"
                )
        self.layout = state["layout"]
        self._settled = False
        self._relayout()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A cast of the model must not round the scales a second time: only the device is taken over.
        self.scale = scale.to(self.words.device)
        self._relayout()
        self.settle()
        return self

    def _relayout(self) -> None:
        """Bring the buffers into the layout of the device they are on."""
        layout = layout_for(self.words.device)
        if layout == self.layout or self.words.device.type == "meta":
            return
        self.words = packing.repack(
            self.words, out_features=self.out_features, in_features=self.in_features, num_bits=self.num_bits,
            layout=self.layout, new_layout=layout,
        )  # fmt: skip
        for name in ("scale", "zero_point"):
            packed = getattr(self, name)
            if packed is not None:
                plain = packing.unpack_groups(packed, out_features=self.out_features)
                setattr(self, name, packing.pack_groups(plain, layout=layout))
        self.layout = layout
