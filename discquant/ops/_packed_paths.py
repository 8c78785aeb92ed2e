# SPDX-License-Identifier: Apache-2.0
"""Behind `packed_linear`: the operators that C++ and CUDA own, and what is made of several of them.

That is the choice among a GPU's kernels, `packed_linear_gpu`, and the exact product on a CPU, `packed_linear_exact`:
traced graphs see one opaque node, which finds its workspace when it runs.
"""

from __future__ import annotations

import functools
import sys
import threading

import torch
from torch import Tensor

from discquant.ops import _registry as registry
from discquant.ops import packed_linear_table as table

GRID = "int out_features, int in_features, int num_bits, int group_size"
MMA_LAYOUT = 1
# Words in front of a workspace that must be zero before its first call: kMaxBlocks of csrc/packed/gpu_walk.h. What
# follows is written before it is read.
_COUNTERS = 1 << 16
# Weights dequantised at a time before a dense matmul on a GPU, where few panels pay: each is two launches.
_PANEL_WEIGHTS = 1 << 26
# Bytes of them on a CPU. A layer's weight is one panel there, whatever its size: with fewer rows the library's matmul
# may sum a row in another order (oneDNN in bfloat16 does), which would break the promise of exact mode. Only what is
# larger than the layers of all models but their heads is split.
_PANEL_BYTES = 1 << 29


def _dequantize_fake(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, out_features: int, in_features: int, num_bits: int,
    group_size: int, layout: int, row_begin: int, row_end: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return words.new_empty((row_end - row_begin, in_features), dtype=dtype)


def _mma_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, workspace: Tensor,
    out_features: int, in_features: int, num_bits: int, group_size: int, exact: bool, batch_invariant: bool,
    settled: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _prefill_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _gpu_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int, exact: bool, batch_invariant: bool, settled: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], out_features))


def _number_fake(*args: Tensor | int | None) -> int:
    raise NotImplementedError(
        "packed_linear: workspaces are found when a kernel runs, not while it is traced"
    )


dequantize_op = registry.define(
    f"dequantize_packed(Tensor words, Tensor scale, Tensor? zero_point, {GRID}, int layout, "
    "int row_begin, int row_end, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    None,
)
_dequantize_into_op = registry.define(
    f"dequantize_packed_into(Tensor(a!) out, Tensor words, Tensor scale, Tensor? zero_point, {GRID}, int layout, "
    "int row_begin, int row_end) -> ()",
    lambda *_: None,
    None,
)
# Tensor cores: 16 tokens at a time, split along K through the workspace.
mma_op = registry.define(
    "packed_linear_mma(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor(a!) workspace, "
    f"{GRID}, bool exact, bool batch_invariant, bool settled) -> Tensor",
    _mma_fake,
    None,
)
# Tensor cores, many tokens at a time; the weight rounded to the dtype of x, which the scale must have.
prefill_op = registry.define(
    f"packed_linear_prefill(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {GRID}) -> Tensor",
    _prefill_fake,
    None,
)
# Into how many parts of K that kernel cuts such a product, each with a thread block of a cluster; 1 without clusters.
prefill_splits_op = registry.define(
    f"packed_prefill_splits(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, {GRID}) -> int",
    _number_fake,
    None,
)
_size_op = registry.define(
    "packed_workspace_size(Tensor words, int out_features, int in_features) -> int", _number_fake, None
)
# Number of the graph capture that the current stream is in, 0 outside captures.
_capture_op = registry.define("packed_capture_id(Tensor words) -> int", _number_fake, None)


# Per device, stream and whether a graph is being captured: the capture's number and its workspace. Calls on one stream
# follow one another, so they share one. A graph has its own, zeroed by the graph itself: it may be replayed on any
# stream beside eager calls. Only the last capture of a stream is kept; earlier graphs own their memory pools.
_workspaces: dict[tuple[int, int, bool], tuple[int, Tensor]] = {}


@functools.lru_cache(maxsize=4096)
def _size(device: int, out_features: int, in_features: int) -> int:
    """Words of workspace, 0 where the kernel cannot take the weight; a function of the sizes and the device."""
    probe = torch.empty(0, dtype=torch.int32, device=torch.device("cuda", device))
    size: int = _size_op(probe, out_features, in_features)
    return size


