# SPDX-License-Identifier: Apache-2.0
"""A vLLM plug-in (entry point group `vllm.general_plugins`): `vllm serve FOLDER --quantization discquant`.

Reads the compressed-tensors folders that `discquant quantize` writes and multiplies with our packed kernels. vLLM's own
kernels read the same folders without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from discquant.formats.bitstream import unpack
from discquant.formats.compressed_tensors import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    act_order,
    activations,
    parse_config,
)
from discquant.formats.patterns import matches
from discquant.formats.scheme import Scheme
from discquant.modules import PackedLinear

NAME = "discquant"
SOURCE = "compressed-tensors"
MIN_CAPABILITY = 80
_EXPERTS = {"FusedMoE", "RoutedExperts"}  # what vLLM calls the experts of a block
_registered: list[type] = []


def register() -> None:
    """Make `--quantization discquant` known to vLLM. vLLM calls it in every process; again changes nothing."""
    if _registered:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    _registered.append(register_quantization_config(NAME)(_config_class(_method_class())))


def _config_class(method: Any) -> type:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class DiscquantConfig(QuantizationConfig):  # type: ignore[misc]
        """Schemes of a folder's quantization_config."""

        def __init__(self, said: Mapping[str, Any]) -> None:
            super().__init__()
            self.scheme_of = parse_config(said, "config.json")
            if activations(said):
                raise _refused(
                    f"activations are quantized too ({activations(said)}), which our kernels do not do"
                )
            if act_order(said):
                raise _refused(
                    "columns have their scales by act-order (weight_g_idx), which our kernels do not do"
                )
            self.ignore = tuple(str(name) for name in said.get("ignore") or ())

        @classmethod
        def get_name(cls) -> str:
            """Name on the command line."""
            return NAME

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            """Dtypes that the kernels multiply in."""
            return [torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            """Oldest compute capability."""
            return MIN_CAPABILITY

        @staticmethod
        def get_config_filenames() -> list[str]:
            """Everything stands in config.json."""
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> DiscquantConfig:
            """Read a folder's quantization_config."""
            return cls(config)

        @classmethod
        def override_quantization_method(
            cls, said: dict[str, Any], wanted: str | None, *more: Any
        ) -> str | None:
            """Take a compressed-tensors folder over only when asked to."""
            return NAME if wanted == NAME and said.get("quant_method") == SOURCE else None

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            """Packed layers where the folder is quantized, vLLM's plain ones elsewhere."""
            if not isinstance(layer, LinearBase):
                # By name: the classes have moved between vLLM's releases.
                if _EXPERTS & {base.__name__ for base in type(layer).__mro__} and not self._is_plain(
                    prefix, inside=True
                ):
                    raise _refused(f"{prefix} is a mixture of experts, which our kernels do not multiply")
                return None
            # vLLM fuses q, k, v and gate, up; the folder names the parts.
            parent, dot, last = prefix.rpartition(".")
            parts = getattr(self, "packed_modules_mapping", {}).get(last, [last])
            names = [f"{parent}{dot}{part}" for part in parts]
            left = [self._is_plain(name) for name in names]
            schemes = {self.scheme_of(name) for name, plain in zip(names, left, strict=True) if not plain}
            if not schemes:
                return UnquantizedLinearMethod()
            if any(left) or len(schemes) > 1:
                raise ValueError(f"discquant: {', '.join(names)} are fused and must share one grid")
            return method(schemes.pop())

        def _is_plain(self, name: str, *, inside: bool = False) -> bool:
            """Whether the folder ignores a module, by its name, the end of it or a pattern; or one `inside` it."""
            return any(
                (inside and other.startswith(f"{name}."))
                or (matches(other[3:], name) if other.startswith("re:") else f".{name}".endswith(f".{other}"))
                for other in self.ignore
            )

    return DiscquantConfig


def _method_class() -> Any:
    from vllm.model_executor.layers.linear import (
        LinearMethodBase,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.parameter import (
        BasevLLMParameter,
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        PackedvLLMParameter,
    )

    @register_weight_loader_v2_supported_method
    class DiscquantLinearMethod(LinearMethodBase):  # type: ignore[misc]
        """One linear layer: parameters as the file has them, repacked for our kernels after loading."""

        def __init__(self, scheme: Scheme) -> None:
            check_scheme(scheme)
            self.scheme = scheme

        def create_weights(
            self,
            layer: Any,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra: Any,
        ) -> None:
            """Register the tensors of the checkpoint on the layer."""
            rows, columns, bits = sum(output_partition_sizes), input_size_per_partition, self.scheme.num_bits
            size = self.scheme.group_size
            if columns % 32 or (size > 0 and columns % size):
                raise ValueError(
                    f"discquant: a partition of {columns} columns must be a multiple of 32 and of the group {size}"
                )
            groups = 1 if size == -1 else columns // size
            loader = extra.get("weight_loader")
            layer.register_parameter(
                PACKED,
                PackedvLLMParameter(
                    data=torch.empty(rows, columns * bits // 32, dtype=torch.int32),
                    input_dim=1, output_dim=0, packed_dim=1, packed_factor=Fraction(32, bits),
                    weight_loader=_dense(loader, input_size * bits // 32),
                ),
            )  # fmt: skip
            scales = torch.empty(rows, groups, dtype=params_dtype)
            if size == -1:
                # One scale per row belongs to every part of a row that is cut across ranks.
                scale = ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=loader)
            else:
                scale = GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=loader)
            layer.register_parameter(SCALE, scale)
            if not self.scheme.symmetric:
                layer.register_parameter(
                    ZERO,
                    PackedvLLMParameter(
                        data=torch.empty(rows * bits // 32, groups, dtype=torch.int32),
                        input_dim=1, output_dim=0, packed_dim=0, packed_factor=Fraction(32, bits),
                        weight_loader=_dense(loader),
                    ),
                )  # fmt: skip
            layer.register_parameter(
                SHAPE, BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=loader)
            )
            layer.discquant_columns = columns

        def process_weights_after_loading(self, layer: Any) -> None:
            """Turn the loaded tensors into one packed layer and drop them."""
            layer.discquant = pack_layer(
                getattr(layer, PACKED).data,
                getattr(layer, SCALE).data,
                getattr(layer, ZERO).data if hasattr(layer, ZERO) else None,
                layer.discquant_columns,
                self.scheme,
            )
            for name in (PACKED, SCALE, ZERO, SHAPE):
                if hasattr(layer, name):
                    delattr(layer, name)

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """Multiply x [..., in_features] by the weight."""
            out: Tensor = layer.discquant(x)
            return out if bias is None else out + bias

    return DiscquantLinearMethod


def _refused(reason: str) -> NotImplementedError:
    return NotImplementedError(f"discquant: {reason}; leave --quantization {NAME} out")


def _dense(loader: Any, words: int | None = None) -> Any:
    """vLLM's loader of a packed parameter, held to the layout of today: vLLM would cut an older one to size.

    Args:
        loader: Called with parameter, loaded tensor and whatever else vLLM gives.
        words: Words of a whole row of codes; None for zero points, which older files hold as single bytes.

    Returns:
        The same loader, which raises NotImplementedError for the layout before compressed-tensors 0.18.
    """

    def load(parameter: Any, loaded: Tensor, *more: Any, **options: Any) -> Any:
        if loaded.dtype != torch.int32 or words not in (None, loaded.shape[1]):
            raise _refused(
                f"{loaded.dtype} {list(loaded.shape)} is in the layout of compressed-tensors before 0.18"
            )
        return loader(parameter, loaded, *more, **options)

    return load


def check_scheme(scheme: Scheme) -> None:
    """Refuse what the packed kernels do not multiply.

    Raises:
        NotImplementedError: Another width or kind of grid.
    """
    if scheme.kind != "int" or scheme.num_bits not in (3, 4):
        raise _refused(f"packed kernels take integers of 3 and 4 bits, got {scheme}")


def pack_layer(
    words: Tensor, scale: Tensor, zero_words: Tensor | None, columns: int, scheme: Scheme
) -> PackedLinear:
    """Build a packed layer from the tensors of a compressed-tensors file.

    Args:
        words: Codes, int32, [rows, columns * bits / 32].
        scale: [rows, num_groups].
        zero_words: Zero points packed along the rows, int32, [rows * bits / 32, num_groups], or None.
        columns: in_features of this partition.
        scheme: Layout.

    Returns:
        The layer, on the device of the words.
    """
    rows = words.shape[0]
    q = unpack(words, scheme.num_bits, columns)
    zero = None if zero_words is None else unpack(zero_words, scheme.num_bits, rows, dim=0)
    return PackedLinear.from_codes(
        q,
        scale.cpu(),
        zero,
        num_bits=scheme.num_bits,
        group_size=scheme.group_size,
        device=words.device,
        mode="auto",
    )
