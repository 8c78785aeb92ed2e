# SPDX-License-Identifier: Apache-2.0
"""The card parses as the hub's own reader wants it, and every number on it is the manifest's or the summary's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from discquant.formats import read_manifest
from discquant.formats.card import hub_name, write_card
from discquant.formats.engines import ROWS, engine_rows, problems
from discquant.formats.scheme import Scheme

SUMMARY = {
    "method": "discquant",
    "held_out": {"source": "some text", "tokens": 1234},
    "methods": {
        "rtn": {"kl_mean": 0.75, "kl_stderr": 0.01, "kl_median": 0.5, "kl_p999": 3.0, "kl_max": 4.0, "top1": 0.6,
                "perplexity_ratio": 1.5},
        "discquant": {"kl_mean": 0.125, "kl_stderr": 0.002, "kl_median": 0.1, "kl_p999": 1.0, "kl_max": None,
                      "top1": 0.9, "perplexity_ratio": 1.05},
    },
}  # fmt: skip


def test_card(exported: Path, llama_dir: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    source = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    source.mkdir(parents=True)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# original\n")
    write_card(folder, source, SUMMARY)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["discquant", "quantized", "compressed-tensors", "3-bit"]
    manifest = read_manifest(folder)
    text = card.content
    assert "| **discquant** | 0.12500 | 0.00200 | 0.10000 | 1.0000 | n/a | 0.9000 | 1.0500 |" in text
    assert "| rtn | 0.75000 |" in text
    assert manifest["source"]["sha256"] in text
    for name, row in manifest["shards"].items():
        assert f"- {name}: `{row['sha256']}`" in text
    assert f"{manifest['bits_per_weight']:.3f} bits per quantized weight" in text
    assert "| vLLM | yes | Humming (#46389; MoE #48918) |" in text
    assert "Needs compressed-tensors >= 0.18.0." in text
    assert "Seed 5." in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("name", "kind", "library", "tags"),
    [
        ("gguf", "q4_k", "gguf", ["gguf", "3-bit", "q4_k"]),
        ("onnx", "int", "onnx", ["onnx", "3-bit"]),
        ("mlx", "affine", "mlx", ["mlx", "3-bit"]),
        ("awq", "int", "transformers", ["awq", "3-bit"]),
    ],
)
def test_library_and_tags(
    exported: Path, tmp_path: Path, name: str, kind: str, library: str, tags: list[str]
) -> None:
    from huggingface_hub import ModelCard

    shutil.copytree(exported, tmp_path / "out")
    manifest = read_manifest(exported)
    manifest["format"] = name
    for row in manifest["layers"].values():
        row["kind"] = kind
    (tmp_path / "out" / "discquant_manifest.json").write_text(json.dumps(manifest))
    write_card(tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.library_name == library
    assert data.tags == ["discquant", "quantized", *tags]


def test_card_says_when_nothing_was_measured(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert "was not measured" in text
    assert "| method |" not in text


def test_a_broken_card_of_the_original_costs_only_the_licence(exported: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(exported, folder)
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    write_card(folder, source)
    assert "license" not in (folder / "README.md").read_text().split("---")[1]


def test_hub_name(tmp_path: Path) -> None:
    assert hub_name(tmp_path / "models--owner--a-name" / "snapshots" / "abc") == "owner/a-name"
    assert hub_name(tmp_path / "plain") is None


def test_engines_give_the_worst_answer() -> None:
    good, bad = Scheme(3, 64, True), Scheme(3, 64, False)
    rows = {row["engine"]: row["verdict"] for row in engine_rows("compressed-tensors", {"a": good})}
    assert rows["vLLM"] == "yes"
    rows = {row["engine"]: row["verdict"] for row in engine_rows("compressed-tensors", {"a": good, "b": bad})}
    assert rows["vLLM"] == "no"
    assert engine_rows("mlx", {"a": Scheme(4, 64, False, "affine")})[0]["engine"] == "MLX"
    # Widths that nobody looked up are never a yes.
    for row in engine_rows("gptq", {"a": Scheme(2, 64, True)}):
        assert row["verdict"] == "unclear", row


@pytest.mark.parametrize(
    ("engine", "format_name", "bits", "symmetric", "verdict", "note"),
    [
        # Cells of the engine matrix in formats.md section 11, each with the condition it names.
        ("vLLM", "compressed-tensors", 4, True, "yes", "Machete"),
        ("vLLM", "compressed-tensors", 4, False, "yes", "Marlin"),
        ("vLLM", "compressed-tensors", 3, True, "yes", "Humming"),
        ("vLLM", "compressed-tensors", 3, False, "no", "#46528"),
        ("vLLM", "gptq", 4, True, "yes", "no act-order"),
        ("vLLM", "gptq", 4, False, "no", "#45051"),
        ("vLLM", "gptq", 3, True, "yes", "--quantization humming"),
        ("vLLM", "gptq", 3, False, "yes", "with zero points"),
        ("vLLM", "gptq-v2", 4, True, "unclear", "v1"),
        ("vLLM", "autoround", 4, False, "yes", "AWQ layout"),
        ("vLLM", "autoround", 3, True, "yes", "#52890"),
        ("vLLM", "autoround", 3, False, "unclear", ""),
        ("SGLang", "gptq", 4, False, "unclear", "compressed-tensors"),
        ("SGLang", "gptq", 3, True, "yes", "float16"),
        ("SGLang", "compressed-tensors", 3, True, "unclear", "#23754"),
        # What was run on the CPU (environment.md): 3 bits need the library's dense layout.
        ("transformers", "compressed-tensors", 3, True, "yes", "0.18"),
        ("transformers", "compressed-tensors", 4, False, "yes", "5.22.2"),
        ("transformers", "compressed-tensors", 3, False, "unclear", "not looked up"),
        ("transformers", "gptq-v2", 3, True, "yes", "gptqmodel"),
        ("transformers", "autoround", 3, True, "yes", "accuracy trouble"),
        ("ONNX Runtime", "onnx", 3, True, "yes", "stored as 4 bits"),
        ("ONNX Runtime", "onnx", 6, True, "yes", "stored as 8 bits"),
        ("TGI", "gptq", 4, True, "unclear", "from memory"),
    ],
)  # fmt: skip
def test_engine_matrix(
    engine: str, format_name: str, bits: int, symmetric: bool, verdict: str, note: str
) -> None:
    rows = {row["engine"]: row for row in engine_rows(format_name, {"a": Scheme(bits, 64, symmetric)})}
    assert rows[engine]["verdict"] == verdict and note in rows[engine]["note"], rows[engine]


def test_what_was_tried_is_a_yes() -> None:
    for kind, size in (("nvfp4", 16), ("mxfp4", 32)):
        rows = {
            row["engine"]: row
            for row in engine_rows("compressed-tensors", {"a": Scheme(4, size, True, kind)})
        }
        assert rows["transformers"]["verdict"] == "yes" and "2026-11-30" in rows["transformers"]["note"]


def test_no_two_engine_rows_answer_one_question() -> None:
    for place, row in enumerate(ROWS):
        for other in ROWS[place + 1 :]:
            same = row.engine == other.engine and set(row.formats) & set(other.formats)
            same = same and set(row.kinds) & set(other.kinds)
            widths = None in (row.bits, other.bits) or set(row.bits or ()) & set(other.bits or ())
            signs = None in (row.symmetric, other.symmetric) or row.symmetric == other.symmetric
            assert not (same and widths and signs), (row, other)


def test_problems() -> None:
    schemes = {"x.gate_proj": Scheme(3, 64, True), "x.up_proj": Scheme(4, 64, True)}
    shapes = {"x.gate_proj": (48, 64), "x.up_proj": (64, 64)}
    found = problems("gptq", schemes, shapes)
    assert found == [
        "x.gate_proj is 48 x 64: some engines want multiples of 32",
        "x: engines fuse gate_proj, up_proj, which do not share one grid",
    ]
    (found_size,) = problems("gptq", {"a": Scheme(4, 24, True)}, {"a": (32, 96)})
    assert found_size.startswith("group size 24")
    # By the table: where every engine of a format serves both, nothing is told.
    three, shape = {"a": Scheme(3, 64, False)}, {"a": (64, 64)}
    assert [problems(name, three, shape) for name in ("onnx", "mlx", "gguf")] == [[], [], []]
    assert problems("compressed-tensors", three, shape) == [
        "3 bits asymmetric: not known to be served by vLLM or transformers; symmetric is"
    ]
    assert problems("gptq", three, shape) == [
        "3 bits asymmetric: not known to be served by SGLang; symmetric is"
    ]
    assert json.dumps(found)


def test_engines_join_the_conditions_of_mixed_files() -> None:
    three, four = Scheme(3, 64, True), Scheme(4, 64, True)
    rows = {row["engine"]: row for row in engine_rows("compressed-tensors", {"a": four, "b": three})}
    assert rows["vLLM"]["verdict"] == "yes"
    assert "Machete" in rows["vLLM"]["note"] and "Humming" in rows["vLLM"]["note"]
    for schemes in ({"a": four, "b": Scheme(2, 64, True)}, {"b": Scheme(2, 64, True), "a": four}):
        rows = {row["engine"]: row for row in engine_rows("gptq", schemes)}
        assert rows["TGI"]["verdict"] == "unclear" and "int2 group 64 symmetric" in rows["TGI"]["note"]
    rows = {
        row["engine"]: row
        for row in engine_rows("compressed-tensors", {"a": four, "b": Scheme(4, 16, True, "nvfp4")})
    }
    assert rows["SGLang"]["verdict"] == "unclear" and "nvfp4" in rows["SGLang"]["note"]


def of_transformers(format_name: str, schemes: dict[str, Scheme]) -> tuple[str, str]:
    rows = {row["engine"]: row for row in engine_rows(format_name, schemes)}
    return rows["transformers"]["verdict"], rows["transformers"]["note"]


def test_what_transformers_reads_of_experts() -> None:
    three, four, odd = Scheme(3, 64, True), Scheme(4, 64, True), Scheme(4, 64, False)
    gate, other, w1 = (
        f"m.{place}.experts.0.{name}" for place, name in ((0, "gate_proj"), (1, "up_proj"), (0, "w1"))
    )
    packed = "compressed-tensors"
    assert of_transformers(packed, {"m.q": three, gate: four, other: four})[0] == "yes"
    for schemes, reason in (
        ({gate: odd}, "asymmetric experts"),
        ({gate: Scheme(4, 16, True, "nvfp4")}, "global scales"),
        ({gate: four, other: three}, "one grid"),
    ):
        verdict, note = of_transformers(packed, schemes)
        assert verdict == "no" and reason in note
    for name, scheme in (("gptq", four), ("gptq-v2", four), ("awq", odd)):
        verdict, note = of_transformers(name, {"m.q": scheme, gate: scheme})
        assert verdict == "no" and "random" in note and "(GPTQModel.load) reads them" in note
        assert f"does not find {w1}" in of_transformers(name, {w1: scheme})[1]
        assert of_transformers(name, {"m.q": scheme})[0] == "yes"
    assert of_transformers("autoround", {gate: four, other: four})[0] == "yes"
    verdict, note = of_transformers("autoround", {gate: four, w1: four})
    assert verdict == "no" and w1 in note


def test_problems_of_what_runs_as_one() -> None:
    """Any member of a set is looked at, what is not quantized too, and experts by their layer."""
    three, four = Scheme(3, 64, True), Scheme(4, 64, True)

    def told(schemes: dict[str, Scheme], plain: tuple[str, ...] = (), name: str = "gptq") -> list[str]:
        return problems(name, schemes, dict.fromkeys(schemes, (64, 64)), plain)

    fused = ["x: engines fuse q_proj, k_proj, v_proj, which do not share one grid"]
    assert told({"x.k_proj": four, "x.v_proj": four}, ("x.q_proj", "lm_head")) == fused
    assert told({"x.k_proj": four, "x.v_proj": three}) == fused
    assert told({"x.k_proj": four, "x.v_proj": four, "x.q_proj": four}, ("y.q_proj",)) == []
    assert told({"x.up_proj": four, "x.kv_a_proj_with_mqa": four}) == []  # models without the others
    for name in ("gguf", "onnx", "mlx"):
        assert told({"x.k_proj": four, "x.v_proj": three}, ("x.q_proj",), name) == []
    experts = {f"x.experts.{number}.{name}": four for number in range(2) for name in ("w1", "w2", "w3")}
    assert told(experts) == []
    (found,) = told({**experts, "x.experts.1.w2": three, "y.experts.0.w1": three})
    assert found.startswith("x.experts: engines run all of them on one grid")
    (found,) = told(experts, ("x.experts.3.w2",))
    assert found.startswith("x.experts: ")


def test_many_grids_of_single_layers_stay_in_the_manifest(exported: Path, tmp_path: Path) -> None:
    """As `discquant allocate` makes them; a few are shown."""
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    path = folder / "discquant_manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for count, shown in ((8, True), (9, False)):
        rules = [{"modules": f"layer.{number}", "grid": {"bits": 4}} for number in range(count)]
        manifest["recipe"]["layers"] = rules
        path.write_text(json.dumps(manifest), encoding="utf-8")
        write_card(folder, None, None)
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert ('"layer.7"' in text) == shown
        assert ("9 rules: discquant_manifest.json has them" in text) != shown
