# SPDX-License-Identifier: Apache-2.0
"""The CUDA operators on a GPU: opcheck, compile, meta tensors, their own checks, compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

Make = Callable[..., Any]


def test_opcheck_compile_and_meta(make_case: Make) -> None:
    case = make_case(72, 104, 3, 32, False)
    words, scale, zero = case.tensors
    sizes = (72, 104, 3, 32)
    op = torch.ops.discquant.packed_linear_gpu.default
    for tokens in (3, 40):
        x = torch.randn(tokens, 104, device="cuda").half()
        torch.library.opcheck(op, (x, words, scale, zero, None, *sizes, False, False, False))
        run = torch.compile(lambda t: case(t) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(run(x), case(x) * 2)
    space = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    mma = torch.ops.discquant.packed_linear_mma.default
    tests = ("test_schema", "test_faketensor")
    x = torch.randn(3, 104, device="cuda").half()
    torch.library.opcheck(
        mma, (x, words, scale, zero, None, space, *sizes, False, False, False), test_utils=tests
    )
    meta = [None if t is None else t.to("meta") for t in (x, words, scale, zero)]
    assert op(*meta, None, *sizes, False, False, False).shape == (3, 72)


def test_operator_checks_for_itself(make_case: Make) -> None:
    """A caller that goes round the public function gets an error, not a read past the end."""
    case = make_case(72, 104, 3, 32, False)
    words, scale, zero = case.tensors
    x = torch.zeros(2, 104, device="cuda").half()
    space = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    sizes = (72, 104, 3, 32, False, False, False)
    mma = torch.ops.discquant.packed_linear_mma
    for args in (
        (x, words[:-1], scale, zero, None, space, *sizes),
        (x, words, scale[:, :1], zero, None, space, *sizes),
        (x, words, scale, zero[:, :1], None, space, *sizes),
        (x, words, scale, zero, torch.zeros(3, device="cuda").half(), space, *sizes),
        (x, words, scale, zero, None, space[:4], *sizes),
        (x.float(), words, scale, zero, None, space, *sizes),
        (x.cpu(), words, scale, zero, None, space, *sizes),
        (x[:, :103], words, scale, zero, None, space, *sizes),
        (x[:, 1:], words, scale, zero, None, space, 72, 103, 3, 32, False, False, False),
        (
            x,
            words,
            torch.cat([scale.view(-1)[:1], scale.view(-1)])[1:].view_as(scale),
            zero,
            None,
            space,
            *sizes,
        ),
    ):
        with pytest.raises(RuntimeError):
            mma(*args)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str, repo_root: Path) -> None:
    # initcheck must see torch's kernels write what ours read.
    only = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=discquant"]
    script = str(Path(__file__).resolve().with_name("gpu_cases.py"))
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *only, sys.executable, script]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "sanitized: done" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-2000:]
    )
