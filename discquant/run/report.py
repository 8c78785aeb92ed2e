# SPDX-License-Identifier: Apache-2.0
"""`report.md` of a run: what it measured, in tables and plots, from the files of the run directory alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from discquant.config import AS_LAID
from discquant.errors import MissingModelError
from discquant.run import plots
from discquant.run.checkpoint import SHARE, SPACING
from discquant.run.directory import REPORT, write_atomic
from discquant.run.planned import report_lines
from discquant.run.told_grids import as_table, grids_told

PLOTS = "plots"
_METHODS = ("rtn", "greedy", "gptq", "guided", AS_LAID, "discquant")


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read metrics.jsonl.

    Args:
        file: The file; it need not exist. A torn last line, which a killed run leaves, is passed over.

    Returns:
        Step lines and validation lines, each sorted by step; of lines that repeat a step the last one counts.
    """
    steps: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            target = validation if entry.get("kind") == "validation" else steps
            target[int(entry["step"])] = entry
    return [steps[step] for step in sorted(steps)], [validation[step] for step in sorted(validation)]


def _cell(value: Any, form: str = "") -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return format(value, form) if form else str(value).replace("|", "\\|").replace("\n", " ")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> list[str]:
    ruler = ["---" if place < text_columns else "---:" for place in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, ruler, *rows)] + [""]


def _ordered(methods: dict[str, Any]) -> list[str]:
    known = [name for name in _METHODS if name in methods]
    return known + [name for name in methods if name not in known]


def _methods(summary: dict[str, Any], config: dict[str, Any]) -> list[str]:
    methods = summary.get("methods") or {}
    if not methods:
        return []
    names = _ordered(methods)
    columns = [
        ("KL mean", "kl_mean", ".4g"), ("± stderr", "kl_stderr", ".1g"), ("median", "kl_median", ".3g"),
        ("99 %", "kl_p99", ".3g"), ("99.9 %", "kl_p999", ".3g"), ("max", "kl_max", ".3g"), ("top-1", "top1", ".2%"),
        ("perplexity", "perplexity", ".4g"), ("ratio", "perplexity_ratio", ".4f"),
        ("exact match", "exact_match", ".1%"), ("non-finite", "nonfinite", "d"),
    ]  # fmt: skip
    shown = [
        column
        for column in columns
        if any(methods[name].get(column[1]) is not None for name in names)
        and (column[1] != "nonfinite" or any(methods[name].get("nonfinite") for name in names))
    ]
    rejected = (summary.get("refine") or {}).get("rejected")
    rows = [
        [_label(name, rejected), *(_cell(methods[name].get(key), form) for _, key, form in shown)]
        for name in names
    ]
    lines = [
        "## Divergence from the original",
        "",
        *_table(["method", *(heading for heading, _, _ in shown)], rows),
    ]
    first = methods[names[0]]
    held = summary.get("held_out") or {}
    moved = (config.get("solver") or {}).get("scale_iters") and AS_LAID in methods
    grids = "the grid as it was laid, whose scales DiscQuant then moved," if moved else "the same grid"
    told = f"All on {grids} and the same {_cell(first.get('tokens'), ',d')} positions"
    if held.get("windows"):
        told += f" of {held['windows']} windows held out of {_cell(held.get('source'))}"
    lines += [f"{told}. KL(original ‖ quantized) in nats; the standard error is over windows."]
    if first.get("perplexity_original") is not None:
        lines += [f"The original's perplexity there is {first['perplexity_original']:.4g}."]
    served = str(summary.get("method") or config.get("method") or "discquant")
    lines += ["", *_comparison(methods, served, rejected)]
    before = summary.get("kl_before_rounding")
    after = (methods.get("discquant") or {}).get("kl_mean")
    if before is not None:
        told = f"Mean KL of DiscQuant before the final rounding: {before:.4g}"
        # Rounding may add nothing at all; a ratio to next to nothing would say little.
        if after is not None and before > 0:
            told += f"; after it {after:.4g}, {after / before:.3f} times as much"
        lines += [f"{told}.", ""]
    return lines


def _label(name: str, rejected: str | None) -> str:
    """A method's name; a solve whose codes were not kept says so."""
    shown = plots.NAMES.get(name, name)
    return f"{shown} (rejected)" if name == rejected else shown


def _comparison(methods: dict[str, Any], method: str, rejected: str | None) -> list[str]:
    """How what the run serves compares with the others, in one sentence."""
    own = (methods.get(method) or {}).get("kl_mean")
    if own is None:
        return []
    parts = []
    for name in _ordered(methods):
        other = methods[name].get("kl_mean")
        if name != method and other:
            parts.append(f"{own / other:.3g} times {_label(name, rejected)}'s")
    return [f"Mean KL of {plots.NAMES.get(method, method)}: {' and '.join(parts)}.", ""] if parts else []


