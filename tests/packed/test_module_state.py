# SPDX-License-Identifier: Apache-2.0
"""State dicts of PackedLinear: saved, loaded into either layout, and refused before a buffer is touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discquant import _extension
from discquant.modules import PackedLinear
from discquant.modules import packed_linear as packed_module
from discquant.ops import pack as packing

pytestmark = pytest.mark.skipif(not _extension.available(), reason="discquant._C is not built")
State = dict[str, Any]


def make(symmetric: bool = True, *, layout: packing.Layout = "cpu", seed: int = 0) -> PackedLinear:
    """40 x 100 at 3 bits, groups of 64; of layout "mma" though it lies on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 8, (40, 100), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(40, 2, generator=generator) + 0.1).half()
    zero = None if symmetric else torch.randint(0, 8, (40, 2), dtype=torch.uint8, generator=generator)
    packed_zero = None if zero is None else packing.pack_groups(zero, layout=layout)
    return PackedLinear(
        packing.pack(q, zero, num_bits=3, group_size=64, layout=layout),
        packing.pack_groups(scale, layout=layout), packed_zero, torch.randn(40, generator=generator),
        out_features=40, in_features=100, num_bits=3, group_size=64, layout=layout,
    )  # fmt: skip


def weight(module: PackedLinear) -> Tensor:
    return module.dequantize(torch.float32)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", ["cpu", "mma"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(symmetric: bool, layout: packing.Layout, assign: bool) -> None:
    """A state of either layout, into a module of this device's, alone and inside a model."""
    first, second = make(symmetric, layout=layout), make(symmetric, seed=1)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    second.load_state_dict(state, assign=assign)
    assert second.layout == "cpu" and torch.equal(weight(second), weight(first))
    assert torch.equal(second(torch.eye(100)), make(symmetric)(torch.eye(100)))
    assert all(torch.equal(kept[key], state[key]) for key in kept)
    tree = nn.Sequential(nn.Linear(100, 100), make(symmetric, seed=2))
    tree.load_state_dict(nn.Sequential(nn.Linear(100, 100), first).state_dict(), assign=assign)
    assert torch.equal(weight(tree[1]), weight(first))


def test_a_file_of_tensors(tmp_path: Path) -> None:
    """safetensors and torch's restricted loader hold it."""
    from safetensors.torch import load_file, save_file

    first = make(symmetric=False)
    save_file(first.state_dict(), tmp_path / "x.safetensors")
    torch.save(first.state_dict(), tmp_path / "x.pt")
    for state in (load_file(tmp_path / "x.safetensors"), torch.load(tmp_path / "x.pt", weights_only=True)):
        second = make(symmetric=False, seed=1)
        second.load_state_dict(state)
        assert torch.equal(weight(second), weight(first))


def test_a_module_without_memory_takes_a_state_over() -> None:
    hollow = make().to("meta")
    hollow.load_state_dict(make(layout="mma").state_dict(), assign=True)
    assert hollow.layout == "cpu" and torch.equal(weight(hollow), weight(make()))


def damage(state: State, name: str) -> State:
    words, scale, zero, extra = (state[key] for key in ("words", "scale", "zero_point", "_extra_state"))
    broken = scale.clone()
    broken[0, 0, 0] = float("nan")

    def stated(place: int, value: int) -> Tensor:
        other = extra.clone()
        other[place] = value
        return other

    changes: dict[str, State] = {
        "words short": {"words": words[:-1]},
        "words long": {"words": torch.cat([words, words])},
        "words float": {"words": words.float()},
        "scale groups": {"scale": scale[:, :1]},
        "scale wider": {"scale": scale.float()},
        "scale nan": {"scale": broken},
        "zero large": {"zero_point": zero + 200},
        "zero int": {"zero_point": zero.int()},
        "version": {"_extra_state": stated(0, 99)},
        "layout": {"_extra_state": stated(1, 7)},
        "columns": {"_extra_state": stated(3, 101)},
        "bits": {"_extra_state": stated(4, 4)},
        "extra dict": {"_extra_state": {"layout": "cpu"}},
        "extra short": {"_extra_state": extra[:3]},
        "list": {"words": [1, 2]},
    }
    return state | changes[name]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("words short", ValueError, r"words must have shape = \[768\], got \[767\]"),
        ("words long", ValueError, r"words must have shape = \[768\], got \[1536\]"),
        ("words float", ValueError, r"words must have a dtype of = \[torch.int32\], got torch.float32"),
        ("scale groups", ValueError, r"scale must have shape = \[2, 2, 32\], got \[2, 1, 32\]"),
        (
            "scale wider",
            ValueError,
            "scale of the loaded state must have dtype = torch.float16, got torch.float32",
        ),
        ("scale nan", ValueError, "scale of the loaded state must be = finite"),
        ("zero large", ValueError, "zero_point of the loaded state must be below = 8, got 20"),
        ("zero int", ValueError, r"zero_point must have a dtype of = \[torch.uint8\], got torch.int32"),
        ("version", ValueError, "layout_version of the loaded state must be = 1, got 99"),
        ("layout", ValueError, r"layout of the loaded state must be = \[1, 2\], got 7"),
        ("columns", ValueError, "in_features of the loaded state must be = 100, got 101"),
        ("bits", ValueError, "num_bits of the loaded state must be = 3, got 4"),
        ("extra dict", ValueError, r"extra state must be = int64 \[6\], got dict"),
        ("extra short", ValueError, r"extra state must be = int64 \[6\], got torch.int64 \[3\]"),
        ("list", TypeError, "words must be of type = Tensor, got list"),
    ],
)
def test_a_bad_state_changes_nothing(name: str, error: type[Exception], message: str, strict: bool) -> None:
    module, other = make(symmetric=False), make(symmetric=False, seed=1)
    before = weight(module)
    with pytest.raises(error, match=message):
        module.load_state_dict(damage(other.state_dict(), name), strict=strict)
    assert torch.equal(weight(module), before) and module.layout == "cpu"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", ["zero_point", "bias"])
