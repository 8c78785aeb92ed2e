# SPDX-License-Identifier: Apache-2.0
"""`AutoModelForCausalLM.from_pretrained` onto packed layers.

`register()` makes transformers load compressed-tensors, GPTQ, AutoRound and AWQ folders onto `PackedLinear` in this
process; `unregister()` gives them back to their own loaders.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discquant.errors import CheckpointError, ConfigError, either
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.codes import QuantizedLinear
from discquant.formats.load_experts import Experts
from discquant.formats.load_packed import keep_apart, packable, refuse_saving
from discquant.modules import is_replaceable, load_packed
from discquant.ops.packed_linear import MODES, X_DTYPES, modes_on

NAME = "discquant"
TAKEN_OVER = ("compressed-tensors", "gptq", "auto-round", "awq")
_before: dict[str, tuple[Any, Any]] = {}


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The configuration and the quantizer, made when transformers is first needed."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class DiscquantConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """Whatever a folder's quantization_config says, and `mode` (see `discquant.load`)."""

        def __init__(self, quant_method: str = NAME, mode: str = "exact", **said: Any) -> None:
            """Take what is said.

            Raises:
                ConfigError: An unknown mode.
            """
            if mode not in (*MODES, "plain"):
                raise ConfigError(f"discquant: mode must be one of {either((*MODES, 'plain'))}, got {mode!r}")
            self.quant_method = quant_method
            self.mode = mode
            for key, value in said.items():
                setattr(self, key, value)

    class DiscquantQuantizer(HfQuantizer):  # type: ignore[misc]
        """Leaves the weights of quantized layers out of the model, then packs them one by one from the file."""

        requires_calibration = True  # only folders that are quantized already can be loaded

        def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
            """Refuse what the packed layers cannot do.

            Raises:
                NotImplementedError: Layers spread over devices or disk.
            """
            if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
                raise NotImplementedError(
                    f"discquant: device_map must name one device, got {sorted(map(str, device_map.values()))}"
                )

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: Any = None, dtype: Any = None, **kwargs: Any
        ) -> None:
            if not checkpoint_files:
                raise CheckpointError("discquant: transformers names no weight files to load from")
            self.folder = Path(checkpoint_files[0]).parent
            self.dtype = dtype
            # transformers builds the model where tensors have no values; those of the file must have some, and those
            # of modules that are first imported here.
            with torch.device("cpu"):
                self.format = registry.find(self.folder)
                self.shapes = {row.name: row.shape for row in self.format.describe(self.folder).layers}
                experts = self.experts = Experts(
                    model, dtype=dtype or torch.float32, device=None, mode="exact"
                )
            unread = set(model._keys_to_ignore_on_load_unexpected or ())
            for name, shape in self.shapes.items():
                if name in experts.names:
                    continue  # their shapes are checked when they are read
                module = _linear(model, name)
                if tuple(module.weight.shape) != shape:
                    raise CheckpointError(
                        f"discquant: {name} is {list(shape)} in the file, {list(module.weight.shape)} in the model"
                    )
                module.register_parameter("weight", None)
                vars(module)["weight"] = _stand_in(shape)
                # What the file holds of this layer is read below, not by transformers; its bias is.
                unread.add(rf"^{re.escape(name)}\.(?!bias$)")
            fused, self.plain_experts = experts.around(self.shapes)
            self.fused = {place: model.get_submodule(place[0]).get_parameter(place[1]) for place in fused}
            for (owner, key), parameter in self.fused.items():
                model.get_submodule(owner).register_parameter(key, None)
                vars(model.get_submodule(owner))[key] = _stand_in(parameter.shape)
                unread.add(rf"^{re.escape(owner)}\.")
            model._keys_to_ignore_on_load_unexpected = unread
            keep_apart(model, self.shapes)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            device = next(model.parameters()).device
            dtype = self.dtype or next(model.parameters()).dtype
            mode: Any = getattr(self.quantization_config, "mode", "exact")
            known = (*modes_on(device), "plain")
            if mode not in known:
                raise ConfigError(
                    f"discquant: mode on {device} must be one of {either(known)}, got {mode!r} (for the CPU)"
                )
            plain = mode == "plain" or dtype not in X_DTYPES
            for (owner, key), parameter in self.fused.items():
                module = model.get_submodule(owner)
                del vars(module)[key]
                module.register_parameter(key, nn.Parameter(parameter.to("meta"), requires_grad=False))
            experts = self.experts
            experts.dtype, experts.device, experts.mode = dtype, device, mode
            for name in self.plain_experts:
                experts.add(name, Checkpoint(self.folder).read(f"{name}.weight").to(device, dtype))
            for name, shape in self.shapes.items():
                if name in experts.names:
                    continue
                hollow = nn.Parameter(torch.empty(shape, device="meta", dtype=dtype), requires_grad=False)
                module = _linear(model, name)
                del vars(module)["weight"]
                module.register_parameter("weight", hollow)

            def layers() -> Iterator[QuantizedLinear]:
                for layer in self.format.read(self.folder):
                    if layer.name in experts.names:
                        codes = None if plain else packable(layer)
                        experts.add(layer.name, codes or layer.dequantize(dtype).to(device))
                        continue
                    own = not is_replaceable(_linear(model, layer.name))  # its forward or hooks would be lost
                    codes = None if plain or own else packable(layer)
                    if codes is not None:
                        yield codes
                        continue
                    weight = layer.dequantize(dtype).to(device)
                    _linear(model, layer.name).weight = nn.Parameter(weight, requires_grad=False)

            # "exact" promises the rounded model's logits; fused rows may be summed in another order.
            report = load_packed(model, layers(), device=device, mode=mode, fuse=mode != "exact")
            model.packed_report = experts.added_to(report, len(self.shapes))
            for child in model.children():  # of the whole model transformers refuses it
                refuse_saving(child, self.folder)
            return model.requires_grad_(False)

        def is_serializable(self) -> bool:
            """The folder it came from is the file to keep."""
            return False

        @property
        def is_trainable(self) -> bool:
            """Packed codes have no gradient."""
            return False

    return DiscquantConfig, DiscquantQuantizer


