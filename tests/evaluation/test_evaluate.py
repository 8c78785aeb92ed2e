# SPDX-License-Identifier: Apache-2.0
"""evaluate: model folders, compressed-tensors folders and run directories in one call; rows, table, JSON, errors."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from discquant.config import GridConfig
from discquant.errors import CalibrationError, CheckpointError, ConfigError, MissingModelError
from discquant.evaluation import compare_models, evaluate
from discquant.evaluation.candidates import bits_per_weight
from discquant.evaluation.evaluate import write_json
from discquant.evaluation.table import short_names, table
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.codes import QuantizedLinear
from discquant.formats.export import export_compressed_tensors
from discquant.formats.source import open_source
from discquant.grids import place_grid

REQUIRED = (
    "path", "kl_mean", "kl_stderr", "kl_median", "kl_p99", "kl_p999", "kl_max", "top1", "perplexity",
    "bits_per_weight",
)  # fmt: skip


def layers_of(path: Path) -> list[QuantizedLinear]:
    """3-bit codes by rounding to nearest, group 32."""
    checkpoint, found = Checkpoint(path), []
    for name in checkpoint.tensors:
        if name.endswith("_proj.weight"):
            weight = checkpoint.read(name).float()
            groups = weight.view(weight.shape[0], -1, 32)
            scale = (groups.abs().amax(-1) / 3.5).bfloat16().float()
            q = (groups / scale[..., None] + 4).round().clamp(0, 7).to(torch.uint8)
            found.append(QuantizedLinear(name.removesuffix(".weight"), q.view_as(weight), scale, None, 3, 32))
    return found


@pytest.fixture(scope="module")
def packed_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    export_compressed_tensors(model_dir, out, layers_of(model_dir))
    return out


def write_nearest(model_dir: Path, out: Path, name: str, grid: GridConfig) -> Path:
    """The model in one format of the registry, rounded to nearest."""
    checkpoint, layers = Checkpoint(model_dir), []
    for key in checkpoint.tensors:
        if key.endswith("_proj.weight"):
            weight = checkpoint.read(key).float()
            laid = place_grid(weight, grid)
            layers.append(CodedLayer(key.removesuffix(".weight"), laid.nearest(weight), laid))
    registry.by_name(name).write(checkpoint, out, layers)
    return out


@pytest.fixture(scope="module")
def run_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as far as `evaluate` looks at one."""
    path = tmp_path_factory.mktemp("run")
    digest = open_source(model_dir).digest
    facts = {"discquant_run": 1, "source": str(model_dir), "identity": {"source_digest": digest}}
    (path / "config.json").write_text(json.dumps(facts))
    (path / "codes.safetensors").write_bytes(b"read by open_run")
    (path / "summary.json").write_text(json.dumps({"sizes": {"bits_per_weight": 3.5}}))
    return path


