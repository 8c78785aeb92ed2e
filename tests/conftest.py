# SPDX-License-Identifier: Apache-2.0
"""What every test needs: no network, Triton interpreted where there is no GPU, a seed per test, poisoned memory.

Runs before any test module is imported, and so before any kernel is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
import weakref
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
if _WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

# Fills every `empty` tensor with NaN or the largest integer, so that a read of unwritten memory shows.
torch.use_deterministic_algorithms(True, warn_only=True)

# Absent on a bare GPU machine, where the kernels' tests need none of it.
with contextlib.suppress(ModuleNotFoundError):
    import hypothesis

    hypothesis.settings.register_profile(
        "discquant", deadline=None, max_examples=50, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("discquant")

ROOT = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """Folder of test models and texts: beside the checkout, else DISCQUANT_SHARED, else None."""
    from discquant import environment

    beside = ROOT.parent / "shared"
    named = environment.variable("DISCQUANT_SHARED")
    if beside.is_dir():
        return beside
    return Path(named) if named and Path(named).is_dir() else None


def pytest_report_header() -> list[str]:
    """One line each for what decides which tests run."""
    shared = "found" if find_shared() else "absent (set DISCQUANT_SHARED): tests that need it are skipped"
    return [f"gpu: {'yes' if HAS_GPU else 'no, Triton runs interpreted'}", f"shared data: {shared}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remove `gpu` tests where there is no GPU, and `full` ones unless -m names them; slow ones come first."""
    chosen = config.getoption("-m") or ""
    removed = [
        item
        for item in items
        if (item.get_closest_marker("gpu") and not HAS_GPU)
        or (item.get_closest_marker("full") and "full" not in chosen)
    ]
    if removed:
        config.hook.pytest_deselected(items=removed)
        gone = set(removed)
        items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed every generator from the test's own name: order and selection of tests change nothing."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """A test that changes a process-wide setting of torch fails itself, not the next one."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    left = (torch.get_default_dtype(), torch.is_grad_enabled())
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    assert left == (dtype, grad), (
        f"the test left (default dtype, grad enabled) = {left}, found {(dtype, grad)}"
    )


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Take what is in memory, hundreds of imported modules, out of the collector's sight: every run collects often."""
    gc.collect()
    gc.freeze()


class Live(TorchDispatchMode):
    """Adds up the storages that operations make while it is active, until they are freed: no allocator's whims."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """Start at zero; the tensors of `known` are not counted when an operation returns them."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and take its results into account."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, torch.Tensor) or not tensor.untyped_storage().nbytes():
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result


@pytest.fixture(scope="session")
def live_bytes() -> type[Live]:
    """The mode that adds up what is alive: `with live_bytes(known) as live: ...; live.peak`."""
    return Live


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def build_script() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("discquant_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of shared test models and texts; the test is skipped where there is none."""
    found = find_shared()
    if found is None:
        pytest.skip("shared data absent: set DISCQUANT_SHARED")
    return found


@pytest.fixture(scope="session")
def tiny_llama_dir() -> Path:
    """The bundled model."""
    path = ROOT / "examples" / "tiny_llama"
    if not (path / "config.json").exists():
        pytest.skip("examples/tiny_llama holds no model yet: run its training script")
    return path
