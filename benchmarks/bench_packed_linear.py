# SPDX-License-Identifier: Apache-2.0
"""packed_linear on the CPU against torch and ONNX Runtime: Llama-3-8B layers, cold weights, one run for all.

Providers take turns, one call each on weights that left the caches, so that other load on the machine meets all alike;
the plain read of the same bytes takes its turn too. One row per provider: benchmarks/results/packed_linear_cpu.csv.
DISCQUANT_BENCH_THREADS (1), DISCQUANT_BENCH_SHAPES (all) and DISCQUANT_BENCH_ROUNDS (40) narrow a run. One thread is
timed by the caller's CPU time, several by the clock.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import machine, package
from torch import Tensor

from discquant import _extension
from discquant.ops import pack as packing
from discquant.ops.packed_linear import packed_linear

SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B o": (8192, 8192),
    "odd": (4097, 10944),
}
CHOSEN = os.environ.get("DISCQUANT_BENCH_SHAPES", ",".join(SHAPES)).split(",")
THREADS = int(os.environ.get("DISCQUANT_BENCH_THREADS", "1"))
ROUNDS = int(os.environ.get("DISCQUANT_BENCH_ROUNDS", "40"))
GROUP = 128
# With one thread all providers run in the caller, so its own CPU time leaves out what other processes took.
CLOCK = time.thread_time if THREADS == 1 else time.perf_counter
COLD_BYTES = 96 * 2**20  # three times the last-level cache of the machines in use
FIELDS = (
    "op", "provider", "shape", "n", "k", "tokens", "bits", "group", "threads", "ms_p10", "ms_p25", "ms_p50", "gb_s",
    "roof_gb_s", "share_of_roof", "gweights_s", "gflop_s", "load", "device", "torch", "commit", "date",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parent / "results" / "packed_linear_cpu.csv"


class Provider:
    """One way to multiply: `calls[i % len(calls)]` uses the i-th cold copy of its weight."""

    def __init__(self, name: str, bits: int, num_bytes: int, calls: list[Callable[[], Any]]) -> None:
        self.name, self.bits, self.num_bytes, self.calls = name, bits, num_bytes, calls
        self.times: list[float] = []

    def turn(self, i: int) -> None:
        call = self.calls[i % len(self.calls)]
        start = CLOCK()
        call()
        self.times.append((CLOCK() - start) * 1e3)

    def quantile(self, share: float) -> float:
        return sorted(self.times)[int(len(self.times) * share)]


def copies(num_bytes: int) -> int:
    return max(1, -(-COLD_BYTES // num_bytes))


def ours(q: Tensor, scale: Tensor, bits: int, x: Tensor, mode: str) -> Provider:
    words = packing.pack(q, num_bits=bits, group_size=GROUP, layout="cpu")
    step = packing.pack_groups(scale, layout="cpu")
    num_bytes = words.numel() * 4 + step.numel() * step.element_size()
    sizes = {"out_features": q.shape[0], "in_features": q.shape[1], "num_bits": bits, "group_size": GROUP}

    def call(w: Tensor, s: Tensor) -> Callable[[], Tensor]:
        return lambda: packed_linear(x, w, s, **sizes, layout="cpu", mode=mode, impl="cpp")

    calls = [call(words.clone(), step.clone()) for _ in range(copies(num_bytes))]
    return Provider(f"discquant {mode}", bits, num_bytes, calls)


def dense(weight: Tensor, x: Tensor) -> Provider:
    num_bytes = weight.numel() * weight.element_size()
    weights = [weight.clone() for _ in range(copies(num_bytes))]
    x = x.to(weight.dtype)
    calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    name = str(weight.dtype).removeprefix("torch.")
    return Provider(f"torch {name}", 8 * weight.element_size(), num_bytes, calls)


def torch_int4(q: Tensor, scale: Tensor, x: Tensor) -> Provider:
    """aten's weight-only int4 matmul; its zero point is a float on w = (q - 8) * scale + zero."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
    pairs = (
        torch.stack([scale.bfloat16(), torch.zeros_like(scale).bfloat16()], -1).transpose(0, 1).contiguous()
    )
    num_bytes = packed.numel() * packed.element_size() + pairs.numel() * 2
    kept = [(packed.clone(), pairs.clone()) for _ in range(copies(num_bytes))]
    x = x.bfloat16()
    calls = [lambda w=w, p=p: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, p) for w, p in kept]
    return Provider("torch int4", 4, num_bytes, calls)


