# SPDX-License-Identifier: Apache-2.0
"""packed_linear on a GPU against cuBLAS and the int4 kernels that are installed, per kernels' cold-weight protocol.

At least 512 MB of distinct weights in turn, at least 20 launches in one CUDA graph, median of 50 replays (of 13 where a
launch is long), the providers' graphs in turn. Everything here needs a GPU. Weights are settled, as in a module: a
launch may begin before the last one ends.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from harness import FIELDS, WAIT_CYCLES, copy_gb_s, machine, package, result_file
from torch import Tensor

from discquant.ops import _packed_paths as paths
from discquant.ops import pack as packing
from discquant.ops.packed_linear import packed_linear

GROUP = 128
COLD_BYTES = 512 * 2**20
SHAPES = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
    "70B qkv": (10240, 8192), "70B o": (8192, 8192), "70B gate_up": (57344, 8192), "70B down": (8192, 28672),
    "odd": (4097, 10944),
}  # fmt: skip
PEERS = 64  # tokens beyond which kernels for few tokens are not timed: tens of milliseconds a launch
DECODE = (1, 4, 16)
PREFILL = (64, 128, 256, 1024, 2048)
REPLAYS = 50
LONG_MS = 0.3  # of a launch, from where on fewer replays are enough
Call = Callable[[], Any]


class Layer:
    """One weight with as many copies as leave the L2 cache, packed and plain."""

    def __init__(self, n: int, k: int, bits: int, dtype: torch.dtype) -> None:
        self.n, self.k, self.bits, self.dtype = n, k, bits, dtype
        self.q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        self.scale = (torch.rand(n, -(-k // GROUP), device="cuda") * 0.01 + 0.005).to(dtype)
        self.sizes: dict[str, Any] = {
            "out_features": n, "in_features": k, "num_bits": bits, "group_size": GROUP, "layout": "mma",
        }  # fmt: skip
        words = packing.pack(self.q, num_bits=bits, group_size=GROUP, layout="mma")
        step = packing.pack_groups(self.scale, layout="mma")
        self.num_bytes = words.numel() * 4 + step.numel() * step.element_size()
        self.kept = [(words.clone(), step.clone()) for _ in range(copies(self.num_bytes))]

    def dense(self) -> Tensor:
        """The rounded weight."""
        words, step = self.kept[0]
        weight: Tensor = paths.dequantize_op(
            words, step, None, self.n, self.k, self.bits, GROUP, paths.MMA_LAYOUT, 0, self.n, self.dtype
        )
        return weight


def copies(num_bytes: int) -> int:
    """How many weights of that size leave the L2 cache before the first comes again."""
    return max(1, -(-COLD_BYTES // num_bytes))


class Graph:
    """A CUDA graph that runs every call at least once, and how long one launch in it takes."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.launches = max(20, len(calls))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.launches):
                calls[i % len(calls)]()
        self.graph.replay()
        self.calls = calls  # and with them the weights that the graph reads

    def milliseconds(self) -> float:
        """Of one launch, by a replay."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device waits while the host submits the graph, which can take it longer than the replay takes the device.
        torch.cuda._sleep(WAIT_CYCLES // 4)
        begin.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / self.launches


def times_in_turn(graphs: Sequence[Graph], replays: int = REPLAYS) -> list[list[float]]:
    """Milliseconds of one launch of each graph, sorted.

    The graphs take turns, as in `harness.sample_in_turn`: a chip that throttles does so for all alike. One whose launch
    is long takes part in every fourth round.
    """
    every = [4 if graph.milliseconds() >= LONG_MS else 1 for graph in graphs]
    found: list[list[float]] = [[] for _ in graphs]
    for i in range(replays):
        for graph, stride, times in zip(graphs, every, found, strict=True):
            if i % stride == 0:
                times.append(graph.milliseconds())
    return [sorted(times) for times in found]


def quantile(times: Sequence[float], share: float) -> float:
    """Of sorted times, however many."""
    return times[int(len(times) * share)]


def ours(layer: Layer, x: Tensor, **options: Any) -> list[Call]:
    """The operator as the dispatcher runs it."""
    return [
        lambda w=w, s=s: packed_linear(x, w, s, **layer.sizes, impl="cpp", settled=True, **options)  # type: ignore[misc]
        for w, s in layer.kept
    ]


def tensor_cores(layer: Layer, x: Tensor) -> list[Call]:
    """Our kernel at any number of tokens, whatever the table says."""
    space = paths.workspace(layer.kept[0][0], layer.n, layer.k)
    sizes = (layer.n, layer.k, layer.bits, GROUP, False, False, True)
    return [lambda w=w, s=s: paths.mma_op(x, w, s, None, None, space, *sizes) for w, s in layer.kept]  # type: ignore[misc]


def prefill(layer: Layer, x: Tensor) -> list[Call]:
    """Our kernel for many tokens, whatever the table says."""
    sizes = (layer.n, layer.k, layer.bits, GROUP)
    return [lambda w=w, s=s: paths.prefill_op(x, w, s, None, None, *sizes) for w, s in layer.kept]  # type: ignore[misc]


def dequantised(layer: Layer, x: Tensor) -> list[Call]:
    """Dequantise into scratch, then cuBLAS, at any number of tokens."""
    sizes = (layer.n, layer.k, layer.bits, GROUP)
    return [lambda w=w, s=s: paths.dense_linear(x, w, s, None, None, *sizes) for w, s in layer.kept]  # type: ignore[misc]


def cublas(layer: Layer, x: Tensor) -> list[Call]:
    """torch's linear on the rounded weight."""
    weight = layer.dense()
    kept = [weight] + [weight.clone() for _ in range(copies(weight.numel() * 2) - 1)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in kept]  # type: ignore[misc]


