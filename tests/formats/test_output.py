# SPDX-License-Identifier: Apache-2.0
"""Writing directories: the safetensors library reads what we stream, and nothing half-written is ever visible."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from discquant.errors import DiskSpaceError, OutputExistsError
from discquant.formats import Checkpoint
from discquant.formats.output import ShardWriter, atomic_directory, check_space

# Sizes and dtypes that would misalign each other if they lay in the order of arrival.
TENSORS = {
    "odd": torch.arange(5, dtype=torch.uint8),
    "int64": torch.tensor([1, -2], dtype=torch.int64),
    "bf16": torch.randn(3, 3).bfloat16(),
    "int32": torch.arange(7, dtype=torch.int32),
    "none": torch.empty(0, 3),
    "double": torch.randn(2, dtype=torch.float64),
    "transposed": torch.randn(4, 6).T,
    "scalar": torch.tensor(1.5),
}


@pytest.mark.parametrize("shard_bytes", [1, 40, 64, 1 << 20])
def test_library_reads_the_shards(tmp_path: Path, shard_bytes: int) -> None:
    writer = ShardWriter(tmp_path, shard_bytes)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            part = load_file(file)
            data = sum(tensor.numel() * tensor.element_size() for tensor in part.values())
            assert data <= shard_bytes or sum(bool(tensor.numel()) for tensor in part.values()) == 1
            found |= part
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert {info.name for info in Checkpoint(tmp_path).tensors.values()} == TENSORS.keys()
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(writer.shards) > 1)
    assert not [file for file in files if file.name.startswith(("spool", "part"))]


def test_writer_rejects(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="a was written already"):
        writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="b must have 5 bytes, got 3"):
        writer.add_bytes("b", "U8", (5,), 5, [b"abc"])
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        ShardWriter(tmp_path, 0)


def test_directory_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as partial:
        (partial / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="file system filled up"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskSpaceError, match=r"needs 1000000000\.00 GB, but its file system has .* GB free"):
        check_space(tmp_path / "not" / "there", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_size_and_the_room_differ_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, words in (
        (8_000_000, r"needs 8\.30 MB, but its file system has 8\.00 MB free"),
        (8_299_999, "needs 8,300,000 bytes, but its file system has 8,299,999 bytes free"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(DiskSpaceError, match=words):
            check_space(tmp_path, 8_300_000)


def test_parents_made_for_what_fails_vanish(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), atomic_directory(tmp_path / "new" / "one" / "out"):
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputExistsError, match="exists already"), atomic_directory(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "empty" / "file").exists()


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        second = atomic_directory(tmp_path / "out")
        with pytest.raises(OutputExistsError, match="is being written by another process"):
            second.__enter__()
        assert (partial / "file").exists()
    assert (tmp_path / "out" / "file").exists()


def test_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    """kill -9 while the directory is being written: no output, and the next attempt starts clean."""
    script = """
import sys, time
from pathlib import Path
from discquant.formats.output import atomic_directory
with atomic_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("x" * 1000)
    (partial / "folder").mkdir()
    print("writing", flush=True)
    time.sleep(60)
"""
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not out.exists()
    assert (tmp_path / ".out.partial" / "half").exists()
    with atomic_directory(out) as partial:
        assert list(partial.iterdir()) == []
        (partial / "whole").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["whole"]
