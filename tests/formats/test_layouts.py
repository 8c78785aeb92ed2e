# SPDX-License-Identifier: Apache-2.0
"""Every safetensors format on matrices of odd sizes: what is written is what the specification says and reads back.

The oracle builds words from single Python integers and shares no code with packer, reader or proof.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError
from discquant.formats import Checkpoint, CodedLayer, read_layers
from discquant.formats.registry import by_name, find
from discquant.grids import UniformGrid

NAME = "model.layers.0.mlp.up_proj"
WORDS = {"compressed-tensors": "weight_packed", "mlx": "weight"}
FORMATS = {
    "compressed-tensors": (2, 3, 4, 5, 6, 7, 8), "gptq": (2, 3, 4, 8), "gptq-v2": (2, 3, 4, 8),
    "autoround": (2, 3, 4, 8), "awq": (4,), "mlx": (2, 3, 4, 5, 6, 8),
}  # fmt: skip


def words(codes: list[int], bits: int) -> list[int]:
    """D_b as one big integer, cut into unsigned words."""
    stream = sum(code << (place * bits) for place, code in enumerate(codes))
    return [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(-(-len(codes) * bits // 32))]


def awq_words(codes: list[int]) -> list[int]:
    """Element e of eight at shift 4 * [0, 4, 1, 5, 2, 6, 3, 7][e]."""
    shifts = [0, 4, 1, 5, 2, 6, 3, 7]
    return [
        sum(code << (4 * shifts[place]) for place, code in enumerate(codes[start : start + 8]))
        for start in range(0, len(codes), 8)
    ]


def unsigned(tensor: Tensor) -> list[list[int]]:
    return [[value & 0xFFFFFFFF for value in row] for row in tensor.view(torch.int32).tolist()]


def layer_of(bits: int, rows: int, columns: int, size: int, symmetric: bool, seed: int) -> CodedLayer:
    """Random codes; scales exact in bfloat16 and float16, zero points from 1."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if size == -1 else columns // size
    q = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randint(64, 128, (rows, groups), generator=generator).float() / 4096
    zero = torch.randint(1, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    grid = UniformGrid(bits, size, symmetric, scale.bfloat16(), None if symmetric else zero)
    return CodedLayer(NAME, q, grid)


def source_of(folder: Path, layer: CodedLayer, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    """A model of one matrix, a norm and an embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer.name}.weight": torch.zeros(layer.q.shape, dtype=dtype),
        "model.norm.weight": torch.randn(5).to(dtype),
        "model.embed_tokens.weight": torch.randn(3, 5).to(dtype),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["X"]}))
    return Checkpoint(folder)


def write(folder: Path, name: str, layer: CodedLayer) -> Path:
    """Write one layer in a format, proven, and return the folder."""
    source = source_of(folder / "source", layer)
    by_name(name).write(source, folder / "out", [layer], prove_from=lambda: [layer])
    return folder / "out"


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, CodedLayer]:
    """A format with a layer that fits it; rows as odd as the format allows."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    bits = draw(st.sampled_from(FORMATS[name]))
    symmetric = draw(st.booleans()) or name == "mlx"
    size = draw(st.sampled_from((32, 64) if name == "mlx" else (-1, 8, 32, 64)))
    unit = {"gptq": 32 if bits == 3 else 32 // bits, "awq": 8}.get(name.removesuffix("-v2"), 1)
    if name == "autoround":
        unit = 32 if bits == 3 else 32 // bits
    rows = unit * draw(st.integers(1, 5))
    if size == -1:
        columns = unit * draw(st.integers(1, 40)) if unit > 1 else draw(st.integers(1, 131))
    else:
        step = max(size, unit)
        columns = step * draw(st.integers(1, 3))
    return name, layer_of(bits, rows, columns, size, symmetric, draw(st.integers(0, 2**31)))


@settings(max_examples=40)
@given(cases())
def test_round_trip(case: tuple[str, CodedLayer]) -> None:
    """Written, proven, recognised, read back; rewritten with other codes, and only code bytes change."""
    name, layer = case
    with tempfile.TemporaryDirectory() as folder:
        out = write(Path(folder), name, layer)
        assert find(out).name == name
        (found,) = by_name(name).read(out)
        assert torch.equal(found.q, layer.q)
        # MLX evaluates in the scales' dtype; everywhere else the served float is the same number.
        if name != "mlx":
            assert torch.equal(found.dequantize(torch.float32), layer.dequantize(torch.float32))
        other = layer.q.flip(0, 1).contiguous()
        manifest = by_name(name).rewrite(out, Path(folder) / "again", {NAME: other})
        (again,) = by_name(name).read(Path(folder) / "again")
        assert torch.equal(again.q, other)
        assert torch.equal(again.grid.scale, found.grid.scale)
        assert manifest["byte_diff"]["outside"] == 0
        before, after = (
            load_file(out / "model.safetensors"),
            load_file(Path(folder) / "again/model.safetensors"),
        )
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed <= {f"{NAME}.{WORDS.get(name, 'qweight')}"}


@settings(max_examples=25)
@given(
    st.sampled_from(("gptq", "gptq-v2")), st.sampled_from((2, 3, 4, 8)), st.booleans(), st.integers(0, 2**31)
)
def test_gptq_words(name: str, bits: int, symmetric: bool, seed: int) -> None:
    """Every word of qweight, qzeros, scales and g_idx against the specification."""
    layer = layer_of(bits, 32, 64, 32, symmetric, seed)
    with tempfile.TemporaryDirectory() as folder:
        stored = load_file(write(Path(folder), name, layer) / "model.safetensors")
    qweight = torch.tensor([words(row, bits) for row in layer.q.tolist()]).T
    assert unsigned(stored[f"{NAME}.qweight"]) == qweight.tolist()
    zero = torch.full((32, 2), 1 << (bits - 1)) if symmetric else layer.grid.zero_point.long()  # type: ignore[union-attr]
    kept = (zero - 1) % (1 << bits) if name == "gptq" else zero
    assert unsigned(stored[f"{NAME}.qzeros"]) == [words(column, bits) for column in kept.T.tolist()]
    assert torch.equal(stored[f"{NAME}.scales"].float(), layer.grid.scale.float().T)
    assert stored[f"{NAME}.scales"].dtype == torch.float16
    assert stored[f"{NAME}.g_idx"].tolist() == [column // 32 for column in range(64)]


def test_awq_words(tmp_path: Path) -> None:
    layer = layer_of(4, 16, 32, 32, False, 3)
    stored = load_file(write(tmp_path, "awq", layer) / "model.safetensors")
    assert unsigned(stored[f"{NAME}.qweight"]) == [awq_words(row) for row in layer.q.T.tolist()]
    assert layer.grid.zero_point is not None
    zero = layer.grid.zero_point.T.tolist()
    assert unsigned(stored[f"{NAME}.qzeros"]) == [awq_words(row) for row in zero]


def test_frozen_awq_word() -> None:
    from discquant.formats.awq import pack_awq, unpack_awq

    eight = torch.arange(8, dtype=torch.uint8)[None]
    assert f"{int(pack_awq(eight)) & 0xFFFFFFFF:08x}" == "75316420"
    assert torch.equal(unpack_awq(pack_awq(eight)), eight)


FROZEN_ZEROS = {
    (2, "gptq"): "55555555", (2, "gptq-v2"): "aaaaaaaa", (4, "gptq"): "77777777", (4, "gptq-v2"): "88888888",
    (8, "gptq"): "7f7f7f7f", (8, "gptq-v2"): "80808080", (3, "gptq"): "db6db6db b6db6db6 6db6db6d",
    (3, "gptq-v2"): "24924924 49249249 92492492",
}  # fmt: skip


@pytest.mark.parametrize(("bits", "name"), FROZEN_ZEROS)
def test_frozen_symmetric_zeros(bits: int, name: str, tmp_path: Path) -> None:
    stored = load_file(write(tmp_path, name, layer_of(bits, 32, 32, 32, True, 0)) / "model.safetensors")
    count = 3 if bits == 3 else 1
    row = unsigned(stored[f"{NAME}.qzeros"])[0][:count]
    assert " ".join(f"{word:08x}" for word in row) == FROZEN_ZEROS[bits, name]


def test_v1_has_no_zero_point_zero(tmp_path: Path) -> None:
    layer = layer_of(4, 8, 32, 32, False, 1)
    assert isinstance(layer.grid, UniformGrid)
    assert layer.grid.zero_point is not None
    layer.grid.zero_point[3, 0] = 0
    with pytest.raises(
        UnrepresentableError, match=r"zero point of 0, which v1 cannot hold safely; write gptq-v2"
    ):
        write(tmp_path, "gptq", layer)
    with pytest.raises(UnrepresentableError, match="write gptq-v2"):
        by_name("gptq").check_grid(NAME, layer.grid)
    assert not (tmp_path / "out").exists()
    out = write(tmp_path, "gptq-v2", layer)
    (found,) = by_name("gptq-v2").read(out)
    assert found.grid.zero_point is not None and int(found.grid.zero_point[3, 0]) == 0
    # The same words called v1 would stand for 1 more; the field 2^b - 1 would be a zero point of 0.
    layer.grid.zero_point[3, 0] = 15
    again = write(tmp_path / "v1", "gptq-v2", layer)
    config = json.loads((again / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (again / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnrepresentableError, match="convert the file to gptq_v2 first"):
        list(by_name("gptq").read(again))


def change(folder: Path, edit: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key, value in edit.items():
        tensors.pop(f"{NAME}.{key}", None)
        if value is not None:
            tensors[f"{NAME}.{key}"] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")


def test_act_order_is_read_by_its_index(tmp_path: Path) -> None:
    layer = layer_of(4, 8, 64, 32, False, 5)
    out = write(tmp_path, "gptq", layer)
    index = torch.randperm(64) % 2
    change(out, {"g_idx": index.int()})
    (found,) = by_name("gptq").read(out)
    assert layer.grid.zero_point is not None
    scale, zero = layer.grid.scale.float()[:, index], layer.grid.zero_point.float()[:, index]
    assert torch.equal(found.dequantize(torch.float32), scale * (layer.q.float() - zero))
    assert "act-order" in by_name("gptq").describe(out).notes[0]
    other = (15 - layer.q).contiguous()
    by_name("gptq").rewrite(out, tmp_path / "again", {NAME: other})
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")[f"{NAME}.g_idx"], index.int())
    change(out, {"g_idx": index.int() + 1})
    with pytest.raises(CheckpointError, match="g_idx"):
        list(by_name("gptq").read(out))


def test_act_order_of_compressed_tensors(tmp_path: Path) -> None:
    """A file that declares it is read by its index; without the index it is refused, not read in plain groups."""
    layer = layer_of(4, 8, 64, 32, True, 5)
    out, chosen = write(tmp_path, "compressed-tensors", layer), by_name("compressed-tensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="weight_g_idx is missing"):
        list(chosen.read(out))
    index = torch.randperm(64) % 2
    change(out, {"weight_g_idx": index.int()})
    (found,) = chosen.read(out)
    expected = layer.grid.scale.float()[:, index] * (layer.q.float() - 8)
    assert torch.equal(found.dequantize(torch.float32), expected)
    with pytest.raises(UnrepresentableError, match=r"read_layers: .*act-order"):
        list(read_layers(out))


def test_old_three_bit_layout_is_read_and_kept(tmp_path: Path) -> None:
    """10 codes a word, as compressed-tensors wrote 3 bits before 0.18; a rewrite stays in that layout."""
    layer = layer_of(3, 4, 64, 32, True, 7)
    out = write(tmp_path, "compressed-tensors", layer)

    def old(q: Tensor) -> Tensor:
        rows = [[words(row[start : start + 10], 3)[0] for start in range(0, 64, 10)] for row in q.tolist()]
        return torch.tensor(rows, dtype=torch.int32)

    change(out, {"weight_packed": old(layer.q)})
    (found,) = by_name("compressed-tensors").read(out)
    assert torch.equal(found.q, layer.q)
    assert "10 to a word" in by_name("compressed-tensors").describe(out).notes[0]
    other = (7 - layer.q).contiguous()
    by_name("compressed-tensors").rewrite(out, tmp_path / "again", {NAME: other})
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")[f"{NAME}.weight_packed"], old(other))


def test_gptq_is_symmetric_where_the_layer_says_so(tmp_path: Path) -> None:
    """`dynamic` may differ from the rest of the file."""
    out = write(tmp_path, "gptq-v2", layer_of(4, 8, 64, 32, False, 11))
    config = json.loads((out / "config.json").read_text())
    for sym, own in ((True, False), (False, True)):
        config["quantization_config"] |= {"sym": sym, "dynamic": {f"+:^{NAME}$": {"sym": own}}}
        (out / "config.json").write_text(json.dumps(config))
        (row,) = by_name("gptq-v2").describe(out).layers
        assert row.symmetric == own


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq"])
def test_autoround_packings_and_negative_scales(packing: str, tmp_path: Path) -> None:
    layer = layer_of(4, 8, 64, 32, True, 11)
    layer.grid.scale[::2].neg_()
    out = write(tmp_path, "autoround", layer)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["packing_format"] == "auto_round:auto_gptq"
    config["quantization_config"]["packing_format"] = packing
    (out / "config.json").write_text(json.dumps(config))
    if packing != "auto_round:auto_gptq":  # true zero points
        change(out, {"qzeros": torch.full((2, 1), 0x88888888 - (1 << 32), dtype=torch.int32)})
    (found,) = by_name("autoround").read(out)
    assert torch.equal(found.dequantize(torch.float32), layer.dequantize(torch.float32))


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_scales_are_named(name: str, value: float, tmp_path: Path) -> None:
    out = write(tmp_path, name, layer_of(4, 8, 64, 32, True, 2))
    key = {"compressed-tensors": "weight_scale"}.get(name, "scales")
    scale = load_file(out / "model.safetensors")[f"{NAME}.{key}"]
    scale[0, 0] = value
    change(out, {key: scale})
    with pytest.raises(CheckpointError, match=rf"{NAME}: .*finite"):
        list(by_name(name).read(out))


def refusals() -> Iterator[tuple[str, CodedLayer, str]]:
    yield "awq", layer_of(3, 8, 32, 32, True, 0), "integers of 4 bits"
    yield "awq", layer_of(4, 7, 32, 32, True, 0), "rows in multiples of 8"
    yield "gptq", layer_of(5, 32, 32, 32, True, 0), "2, 3, 4 and 8 bits"
    yield "gptq", layer_of(3, 30, 32, 32, True, 0), "multiples of 32 at 3 bits"
    yield "mlx", layer_of(4, 8, 64, -1, True, 0), "mlx has groups of"
    yield "mlx", layer_of(4, 8, 64, 32, False, 0), "use a symmetric grid"


@pytest.mark.parametrize(("name", "layer", "message"), list(refusals()))
def test_refuses(name: str, layer: CodedLayer, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError, match=message):
        write(tmp_path, name, layer)
    assert not (tmp_path / "out").exists()


def test_rewrite_refuses(tmp_path: Path) -> None:
    layer = layer_of(4, 8, 64, 32, True, 2)
    out, gptq = write(tmp_path, "gptq", layer), by_name("gptq")
    for codes, message in (
        ({"other": layer.q}, "no quantized layers of these names: other"),
        ({NAME: layer.q[:, :32]}, r"must be uint8 of shape \[8, 64\]"),
        ({NAME: layer.q + 16}, "codes must be below 16"),
    ):
        with pytest.raises(UnrepresentableError, match=message):
            gptq.rewrite(out, tmp_path / "again", codes)
    assert not (tmp_path / "again").exists()


def test_byte_diff_counts_what_lies_outside(tmp_path: Path) -> None:
    from discquant.formats.rewrite import byte_diff

    layer = layer_of(4, 8, 64, 32, True, 2)
    out = write(tmp_path, "gptq", layer)
    (tmp_path / "copy").mkdir()
    raw = bytearray((out / "model.safetensors").read_bytes())
    before = Checkpoint(out)
    inside, outside = before.tensors[f"{NAME}.qweight"], before.tensors["model.norm.weight"]
    raw[inside.start] ^= 1
    raw[outside.start] ^= 1
    raw[outside.stop - 1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(raw)
    diff = byte_diff(before, tmp_path / "copy", {NAME: inside})
    assert (diff["changed"], diff["outside"], diff["layers"]) == (1, 2, {NAME: 1})
