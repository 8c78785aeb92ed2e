# SPDX-License-Identifier: Apache-2.0
"""Whole directories: what an export holds, real consumers, damage that the proof finds, kills that leave nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import (
    CheckpointError,
    DiskSpaceError,
    MissingModelError,
    OutputExistsError,
    ProofError,
    UnrepresentableError,
)
from discquant.formats import (
    Checkpoint,
    QuantizedLinear,
    Scheme,
    export_compressed_tensors,
    load_quantized,
    plan_export,
    prove,
    read_layers,
    read_manifest,
)

Layers = Callable[..., Iterator[QuantizedLinear]]
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 96


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


@pytest.fixture(scope="module")
def exported(llama_dir: Path, make_layers: Layers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama at 3 bits, symmetric, groups of 32. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export_compressed_tensors(llama_dir, out, make_layers(llama_dir, 3, 32, True), recipe={"seed": 5})
    return out


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def test_keys_and_untouched_bytes(exported: Path, llama_dir: Path, make_layers: Layers) -> None:
    source, written = load_file(llama_dir / "model.safetensors"), load_file(exported / "model.safetensors")
    names = [layer.name for layer in make_layers(llama_dir, 3, 32, True)]
    assert len(names) == 14
    replaced = {f"{name}.weight" for name in names}
    added = {
        f"{name}.{suffix}" for name in names for suffix in ("weight_packed", "weight_scale", "weight_shape")
    }
    assert written.keys() == source.keys() - replaced | added
    for name in source.keys() - replaced:
        assert torch.equal(source[name].view(torch.int16), written[name].view(torch.int16))
    assert any(name.endswith("bias") for name in source.keys() - replaced)


def test_side_files(exported: Path, llama_dir: Path) -> None:
    assert (exported / "tokenizer.json").read_bytes() == (llama_dir / "tokenizer.json").read_bytes()
    assert (exported / "generation_config.json").read_bytes() == (
        llama_dir / "generation_config.json"
    ).read_bytes()
    assert not (exported / "README.md").exists()
    config = json.loads((exported / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((llama_dir / "config.json").read_text())
    assert quantization["ignore"] == ["lm_head"]


def test_manifest(exported: Path, llama_dir: Path) -> None:
    manifest = read_manifest(exported)
    stored = load_file(exported / "model.safetensors")
    assert manifest["tensors"].keys() == stored.keys()
    for name, row in manifest["tensors"].items():
        data = stored[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["shape"] == list(stored[name].shape)
        assert row["copied"] == ("weight_" not in name)
    file = exported / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["shards"] == {file.name: {"bytes": file.stat().st_size, "sha256": digest}}
    assert manifest["source"]["sha256"] == Checkpoint(llama_dir).sha256()
    assert manifest["recipe"] == {"seed": 5}
    weights = sum(row["shape"][0] * row["shape"][1] for row in manifest["layers"].values())
    assert manifest["quantized_weights"] == weights
    # 3 bits, 16 bits of scale for 32 weights, 128 bits of shape for each of 14 layers.
    assert manifest["bits_per_weight"] == pytest.approx(3 + 16 / 32 + 14 * 128 / weights)
    assert manifest["requires"] == {"compressed-tensors": "0.18.0"}
    assert str(llama_dir.parent) not in json.dumps(manifest), "the manifest holds a path of this machine"


def test_same_arguments_same_bytes(
    exported: Path, llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    layers = make_layers(llama_dir, 3, 32, True)
    export_compressed_tensors(llama_dir, tmp_path / "again", layers, recipe={"seed": 5})
    assert contents(tmp_path / "again") == contents(exported)


def test_layers_read_back(exported: Path, llama_dir: Path, make_layers: Layers) -> None:
    expected = {layer.name: layer for layer in make_layers(llama_dir, 3, 32, True)}
    found = {layer.name: layer for layer in read_layers(exported)}
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        assert torch.equal(layer.q, expected[name].q)
        assert torch.equal(layer.scale.float(), expected[name].scale)
        assert (layer.num_bits, layer.group_size, layer.symmetric) == (3, 32, True)


def test_sharded_and_single_hold_the_same(
    exported: Path, llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    layers = make_layers(llama_dir, 3, 32, True)
    out = tmp_path / "sharded"
    manifest = export_compressed_tensors(llama_dir, out, layers, shard_bytes=20_000)
    assert len(manifest["shards"]) > 2
    assert Checkpoint(out).sha256() == Checkpoint(exported).sha256()
    prove(llama_dir, out, make_layers(llama_dir, 3, 32, True))
    assert torch.equal(load_quantized(out)(TOKENS).logits, load_quantized(exported)(TOKENS).logits)


CASES = [
    (3, 32, True, torch.bfloat16),
    (4, 64, True, torch.bfloat16),
    (3, -1, True, torch.float32),
    (4, 32, True, torch.float16),
    (4, 32, False, torch.bfloat16),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num_bits", "group_size", "symmetric", "dtype"),
    CASES,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_real_consumer(
    num_bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    make_llama: Callable[..., Path],
    make_layers: Layers,
    tmp_path: Path,
) -> None:
    """transformers with compressed-tensors, our own load, and the source with rounded weights put in: the same logits.

    The bound is zero. All three run the same modules on the same weights: q - z has at most nine bits and a 16-bit
    scale at most eleven, so their float32 product is exact and each path rounds it to the model's dtype once.
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    source, out = make_llama(tmp_path / "model", dtype), tmp_path / "out"

    def layers() -> Iterator[QuantizedLinear]:
        return make_layers(source, num_bits, group_size, symmetric)

    export_compressed_tensors(source, out, layers(), prove_from=layers)
    solved = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        original = solved(TOKENS).logits
        for layer in layers():
            solved.get_parameter(f"{layer.name}.weight").copy_(layer.dequantize(dtype))
        expected = solved(TOKENS).logits
        ours = load_quantized(out)
        assert next(ours.parameters()).dtype == dtype
        assert torch.equal(ours(TOKENS).logits, expected)
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(theirs(TOKENS).logits, expected)
    assert not torch.equal(original, expected), (
        "quantization changed nothing: the test would not notice a wrong load"
    )


