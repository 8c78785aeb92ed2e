# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark of solver steps, on a tiny shape without a GPU: every part, its budget, and what it computes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

TINY = [
    "--shape", "tiny", "--device", "cpu", "--tokens", "32", "--seqlen", "16", "--vocab", "128", "--steps", "1",
    "--group", "64",
]  # fmt: skip


@pytest.fixture
def scale_gpu(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    return importlib.import_module("scale_gpu")


def test_every_part_runs_and_placements_agree(scale_gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    out.write_text(json.dumps({"shapes": {"8b": {"kept": True}}}))
    assert scale_gpu.main([*TINY, "--blocks", "1,4", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["shapes"]["8b"] == {"kept": True}  # of an earlier call
    found = result["shapes"]["tiny"]
    assert [row["blocks"] for row in found["compared"]] == [1, 4]
    assert all(row["codes_identical"] and row["state_identical"] for row in found["compared"])
    # Weights differ, so depths must.
    assert len({row["codes_sha256"] for row in found["runs"]}) == 2
    assert found["bare"]["seconds_per_block"] > 0
    host = found["runs"][-1]
    # Four blocks and three slots: some come in; all go home.
    assert 0 < host["bytes_in_per_step"] < 2 * host["state_bytes"]
    assert host["bytes_out_per_step"] == 2 * host["weights"]  # frac and momentum
    assert host["planned"]["host_bytes"] > host["state_bytes"]
    for where in ("resident", "host"):
        fitted, whole = found["lines"][where], found["extrapolated"][where]
        assert whole["seconds_per_step"] == fitted["fixed"] + 4 * fitted["per_block"]


def test_a_run_that_would_not_end_in_time_is_left_out(scale_gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    assert scale_gpu.main([*TINY, "--blocks", "1", "--seconds", "0", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["shapes"]["tiny"]
    assert not found["runs"]
    assert all("left out" in row["error"] for row in found["left_out"])


def test_overlap_is_the_share_of_copies_under_kernels(scale_gpu: ModuleType) -> None:
    events = [
        ("matmul", 0.0, 2.0),
        ("step", 1.0, 3.0),
        ("matmul", 5.0, 6.0),
        ("Memset (Device)", 3.0, 5.0),
        ("Memcpy HtoD (Pinned -> Device)", 2.5, 5.5),  # 0.5 + 0.5 of 3
        ("Memcpy DtoH (Device -> Pinned)", 0.5, 1.5),  # all
        ("Memcpy DtoD (Device -> Device)", 3.0, 4.0),
    ]
    found = scale_gpu.parts.overlap(events)
    assert (found["kernel_seconds"], found["span_seconds"]) == (4.0, 6.0)
    assert found["in_share"] == pytest.approx(1 / 3)
    assert found["out_share"] == 1.0
    assert found["share"] == pytest.approx(0.5)
    assert {"name": "matmul", "seconds": 3.0, "launches": 2} in found["longest"]
    assert scale_gpu.parts.overlap([])["share"] is None


def test_checksum_sees_every_byte_and_its_place(
    scale_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = scale_gpu.parts.checksum
    data = torch.randint(0, 256, (45,), dtype=torch.uint8)
    seen = {checksum(data)}
    for place in range(45):
        other = data.clone()
        other[place] ^= 128
        seen.add(checksum(other))
    assert len(seen) == 46
    assert checksum(data[:40].view(5, 8).flip(0)) != checksum(data[:40])
    whole = checksum(data)
    monkeypatch.setattr(scale_gpu.parts, "CHECKSUM_WORDS", 2)
    assert checksum(data) == whole


def test_line_says_where_it_is_from(scale_gpu: ModuleType) -> None:
    one = {"blocks": 4, "seconds_per_step": 2.0}
    assert scale_gpu.parts.line([]) is None
    assert scale_gpu.parts.line([one])["per_block"] == 0.5
    fitted = scale_gpu.parts.line([{"blocks": 8, "seconds_per_step": 3.0}, one])
    assert (fitted["per_block"], fitted["fixed"]) == (0.25, 1.0)
