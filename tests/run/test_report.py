# SPDX-License-Identifier: Apache-2.0
"""report.md and its plots from the files of a run: finished, unfinished, without matplotlib, with torn metrics."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from discquant.errors import MissingModelError
from discquant.run import plots
from discquant.run.report import read_metrics, write_report
from discquant.run.summary import beaten, original_bytes

PNG = b"\x89PNG\r\n\x1a\n"


def divergence(kl: float, **more: Any) -> dict[str, Any]:
    return {
        "kl_mean": kl, "kl_stderr": kl / 50, "kl_median": kl / 2, "kl_p99": 8 * kl, "kl_p999": 20 * kl,
        "kl_max": 60 * kl, "top1": 0.9, "perplexity": 3.5, "perplexity_original": 3.25, "perplexity_ratio": 1.077,
        "tokens": 65536, "nonfinite": 0, **more,
    }  # fmt: skip


def metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"kind": "validation", "step": 0, "kl_soft": 0.0, "kl_rounded": 0.9}]
    for step in range(1, 33):
        lines.append(
            {
                "step": step, "loss": 1 / step, "lr": 0.1, "kl_weight": 1200.0, "linear_weight": float(step < 10),
                "hardening": step / 10, "fractional": 1 - step / 32, "moved": step / 1000, "saturated": 0.5,
                "seconds": 0.25, "rss_bytes": 10**9,
            }
        )  # fmt: skip
        if step % 8 == 0:
            lines.append(
                {"kind": "validation", "step": step, "kl_soft": 0.5 / step, "kl_rounded": 0.9 / step}
            )
    return lines


def summary() -> dict[str, Any]:
    names = [
        f"model.layers.{block}.{kind}" for block in range(2) for kind in ("mlp.up_proj", "self_attn.q_proj")
    ]
    return {
        "method": "discquant",
        "methods": {
            "discquant": divergence(0.125, exact_match=0.75),
            "gptq": divergence(0.5),
            "rtn": divergence(1.0),
        },
        "held_out": {"windows": 256, "tokens": 65536, "source": "self"},
        "kl_before_rounding": 0.119,
        "layers": [
            {"name": name, "weights": 1000, "live": 900, "moved": 10 * (place + 1), "bits": 3}
            for place, name in enumerate(names)
        ],
        "frac_histogram": {"edges": [0, 0.25, 0.5, 0.75, 1], "start": [5, 5, 5, 5], "end": [12, 0, 0, 8]},
        "phases": [
            {"name": "round", "seconds": 61.5, "peak_rss_bytes": 1_310_000_000},
            {"name": "export", "seconds": 2.0, "peak_rss_bytes": 600_000_000},
        ],
        "sizes": {"original_bytes": 8_000_000, "packed_bytes": 2_000_000, "bits_per_weight": 3.25},
    }


def test_original_weights_are_those_that_were_read(model_dir: Path, tmp_path: Path) -> None:
    """Not the same weights in another layout beside them; pickled ones by their own files."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder / "consolidated.safetensors")
    assert original_bytes(folder) == weights.stat().st_size
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"1234567")
    assert original_bytes(folder) == 7


