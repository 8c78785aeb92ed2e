# SPDX-License-Identifier: Apache-2.0
"""Whatever a run leaves can be opened again: its codes, every exported folder and file, from where its original is."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import discquant
from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import CheckpointError, MissingModelError
from discquant.evaluation import evaluate
from discquant.formats import registry
from discquant.generation import stream
from discquant.run.directory import RunDirectory
from discquant.run.pipeline import Pipeline
from discquant.run.refine import RefinePipeline
from discquant.run.served import load_run_model

IDS = torch.arange(24).reshape(2, 12) * 5 % 97
# Formats that other engines run, each with a grid that it holds.
GRIDS = {
    "gguf": GridConfig.of_kind("q4_0"),
    "mlx": GridConfig(4, 32, True, "absmax"),
    "onnx": GridConfig(4, 32, True, "absmax"),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.fixture
def make(model_dir: Path, dataset: str, tmp_path: Path) -> Callable[..., Path]:
    """A finished run of nearest codes, from a copy of the model that a test may move."""

    def build(formats: str, grid: GridConfig, original: Path | None = None) -> Path:
        if original is None:
            original = tmp_path / "original"
            shutil.copytree(model_dir, original)
        config = QuantizeConfig(
            grid=grid, method="rtn", data=DataConfig(dataset, 8, 32), format=formats, baselines=()
        )
        Pipeline(original, tmp_path / "out", config).execute()
        return tmp_path / "out"

    return build


def open_run(path: Path, original: str | Path | None) -> nn.Module:
    return load_run_model(path, original=original)


@pytest.mark.parametrize("name", GRIDS)
def test_formats_of_other_engines(name: str, make: Callable[..., Path], tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnx")
    out = make(name, GRIDS[name])
    # The run is its codes; the folder is what the file decodes to, in the run and away from it.
    assert torch.equal(logits(discquant.load(out)), logits(load_run_model(out)))
    away = tmp_path / "away"
    shutil.copytree(out / name, away)
    for folder in (out / name, away):
        loaded = discquant.load(folder, torch.float32)
        for layer in registry.find(folder).read(folder):
            assert torch.equal(loaded.get_submodule(layer.name).weight, layer.dequantize(torch.float32))
    model = discquant.load(tmp_path / "original", torch.float32)
    norm, embedding = loaded.model.norm.weight, loaded.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    assert torch.equal(norm, model.model.norm.weight)  # type: ignore[union-attr]
    assert torch.equal(embedding, model.get_input_embeddings().weight)  # type: ignore[operator]
    run, whole = evaluate(tmp_path / "original", [out, away], "self", nsamples=2, seqlen=8, open_run=open_run)
    assert run["kl_mean"] == pytest.approx(whole["kl_mean"], rel=0.1) and run["kl_mean"] > 0
    assert 4 < whole["bits_per_weight"] < 6


def test_a_lone_file_wants_its_original(make: Callable[..., Path], tmp_path: Path) -> None:
    out = make("gguf", GRIDS["gguf"])
    inside = out / "gguf" / "model.gguf"
    assert torch.equal(logits(discquant.load(inside)), logits(discquant.load(out / "gguf")))
    (tmp_path / "alone").mkdir()
    lone = shutil.copy(inside, tmp_path / "alone" / "model.gguf")
    with pytest.raises(MissingModelError, match="discquant evaluate ORIGINAL"):
        discquant.load(lone)
    # The line that many downloads have describes no model.
    (tmp_path / "alone" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MissingModelError, match="discquant evaluate ORIGINAL"):
        discquant.load(lone)
    first, second = evaluate(tmp_path / "original", [lone, out / "gguf"], "self", nsamples=2, seqlen=8)
    assert first["kl_mean"] == second["kl_mean"] > 0


def test_an_original_that_moved(
    make: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, original, moved = make("none", GRIDS["mlx"]), tmp_path / "original", tmp_path / "moved"
    (before,) = evaluate(original, [out], "self", nsamples=2, seqlen=8, open_run=open_run)
    original.rename(moved)
    (after,) = evaluate(moved, [out], "self", nsamples=2, seqlen=8, open_run=open_run)
    assert after == before
    with pytest.raises(MissingModelError, match="discquant export"):
        discquant.load(out)
    other = _another(moved, tmp_path / "other")
    seen: list[Any] = []
    options: dict[str, Any] = {"nsamples": 2, "seqlen": 8, "open_run": open_run, "on_windows": seen.append}
    with pytest.raises(MissingModelError, match="give it as ORIGINAL"):
        evaluate(other, [out], "self", **options)
    with pytest.raises(CheckpointError, match="is not the one"):
        load_run_model(out, original=other)
    assert not seen, "the text was loaded first"
    # Where the run's own original is at hand, that is what its codes belong to, and it is said.
    shutil.copytree(moved, original)
    with caplog.at_level(logging.WARNING):
        (foreign,) = evaluate(other, [out], "self", **options)
    assert foreign["kl_mean"] > 0 and "not from" in caplog.text
    shutil.copytree(other, original, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="has changed since"):
        evaluate(original, [out], "self", **options)


def _another(model: Path, out: Path) -> Path:
    """The model with one other weight."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_refined_file(make: Callable[..., Path], dataset: str, model_dir: Path, tmp_path: Path) -> None:
    """Its run holds the file under its own name, without a configuration."""
    file = shutil.copy(make("gguf", GRIDS["gguf"]) / "gguf" / "model.gguf", tmp_path / "small.gguf")
    config = QuantizeConfig(
        method="greedy",
        solver=SolverConfig(iters=4),
        data=DataConfig(dataset, 8, 32),
        gptq_samples=4,
        baselines=(),
    )
    RefinePipeline(file, tmp_path / "refined", model_dir, config).execute()
    refined = tmp_path / "refined" / "gguf" / "small.gguf"
    assert refined.is_file()
    of_run, of_file = discquant.load(tmp_path / "refined"), discquant.load(refined)
    assert torch.equal(logits(of_run), logits(of_file))
    (row,) = evaluate(model_dir, [tmp_path / "refined"], "self", nsamples=2, seqlen=8, open_run=open_run)
    assert row["kl_mean"] > 0


