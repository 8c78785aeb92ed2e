# SPDX-License-Identifier: Apache-2.0
"""Ways to multiply by a 3- or 4-bit weight on a CPU: ours, torch, ONNX Runtime, ggml (llama.cpp); and the plain read.

A provider keeps as many copies of its weight as leave the caches between two calls, and takes turns with the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import packed_targets
import torch
from ggml_peer import Ggml
from harness import package
from torch import Tensor

from discquant.ops import pack as packing
from discquant.ops.packed_linear import packed_linear

GROUP = 128
# Of each provider; a dozen of them take turns, so that more than 2 GB pass between two uses of the same bytes.
COLD_BYTES = 96 * 2**20
MODES = {"a8": 0, "a15": 1, "fp32": 2}

Call = Callable[[Tensor], Any]


class Provider:
    """One way to multiply: `calls[i % len(calls)](x)` uses the i-th cold copy of its weight."""

    def __init__(self, name: str, bits: int, num_bytes: int, calls: list[Call], dtype: torch.dtype) -> None:
        self.name, self.bits, self.num_bytes, self.calls, self.dtype = name, bits, num_bytes, calls, dtype
        self.times: list[float] = []
        self.most_tokens = 1 << 30

    def turn(self, i: int, x: Tensor, clock: Callable[[], float]) -> None:
        """One timed call."""
        call = self.calls[i % len(self.calls)]
        start = clock()
        call(x)
        self.times.append((clock() - start) * 1e3)

    def quantile(self, share: float) -> float:
        """Milliseconds."""
        return sorted(self.times)[int(len(self.times) * share)]

    def times_as_fast(self, other: Provider) -> float:
        """The other's time over this one's, turn by turn; the median, which a change of speed leaves alone."""
        return statistics.median(theirs / mine for theirs, mine in zip(other.times, self.times, strict=True))


def copies(num_bytes: int) -> int:
    """How many weights of that size leave the caches before the first comes again."""
    return min(64, max(1, -(-COLD_BYTES // num_bytes)))


class Weight:
    """Codes of one weight at 3 and 4 bits with common scales, and what they stand for."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.scale = (torch.rand(n, -(-k // GROUP)) * 0.01 + 0.005).bfloat16()
        self.q = {bits: torch.randint(0, 2**bits, (n, k), dtype=torch.uint8) for bits in (4, 3)}

    def dense(self, bits: int, rows: int | None = None) -> Tensor:
        """float32 weight of the first rows."""
        q, scale = self.q[bits][:rows], self.scale[:rows].float()
        return (q.float() - 2 ** (bits - 1)) * scale.repeat_interleave(GROUP, 1)[:, : self.k]


def ours(weight: Weight, bits: int, modes: tuple[str, ...]) -> list[Provider]:
    """The operator itself, in each mode over the same buffers; what Python's checks add is in the tokens/s.

    No two modes use the same copy in a turn or soon after: the second would find it in the cache.
    """
    words = packing.pack(weight.q[bits], num_bits=bits, group_size=GROUP, layout="cpu")
    step = packing.pack_groups(weight.scale, layout="cpu")
    num_bytes = words.numel() * 4 + step.numel() * step.element_size()
    kept = [(words.clone(), step.clone()) for _ in range(max(len(modes), copies(num_bytes)))]
    op, sizes = torch.ops.discquant.packed_linear.default, (weight.n, weight.k, bits, GROUP)

    def call(w: Tensor, s: Tensor, mode: str) -> Call:
        return lambda x: op(x, w, s, None, None, *sizes, MODES[mode], -1)

    def first(place: int) -> int:
        return place * len(kept) // len(modes)

    return [
        Provider(
            f"discquant {mode}",
            bits,
            num_bytes,
            [call(w, s, mode) for w, s in kept[first(i) :] + kept[: first(i)]],
            torch.bfloat16,
        )
        for i, mode in enumerate(modes)
    ]


def exact(weight: Weight, bits: int) -> Provider:
    """The exact mode: dequantise, then torch's matmul; so it is known what bit equality costs."""
    words = packing.pack(weight.q[bits], num_bits=bits, group_size=GROUP, layout="cpu")
    step = packing.pack_groups(weight.scale, layout="cpu")
    sizes: dict[str, Any] = {
        "out_features": weight.n, "in_features": weight.k, "num_bits": bits, "group_size": GROUP, "layout": "cpu",
    }  # fmt: skip

    def call(x: Tensor) -> Tensor:
        return packed_linear(x, words, step, **sizes, mode="exact")

    return Provider("discquant exact", bits, words.numel() * 4 + step.numel() * 2, [call], torch.bfloat16)


def dense(weight: Weight, dtype: torch.dtype) -> Provider:
    """torch's own linear layer."""
    full = weight.dense(4).to(dtype)
    num_bytes = full.numel() * full.element_size()
    kept = [full if i == 0 else full.clone() for i in range(copies(num_bytes))]
    calls: list[Call] = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in kept]  # type: ignore[misc]
    return Provider(f"torch {str(dtype)[6:]}", 8 * full.element_size(), num_bytes, calls, dtype)