def _sizes(summary: dict[str, Any]) -> list[str]:
    sizes = summary.get("sizes") or {}
    rows = []
    if sizes.get("bits_per_weight") is not None:
        rows.append(
            ["bits per quantized weight, scales and zero points included", f"{sizes['bits_per_weight']:.3f}"]
        )
    for key, label in (("original_bytes", "original weights"), ("packed_bytes", "packed weights")):
        if sizes.get(key) is not None:
            rows.append([label, f"{sizes[key] / 1e6:,.2f} MB"])
    if sizes.get("original_bytes") and sizes.get("packed_bytes"):
        rows.append(["packed / original", f"{sizes['packed_bytes'] / sizes['original_bytes']:.1%}"])
    if summary.get("state_bytes_per_weight") is not None:
        rows.append(["solver state per weight", f"{summary['state_bytes_per_weight']:.2f} bytes"])
    return ["## Size", "", *_table(["what", "value"], rows)] if rows else []


def _phases(summary: dict[str, Any]) -> list[str]:
    phases = summary.get("phases") or []
    if not phases:
        return []
    rows = [
        [
            _cell(phase["name"]),
            _cell(phase.get("seconds"), ",.1f"),
            _cell((phase.get("peak_rss_bytes") or 0) / 1e6, ",.0f"),
        ]
        for phase in phases
    ]
    total = sum(phase.get("seconds") or 0.0 for phase in phases)
    peak = max(phase.get("peak_rss_bytes") or 0 for phase in phases) / 1e6
    rows.append(["**all**", f"**{total:,.1f}**", f"**{peak:,.0f}**"])
    table = _table(["phase", "seconds", "peak resident MB"], rows)
    lines = ["## Time and memory", "", *table]
    processes = summary.get("processes") or 1
    if processes > 1:
        lines += [
            f"Seconds are summed over the {processes} times that the command ran, peaks the highest of them.",
            "",
        ]
    return [*lines, *_checkpoints(summary)]


def _checkpoints(summary: dict[str, Any]) -> list[str]:
    """What checkpoints cost and when they were written, in sentences; nothing where a run has none."""
    found = summary.get("checkpoints")
    if not found:
        return []
    every = found.get("every")
    pace = f"paced: {SPACING} steps apart, or as many more as keep writing below {SHARE:.1%} of the time"
    schedule = pace if every is None else f"every {every} steps, as asked for"
    number = "1 checkpoint" if found["count"] == 1 else f"{found['count']:,} checkpoints"
    processes = summary.get("processes") or 1
    who = "The solve" if processes == 1 else f"The last of {processes} processes"
    return [
        f"{who} wrote {number}, {found['bytes'] / 1e6:,.1f} MB ({schedule}; and one at the end), in "
        f"{found['background_seconds']:.3g} s beside the steps, which waited {found['stalled_seconds']:.3g} s for it, "
        f"{found['share']:.2%} of the time.",
        "",
    ]


def _layers(summary: dict[str, Any]) -> list[str]:
    layers = summary.get("layers") or []
    if not layers:
        return []
    weights = sum(int(layer.get("weights") or 0) for layer in layers)
    moved = sum(int(layer.get("moved") or 0) for layer in layers)
    rows = [
        [
            f"`{layer['name']}`",
            _cell(layer.get("bits")),
            _cell(layer.get("weights"), ",d"),
            _cell((layer.get("live") or 0) / max(1, int(layer.get("weights") or 0)), ".1%"),
            f"{plots.moved_share(layer):.2%}",
        ]
        for layer in layers
    ]
    share = moved / max(1, weights)
    head = f"{moved:,} of {weights:,} weights ({share:.2%}) are rounded away from their nearest grid point."
    unseen = summary.get("experts_unseen") or []
    if unseen:
        head += f" {len(unseen)} expert matrices saw no calibration token and stay at nearest: `{unseen[0]}`, for one."
    return [
        "## Layers",
        "",
        head,
        "",
        f"<details><summary>all {len(layers)} layers</summary>",
        "",
        *_table(["layer", "bits", "weights", "may move", "off nearest"], rows),
        "</details>",
        "",
    ]


def _course(steps: list[dict[str, Any]]) -> list[str]:
    if not steps:
        return []
    last = steps[-1]
    # The first steps of a process warm up; the median is what a step costs.
    seconds = [line["seconds"] for line in steps if line.get("seconds") is not None]
    told = f"{last['step']:,} steps"
    if seconds:
        told += f", {statistics.median(seconds):.3g} s each (median)"
    if last.get("fractional") is not None:
        told += f"; after the last {last['fractional']:.3%} of the coordinates that may move were still fractional"
    if last.get("moved") is not None:
        told += f" and {last['moved']:.2%} off the starting choice (nearest, or GPTQ)"
    return [f"{told}.", ""]


