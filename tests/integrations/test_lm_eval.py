# SPDX-License-Identifier: Apache-2.0
"""lm-eval's command line behind ours, against a stand-in; the real one is tried in `make interop`."""

from __future__ import annotations

import runpy
import sys
from types import ModuleType

import pytest

from discquant.errors import ConfigError
from discquant.integrations import lm_eval
from discquant.integrations.transformers_quantizer import unregister


def test_registers_and_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    seen: list[bool] = []
    main = ModuleType("lm_eval.__main__")
    main.cli_evaluate = lambda: seen.append("discquant" in AUTO_QUANTIZER_MAPPING)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", main)
    try:
        lm_eval.main()
    finally:
        unregister()
    assert seen == [True]


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ConfigError, match="pip install"):
        lm_eval.main()


def test_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As `python -m discquant.integrations.lm_eval` runs it."""
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "discquant.integrations.lm_eval")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("discquant.integrations.lm_eval", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: lm-eval is not installed: pip install lm-eval[hf]"
    ]