@pytest.fixture
def run(tmp_path: Path) -> Path:
    options = {
        "grid": {"bits": 3, "group_size": 64, "sym": True, "grid": "absmax"}, "method": "discquant",
        "solver": {"iters": 32, "loss": "kl"}, "ignore": ["lm_head"],
    }  # fmt: skip
    config = {"discquant_run": 1, "source": "/a/model", "identity": {"config": options, "torch": "2.13.0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    return tmp_path


def pictures(run: Path) -> dict[str, bytes]:
    """Images that the report shows, by file name."""
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (run / "report.md").read_text())
    return {Path(name).name: (run / name).read_bytes() for name in shown}


def test_whole_report(run: Path) -> None:
    write_report(run)
    report = (run / "report.md").read_text()
    drawn = pictures(run)
    assert sorted(drawn) == ["frac.png", "kl.png", "moved.png", "phases.png", "steps.png"]
    assert all(data.startswith(PNG) and len(data) > 5000 for data in drawn.values())
    for words in (
        "DiscQuant at 3 bits, symmetric, groups of 64, absmax scales, of `model`",
        "0.125 times RTN's and 0.25 times GPTQ's",
        "100 of 4,000 weights (2.50%)",
        "| packed / original | 25.0% |",
        "| **all** | **63.5** | **1,310** |",
        "32 steps, 0.25 s each (median)",
        "| `grid.bits` | 3 |",
        "before the final rounding: 0.119; after it 0.125, 1.050 times as much",
    ):
        assert words in report, words
    table = [
        line.split(" | ")
        for line in report.splitlines()
        if line.startswith(("| method", "| RTN", "| GPTQ", "| Disc"))
    ]
    assert [row[0] for row in table] == ["| method", "| RTN", "| GPTQ", "| DiscQuant"]
    assert [row[1] for row in table[1:]] == ["1", "0.5", "0.125"]
    # Every row of every table has as many cells as its head: it renders.
    for block in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_median_step_and_a_continued_run(run: Path) -> None:
    """Of an even number of steps the median lies between two; checkpoints of earlier processes are not counted."""
    lines = [{**line, "seconds": float(2 * line["step"])} for line in metrics()[1:3]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = {
        "count": 0,
        "bytes": 0,
        "background_seconds": 0.0,
        "stalled_seconds": 0.0,
        "share": 0.0,
        "every": None,
    }
    for processes, who in ((1, "The solve"), (3, "The last of 3 processes")):
        found = {**summary(), "checkpoints": kept, "processes": processes}
        (run / "summary.json").write_text(json.dumps(found))
        write_report(run)
        report = (run / "report.md").read_text()
        assert f"\n{who} wrote 0 checkpoints" in report and "2 steps, 3 s each (median)" in report


def test_writing_twice_gives_the_same_bytes(run: Path) -> None:
    write_report(run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    write_report(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_unfinished_run(run: Path) -> None:
    (run / "summary.json").unlink()
    write_report(run)
    assert "This run has not finished" in (run / "report.md").read_text()
    assert sorted(pictures(run)) == ["kl.png", "steps.png"]


def test_run_without_steps(run: Path) -> None:
    """Rounding to nearest has no course: its report has a table and no plots of steps."""
    (run / "metrics.jsonl").unlink()
    found = {
        key: value for key, value in summary().items() if key not in ("frac_histogram", "kl_before_rounding")
    }
    found |= {"method": "rtn", "methods": {"rtn": divergence(1.0), "gptq": divergence(0.5)}}
    (run / "summary.json").write_text(json.dumps(found))
    write_report(run)
    assert "Mean KL of RTN: 2 times GPTQ's" in (run / "report.md").read_text()
    assert sorted(pictures(run)) == ["moved.png", "phases.png"]


def test_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import raises ImportError
    assert not plots.available()
    write_report(run)
    assert "No plots: matplotlib is not installed" in (run / "report.md").read_text()
    assert pictures(run) == {}
    assert not (run / "plots").exists()


def test_broken_candidates_are_shown_as_such(run: Path) -> None:
    found = summary()
    found["methods"]["rtn"] |= {"kl_mean": None, "perplexity": None, "nonfinite": 65536}
    (run / "summary.json").write_text(json.dumps(found))
    write_report(run)
    report = (run / "report.md").read_text()
    line = next(line for line in report.splitlines() if line.startswith("| RTN"))
    assert line.split(" | ")[1] == "-"
    assert line.endswith("65536 |")
    assert "times GPTQ's." in report
    assert "RTN's" not in report


def test_metrics_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"kind": "validation", "step": 2, "kl_soft": 1.0},
    ]
    again = [{"step": 2, "loss": 2.5}, {"step": 3, "loss": 1.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *again]) + '{"step": 4, "lo')
    steps, validation = read_metrics(file)
    assert [(line["step"], line["loss"]) for line in steps] == [(1, 3.0), (2, 2.5), (3, 1.0)]
    assert [line["step"] for line in validation] == [2]
    assert read_metrics(tmp_path / "gone") == ([], [])


def test_layers_without_blocks_are_bars(tmp_path: Path) -> None:
    layers = [{"name": name, "weights": 10, "moved": place} for place, name in enumerate(("conv1", "fc"))]
    assert plots.draw_moved(tmp_path / "bars.png", layers)
    assert (tmp_path / "bars.png").read_bytes().startswith(PNG)


def test_nothing_to_draw(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    assert not plots.draw_kl(file, [], {"rtn": 1.0})
    assert not plots.draw_shares(file, [])
    assert not plots.draw_histogram(file, {})
    assert not plots.draw_histogram(file, {"edges": [0, 1], "start": [0], "end": [0]})
    assert not plots.draw_moved(file, [])
    assert not plots.draw_phases(file, [])
    assert not file.exists()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(MissingModelError, match="no run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        ({"rtn": 0.06, "gptq": 0.03, "discquant": 0.01}, None),
        ({"discquant": 0.01}, None),
        ({"rtn": None, "gptq": 0.03, "discquant": 0.04}, "gptq has the lower KL"),
        ({"rtn": 0.02, "gptq": 0.03, "discquant": 0.04}, "rtn has the lower KL"),
        ({"gptq": 0.03, "discquant": None}, "discquant has one that is not finite"),
    ],
)
def test_a_baseline_that_wins_is_told(kl: dict[str, float | None], said: str | None) -> None:
    """Few steps round worse than gptq: whoever takes the file has to know."""
    found = beaten(
        {"method": "discquant", "methods": {name: {"kl_mean": value} for name, value in kl.items()}}
    )
    assert found is None if said is None else found is not None and said in found and "--iters" in found
