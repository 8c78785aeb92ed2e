# SPDX-License-Identifier: Apache-2.0
"""A tiny random model on disk with calibration tokens, how to run the command line on it, and a simulated GPU.

The simulation keeps plain CPU tensors and remembers which of them are "on the GPU". Python sees `device` and `is_cuda`
accordingly, an operation on tensors of both devices fails as it would on a GPU, and so a forgotten move is found.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from discquant.allocation import allocate
from discquant.ops import _registry
from discquant.run import plots
from discquant.solver import energies, kronecker, solve, state


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama of two blocks, without tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)
    model.to(torch.bfloat16).save_pretrained(path)
    ids = torch.randint(3, 97, (40, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": ids[:32].short(), "heldout": ids[32:].short()}, path / "tokens.safetensors")
    (path / "tokens.safetensors").rename(path.parent / f"{path.name}-tokens.safetensors")
    return path


@pytest.fixture(scope="session")
def dataset(model_dir: Path) -> str:
    """Calibration token ids of `model_dir`."""
    return f"{model_dir.parent / (model_dir.name + '-tokens.safetensors')}:calibration"


@pytest.fixture(scope="module")
def chain() -> Any:
    """A Llama of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from discquant.solver.chain import DecoderChain

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return DecoderChain(LlamaForCausalLM(config).eval())


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, half of a tiny run's time; test_report.py and runs in other processes draw them."""
    if "report" not in request.path.stem:
        monkeypatch.setattr(plots, "available", lambda: False)


@pytest.fixture
def command(model_dir: Path, dataset: str) -> Callable[..., list[str]]:
    """Return the argument list of a small quantize run."""

    def build(out: Path, *extra: str, model: Path | None = None) -> list[str]:
        return [
            sys.executable, "-m", "discquant", "quantize", str(model or model_dir), str(out), "--bits", "3",
            "--group-size", "32", "--dataset", dataset, "--nsamples", "24", "--seqlen", "32", "--iters", "12",
            "--batch-size", "4", "--micro-batch", "2", "--checkpoint-every", "3", "--gptq-samples", "8",
            "--threads", "1", *extra,
        ]  # fmt: skip

    return build