def _in_graph_tree(device: int) -> bool:
    """Whether torch.compile(mode="reduce-overhead") warms up or records here, on the stream that it keeps for that.

    What is allocated then comes from the graphs' own pool, where torch suffers nothing that outlives the call.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = None if trees is None else trees.get_manager(device, create_if_none_exists=False)
    return manager is not None and bool(manager.stream == torch.cuda.current_stream(device))


def _fresh_workspace(size: int, device: torch.device) -> Tensor:
    """Uninitialised but for the counters: a graph does this again at every replay, for every layer or once."""
    space = torch.empty(size, dtype=torch.int32, device=device)
    space[:_COUNTERS].zero_()
    return space


def workspace(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """The workspace of the current stream, large enough for a weight; its counters are zero between calls."""
    device = words.device.index
    size = _size(device, out_features, in_features)
    if _in_graph_tree(device):
        return _fresh_workspace(size, words.device)
    capturing = torch.cuda.is_current_stream_capturing()
    capture: int = _capture_op(words) if capturing else 0
    key = (device, torch.cuda.current_stream(words.device).cuda_stream, capturing)
    kept = _workspaces.get(key)
    if kept is None or kept[0] != capture or kept[1].numel() < size:
        kept = _workspaces[key] = (capture, _fresh_workspace(size, words.device))
    return kept[1]


def _panels(out_features: int, in_features: int, limit: int) -> list[tuple[int, int]]:
    """Equal ranges of rows of at most 5/4 of `limit` weights, of whole tiles of a matmul where there is a choice."""
    count = max(1, -(-out_features * in_features // limit))
    step = -(-out_features // count)
    tile = 256 if step > 1024 else 16
    step = max(16, -(-step // tile) * tile)
    return [(first, min(first + step, out_features)) for first in range(0, out_features, step)]


def dense_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """On a GPU, panels of rows: dequantise to the dtype of x, multiply with the library's own matmul."""
    grid = (out_features, in_features, num_bits, group_size, MMA_LAYOUT)
    ranges = _panels(out_features, in_features, _PANEL_WEIGHTS)
    if len(ranges) <= 1:
        return torch.nn.functional.linear(
            x, dequantize_op(words, scale, zero_point, *grid, 0, out_features, x.dtype), bias
        )
    y = x.new_empty((x.shape[0], out_features))
    for first, last in ranges:
        panel = dequantize_op(words, scale, zero_point, *grid, first, last, x.dtype).t()
        if bias is None:
            torch.mm(x, panel, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, panel, out=y[:, first:last])
    return y


class _Scratch(threading.local):
    """One buffer per thread, kept for good, of the largest panel so far: mostly the largest layer's weight.

    Fresh pages for every panel took longer than its weights.
    """

    def __init__(self) -> None:
        self.kept = torch.empty(0, dtype=torch.uint8, device="cpu")

    def panel(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, until the thread's next call."""
        size = rows * cols * dtype.itemsize
        if self.kept.numel() < size:
            self.kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self.kept[:size].view(dtype).view(rows, cols)


_scratch = _Scratch()


def _exact_cpu(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int, layout: int,
) -> Tensor:  # fmt: skip
    """`dense_linear` on a CPU, through one scratch; x [..., in_features] as it lies, which decides how torch sums."""
    grid = (out_features, in_features, num_bits, group_size, layout)

    def panel(first: int, last: int) -> Tensor:
        weight = _scratch.panel(last - first, in_features, x.dtype)
        _dequantize_into_op(weight, words, scale, zero_point, *grid, first, last)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias[first:last])

    with torch.no_grad():
        ranges = _panels(out_features, in_features, _PANEL_BYTES // x.dtype.itemsize)
        if len(ranges) == 1:
            return panel(0, out_features)
        y = x.new_empty((*x.shape[:-1], out_features))
        for first, last in ranges:
            y[..., first:last] = panel(first, last)
        return y


def _exact_fake(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int, layout: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


exact_op = registry.define(
    f"packed_linear_exact(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {GRID}, int layout)"
    " -> Tensor",
    _exact_fake,
    _exact_cpu,
    ("CPU",),
)


def _gpu_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, out_features: int,
    in_features: int, num_bits: int, group_size: int, exact: bool, batch_invariant: bool, settled: bool,
) -> Tensor:  # fmt: skip
    """Choose: our kernel for few tokens, whose sums do not depend on the batch; for many; dequantise + cuBLAS."""
    columns = -(-in_features // 8) * 8
    size = _size(words.device.index, out_features, columns)
    many = not batch_invariant and scale.dtype == x.dtype and table.prefills(x.device, num_bits, x.shape[0])
    dense = not batch_invariant and not many and x.shape[0] >= table.dense_tokens(x.device, num_bits)
    # `exact` multiplies by the scale in the dtype of x: exact only if the scale has it. Size 0: the kernels cannot.
    if x.dtype == torch.float32 or dense or (exact and scale.dtype != x.dtype) or (out_features and not size):
        if batch_invariant:  # the library's matmul is not
            raise NotImplementedError(
                "packed_linear: batch_invariant must go with what the kernel for few tokens takes = True, "
                f"got x of {x.dtype}, scales of {scale.dtype} and {out_features} x {in_features} weights"
            )
        return dense_linear(
            x, words, scale, zero_point, bias, out_features, in_features, num_bits, group_size
        )
    if columns != in_features:
        x = torch.nn.functional.pad(x, (0, columns - in_features))
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if x.stride(0) != in_features or x.stride(1) != 1 else x.clone()
    grid = (out_features, columns, num_bits, group_size)
    if many:
        out: Tensor = prefill_op(x, words, scale, zero_point, bias, *grid)
        return out
    space = workspace(words, out_features, columns)
    y: Tensor = mma_op(x, words, scale, zero_point, bias, space, *grid, exact, batch_invariant, settled)
    return y


gpu_op = registry.define(
    f"packed_linear_gpu(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? bias, {GRID}, bool exact, "
    "bool batch_invariant, bool settled) -> Tensor",
    _gpu_fake,
    _gpu_linear,
    ("CUDA",),
)