def _stand_in(shape: tuple[int, ...]) -> Tensor:
    """What is in place of a weight: not of the state dict, but there, for models initialise layers by their names."""
    stand_in = torch.empty(shape, device="meta")
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    return stand_in


def _linear(model: nn.Module, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(
            f"discquant: the model has no layer {name}, which the file quantizes"
        ) from error
    if not isinstance(module, nn.Linear):
        raise CheckpointError(f"discquant: {name} must be an nn.Linear, got {type(module).__name__}")
    return module


def register(take_over: Iterable[str] = TAKEN_OVER) -> None:
    """Let transformers load quantized folders onto packed layers, in this process.

    Args:
        take_over: `quant_method`s whose folders go onto packed layers from now on; besides, `discquant` is known as a
            method of its own, for a configuration that is changed by hand.

    Raises:
        ConfigError: A method that has no packed layers.

    Note:
        Calling it again changes nothing. Any `quantization_config` of these methods is then ours: extra entries are
        kept, and `mode` chooses the kernels as in `discquant.load`.
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    methods = (take_over,) if isinstance(take_over, str) else tuple(take_over)
    if unknown := [method for method in methods if method not in TAKEN_OVER]:
        raise ConfigError(f"register: take_over must be of {either(TAKEN_OVER)}, got {unknown[0]!r}")
    config, quantizer = _classes()
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(NAME)(config)
        register_quantizer(NAME)(quantizer)
    for method in methods:
        if AUTO_QUANTIZER_MAPPING.get(method) is quantizer:
            continue
        _before[method] = (AUTO_QUANTIZATION_CONFIG_MAPPING.get(method), AUTO_QUANTIZER_MAPPING.get(method))
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
        AUTO_QUANTIZER_MAPPING[method] = quantizer


def unregister() -> None:
    """Give the methods back to transformers' own loaders."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for method, (config, quantizer) in _before.items():
        for mapping, value in (
            (AUTO_QUANTIZATION_CONFIG_MAPPING, config),
            (AUTO_QUANTIZER_MAPPING, quantizer),
        ):
            if value is None:
                mapping.pop(method, None)
            else:
                mapping[method] = value
    _before.clear()
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(NAME, None)
    AUTO_QUANTIZER_MAPPING.pop(NAME, None)
