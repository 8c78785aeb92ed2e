# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel is chosen, its workspaces and its table, without a GPU: the choice is run on CPU tensors."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant import _extension
from discquant.ops import _packed_paths as paths
from discquant.ops import pack as packing
from discquant.ops import packed_linear_table as table

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
HALF = torch.float16


def weight(n: int, k: int, bits: int = 4, dtype: torch.dtype = HALF) -> tuple[Tensor, Tensor, Tensor]:
    """Packed words, packed scales, and the served weight."""
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    step = (torch.rand(n, -(-k // 64)) * 0.1).to(dtype)
    full = (q.float() - 2 ** (bits - 1)) * step.float().repeat_interleave(64, 1)[:, :k]
    words = packing.pack(q, num_bits=bits, group_size=64, layout="mma")
    return words, packing.pack_groups(step, layout="mma"), full


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every launch of the tensor-core kernel, which a float32 matmul stands in for."""
    seen: list[dict[str, Any]] = []

    def mma(
        x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, space: Tensor, n: int,
        k: int, bits: int, group: int, exact: bool, batch_invariant: bool, settled: bool,
    ) -> Tensor:  # fmt: skip
        assert x.shape[1] == k and k % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0
        assert x.data_ptr() % 16 == 0
        seen.append({"tokens": x.shape[0], "k": k, "exact": exact})
        full = paths.dequantize_op(words, scale, zero, n, k, bits, group, 1, 0, n, torch.float32)
        return (x.float() @ full.t()).to(x.dtype)

    def prefill(
        x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, k: int, bits: int,
        group: int,
    ) -> Tensor:  # fmt: skip
        assert scale.dtype == x.dtype
        y = mma(x, words, scale, zero, bias, x, n, k, bits, group, True, False, False)
        seen[-1]["many"] = True
        return y

    monkeypatch.setattr(paths, "mma_op", mma)
    monkeypatch.setattr(paths, "prefill_op", prefill)
    monkeypatch.setattr(paths, "_size", lambda device, n, k: 1)
    monkeypatch.setattr(paths, "workspace", lambda words, n, k: torch.empty(0))
    return seen


@CPP
@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        (1, {}, [1]),
        (16, {}, [16]),
        (17, {}, [17]),
        (64, {}, [64]),
        (65, {}, []),
        (300, {"batch_invariant": True}, [300]),
        (5, {"exact": True}, [5]),
        (5, {"dtype": torch.float32}, []),
        (5, {"scale": torch.float32}, [5]),  # the scale multiplies float32 sums: its dtype does not matter
        (20, {"scale": torch.float32}, [20]),
        (5, {"scale": torch.bfloat16, "exact": True}, []),
        (5, {"size": 0}, []),  # too large for the kernel
    ],
)
def test_choice(
    launches: list[dict[str, Any]],
    tokens: int,
    options: dict[str, Any],
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, scale, full = weight(70, 203, dtype=options.get("scale", HALF))
    x = torch.randn(tokens, 203).to(options.get("dtype", HALF))
    flags = (options.get("exact", False), options.get("batch_invariant", False), False)
    monkeypatch.setattr(paths, "_size", lambda *sizes: options.get("size", 1))
    y = paths._gpu_linear(x, words, scale, None, None, 70, 203, 4, 64, *flags)
    assert [launch["tokens"] for launch in launches] == expected
    assert all(launch["k"] == 208 for launch in launches)
    oracle = x.double() @ full.double().t()
    size = x.double().abs() @ full.double().abs().t()
    assert y.dtype == x.dtype and ((y.double() - oracle).abs() <= 2**-9 * size).all()


@CPP
@pytest.mark.parametrize(
    ("tokens", "options", "many"),
    [
        (16, {}, [False]),
        (17, {}, [True]),
        (299, {}, [True]),
        (299, {"exact": True}, [True]),  # it rounds the weight as the exact mode does
        (300, {}, []),
        (20, {"scale": torch.float32}, [False]),
        (70, {"scale": torch.float32}, []),
        (70, {"batch_invariant": True}, [False]),
        (70, {"dtype": torch.float32, "scale": torch.float32}, []),
        (70, {"size": 0}, []),
    ],
)
def test_choice_of_the_kernel_for_many_tokens(
    launches: list[dict[str, Any]], tokens: int, options: dict[str, Any], many: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    entry = {"dense_tokens": {"3": 65, "4": 65}, "prefill_tokens": {"3": None, "4": [17, 300]}}
    monkeypatch.setattr(table, "_of", lambda device: entry)
    monkeypatch.setattr(paths, "_size", lambda *sizes: options.get("size", 1))
    words, scale, full = weight(70, 203, dtype=options.get("scale", HALF))
    x = torch.randn(tokens, 203).to(options.get("dtype", HALF))
    flags = (options.get("exact", False), options.get("batch_invariant", False), False)
    y = paths._gpu_linear(x, words, scale, None, None, 70, 203, 4, 64, *flags)
    assert [launch.get("many", False) for launch in launches] == many
    oracle, size = x.double() @ full.double().t(), x.double().abs() @ full.double().abs().t()
    assert ((y.double() - oracle).abs() <= 2**-9 * size).all()


@CPP
@pytest.mark.parametrize("options", [{"size": 0}, {"dtype": torch.float32}, {"scale": torch.bfloat16}])
def test_batch_invariance_is_kept_or_refused(
    launches: list[dict[str, Any]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel for few tokens cannot take goes to a matmul that sums by the batch."""
    monkeypatch.setattr(paths, "_size", lambda *sizes: options.get("size", 1))
    words, scale, _ = weight(70, 203, dtype=options.get("scale", HALF))
    x = torch.randn(5, 203).to(options.get("dtype", HALF))
    call = (x, words, scale, None, None, 70, 203, 4, 64, True)
    assert paths._gpu_linear(*call, False, False).shape == (5, 70)
    with pytest.raises(NotImplementedError, match="packed_linear: batch_invariant must go with"):
        paths._gpu_linear(*call, True, False)
    assert not launches


@CPP
def test_rows_of_any_stride_are_brought_in_line(launches: list[dict[str, Any]]) -> None:
    words, scale, _ = weight(64, 128)
    wide = torch.randn(6, 300).to(HALF)
    for x in (wide[:, 5:133], wide[:, 8:136], wide[::2, :128], torch.randn(128, 4).to(HALF).t()):
        paths._gpu_linear(x, words, scale, None, None, 64, 128, 4, 64, False, False, False)
    assert len(launches) == 4


def test_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per stream, grown and kept; a graph being captured has its own, and so has the next graph."""

    class Stream:
        cuda_stream = 7

    state = {"capture": 0}
    monkeypatch.setattr(paths, "_workspaces", {})
    monkeypatch.setattr(paths, "_size", lambda device, n, k: n)
    monkeypatch.setattr(paths, "_capture_op", lambda words: state["capture"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capture"] != 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    words = torch.empty(0, dtype=torch.int32)
    first = paths.workspace(words, 10, 1)
    assert paths.workspace(words, 5, 1) is first and not first.any()
    # Of a large one the counters alone: a test's fresh memory is poisoned.
    counters = paths._COUNTERS
    tail = paths._fresh_workspace(counters + 3, words.device)
    assert tail.numel() == counters + 3 and not tail[:counters].any() and tail[counters:].all()
    larger = paths.workspace(words, 20, 1)
    assert larger.numel() == 20
    state["capture"] = 3
    captured = paths.workspace(words, 10, 1)
    assert captured is not larger and paths.workspace(words, 10, 1) is captured
    state["capture"] = 4
    assert paths.workspace(words, 10, 1) is not captured
    state["capture"] = 0
    assert paths.workspace(words, 20, 1) is larger
    Stream.cuda_stream = 8
    assert paths.workspace(words, 20, 1) is not larger
    # torch.compile's own graphs: nothing that outlives the call may lie in their pool.
    manager = SimpleNamespace(stream=Stream)
    trees = SimpleNamespace(get_manager=lambda device, create_if_none_exists: manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    kept = dict(paths._workspaces)
    for state["capture"] in (0, 5):
        alone = paths.workspace(words, 10, 1)
        assert paths.workspace(words, 10, 1) is not alone and alone.numel() == 10 and not alone.any()
    assert paths._workspaces == kept
    manager.stream = object()
    state["capture"] = 0
    assert paths.workspace(words, 20, 1) is paths.workspace(words, 20, 1)


def test_counters_are_where_the_kernel_counts(repo_root: Path) -> None:
    header = (repo_root / "csrc" / "packed" / "gpu_walk.h").read_text()
    found = re.search(r"constexpr int kMaxBlocks = 1 << (\d+);", header)
    assert found is not None and 1 << int(found[1]) == paths._COUNTERS


def test_what_torch_keeps_of_its_graphs() -> None:
    """Private names of torch on which `_in_graph_tree` relies."""
    from torch._inductor import cudagraph_trees as trees

    assert trees.get_manager(0, create_if_none_exists=False) is None
    assert "self.stream = torch.cuda.Stream()" in inspect.getsource(trees.CUDAGraphTreeManager.__init__)


def test_table() -> None:
    assert table.entry(None) is table.load()["default"]
    assert table.entry((1, 0)) is table.load()["default"]
    assert table.dense_tokens(torch.device("cpu"), 3) == table.load()["default"]["dense_tokens"]["3"]
    assert not any(table.prefills(torch.device("cpu"), bits, m) for bits in (3, 4) for m in (1, 100, 10**6))

    def one(dense: Any, prefill: Any) -> dict[str, Any]:
        return {"devices": {"default": {"measured": None, "dense_tokens": dense, "prefill_tokens": prefill}}}

    sound, never = {"3": 5, "4": 6}, {"3": None, "4": None}
    good = {"format": 2, **one(sound, {"3": [17, 900], "4": None})}
    assert table.parse(good)["default"]["dense_tokens"]["4"] == 6
    for change, message in (
        ({"format": 1}, "format must be 2, got 1"),
        ({"devices": {}}, "entry for the device 'default'"),
        (one({"3": 1}, never), "at 4 bits must be a positive integer, got None"),
        (one({"3": 0, "4": 1}, never), "at 3 bits must be a positive"),
        *(
            (one(sound, {"3": bad, "4": None}), "prefill_tokens of default at 3 bits must be null or")
            for bad in (17, [17], [17, 17], [0, 4], [1, "2"], {})
        ),
    ):
        with pytest.raises(ValueError, match=message):
            table.parse(good | change)
    with pytest.raises(ValueError, match="format must be 2, got None"):
        table.parse([])


def test_tuning_writes_what_the_table_reads(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    spec = importlib.util.spec_from_file_location("tune", repo_root / "benchmarks" / "tune_packed_linear.py")
    assert spec is not None and spec.loader is not None
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    sys.modules.pop("harness", None)
    assert tune.crossover({17: 1.0, 64: 2.0, 256: 9.0}, {17: 3.0, 64: 3.0, 256: 5.0}) == 256
    assert tune.crossover({17: 1.0, 64: 2.0}, {17: 3.0, 64: 3.0}) == 65
    assert tune.crossover({17: 4.0, 64: 4.0}, {17: 3.0, 64: 3.0}) == 17
    assert tune.fastest_range(
        {17: 3.0, 32: 1.0, 64: 1.0, 128: 9.0}, dict.fromkeys((17, 32, 64, 128), 2.0)
    ) == [32, 128]
    assert tune.fastest_range(
        {17: 1.0, 32: 3.0, 64: 1.0, 128: 1.0}, dict.fromkeys((17, 32, 64, 128), 2.0)
    ) == [64, 129]
    assert tune.fastest_range({17: 3.0}, {17: 2.0}) is None
    assert tune.fastest_range({}, {17: 2.0}) is None
    path = tmp_path / "table.json"
    path.write_text(table.PATH.read_text())
    tune.write("sm_99", {"3": 40, "4": 50}, {"3": None, "4": None}, path)
    tune.write("sm_99", {"3": 41, "4": 50}, {"3": [17, 400], "4": None}, path)
    written = table.parse(json.loads(path.read_text()))
    assert written["sm_99"]["dense_tokens"] == {"3": 41, "4": 50}
    assert written["sm_99"]["prefill_tokens"] == {"3": [17, 400], "4": None}
    # Cut off after the first width: the other keeps what it had, on a new device the default's.
    tune.write("sm_99", {"4": 60}, {"4": [33, 64]}, path)
    tune.write("sm_98", {"3": 70}, {"3": None}, path)
    written = table.parse(json.loads(path.read_text()))
    assert written["sm_99"]["dense_tokens"] == {"3": 41, "4": 60}
    assert written["sm_99"]["prefill_tokens"] == {"3": [17, 400], "4": [33, 64]}
    assert [written[key]["measured"]["bits"] for key in ("sm_99", "sm_98")] == [["3", "4"], ["3"]]
    default = written["default"]["dense_tokens"]["4"]
    assert written.pop("sm_98")["dense_tokens"] == {"3": 70, "4": default}
    assert {name: entry for name, entry in written.items() if name != "sm_99"} == table.load()
