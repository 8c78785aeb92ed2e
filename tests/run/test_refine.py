# SPDX-License-Identifier: Apache-2.0
"""Refine: the same file with better codes, or the same file; and no file that is not of this original."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CheckpointError, ConfigError, ResumeError
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.refined import keep_card
from discquant.grids import place_grid
from discquant.run import pipeline
from discquant.run.derive import row_correlations
from discquant.run.directory import RunDirectory
from discquant.run.events import Events
from discquant.run.export import export
from discquant.run.refine import RefinePipeline
from discquant.run.served import load_run_model
from discquant.run.summary import summarize_run

Make = Callable[..., Path]


def _config(dataset: str) -> QuantizeConfig:
    return QuantizeConfig(
        solver=SolverConfig(iters=12, batch_size=4, micro_batch=4, warmup=2),
        data=DataConfig(dataset, 24, 32),
        gptq_samples=8,
        checkpoint_every=4,
        baselines=(),
    )


def _open(model_dir: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_dir)
    return model


def test_text_that_measures_nothing_keeps_the_file(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token of held-out text has no KL: the result cannot be called better, and the run ends all the same."""

    def unmeasured(*given: Any) -> dict[str, Any]:
        summary = summarize_run(*given)
        for found in summary["methods"].values():
            found["kl_mean"] = None
        return summary

    monkeypatch.setattr(pipeline, "summarize_run", unmeasured)
    file, out, said = make("compressed-tensors"), tmp_path / "out", []
    config = replace(_config(dataset), method="greedy")
    events = Events(message=said.append)
    summary = RefinePipeline(file, out, model_dir, config, events=events).execute()
    found = summary["refine"]
    assert not found["improved"] and found["kl_before"] is None and found["kl_ratio"] is None
    assert summary["byte_diff"]["changed"] == 0
    assert any("not better on held-out text (KL -, the file -)" in line for line in said)
    assert "(KL -)" in (out / "report.md").read_text(encoding="utf-8")
    assert "(KL -)" in (out / "compressed-tensors" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def make(model_dir: Path, tmp_path: Path) -> Make:
    """Write a file of nearest codes in a format, from the model or from a changed copy of it."""

    def build(
        name: str = "gptq",
        grid: GridConfig | None = None,
        change: Callable[[nn.Module], None] | None = None,
        dense: str = "nothing",
    ) -> Path:
        source = model_dir
        if change is not None:
            model = _open(model_dir)
            with torch.no_grad():
                change(model)
            source = tmp_path / "changed"
            model.save_pretrained(source)
        checkpoint = Checkpoint(source)
        layers = []
        for key in checkpoint.tensors:
            if key.endswith("proj.weight") and dense not in key:
                weight = checkpoint.read(key).float()
                laid = place_grid(weight, grid or GridConfig(3, 32, True, "absmax"))
                layers.append(CodedLayer(key.removesuffix(".weight"), laid.nearest(weight), laid))
        registry.by_name(name).write(checkpoint, tmp_path / name, layers)
        return tmp_path / name

    return build


def _codes(path: Path) -> dict[str, Tensor]:
    return {layer.name: layer.q for layer in registry.find(path).read(path)}


def test_a_better_file_of_the_same_bytes_elsewhere(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    file, out = make(), tmp_path / "out"
    summary = RefinePipeline(file, out, model_dir, _config(dataset)).execute()
    found = summary["refine"]
    assert set(summary["methods"]) == {"file", "discquant"}
    assert found["improved"] and 0 < found["kl_ratio"] == found["kl_after"] / found["kl_before"] < 1
    assert found["codes_outside_neighbours"] == 0
    assert found["derivation"]["layers"] == 14 and found["derivation"]["folded"] == ()
    assert found["derivation"]["worst_correlation"] > 0.9
    refined = out / "gptq"
    assert summary["byte_diff"]["outside"] == 0 and summary["byte_diff"]["changed"] > 0
    manifest = json.loads((refined / "discquant_manifest.json").read_text(encoding="utf-8"))
    assert manifest["byte_diff"] == summary["byte_diff"]
    assert (refined / "model.safetensors").stat().st_size == (file / "model.safetensors").stat().st_size
    written, kept = _codes(refined), {layer.name: layer.q for layer in RunDirectory(out).coded_layers()}
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)
    before, after = Checkpoint(file), Checkpoint(refined)
    for name in before.tensors:
        if not name.endswith("qweight"):
            assert torch.equal(before.read(name), after.read(name)), name
    ids = torch.randint(3, 97, (2, 20))
    with torch.no_grad():
        assert not torch.equal(load_run_model(out)(ids).logits, _open(model_dir)(ids).logits)
    # The same command again: complete. Another one: refused, and it says what differs.
    assert RefinePipeline(file, out, model_dir, _config(dataset)).execute() == json.loads(json.dumps(summary))
    with pytest.raises(ResumeError, match="seed"):
        RefinePipeline(file, out, model_dir, replace(_config(dataset), seed=1)).execute()


def test_a_file_whose_first_block_is_dense(make: Make, model_dir: Path, dataset: str, tmp_path: Path) -> None:
    file = make(dense=".layers.0.")
    found = RefinePipeline(file, tmp_path / "out", model_dir, _config(dataset)).execute()["refine"]
    assert found["improved"] and found["derivation"]["layers"] == 7


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "discquant_manifest.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["gptq", "gguf", "onnx"])
def test_card_and_manifest_of_a_refined_folder(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path, name: str
) -> None:
    """Its own card and every field of an exported folder's manifest; the old card aside, all else bit for bit."""
    from huggingface_hub import ModelCard

    for package in {"gguf": ["gguf"], "onnx": ["onnx"]}.get(name, []):
        pytest.importorskip(package)
    file, out = make(name, GridConfig.of_kind("q4_0") if name == "gguf" else None), tmp_path / "out"
    old = b"---\nlicense: mit\nlibrary_name: other\n---\n# a card of another tool\n"
    (file / "README.md").write_bytes(old)
    (file / "more.json").write_text("{}")
    exported = _manifest(file)
    config = replace(_config(dataset), method="gptq", seed=11)
    summary = RefinePipeline(file, out, model_dir, config).execute()
    refined = out / name
    found, diff = summary["refine"], summary["byte_diff"]
    assert found["improved"] and 0 < found["codes_changed"] < found["codes"]
    manifest = _manifest(refined)
    assert set(exported) < set(manifest)
    for key in ("format", "source", "engines", "quantized_weights", "weight_file_bytes", "bits_per_weight"):
        assert manifest[key] == exported[key], key
    assert manifest["source"]["sha256"] == Checkpoint(model_dir).sha256()
    recorded = RunDirectory(out).config()["identity"]["config"]
    kind = {"gguf": "Q4_0"}.get(name, "int3 group 32 symmetric")
    told = {**recorded, "baselines": [], "grid": f"the file's own: {kind}"}
    del told["layers"]
    assert manifest["recipe"] == told
    report = (out / "report.md").read_text()
    assert f"GPTQ on the file's own grids: {kind}, of `{model_dir.name}`" in report
    assert f"| `grid` | the file's own: {kind} |" in report
    assert manifest["recipe"]["seed"] == 11
    assert manifest["refine"]["kl_after"] < manifest["refine"]["kl_before"] == found["kl_before"]
    assert manifest["layers"].keys() == exported["layers"].keys()
    weights = manifest["refined_from"]["files"]
    assert weights.keys() == manifest["shards"].keys() == exported["shards"].keys()
    for part, row in manifest["shards"].items():
        assert (
            weights[part]
            == sha256((file / part).read_bytes()).hexdigest()
            == exported["shards"][part]["sha256"]
        )
        assert row["sha256"] == sha256((refined / part).read_bytes()).hexdigest()
    changed = {
        key for key, row in manifest["tensors"].items() if row["sha256"] != exported["tensors"][key]["sha256"]
    }
    assert manifest["tensors"].keys() == exported["tensors"].keys()
    assert changed and not any(manifest["tensors"][key]["copied"] for key in changed)
    ours = {"README.md", "discquant_manifest.json", "discquant_proof.json", *weights}
    for part in file.iterdir():
        if part.name not in ours:
            assert (refined / part.name).read_bytes() == part.read_bytes(), part.name
    assert (refined / "README.unrefined.md").read_bytes() == old
    card = ModelCard.load(refined / "README.md")
    assert card.data.license == "mit" and card.data.library_name == {"gptq": "transformers"}.get(name, name)
    for words in (
        f"`{name}` ({name}), made from `{model_dir.name}`, refined by [discquant]",
        f"{found['codes_changed']:,} of {found['codes']:,} codes were chosen anew",
        f"{found['kl_before']:.5f} before, {found['kl_after']:.5f} after",
        f"{diff['changed']:,} of {diff['code_bytes']:,} bytes of codes differ from that file, and 0 bytes elsewhere",
        "[README.unrefined.md](README.unrefined.md)", "Seed 11.", "| file |", "| **gptq** |",
        manifest["source"]["sha256"], *weights.values(),
    ):  # fmt: skip
        assert words in card.content, words
    ids = torch.randint(3, 97, (1, 12))
    with torch.no_grad():  # the run is evaluated as it was solved, also where other engines serve the format
        served, loaded = load_run_model(out)(ids).logits, discquant.load(out)(ids).logits
    assert torch.equal(served, loaded) and not torch.equal(served, _open(model_dir)(ids).logits)
    if name == "gptq":  # in another format it is still on that file's grid
        export(out, ["mlx"])
        assert "on the grid of `gptq` (gptq)" in (out / "mlx" / "README.md").read_text(encoding="utf-8")


def test_a_lone_gguf_file(make: Make, model_dir: Path, dataset: str, tmp_path: Path) -> None:
    """It lands in a folder under the format's name, with a card and a manifest; complete, it is not solved again."""
    pytest.importorskip("gguf")
    file, out = tmp_path / "lone-Q4_0.gguf", tmp_path / "out"
    (make("gguf", GridConfig.of_kind("q4_0")) / "model.gguf").rename(file)
    config = replace(_config(dataset), method="gptq")
    summary = RefinePipeline(file, out, model_dir, config).execute()
    names = {path.name for path in (out / "gguf").iterdir()}
    assert names == {"lone-Q4_0.gguf", "README.md", "discquant_manifest.json"}
    refined = out / "gguf" / file.name
    assert refined.stat().st_size == file.stat().st_size and summary["byte_diff"]["outside"] == 0
    manifest = _manifest(out / "gguf")
    assert manifest["refined_from"]["files"] == {file.name: sha256(file.read_bytes()).hexdigest()}
    card = (out / "gguf" / "README.md").read_text(encoding="utf-8")
    assert "`lone-Q4_0.gguf` (gguf)" in card and "README.unrefined" not in card
    said: list[str] = []
    again = RefinePipeline(file, out, model_dir, config, events=Events(message=said.append)).execute()
    assert again == json.loads(json.dumps(summary)) and any("complete already" in text for text in said)
    ids = torch.randint(3, 97, (1, 12))
    with torch.no_grad():
        assert not torch.equal(load_run_model(out)(ids).logits, _open(model_dir)(ids).logits)


def test_cards_of_files_refined_twice(make: Make, tmp_path: Path) -> None:
    """No card is lost, and an empty one is none."""
    file = make()
    for number, kept in enumerate((None, "README.unrefined.md", "README.unrefined-2.md")):
        (file / "README.md").write_text("" if kept is None else f"card {number}")
        assert keep_card(file) == kept
    assert (file / "README.unrefined.md").read_text() == "card 1"
    assert (file / "README.unrefined-2.md").read_text() == "card 2"


def test_a_worse_result_keeps_the_file(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = make("compressed-tensors"), tmp_path / "out"
    monkeypatch.setattr(RefinePipeline, "_final", lambda self, codes: {n: 7 - q for n, q in codes.items()})
    config = replace(_config(dataset), method="greedy")
    summary = RefinePipeline(file, out, model_dir, config).execute()
    found = summary["refine"]
    assert not found["improved"] and found["kl_after"] == found["kl_before"]
    assert summary["byte_diff"]["changed"] == 0
    # What is served is the file, and nothing gives it the numbers of the rejected codes.
    assert summary["method"] == "file" and found["rejected"] == "greedy"
    assert (
        summary["methods"]["file"]["kl_mean"] == found["kl_after"] < summary["methods"]["greedy"]["kl_mean"]
    )
    assert sum(row["moved"] for row in summary["layers"]) == 0, "the file holds nearest codes"
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "| greedy (rejected) |" in report and "Mean KL of file: " in report
    export(out, ["mlx"])
    card = (out / "mlx" / "README.md").read_text(encoding="utf-8")
    assert "| **file** |" in card and "| greedy (rejected) |" in card
    assert (
        "converted from `compressed-tensors` (compressed-tensors) to mlx" in card and "rounded by" not in card
    )
    card = (out / "compressed-tensors" / "README.md").read_text(encoding="utf-8")
    assert "all codes are the file's own" in card and "| **file** |" in card and found["codes_changed"] == 0
    assert all(torch.equal(q, _codes(file)[n]) for n, q in _codes(out / "compressed-tensors").items())
    kept = {layer.name: layer.q for layer in RunDirectory(out).coded_layers()}
    assert all(torch.equal(q, kept[n]) for n, q in _codes(file).items())


def _scale(model: nn.Module) -> None:
    """What AWQ and SmoothQuant do: norms over s, columns times s; rows of up over s, columns of down times s."""
    for block in model.model.layers:  # type: ignore[union-attr, operator]
        for norm, names in (
            (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
            (block.post_attention_layernorm, ("gate_proj", "up_proj")),
        ):
            s = torch.rand(64).to(torch.bfloat16) * 3 + 0.5
            norm.weight.div_(s)
            for name in names:
                owner = block.self_attn if name[0] in "qkv" else block.mlp
                getattr(owner, name).weight.mul_(s)
        s = (torch.rand(96) * 2 + 0.5).to(torch.bfloat16)
        block.mlp.up_proj.weight.div_(s.unsqueeze(1))
        block.mlp.down_proj.weight.mul_(s)


def test_scaled_files_are_refined_in_their_basis(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path
) -> None:
    file = make("gptq", GridConfig(4, 32, True, "absmax"), _scale)
    summary = RefinePipeline(file, tmp_path / "out", model_dir, _config(dataset)).execute()
    found = summary["refine"]
    assert len(found["derivation"]["folded"]) == 6
    assert found["derivation"]["worst_correlation"] > 0.9
    assert found["improved"]
    # The codes stand for scaled weights, so they must not meet the original's norms.
    with pytest.raises(CheckpointError, match="scaled weights"):
        export(tmp_path / "out", ["mlx"])
    assert not (tmp_path / "out" / "mlx").exists()


def _rotate(model: nn.Module) -> None:
    q, _ = torch.linalg.qr(torch.randn(64, 64))
    for block in model.model.layers:  # type: ignore[union-attr, operator]
        weight = block.self_attn.o_proj.weight
        weight.copy_(q.to(weight.dtype) @ weight)


def _train_on(model: nn.Module) -> None:
    model.model.norm.weight.mul_(1.01)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("change", "word"), [(_rotate, "further from the original"), (_train_on, "model.norm.weight")]
)
def test_refuses_files_of_another_model(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path, change: Callable[[nn.Module], None], word: str
) -> None:
    file = make("compressed-tensors", None, change)
    with pytest.raises(CheckpointError, match=word):
        RefinePipeline(file, tmp_path / "out", model_dir, _config(dataset)).execute()
    assert not (tmp_path / "out").exists()


def test_refuses_what_it_cannot_use(make: Make, model_dir: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an ordinary model"):
        RefinePipeline(model_dir, tmp_path / "out", model_dir, _config(dataset))
    with pytest.raises(FileNotFoundError):
        RefinePipeline(tmp_path / "nowhere", tmp_path / "out", model_dir, _config(dataset))
    with pytest.raises(ConfigError, match="nearest"):
        RefinePipeline(make(), tmp_path / "out", model_dir, replace(_config(dataset), method="rtn"))


def test_command_line(
    make: Make, model_dir: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from discquant.cli import app

    done = CliRunner().invoke(
        app,
        [
            "refine", str(make()), str(tmp_path / "out"), "--original", str(model_dir), "--dataset", dataset,
            "--nsamples", "24", "--seqlen", "32", "--iters", "8", "--batch-size", "4", "--threads", "1",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "before" in done.output and "neither neighbour" in done.output
    assert (tmp_path / "out" / "report.md").exists()


def test_row_correlations() -> None:
    weight = torch.randn(3, 8)
    weight[2] = 0
    other = weight.clone()
    other[1] *= -2
    assert torch.allclose(row_correlations(weight, other), torch.tensor([1.0, -1.0, 1.0]))
    other[2, 0] = 1
    assert float(row_correlations(weight, other)[2]) == 0.0


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_look_up_tables_refine(make: Make, model_dir: Path, dataset: str, tmp_path: Path, kind: Any) -> None:
    file = make("compressed-tensors", GridConfig.of_kind(kind))
    config = replace(_config(dataset), method="gptq")
    summary = RefinePipeline(file, tmp_path / "out", model_dir, config).execute()
    assert summary["refine"]["improved"] and summary["byte_diff"]["outside"] == 0
