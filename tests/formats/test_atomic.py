# SPDX-License-Identifier: Apache-2.0
"""An export killed at any moment leaves nothing that looks finished."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from discquant.formats import QuantizedLinear, export_compressed_tensors, prove

Layers = Callable[..., Iterator[QuantizedLinear]]


KILLED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
import sys, time
from pathlib import Path
import torch
from discquant.formats import Checkpoint, QuantizedLinear, export_compressed_tensors
source, out = Path(sys.argv[1]), Path(sys.argv[2])
def layers():
    for number, key in enumerate(key for key in Checkpoint(source).tensors if "proj.weight" in key):
        rows, columns = Checkpoint(source).tensors[key].shape
        q = torch.zeros(rows, columns, dtype=torch.uint8)
        yield QuantizedLinear(key.removesuffix(".weight"), q, torch.ones(rows, 1), None, 3, -1)
        if number == 4:
            print("in the middle", flush=True)
            time.sleep(60)
export_compressed_tensors(source, out, layers(), shard_bytes=5000)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_kill_in_the_middle_leaves_nothing(
    name: str, llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(llama_dir), str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in the middle\n"
    assert any((tmp_path / ".out.partial").glob("part-*")), (
        "nothing was written yet: the test kills too early"
    )
    child.send_signal(getattr(signal, name))
    child.wait()
    child.stdout.close()
    assert not out.exists()
    export_compressed_tensors(llama_dir, out, make_layers(llama_dir, 3, 32, True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prove(llama_dir, out, make_layers(llama_dir, 3, 32, True))
