# SPDX-License-Identifier: Apache-2.0
"""What a plan assumes about machines, with sources; memory of the machine it runs on."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from discquant.errors import ConfigError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
GB = 1e9
GIB = float(1 << 30)


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU itself.

    Attributes:
        name: As on the command line.
        flops: Matrix multiplication rate that a plan may count on, FLOP/s.
        link: Rate of host memory to device, bytes/s in one direction (of memory copies on the CPU).
        memory: Device memory in bytes; None on the CPU, which has host memory only.
        source: Where the numbers are from.
        measured: Whether they were timed on this machine.
    """

    name: str
    flops: float
    link: float
    memory: float | None
    source: str
    measured: bool = False


# Assumed, not measured by us: 788 TFLOP/s is published for an 8192-cube on an H200, a training step reaches less.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "h100",
            600e12,
            55 * GB,
            80 * GB,
            "memory.md 4 and 5: 600 TFLOP/s assumed, PCIe gen5 55.7 published",
        ),
        Device("h200", 600e12, 55 * GB, 139 * GIB, "memory.md 4, 5 and 9: as H100, 139 GiB"),
        Device("a100", 230e12, 24.8 * GB, 80 * GB, "memory.md 4 and 5: 230 TFLOP/s assumed, PCIe gen4 24.8"),
        Device(
            "4090", 140e12, 24.8 * GB, 24 * GIB, "memory.md 4 and 5: 140 TFLOP/s assumed (155.8 published)"
        ),
        Device(
            "l40s", 200e12, 24.8 * GB, 48 * GB, "our assumption: 55 % of the vendor's 362 TFLOP/s, PCIe gen4"
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
    import dataclasses

    import torch

    if not torch.cuda.is_available():
        return DEVICES["cpu"]
    properties = torch.cuda.get_device_properties(index)
    for key in ("h200", "h100", "a100", "4090", "l40s"):
        if key in properties.name.lower():
            return dataclasses.replace(DEVICES[key], memory=float(properties.total_memory))
    # An unknown GPU: the slowest of the table, so that the plan does not promise too much.
    base = DEVICES["4090"]
    return Device(
        properties.name, base.flops, base.link, float(properties.total_memory), f"as {base.name}: unknown GPU"
    )


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