def tinygemm(layer: Layer, x: Tensor) -> list[Call] | None:
    """aten's int4 kernel (torchao's tinygemm): w = (q - 8) * scale + zero, bfloat16 only."""
    if (
        layer.bits != 4
        or layer.dtype != torch.bfloat16
        or layer.k % 1024
        or layer.n % 8
        or x.shape[0] > PEERS
    ):
        return None
    pairs = (layer.q[:, ::2] << 4) | layer.q[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    grid = (
        torch.stack([layer.scale, torch.zeros_like(layer.scale)], -1).transpose(0, 1).contiguous().bfloat16()
    )
    kept = [(packed.clone(), grid.clone()) for _ in layer.kept]
    op = torch.ops.aten._weight_int4pack_mm
    return [lambda w=w, g=g: op(x, w, GROUP, g) for w, g in kept]  # type: ignore[misc]


def gemlite(layer: Layer, x: Tensor) -> list[Call] | None:
    """gemlite's Triton kernels, where the package is installed."""
    core = package("gemlite.core")
    if core is None or layer.bits != 4 or layer.k % GROUP or x.shape[0] > PEERS:
        return None
    kind = core.DType.BF16 if layer.dtype == torch.bfloat16 else core.DType.FP16
    found = []
    for _ in layer.kept:
        linear = core.GemLiteLinear(
            4,
            group_size=GROUP,
            in_features=layer.k,
            out_features=layer.n,
            input_dtype=kind,
            output_dtype=kind,
        )
        linear.pack(layer.q.clone(), layer.scale.clone(), torch.full_like(layer.scale, 8), None)
        found.append(linear)
    return [lambda f=f: f(x) for f in found]  # type: ignore[misc]


def providers(layer: Layer, x: Tensor) -> Iterator[tuple[str, int, list[Call]]]:
    """(name, bytes of one weight, calls); a peer that is absent or refuses this layer is told and left out."""
    yield "cuBLAS", 2 * layer.n * layer.k, cublas(layer, x)
    yield "discquant", layer.num_bytes, ours(layer, x)
    if (
        x.shape[0] <= 64
    ):  # beyond, exact is what is chosen anyway, and 16 tokens at a time is only for who must
        yield "discquant exact", layer.num_bytes, ours(layer, x, mode="exact")
        yield "discquant batch_invariant", layer.num_bytes, ours(layer, x, batch_invariant=True)
    if x.shape[0] > 16:
        yield "discquant prefill", layer.num_bytes, prefill(layer, x)
    for name, make in (("torch tinygemm", tinygemm), ("gemlite", gemlite)):
        try:
            calls = make(layer, x)
            if calls is not None:
                calls[0]()
        except Exception as cause:  # a peer's own limits must not stop the others
            print(f"packed_linear: {name} left out: {type(cause).__name__}: {cause}")
            continue
        if calls is not None:
            yield name, layer.num_bytes, calls


class Gate:
    """What y must be, before anything is timed: all of it by torch's matmul on the rounded weight, 512 rows in float64.

    With room for bfloat16 weights and outputs.
    """

    def __init__(self, layer: Layer, x: Tensor) -> None:
        weight = layer.dense()
        self.whole = torch.nn.functional.linear(x, weight).float()
        self.size = torch.nn.functional.linear(x.abs(), weight.abs()).float() / layer.k**0.5
        self.exact = x.double() @ weight[:512].double().t()
        self.dtype = x.dtype

    def check(self, name: str, call: Call) -> None:
        """Compare what a provider computes.

        Raises:
            AssertionError: The provider computes something else.
        """
        # The call's y likely gets this memory: what it leaves out must not pass for what another provider wrote there.
        spoiled = torch.full_like(self.whole, float("nan"), dtype=self.dtype)
        del spoiled
        y = call()
        assert y.shape == self.whole.shape, f"{name}: shape {list(y.shape)}"
        for against, oracle in (("torch", self.whole), ("float64", self.exact)):
            rows = oracle.shape[1]
            error = (y[:, :rows].to(oracle.dtype) - oracle).abs()
            limit = 2**-7 * oracle.abs() + 2e-2 * self.size[:, :rows]
            assert (error <= limit).all(), f"{name}: error {error.max():.3e} against {against}"


def checked(layer: Layer, x: Tensor, wrong: list[str]) -> Iterator[tuple[str, int, list[Call]]]:
    """The `providers` that pass the gate; what the others computed is told in `wrong`."""
    gate = Gate(layer, x)
    for name, num_bytes, calls in providers(layer, x):
        try:
            gate.check(name, calls[0])
        except AssertionError as cause:
            wrong.append(f"{x.shape[0]} tokens, {cause}")
            continue
        yield name, num_bytes, calls


def measure(shape: str, bits: int, tokens: tuple[int, ...], dtype: torch.dtype, *, record: bool) -> None:
    """Check every provider of one weight and, to `record`, time them in turn; else nothing is timed or written.

    Raises:
        AssertionError: A provider computes something else, or cannot be captured; the others are recorded.
    """
    layer = Layer(*SHAPES[shape], bits, dtype)
    wrong: list[str] = []
    for m in tokens:
        x = torch.randn(m, layer.k, device="cuda").to(dtype)
        graphs: dict[str, tuple[int, Graph]] = {}
        for name, num_bytes, calls in checked(layer, x, wrong):
            if not record:
                continue
            try:
                graphs[name] = num_bytes, Graph(calls)
            except RuntimeError as cause:
                wrong.append(f"{m} tokens, {name}: no graph: {cause}")
        found = times_in_turn([graph for _, graph in graphs.values()])
        p50 = {name: quantile(times, 0.5) for name, times in zip(graphs, found, strict=True)}
        for (name, (num_bytes, _)), times in zip(graphs.items(), found, strict=True):
            speed = (num_bytes + (layer.n + layer.k) * m * 2) / p50[name] / 1e6
            _write({
                "op": "packed_linear", "provider": name, "mode": f"{bits} bit", "shape": f"{shape} M={m}",
                "dtype": str(dtype)[6:], "ms_p10": f"{quantile(times, 0.1):.5f}", "ms_p50": f"{p50[name]:.5f}",
                "ms_p90": f"{quantile(times, 0.9):.5f}", "gb_s": f"{speed:.1f}",
                "share_of_copy": f"{speed / copy_gb_s():.3f}",
                "tflop_s": f"{2 * layer.n * layer.k * m / p50[name] / 1e9:.2f}",
                "times_bare_matmul": f"{p50[name] / p50['cuBLAS']:.3f}" if "cuBLAS" in p50 else "", **machine(),
            })  # fmt: skip
    assert not wrong, "; ".join(wrong)


def _write(row: dict[str, Any]) -> None:
    """Append a row at once: the process may be cut off at any time."""
    path = result_file()
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