def test_tied_head(make_llama: Callable[..., Path], make_layers: Layers, tmp_path: Path) -> None:
    source, out = (
        make_llama(tmp_path / "model", tie_word_embeddings=True, attention_bias=False),
        tmp_path / "out",
    )
    assert "lm_head.weight" not in Checkpoint(source).tensors
    export_compressed_tensors(source, out, make_layers(source, 4, 32, True), ignore=[])
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
    model = load_quantized(out, torch.float32)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    embedding = Checkpoint(source).read("model.embed_tokens.weight")
    assert torch.equal(model.lm_head.weight, embedding.float())
    head = QuantizedLinear("lm_head", torch.zeros(96, 64, dtype=torch.uint8), torch.ones(96, 2), None, 4, 32)
    with pytest.raises(UnrepresentableError, match=r"no lm_head\.weight; a layer that shares its weight"):
        export_compressed_tensors(source, tmp_path / "no", [head])


def test_biases_and_dtype_on_load(exported: Path, llama_dir: Path) -> None:
    model = load_quantized(exported, torch.float32)
    name = "model.layers.1.self_attn.k_proj"
    layer = next(layer for layer in read_layers(exported) if layer.name == name)
    assert torch.equal(model.get_parameter(f"{name}.weight"), layer.dequantize(torch.float32))
    assert torch.equal(
        model.get_parameter(f"{name}.bias"), Checkpoint(llama_dir).read(f"{name}.bias").float()
    )
    assert not model.training


