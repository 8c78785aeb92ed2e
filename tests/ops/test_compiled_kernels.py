# SPDX-License-Identifier: Apache-2.0
"""Kernels between the matmuls as compiled, inline assembly included, equal the reference bit for bit; no GPU.

A fresh process compiles to PTX and runs that on the CPU (ptx.py): this one has the interpreter switched on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def ptx() -> ModuleType:
    """The emulator beside this file."""
    spec = importlib.util.spec_from_file_location("ptx_emulator", Path(__file__).with_name("ptx.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_equals_reference(repo_root, tmp_path):
    """Soft weights of every kind; every optimizer, all codes, maskings, NaN and infinite gradients, clipped moments."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(repo_root / "tests" / "ops" / "compiled_kernels.py")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    steps = [line for line in lines if not line.startswith(("weight ", "anchor ", "outlier "))]
    assert len(steps) == 28 + 4 and len(lines) >= 28 + 4 + 4 + 3 + 50 + 32


def test_emulated_arithmetic(ptx):
    """The emulator's own arithmetic: fused sums against exact ones, saturation, directed rounding, bytes."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(20000) * 10.0 ** generator.integers(-6, 6, 20000) for _ in range(3))
    a, b, c = a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)
    c[:10000] = -(a[:10000] * b[:10000])  # what a rounded product lost
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    assert np.array_equal(ptx.FLOAT["fma.rn.f32"](a, b, c), exact.astype(np.float32))
    # 1 + 2^-24 + 2^-60 lies above the midpoint, which a second rounding would lose.
    tie = [np.array([v], np.float32) for v in (2.0**-30, 2.0**-30, 1 + 2.0**-23)]
    assert ptx.FLOAT["fma.rn.f32"](*tie)[0] == np.float32(1 + 2.0**-23)
    nan = np.array([np.nan], np.float32)
    assert ptx.FLOAT["sub.sat.f32"](nan, nan)[0] == 0
    assert np.isnan(ptx.FLOAT["max.NaN.f32"](nan, -nan)[0])
    down = ptx.FLOAT["add.rm.f32"](
        np.array([2.9999998, 0.0], np.float32), np.array([2.0**23, 2.0**23], np.float32)
    )
    assert down.view(np.uint32).tolist() == [0x4B000002, 0x4B000000]
    word, sign = np.array([0x80FF017F], np.uint32), np.array([0xBA98], np.uint32)
    assert hex(ptx._prmt(word, word, sign)[0]) == "0xffff0000"
    assert hex(ptx._lop3(word, ~word, word, np.array([0x96]))[0]) == hex(0xFFFFFFFF ^ 0x80FF017F)


def test_divergence_and_stray_access_are_errors(ptx):
    """What the emulator does not cover must not pass for a result."""
    kernel = "\n.reqntid 32\n{{ {body} ret; }}"
    block = ptx.Block(
        kernel.format(body="mov.u32 %r1, %tid.x; setp.gt.s32 %p1, %r1, 3;\n@%p1 bra $L1;\n$L1:\n"),
        ptx.Memory(), [], (1, 1),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="not uniform"):
        block.run(0, 0)
    memory = ptx.Memory()
    address = memory.add(np.zeros(4, np.uint8))
    body = "ld.param.b64 %rd1, [k_param_0]; ld.global.b32 %r1, [ %rd1 + 4 ];\n"
    with pytest.raises(AssertionError, match="outside of every buffer"):
        ptx.launch(kernel.format(body=body), memory, [address], (1, 1))