def test_a_state_with_more_than_the_module_has_changes_nothing(name: str, assign: bool, strict: bool) -> None:
    """Codes without the zero points or the bias that belong to them would be another layer."""
    module, other = make(), make(symmetric=name == "bias", seed=1).state_dict()
    if name == "bias":
        module.bias = None
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for state in (other, {name: other[name]}):
        with pytest.raises(ValueError, match=f"PackedLinear: the loaded state must hold no = {name}"):
            module.load_state_dict(state, strict=strict, assign=assign)
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bias": torch.zeros(39)},
            ValueError,
            r"bias of the loaded state must have shape = \[40\], got \[39\]",
        ),
        ({"bias": [0.0]}, TypeError, "bias must be of type = Tensor, got list"),
    ],
)
def test_a_bad_bias_changes_nothing(change: State, error: type[Exception], message: str) -> None:
    module, state = make(), make(seed=1).state_dict()
    before = weight(module)
    with pytest.raises(error, match=message):
        module.load_state_dict(state | change)
    assert torch.equal(weight(module), before)


@pytest.mark.parametrize("layout", ["cpu", "mma"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_without_values_takes_a_state(symmetric: bool, layout: packing.Layout) -> None:
    """meta -> to_empty -> load_state_dict, as large models come into memory."""
    source = nn.Sequential(nn.Linear(100, 100), make(symmetric))
    hollow = nn.Sequential(nn.Linear(100, 100), make(symmetric, layout=layout, seed=1)).to("meta")
    model = hollow.to_empty(device="cpu")
    assert model[1].layout == "cpu"
    model.load_state_dict(source.state_dict())
    assert torch.equal(weight(model[1]), weight(source[1]))
    x = torch.randn(2, 100)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    with pytest.raises(NotImplementedError, match="meta"):
        make(symmetric).to("meta").to("cpu")


def test_no_rows_at_all() -> None:
    empty = PackedLinear.from_codes(
        torch.zeros(0, 64, dtype=torch.uint8), torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.uint8),
        num_bits=4, group_size=64,
    )  # fmt: skip
    empty.load_state_dict(empty.state_dict())
    assert empty(torch.ones(2, 64)).shape == (2, 0)


def test_buffers_come_together_or_not_at_all() -> None:
    module, other = make(), make(seed=1).state_dict()
    before = weight(module)
    with pytest.raises(ValueError, match=r"must hold = \['words', 'scale'\], got \['scale'\]"):
        module.load_state_dict({"scale": other["scale"]}, strict=False)
    module.load_state_dict({"bias": other["bias"]}, strict=False)
    assert torch.equal(weight(module), before) and torch.equal(module.bias, other["bias"])
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


def test_kernels_wait_for_what_is_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may read buffers ahead of time once these are known to be written: not after a load, until told so."""
    told: list[bool] = []
    real = packed_module.packed_linear

    def watched(*given: Any, settled: bool, **named: Any) -> Tensor:
        told.append(settled)
        return real(*given, settled=settled, **named)

    monkeypatch.setattr(packed_module, "packed_linear", watched)
    module, state, x = make(), make(seed=1).state_dict(), torch.randn(2, 100)
    module(x)
    for change in (module.float, lambda: module.load_state_dict(state), module.settle, lambda: module.cpu()):
        change()
        module(x)
        module.forward_rows(x, 0, 40)
    assert told == [False, True, True, False, False, True, True, True, True]
    module.settle()
    module.load_state_dict(state, assign=True)
    module(x)
    assert told[-1] is False