@pytest.fixture(scope="module")
def open_run(model_dir: Path) -> Callable[..., Any]:
    def opened(path: Path, original: Path | None) -> Any:
        from transformers import AutoModelForCausalLM

        assert json.loads((path / "config.json").read_text())["source"] == str(original) == str(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        with torch.no_grad():
            for layer in layers_of(model_dir):
                model.get_submodule(layer.name).weight.copy_(layer.dequantize(torch.bfloat16))
        return model

    return opened


def test_all_kinds_of_candidates(
    model_dir: Path, packed_dir: Path, run_dir: Path, open_run: Callable[..., Any]
) -> None:
    seen: list[Any] = []
    rows = evaluate(
        model_dir, [model_dir, packed_dir, run_dir], "self", nsamples=6, seqlen=24, exact_match_problems=2,
        max_new_tokens=4, open_run=open_run, on_windows=seen.append,
    )  # fmt: skip
    assert [row["path"] for row in rows] == [str(model_dir), str(packed_dir), str(run_dir)]
    for row in rows:
        assert set(REQUIRED) <= row.keys()
        assert row["windows_digest"] == seen[0].digest
        assert row["nonfinite"] == 0
        assert 0 <= row["exact_match"] <= 1
    same, packed, run = rows
    assert (same["kl_mean"], same["top1"], same["bits_per_weight"]) == (0.0, 1.0, 16.0)
    assert packed["kl_mean"] > 0
    # The same codes from the packed file and from the run directory are the same weights, to the bit.
    assert all(packed[key] == run[key] for key in REQUIRED[1:-1])
    # 3 bits in whole 32-bit words per row (64 and 128 columns: exact), and one 16-bit scale per 32 weights.
    assert packed["bits_per_weight"] == run["bits_per_weight"] == 3.5


def test_equals_compare_models_in_float32(model_dir: Path, packed_dir: Path) -> None:
    from discquant.calibration import load_windows
    from discquant.formats.load import load_quantized

    (row,) = evaluate(model_dir, [packed_dir], "self", nsamples=4, seqlen=16, seed=9)
    original = open_source(model_dir).model.float()
    windows = load_windows("self", None, nsamples=4, seqlen=16, seed=9, model=original)
    expected = compare_models(original, {"a": load_quantized(packed_dir).float()}, windows)["a"].to_dict()
    assert {key: row[key] for key in expected} == expected


def test_one_at_a_time_gives_the_same(
    model_dir: Path, packed_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module = sys.modules["discquant.evaluation.evaluate"]
    together = evaluate(model_dir, [packed_dir, model_dir], "self", nsamples=3, seqlen=16)
    monkeypatch.setattr(module, "_fits_together", lambda original, count: False)
    assert evaluate(model_dir, [packed_dir, model_dir], "self", nsamples=3, seqlen=16) == together


def test_table_and_json(tmp_path: Path) -> None:
    from rich.console import Console

    row: dict[str, Any] = dict.fromkeys(REQUIRED, 0.125) | {
        "path": "some/where/a", "tokens": 1234, "dataset": "text.txt", "perplexity_original": 7.5, "kl_stderr": None,
        "nonfinite": 0, "exact_match": None,
    }  # fmt: skip
    broken = row | {"path": "else/where/a", "kl_mean": None, "nonfinite": 3}
    out = io.StringIO()
    Console(file=out, width=80).print(table([row]))
    assert "non-finite" not in out.getvalue()
    out = io.StringIO()
    Console(file=out, width=80).print(table([row, broken], title="Held out"))
    shown = out.getvalue()
    for words in (
        "Held out",
        "some/where/a",
        "else/where/a",
        "KL mean",
        "12.50%",
        "7.5",
        "1,234",
        "text.txt",
    ):
        assert words in shown, words
    assert "exact answers" not in shown
    line = next(line for line in shown.splitlines() if "non-finite" in line)
    assert [cell.strip() for cell in line.split("│")[3:5]] == ["0", "3"]
    write_json([row, broken], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [row, broken]
    with pytest.raises(ValueError, match="Out of range float"):
        write_json([row | {"kl_mean": math.nan}], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [row, broken]


@pytest.mark.parametrize("count", [1, 3, 4, 9])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_table_is_whole_at_any_width(count: int, width: int) -> None:
    """Every heading, every value and, across its lines, every name; nothing is cut to fit."""
    from rich.console import Console

    row: dict[str, Any] = dict.fromkeys(REQUIRED, 0.012345) | {
        "tokens": 12345, "dataset": "text.txt", "perplexity_original": 7.5, "perplexity_ratio": 1.01,
        "exact_match": 0.5, "exact_match_original": 0.75, "nonfinite": 3,
    }  # fmt: skip
    names = [f"run{place}-compressed-tensors" for place in range(count)]
    out = io.StringIO()
    Console(file=out, width=width).print(table([row | {"path": name} for name in names]))
    shown = out.getvalue()
    assert "…" not in shown and all(len(line) <= width for line in shown.splitlines())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    for heading in (
        "KL mean", "standard error", "top-1 agreement", "ratio to the original", "bits per weight",
        "non-finite positions",
    ):  # fmt: skip
        found = [values for head, *values in cells if head == heading]
        assert sum(len(values) - 1 for values in found) == count, heading
        assert all(value for values in found for value in values[1:]), heading
    for place in range(count):
        assert f"run{place}" in shown
    assert shown.count("text.txt") == 1


def test_short_names() -> None:
    assert short_names(["a/x", "b/x", "c/y"]) == ["a/x", "b/x", "y"]
    assert short_names(["a/x", "a/x", "x"]) == ["a/x (1)", "a/x (2)", "x"]


def test_bits_of_runs_and_pickles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"discquant_run": 1}')
    assert bits_per_weight(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert bits_per_weight(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gptq", "uniform"), ("autoround", "uniform"), ("awq", "uniform"), ("compressed-tensors", "nvfp4"),
        ("compressed-tensors", "mxfp4"),
    ],
)  # fmt: skip
def test_bits_of_every_safetensors_format(model_dir: Path, tmp_path: Path, name: str, kind: str) -> None:
    """What the file keeps for the weights of its quantized layers, over their number; the same from `evaluate`."""
    grid = GridConfig(4, 32, True, "absmax") if kind == "uniform" else GridConfig.of_kind(kind)
    out = write_nearest(model_dir, tmp_path / "out", name, grid)
    layers = [layer.name for layer in layers_of(model_dir)]
    stored = sum(
        info.num_bytes
        for key, info in Checkpoint(out).tensors.items()
        # A shape, the order of the columns and a global scale grow with no weight.
        if key.rpartition(".")[0] in layers and not key.endswith(("shape", "g_idx", "global_scale"))
    )
    weights = sum(layer.q.numel() for layer in layers_of(model_dir))
    assert bits_per_weight(out) == pytest.approx(8 * stored / weights)
    assert 4 < 8 * stored / weights < 6
    (row,) = evaluate(model_dir, [out], "self", nsamples=2, seqlen=8)
    assert row["bits_per_weight"] == bits_per_weight(out)


def test_damage_shows_before_anything_is_measured(model_dir: Path, tmp_path: Path) -> None:
    out = write_nearest(model_dir, tmp_path / "out", "gptq", GridConfig(4, 32, True, "absmax"))
    tensors = {key: value for key, value in Checkpoint(out).iterate() if not key.endswith("k_proj.scales")}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    seen: list[Any] = []
    with pytest.raises(CheckpointError, match="scales is missing"):
        evaluate(model_dir, [out], "self", nsamples=2, seqlen=8, on_windows=seen.append)
    assert not seen
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no quantized format that is read"):
        evaluate(model_dir, [out], "self", nsamples=2, seqlen=8, on_windows=seen.append)
    assert not seen


def test_rejects(model_dir: Path, packed_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], words: str, *candidates: Path, **options: Any) -> None:
        with pytest.raises(kind) as raised:
            evaluate(options.pop("original", model_dir), candidates, "self", nsamples=2, seqlen=8, **options)
        assert words in str(raised.value)

    refused(ValueError, "at least one candidate")
    refused(MissingModelError, "is no model", tmp_path / "gone")
    refused(MissingModelError, "has no config.json", tmp_path)
    refused(CheckpointError, "quantized already", model_dir, original=packed_dir)
    refused(ValueError, "open_run must be given", run_dir)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run_dir / "config.json", unfinished)
    refused(MissingModelError, "has not finished", unfinished)
    truncated = tmp_path / "truncated"
    shutil.copytree(packed_dir, truncated)
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(CheckpointError, "truncated", truncated)
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    for left in bare.glob("tokenizer*"):
        left.unlink()
    refused(CalibrationError, "has no tokenizer", model_dir, original=bare, exact_match_problems=1)
    words = {"nsamples": 0, "seqlen": 1, "batch_size": 0, "exact_match_problems": -3}
    for option, given in words.items():
        seen: list[Any] = []
        with pytest.raises(
            ConfigError, match=f"--{option.removesuffix('_problems').replace('_', '-')} must be at"
        ):
            evaluate(model_dir, [packed_dir], "self", on_windows=seen.append, **{option: given})
    with pytest.raises(ConfigError, match="evaluate: --seqlen must be at most the model's 512 positions"):
        evaluate(model_dir, [packed_dir], "self", seqlen=100_000, on_windows=seen.append)


def test_another_vocabulary_is_refused(model_dir: Path, tmp_path: Path, model: Any) -> None:
    """By config.json before a weight is read; models in memory before any of them runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 40}))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=f"vocabulary of 40 tokens and {model_dir} one of"):
        evaluate(model_dir, [tmp_path / "small"], "self", nsamples=2, seqlen=8)
    from discquant.calibration import Windows

    with pytest.raises(ValueError, match="small must know the windows' tokens, got the token id 50"):
        compare_models(model, {"small": small}, Windows.make(torch.full((1, 8), 50)))
