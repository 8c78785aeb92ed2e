# SPDX-License-Identifier: Apache-2.0
"""`PackedLinear`: a linear layer whose only weight is its 3- or 4-bit codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.modules.served_weight import ServedWeight
from discquant.ops import _registry as registry
from discquant.ops import pack as packing
from discquant.ops.packed_linear import MODES, X_DTYPES, Mode, check_packed, dequantize_packed, packed_linear


def layout_for(device: torch.device) -> packing.Layout:
    """The layout that kernels of a device read: "cpu" on the CPU, "mma" elsewhere."""
    return "cpu" if device.type == "cpu" else "mma"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a linear layer on x; None where it is off or leaves x alone (float64)."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind) if x.dtype in X_DTYPES else None


def _load_kernels() -> None:
    """Load the extension now, if there is one: graphs that were traced elsewhere call its operators by name."""
    _extension.available()


def _check_bias(name: str, bias: object, out_features: int) -> None:
    """Refuse what is no bias of a layer of this size."""
    registry.require_given("PackedLinear", bias=bias)
    assert isinstance(bias, Tensor)
    registry.require(
        list(bias.shape) == [out_features], "PackedLinear", name, "have shape", [out_features], bias.shape
    )
    registry.require(
        bias.is_floating_point(), "PackedLinear", name, "have a dtype that is", "floating", bias.dtype
    )


class PackedLinear(nn.Module):
    """y = x W^T + bias with W = scale * (q - zero_point), straight from packed codes; inference only.

    Moving the module between CPU and GPU repacks the codes; casting it leaves the scales as they are. Under autocast x
    and bias take its dtype, as in nn.Linear.

    Attributes:
        words: Packed codes, int32, one dimension.
        scale: Packed grid step, floating, [padded rows / R, num_groups, R].
        zero_point: Packed codes of weight zero, uint8, same shape, or None.
        bias: [out_features] or None.
        compute_dtype: Of the activations that the layer is for; casts of the module change it.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, words: Tensor, scale: Tensor, zero_point: Tensor | None = None, bias: Tensor | None = None, *,
        out_features: int, in_features: int, num_bits: int, group_size: int, layout: packing.Layout,
        mode: Mode = "auto", compute_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Hold buffers that are packed already; `from_codes` packs."""
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"PackedLinear: mode must be one of = {list(MODES)}, got {mode!r}")
        self.out_features, self.in_features = out_features, in_features
        self.num_bits, self.group_size = num_bits, group_size
        self.layout: packing.Layout = layout
        self.mode: Mode = mode
        self.compute_dtype = compute_dtype or (scale if bias is None else bias).dtype
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)
        self._settled = False
        _load_kernels()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or a pickle in a process that made no module yet."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _load_kernels()

    @classmethod
    def from_codes(
        cls, q: Tensor, scale: Tensor, zero_point: Tensor | None = None, bias: Tensor | None = None, *,
        num_bits: int, group_size: int, device: torch.device | str | None = None, mode: Mode = "auto",
        compute_dtype: torch.dtype | None = None,
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
            compute_dtype: Of `weight`; None is the dtype of bias, else of scale.

        Returns:
            The module.

        Raises:
            TypeError: An argument is not a Tensor.
            ValueError: Shapes, dtypes or ranges disagree, a scale is not finite, or a bias is not floating.
        """
        registry.require_given("PackedLinear", q=q, scale=scale)
        registry.require_tensors("PackedLinear", zero_point=zero_point, bias=bias)
        target = q.device if device is None else torch.device(device)
        layout = layout_for(target)
        words = packing.pack(q, zero_point, num_bits=num_bits, group_size=group_size, layout=layout)
        groups = 1 if group_size == -1 else -(-q.shape[1] // group_size)
        if list(scale.shape) != [q.shape[0], groups]:
            raise ValueError(
                f"PackedLinear: scale must have shape = {[q.shape[0], groups]}, got {list(scale.shape)}"
            )
        if bias is not None:
            _check_bias("bias", bias, q.shape[0])
            bias = bias.detach().to(target).contiguous()
        zero = None if zero_point is None else packing.pack_groups(zero_point, layout=layout)
        module = cls(
            words.to(target), packing.pack_groups(scale, layout=layout).to(target),
            None if zero is None else zero.to(target), bias,
            out_features=q.shape[0], in_features=q.shape[1], num_bits=num_bits, group_size=group_size,
            layout=layout, mode=mode, compute_dtype=compute_dtype,
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
        x, bias = self._cast(x)
        return packed_linear(
            x, self.words, self.scale, self.zero_point, bias, out_features=self.out_features,
            in_features=self.in_features, num_bits=self.num_bits, group_size=self.group_size, layout=self.layout,
            mode=self.mode, settled=self._settled,
        )  # fmt: skip

    def forward_rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs `start` to `stop` of `forward`, from their rows alone where `start` is a multiple of 64."""
        if start % packing.BLOCK_ROWS:
            return self.forward(x)[..., start:stop]
        x, bias = self._cast(x)
        # Both layouts hold block after block of 64 rows.
        blocks = -(-self.out_features // packing.BLOCK_ROWS)
        first, last = start // packing.BLOCK_ROWS, -(-stop // packing.BLOCK_ROWS)

        def of_rows(buffer: Tensor) -> Tensor:
            each = buffer.shape[0] // blocks
            return buffer[first * each : last * each]

        return packed_linear(
            x, of_rows(self.words), of_rows(self.scale),
            None if self.zero_point is None else of_rows(self.zero_point),
            None if bias is None else bias[start:stop],
            out_features=stop - start, in_features=self.in_features, num_bits=self.num_bits,
            group_size=self.group_size, layout=self.layout, mode=self.mode, settled=self._settled,
        )  # fmt: skip

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x and the bias in the dtype that a dense layer would take them in."""
        dtype = autocast_dtype(x)
        if dtype is None:
            return x, self.bias
        return x.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def dequantize(self, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
        """The served weight or a range of its rows, [rows, in_features]; fresh full-size memory, not kept."""
        first, last = (0, self.out_features) if rows is None else rows
        begin = first // 16 * 16
        weight = dequantize_packed(
            self.words, self.scale, self.zero_point, out_features=self.out_features, in_features=self.in_features,
            num_bits=self.num_bits, group_size=self.group_size, layout=self.layout, dtype=dtype, rows=(begin, last),
        )  # fmt: skip
        return weight[first - begin :]

    @property
    def weight(self) -> Tensor:
        """The served weight in `compute_dtype`, [out_features, in_features], for models that read it themselves.

        Made anew at every read, which costs more than a forward: ask for `compute_dtype` or the sizes instead. It is no
        parameter and cannot be set; a write into it raises NotImplementedError
        (`ServedWeight`), but is lost in a compiled graph.
        """
        return self.weight_rows(0, self.out_features)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of `weight`."""
        known = self.compute_dtype in X_DTYPES  # else cast to float64, say, which no kernel computes in
        weight = self.dequantize(self.compute_dtype if known else torch.float32, (start, stop))
        weight = weight.to(self.compute_dtype)
        # Graphs of torch.compile take no such subclass.
        return weight if torch.compiler.is_compiling() else weight.as_subclass(ServedWeight)

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

    def get_extra_state(self) -> Tensor:
        """What a state dict must say besides the buffers, int64: version and code of the layout, sizes, grid.

        A tensor, so that safetensors can hold the whole state dict.
        """
        return torch.tensor([
            packing.LAYOUT_VERSION, packing.LAYOUT_CODES[self.layout], self.out_features, self.in_features,
            self.num_bits, self.group_size,
        ])  # fmt: skip

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: `_load_from_state_dict` has read it before any buffer was touched."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Check a state whole, bring it into the layout of the device it goes to, then let torch take it over.

        Raises:
            TypeError: A buffer is not a Tensor.
            ValueError: Another layout version, size, grid or dtype (scales are not rounded to this module's); a scale
                that is not finite; a zero point that is no code; some of the buffers without the others; zero points or
                a bias for a module that has none.
        """
        for name in ("zero_point", "bias"):
            if getattr(self, name) is None and prefix + name in state_dict:
                raise ValueError(
                    f"PackedLinear: the loaded state must hold no = {name}, which this module has not"
                )
        names = [name for name in ("words", "scale", "zero_point") if getattr(self, name) is not None]
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if not found:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            return
        if len(found) < len(names):
            raise ValueError(f"PackedLinear: the loaded state must hold = {names}, got {list(found)}")
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        layout = self._stated_layout(state_dict.get(f"{prefix}_extra_state"))
        self._check_loaded(found, layout, assign)
        if f"{prefix}bias" in state_dict:
            _check_bias("bias of the loaded state", state_dict[f"{prefix}bias"], self.out_features)
        home = (found["words"] if assign else self.words).device
        target = layout if home.type == "meta" else layout_for(home)
        ours = {prefix + name: self._in_layout(name, t, layout, target) for name, t in found.items()}
        if f"{prefix}bias" in state_dict:
            ours[f"{prefix}bias"] = state_dict[f"{prefix}bias"].contiguous()
        super()._load_from_state_dict({**state_dict, **ours}, prefix, local_metadata, *args)
        self.layout = target
        self._settled = False

    def _stated_layout(self, extra: Tensor | None) -> packing.Layout:
        """The layout that the extra state names; without one, this module's."""
        if extra is None:
            return self.layout
        mine = self.get_extra_state().tolist()
        if not isinstance(extra, Tensor) or extra.dtype != torch.int64 or extra.numel() != len(mine):
            kind = f"{extra.dtype} {list(extra.shape)}" if isinstance(extra, Tensor) else type(extra).__name__
            raise ValueError(f"PackedLinear: extra state must be = int64 [{len(mine)}], got {kind}")
        keys = ("layout_version", "layout", "out_features", "in_features", "num_bits", "group_size")
        stated = dict(zip(keys, extra.tolist(), strict=True))
        names: dict[int, packing.Layout] = {code: name for name, code in packing.LAYOUT_CODES.items()}
        for key, value in zip(keys, mine, strict=True):
            expected = list(names) if key == "layout" else [value]
            if stated[key] not in expected:
                wanted = expected if key == "layout" else value
                raise ValueError(
                    f"PackedLinear: {key} of the loaded state must be = {wanted}, got {stated[key]}"
                )
        return names[stated["layout"]]

    def _check_loaded(self, found: Mapping[str, Tensor], layout: packing.Layout, assign: bool) -> None:
        """Refuse buffers that are not a weight of this module's size and grid."""
        zero_point = found.get("zero_point")
        check_packed(
            "PackedLinear", found["words"], found["scale"], zero_point, self.out_features, self.in_features,
            self.num_bits, self.group_size, layout,
        )  # fmt: skip
        scale = found["scale"]
        if not assign and scale.dtype != self.scale.dtype:
            raise ValueError(
                f"PackedLinear: scale of the loaded state must have dtype = {self.scale.dtype}, got {scale.dtype}"
            )
        if scale.device.type == "meta":
            return
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("PackedLinear: scale of the loaded state must be = finite, got NaN or infinity")
        largest = 0 if zero_point is None or not zero_point.numel() else int(zero_point.max())
        if largest >= 2**self.num_bits:
            raise ValueError(
                f"PackedLinear: zero_point of the loaded state must be below = {2**self.num_bits}, got {largest}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.words.device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        if scale.is_meta and device.type != "meta":
            # Memory without values (`to_empty`), for a state to come: there is nothing to bring into another layout.
            self.layout = layout_for(device)
            side = packing.SCALE_ROWS[self.layout]
            shape = (scale.shape[0] * scale.shape[2] // side, scale.shape[1], side)
            self.scale = torch.empty(shape, dtype=scale.dtype, device=device)
            if self.zero_point is not None:
                self.zero_point = torch.empty(shape, dtype=torch.uint8, device=device)
            self._settled = False
            return self
        # A cast of the model must not round the scales a second time: only the device is taken over.
        self.scale = scale.to(device)
        self._relayout()
        self.settle()
        return self

    def _relayout(self) -> None:
        """Bring the buffers into the layout of the device they are on."""
        if self.words.device.type == "meta":
            return
        layout = layout_for(self.words.device)
        for name in ("words", "scale", "zero_point"):
            buffer = getattr(self, name)
            setattr(
                self, name, None if buffer is None else self._in_layout(name, buffer, self.layout, layout)
            )
        self.layout = layout

    def _in_layout(
        self, name: str, buffer: Tensor, layout: packing.Layout, new_layout: packing.Layout
    ) -> Tensor:
        """A buffer of `layout` in `new_layout`."""
        if layout == new_layout:
            return buffer
        if name == "words":
            return packing.repack(
                buffer, out_features=self.out_features, in_features=self.in_features, num_bits=self.num_bits,
                layout=layout, new_layout=new_layout,
            )  # fmt: skip
        plain = packing.unpack_groups(buffer, out_features=self.out_features)
        return packing.pack_groups(plain, layout=new_layout)
