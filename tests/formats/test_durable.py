# SPDX-License-Identifier: Apache-2.0
"""A power cut leaves no complete-looking wreck: contents reach the disk before their names, names before success."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from discquant.formats.output import atomic_directory
from discquant.run.stored import save_tensors_atomic


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was written through and what was renamed, in order."""
    found: list[tuple[str, ...]] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def watched_sync(handle: int) -> None:
        sync(handle)
        found.append(("sync", str(Path(f"/proc/self/fd/{handle}").readlink())))

    def watched_rename(path: Path, target: Path) -> Path:
        found.append(("rename", str(path), str(target)))
        return rename(path, target)

    def watched_replace(path: Path, target: Path) -> Path:
        found.append(("rename", str(path), str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return found


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="handles have no names here")


def test_a_folder_is_on_disk_before_its_name(done: list[tuple[str, ...]], tmp_path: Path) -> None:
    """Every file and folder in it, then the rename, then the folder that holds the name."""
    out = tmp_path / "out"
    with atomic_directory(out) as partial:
        (partial / "deep").mkdir()
        for name in ("model.safetensors", "deep/more"):
            (partial / name).write_text(name)
        assert done == []
    renamed = done.index(("rename", str(partial), str(out)))
    inside = {partial, partial / "deep", partial / "model.safetensors", partial / "deep" / "more"}
    assert {path for _, path in done[:renamed]} == {str(path) for path in inside}
    assert done[renamed + 1 :] == [("sync", str(tmp_path))]


def test_a_file_is_on_disk_before_its_name(done: list[tuple[str, ...]], tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    save_tensors_atomic(path, {"a": torch.arange(4)}, {})
    hidden = str(tmp_path / ".block.safetensors.tmp")
    assert done == [("sync", hidden), ("rename", hidden, str(path)), ("sync", str(tmp_path))]
