# SPDX-License-Identifier: Apache-2.0
"""open_source: a sound model opens; each kind of bad input gets its own error before the model is built."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import (
    CalibrationError,
    CheckpointError,
    DiskSpaceError,
    MissingModelError,
    NonFiniteError,
    OutputExistsError,
)
from discquant.formats import source
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.output import check_space
from discquant.formats.source import check_output_dir, digest_and_check, open_source


@pytest.fixture(scope="module")
def plain_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without the stand-in of a tokenizer file."""
    path = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(llama_dir, path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    return path


@pytest.fixture
def folder(plain_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(plain_dir, tmp_path / "model")
    return tmp_path / "model"


def make_tokenizer(path: Path, size: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(path)


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_opens(plain_dir: Path) -> None:
    opened = open_source(plain_dir)
    assert opened.tokenizer is None
    assert opened.model.dtype == torch.bfloat16
    assert not opened.model.training
    assert opened.config["model_type"] == "llama"
    stored = load_file(plain_dir / "model.safetensors")
    state = opened.model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert open_source(str(plain_dir), dtype=torch.float32).model.dtype == torch.float32


def test_opens_with_tokenizer(folder: Path) -> None:
    make_tokenizer(folder, 96)
    assert len(open_source(folder).tokenizer) == 96


def test_digest(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert digest_and_check(checkpoint) == checkpoint.sha256()
    before = open_source(folder).digest
    assert open_source(folder).digest == before
    edit(folder / "config.json", rope_theta=123.0)
    changed_config = open_source(folder).digest
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert len({before, changed_config, open_source(folder).digest}) == 3


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def nameless_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def unknown_kind(folder: Path) -> None:
    edit(folder / "config.json", model_type="no-such-kind", architectures=["NoSuchModel"])


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def corrupt(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"\0" * 40 + file.read_bytes()[48:])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {
        "weight_map": dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        | {"x": "b.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil(value: float) -> Callable[[Path], None]:
    def spoiled(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][7, 9] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoiled


def lost_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def wrong_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=128)


def own_code(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('the code of the model ran')\n")


def own_tokenizer_code(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}})
    )


def quantized(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "compressed-tensors"})


def large_tokenizer(folder: Path) -> None:
    make_tokenizer(folder, 97)


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


BAD = [
    (no_config, MissingModelError, "has no config.json"),
    (no_weights, MissingModelError, "is no model"),
    (broken_config, CheckpointError, "not valid JSON"),
    (nameless_config, MissingModelError, "names no model_type"),
    (unknown_kind, CheckpointError, "does not load as a causal language model"),
    (truncated, CheckpointError, "truncated"),
    (corrupt, CheckpointError, "corrupt"),
    (empty, CheckpointError, "truncated"),
    (lost_shard, MissingModelError, "b.safetensors"),
    (spoil(float("nan")), NonFiniteError, "model.layers.1.mlp.up_proj.weight holds 1 values"),
    (spoil(float("-inf")), NonFiniteError, "model.layers.1.mlp.up_proj.weight holds 1 values"),
    (
        lost_tensor,
        CheckpointError,
        "lacks 1 weights of a LlamaForCausalLM, model.layers.1.mlp.up_proj.weight",
    ),
    (wrong_shape, CheckpointError, "model.layers.0.mlp.down_proj.weight has the shape [64, 192]"),
    (own_code, CheckpointError, "wants to run code of its own"),
    (own_tokenizer_code, CheckpointError, "wants to run code of its own"),
    (quantized, CheckpointError, "is quantized already"),
    (large_tokenizer, CalibrationError, "it has 97 tokens, the embedding 96 rows"),
    (broken_tokenizer, CheckpointError, "does not load"),
]
# What the library itself must find; everything else is found without building a model.
BY_LIBRARY = (unknown_kind, lost_tensor, wrong_shape)


@pytest.mark.parametrize("spoiler,kind,words", BAD, ids=[row[0].__name__ for row in BAD])
def test_refuses(
    spoiler: Callable[[Path], None],
    kind: type[Exception],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def built(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was built")

    if spoiler not in BY_LIBRARY:
        monkeypatch.setattr(source, "_build", built)
    spoiler(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind) as raised:
        open_source(folder)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value), "one sentence"
    assert sorted(folder.rglob("*")) == before, "nothing may be written"


@pytest.mark.parametrize("path", ["no such folder", "no-such-owner/no-such-model", "./gone", "gone"])
def test_refuses_paths(path: str) -> None:
    with pytest.raises(MissingModelError, match="is no model"):
        open_source(path)


def test_refuses_a_file(plain_dir: Path) -> None:
    with pytest.raises(MissingModelError, match="is a file"):
        open_source(plain_dir / "config.json")


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


def test_pickles(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    expected = open_source(folder).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        open_source(folder)
    opened = open_source(folder, allow_pickle=True)
    state = opened.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    tensors["model.norm.weight"][0] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        open_source(folder, allow_pickle=True)
    # Even where pickles are allowed, no code of theirs runs.
    trace = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb(trace)}, protocol=2))
    with pytest.raises(CheckpointError, match="it was not loaded"):
        open_source(folder, allow_pickle=True)
    torch.save({"a": Bomb(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="it was not loaded"):
        open_source(folder, allow_pickle=True)
    assert not trace.exists()


def test_pickles_beside_safetensors_are_left_alone(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb(trace)}, protocol=2))
    open_source(folder, allow_pickle=True)
    assert not trace.exists()


def test_output_dir(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert check_output_dir(new, False) == new
    assert not (tmp_path / "a").exists(), "nothing is written"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.tmp").write_text("{")  # left by a process that was killed at once
    for resume in (False, True):
        assert check_output_dir(folder, resume) == folder
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for resume in (False, True):
        with pytest.raises(OutputExistsError, match="holds no run"):
            check_output_dir(folder, resume)
    (folder / "config.json").write_text('{"discquant_run": 1}')
    assert check_output_dir(folder, True) == folder
    with pytest.raises(OutputExistsError, match="holds a run; give another folder, or --resume"):
        check_output_dir(folder, False)
    with pytest.raises(OutputExistsError, match="is a file"):
        check_output_dir(folder / "config.json", True)


def test_output_dir_below_a_file_or_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        check_output_dir(tmp_path / "file" / "out", False)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(PermissionError, match="no permission"):
        check_output_dir(tmp_path / "out", False)


def test_disk_space(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "folder", 1)
    with pytest.raises(DiskSpaceError, match="GB free"):
        check_space(tmp_path / "new" / "folder", 10**18)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_fetched_from_the_hub(
    trusted: bool, plain_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's own code only where it is trusted; no weights twice."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = (
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "qwen.tiktoken",
        "tokenizer.model", "additional_chat_templates/tool_use.jinja", "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors", "original/model.safetensors", "modeling_own.py", "pytorch_model.bin",
    )  # fmt: skip
    fetched: list[list[str]] = []

    def fetch(name: str, **patterns: Any) -> str:
        assert name == "owner/name"
        fetched.append(list(filter_repo_objects(there, **patterns)))
        return str(plain_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    # Where there are safetensors, pickles stay away even if they are allowed.
    open_source("owner/name", trust_remote_code=trusted, allow_pickle=trusted)
    assert fetched == [[*there[:6], *(["modeling_own.py"] if trusted else [])]]


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_pickles_from_the_hub(
    allowed: bool, pickled: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched where they are allowed and there is nothing else; not what training left beside them."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    expected = open_source(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "ran")}, protocol=2))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    calls = 0

    def fetch(name: str, **patterns: Any) -> str:
        nonlocal calls
        calls += 1
        (tmp_path / "cache").mkdir(exist_ok=True)
        for file in filter_repo_objects([file.name for file in folder.iterdir()], **patterns):
            shutil.copy(folder / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    if not allowed:
        with pytest.raises(MissingModelError, match=r"owner/name has no safetensors .*\(--allow-pickle\)"):
            open_source("owner/name")
    elif not pickled:
        with pytest.raises(
            MissingModelError, match=r"neither safetensors nor pytorch_model\*\.bin on the hub"
        ):
            open_source("owner/name", allow_pickle=True)
    else:
        state = open_source("owner/name", allow_pickle=True).model.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert calls == 1 + allowed and not (tmp_path / "cache" / "training_args.bin").exists()


def test_a_folder_with_a_gguf_file_alone_is_quantized(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match="is quantized already; give the original model"):
        open_source(folder)
