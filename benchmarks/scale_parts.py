# SPDX-License-Identifier: Apache-2.0
"""What scale_gpu.py is made of: a model drawn on the device, bare matmuls, copies, their overlap, checksums.

Nothing here knows of placements or depths.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

STD = 0.02
COPY_BYTES = 1 << 30
CHECKSUM_WORDS = 1 << 26  # of 8 bytes, at once
Event = tuple[str, float, float]  # name, begin, end in seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median time of a call after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


class RandomCheckpoint:
    """In place of `formats.checkpoint.Checkpoint`: weights are drawn on the device at every read, the same each time.

    No file, no host memory, no generator of the CPU, which takes a minute for what a GPU draws in a second.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        """Take the names and shapes of a configuration's model."""
        from discquant.planning.shape import empty_model

        self.tensors: dict[str, Tensor] = empty_model(config).state_dict()
        self._device = device

    def read(self, name: str) -> Tensor:
        """Return a weight, bfloat16; never zeros, which compute faster."""
        shape = self.tensors[name].shape
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if len(shape) == 1:
            return empty.fill_(1.0)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return empty.normal_(0.0, STD, generator=generator)


def open_model(
    folder: Path, config: dict[str, Any], device: torch.device, dtype: torch.dtype, *, whole: bool
) -> Any:
    """Return a model on the device as `quantize` would open it.

    Args:
        folder: For config.json.
        config: Its contents.
        device: Where it runs.
        dtype: Of computing.
        whole: With the original weights in the device's memory (as resident runs have them), else read block by block.
    """
    from transformers import AutoConfig

    from discquant.formats.lazy import build_lazy, settle
    from discquant.planning.shape import empty_model

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parsed = AutoConfig.from_pretrained(folder)
    checkpoint = RandomCheckpoint(parsed, device)
    lazy = build_lazy(folder, cast(Any, checkpoint), dtype)
    assert lazy is not None
    settle(lazy, device, stream=True)
    if not whole:
        return lazy
    model = empty_model(parsed)
    values = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    model.load_state_dict(values, assign=True)
    for name, buffer in lazy.named_buffers():  # rotary frequencies, which no checkpoint holds
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return cast(nn.Module, model).eval()


def bare_matmuls(
    linears: Sequence[tuple[int, int]], tokens: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Return seconds of one block's five products per linear: three forward, dX, and dW in float32."""
    made = []
    for rows, columns in linears:
        made.append(
            (
                torch.randn(rows, columns, device=device, dtype=dtype).mul_(STD),
                torch.randn(tokens, columns, device=device, dtype=dtype),
                torch.randn(tokens, rows, device=device, dtype=dtype),
            )
        )

    def once() -> None:
        for weight, x, dy in made:
            for _ in range(3):
                torch.mm(x, weight.t())
            torch.mm(dy, weight)
            if device.type == "cuda":
                torch.mm(dy.t(), x, out_dtype=torch.float32)
            else:
                torch.mm(dy.t(), x)

    return seconds_of(once, device)


def link(device: torch.device, num_bytes: int = COPY_BYTES) -> dict[str, Any]:
    """Return GB/s of pinned copies to the device, from it, and of both at once (their sum)."""
    from discquant.solver.memory import HostArena

    if device.type != "cuda":
        num_bytes = min(num_bytes, 1 << 24)
    arenas = [HostArena(num_bytes, pin=device.type == "cuda") for _ in range(2)]
    there = [torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device) for _ in range(2)]
    for arena, tensor in zip(arenas, there, strict=True):
        arena.tensor.copy_(tensor)
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None, None]

    def inward() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(arenas[0].tensor, non_blocking=True)

    def outward() -> None:
        with torch.cuda.stream(streams[1]):
            arenas[1].tensor.copy_(there[1], non_blocking=True)

    def both() -> None:
        inward()
        outward()

    found: dict[str, Any] = {
        "in_gb_s": num_bytes / seconds_of(inward, device) / 1e9,
        "out_gb_s": num_bytes / seconds_of(outward, device) / 1e9,
        "both_gb_s": 2 * num_bytes / seconds_of(both, device) / 1e9,
        "pinned": all(arena.problem is None for arena in arenas) and device.type == "cuda",
    }
    for arena in arenas:
        arena.close()
    return found