def torch_int4(weight: Weight) -> Provider | None:
    """aten's weight-only int4 matmul; its zero point is a float on w = (q - 8) * scale + zero."""
    if weight.k % GROUP or weight.n % 64:
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.q[4].int(), 2)
    scale = weight.scale
    pairs = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    num_bytes = packed.numel() * packed.element_size() + pairs.numel() * 2
    kept = [(packed.clone(), pairs.clone()) for _ in range(copies(num_bytes))]
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls: list[Call] = [lambda x, w=w, p=p: op(x, w, GROUP, p) for w, p in kept]  # type: ignore[misc]
    return Provider("torch int4", 4, num_bytes, calls, torch.bfloat16)


def onnx_runtime(weight: Weight, level: int, threads: int) -> Provider | None:
    """MatMulNBits; accuracy_level 4 quantises activations to 8 bits, 0 keeps float32."""
    runtime, onnx = package("onnxruntime"), package("onnx")
    if runtime is None or onnx is None or weight.k % GROUP:
        return None
    helper, n, k = onnx.helper, weight.n, weight.k
    q = weight.q[4]
    nibbles = (q[:, ::2] | (q[:, 1::2] << 4)).view(n, k // GROUP, GROUP // 2)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=GROUP,
        accuracy_level=level,
    )  # fmt: skip
    array = onnx.numpy_helper.from_array
    stored = [array(nibbles.numpy(), "w"), array(weight.scale.float().flatten().numpy(), "s")]
    value, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = helper.make_graph([node], "g", [value("x", kind, ["m", k])], [value("y", kind, ["m", n])], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its idle threads would otherwise spin on the cores of the providers whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    num_bytes = n * k // 2 + weight.scale.numel() * 4
    sessions = [
        runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(copies(num_bytes))
    ]
    calls: list[Call] = [
        lambda x, s=s: torch.from_numpy(s.run(None, {"x": x.numpy()})[0])  # type: ignore[misc]
        for s in sessions
    ]
    return Provider(f"onnxruntime {runtime.__version__} level {level}", 4, num_bytes, calls, torch.float32)


def ggml_blocks(weight: Weight, library: Ggml) -> dict[str, Tensor]:
    """The weight as ggml quantises it, as bytes by type: half a minute for a large one, so once for all threads."""
    return {kind: library.quantize(weight.dense(bits), kind) for kind, bits in (("Q4_0", 4), ("Q3_K", 3))}


def llama_cpp(weight: Weight, library: Ggml, kind: str, blocks: Tensor, threads: int) -> list[Provider]:
    """ggml's mul_mat in the buffer that llama.cpp would choose for these blocks, and in the next where that is AMX.

    ggml's AMX kernels are asked for one token only: for more, version 0.25.3 loads a tile configuration that the
    processor refuses, and dies.
    """
    found: list[Provider] = []
    for amx in (True, False):
        layers = [
            library.linear(blocks, kind, weight.n, weight.k, threads, amx=amx)
            for _ in range(copies(blocks.numel()))
        ]
        calls: list[Call] = [lambda x, f=f: f(x) for f in layers]  # type: ignore[misc]
        name, bits = f"ggml {kind} ({layers[0].buffer})", 3 if kind == "Q3_K" else 4
        found.append(Provider(name, bits, blocks.numel(), calls, torch.float32))
        if layers[0].buffer != "AMX":
            break
        found[-1].most_tokens = 1
    return found


def plain_reads(num_bytes: int) -> list[Provider]:
    """Every byte loaded once: plainly, with prefetches, in four streams. The faster of the first two is the roof."""
    num_bytes = num_bytes // 4096 * 4096
    found = []
    for name, streams, prefetch in (
        ("plain read", 1, False), ("plain read, prefetched", 1, True), (packed_targets.IN_STREAMS, 4, False)
    ):  # fmt: skip
        buffers = [torch.ones(num_bytes // 4, dtype=torch.int32) for _ in range(copies(num_bytes))]
        calls: list[Call] = [
            lambda _, b=b, s=streams, p=prefetch: torch.ops.discquant.read_memory(b, s, p)  # type: ignore[misc]
            for b in buffers
        ]
        found.append(Provider(name, 0, num_bytes, calls, torch.float32))
    return found


def check(provider: Provider, weight: Weight, x: Tensor) -> None:
    """Gate before timing: no provider may be further from float64 than its own rounding of weights and activations.

    A wrong layout or zero point is off by several times `size`. ggml rounds the weight to its own grid first, which at
    3 bits moves each weight by about a tenth of the largest.

    Raises:
        AssertionError: The provider computes something else.
    """
    # 512 rows are enough to see a wrong layout; float64 on all would outlast the benchmark.
    some = weight.dense(3 if provider.bits == 3 else 4, 512).double()
    oracle, size = x.double() @ some.t(), x.double().abs() @ some.abs().t() / weight.k**0.5
    error = (provider.calls[0](x.to(provider.dtype))[:, : some.shape[0]].double() - oracle).abs()
    limit = 2**-7 * oracle.abs() + (1.5 if provider.name.startswith("ggml") else 8e-2) * size
    assert (error <= limit).all(), f"{provider.name}: error {error.max():.3e}"
