# SPDX-License-Identifier: Apache-2.0
"""A model whose blocks' matrices stay in the checkpoint: they are read when a block runs and dropped after it.

The model is built without memory for its weights; embedding, head, norms and buffers are real. So at most one block's
original weights exist at a time, however large the model is, and the model's own code runs unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discquant.formats.checkpoint import Checkpoint
from discquant.formats.stored import parameter_readers, stored_name

ATTRIBUTE = "_discquant_lazy"  # of a block: its LazyBlock; of a parameter without memory: what reads it


class LazyBlock:
    """The matrices of one block, in memory (or on the device) only while it runs or within `held`.

    Attributes:
        device: Where the block runs; None is where its matrices are.
    """

    def __init__(
        self,
        block: nn.Module,
        readers: Mapping[str, Callable[[], Tensor] | None],
        device: torch.device | None = None,
    ) -> None:
        """Watch a block.

        Args:
            block: Its parameters named in `readers` have no memory where there is a reader.
            readers: What reads a parameter, by its name within the block; None is the parameter itself.
            device: Where the block runs.
        """
        self._block = block
        self.device = device
        self._places: list[tuple[nn.Module, str, nn.Parameter, Callable[[], Tensor] | None]] = []
        for name, reader in readers.items():
            owner, _, key = name.rpartition(".")
            module = block.get_submodule(owner)
            parameter = module._parameters[key]
            assert parameter is not None
            if reader is not None:
                setattr(parameter, ATTRIBUTE, reader)
            self._places.append((module, key, parameter, reader))
        self.paused = False  # while the block's own code is bypassed
        self._depth = 0
        self._loaded: list[tuple[nn.Module, str, nn.Parameter]] = []
        setattr(block, ATTRIBUTE, self)
        block.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *args: Any) -> None:
        self._depth += 1
        if self._depth > 1 or self.paused:
            return
        for module, key, parameter, reader in self._places:
            # Substituted weights (`functional_call`) are in place already.
            if module._parameters[key] is parameter:
                value = parameter.detach() if reader is None else reader()
                module._parameters[key] = nn.Parameter(value.to(self.device), requires_grad=False)
                self._loaded.append((module, key, parameter))

    def _leave(self, *args: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        for module, key, parameter in self._loaded:
            module._parameters[key] = parameter
        self._loaded.clear()

    def replace(self, name: str, reader: Callable[[], Tensor]) -> None:
        """Read a parameter from elsewhere from now on."""
        places: list[tuple[nn.Module, str, nn.Parameter, Callable[[], Tensor] | None]] = []
        owner, _, key = name.rpartition(".")
        for module, own, parameter, read in self._places:
            wanted = own == key and module is self._block.get_submodule(owner)
            places.append((module, own, parameter, reader if wanted else read))
        self._places = places

    def reader(self, name: str) -> Callable[[], Tensor]:
        """Return what reads a parameter, by its name within the block."""
        owner, _, key = name.rpartition(".")
        module = self._block.get_submodule(owner)
        (found,) = [read for place, own, _, read in self._places if place is module and own == key]
        assert found is not None
        return found

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the matrices from here to the end of the context, to run the block several times."""
        self._enter()
        try:
            yield
        finally:
            self._leave()


def is_lazy(model: nn.Module) -> bool:
    """Whether matrices of a model stay in its checkpoint until a block runs."""
    return any(hasattr(parameter, ATTRIBUTE) for parameter in model.parameters())


def settle(model: nn.Module, device: torch.device, *, stream: bool) -> None:
    """Bring a model to the device that it runs on, in place.

    Args:
        model: On the CPU, lazy or not.
        device: Where its blocks run.
        stream: The blocks' matrices stay on the CPU and come to the device when a block runs; those of lazy blocks
            always do.
    """
    found = _blocks(model)
    staying: set[int] = set()
    for block in () if found is None else found[1]:
        inside = {name: p for name, p in block.named_parameters() if p.dim() >= 2}
        lazy = getattr(block, ATTRIBUTE, None)
        if lazy is None and not stream:
            continue
        if lazy is None:
            lazy = LazyBlock(block, dict.fromkeys(inside))
        lazy.device = device
        staying |= {id(p) for p in inside.values()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in staying:
                parameter.data = parameter.data.to(device)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)


def substitute(model: nn.Module, name: str, reader: Callable[[], Tensor]) -> None:
    """Let a lazy model read the parameter `name` from elsewhere.

    Raises:
        KeyError: No lazy block holds it.
    """
    lazy, local = _lazy_block(model, name)
    lazy.replace(local, reader)


def reader_of(model: nn.Module, name: str) -> Callable[[], Tensor]:
    """Return what reads the parameter `name` of a lazy model; also of a copy of one, whose parameters do not tell.

    Raises:
        KeyError: No lazy block holds it.
    """
    lazy, local = _lazy_block(model, name)
    return lazy.reader(local)


def _lazy_block(model: nn.Module, name: str) -> tuple[LazyBlock, str]:
    """Return the lazy block that holds a parameter, and the parameter's name in it."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        lazy = getattr(model.get_submodule(".".join(parts[:place])), ATTRIBUTE, None)
        if isinstance(lazy, LazyBlock):
            return lazy, ".".join(parts[place:])
    raise KeyError(name)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the largest list of modules of a model with its name."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in found]
    return found[sizes.index(max(sizes))] if found else None


def _real_buffers(model: Any) -> None:
    """Give buffers that no checkpoint holds (rotary frequencies, scales) memory and their values."""
    for module in model.modules():
        missing = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not missing:
            continue
        for key in missing:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        model._init_weights(module)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models are built without memory for their weights (on the meta device), as `transformers` itself builds them.

    That is with the patches under which code of a model's own may look at values that it computes while it is built.
    """
    from transformers import initialization

    safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with torch.device("meta"), safe():
        yield


def build_lazy(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Any | None:
    """Return a model with lazy blocks in eval mode, or None where only the library's own loader will do.

    That is so where a checkpoint's tensors become the model's parameters by more than a new name or a place among fused
    experts.

    Args:
        folder: With config.json.
        checkpoint: Its weights.
        dtype: Of the model in memory.
        trust_remote_code: As for `open_source`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with without_memory():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters())
    if parameters.keys() <= checkpoint.tensors.keys():
        model._weight_conversions = []  # nothing to take back: stored under the model's own names
    found, readers = _blocks(model), parameter_readers(model, checkpoint, dtype)
    persistent = model.state_dict().keys()
    buffers = {
        name: stored_name(model, name, buffer.shape) or ""
        for name, buffer in model.named_buffers()
        if name in persistent
    }
    if (
        found is None
        or readers is None
        or any(stored not in checkpoint.tensors for stored in buffers.values())
    ):
        return None
    _real_buffers(model)
    prefix, blocks = found
    for index, block in enumerate(blocks):
        inside = f"{prefix}.{index}."
        LazyBlock(
            block,
            {
                name[len(inside) :]: readers[name]
                for name, parameter in parameters.items()
                if name.startswith(inside) and parameter.dim() >= 2
            },
        )
    for name, parameter in parameters.items():
        if hasattr(parameter, ATTRIBUTE):
            continue
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = nn.Parameter(readers[name](), requires_grad=False)
    for name, stored in buffers.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key].copy_(checkpoint.read(stored))
    model.tie_weights()
    return model.eval()