@pytest.fixture(scope="session")
def warm_start() -> Iterator[Any]:
    """Starts commands without their imports (`warm_start.py`, loaded by its path)."""
    path = Path(__file__).resolve().parent / "warm_start.py"
    spec = importlib.util.spec_from_file_location("warm_start", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    starter = module.WarmStart()
    yield starter
    starter.close()


@pytest.fixture
def call(tmp_path: Path, warm_start: Any) -> Callable[..., Any]:
    """Run a command outside the checkout (whose triton_kernels/ folder must not be on the path)."""

    def run(arguments: list[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = warm_start.run(arguments, tmp_path, timeout)
        return done

    return run


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
# What a run spends its time on: none of it may be left on the CPU.
HEAVY = {
    ATEN.mm.default, ATEN.bmm.default, ATEN.bmm.out, ATEN.addmm.default, ATEN.linalg_cholesky_ex.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default, ATEN._softmax.default, ATEN.multinomial.default,
}  # fmt: skip
# Torch takes index tensors from the CPU.
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default}


class ForgottenMove(AssertionError):
    """Tensors of two devices met in one operation."""


class Tags:
    """Which storages are on the simulated GPU."""

    def __init__(self) -> None:
        # A weak reference keeps the address from being used again.
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            if tensor.device != CPU:
                return tensor.device
            found = self._known.get(tensor.untyped_storage()._cdata)
        return CPU if found is None else found[1]

    def set(self, value: Any, device: torch.device) -> Any:
        for tensor in tree_leaves(value):
            with torch._C.DisableTorchFunction():
                if isinstance(tensor, Tensor) and tensor.device == CPU:
                    storage = tensor.untyped_storage()
                    self._known[storage._cdata] = (StorageWeakRef(storage), device)
        return value


# One for the whole session: tensors that the package keeps by device outlive a test.
TAGS = Tags()


class Operations(TorchDispatchMode):
    """Fails where devices meet; what comes out of the GPU's tensors is on the GPU."""

    def __init__(self, tags: Tags) -> None:
        super().__init__()
        self.tags, self.on_gpu, self.made_on = tags, 0, CPU
        self.left_on_cpu: set[str] = set()
        self.observe: Callable[..., None] | None = None  # sees (operator, args, kwargs, result)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in INDEXED:
            tensors = [
                args[0],
                *(
                    leaf
                    for leaf in tree_leaves((args[1:], kwargs))
                    if isinstance(leaf, Tensor) and self.tags.of(leaf) != CPU
                ),
            ]
        devices = [self.tags.of(tensor) for tensor in tensors if tensor.dim() or self.tags.of(tensor) != CPU]
        if func is not ATEN.copy_.default and len(set(devices)) > 1:
            shown = ", ".join(f"{list(t.shape)} on {self.tags.of(t)}" for t in tensors)
            raise ForgottenMove(f"{func}: {shown}")
        out = func(*args, **(kwargs or {}))
        if self.observe is not None:
            self.observe(func, args, kwargs or {}, out)
        if func is ATEN.copy_.default:
            return out
        if GPU in devices or (not tensors and self.made_on == GPU):
            self.on_gpu += 1
            return self.tags.set(out, GPU)
        if func in HEAVY:
            self.left_on_cpu.add(str(func))
        return out


class Device(TorchFunctionMode):
    """Moves, factories and the attributes that name a device."""

    def __init__(self, tags: Tags, operations: Operations) -> None:
        super().__init__()
        self.tags, self.operations = tags, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # for which a CPU alone has no driver
        if func == torch.Tensor.device.__get__:  # made anew at every access
            return self.tags.of(args[0])
        if func == torch.Tensor.is_cuda.__get__:
            return self.tags.of(args[0]).type == "cuda"
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.tags.of(args[0]) != CPU:
            raise ForgottenMove(f"{func.__name__} of a tensor on the GPU")
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return self._to(args[0], CPU)
        if func is torch.Tensor.__deepcopy__:
            return self.tags.set(func(*args, **kwargs), self.tags.of(args[0]))
        given = kwargs.get("device")
        if given is None:
            return self._composed(func, args, kwargs)
        if torch.device(given).type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        return self.tags.set(
            func(*args, **{**kwargs, "device": CPU}), GPU if torch.device(given).type == "cuda" else CPU
        )

    def _composed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation makes for itself inside is where its arguments are."""
        if func.__name__ == "__get__":
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and self.tags.of(leaf) == GPU for leaf in leaves):
            self.operations.made_on = GPU
        try:
            return func(*args, **kwargs)
        finally:
            self.operations.made_on = CPU

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        here = self.tags.of(tensor)
        if args and isinstance(args[0], Tensor):
            args = (self.tags.of(args[0]), args[0].dtype, *args[1:])
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        device = here if device is None else device
        if device.type == "meta" or here.type == "meta":
            return tensor.to(*args, copy=copy, **kwargs)
        moves = device.type != here.type
        out = tensor.to(dtype=dtype or tensor.dtype, copy=copy or moves)
        return self.tags.set(out, GPU if device.type == "cuda" else CPU) if moves else out


_BMM = torch.bmm


def _batched_product(
    left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor:
    """torch.bmm with the `out_dtype` that a CPU does not have."""
    if out_dtype is not None:
        left, right = left.to(out_dtype), right.to(out_dtype)
    return _BMM(left, right, **kwargs)


def simulation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a context in which torch has one GPU; it gives the watch on its operations."""
    # Tables that an earlier simulation has left: this one does not know that they are on its GPU.
    for kept in (kronecker._mirror, state._anchor_table):
        kept.cache_clear()
    nothing = types.SimpleNamespace(
        wait_event=lambda *_: None, record=lambda *_: None, synchronize=lambda *_: None,
    )  # fmt: skip
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    properties = types.SimpleNamespace(name="simulated", total_memory=80 << 30)
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda *_: None,
        "mem_get_info": lambda *_: (70 << 30, 80 << 30), "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "simulated", "get_device_properties": lambda *_: properties,
        "reset_peak_memory_stats": lambda *_: None, "max_memory_allocated": lambda *_: 1 << 20,
        "Stream": lambda *_: nothing, "Event": lambda *_: nothing, "current_stream": lambda *_: nothing,
        "stream": lambda *_: contextlib.nullcontext(), "device": lambda *_: contextlib.nullcontext(),
        "cudart": lambda: runtime,
    }  # fmt: skip

    @contextlib.contextmanager
    def simulated(*, kernels: bool = False) -> Iterator[Operations]:
        with monkeypatch.context() as patch:
            for name, value in stand_ins.items():
                patch.setattr(torch.cuda, name, value)
            # Else the whole backward pass counts as one operation, inside which no device is seen.
            patch.setattr(torch.autograd, "has_torch_function", lambda *_: False)
            patch.setattr(torch, "bmm", _batched_product)
            # The random numbers of a device are made by the device.
            for module in (solve, energies, importlib.import_module(allocate.__module__)):
                patch.setattr(
                    module, "label_generator", lambda device, seed: torch.Generator().manual_seed(seed)
                )
            if not kernels:  # the interpreter is slow; the references compute the same
                patch.setattr(_registry, "triton_problem", lambda device: "simulated")
            with Operations(TAGS) as watch, Device(TAGS, watch):
                yield watch

    return simulated


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`simulation` for one test."""
    return simulation(monkeypatch)
