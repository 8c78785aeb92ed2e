# SPDX-License-Identifier: Apache-2.0
"""README's tables of quality: what every rounding method loses, from the result files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from table_text import MISSING, RESULTS, ROOT, load, table

STEPS = 256  # of DiscQuant in the sweep


def quickstart() -> str:
    """What `make quickstart` printed."""
    rows = load(RESULTS / "quickstart.json")
    if rows is None:
        return MISSING
    names = {"original": "original (bf16)", "rtn": "RTN", "gptq": "GPTQ", "discquant": "**DiscQuant**"}
    body = [
        [
            names[row["method"]],
            f"{row['kl_mean']:.4f}" if row["kl_mean"] else "0",
            f"{row['top1']:.1%}",
            f"{row['exact_match']:.2%}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
        ]
        for row in rows
    ]
    header = ["3 bits, group 64", "KL", "same top-1", "exact answers", "bits/weight", "file MB", "seconds"]
    ratio = next(r["kl_mean"] for r in rows if r["method"] == "discquant") / next(
        r["kl_mean"] for r in rows if r["method"] == "gptq"
    )
    exact = {row["method"]: row["exact_match"] for row in rows}
    count = rows[-1]["exact_match_problems"]
    halfway = (exact["original"] + exact["gptq"]) / 2
    error = (exact["gptq"] * (1 - exact["gptq"]) / count) ** 0.5
    note = (
        f"{rows[-1]['windows']} held-out windows of 256 tokens; DiscQuant took {rows[-1]['iters']} steps, its KL is "
        f"{ratio:.2f} of GPTQ's on the same grid. {count:,} held-out problems, standard error of a row {error:.2%}; "
        f"half-way from GPTQ to the original is {halfway:.3%}."
    )
    return f"{table(header, body)}\n\n{note}"


def sweep() -> str:
    """The bundled model at 2, 3 and 4 bits, beside the former grid of positive scales."""
    now, before = (_by_setting(f"tiny_llama_sweep{name}") for name in ("", "_positive"))
    body = []
    for setting in sorted(now, key=lambda item: (item[0], item[1] % 10_000)):
        kl, former = now[setting], before.get(setting, {})
        name = f"{setting[0]} bits, {'whole row' if setting[1] == -1 else f'group {setting[1]}'}"
        same = former.keys() - {"discquant"}  # whose recipe has changed besides
        cells = [
            "" if m not in kl else f"{kl[m]:.5f} ({kl[m] / former[m]:.2f})" if m in same else f"{kl[m]:.5f}"
            for m in ("rtn", "greedy", "gptq", "guided", "paper", "discquant")
        ]
        body.append([name, *cells, f"{kl['discquant'] / kl['gptq']:.2f}"])
    if not body:
        return MISSING
    note = (
        f"Mean KL to the original on held-out text, nats per token; {STEPS} steps, of the `paper` preset, too. In "
        "brackets: of the same method on scales that were positive alone, as they were before."
    )
    header = ["bundled model", "RTN", "greedy", "GPTQ", "guided", "`paper`", "**`default`**", "ratio to GPTQ"]
    return f"{table(header, body)}\n\n{note}"


def _by_setting(name: str) -> dict[tuple[int, int], dict[str, float]]:
    """KL by (bits, group size) and method, of the settings that have RTN, GPTQ and DiscQuant."""
    by: dict[tuple[int, int], dict[str, float]] = {}
    for row in (load(RESULTS / f"{name}.json") or {"rows": []})["rows"]:
        if row.get("iters", STEPS) == STEPS:
            method = "paper" if row.get("preset") == "paper" else row["method"]
            by.setdefault((row["bits"], row["group_size"]), {})[method] = row["kl"]
    return {setting: kl for setting, kl in by.items() if {"rtn", "gptq", "discquant"} <= kl.keys()}


def autoround() -> str:
    """AutoRound itself, DiscQuant on the grid that it has tuned, and on the project's own."""
    found = load(RESULTS / "autoround.json")
    if found is None:
        return MISSING
    rows = {row["key"]: row for row in found["rows"]}
    own = _by_setting("tiny_llama_sweep")
    body = []
    for key, row in rows.items():
        better = rows.get(f"{key}, discquant on its grid")
        ours = own.get((row["bits"], row["group_size"]), {}).get("discquant")
        if row["method"] != "autoround" or better is None:
            continue
        body.append([
            f"{row['bits']} bits, group {row['group_size']}, {row['iters']} steps per block", f"{row['kl']:.5f}",
            f"{better['kl']:.5f} ({better['kl'] / row['kl']:.2f})",
            "" if ours is None else f"{ours:.5f} ({ours / row['kl']:.2f})",
        ])  # fmt: skip
    if not body:
        return MISSING
    first = next(row for row in rows.values() if row["method"] == "autoround")
    note = (
        f"KL on the held-out text of the table above; auto-round {first['tool']} on {first['windows']} windows of 256 "
        f"tokens of the same calibration text, 8 a step; in brackets: of AutoRound's. DiscQuant took {STEPS} steps."
    )
    header = ["bundled model", "AutoRound", "DiscQuant on AutoRound's grid", "DiscQuant on its own"]
    return f"{table(header, body)}\n\n{note}"


