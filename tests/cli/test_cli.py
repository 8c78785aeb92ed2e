# SPDX-License-Identifier: Apache-2.0
"""The command line: help that helps, and one clear sentence for every bad input, before anything is written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from discquant.errors import ConfigError
from discquant.formats import registry

Run = Callable[..., tuple[int, str, str]]


def _refused(result: tuple[int, str, str], out: Path, *words: str) -> None:
    status, _, error = result
    assert status == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in lines[0], lines[0]
    assert not out.exists() or not any(out.iterdir()), "something was written"


@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate", "env"])
def test_help(command: str, run: Run) -> None:
    status, output, _ = run(command, "--help")
    assert status == 0
    assert "Usage" in output


def test_env_is_json(run: Run) -> None:
    status, output, _ = run("env")
    assert status == 0
    assert {"versions", "cpu", "gpus"} <= set(json.loads(output))


def test_no_model(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _refused(run("quantize", str(tmp_path / "nothing"), str(out)), out, "no model")
    (tmp_path / "empty").mkdir()
    _refused(run("quantize", str(tmp_path / "empty"), str(out)), out, "config.json")


def _truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def _nan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def _pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def _own_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, ("model.safetensors",)),
        (_corrupt, ("model.safetensors",)),
        (_nan, ("model.layers.0.mlp.up_proj.weight",)),
        (_pickle, ("pytorch_model.bin",)),
        (_own_code, ("auto_map",)),
    ],
    ids=["truncated", "corrupt", "nan", "pickle", "own-code"],
)
def test_damaged_models(
    damage: Callable[[Path], None], words: tuple[str, ...], run: Run, model: Path, tokens: str, tmp_path: Path
) -> None:
    damage(model)
    out = tmp_path / "out"
    _refused(run("quantize", str(model), str(out), "--dataset", tokens, "--seqlen", "32"), out, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "1"), ("bits", "2 to 8")),
        (("--bits", "9"), ("bits", "2 to 8")),
        (("--group-size", "33"), ("group_size", "33")),
        (("--group-size", "40"), ("proj", "40")),
        (("--method", "magic"), ("method", "magic")),
        (("--format", "gguf-ish"), ("format",)),
        (("--preset", "best"), ("preset", "best")),
        (("--optimizer", "adam"), ("optimizer", "adam")),
        (("--ignore", "no_such_module"), ("no_such_module", "q_proj")),
        (("--dataset", ""), ("dataset must be self, a file of text", "got ''")),
        (("--iters", "0"), ("iters",)),
        (("--lr", "-1"), ("lr",)),
        (("--lr", "10"), ("lr must be at most 1", "[0, 1]", "got 10")),
        (("--baselines", "rtn,best"), ("baselines", "best")),
        (("--seed", "-1"), ("seed",)),
        (("--seqlen", "65"), ("seqlen", "64 positions", "65")),
        (("--threads", "100000"), ("--threads must be from 1 to 1024",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_options(
    options: tuple[str, ...], words: tuple[str, ...], run: Run, model: Path, tokens: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = ("quantize", str(model), str(out), "--dataset", tokens, "--seqlen", "32", *options)
    _refused(run(*line), out, *words)


def test_bad_calibration(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("a few words\n", encoding="utf-8")
    _refused(
        run("quantize", str(model), str(out), "--seqlen", "32", "--dataset", str(text)), out, "tokenizer"
    )
    _refused(
        run("quantize", str(model), str(out), "--seqlen", "32", "--dataset", str(tmp_path / "no.txt")),
        out,
        "no.txt",
    )
    _refused(
        run(
            "quantize", str(model), str(out), "--seqlen", "32", "--dataset", tokens.replace(":ids", ":other")
        ),
        out,
        "other",
    )
    save_file({"ids": torch.full((4, 32), 97).int()}, tmp_path / "big.safetensors")
    _refused(
        run(
            "quantize",
            str(model),
            str(out),
            "--seqlen",
            "32",
            "--dataset",
            f"{tmp_path / 'big.safetensors'}:ids",
        ),
        out,
        "97",
    )
    save_file({"ids": torch.full((1, 32), 5).int()}, tmp_path / "one.safetensors")
    _refused(
        run(
            "quantize",
            str(model),
            str(out),
            "--seqlen",
            "32",
            "--dataset",
            f"{tmp_path / 'one.safetensors'}:ids",
        ),
        out,
        "1 window",
    )


def test_token_ids_need_no_key_and_no_tokenizer(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    """A file with one tensor needs no key; brackets in a path are no markup."""
    out = tmp_path / "z[" / "x]"
    (tmp_path / "z[").mkdir()
    status, shown, error = run(
        "quantize", str(model), str(out), "--method", "rtn", "--dataset", tokens.removesuffix(":ids"), "--seqlen", "32",
        "--baselines", "none",
    )  # fmt: skip
    assert status == 0, error
    assert str(out / "report.md") in shown.replace("\n", "")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["identity"]["data_digest"]


def test_pickled_weights(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    """Refused with the option that allows them; with it, formats are refused with what remains."""
    _pickle(model)
    out = tmp_path / "out"
    line = ["quantize", str(model), str(out), "--method", "rtn", "--baselines", "none", "--seqlen", "32"]
    line += ["--dataset", tokens]
    _refused(run(*line), out, "pytorch_model.bin", "--allow-pickle")
    for formats in ("gptq", "gguf"):
        _refused(run(*line, "--allow-pickle", "--format", formats), out, "--format none", "save_pretrained")
    status, _, error = run(*line, "--allow-pickle", "--format", "none")
    assert status == 0, error
    status, _, error = run("generate", str(out), "hello")
    assert status == 2 and "--allow-pickle" in error
    status, _, error = run("generate", str(out), "hello", "--allow-pickle")
    assert status == 2 and "no tokenizer" in error, "the run itself opens"


def test_ranks_without_torchrun(
    run: Run, model: Path, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"
    _refused(run("quantize", str(model), str(out), "--dataset", tokens), out, "RANK", "torchrun")


def test_occupied_output(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    status, _, error = run("quantize", str(model), str(out), "--dataset", tokens)
    assert status == 2
    assert "error: " in error
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_no_disk_space(
    run: Run, model: Path, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    out = tmp_path / "out"
    _refused(run("quantize", str(model), str(out), "--dataset", tokens, "--seqlen", "32"), out, "free")


def test_bad_candidates(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    status, _, error = run(
        "evaluate", str(model), str(tmp_path / "none"), "--dataset", tokens, "--seqlen", "32"
    )
    assert status == 2
    assert "none" in error
    status, _, error = run("generate", str(tmp_path / "none"), "hello")
    assert status == 2
    assert "error: " in error


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    run: Run, model: Path, tokens: str
) -> None:
    for target, word in ((model, "it is a folder"), (model / "none" / "x.json", "there is no folder")):
        status, output, error = run(
            "evaluate", str(model), str(model), "--dataset", tokens, "--seqlen", "32", "--json", str(target)
        )
        assert status == 2 and word in error and not output
    assert not list(model.parent.glob(".*.part"))


def test_codes_that_a_format_stores_wider_are_told(
    run: Run, model: Path, tokens: str, tmp_path: Path
) -> None:
    status, output, error = run(
        "quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--bits", "3", "--group-size", "32",
        "--dataset", tokens, "--seqlen", "32", "--baselines", "none", "--format", "onnx",
    )  # fmt: skip
    assert status == 0, error
    assert "note: onnx: 3-bit codes are stored in 4 bits" in output + error
    gguf, plain = registry.by_name("gguf"), registry.by_name("gptq")
    assert "4-bit blocks" in gguf.stored_wider(3) and "--kind q3_k" in gguf.stored_wider(3)
    assert "(4.5 bits" in gguf.stored_wider(3) and "(up to 5 bits" in gguf.stored_wider(3, symmetric=False)
    assert "--kind q2_k" in gguf.stored_wider(2) and "--kind q6_k" in gguf.stored_wider(6)
    assert "8-bit blocks (8.5 bits" in gguf.stored_wider(7) and "--kind" not in gguf.stored_wider(7)
    assert not gguf.stored_wider(3, group_size=16) and not gguf.stored_wider(6, True, 16)  # Q3_K, Q6_K
    assert not any(gguf.stored_wider(bits) for bits in (4, 5, 8)) and not plain.stored_wider(3)


def test_an_encoder_decoder_is_refused_by_its_configuration(run: Run, tokens: str, tmp_path: Path) -> None:
    """No weight is there to be read."""
    from transformers import T5Config

    T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4).save_pretrained(
        tmp_path / "t5"
    )
    for words in (
        ["quantize", str(tmp_path / "t5"), str(tmp_path / "out"), "--dataset", tokens],
        ["plan", str(tmp_path / "t5")],
    ):
        status, _, error = run(*words)
        assert status == 2 and "type t5 is an encoder-decoder" in error


def test_generate_runs_and_unpickles_nothing_unasked(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of the other commands, with the same names."""
    _pickle(model)
    status, _, error = run("generate", str(model), "hello")
    assert status == 2 and "pytorch_model.bin" in error
    status, _, error = run("generate", str(model), "hello", "--allow-pickle")
    assert status == 2 and "no tokenizer" in error, "the model itself loads"
    from discquant import generation

    seen: list[dict[str, Any]] = []

    def load(path: Path, **options: Any) -> None:
        seen.append(options)
        raise ConfigError("seen")

    monkeypatch.setattr(generation, "load", load)
    for given in ((), ("--trust-remote-code",), ("--allow-pickle",)):
        run("generate", str(model), "hello", *given)
    asked = [(options["trust_remote_code"], options["allow_pickle"]) for options in seen]
    assert asked == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("x", ("--temperature", "1e-40"), ("temperature", "at least 1e-30", "got 1e-40")),
        ("x", ("--seed", str(2**64)), ("seed", "-2**63 to 2**64 - 1", f"got {2**64}")),
        ("x", ("--seed", str(-(2**63) - 1)), ("seed", "-2**63 to 2**64 - 1")),
        ("a\udcff", (), ("prompt", "UTF-8", r"'\udcff' at place 1")),
        ("x", ("--mode", "int8"), ("mode", "'int8'", "exact")),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    prompt: str, options: tuple[str, ...], words: tuple[str, ...], run: Run, model: Path, tmp_path: Path
) -> None:
    """In one line, before the model is read."""
    (model / "model.safetensors").unlink()
    result = run("generate", str(model), prompt, "--device", "cpu", *options)
    _refused(result, tmp_path / "out", *words)


