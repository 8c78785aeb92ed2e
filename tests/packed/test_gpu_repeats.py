# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: equal bits in repeats, batches, graphs, streams, threads and shared workspaces."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

Make = Callable[..., Any]


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 100])
def test_twenty_repeats_are_bitwise_equal(tokens: int, make_case: Make) -> None:
    case = make_case(1040, 4104, 3, 128, False)
    x = torch.randn(tokens, 4104, device="cuda", dtype=torch.float16)
    first = case(x)
    for _ in range(20):
        assert torch.equal(case(x), first)


@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_batch_invariant(mode: str, make_case: Make) -> None:
    """Row i of any batch equals the row alone."""
    case = make_case(1040, 4104, 4, 64, True, torch.bfloat16)
    x = torch.randn(257, 4104, device="cuda", dtype=torch.bfloat16)
    call = {"mode": mode, "batch_invariant": True}
    alone = torch.cat([case(x[i : i + 1], **call) for i in range(33)])
    for tokens in (2, 5, 8, 9, 16, 17, 33, 257):
        y = case(x[:tokens], **call)
        assert torch.equal(y[:33], alone[: min(tokens, 33)])


def test_batch_invariant_says_what_it_cannot_do(make_case: Make) -> None:
    case = make_case(64, 128, 4, 64, True, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="batch_invariant must go with float16 or bfloat16"):
        case(torch.zeros(1, 128, device="cuda"), batch_invariant=True)
    with pytest.raises(NotImplementedError, match="batch_invariant must go with"):
        case(torch.zeros(1, 128, device="cuda").half(), batch_invariant=True, mode="exact")


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_hundred_graph_replays(tokens: int, make_case: Make) -> None:
    """Two layers in one graph, replayed with new inputs while eager calls of the same layers run on another stream."""
    first, second = make_case(1040, 4104, 3, 128, True), make_case(200, 1040, 4, 64, False)
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
def test_graphs_of_torch_compile(tokens: int, make_case: Make) -> None:
    """mode="reduce-overhead" warms up and records in a memory pool that must hold nothing but outputs."""
    first, second = make_case(1040, 4104, 3, 128, True), make_case(200, 1040, 4, 64, False)
    compiled = torch.compile(lambda x: second(first(x)) * 2, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(tokens, 4104, device="cuda", dtype=torch.float16) * 0.1
    with torch.inference_mode():
        expected = second(first(x)) * 2
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x), expected)


def test_two_graphs_at_once(make_case: Make) -> None:
    """Graphs captured on one stream and replayed on two do not share a workspace."""
    case = make_case(1040, 4104, 3, 128, True)
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


def test_two_streams_and_four_threads(make_case: Make) -> None:
    case = make_case(1040, 4104, 4, 32, False)
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


def test_dirty_workspace(make_case: Make) -> None:
    """Only the counters must be zero; what earlier calls left in the sums is never read."""
    from discquant.ops import _packed_paths as paths

    case = make_case(1040, 4104, 3, 64, True)
    x = torch.randn(3, 4104, device="cuda", dtype=torch.float16)
    expected = case(x)
    space = paths.workspace(case.tensors[0], 1040, 4104)
    counters = 1 << 16
    assert not space[:counters].any()
    space[counters:] = -1  # NaN as float32
    assert torch.equal(case(x), expected)
    assert not space[:counters].any()


def test_layers_of_all_sizes_share_a_workspace(make_case: Make) -> None:
    """In any order: what one leaves there is no counter of another; launches may overlap."""
    cases = [make_case(n, k, 4, 64, True) for n, k in ((16, 4096), (1040, 4104), (64, 128), (4160, 264))]
    xs = [torch.randn(5, case.sizes["in_features"], device="cuda").half() for case in cases]
    expected = [case(x) for case, x in zip(cases, xs, strict=True)]
    for order in itertools.permutations(range(4)):
        found = {i: cases[i](xs[i], settled=True) for i in order}
        assert all(torch.equal(found[i], expected[i]) for i in order)