def scales() -> str:
    """Scales that move once the codes are chosen, beside solves of as many steps whose grid stays."""
    found = load(RESULTS / "scales.json")
    if found is None:
        return MISSING
    sweep_kl = _by_setting("tiny_llama_sweep")
    rows = found["rows"]
    # By bits and steps in all, of solves whose grid stays.
    stays = {(row["bits"], row["iters"]): row["kl"] for row in rows if not row.get("scale_iters")}
    stays |= {(bits, STEPS): kl["discquant"] for (bits, size), kl in sweep_kl.items() if size == 64}
    body = []
    for row in sorted(rows, key=lambda row: (row["bits"], row["iters"])):
        moved = row.get("scale_iters", 0)
        other = stays.get((row["bits"], row["iters"] + moved))
        if moved and other is not None:
            steps = f"{row['iters']} + {moved}"
            shown = f"{row['kl']:.5f} ({row['kl'] / other:.2f})"
            body.append(
                [f"{row['bits']} bits, group 64", steps, f"{row['kl_as_laid']:.5f}", shown, f"{other:.5f}"]
            )
    if not body:
        return MISSING
    note = (
        "KL on the held-out text of the table above, the same calibration text; in brackets: of the last column. Steps "
        "that choose codes + steps that move scales; the last column takes the sum of both for codes alone."
    )
    header = ["bundled model", "steps", "scales as laid", "**scales moved**", "as many steps, codes alone"]
    return f"{table(header, body)}\n\n{note}"


def allocation() -> str:
    """A width for each layer, beside one for all of the same size."""
    found = load(RESULTS / "allocation.json")
    if found is None:
        return MISSING
    everywhere = _by_setting("tiny_llama_sweep")
    by: dict[tuple[float, tuple[str, ...]], dict[str, Any]] = {}
    for row in found["rows"]:
        by.setdefault((row["average_bits"], tuple(row["choices"])), {})[row["method"]] = row
    body = []
    for (average_bits, choices), rows in sorted(by.items()):
        same = {} if average_bits % 1 != 0.25 else everywhere.get((int(average_bits), 64), {})
        cells = []
        for method in ("rtn", "gptq", "discquant"):
            own, other = rows.get(method), same.get(method)
            ratio = "" if own is None or other is None else f" ({own['kl'] / other:.2f})"
            cells.append("" if own is None else f"{own['kl']:.5f}{ratio}")
        bits = next(iter(rows.values()))["bits_per_weight"]
        body.append([f"{bits:.2f} bits per weight of {', '.join(choices)}", *cells])
    note = (
        "KL on the held-out text of the table above, groups of 64, scales counted in the bits; in brackets: of one "
        f"width everywhere by the same method, in a file at least as large. {STEPS} steps."
    )
    return f"{table(['bundled model', 'RTN', 'GPTQ', '**DiscQuant**'], body)}\n\n{note}"


