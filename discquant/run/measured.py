# SPDX-License-Identifier: Apache-2.0
"""What an unfinished `discquant allocate` has measured, kept beside the file that it will write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from discquant.allocation.allocate import Measured
from discquant.calibration import Windows
from discquant.errors import CheckpointError, ResumeError
from discquant.formats.safetensors_file import read_header, read_tensor
from discquant.run.stored import save_tensors_atomic

PRODUCTS = ".products"


class Unfinished:
    """The file `OUT.unfinished`: the windows, and the products of every block that is done.

    Attributes:
        path: The file.
        windows: Of the calibration text; None before they are kept.
        measured: By module name.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        """Read what an earlier part of the same work has left.

        Raises:
            ResumeError: It is of another model, text or choice.
            CheckpointError: It is damaged.
        """
        self.path = out.with_name(f"{out.name}.unfinished")
        self._identity = json.dumps(identity, sort_keys=True)
        self.windows: Windows | None = None
        self.measured: dict[str, Measured] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        stored, metadata = read_header(self.path)
        if metadata.get("identity") != self._identity:
            raise ResumeError(
                f"allocate: {self.path} is of another model, text or choice; repeat the command that began it, "
                "remove the file, or choose another OUT"
            )
        try:
            bits = json.loads(metadata["bits"])
            ids, mask = (read_tensor(stored[key]) for key in ("input_ids", "mask"))
            self.windows = Windows.make(ids, mask.bool(), metadata["source"])
            for name, own in bits.items():
                self.measured[name] = Measured(own, read_tensor(stored[f"{name}{PRODUCTS}"]))
        except (KeyError, ValueError) as cause:
            raise CheckpointError(f"{self.path} is damaged: {cause}; remove it") from cause

    def keep(self, windows: Windows, made: Mapping[str, Measured]) -> None:
        """Write the windows and all that is measured, `made` included.

        Raises:
            DiskSpaceError: There is no room; the file that was there stays.
        """
        self.windows = windows
        self.measured |= made
        tensors = {f"{name}{PRODUCTS}": found.products for name, found in self.measured.items()}
        ids = {"input_ids": windows.input_ids.int(), "mask": windows.mask.to(torch.uint8)}
        bits = {name: dict(found.bits) for name, found in self.measured.items()}
        metadata = {"identity": self._identity, "bits": json.dumps(bits), "source": windows.source}
        save_tensors_atomic(self.path, {**tensors, **ids}, metadata)

    def remove(self) -> None:
        """Remove the file; what it held is in the one that was asked for."""
        self.path.unlink(missing_ok=True)
