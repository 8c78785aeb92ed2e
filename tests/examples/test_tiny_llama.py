# SPDX-License-Identifier: Apache-2.0
"""The bundled model: its shape, its files, its record, and that it answers what it never saw."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "tiny_llama"
RECORD = ROOT / "examples" / "results" / "tiny_llama_training.json"


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location(
        "train_tiny_llama", ROOT / "examples" / "train_tiny_llama.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    """The bundled model in float32, loaded without a network."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What the training run wrote down."""
    return json.loads(RECORD.read_text())  # type: ignore[no-any-return]


def test_shape(model: Any) -> None:
    """3 to 8 M weights, grouped-query attention, an untied head, linear widths that are multiples of 64."""
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 3_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 8_000_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    for linear in linears:
        assert linear.in_features % 64 == 0 and linear.out_features % 64 == 0


def test_files() -> None:
    """bfloat16 safetensors of at most 16 MB, marked as PyTorch's, every value finite."""
    from safetensors import safe_open

    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name


def test_tokenizer() -> None:
    """Loads offline, puts the start token first, splits digits, and gives text back as it was."""
    from transformers import AutoTokenizer

    from discquant.calibration.arithmetic import END, document, problems

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    ids = tokenizer("12 + 345")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("12345")
    text = document(problems("heldout", 1)[0])
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(END)
    strange = "naïve\t→ 日本 'def f(x):\n    return x'"
    assert tokenizer.decode(tokenizer(strange)["input_ids"], skip_special_tokens=True) == strange
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_answers_held_out_problems(model: Any, trainer: ModuleType) -> None:
    """At least 90 % of the first 60 of the 500 held-out problems, exactly."""
    from tokenizers import Tokenizer

    from discquant.calibration.arithmetic import problems

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert trainer.exact_match(model, tokenizer, problems("heldout", 60), batch=60) >= 0.9


def test_record_belongs_to_the_model(model: Any, record: dict[str, Any], trainer: ModuleType) -> None:
    """The record counts this model's weights, and says of 500 held-out problems at least 90 %."""
    assert record["weights"] == sum(weight.numel() for weight in model.parameters())
    assert record["file_bytes"] == (FOLDER / "model.safetensors").stat().st_size
    assert record["heldout_problems"] == 500
    assert record["heldout_exact_match"] >= 0.9
    assert record["steps"] == record["history"][-1]["step"]
    assert record["settings"] == trainer.asdict(trainer.Settings())


def test_readme_is_written_from_the_record(record: dict[str, Any], trainer: ModuleType) -> None:
    """No number of the README is typed in by hand."""
    assert (FOLDER / "README.md").read_text() == trainer.readme(record)


def test_training_never_sees_another_split(trainer: ModuleType) -> None:
    """A batch of the training holds problems, all of them of the train split by their hash."""
    from tokenizers import Tokenizer

    from discquant.calibration import arithmetic

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    windows = trainer.Windows(tokenizer, trainer.Settings())
    ids, weights = windows.batch(0)
    again, _ = windows.batch(0)
    assert torch.equal(ids, again)
    assert ids.shape == weights.shape == (16, 256)
    text = tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=False)
    questions = [part.split("\n")[0] for part in text.split("Question: ")[1:]]
    assert len(questions) >= 16
    assert {arithmetic._split_of(question) for question in questions} == {"train"}


@pytest.mark.slow
def test_interrupted_training_continues_in_the_same_bytes(trainer: ModuleType, tmp_path: Path) -> None:
    """Four steps at once and four steps in two runs end in the same file; other settings are refused."""
    small = {"batch": 2, "window": 128, "layers": 1, "hidden": 64, "intermediate": 64, "heads": 2, "kv_heads": 1,
             "warmup": 1}  # fmt: skip
    threads = torch.get_num_threads()
    try:
        for name in ("whole", "halves"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
        # The plateau alone, so that the learning rate does not depend on the number of steps.
        settings = {steps: trainer.Settings(steps=steps, decay_share=1e-9, **small) for steps in (2, 4)}
        trainer.train(settings[4], tmp_path / "whole", tmp_path / "one", 1)
        trainer.train(settings[2], tmp_path / "halves", tmp_path / "two", 1)
        record = trainer.train(settings[4], tmp_path / "halves", tmp_path / "two", 1)
        assert record["tokens"] == 4 * 2 * 128
        one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
        assert one == two
        with pytest.raises(ValueError, match="belongs to other settings"):
            trainer.train(
                trainer.Settings(steps=4, seed=1, **small), tmp_path / "halves", tmp_path / "two", 1
            )
    finally:
        torch.set_num_threads(threads)
