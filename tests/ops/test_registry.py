# SPDX-License-Identifier: Apache-2.0
"""Choice of an implementation: the documented order of auto, and explicit choices that cannot run here."""

from __future__ import annotations

import pytest
import torch

from discquant.ops import _registry as registry
from discquant.ops import hadamard

CPU = torch.device("cpu")


def test_auto_order(monkeypatch):
    """CPU: C++ where it covers the arguments, else the reference; the interpreter is never taken by itself."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "cpp_problem", lambda device, operator: None)
    assert registry.choose("op", "auto", CPU, cpp=None, cpp_operator="x") == "cpp"
    assert registry.choose("op", "auto", CPU, cpp="a stride") == "reference"
    monkeypatch.setattr(registry, "cpp_problem", lambda device, operator: "not built")
    assert registry.choose("op", "auto", CPU, cpp=None, cpp_operator="x") == "reference"
    cuda = torch.device("cuda")
    assert registry.choose("op", "auto", cuda) == "triton"
    assert registry.choose("op", "auto", cuda, triton="float64") == "reference"


def test_explicit_choice_never_falls_back(monkeypatch):
    monkeypatch.setattr(registry, "cpp_problem", lambda device, operator: "not built")
    with pytest.raises(RuntimeError, match="op: impl must be able to run here = cpp, got not built"):
        registry.choose("op", "cpp", CPU, cpp=None, cpp_operator="x")
    with pytest.raises(
        NotImplementedError, match="op: impl must cover these arguments = triton, got float64"
    ):
        registry.choose("op", "triton", CPU, triton="float64")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="impl must be able to run here = triton, got tensors are on cpu"):
        hadamard(torch.zeros(2, 4), impl="triton")
    monkeypatch.setattr(registry, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        hadamard(torch.zeros(2, 4), impl="triton")


def test_old_extension_is_named():
    """An extension built before an operator existed says so; it is not taken for a working one."""
    library = torch.library.Library("discquant", "FRAGMENT")
    library.define("operator_of_the_future() -> ()")
    problem = registry.cpp_problem(CPU, "operator_of_the_future")
    assert problem is not None
    assert "build it again" in problem or "_C" in problem
    assert (
        registry.cpp_problem(torch.device("meta"), "x") == "there is no C++ implementation for meta tensors"
    )