def rotation() -> str:
    """The bundled model as it is and rotated."""
    found = load(RESULTS / "rotation.json")
    if found is None:
        return MISSING
    by: dict[tuple[int, int, int | None], dict[str, float]] = {}
    for row in found["rows"]:
        if "rotation" in row:
            by.setdefault((row["bits"], row["group_size"], row["rotation"]), {})[row["method"]] = row["kl"]
    body = []
    methods = ("rtn", "gptq", "discquant")
    for bits, group in dict.fromkeys(key[:2] for key in by):
        whole = {seed: kl for (b, g, seed), kl in by.items() if (b, g) == (bits, group) and len(kl) == 3}
        for seed, kl in whole.items():
            if None in whole:
                ratios = ["" if seed is None else f" ({kl[m] / whole[None][m]:.2f})" for m in methods]
                name = "as it is" if seed is None else f"rotated, seed {seed}"
                size = "whole row" if group == -1 else f"group {group}"
                body.append(
                    [
                        f"{bits} bits, {size}, {name}",
                        *(f"{kl[m]:.5f}{ratio}" for m, ratio in zip(methods, ratios, strict=True)),
                    ]
                )
    if not body:
        return MISSING
    change = max(row["kl"] for row in found["rows"] if row["key"].startswith("bfloat16"))
    steps = {row["iters"] for row in found["rows"] if row.get("method") == "discquant"}
    note = (
        "Mean KL on held-out text to what was rounded, nats per token (in brackets: of the same method without "
        f"rotation); {', '.join(map(str, sorted(steps)))} steps. Before any grid the rotated bfloat16 model differs "
        f"from the original by a KL of {change:.1e} at most."
    )
    return f"{table(['bundled model', 'RTN', 'GPTQ', 'DiscQuant'], body)}\n\n{note}"


def stories() -> str:
    """The 260 k-weight TinyStories model with the budget of the published comparison."""
    found = load(RESULTS / "stories260k.json")
    if found is None:
        return MISSING
    rows = {row["key"]: row for row in found["rows"]}

    def group(prefix: str) -> list[dict[str, Any]]:
        return [row for key, row in rows.items() if re.fullmatch(prefix + r" seed \d", key)]

    body = []
    for key, name in (
        ("rtn 0.1", "RTN"),
        ("gptq 0.1", "GPTQ"),
        ("greedy 0.1", "greedy"),
        ("paper", "DiscQuant, `paper`"),
    ):
        if key in rows:
            before = rows[key].get("kl_before_rounding")
            body.append([name, f"{rows[key]['kl']:.4f}", f"{before:.4f}" if before is not None else ""])
    for prefix, name in (("default", "**DiscQuant, `default`**"), ("default u8", "the same, 8-bit state")):
        seeds = group(prefix)
        if seeds:
            kl = [row["kl"] for row in seeds]
            soft = sum(row["kl_before_rounding"] for row in seeds) / len(seeds)
            body.append(
                [
                    f"{name} ({len(seeds)} seeds)",
                    f"{sum(kl) / len(kl):.4f} ({min(kl):.4f}-{max(kl):.4f})",
                    f"{soft:.4f}",
                ]
            )
    return table(["stories260k, 3 bits, group 32, abs-max", "KL", "before rounding"], body)


def training() -> str:
    """What it cost to train the bundled model."""
    found = load(ROOT / "examples" / "results" / "tiny_llama_training.json")
    if found is None:
        return MISSING
    return (
        f"{found['weights'] / 1e6:.2f} M weights, trained on {found['tokens'] / 1e6:.2f} M tokens in "
        f"{found['wall_seconds'] / 60:.0f} minutes on {found['threads']} busy CPU threads; answers "
        f"{found['heldout_exact_match']:.1%} of {found['heldout_problems']} held-out problems exactly."
    )


def refine() -> str:
    """Files of the bundled model before and after `discquant refine`."""
    found = load(RESULTS / "refine.json")
    if found is None:
        return MISSING
    body = [
        [
            f"{name} (made by {row['made_by']})",
            f"{row['kl_before']:.5f}",
            f"{row['kl_after']:.5f}",
            f"{row['ratio']:.2f}",
            f"{row['bar']:g}" if row["bar"] else "",
            str(row["iters"]),
            str(row["bytes_changed_outside_codes"]),
        ]
        for name, row in found["rows"].items()
    ]
    header = ["file", "KL before", "KL after", "ratio", "target", "steps", "bytes changed outside codes"]
    return table(header, body)
