# SPDX-License-Identifier: Apache-2.0
"""What a user reads: choices in words, one limit at a time, no empty line before an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from discquant.config import GridConfig, QuantizeConfig, SolverConfig
from discquant.errors import ConfigError, UnrepresentableError, either
from discquant.formats.mlx import FORMAT
from discquant.formats.scheme import Scheme
from discquant.generation import _check, _room
from discquant.progress import ProgressBar
from discquant.run.directory import _differences
from discquant.solver.solver import StepRecord


def test_choices_are_words() -> None:
    assert [either(names) for names in (("a",), ("a", "b"), (2, 3, 4))] == ["a", "a or b", "2, 3 or 4"]
    with pytest.raises(ValueError, match="grid must be one of absmax or search, got 'none'"):
        GridConfig(grid="none")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="method must be one of rtn, greedy, gptq, guided or discquant, got 'awq'"
    ):
        QuantizeConfig(method="awq")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state must be one of fp32, bf16 or u8"):
        SolverConfig(state="fp8")  # type: ignore[arg-type]
    with pytest.raises(UnrepresentableError, match="mlx holds integers of 2, 3, 4, 5, 6 or 8 bits; x is"):
        FORMAT.check_scheme("x", (64, 64), Scheme(7, 64, True))
    with pytest.raises(UnrepresentableError, match="mlx has groups of 32, 64 or 128 columns"):
        FORMAT.check_scheme("x", (64, 64), Scheme(4, 16, True))


def test_one_limit_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"^generate: max_new_tokens must be at least 1, got 0$"):
        _check("text", 0.0, 0, 0)
    with pytest.raises(ValueError, match=r"^generate: temperature must be finite and at least 0, got -1$"):
        _check("text", -1, 1, 0)


def test_new_tokens_fit_the_positions(capsys: pytest.CaptureFixture[str]) -> None:
    config = SimpleNamespace(max_position_embeddings=512)
    assert _room(config, 12, 500) == 500 and _room(SimpleNamespace(), 12, 10**6) == 10**6
    assert capsys.readouterr().err == ""
    assert _room(config, 12, 600) == 500
    told = "note: the model has 512 positions, 12 of them for the prompt: at most 500 new tokens, not 600"
    assert told in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the prompt has 512 tokens, and the model 512 positions"):
        _room(config, 512, 1)


def test_no_empty_line_before_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError), ProgressBar():
        raise ConfigError("told by the command line")
    assert capsys.readouterr().err == ""


def test_a_step_names_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("MSE") as bar:
        bar.step(StepRecord(2, 413.1698, 0.1, 1.0, 1.0, 1.0, 0.25, 0.0, 0.5), 2)
    assert "step 2/2  MSE 413.1698  rounded 75.0%" in capsys.readouterr().err


def test_rules_that_differ_are_counted() -> None:
    """Their text would be kilobytes of one line."""
    rules = [{"modules": f"m{place}", "grid": {"bits": 4}} for place in range(28)]
    other = [{**rule, "grid": {"bits": 3}} for rule in rules]
    assert _differences({"config": {"layers": rules}}, {"config": {"layers": other}}) == [
        "config.layers: 28 rules differ"
    ]
    assert _differences({"layers": rules}, {"layers": rules[:-1]}) == ["layers: 1 rule differs"]
    assert _differences({"layers": rules}, {"layers": rules[::-1]}) == ["layers: the rules' order differs"]
    assert _differences({"layers": rules}, {"layers": list(rules)}) == []