def test_what_stands_alone_is_opened_where_the_original_is_gone(
    make: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An MLX folder, also of a format list with an empty part; its tokenizer serves `generate`."""
    out = make("mlx,", GRIDS["mlx"])
    codes = {layer.name: layer for layer in RunDirectory(out).coded_layers()}
    (tmp_path / "original").rename(tmp_path / "gone")
    loaded = discquant.load(out, torch.float32)
    assert torch.equal(logits(loaded), logits(discquant.load(out / "mlx", torch.float32)))
    stored = list(registry.find(out / "mlx").read(out / "mlx"))
    assert {layer.name for layer in stored} == codes.keys()
    for layer in stored:
        assert torch.equal(layer.q, codes[layer.name].q)
        assert torch.equal(loaded.get_submodule(layer.name).weight, layer.dequantize(torch.float32))
    _character_tokenizer().save_pretrained(out / "mlx")
    assert stream(out, "ab", max_new_tokens=2, temperature=0, seed=0)["tokens"] == 2


def test_pickles_beside_a_graph_are_the_model(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    expected = logits(discquant.load(folder, allow_pickle=True))
    for name in ("model.onnx", "model.gguf"):
        (folder / name).write_bytes(b"GGUF" + bytes(64))
    assert registry.quantized(folder) is None
    assert torch.equal(logits(discquant.load(folder, allow_pickle=True)), expected)


def test_a_lone_graph_among_others(
    make: Callable[..., Path], dataset: str, model_dir: Path, tmp_path: Path
) -> None:
    """What lies beside a lone file is not part of the model, and is not copied."""
    pytest.importorskip("onnx")
    folder = make("onnx", GRIDS["onnx"]) / "onnx"
    (file,) = folder.glob("*.onnx")
    shutil.copy(file, folder / "other.onnx")
    config = QuantizeConfig(method="greedy", data=DataConfig(dataset, 8, 32), gptq_samples=4, baselines=())
    RefinePipeline(file, tmp_path / "refined", model_dir, config).execute()
    written = {entry.name for entry in (tmp_path / "refined" / "onnx").iterdir()}
    assert file.name in written and "other.onnx" not in written
    assert discquant.load(tmp_path / "refined") is not None


def test_generate(
    make: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """From a folder without tokenizer in a run, from a run without a served folder; what cannot be opened says so."""
    out = make("gguf", GRIDS["gguf"])
    for path in (out, out / "gguf"):
        with pytest.raises(MissingModelError, match="tokenizer"):
            stream(path, "ab", max_new_tokens=3, temperature=0, seed=0)
    _character_tokenizer().save_pretrained(tmp_path / "original")
    for path in (out, out / "gguf", out / "gguf" / "model.gguf"):
        found = stream(path, "ab", max_new_tokens=3, temperature=0, seed=0)
        assert found["tokens"] == 3 and found["packed_bytes"] == 0
    capfd.readouterr()
    lone = shutil.copy(out / "gguf" / "model.gguf", tmp_path / "lone.gguf")
    from discquant.cli import main

    monkeypatch.setattr(sys, "argv", ["discquant", "generate", str(lone), "ab"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "config.json" in line


def _character_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
