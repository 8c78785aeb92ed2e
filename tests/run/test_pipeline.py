# SPDX-License-Identifier: Apache-2.0
"""A run from a model folder to a proven file, killed, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import discquant
from discquant.formats.compressed_tensors import Scheme
from discquant.run import identity
from discquant.run.directory import SOLVER_SINCE, RunDirectory
from discquant.run.served import load_run_model

Command = Callable[..., list[str]]
# Timings, memory and metrics differ between runs; everything that is served or resumed from must not.
SAME = ("codes.safetensors", "calibration.safetensors", "config.json", "compressed-tensors")


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of every file whose bytes a run determines."""
    files = [
        f
        for name in SAME
        for f in ([out / name] if (out / name).is_file() else sorted((out / name).rglob("*")))
    ]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, dataset: str) -> Path:
    """One undisturbed run through the command line."""
    import sys

    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = [
        sys.executable, "-m", "discquant", "quantize", str(model_dir), str(out), "--bits", "3", "--group-size", "32",
        "--dataset", dataset, "--nsamples", "24", "--seqlen", "32", "--iters", "12", "--batch-size", "4",
        "--micro-batch", "2", "--checkpoint-every", "3", "--gptq-samples", "8", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_what_a_run_leaves(finished: Path) -> None:
    assert (finished / "report.md").read_text(encoding="utf-8").startswith("#")
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["methods"]) == {"rtn", "gptq", "discquant"}
    assert {p["name"] for p in summary["phases"]} >= {
        "open",
        "calibrate",
        "grid",
        "round",
        "export",
        "evaluate",
    }
    assert all(p["peak_rss_bytes"] > 1 << 20 for p in summary["phases"])
    assert summary["sizes"]["bits_per_weight"] == pytest.approx(3.5)
    lines = [
        json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines if "kind" not in line] == list(range(1, 13))
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {
        *(f"step-00000{step}.json" for step in ("09", "12")),
        *(f"block-000{block}-00000{step}.safetensors" for block in (0, 1) for step in ("09", "12")),
    }
    assert summary["checkpoints"]["count"] == 5
    assert 0 <= summary["checkpoints"]["share"] <= 1
    assert not (finished / "state").exists()
    proof = json.loads((finished / "compressed-tensors" / "discquant_proof.json").read_text(encoding="utf-8"))
    assert proof


