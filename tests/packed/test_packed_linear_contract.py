# SPDX-License-Identifier: Apache-2.0
"""packed_linear against bad callers, of the public function and of the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from discquant import _extension
from discquant.ops import pack as packing
from discquant.ops.packed_linear import MODES, modes_on, packed_linear

CPP = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
SIZES = {"out_features": 20, "in_features": 100, "num_bits": 4, "group_size": 32, "layout": "cpu"}


def weight() -> tuple[Tensor, Tensor]:
    """Words and scales of a symmetric weight of these sizes."""
    codes = torch.randint(0, 16, (20, 100), dtype=torch.uint8)
    words = packing.pack(codes, num_bits=4, group_size=32, layout="cpu")
    return words, packing.pack_groups((torch.rand(20, 4) + 0.1).half(), layout="cpu")


def bad_calls() -> list[Any]:
    words, scale = weight()
    x = torch.zeros(2, 100)
    good = {"x": x, "words": words, "scale": scale, **SIZES}
    zero = torch.zeros(scale.shape, dtype=torch.uint8)
    changes = [
        ({"x": [1.0]}, TypeError, "x must be of type = Tensor, got list"),
        ({"scale": 1.0}, TypeError, "scale must be of type = Tensor, got float"),
        (
            {"x": torch.zeros(2, 99)},
            ValueError,
            r"x must have shape \[..., in_features\] = \['...', 100\], got \[2, 99\]",
        ),
        ({"x": x.double()}, ValueError, "x must have a dtype of"),
        ({"x": x.to("meta")}, ValueError, "x must be on the device = cpu, got meta"),
        ({"words": words[:-1]}, ValueError, r"words must have shape = \[1024\], got \[1023\]"),
        ({"words": torch.cat([words, words])}, ValueError, r"words must have shape = \[1024\], got \[2048\]"),
        ({"words": words.float()}, ValueError, "words must have a dtype of"),
        ({"words": torch.stack([words, words], 1)[:, 0]}, ValueError, "words must have stride"),
        ({"scale": scale[..., :-1]}, ValueError, "scale must have shape"),
        ({"scale": scale.double()}, ValueError, "scale must have a dtype of"),
        (
            {"scale": scale.transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError,
            "scale must be = contiguous",
        ),
        ({"zero_point": zero[:, :1]}, ValueError, "zero_point must be contiguous with the shape of scale"),
        ({"zero_point": zero.int()}, ValueError, "zero_point must have a dtype of"),
        ({"bias": torch.zeros(19)}, ValueError, "bias must be contiguous with shape"),
        ({"bias": torch.zeros(20).half()}, ValueError, "bias must have the dtype of x"),
        ({"num_bits": 2}, ValueError, "num_bits must be one of"),
        ({"group_size": 16}, ValueError, "group_size must be 32"),
        ({"group_size": 0}, ValueError, "group_size must be 32"),
        ({"group_size": 64}, ValueError, "scale must have shape"),
        ({"layout": "dense"}, ValueError, "layout must be one of"),
        ({"in_features": 0}, ValueError, "in_features must be at least = 1, got 0"),
        ({"out_features": -1}, ValueError, "out_features must be at least = 0, got -1"),
        ({"mode": "int8"}, ValueError, "mode must be one of"),
        ({"isa": "neon"}, ValueError, "isa must be None or one of"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"x": x.clone().requires_grad_()}, NotImplementedError, "inference only"),
        (
            {"layout": "mma", "scale": scale.view(1, 4, 64), "impl": "cpp"},
            NotImplementedError,
            "repack to 'cpu'",
        ),
        ({"impl": "triton"}, NotImplementedError, "repack to 'mma'"),
    ]
    return [
        pytest.param(good | change, error, text, id=f"{next(iter(change))}-{i}")
        for i, (change, error, text) in enumerate(changes)
    ]


@CPP
@pytest.mark.parametrize(("call", "error", "message"), bad_calls() if _extension.available() else [])
def test_rejects_bad_input(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"packed_linear: .*{message}"):
        packed_linear(**call)


def unhonoured_calls() -> list[Any]:
    words, scale = weight()
    good = {"x": torch.zeros(2, 100), "words": words, "scale": scale, **SIZES}
    mma = good | {"layout": "mma", "scale": scale.view(1, 4, 64)}
    batch, isa = {"batch_invariant": True}, {"isa": "scalar"}
    # layout "mma" on the CPU is the reference's; on a GPU the modes of the CPU's kernels are no one's.
    changes = [
        (mma | {"mode": "a8"}, "cpp: layout 'mma' on the CPU.*reference: mode 'a8': it takes activations"),
        (mma | {"mode": "a15"}, "reference: mode 'a15'"),
        (mma | isa, "reference: isa 'scalar': it has none"),
        (mma | batch, "reference: batch_invariant: its matmul sums by the batch"),
        (good | isa | {"mode": "exact"}, "cpp: isa 'scalar' in exact mode: its matmul is torch's"),
        (good | batch | {"mode": "exact"}, "cpp: batch_invariant in exact mode on the CPU"),
        *(
            (good | {"impl": "reference"} | given, f"impl must cover .* = reference, got {word}")
            for given, word in (({"mode": "a8"}, "mode"), (isa, "isa"), (batch, "batch_invariant"))
        ),
        *(
            (mma | {"impl": "triton"} | given, f"impl must cover .* = triton, got {word}")
            for given, word in (({"mode": "a8"}, "mode"), (isa, "isa"), (batch, "batch_invariant"))
        ),
    ]
    return [
        pytest.param(call, text, id=f"{i}-{text.split()[1].strip(':')}")
        for i, (call, text) in enumerate(changes)
    ]


@CPP
@pytest.mark.parametrize(("call", "message"), unhonoured_calls() if _extension.available() else [])
def test_nothing_that_is_asked_for_is_left_out(call: dict[str, Any], message: str) -> None:
    """An explicit mode, isa or batch_invariant is honoured or refused, also with impl="auto"."""
    with pytest.raises(NotImplementedError, match=f"packed_linear: .*{message}"):
        packed_linear(**call)


@CPP
def test_what_the_reference_covers_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    words, scale = weight()
    x = torch.randn(2, 100)
    mma = SIZES | {"layout": "mma"}
    moved = packing.repack(
        words, out_features=20, in_features=100, num_bits=4, layout="cpu", new_layout="mma"
    )
    steps = packing.pack_groups(packing.unpack_groups(scale, out_features=20), layout="mma")
    expected = packed_linear(x, words, scale, **SIZES, impl="reference")
    for mode in ("auto", "fp32"):
        assert torch.equal(packed_linear(x, moved, steps, **mma, mode=mode), expected)
    hollow = [t.to("meta") for t in (x, words, scale)]
    assert packed_linear(*hollow, **SIZES, mode="a8").shape == (2, 20)
    # Without the extension, only what no kernel is needed for.
    monkeypatch.setattr(_extension, "failure", lambda: "ImportError: it is not there")
    for mode in ("auto", "fp32", "exact"):
        assert torch.equal(packed_linear(x, words, scale, **SIZES, mode=mode), expected)
    with pytest.raises(
        NotImplementedError, match="got cpp: ImportError: it is not there; reference: mode 'a8'"
    ):
        packed_linear(x, words, scale, **SIZES, mode="a8")


def test_modes_of_a_device() -> None:
    assert modes_on(torch.device("cpu")) == MODES
    assert modes_on(torch.device("cuda", 0)) == ("auto", "exact")


@CPP
def test_operator_checks_for_itself() -> None:
    """A caller that goes round the public function gets an error, not a read past the end."""
    words, scale = weight()
    x, op = torch.zeros(2, 100), torch.ops.discquant.packed_linear
    for args in (
        (x, words[:-1], scale, None, None, 20, 100, 4, 32, 1, -1),
        (x, words, scale[:, :1], None, None, 20, 100, 4, 32, 1, -1),
        (x, words, scale, torch.zeros(1, dtype=torch.uint8), None, 20, 100, 4, 32, 1, -1),
        (x, words, scale, None, torch.zeros(3), 20, 100, 4, 32, 1, -1),
        (x.t().contiguous().t(), words, scale, None, None, 20, 100, 4, 32, 1, -1),
        (x[:, :64], words, scale, None, None, 20, 100, 4, 32, 1, -1),
        (x, words, scale, None, None, 20, 100, 4, 32, 5, -1),
        (x, words, scale, None, None, 20, 100, 4, 32, 1, 9),
        (x, words, scale, None, None, 20, 100, 4, 0, 1, -1),
        (x.int(), words, scale, None, None, 20, 100, 4, 32, 1, -1),
    ):
        with pytest.raises(RuntimeError):
            op(*args)
    into = torch.ops.discquant.dequantize_packed_into
    for out, rows in ((torch.empty(4, 99), (16, 20)), (torch.empty(3, 100), (16, 20)), (torch.empty(4, 100), (8, 12)),
                      (torch.empty(100, 4).t(), (16, 20)), (torch.empty(4, 100).int(), (16, 20))):  # fmt: skip
        with pytest.raises(RuntimeError):
            into(out, words, scale, None, 20, 100, 4, 32, 2, *rows)