def onnx_runtime(q: Tensor, scale: Tensor, x: Tensor, level: int) -> Provider | None:
    """MatMulNBits; accuracy_level 4 quantises activations to 8 bits, 0 keeps float32."""
    runtime, onnx = package("onnxruntime"), package("onnx")
    if runtime is None or onnx is None or q.shape[1] % GROUP:
        return None
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    n, k = q.shape
    nibbles = (q[:, ::2] | (q[:, 1::2] << 4)).view(n, k // GROUP, GROUP // 2)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=GROUP,
        accuracy_level=level,
    )  # fmt: skip
    weights = [
        numpy_helper.from_array(nibbles.numpy(), "w"),
        numpy_helper.from_array(scale.float().flatten().numpy(), "s"),
    ]
    value = helper.make_tensor_value_info
    float_type = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node], "g", [value("x", float_type, ["m", k])], [value("y", float_type, ["m", n])], weights
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Its idle threads would otherwise spin on the cores of the providers whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    num_bytes = n * k // 2 + scale.numel() * 4
    feed = {"x": x.float().numpy()}
    sessions = [
        runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(copies(num_bytes))
    ]
    calls = [lambda s=s: torch.from_numpy(s.run(None, feed)[0]) for s in sessions]
    return Provider(f"onnxruntime {runtime.__version__} level {level}", 4, num_bytes, calls)


def plain_read(num_bytes: int) -> Provider:
    num_bytes = num_bytes // 4096 * 4096
    buffers = [torch.ones(num_bytes // 4, dtype=torch.int32) for _ in range(copies(num_bytes))]
    calls = [lambda b=b: torch.ops.discquant.stream_read(b) for b in buffers]
    return Provider("plain read", 0, num_bytes, calls)


def check(provider: Provider, oracle: Tensor, size: Tensor) -> None:
    """Gate before timing: no provider may be further from float64 than 8-bit activations and bfloat16 output explain.

    A wrong layout or zero point is off by several times `size`.
    """
    error = (provider.calls[0]()[:, : oracle.shape[1]].double() - oracle).abs()
    limit = 2**-7 * oracle.abs() + 8e-2 * size
    assert (error <= limit).all(), f"{provider.name}: error {error.max():.3e}"


@pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
@pytest.mark.parametrize("tokens", [1, 4, 16, 128])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name in CHOSEN])
def test_cpu(benchmark: Any, shape: str, tokens: int) -> None:
    n, k = SHAPES[shape] if not benchmark.disabled else (192, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        run(benchmark, shape, n, k, tokens)
    finally:
        torch.set_num_threads(before)


def run(benchmark: Any, shape: str, n: int, k: int, tokens: int) -> None:
    groups = -(-k // GROUP)
    scale = (torch.rand(n, groups) * 0.01 + 0.005).bfloat16()
    x = torch.randn(tokens, k).bfloat16()
    codes = {bits: torch.randint(0, 2**bits, (n, k), dtype=torch.uint8) for bits in (4, 3)}
    group = torch.arange(k) // GROUP
    weight = {bits: scale.float()[:, group] * (q.float() - 2 ** (bits - 1)) for bits, q in codes.items()}
    providers = [ours(codes[bits], scale, bits, x, mode) for bits in (4, 3) for mode in ("a15", "a8")]
    if tokens <= 16:
        providers.append(ours(codes[4], scale, 4, x, "fp32"))
    providers += [dense(weight[4].bfloat16(), x), dense(weight[4], x)]
    if k % GROUP == 0 and n % 64 == 0:
        providers.append(torch_int4(codes[4], scale, x))
    providers += [p for level in (4, 0) if (p := onnx_runtime(codes[4], scale, x, level)) is not None]
    for provider in providers:
        bits = 3 if provider.bits == 3 else 4
        # 512 rows are enough to see a wrong layout; float64 on all would outlast the benchmark.
        some = weight[bits][:512].double()
        check(provider, x.double() @ some.t(), x.double().abs() @ some.abs().t() / k**0.5)
    roof = plain_read(providers[0].num_bytes)
    rounds = 2 if benchmark.disabled else max(7, ROUNDS if tokens <= 4 else ROUNDS // 4)
    for i in range(rounds):
        for provider in (roof, *providers):
            provider.turn(i)
    benchmark.pedantic(providers[0].calls[0], rounds=1, iterations=1)
    if benchmark.disabled:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    roof_rate = roof.num_bytes / roof.quantile(0.25) / 1e6
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for provider in (roof, *providers):
            ms = provider.quantile(0.25)
            rate = provider.num_bytes / ms / 1e6
            writer.writerow({
                "op": "packed_linear", "provider": provider.name, "shape": shape, "n": n, "k": k, "tokens": tokens,
                "bits": provider.bits or "", "group": GROUP, "threads": THREADS,
                "ms_p10": f"{provider.quantile(0.1):.4f}", "ms_p25": f"{ms:.4f}",
                "ms_p50": f"{provider.quantile(0.5):.4f}", "gb_s": f"{rate:.2f}", "roof_gb_s": f"{roof_rate:.2f}",
                "share_of_roof": f"{rate / roof_rate:.3f}",
                "gweights_s": f"{n * k / ms / 1e6:.2f}" if provider.bits else "",
                "gflop_s": f"{2 * n * k * tokens / ms / 1e6:.1f}" if provider.bits else "",
                "load": f"{os.getloadavg()[0]:.1f}",
                **{key: machine()[key] for key in ("device", "torch", "commit", "date")},
            })  # fmt: skip
