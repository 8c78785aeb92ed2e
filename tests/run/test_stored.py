# SPDX-License-Identifier: Apache-2.0
"""Tensors of a run: the library's bytes, one tensor in memory at a time, the old file until the new one is whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from discquant.errors import CheckpointError, DiskSpaceError
from discquant.run import stored
from discquant.run.stored import StoredCodes, digest_codes, keep_codes, save_tensors_atomic


def _tensors() -> dict[str, Tensor]:
    return {
        "b.q": torch.randint(0, 9, (3, 5), dtype=torch.uint8),
        "a": torch.randn(2, 3).bfloat16(),
        "half": torch.randn(2).half(),
        "wide": torch.randn(4).double(),
        "ä": torch.zeros(0),
        "z": torch.tensor(1, dtype=torch.int8),
        "turned": torch.randn(3, 2).t(),
    }


@pytest.mark.parametrize("metadata", [{}, {"source": 'x"y'}])
def test_bytes_are_the_library_s(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = _tensors()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    save_tensors_atomic(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in load_file(tmp_path / "ours").items())


def test_made_tensors_live_one_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def maker(value: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            nonlocal most
            tensor = torch.full((4, 4), value, dtype=torch.uint8)
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

        return make

    save_tensors_atomic(tmp_path / "codes", {f"layer.{value}": maker(value) for value in range(6)}, {})
    assert most == 1
    codes = StoredCodes(tmp_path / "codes")
    assert list(codes) == [f"layer.{value}" for value in range(6)] and len(codes) == 6
    assert all(bool((codes[f"layer.{value}"] == value).all()) for value in range(6))


def test_a_failed_write_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "codes"
    save_tensors_atomic(path, {"a": torch.arange(4)}, {})
    before = path.read_bytes()

    def broken(tensor: Tensor) -> memoryview:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "tensor_bytes", broken)
    with pytest.raises(DiskSpaceError, match=f"{path}: no room"):
        save_tensors_atomic(path, {"a": torch.arange(9)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "a part was left"


def test_codes_that_are_not_what_was_written_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    keep_codes(path, {"a": torch.zeros(4, 4, dtype=torch.uint8), "b": torch.ones(4, 4, dtype=torch.uint8)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    codes = StoredCodes(path)
    assert not codes["a"].any()
    with pytest.raises(CheckpointError, match="b is damaged"):
        codes["b"]


def test_a_digest_of_codes_is_of_names_shapes_and_contents() -> None:
    """Not of their order in a dictionary."""
    one, other = torch.arange(6, dtype=torch.uint8).view(2, 3), torch.zeros(2, 2, dtype=torch.uint8)
    given = {"a": one, "b": other}
    assert digest_codes(given) == digest_codes({"b": other, "a": one})
    changed = [
        {"a": one, "c": other}, {"a": one.view(3, 2), "b": other}, {"a": one, "b": other + 1}, {"a": one},
    ]  # fmt: skip
    assert len({digest_codes(given), *map(digest_codes, changed)}) == 5
