# SPDX-License-Identifier: Apache-2.0
"""Reading models: what the safetensors library writes is read exactly, and every kind of damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import CheckpointError, MissingModelError, NonFiniteError
from discquant.formats import Checkpoint, check_finite
from discquant.formats.safetensors_file import read_header, read_tensor

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "none": torch.empty(0, 7),
    "flag": torch.tensor([True, False, True]),
    "half": torch.randn(2, 3).half(),
    "float8": torch.randn(9).to(torch.float8_e4m3fn),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def rewrite(file: Path, change: Callable[[dict], object], tail: bytes = b"") -> None:  # type: ignore[type-arg]
    """Edit the header of a file, leaving its data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + tail)


def test_reads_what_the_library_wrote(model: Path) -> None:
    checkpoint = Checkpoint(model)
    found = dict(checkpoint.iterate())
    assert found.keys() == TENSORS.keys()
    for name, tensor in load_file(model / "model.safetensors").items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    assert checkpoint.config() == {"model_type": "llama"}


def test_hash_ignores_sharding(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("sharded")
    shutil.copy(model / "config.json", other)
    names = sorted(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, other / file)
        weight_map |= dict.fromkeys(part, file)
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint(other).sha256() == Checkpoint(model).sha256()
    changed = {**TENSORS, "b": TENSORS["b"] + 1}
    save_file(changed, model / "model.safetensors")
    assert Checkpoint(other).sha256() != Checkpoint(model).sha256()


@pytest.mark.parametrize("kept", [0, 7, 40, 300, -1])
def test_truncated(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|corrupt)"):
        Checkpoint(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda h: h["b"]["data_offsets"].reverse(), "the entry of b is malformed"),
        (lambda h: h["b"].pop("shape"), "the entry of b is malformed"),
        (lambda h: h["b"].update(shape=[-5]), "the entry of b is malformed"),
        (lambda h: h["b"].update(shape="5"), "the entry of b is malformed"),
        (lambda h: h.update(b=None), "the entry of b is malformed"),
        (lambda h: h["b"].update(shape=[6]), r"b \(BF16, \[6\]\) must have 12 bytes, got 10"),
        (lambda h: h["b"].update(dtype="BF17"), "b has the unknown dtype 'BF17'"),
        (lambda h: h["b"].update(data_offsets=h["half"]["data_offsets"], shape=[6]), "overlaps|leaves a hole"),
        (lambda h: h.pop("b"), "leaves a hole before it|the tensors end"),
        (lambda h: [v.update(data_offsets=[o + 8 for o in v["data_offsets"]]) for k, v in h.items() if k[0] != "_"],
         "leaves a hole"),
    ],
)  # fmt: skip
def test_corrupt_header(model: Path, damage: Callable[[dict], object], message: str) -> None:  # type: ignore[type-arg]
    rewrite(model / "model.safetensors", damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(model)
    assert "model.safetensors" in str(caught.value)


def test_bytes_after_the_last_tensor(model: Path) -> None:
    rewrite(model / "model.safetensors", lambda h: None, tail=b"xx")
    with pytest.raises(CheckpointError, match="corrupt: the tensors end at byte"):
        Checkpoint(model)


def test_duplicate_name(model: Path) -> None:
    file = model / "model.safetensors"
    raw = file.read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].replace(b'"half"', b'"flag"')
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :])
    with pytest.raises(CheckpointError, match="'flag' occurs twice"):
        Checkpoint(model)


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_an_error_or_harmless(model: Path, seed: int) -> None:
    """Bytes of the header are replaced at random: either a clear error, or a header that still adds up."""
    file = model / "model.safetensors"
    raw = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    length = int.from_bytes(raw[:8], "little")
    for _ in range(3):
        raw[int(torch.randint(8 + length, (1,), generator=generator))] = int(
            torch.randint(256, (1,), generator=generator)
        )
    file.write_bytes(raw)
    try:
        tensors, _ = read_header(file)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)  # noqa: PT017
        return
    for info in tensors.values():
        assert info.stop <= file.stat().st_size
        if info.dtype != "F4":
            assert read_tensor(info).shape == info.shape


def test_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(MissingModelError, match="there is no such directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        Checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MissingModelError, match=r"it has no config\.json"):
        Checkpoint(tmp_path).config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        Checkpoint(tmp_path).config()


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "../secret.safetensors"}, CheckpointError, "is no name of a safetensors file"),
        ({"a": "gone.safetensors"}, MissingModelError, "gone.safetensors, which .* names, is missing"),
        (
            {"a": "model.safetensors", "zzz": "model.safetensors"},
            CheckpointError,
            "zzz is not in model.safetensors",
        ),
        ({}, CheckpointError, "weight_map must be a non-empty object"),
    ],
)
def test_bad_index(model: Path, weight_map: dict[str, str], error: type[Exception], message: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        Checkpoint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_named(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(3, 4)
    check_finite("fine", tensor.to(dtype))
    tensor[1, 2] = value
    with pytest.raises(
        NonFiniteError, match=r"model\.w holds 1 values that are NaN or infinite, the first at \[1, 2\]"
    ):
        check_finite("model.w", tensor.to(dtype))


def test_checkpoint_check_finite(model: Path) -> None:
    Checkpoint(model).check_finite()
    save_file({**TENSORS, "b": torch.tensor([1.0, float("nan")])}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"^b holds 1 values"):
        Checkpoint(model).check_finite()
    Checkpoint(model).check_finite(["a", "half"])
