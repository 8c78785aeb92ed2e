# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint as a transformers model on packed layers; no full-precision copy of a weight survives.

The model is built without weights; its other tensors are read one by one, then one quantized layer at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from discquant.errors import CheckpointError
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.load_experts import Experts, renamed
from discquant.formats.safetensors_format import SafetensorsFormat, inert
from discquant.formats.source import BUILDING
from discquant.grids import UniformGrid
from discquant.modules import PackedReport, is_replaceable, load_packed
from discquant.ops.pack import SCALE_DTYPES
from discquant.ops.packed_linear import X_DTYPES, Mode

logger = logging.getLogger(__name__)


def packable(layer: CodedLayer) -> QuantizedLinear | None:
    """The layer as the kernels take it, or None: other widths, groups or grids stay ordinary weights."""
    grid = layer.grid
    if not isinstance(grid, UniformGrid) or grid.g_idx is not None:
        return None
    groups = grid.group_size in (-1, 32, 64) or grid.group_size % 128 == 0
    if grid.num_bits not in (3, 4) or not groups or grid.scale.dtype not in SCALE_DTYPES:
        return None
    if grid.zero_point is not None and bool((grid.zero_point >= 1 << grid.num_bits).any()):
        return None  # files of GPTQ's first version can say so
    return layer.linear()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds inside have parameters without memory; buffers (rotary tables) are as always."""
    here = threading.get_ident()

    # torch calls it for the modules of all threads.
    def hollow(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != here or param.device.type == "meta":
            return None
        return nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    # One at a time: a thread that walks several hooks would stumble over one that goes.
    with BUILDING:
        hook = register_module_parameter_registration_hook(hollow)  # type: ignore[arg-type]
        try:
            yield
        finally:
            hook.remove()


def _widen(model: Any, names: Iterable[str], dtype: torch.dtype) -> set[str]:
    """Make float32 what transformers keeps so in a model of `dtype`; the names of all such tensors."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern = build_glob_alternation(list(plan))[0]
    wide = {name for name in names if pattern.search(name)}
    for name in wide:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        value = getattr(module, leaf).float()
        if leaf in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)
    return wide


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter or buffer `name` of the model, in the dtype that it has there."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    there = getattr(module, leaf)
    if list(there.shape) != list(value.shape):
        raise CheckpointError(
            f"{name} has the shape {list(value.shape)}, the model makes it {list(there.shape)}"
        )
    value = value.to(there.dtype)
    if leaf in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def load_packed_model(
    path: str | Path, dtype: torch.dtype | None = None, *, mode: Mode = "exact", fuse: bool | None = None,
    device: torch.device | str | None = None, trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """Put an exported model on packed layers.

    Args:
        path: A directory in one of the formats of safetensors files.
        dtype: Compute dtype; None takes the one that config.json names, else float32.
        mode: As for `packed_linear`; "exact" computes what `load_quantized` computes.
        fuse: Compute q/k/v and gate/up of a block together; None does so in all modes but "exact", whose matmul could
            sum in another order on more rows.
        device: None is the CPU.
        trust_remote_code: Passed to transformers.

    Returns:
        The model in evaluation mode, with its `PackedReport` as `packed_report` and a `save_pretrained` that refuses
        (NotImplementedError), as those of the models inside it do; None if the file is of another kind, the kernels do
        not compute in the dtype (float64), or a tensor of it has no place of its own in the model (experts that
        `PackedExperts` does not stand for, say), which a warning says: that model needs plain weights.

    Raises:
        MissingModelError, CheckpointError: The directory cannot be read, or does not fill the model.
        NotImplementedError: It is quantized in a way that is not read.
    """
    import transformers

    from discquant.formats.load import forget_quantization, note_beyond, take_generation_settings
    from discquant.formats.registry import find

    folder = Path(path)
    found = find(folder)
    checkpoint = Checkpoint(folder)
    if not isinstance(found, SafetensorsFormat):
        return None
    stored = list(found.layers(checkpoint))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    forget_quantization(config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None or dtype not in X_DTYPES:
        return None
    with _parameters_on_meta():
        model: Any = model_class._from_config(config, dtype=dtype)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    # Kernels read their own layout, made where the codes are; everything else moves at the end.
    target = torch.device(device) if device is not None else None
    experts = Experts(model, dtype=dtype, device=target, mode=mode)
    # The model's names of what has others in the file.
    plain = found.plain(checkpoint, stored)
    place = renamed(model, [*plain, *(f"{layer.name}.weight" for layer in stored)])
    coded = [layer.name for layer in stored]
    of_layer = {
        name: place[f"{name}.weight"][: -len(".weight")] for name in coded if f"{name}.weight" in place
    }

    def of_experts(key: str) -> bool:
        return key.endswith(".weight") and key.removesuffix(".weight") in experts.names

    def unknown(key: str) -> bool:
        return not (key in place or of_experts(key) or inert(key, functools.partial(checkpoint.read, key)))

    strange = [name for name in coded if of_layer.get(name) not in linear and name not in experts.names]
    strange += filter(unknown, plain)
    wide = _widen(model, names, dtype)
    kept_wide = [name for name, own in of_layer.items() if f"{own}.weight" in wide]
    if strange or kept_wide:
        own_place = f"{strange[0]} has no place of its own in it" if strange else ""
        _note_plain(path, model, own_place or f"{kept_wide[0]} is kept in float32")
        return None
    for layer in stored:
        if layer.name in experts.names:
            shape = experts.shape(layer.name)
        else:
            shape = tuple(model.get_submodule(of_layer[layer.name]).weight.shape)
        if shape != tuple(layer.shape):
            raise CheckpointError(
                f"{path}: {layer.name} has the shape {list(layer.shape)}, config.json makes it {list(shape)}"
            )
    # A head of its own in a file whose configuration ties it: tying would drop it.
    in_file = {place[key]: key for key in plain if key in place}
    for pair in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if set(pair) <= set(in_file) and not torch.equal(*(checkpoint.read(in_file[key]) for key in pair)):
            _note_plain(path, model, f"config.json ties {pair[0]}, which the file holds apart")
            return None
    note_beyond(found, checkpoint)
    for key in plain:
        if key in place:
            _put(model, place[key], checkpoint.read(key))
        elif of_experts(key) and key.removesuffix(".weight") not in coded:
            experts.add(key.removesuffix(".weight"), checkpoint.read(key).to(dtype))

    def layers() -> Iterator[QuantizedLinear]:
        for entry in stored:
            layer = found.decoded(entry)
            if entry.name in experts.names:
                experts.add(entry.name, packable(layer) or layer.dequantize(dtype))
                continue
            own = of_layer[entry.name]
            # A forward of its own or a hook would be lost with the layer.
            codes = packable(layer) if is_replaceable(model.get_submodule(own)) else None
            if codes is None:
                _put(model, f"{own}.weight", layer.dequantize(dtype))
            else:
                yield codes if codes.name == own else dataclasses.replace(codes, name=own)

    report: PackedReport = load_packed(
        model, layers(), device=target, mode=mode, fuse=mode != "exact" if fuse is None else fuse
    )
    report = experts.added_to(report, len(stored))
    keep_apart(model, set(of_layer.values()))
    model.tie_weights(recompute_mapping=False)
    hollow = sorted(name for name, value in model.state_dict().items() if _is_meta(value))
    if hollow:
        raise CheckpointError(f"{path} does not fill {type(model).__name__}: {hollow[:8]} missing")
    take_generation_settings(model, folder)
    model.packed_report = report
    refuse_saving(model, folder)
    return (model if target is None else model.to(target)).eval()


def _note_plain(path: str | Path, model: nn.Module, why: str) -> None:
    logger.warning("note: %s: %s takes plain weights, not packed ones: %s", path, type(model).__name__, why)


def keep_apart(model: Any, quantized: Collection[str]) -> None:
    """Let no quantized layer be tied, whatever config.json says: its weight is in the file."""
    for target in list(model.all_tied_weights_keys):
        if target.removesuffix(".weight") in quantized:
            del model.all_tied_weights_keys[target]


def refuse_saving(model: nn.Module, folder: Path) -> None:
    """Let `save_pretrained` of a packed model that came from `folder` refuse, and those of the models inside it."""
    import transformers

    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.save_pretrained = functools.partial(_refuse_saving, str(folder))


def _refuse_saving(folder: str, *args: Any, **kwargs: Any) -> None:
    # transformers would write packed words under the names of weights, and later make new weights in their place.
    raise NotImplementedError(
        f"save_pretrained: a model on packed layers is not written; copy {folder}, or load it with "
        "discquant.load(..., mode='plain')"
    )


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"