def test_mixed_schemes(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    def layers() -> Iterator[QuantizedLinear]:
        fours = {layer.name: layer for layer in make_layers(llama_dir, 4, 64, True)}
        for layer in make_layers(llama_dir, 3, 32, True):
            yield fours[layer.name] if "mlp" in layer.name else layer

    out = tmp_path / "out"
    export_compressed_tensors(llama_dir, out, layers(), prove_from=layers)
    assert {layer.num_bits for layer in read_layers(out) if "mlp" in layer.name} == {4}
    load_quantized(out)


def test_some_layers_only(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    """What is not quantized is named to the engine."""
    chosen = [layer for layer in make_layers(llama_dir, 3, 32, True) if "layers.0" not in layer.name]
    out = tmp_path / "out"
    export_compressed_tensors(llama_dir, out, chosen, prove_from=lambda: chosen)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert len([name for name in ignored if name.startswith("model.layers.0.")]) == 7
    assert "model.embed_tokens" not in ignored
    assert len(list(read_layers(out))) == 7


# What an export refuses.


def plan_of(source: Path, layers: Iterator[QuantizedLinear]) -> dict[str, Scheme]:
    return {layer.name: Scheme.of(layer) for layer in layers}


def test_plan_knows_the_size(exported: Path, llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    plan = plan_export(llama_dir, tmp_path / "out", plan_of(llama_dir, make_layers(llama_dir, 3, 32, True)))
    assert plan.weight_bytes == sum(info.num_bytes for info in Checkpoint(exported).tensors.values())
    assert plan.warnings == []


def test_plan_refuses_before_work(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"model.layers.0.mlp.up_proj": Scheme(3, 32, True)}
    out = tmp_path / "out"
    with pytest.raises(
        UnrepresentableError, match=r"layers\.0\.mlp\.down_proj: its 192 input columns are no multiple"
    ):
        plan_export(llama_dir, out, {"model.layers.0.mlp.down_proj": Scheme(3, 128, True)})
    with pytest.raises(UnrepresentableError, match=r"holds no model\.layers\.9\.mlp\.up_proj\.weight"):
        plan_export(llama_dir, out, {"model.layers.9.mlp.up_proj": Scheme(3, 32, True)})
    with pytest.raises(UnrepresentableError, match=r"model\.norm\.weight must have 2 dimensions, got \[64\]"):
        plan_export(llama_dir, out, {"model.norm": Scheme(3, 32, True)})
    with pytest.raises(MissingModelError):
        plan_export(tmp_path / "nowhere", out, good)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputExistsError):
        plan_export(llama_dir, tmp_path / "full", good)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"0\.00 GB free"):
        plan_export(llama_dir, out, good)
    assert not out.exists()


def test_plan_warns(llama_dir: Path, tmp_path: Path) -> None:
    schemes = {f"model.layers.0.self_attn.{name}": Scheme(4, 32, True) for name in ("q_proj", "k_proj")}
    found = plan_export(llama_dir, tmp_path / "out", schemes).warnings
    assert found == [
        "model.layers.0.self_attn: engines fuse q_proj, k_proj, v_proj, which do not share one grid"
    ]
    found = plan_export(llama_dir, tmp_path / "out", {"lm_head": Scheme(3, 32, False)}).warnings
    assert len(found) == 1
    assert "3 bits asymmetric" in found[0]


def test_export_keeps_to_the_plan(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    layers = list(make_layers(llama_dir, 3, 32, True))
    plan = plan_export(llama_dir, tmp_path / "out", {layer.name: Scheme.of(layer) for layer in layers})
    with pytest.raises(UnrepresentableError, match=rf"not those planned: {layers[-1].name}"):
        export_compressed_tensors(llama_dir, tmp_path / "out", layers[:-1], plan=plan)
    with pytest.raises(UnrepresentableError, match=f"{layers[0].name} was given twice"):
        export_compressed_tensors(llama_dir, tmp_path / "out", [layers[0], layers[0]])
    wrong = dataclasses.replace(layers[0], name=layers[-2].name)
    assert layers[-2].q.shape != layers[0].q.shape
    with pytest.raises(UnrepresentableError, match=f"{layers[-2].name} must have the shape of its weight"):
        export_compressed_tensors(llama_dir, tmp_path / "out", [wrong])
    assert list(tmp_path.iterdir()) == []


def test_quantized_source_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UnrepresentableError, match="is quantized already"):
        export_compressed_tensors(exported, tmp_path / "out", [])


def test_truncated_source_is_refused(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path / "source")
    layers = list(make_layers(llama_dir, 3, 32, True))
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        export_compressed_tensors(tmp_path / "source", tmp_path / "out", layers)
    assert not (tmp_path / "out").exists()


# The proof.


def damage_tensor(path: Path, name: str, place: int = 0) -> None:
    """Flip one bit of one tensor, keeping the file sound."""
    file = path / "model.safetensors"
    info = Checkpoint(path).tensors[name]
    raw = bytearray(file.read_bytes())
    raw[info.start + place] ^= 1
    file.write_bytes(raw)


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: damage_tensor(path, f"{UP}.weight_packed", 5), rf"{UP}: codes: 1 values differ"),
        (lambda path: damage_tensor(path, f"{UP}.weight_scale"), rf"{UP}: scale: 1 values differ, the first at \[0"),
        (lambda path: damage_tensor(path, f"{UP}.weight_shape"), "weight_shape is not"),
        (lambda path: damage_tensor(path, "model.norm.weight"), "norm.weight is not the source's byte for byte"),
        (lambda path: change_tensors(path, lambda t: t.pop("model.norm.weight")), "tensors are missing from the file"),
        (lambda path: change_tensors(path, lambda t: t.pop(f"{UP}.weight_scale")), f"{UP}: weight_scale is missing"),
        (lambda path: change_tensors(path, lambda t: t.update(more=torch.ones(1))), "that nobody asked for: .'more'."),
        (lambda path: change_tensors(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()})),
         "changed dtype or shape"),
    ],
)  # fmt: skip
def test_proof_finds_damage(
    damage: Callable[[Path], None], message: str, damaged: Path, llama_dir: Path, make_layers: Layers
) -> None:
    (damaged / "discquant_manifest.json").unlink()
    prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))
    damage(damaged)
    with pytest.raises(ProofError, match=message):
        prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))