def _flat(value: Any, prefix: str = "") -> list[list[str]]:
    if not isinstance(value, dict):
        return [[f"`{prefix}`", _cell(value)]]
    return [
        row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def _draw(
    folder: Path, summary: dict[str, Any], steps: list[Any], validation: list[Any], loss: str
) -> dict[str, str]:
    """Draw every plot that has data; Markdown image by name."""
    target = folder / PLOTS
    target.mkdir(exist_ok=True)
    methods = summary.get("methods") or {}
    final = {
        name: float(methods[name]["kl_mean"])
        for name in _ordered(methods)
        if methods[name].get("kl_mean") is not None
    }
    drawn = {
        "kl": plots.draw_kl(target / "kl.png", validation, final, steps if loss == "kl" else []),
        "steps": plots.draw_shares(target / "steps.png", steps),
        "frac": plots.draw_histogram(target / "frac.png", summary.get("frac_histogram") or {}),
        "moved": plots.draw_moved(target / "moved.png", summary.get("layers") or []),
        "phases": plots.draw_phases(target / "phases.png", summary.get("phases") or []),
    }
    captions = {
        "kl": "KL before and after rounding over the steps, beside the other methods",
        "steps": "share of coordinates fractional, at the clamp and off the starting choice; schedule",
        "frac": "histogram of frac at the start and at the end",
        "moved": "share of weights off nearest per layer",
        "phases": "time and peak memory per phase",
    }
    return {name: f"![{captions[name]}]({PLOTS}/{name}.png)" for name, done in drawn.items() if done}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def write_report(run_dir: Path) -> None:
    """Write `report.md` and its plots from config.json, metrics.jsonl and summary.json of a run directory.

    A run that has not finished has no summary: its report shows the course so far and says so. Without matplotlib the
    report has no plots and says so.

    Args:
        run_dir: The run directory.

    Raises:
        MissingModelError: It holds no config.json.
    """
    folder = Path(run_dir)
    config, summary = _read(folder / "config.json"), _read(folder / "summary.json")
    if not config:
        raise MissingModelError(f"{folder} is no run directory: it has no config.json")
    steps, validation = read_metrics(folder / "metrics.jsonl")
    identity = config.get("identity") or {}
    options = identity.get("config") or config.get("config") or {}
    loss = str((options.get("solver") or {}).get("loss", "kl"))
    pictures = _draw(folder, summary, steps, validation, loss) if plots.available() else {}
    lines = [f"# Run {folder.resolve().name}", "", *_headline(config, options, summary), ""]
    if not summary:
        lines += ["**This run has not finished.** What follows is its course so far.", ""]
    if not plots.available():
        lines += ["No plots: matplotlib is not installed (`pip install 'discquant[plots]'`).", ""]

    def picture(name: str) -> list[str]:
        return [pictures[name], ""] if name in pictures else []

    lines += _refined(summary)
    lines += _methods(summary, options)
    lines += picture("kl")
    if "kl" in pictures:
        lines += [
            "Lines of the other methods are over all held-out windows, the dots over the few watched each time.",
            "",
        ]
    course = [*_course(steps), *picture("steps"), *picture("frac")]
    lines += ["## Course of the solve", "", *course] if course else []
    lines += _layers(summary)
    lines += picture("moved")
    lines += _sizes(summary)
    lines += _phases(summary)
    lines += report_lines(summary)
    lines += picture("phases")
    told = as_table(config, options) if options else config
    lines += ["## Configuration", "", *_table(["option", "value"], _flat(told), text_columns=2)]
    facts = {key: value for key, value in identity.items() if key != "config"}
    lines += (
        ["## Inputs and versions", "", *_table(["what", "value"], _flat(facts), text_columns=2)]
        if facts
        else []
    )
    write_atomic(folder / REPORT, "\n".join(lines).rstrip() + "\n")


def _refined(summary: dict[str, Any]) -> list[str]:
    """What refining a file did, in sentences; nothing for other runs."""
    found = summary.get("refine")
    if not found:
        return []
    derivation = found.get("derivation") or {}
    verdict = (
        f"KL to the original on held-out text: {found['kl_before']:.5f} in the file, {found['kl_after']:.5f} now "
        f"({found['kl_ratio']:.2f} of it)."
        if found["improved"]
        else f"The result was not better than the file on held-out text (KL {_cell(found['kl_before'], '.5f')}); "
        "the file's codes were kept."
    )
    diff = summary.get("byte_diff") or {}
    lines = ["## Refined file", "", verdict]
    if diff:
        lines.append(
            f"{diff['changed']:,} of {diff['code_bytes']:,} bytes of codes changed, and {diff['outside']} elsewhere."
        )
    if found["improved"]:
        lines.append(f"{found['codes_changed']:,} of {found['codes']:,} codes were chosen anew.")
    lines.append(
        f"{found['codes_outside_neighbours']:,} of {found['codes']:,} codes of the file were neither neighbour of the "
        f"original weight. Least correlation of a row with the original: {derivation.get('worst_correlation', 0):.4f} "
        f"(`{derivation.get('worst_layer', '')}`); {derivation.get('untouched', 0)} other tensors are equal."
    )
    folded = derivation.get("folded") or ()
    if folded:
        lines.append(
            f"The file's weights are scaled per channel ({len(folded)} modules); refined in that basis."
        )
    return [*lines, ""]


def _headline(config: dict[str, Any], options: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    grid = options.get("grid") or {}
    if not isinstance(grid, dict) or "bits" not in grid:
        return [f"Model: `{config.get('source', '?')}`"]
    method = plots.NAMES.get(str(options.get("method")), str(options.get("method")))
    told = grids_told(config, options, summary.get("layers") or ())
    return [f"{method} {told}, of `{Path(str(config.get('source', '?'))).name}`."]
