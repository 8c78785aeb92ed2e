# SPDX-License-Identifier: Apache-2.0
"""The plan of the same words as a run is the run's plan: both commands make one configuration of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from discquant.cli import app
from discquant.config import QuantizeConfig

WORDS = (
    (),
    ("--method", "gptq", "--gptq-samples", "16", "--baselines", "none"),
    ("--preset", "paper", "--bits", "3", "--iters", "32"),
    ("--kind", "q4_k", "--format", "gguf", "--grid", "absmax"),
    ("--loss", "mse", "--teacher", "state", "--compute-dtype", "bfloat16"),
    ("--state", "u8", "--optimizer", "lion", "--asym", "--group-size", "32"),
    ("--iters", "32", "--scale-iters", "8"),
)


class _Caught(Exception):
    """Carries what a command made of its words."""


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_one_configuration(
    words: tuple[str, ...], configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, or wherever one of the words says what a GPU would otherwise be planned with."""

    def caught(*given: Any, **_: Any) -> Any:
        raise _Caught(next(part for part in given if isinstance(part, QuantizeConfig)))

    monkeypatch.setattr("discquant.planning.plan.make_plan", caught)
    monkeypatch.setattr("discquant.run.pipeline.Pipeline", caught)
    model = str(configs / "llama-3.1-8b")
    assumed = not {"--state", "--preset", "--compute-dtype"} & set(words)
    planned = CliRunner().invoke(app, ["plan", model, "--gpu", "cpu" if assumed else "h100", *words])
    ran = CliRunner().invoke(app, ["quantize", model, str(tmp_path / "out"), "--device", "cpu", *words])
    assert isinstance(planned.exception, _Caught) and isinstance(ran.exception, _Caught)
    assert planned.exception.args == ran.exception.args


def _facts(model: Path, *words: str) -> dict[str, Any]:
    line = [
        "plan",
        str(model),
        "--host-memory",
        "900",
        "--disk",
        "4000",
        "--dataset",
        "self",
        *words,
        "--json",
    ]
    found: dict[str, Any] = json.loads(CliRunner().invoke(app, line, catch_exceptions=False).stdout)
    return found


def test_the_words_change_the_plan(configs: Path) -> None:
    """No steps of a layer-wise method, scales of the kind, factors by the loss, weights by the teacher."""
    model = configs / "llama-3.1-8b"
    base = _facts(model, "--gpu", "cpu")
    gptq = _facts(model, "--gpu", "cpu", "--method", "gptq")
    assert gptq["method"] == "gptq" and gptq["steps"] == gptq["total_seconds"] == gptq["step_seconds"] == 0
    assert "solve" not in {phase["name"] for phase in gptq["phases"]} and len(gptq["options"]) == 3
    shown = CliRunner().invoke(
        app, ["plan", str(model), "--gpu", "cpu", "--host-memory", "900", "--method", "rtn"]
    )
    assert "--method rtn" in shown.stdout and "per step" not in shown.stdout

    def item(facts: dict[str, Any], name: str, phase: str = "solve") -> float:
        return next(float(p["items"]["host"].get(name, 0.0)) for p in facts["phases"] if p["name"] == phase)

    weights = base["quantized_weights"]
    kind = _facts(model, "--gpu", "cpu", "--kind", "q4_k", "--format", "gguf")
    assert item(kind, "scales", "grid") == pytest.approx(8 / 32 * weights)
    assert (
        item(_facts(model, "--gpu", "cpu", "--loss", "ce"), "factors of a block") == 0 < item(base, "state")
    )
    paper = _facts(model, "--gpu", "cpu", "--preset", "paper")
    assert paper["state"] == "bf16 adamw" and paper["steps"] == 1024
    own = _facts(model, "--gpu", "cpu", "--state", "u8", "--teacher", "weights")
    assert (
        own["state_bytes_per_weight"]
        < _facts(model, "--gpu", "cpu", "--state", "u8")["state_bytes_per_weight"]
    )
    gpu = _facts(model, "--gpu", "h100")
    assert gpu["state"] == "u8 momentum"
    assert _facts(model, "--gpu", "h100", "--state", "u8")["state"] == "u8 adamw"


def test_text_that_is_not_here_is_told(configs: Path, tmp_path: Path) -> None:
    """The plan reads none, so it is no error; quantize, which would refuse it, is named."""
    words = ("--gpu", "cpu", "--dataset", str(tmp_path / "nosuch.txt"))
    (warning,) = _facts(configs / "llama-3.1-8b", *words)["warnings"]
    assert "nosuch.txt here: the plan does not read it, quantize would refuse it" in warning
    (tmp_path / "nosuch.txt").write_text("here")
    assert _facts(configs / "llama-3.1-8b", *words)["warnings"] == []
