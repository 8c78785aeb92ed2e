# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: exactness, float64 bounds, repeats, graphs, streams, dirty workspaces, sanitizers.

`compute-sanitizer` runs this file's `sanitized` function in a process of its own.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from discquant import _extension
from discquant.ops import pack as packing
from discquant.ops import packed_linear_table as table
from discquant.ops.packed_linear import dequantize_packed, packed_linear

pytestmark = pytest.mark.gpu

TOKENS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257, 1000]
HALF = [torch.float16, torch.bfloat16]
GRIDS = list(itertools.product([3, 4], [32, 64, 128, 256, -1], [True, False]))
SHAPES = [(1, 8), (64, 128), (97, 321), (200, 1000), (1040, 4104)]


class Case:
    """A packed weight on the GPU and what it stands for on the CPU."""

    def __init__(
        self, n: int, k: int, bits: int = 3, group: int = 64, symmetric: bool = True,
        dtype: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        groups = 1 if group == -1 else -(-k // group)
        self.q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        self.step = (torch.rand(n, groups) * 0.1 - 0.03).to(dtype)
        self.zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
        words = packing.pack(self.q, self.zero, num_bits=bits, group_size=group, layout="mma")
        zero = None if self.zero is None else packing.pack_groups(self.zero, layout="mma").cuda()
        self.tensors = (words.cuda(), packing.pack_groups(self.step, layout="mma").cuda(), zero)
        self.sizes: dict[str, Any] = {
            "out_features": n, "in_features": k, "num_bits": bits, "group_size": group, "layout": "mma",
        }  # fmt: skip
        index = torch.arange(k) // (k if group == -1 else group)
        centre = 2.0 ** (bits - 1) if self.zero is None else self.zero.double()[:, index]
        self.weight = self.step.double()[:, index] * (self.q.double() - centre)

    def __call__(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return packed_linear(x, *self.tensors, bias, **self.sizes, impl="cpp", **options)

    def served(self, dtype: torch.dtype) -> Tensor:
        """The weight as training produced it: one float32 product, which is exact here, and one rounding."""
        return self.weight.float().to(dtype)


def allowed(x: Tensor, weight: Tensor, oracle: Tensor) -> Tensor:
    """sqrt(K) roundings of a float32 sum (tensor cores cut instead of rounding: twice that), and the output's own."""
    magnitude = x.double().abs() @ weight.abs().t()
    error = 2 * (x.shape[1] ** 0.5 + 8) * 2.0**-23 * magnitude
    return error + torch.finfo(x.dtype).eps * (oracle.abs() + error)


def is_dense(tokens: int, bits: int, scale_is_x: bool = True) -> bool:
    """Whether that many tokens are dequantise + cuBLAS: torch's own linear on the rounded weight."""
    device = torch.device("cuda", 0)
    many = scale_is_x and table.prefills(device, bits, tokens)
    return tokens >= table.dense_tokens(device, bits) and not many


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_dequantisation_is_bit_exact(bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """By the kernel that writes weights, and by an identity matrix through the tensor cores, split and tiled."""
    case = Case(200, 328, bits, group, symmetric, dtype)
    for target in (torch.float32, *HALF):
        actual = dequantize_packed(*case.tensors, **case.sizes, dtype=target)
        assert torch.equal(actual.cpu(), case.served(target))
        panel = dequantize_packed(*case.tensors, **case.sizes, dtype=target, rows=(16, 199))
        assert torch.equal(panel.cpu(), case.served(target)[16:199])
    one = torch.eye(328, dtype=dtype, device="cuda")
    expected = case.served(dtype).t()
    for rows in (one.split(16), one.split(9), one.split(64), (one,)):
        for mode in ("exact", "auto"):
            y = torch.cat([case(part, mode=mode) for part in rows]).cpu()
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS[::3])
def test_matches_float64(
    bits: int, group: int, symmetric: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(*shape, bits, group, symmetric, dtype)
    rounded = case.served(dtype).double()
    for tokens in TOKENS:
        x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        for mode in ("auto", "exact"):
            y = case(x.cuda(), bias.cuda(), mode=mode, settled=tokens % 2 == 0).cpu()
            if is_dense(tokens, bits):
                # The same call of the library on the same weight: its own rounding is not ours to bound.
                plain = torch.nn.functional.linear(x.cuda(), case.served(dtype).cuda(), bias.cuda())
                assert torch.equal(y, plain.cpu()), (tokens, mode)
                continue
            # The scale multiplies float32 sums; in exact mode and in the kernel for many tokens, weights are rounded.
            many = table.prefills(torch.device("cuda", 0), bits, tokens)
            weight = rounded if mode == "exact" or many else case.weight
            oracle = x.double() @ weight.t() + bias.double()
            y = y.double()
            limit = allowed(x, weight, oracle) + 2.0**-23 * bias.double().abs()
            assert ((y - oracle).abs() <= limit).all(), (tokens, mode, ((y - oracle).abs() / limit).max())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_another_dtype(scale_dtype: torch.dtype) -> None:
    case = Case(130, 264, 4, 64, False, scale_dtype)
    for dtype, tokens in itertools.product(HALF, (1, 16, 40)):
        x = torch.randn(tokens, 264).to(dtype)
        same = dtype == scale_dtype
        many = same and table.prefills(torch.device("cuda", 0), 4, tokens)
        weight = case.served(dtype).double() if many or is_dense(tokens, 4, same) else case.weight
        oracle = x.double() @ weight.t()
        assert ((case(x.cuda()).double().cpu() - oracle).abs() <= allowed(x, weight, oracle)).all()


def test_float32_activations_use_the_dense_path() -> None:
    case = Case(70, 200, 3, 64, False, torch.float16)
    x = torch.randn(5, 200, device="cuda")
    weight = dequantize_packed(*case.tensors, **case.sizes, dtype=torch.float32)
    assert torch.equal(case(x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 100])
def test_twenty_repeats_are_bitwise_equal(tokens: int) -> None:
    case = Case(1040, 4104, 3, 128, False)
    x = torch.randn(tokens, 4104, device="cuda", dtype=torch.float16)
    first = case(x)
    for _ in range(20):
        assert torch.equal(case(x), first)


@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_batch_invariant(mode: str) -> None:
    """Row i of any batch equals the row alone."""
    case = Case(1040, 4104, 4, 64, True, torch.bfloat16)
    x = torch.randn(257, 4104, device="cuda", dtype=torch.bfloat16)
    call = {"mode": mode, "batch_invariant": True}
    alone = torch.cat([case(x[i : i + 1], **call) for i in range(33)])
    for tokens in (2, 5, 8, 9, 16, 17, 33, 257):
        y = case(x[:tokens], **call)
        assert torch.equal(y[:33], alone[: min(tokens, 33)])


def test_batch_invariant_says_what_it_cannot_do() -> None:
    case = Case(64, 128, 4, 64, True, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="batch_invariant must go with float16 or bfloat16"):
        case(torch.zeros(1, 128, device="cuda"), batch_invariant=True)
    with pytest.raises(NotImplementedError, match="batch_invariant must go with"):
        case(torch.zeros(1, 128, device="cuda").half(), batch_invariant=True, mode="exact")


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_hundred_graph_replays(tokens: int) -> None:
    """Two layers in one graph, replayed with new inputs while eager calls of the same layers run on another stream."""
    first, second = Case(1040, 4104, 3, 128, True), Case(200, 1040, 4, 64, False)
    x = torch.zeros(tokens, 4104, device="cuda", dtype=torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second(first(x))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = second(first(x))
    other = torch.cuda.Stream()
    for _ in range(100):
        value = torch.randn(tokens, 4104, device="cuda", dtype=torch.float16) * 0.1
        torch.cuda.synchronize()
        x.copy_(value)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            eager = second(first(value))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_graphs_of_torch_compile(tokens: int) -> None:
    """mode="reduce-overhead" warms up and records in a memory pool that must hold nothing but outputs."""
    first, second = Case(1040, 4104, 3, 128, True), Case(200, 1040, 4, 64, False)
    compiled = torch.compile(lambda x: second(first(x)) * 2, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(tokens, 4104, device="cuda", dtype=torch.float16) * 0.1
    with torch.inference_mode():
        expected = second(first(x)) * 2
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x), expected)


def test_two_graphs_at_once() -> None:
    """Graphs captured on one stream and replayed on two do not share a workspace."""
    case = Case(1040, 4104, 3, 128, True)
    xs = [torch.randn(4, 4104, device="cuda", dtype=torch.float16) for _ in range(2)]
    expected = [case(x) for x in xs]
    graphs, ys = [torch.cuda.CUDAGraph() for _ in xs], []
    for graph, x in zip(graphs, xs, strict=True):
        with torch.cuda.graph(graph):
            ys.append(case(x))
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))


def test_two_streams_and_four_threads() -> None:
    case = Case(1040, 4104, 4, 32, False)
    xs = [torch.randn(1 + 4 * i, 4104, device="cuda", dtype=torch.float16) for i in range(4)]
    expected = [case(x) for x in xs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(case(xs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_dirty_workspace() -> None:
    """Only the counters must be zero; what earlier calls left in the sums is never read."""
    from discquant.ops import _packed_paths as paths

    case = Case(1040, 4104, 3, 64, True)
    x = torch.randn(3, 4104, device="cuda", dtype=torch.float16)
    expected = case(x)
    space = paths.workspace(case.tensors[0], 1040, 4104)
    counters = 1 << 16
    assert not space[:counters].any()
    space[counters:] = -1  # NaN as float32
    assert torch.equal(case(x), expected)
    assert not space[:counters].any()


def test_layers_of_all_sizes_share_a_workspace() -> None:
    """In any order: what one leaves there is no counter of another; launches may overlap."""
    cases = [Case(n, k, 4, 64, True) for n, k in ((16, 4096), (1040, 4104), (64, 128), (4160, 264))]
    xs = [torch.randn(5, case.sizes["in_features"], device="cuda").half() for case in cases]
    expected = [case(x) for case, x in zip(cases, xs, strict=True)]
    for order in itertools.permutations(range(4)):
        found = {i: cases[i](xs[i], settled=True) for i in order}
        assert all(torch.equal(found[i], expected[i]) for i in order)


def test_strides() -> None:
    case = Case(70, 136, 4, 32, True)
    wide = torch.randn(40, 400, device="cuda", dtype=torch.float16)
    for x in (
        wide[:, 5:141], wide[:, 8:144], wide[::2, :136], torch.randn(136, 4, device="cuda").half().t(),
        torch.randn(1, 136, device="cuda").half().expand(3, 136), wide[:6, :136].reshape(2, 3, 136),
    ):  # fmt: skip
        assert torch.equal(case(x), case(x.clone(memory_format=torch.contiguous_format)))


def test_pack_unpack_repack_equal_the_cpus() -> None:
    for bits, group, symmetric in GRIDS:
        case = Case(97, 321, bits, group, symmetric)
        zero = None if case.zero is None else case.zero.cuda()
        for layout in ("mma", "cpu"):
            keys: dict[str, Any] = {"num_bits": bits, "layout": layout}
            words = packing.pack(case.q.cuda(), zero, group_size=group, **keys)
            assert torch.equal(words.cpu(), packing.pack(case.q, case.zero, group_size=group, **keys))
            assert torch.equal(packing.unpack(words, out_features=97, in_features=321, **keys).cpu(), case.q)
            new: Any = "cpu" if layout == "mma" else "mma"
            moved = packing.repack(words, out_features=97, in_features=321, new_layout=new, **keys)
            assert torch.equal(
                moved.cpu(), packing.pack(case.q, case.zero, num_bits=bits, group_size=group, layout=new)
            )


def test_special_activations() -> None:
    """A NaN or infinity shows in its own row only; empty batches and weights are fine."""
    case = Case(40, 256, 4, 64, True)
    for tokens in (5, 40):
        x = torch.randn(tokens, 256, device="cuda").half()
        x[0], x[2, 100], x[3, 7] = 0, float("nan"), float("inf")
        y = case(x)
        assert not y[0].any() and y[1].isfinite().all() and y[4:].isfinite().all()
        assert y[2].isnan().all() and not y[3].isfinite().any()
    assert case(torch.zeros(0, 256, device="cuda").half()).shape == (0, 40)
    assert Case(0, 64)(torch.zeros(2, 64, device="cuda").half()).shape == (2, 0)


def test_triton_fallback_agrees() -> None:
    case = Case(200, 328, 3, 64, False)
    for tokens in (1, 16, 70):
        x = torch.randn(tokens, 328).half()
        oracle = x.double() @ case.served(torch.float16).double().t()
        y = packed_linear(x.cuda(), *case.tensors, **case.sizes, impl="triton").double().cpu()
        assert ((y - oracle).abs() <= allowed(x, case.served(torch.float16).double(), oracle)).all()


def test_opcheck_compile_and_meta() -> None:
    case = Case(72, 104, 3, 32, False)
    words, scale, zero = case.tensors
    sizes = (72, 104, 3, 32)
    op = torch.ops.discquant.packed_linear_gpu.default
    for tokens in (3, 40):
        x = torch.randn(tokens, 104, device="cuda").half()
        torch.library.opcheck(op, (x, words, scale, zero, None, *sizes, False, False, False))
        run = torch.compile(lambda t: case(t) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(run(x), case(x) * 2)
    space = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    mma = torch.ops.discquant.packed_linear_mma.default
    tests = ("test_schema", "test_faketensor")
    x = torch.randn(3, 104, device="cuda").half()
    torch.library.opcheck(
        mma, (x, words, scale, zero, None, space, *sizes, False, False, False), test_utils=tests
    )
    meta = [None if t is None else t.to("meta") for t in (x, words, scale, zero)]
    assert op(*meta, None, *sizes, False, False, False).shape == (3, 72)


def prefill(case: Case, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel for many tokens, whatever the table says; in-features a multiple of 8."""
    sizes = tuple(case.sizes[name] for name in ("out_features", "in_features", "num_bits", "group_size"))
    y: Tensor = torch.ops.discquant.packed_linear_prefill(x, *case.tensors, bias, *sizes)
    return y


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_prefill(bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Bit-exact weights through the tensor cores, float64 bounds, equal bits in every run, ragged tiles."""
    case = Case(200, 328, bits, group, symmetric, dtype)
    one = torch.eye(328, dtype=dtype, device="cuda")
    for part in (60, 328):
        y = torch.cat([prefill(case, rows) for rows in one.split(part)]).cpu()
        assert torch.equal(y, case.served(dtype).t())
    for n, k in ((97, 320), (1040, 4104), (4096, 1032)):
        case = Case(n, k, bits, group, symmetric, dtype)
        weight = case.served(dtype).double().cuda()
        for tokens in (1, 33, 64, 129, 300):
            x, bias = torch.randn(tokens, k).to(dtype).cuda(), torch.randn(n).to(dtype).cuda()
            y = prefill(case, x, bias)
            oracle = x.double() @ weight.t() + bias.double()
            limit = allowed(x, weight, oracle) + 2.0**-23 * bias.double().abs()
            assert ((y.double() - oracle).abs() <= limit).all(), (n, k, tokens)
            assert all(torch.equal(prefill(case, x, bias), y) for _ in range(5))


def test_prefill_shares_tiles_where_it_can() -> None:
    """A build for sm_90 uses clusters there: nothing else would show that the driver was told otherwise."""
    case, splits = Case(1024, 4096, 4, 128, True), []
    for tokens in (20, 4096):
        x = torch.zeros(tokens, 4096, device="cuda").half()
        splits.append(torch.ops.discquant.packed_prefill_splits(x, *case.tensors, 1024, 4096, 4, 128))
    print(f"parts of K at 20 and 4096 tokens: {splits}")
    major, minor = torch.cuda.get_device_capability()
    assert (splits[0] > 1) == (
        major >= 9 and (_extension.cuda_code(major, minor) or "").startswith(f"{major}{minor}")
    )


def test_prefill_checks_for_itself() -> None:
    case = Case(64, 128, 4, 64, True)
    x = torch.zeros(20, 128, device="cuda").half()
    for bad in (
        x.bfloat16(),
        x.float(),
        x[:, :64],
        x.cpu(),
        torch.zeros(20, 129, device="cuda").half()[:, 1:],
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            prefill(case, bad)
    assert prefill(case, x[:0]).shape == (0, 64)
    op, sizes = torch.ops.discquant.packed_linear_prefill.default, (64, 128, 4, 64)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (x, *case.tensors, None, *sizes), test_utils=tests)


def test_operator_checks_for_itself() -> None:
    """A caller that goes round the public function gets an error, not a read past the end."""
    case = Case(72, 104, 3, 32, False)
    words, scale, zero = case.tensors
    x = torch.zeros(2, 104, device="cuda").half()
    space = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    sizes = (72, 104, 3, 32, False, False, False)
    mma = torch.ops.discquant.packed_linear_mma
    for args in (
        (x, words[:-1], scale, zero, None, space, *sizes),
        (x, words, scale[:, :1], zero, None, space, *sizes),
        (x, words, scale, zero[:, :1], None, space, *sizes),
        (x, words, scale, zero, torch.zeros(3, device="cuda").half(), space, *sizes),
        (x, words, scale, zero, None, space[:4], *sizes),
        (x.float(), words, scale, zero, None, space, *sizes),
        (x.cpu(), words, scale, zero, None, space, *sizes),
        (x[:, :103], words, scale, zero, None, space, *sizes),
        (x[:, 1:], words, scale, zero, None, space, 72, 103, 3, 32, False, False, False),
        (
            x,
            words,
            torch.cat([scale.view(-1)[:1], scale.view(-1)])[1:].view_as(scale),
            zero,
            None,
            space,
            *sizes,
        ),
    ):
        with pytest.raises(RuntimeError):
            mma(*args)


@torch.no_grad()
def test_module_moves_between_devices(tiny_llama_dir: Path) -> None:
    """A packed model moved to the GPU writes the text of plain weights there, in the exact mode."""
    from transformers import AutoModelForCausalLM

    from discquant.formats.codes import QuantizedLinear
    from discquant.modules import load_packed

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            q = torch.randint(0, 8, module.weight.shape, dtype=torch.uint8)
            step = torch.full((q.shape[0], q.shape[1] // 64), 0.01).bfloat16()
            layers.append(QuantizedLinear(name, q, step, None, 3, 64))
            plain.get_submodule(name).weight.data = layers[-1].dequantize(torch.bfloat16)
    load_packed(model, layers, mode="exact", fuse=False)
    prompt = torch.randint(3, 1000, (1, 9), device="cuda")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.cuda().generate(prompt, **settings), plain.cuda().generate(prompt, **settings))
    assert torch.equal(model.cpu()(prompt.cpu()).logits, plain.cpu()(prompt.cpu()).logits)


def sanitized() -> None:
    """Small launches of every kernel, odd sizes, for compute-sanitizer."""
    for bits, symmetric in itertools.product([3, 4], [True, False]):
        case = Case(97, 328, bits, 32, symmetric)
        for tokens in (1, 9, 20):
            x = torch.randn(tokens, 328, device="cuda", dtype=torch.float16)
            for options in ({}, {"mode": "exact"}, {"batch_invariant": True}):
                case(x, **options)
        for tokens in (20, 130):
            prefill(case, torch.randn(tokens, 328, device="cuda", dtype=torch.float16))
        zero = None if case.zero is None else case.zero.cuda()
        words = packing.pack(case.q.cuda(), zero, num_bits=bits, group_size=32, layout="cpu")
        sizes: dict[str, Any] = {"out_features": 97, "in_features": 328, "num_bits": bits}
        packing.repack(words, **sizes, layout="cpu", new_layout="mma")
        packing.unpack(words, **sizes, layout="cpu")
    # Sums that thread blocks share: clusters that split K, and row blocks that end in the middle of a run.
    for bits in (3, 4):
        case = Case(1040, 4104, bits, 128, True)
        prefill(case, torch.randn(20, 4104, device="cuda", dtype=torch.float16))
        case = Case(8192, 1024, bits, 128, True)
        for tokens in (1, 16):
            case(torch.randn(tokens, 1024, device="cuda", dtype=torch.float16))
    torch.cuda.synchronize()
    print("sanitized: done")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str, repo_root: Path) -> None:
    # initcheck must see torch's kernels write what ours read.
    only = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=discquant"]
    script = str(Path(__file__).resolve())
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *only, sys.executable, script]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "sanitized: done" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-2000:]
    )


if __name__ == "__main__":
    sanitized()
