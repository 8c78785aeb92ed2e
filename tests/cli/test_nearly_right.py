# SPDX-License-Identifier: Apache-2.0
"""What a new user gives that is nearly right: the sentence says what to give instead, before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from discquant.run import identity

Run = Callable[..., tuple[int, str, str]]


def _line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("q4_0", "give one that can (gguf, "),
        ("q2_k", "give one that can (gguf"),
        ("q6_k", "give one that can (gguf, "),
        ("nvfp4", "give one that can (compressed-tensors"),
        ("nf4", "no format can; give none (the codes stay"),
    ],
)
def test_a_kind_names_the_formats_that_hold_it(
    kind: str, words: str, run: Run, model: Path, tokens: str, tmp_path: Path
) -> None:
    """Of all formats those that take this grid on this model's shapes and dtype."""
    out = tmp_path / "out"
    given = ["--dataset", tokens, "--seqlen", "32", "--kind", kind]
    asked = "gptq" if kind == "nvfp4" else "compressed-tensors"
    status, _, error = run("quantize", str(model), str(out), *given, "--format", asked)
    assert status == 2 and not out.exists()
    line = _line(error)
    assert f"--format {asked} cannot hold this model in --kind {kind}" in line and words in line


@pytest.mark.parametrize(
    "given",
    [
        ("--group-size", "8192"), ("--format", "awq", "--bits", "3"), ("--kind", "q4_0"),
        ("--kind", "nvfp4", "--format", "gptq"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_plan_refuses_what_the_run_would(
    given: tuple[str, ...], run: Run, model: Path, tokens: str, tmp_path: Path
) -> None:
    """In the same words, from config.json alone."""
    given = ("--seqlen", "32", *given)
    status, _, error = run("quantize", str(model), str(tmp_path / "out"), "--dataset", tokens, *given)
    assert status == 2 and not (tmp_path / "out").exists()
    (model / "model.safetensors").unlink()
    refused, _, planned = run("plan", str(model), "--gpu", "cpu", *given)
    assert refused == 2 and _line(planned) == _line(error)


@pytest.fixture
def run_folder(tmp_path: Path, model: Path) -> Path:
    """What quantize leaves, as far as its config.json and one model in it tell."""
    folder = tmp_path / "runs" / "one"
    (folder / "gptq").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"discquant_run": 1, "source": str(model), "identity": {}})
    )
    return folder


@pytest.mark.parametrize(
    "line",
    [
        ("quantize", "RUN", "OUT"), ("plan", "RUN"), ("evaluate", "RUN", "M"),
        ("refine", "RUN", "OUT", "--original", "M"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_run_is_no_model(
    line: tuple[str, ...], run: Run, run_folder: Path, model: Path, tmp_path: Path
) -> None:
    """The models in it and its original are named."""
    places = {"RUN": str(run_folder), "OUT": str(tmp_path / "out"), "M": str(model)}
    status, _, error = run(*(places.get(word, word) for word in line))
    assert status == 2 and not (tmp_path / "out").exists()
    told = _line(error)
    assert f"{run_folder} is a run directory, not a model" in told
    assert str(run_folder / "gptq") in told and f"its original: {model}" in told


def test_a_calibration_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a piece, the digest is that of the file."""
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(256)) * 5)
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    for piece in (1 << 24, 7, 1280):
        monkeypatch.setattr(identity, "PIECE", piece)
        assert identity.file_digest(str(file)) == expected
    assert identity.file_digest(str(tmp_path / "none.txt")) is None


def test_a_type_that_rows_do_not_fill_is_told(run: Run, model: Path, tokens: str, tmp_path: Path) -> None:
    """By quantize, plan and allocate alike."""
    text = ("--dataset", tokens, "--seqlen", "32")
    note = "Q4_0 in place of Q2_K (model.layers.0."
    for words in (
        ["quantize", str(model), str(tmp_path / "out"), *text, "--kind", "q2_k", "--format", "none", "--method", "rtn",
         "--baselines", "none"],
        ["plan", str(model), *text, "--kind", "q2_k", "--format", "none"],
        ["allocate", str(model), str(tmp_path / "a.json"), *text, "--choices", "q2_k,iq4_nl", "--average-bits", "6"],
    ):  # fmt: skip
        status, output, error = run(*words)
        assert status == 0, error
        assert note in " ".join((output + error).split()), words[0]


def test_a_plan_of_a_quantized_model_is_refused(run: Run, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (model / "config.json").write_text(json.dumps(config))
    status, _, error = run("plan", str(model))
    assert status == 2 and "is quantized already; give the original model" in _line(error)


def test_what_cannot_be_written_is_said_at_once(
    run: Run, model: Path, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, which may write anywhere."""
    (tmp_path / "ro").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "ro")
    place = str(tmp_path / "ro" / "x")
    for words in (
        ["allocate", str(model), place, "--dataset", tokens, "--average-bits", "4"],
        ["rotate", str(model), place],
        ["export", str(model), "--original", str(model), "--format", "gptq", "--out", place],
    ):
        status, _, error = run(*words)
        assert status == 2 and f"{place} cannot be written: no permission in {tmp_path / 'ro'}" in _line(
            error
        )
    assert not any((tmp_path / "ro").iterdir())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nf4", "no format holds its nf4 codes, generate and evaluate open it"),
        ("mxfp4", "export it to serve it"),
    ],
)
def test_a_run_says_what_it_is_good_for(
    kind: str, words: str, run: Run, model: Path, tokens: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    status, _, error = run(
        "quantize", str(model), out, "--dataset", tokens, "--seqlen", "32", "--kind", kind, "--format", "none",
        "--method", "rtn", "--baselines", "none",
    )  # fmt: skip
    assert status == 0, error
    status, output, error = run("inspect", out)
    assert status == 0 and words in " ".join(output.split()), error