def merged(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the union of intervals as sorted disjoint ones."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def covered(interval: tuple[float, float], union: Sequence[tuple[float, float]]) -> float:
    """Return how much of an interval lies within a union from `merged`."""
    begin, end = interval
    total = 0.0
    for other in union[max(0, bisect_left(union, (begin, begin)) - 1) :]:
        if other[0] >= end:
            break
        total += max(0.0, min(end, other[1]) - max(begin, other[0]))
    return total


def longest(events: Sequence[Event], count: int = 30) -> list[dict[str, Any]]:
    """Return the kernels and copies that took the most time together: name, seconds, launches."""
    spent: dict[str, list[float]] = {}
    for name, begin, end in events:
        spent.setdefault(name[:100], []).append(end - begin)
    most = sorted(spent.items(), key=lambda item: -sum(item[1]))[:count]
    return [{"name": name, "seconds": sum(each), "launches": len(each)} for name, each in most]


def overlap(events: Sequence[Event]) -> dict[str, Any]:
    """Return how much of the copies' time lies under a running kernel.

    Args:
        events: Of the device: kernels, and copies by the profiler's names ("Memcpy HtoD ...", "Memcpy DtoH ...").

    Returns:
        Seconds of kernels (their union) and of copies in either direction, with the covered share of each; the share
        is None where nothing was copied. And the kernels that took longest, by name.
    """
    kernels = merged(
        [(begin, end) for name, begin, end in events if not name.startswith(("Memcpy", "Memset"))]
    )
    found: dict[str, Any] = {
        "events": len(events),
        "span_seconds": max((e[2] for e in events), default=0.0) - min((e[1] for e in events), default=0.0),
        "kernel_seconds": sum(end - begin for begin, end in kernels),
        "longest": longest(events),
    }
    time_all = under_all = 0.0
    for key, word in (("in", "Memcpy HtoD"), ("out", "Memcpy DtoH")):
        copies = [(begin, end) for name, begin, end in events if name.startswith(word)]
        spent = sum(end - begin for begin, end in copies)
        under = sum(covered(copy, kernels) for copy in copies)
        found[f"{key}_seconds"], found[f"{key}_share"] = spent, under / spent if spent else None
        time_all, under_all = time_all + spent, under_all + under
    found["share"] = under_all / time_all if time_all else None
    return found


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run a call under torch.profiler and return `overlap` of what the device did; without one, why there is none."""
    if device.type != "cuda":
        call()
        return {"missing": "no GPU"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize(device)
    events = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    return overlap(events) if events else {"missing": "the profiler saw no work of the device"}


def checksum(data: Tensor) -> int:
    """Return a 64-bit checksum of bytes, computed where they are.

    Words of eight bytes, stirred, times odd numbers that differ by place, summed: each step can be inverted, so that no
    single word can change unnoticed.
    """
    flat = data.flatten().view(torch.uint8)
    words = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    total = 0
    for begin in range(0, words.numel(), CHECKSUM_WORDS):
        part = words[begin : begin + CHECKSUM_WORDS]
        place = torch.arange(begin, begin + part.numel(), dtype=torch.int64, device=part.device)
        stirred = part * 0x2545F4914F6CDD1D
        stirred ^= stirred >> 31  # brings the high bits down, or two changes there could cancel
        total += int(stirred.mul_(place.mul_(0x9E3779B1 * 2).add_(1)).sum())
    return total & (2**64 - 1)


def fingerprint(solver: Any) -> dict[str, Any]:
    """Return SHA-256 of all rounded codes (two per byte) and a checksum of all that steps change (frac and moments)."""
    from discquant.solver.state import pack_nibbles

    state, pending = 0, []
    with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter's lock
        for index in range(len(solver.placement)):
            block = solver.placement.fetch(index)
            for layer in block.states:
                codes = pack_nibbles(layer.codes()).cpu().contiguous().numpy()
                pending.append(pool.submit(lambda data: hashlib.sha256(data).digest(), cast(Any, codes)))
            state = (state * 31 + checksum(block.changed())) & (2**64 - 1)
    digest = hashlib.sha256(b"".join(item.result() for item in pending))
    return {"codes_sha256": digest.hexdigest(), "state_checksum": f"{state:016x}"}


def line(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return seconds of a step as fixed + per_block * blocks: from the shallowest and the deepest run, or one alone."""
    if not rows:
        return None
    low = min(rows, key=lambda row: row["blocks"])
    high = max(rows, key=lambda row: row["blocks"])
    if low["blocks"] == high["blocks"]:
        per_block = high["seconds_per_step"] / high["blocks"]
        return {
            "per_block": per_block,
            "fixed": 0.0,
            "from": f"division by {high['blocks']} blocks, head included",
        }
    per_block = (high["seconds_per_step"] - low["seconds_per_step"]) / (high["blocks"] - low["blocks"])
    return {
        "per_block": per_block,
        "fixed": low["seconds_per_step"] - per_block * low["blocks"],
        "from": f"difference of {low['blocks']} and {high['blocks']} blocks",
    }