def test_layerwise_methods_from_the_command_line(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    """RTN, greedy and GPTQ write and prove a file; evaluate reads run directories and exports alike."""
    outs = []
    for method in ("rtn", "greedy", "gptq"):
        out = tmp_path / method
        status, _, error = run(
            "quantize", str(model), str(out), "--method", method, "--bits", "3", "--group-size", "32", "--dataset",
            tokens, "--seqlen", "32", "--baselines", "none",
        )  # fmt: skip
        assert status == 0, error
        assert (out / "compressed-tensors" / "discquant_proof.json").is_file()
        outs.append(out)
    report = tmp_path / "rows.json"
    status, _output, error = run(
        "evaluate", str(model), *map(str, outs), str(outs[0] / "compressed-tensors"), "--dataset", tokens, "--seqlen",
        "32", "--json", str(report),
    )  # fmt: skip
    assert status == 0, error
    rows: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    wanted = {
        "path",
        "kl_mean",
        "kl_stderr",
        "kl_median",
        "kl_p99",
        "kl_p999",
        "kl_max",
        "top1",
        "perplexity",
    }
    assert all(wanted | {"bits_per_weight"} <= set(row) for row in rows)
    assert rows[0]["kl_mean"] == rows[3]["kl_mean"] > 0
    assert rows[0]["bits_per_weight"] == pytest.approx(3.5)


def test_ragged_groups_live_in_the_run_directory(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    """A width that no format holds is refused for a format, and evaluated from the run's codes without one."""
    refused = tmp_path / "refused"
    _refused(
        run(
            "quantize", str(model), str(refused), "--dataset", tokens, "--seqlen", "32", "--group-size", "40"
        ),
        refused,
        "40",
    )
    out = tmp_path / "out"
    status, _, error = run(
        "quantize", str(model), str(out), "--method", "rtn", "--group-size", "40", "--format", "none", "--dataset",
        tokens, "--seqlen", "32",
    )  # fmt: skip
    assert status == 0, error
    status, _output, error = run("evaluate", str(model), str(out), "--dataset", tokens, "--seqlen", "32")
    assert status == 0, error


def test_the_command_line_puts_no_handler_on_the_root_logger(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries with handlers of their own would say their warnings twice."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert run("--help")[0] == 0
    assert logging.getLogger().handlers == []
