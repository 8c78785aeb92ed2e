# SPDX-License-Identifier: Apache-2.0
"""What a plan assumes about machines, with sources; memory of the machine it runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from discquant.config import ComputeDtype
from discquant.errors import ConfigError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
GB = 1e9
GIB = float(1 << 30)


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU itself.

    Attributes:
        name: As on the command line.
        flops: Matrix multiplication rate that a plan may count on, FLOP/s; in bfloat16 where the wider ones differ.
        link: Rate of host memory to device, bytes/s in one direction (of memory copies on the CPU).
        memory: Device memory in bytes; None on the CPU, which has host memory only.
        source: Where the numbers are from.
        measured: Whether they were timed on this machine.
        float32, float64: The vendor's peak in these, FLOP/s; None where the rate is the same.
    """

    name: str
    flops: float
    link: float
    memory: float | None
    source: str
    measured: bool = False
    float32: float | None = None
    float64: float | None = None

    def computing(self, dtype: ComputeDtype) -> Device:
        """Return the device at its rate in a dtype."""
        peak = {"bfloat16": None, "float32": self.float32, "float64": self.float64}[dtype]
        if peak is None:
            return self
        rate = WIDE_SHARE * peak
        source = f"{self.source}; {rate / 1e12:.3g} TFLOP/s in {dtype}, {WIDE_SHARE:.0%} of the vendor's"
        return dataclasses.replace(self, flops=rate, source=source)


# Our assumption: the share of the vendor's float32 and float64 peaks that a step reaches (of bfloat16's, an H100's 600
# TFLOP/s are 61 %). Peaks are of NVIDIA's data sheets: float32 without TF32, which torch leaves off for matrix products
# unless told, as do our kernels; float64 on tensor cores where there are any, which cuBLAS uses (4090, L40S: 1/64).
WIDE_SHARE = 0.6


# Assumed, not measured by us: 788 TFLOP/s is published for an 8192-cube on an H200, a training step reaches less.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "h100",
            600e12,
            55 * GB,
            80 * GB,
            "600 TFLOP/s assumed (matrix product on an H200, published: 788), PCIe gen5 at 55 GB/s (55.7 published)",
            float32=67e12,
            float64=67e12,
        ),
        Device(
            "h200",
            600e12,
            55 * GB,
            139 * GIB,
            "as an H100's: 600 TFLOP/s assumed, PCIe gen5 at 55 GB/s; 139 GiB are what torch sees of its memory",
            float32=67e12,
            float64=67e12,
        ),
        Device(
            "a100",
            230e12,
            24.8 * GB,
            80 * GB,
            "230 TFLOP/s assumed (312 in the data sheet), PCIe gen4 at 24.8 GB/s (nvbandwidth)",
            float32=19.5e12,
            float64=19.5e12,
        ),
        Device(
            "4090",
            140e12,
            24.8 * GB,
            24 * GIB,
            "140 TFLOP/s assumed (155.8 published by LoHan), PCIe gen4 at 24.8 GB/s (nvbandwidth)",
            float32=82.6e12,
            float64=82.6e12 / 64,
        ),
        Device(
            "l40s",
            200e12,
            24.8 * GB,
            48 * GB,
            "our assumption: 55 % of the vendor's 362 TFLOP/s, PCIe gen4",
            float32=91.6e12,
            float64=91.6e12 / 64,
        ),
        Device(
            "cpu",
            0.05e12,
            5 * GB,
            None,
            "our assumption for an unmeasured CPU; discquant plan --measure times it",
        ),
    )
}


def find_device(name: str) -> Device:
    """Return a device of the table.

    Raises:
        ConfigError: It is not there; the message lists what is.
    """
    key = name.lower().strip(" -_")
    for word in ("nvidia", "geforce", "rtx"):
        key = key.removeprefix(word).strip(" -_")
    if key not in DEVICES:
        raise ConfigError(f"plan: --gpu must be one of {', '.join(DEVICES)} or auto, got {name!r}")
    return DEVICES[key]


def this_device(index: int = 0) -> Device:
    """Return a GPU of this machine with its real memory, the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return DEVICES["cpu"]
    properties = torch.cuda.get_device_properties(index)
    for key in ("h200", "h100", "a100", "4090", "l40s"):
        if key in properties.name.lower():
            return dataclasses.replace(DEVICES[key], memory=float(properties.total_memory))
    # An unknown GPU: the slowest of the table, so that the plan does not promise too much.
    base = DEVICES["4090"]
    memory, source = float(properties.total_memory), f"as {base.name}: unknown GPU"
    return dataclasses.replace(base, name=properties.name, memory=memory, source=source)


def free_host_memory() -> float:
    """Return the memory to be had without swapping or leaving the container's limit; infinite where none tells."""
    found = [math.inf]
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(float(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is the word "max"
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        rows = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for key, value in rows if key == "inactive_file")
        found.append(float(max(0, limit - used + cached)))
    return min(found)


def host_memory() -> float:
    """Return the memory of this machine, within its container's limit, in bytes."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in (CGROUP / "memory.max", CGROUP / "memory" / "memory.limit_in_bytes"):
        try:
            total = min(total, float(file.read_text().strip()))
        except (OSError, ValueError):  # no such limit: absent, or the word "max"
            continue
    return total