def test_proof_checks_shard_hashes(damaged: Path, llama_dir: Path, make_layers: Layers) -> None:
    """The same tensors in a file with other bytes: only the manifest can tell."""
    change_tensors(damaged, lambda tensors: None)
    with pytest.raises(ProofError, match=r"model\.safetensors does not have the hash of the manifest"):
        prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))


def test_proof_checks_the_configuration(damaged: Path, llama_dir: Path, make_layers: Layers) -> None:
    text = (damaged / "config.json").read_text()
    for before, after, message in (
        ('"num_bits": 3', '"num_bits": 4', "config.json says num_bits = 4, the layer has 3"),
        ('"group_size": 32', '"group_size": 64', "config.json says group_size = 64, the layer has 32"),
        ('"lm_head"\n', f'"{UP}"\n', f"config.json tells engines to ignore {UP}"),
    ):
        assert text.count(before) == 1
        (damaged / "config.json").write_text(text.replace(before, after))
        with pytest.raises(ProofError, match=message):
            prove(llama_dir, damaged, make_layers(llama_dir, 3, 32, True))


def test_proof_fails_before_anything_appears(llama_dir: Path, make_layers: Layers, tmp_path: Path) -> None:
    def others() -> Iterator[QuantizedLinear]:
        for layer in make_layers(llama_dir, 3, 32, True):
            q = layer.q.clone()
            q[3, 4] ^= 1
            yield dataclasses.replace(layer, q=q)

    with pytest.raises(ProofError, match=r"codes: 1 values differ, the first at \[3, 4\]"):
        export_compressed_tensors(
            llama_dir, tmp_path / "out", make_layers(llama_dir, 3, 32, True), prove_from=others
        )
    assert list(tmp_path.iterdir()) == []


# Loading.


def test_load_refuses(damaged: Path, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        load_quantized(llama_dir)
    with pytest.raises(MissingModelError):
        load_quantized(tmp_path / "nowhere")
    (damaged / "discquant_manifest.json").unlink()
    change_tensors(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            CheckpointError, match=r"does not fit LlamaForCausalLM: missing_keys .'model\.norm\.weight'"
        ):
            load_quantized(damaged)


# Atomicity.

KILLED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
import sys, time
from pathlib import Path
import torch
from discquant.formats import Checkpoint, QuantizedLinear, export_compressed_tensors
source, out = Path(sys.argv[1]), Path(sys.argv[2])
def layers():
    for number, key in enumerate(key for key in Checkpoint(source).tensors if "proj.weight" in key):
        rows, columns = Checkpoint(source).tensors[key].shape
        q = torch.zeros(rows, columns, dtype=torch.uint8)
        yield QuantizedLinear(key.removesuffix(".weight"), q, torch.ones(rows, 1), None, 3, -1)
        if number == 4:
            print("in the middle", flush=True)
            time.sleep(60)
export_compressed_tensors(source, out, layers(), shard_bytes=5000)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_kill_in_the_middle_leaves_nothing(
    name: str, llama_dir: Path, make_layers: Layers, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(llama_dir), str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in the middle\n"
    assert any((tmp_path / ".out.partial").glob("part-*")), (
        "nothing was written yet: the test kills too early"
    )
    child.send_signal(getattr(signal, name))
    child.wait()
    child.stdout.close()
    assert not out.exists()
    export_compressed_tensors(llama_dir, out, make_layers(llama_dir, 3, 32, True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prove(llama_dir, out, make_layers(llama_dir, 3, 32, True))
