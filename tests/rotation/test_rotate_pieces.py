# SPDX-License-Identifier: Apache-2.0
"""A rotation in bounded pieces, the room it asks for, and how little its proof forgives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from discquant.errors import ProofError
from discquant.formats.checkpoint import Checkpoint
from discquant.rotation import model as job
from discquant.rotation import rotate, turn


@pytest.mark.parametrize("values", [True, False])
def test_pieces_change_no_byte(
    values: bool, tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cut goes through what a rotation mixes, however small the pieces."""
    source = save(tmp_path / "model", "llama", torch.bfloat16)
    rotate(source, tmp_path / "whole", seed=3, values=values)
    cuts: list[int] = []
    real = turn.pieces

    def counted(*given: Any) -> Any:
        found = list(real(*given))
        cuts.append(len(found))
        return found

    monkeypatch.setattr(turn, "_PIECE", 100)
    monkeypatch.setattr(turn, "pieces", counted)
    rotate(source, tmp_path / "cut", seed=3, values=values)
    assert max(cuts) > 10
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert found[0] == found[1]


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
def test_room_is_what_it_takes(
    shard_bytes: int, tmp_path: Path, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files, and the spool that a shard is joined from, which lies beside it until it is whole."""
    source, asked, most = save(tmp_path / "model", "llama"), [], [0]
    unlink = Path.unlink

    def watched(path: Path, *given: Any, **named: Any) -> None:
        if path.name.startswith("spool"):
            most[0] = max(most[0], sum(file.stat().st_size for file in path.parent.iterdir()))
        unlink(path, *given, **named)

    monkeypatch.setattr(Path, "unlink", watched)
    monkeypatch.setattr(job, "check_space", lambda target, needed: asked.append(needed))
    rotate(source, tmp_path / "rotated", shard_bytes=shard_bytes)
    tensors = Checkpoint(tmp_path / "rotated").tensors.values()
    data, largest = sum(info.num_bytes for info in tensors), max(info.num_bytes for info in tensors)
    files = {info.file for info in tensors}
    headers = sum(file.stat().st_size for file in files) - data
    assert asked == [data + min(data, max(shard_bytes, largest))]
    assert data + headers < most[0] <= asked[0] + headers


def test_errors_beyond_rounding_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    """Rounding moves a number by at most half an eps of itself: twice that on every number is no rounding."""
    source, real = save(tmp_path / "model", "llama"), job.turned

    def spoiled(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        return real(tensor, *args) * (1 + torch.finfo(torch.float32).eps)

    rotate(source, tmp_path / "sound")
    monkeypatch.setattr(job, "turned", spoiled)
    with pytest.raises(ProofError, match="turned back differs"):
        rotate(source, tmp_path / "rotated")