def test_three_ways_to_the_same_logits(finished: Path, model_dir: Path) -> None:
    """Our loader, the run's codes and transformers + compressed-tensors give the solver's rounded model exactly."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 97, (2, 20))
    ours = discquant.load(finished)
    from_codes = load_run_model(finished)
    theirs = AutoModelForCausalLM.from_pretrained(finished / "compressed-tensors")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (ours, from_codes, theirs)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    original = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        assert not torch.equal(logits[0], original(input_ids=ids).logits)


def test_file_holds_the_solvers_rounded_weights(finished: Path) -> None:
    """Codes in the last checkpoint, in codes.safetensors and in the exported file are the same integers."""
    from safetensors import safe_open

    from discquant.formats.load import read_layers

    run = {layer.name: layer for layer in RunDirectory(finished).layers()}
    exported = {layer.name: layer for layer in read_layers(finished / "compressed-tensors")}
    assert run.keys() == exported.keys()
    last: dict[str, torch.Tensor] = {}
    for path in (finished / "checkpoints").glob("block-*-0000012.safetensors"):
        with safe_open(path, framework="pt") as handle:
            last |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
    assert last
    for name, layer in run.items():
        assert torch.equal(layer.q, exported[name].q)
        assert torch.equal(layer.scale, exported[name].scale)
        frac = last[f"{name}.frac"]
        up = (frac > 0.5).to(torch.uint8)
        assert int((layer.q - up).max()) <= 6
        assert Scheme.of(layer) == Scheme(3, 32, True)


def test_same_command_again_says_complete_and_changes_nothing(
    finished: Path, command: Command, call: Callable[..., Any]
) -> None:
    before = fingerprint(finished)
    done = call(command(finished))
    assert done.returncode == 0
    assert "complete already" in done.stderr
    assert fingerprint(finished) == before


def _kill_until_done(arguments: list[str], cwd: Path, moments: list[float], number: int) -> int:
    """Start the command again and again, killing it after each of `moments` seconds; return how often it was hit."""
    hits = 0
    for moment in moments:
        process = subprocess.Popen(arguments, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, number)
            process.wait()
            hits += 1
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return hits


def _duration(arguments: list[str], cwd: Path) -> float:
    begin = time.monotonic()
    assert subprocess.run(arguments, cwd=cwd, capture_output=True, check=False).returncode == 0
    return time.monotonic() - begin


def test_killed_and_resumed_ends_in_the_same_bytes(
    finished: Path, command: Command, tmp_path: Path, warm_start: Any
) -> None:
    """kill -9 as soon as each of four stages has begun, then the same command: the same bytes."""
    out = tmp_path / "killed"
    signs = ("calibration.safetensors", "checkpoints/step-0000000.json", "checkpoints/step-0000006.json")
    for sign in (*signs, "codes.safetensors"):
        process = warm_start.start(command(out), tmp_path)
        deadline = time.monotonic() + 120
        while not (out / sign).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = warm_start.run(command(out), tmp_path)
    assert done.returncode == 0, done.stderr
    assert fingerprint(out) == fingerprint(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_the_run_resumes(
    number: signal.Signals, finished: Path, command: Command, tmp_path: Path, warm_start: Any
) -> None:
    """Also with checkpoints at other steps, which change no byte."""
    out = tmp_path / "stopped"
    process = warm_start.start(command(out), tmp_path)
    while not (out / "checkpoints" / "step-0000000.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 128 + number, messages
    assert "the same command continues" in messages
    assert not (out / "codes.safetensors").exists()
    done = warm_start.run(command(out, "--checkpoint-every", "5"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert fingerprint(out) == fingerprint(finished)


@pytest.mark.full
def test_twenty_random_kills(finished: Path, command: Command, tmp_path: Path, repo_root: Path) -> None:
    """kill -9 at 20 random moments of 20 runs, resumed: 20 of 20 byte-identical; writes the result file."""
    expected = fingerprint(finished)
    whole = _duration(command(tmp_path / "timed"), tmp_path)
    chooser = random.Random(20)
    moments = [chooser.uniform(0.05 * whole, 0.95 * whole) for _ in range(20)]
    identical = hits = 0
    for index, moment in enumerate(moments):
        out = tmp_path / f"run{index}"
        hits += _kill_until_done(command(out), tmp_path, [moment], signal.SIGKILL)
        identical += fingerprint(out) == expected
    result = {
        "runs": len(moments),
        "killed_before_the_end": hits,
        "byte_identical": identical,
        "seconds_of_one_run": round(whole, 2),
        "moments_seconds": [round(moment, 2) for moment in moments],
    }
    target = repo_root / "benchmarks" / "results" / "kill_resume.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    assert hits >= 15
    assert identical == len(moments)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    finished: Path, command: Command, tmp_path: Path, warm_start: Any
) -> None:
    out = tmp_path / "damaged"
    process = warm_start.start(command(out), tmp_path)
    while not (out / "checkpoints" / "step-0000006.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    manifest = json.loads(sorted((out / "checkpoints").glob("step-*.json"))[-1].read_text(encoding="utf-8"))
    newest = out / "checkpoints" / manifest["blocks"][-1]["file"]
    newest.write_bytes(newest.read_bytes()[:100])
    (out / "checkpoints" / "step-0000099.json").write_text("[]", encoding="utf-8")
    done = warm_start.run(command(out), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot be read" in done.stderr
    assert fingerprint(out) == fingerprint(finished)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--seed", "1"), "seed was 0, is 1"),
        (("--bits", "4"), "bits was 3, is 4"),
        (("--lr", "0.2"), "solver.lr"),
        (("--format", "compressed-tensors,gptq"), "--format ...` writes further formats of a finished run"),
    ],
)
def test_another_configuration_is_refused(
    extra: tuple[str, ...], named: str, finished: Path, command: Command, call: Callable[..., Any]
) -> None:
    before = fingerprint(finished)
    done = call(command(finished, *extra))
    assert done.returncode == 2
    assert "holds another run" in done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert fingerprint(finished) == before


def test_a_damaged_summary_is_named(
    finished: Path, command: Command, call: Callable[..., Any], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    (damaged / "summary.json").write_text("{", encoding="utf-8")
    export = [*command(damaged)[:3], "export", str(damaged), "--format", "mlx"]
    for line in (command(damaged), export):
        done = call(line)
        assert done.returncode == 2 and "summary.json: not valid JSON" in done.stderr


def test_a_run_of_earlier_arithmetic_is_refused(
    finished: Path, command: Command, call: Callable[..., Any], tmp_path: Path
) -> None:
    """Runs begun before `arithmetic` was recorded, too."""
    older = tmp_path / "older"
    shutil.copytree(finished, older)
    record = json.loads((older / "config.json").read_text())
    assert record["identity"].pop("arithmetic") == identity.ARITHMETIC["cpu"]
    (older / "config.json").write_text(json.dumps(record))
    done = call(command(older))
    assert done.returncode == 2
    assert f"arithmetic was None, is {identity.ARITHMETIC['cpu']}" in done.stderr


def test_a_run_from_before_an_option_is_continued(
    finished: Path, command: Command, call: Callable[..., Any], tmp_path: Path
) -> None:
    """Where the option is at what that version did; otherwise it is another run."""
    older = tmp_path / "older"
    shutil.copytree(finished, older)
    record = json.loads((older / "config.json").read_text())
    for option, value in SOLVER_SINCE.items():
        assert record["identity"]["config"]["solver"].pop(option) == value
    (older / "config.json").write_text(json.dumps(record))
    done = call(command(older))
    assert done.returncode == 0 and "complete already" in " ".join(done.stderr.split())
    other = call(command(older, "--scale-iters", "2"))
    assert other.returncode == 2 and "scale_iters was 0, is 2" in " ".join(other.stderr.split())


def test_another_model_is_refused(
    finished: Path, command: Command, call: Callable[..., Any], model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    done = call(command(finished, model=other))
    assert done.returncode == 2
    assert "source_digest" in done.stderr
