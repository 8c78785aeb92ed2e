# SPDX-License-Identifier: Apache-2.0
"""Rewrite the generated parts of README.md from result files: `python benchmarks/tables.py [--check]`.

A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; nothing in it is typed by hand.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import packed_targets
import tables_quality as quality
import targets
from table_text import MISSING, RESULTS, ROOT, load, table


def resume() -> str:
    """Kill -9 at random moments."""
    found = load(RESULTS / "kill_resume.json")
    if found is None:
        return MISSING
    return (
        f"`kill -9` at {found['runs']} random moments ({found['killed_before_the_end']} before the run had ended), "
        f"then the same command: {found['byte_identical']} of {found['runs']} ended in the same bytes."
    )


def cpu() -> str:
    """Targets of packed inference on every processor that was measured."""
    return "\n\n".join(map(_processor, sorted(RESULTS.glob("packed-*.csv")))) or MISSING


def _processor(path: Path) -> str:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]
    found: dict[str, dict[str, str]] = {}
    limits = {}
    for verdict in packed_targets.verdicts(path):
        head, _, what = verdict.what.partition(": ")
        found.setdefault(head, {})[what] = "not measured" if verdict.value is None else f"{verdict.value:.2f}"
        limits[what] = f"{'≤' if verdict.at_most else '≥'} {verdict.limit:g}"
    body = [[what, *(cells[what] for cells in found.values()), limit] for what, limit in limits.items()]
    best = {"amx": "AMX", "vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    isa = next((f" with {name}" for stem, name in best.items() if stem in path.stem), "")
    head = f"{last['device'].removeprefix('cpu ')}{isa}, torch {last['torch']}, {last['date']}"
    return f"{head} (`{path.relative_to(ROOT)}`):\n\n{table(['what', *found, 'target'], body)}{_reads(rows)}"


def _reads(rows: list[dict[str, str]]) -> str:
    """What reading the weights bounds, below a table."""

    def per_threads(values: dict[str, float]) -> str:
        return " and ".join(f"{v:.2f} ({n} thread{'s' if n != '1' else ''})" for n, v in values.items())

    notes = []
    if bound := packed_targets.reading(rows, 4):
        notes.append(
            f"At M=4 the plain read of the weight is itself {per_threads(bound)} times as fast as torch int4."
        )
    if found := packed_targets.streamed(rows):
        read, a8, a15 = (
            per_threads({n: of[key] for n, of in found.items() if key in of}) for key in ("read", "a8", "a15")
        )
        notes.append(
            f"Read in four streams, the weight comes up to {read} times as fast as plainly; of that read M=1 at 4 bits "
            f"reaches at least {a8} with a8, {a15} with a15."
        )
    return "".join(f"\n\n{note}" for note in notes)


def gpu() -> str:
    """Targets of the kernels on every GPU that has a result file."""
    found = []
    for path in sorted(RESULTS.glob("nvidia-*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        last = rows[-1]
        body = []
        for verdict in (*targets.verdicts(rows), *packed_targets.verdicts(path)):
            value = "not measured on a GPU" if verdict.value is None else f"{verdict.value:.3g}"
            body.append([verdict.what, value, f"{'≤' if verdict.at_most else '≥'} {verdict.limit:g}"])
        versions = f"driver {last['driver']}, torch {last['torch']}, Triton {last['triton']}"
        head = f"{last['device']}, {versions}, {last['date']}"
        block = f"{head} (`{path.relative_to(ROOT)}`):\n\n{table(['what', 'measured', 'target'], body)}"
        older = targets.older_rows(rows)
        if older:
            told = ", ".join(f"{op} {date}" for op, date in older.items())
            block += (
                f"\n\nRows that the last run did not measure again are of the day when they were: {told}."
            )
        bound = targets.materialised_bound(rows, 4096)
        if bound is not None:
            block += (
                f"\n\nAt 4096 tokens a weight written once at the copy's speed leaves soft_linear {bound:.3f} of "
                "cuBLAS:\nthe target is out of reach there for a weight that passes through memory."
            )
        found.append(block)
    counted = load(RESULTS / "step_traffic.json")
    if counted is not None:
        found.append(
            "Counted operator by operator on a simulated GPU, a step of the present code moves "
            f"{counted['bytes_per_weight']:.1f} bytes per weight outside\nthe matmuls (target "
            f"{targets.TRAFFIC_LIMIT:g}), and {counted['undo_bytes_per_weight']:.1f} more of the first 2 GiB of "
            "state, so that it can be undone (`python tests/run/step_traffic.py`);\nwith what the default recipe adds, "
            f"a GPTQ start and the curvature term, {counted['default_recipe']['bytes_per_weight']:.1f}.\n"
            "Of activations it moves "
            f"{counted['bytes_per_token_and_hidden']:.0f} bytes per token and entry of the hidden state, by Llama 3 "
            f"70B's widths;\nwith the norms of `transformers` they were {counted['with_norms_of_transformers']:.0f}."
        )
    return "\n\n".join(found) or MISSING


def gpu_scale() -> str:
    """Steps on Llama-shaped blocks, resident and streamed, on every GPU that has a result file."""
    body = []
    for path in sorted(RESULTS.glob("nvidia-*-scale.json")):
        result = load(path)
        for name, found in sorted(result["shapes"].items()):
            same = {True: "yes", False: "**no**"}
            identical = same[
                all(row["codes_identical"] and row["state_identical"] for row in found["compared"])
            ]
            for where, fitted in found["lines"].items():
                deepest = max(
                    (r for r in found["runs"] if r["placement"] == where), key=lambda r: r["blocks"]
                )
                whole, share = found["extrapolated"][where], deepest["overlap"].get("share")
                plan = deepest["planned"]
                streamed = {row["blocks"]: row["host_over_resident"] for row in found["compared"]}
                body.append([
                    f"{name}, {where}, {result['machine']['device']}",
                    f"{1e3 * fitted['per_block']:.1f}",
                    f"{fitted['times_bare_matmul']:.2f}" if "times_bare_matmul" in fitted else "",
                    f"{fitted['tflop_s']:.0f}" if "tflop_s" in fitted else "",
                    "" if share is None else f"{share:.0%}",
                    f"{streamed[deepest['blocks']]:.2f}" if where == "host" and deepest["blocks"] in streamed else "",
                    f"{deepest['peak_device_bytes'] / 1e9:.1f} / {plan['device_bytes'] / 1e9:.1f}",
                    f"{deepest['peak_host_bytes'] / 1e9:.1f} / {plan['host_bytes'] / 1e9:.1f}",
                    f"{deepest['seconds_per_step'] / plan['step_seconds_at_measured_rates']:.2f}",
                    f"{whole['seconds_per_step']:.1f} ({whole['blocks']} blocks)",
                    identical if found["compared"] else "",
                ])  # fmt: skip
    header = [
        "shape, state", "ms per block and step", "× bare matmul", "TFLOP/s", "copies under kernels",
        "of deepest run: × resident", "device GB / planned", "host GB / planned", "seconds / planned",
        "seconds per step, extrapolated", "same bytes",
    ]  # fmt: skip
    return table(header, body) if body else "_Not measured on a GPU._"


def plan() -> str:
    """Memory and time of whole runs on a CPU against their plan."""
    found = load(RESULTS / "plan.json")
    if found is None:
        return MISSING
    body = []
    for name, case in found["cases"].items():
        phases = [phase["ratio"] for phase in case["phases"]]
        largest = max(phase["actual_bytes"] for phase in case["phases"])
        body.append([
            name,
            f"{case['batch_size']} x {case['seqlen']}",
            f"{largest / 1e6:.0f}",
            f"{case['peak_ratio']:.2f}",
            f"{min(phases):.2f}-{max(phases):.2f}",
            "" if case["step"] is None else f"{case['step']['actual']:.2f}",
            "" if case["step"] is None else f"{case['step']['ratio']:.2f}",
        ])  # fmt: skip
    header = ["run", "windows x tokens per step", "peak MB", "actual / planned", "of each phase"]
    return table([*header, "s per step", "actual / planned"], body)


def export() -> str:
    """What `discquant export` takes, and whether its memory grows with the model."""
    found = load(RESULTS / "export.json")
    if found is None:
        return MISSING
    by: dict[str, dict[str, dict[str, float]]] = {}
    for key, row in found["rows"].items():
        name, depth = key.split(", ")
        by.setdefault(name, {})[depth] = row
    depths = sorted(
        {depth for rows in by.values() for depth in rows}, key=lambda depth: int(depth.split()[0])
    )
    body = []
    for name, rows in by.items():
        last = rows.get(depths[-1], {})
        body.append([
            name,
            f"{last['cpu_seconds_per_gb']:.1f}" if last else "",
            *(f"{rows[depth]['peak_over_imports_bytes'] / 1e6:.0f}" if depth in rows else "" for depth in depths),
        ])  # fmt: skip
    some = [row for rows in by.values() for row in rows.values()]
    shard = max(row["largest_shard_bytes"] for row in some) / 1e6
    sizes = " and ".join(f"{size / 1e9:.2f}" for size in sorted({row["original_bytes"] for row in some}))
    header = ["format", "processor seconds per GB", *(f"peak MB, {depth}" for depth in depths)]
    note = f"One thread; originals of {sizes} GB in shards of at most {shard:.0f} MB; memory over that of the imports."
    return f"{table(header, body)}\n\n{note}"


def cpu_scale() -> str:
    """Cost of a streamed step by the number of blocks, on a CPU: state in host memory, and on disk."""
    files = [load(RESULTS / f"scale_{where}.json") for where in ("host", "disk")]
    measured = [found for found in files if found is not None]
    if not measured:
        return MISSING
    body, lines = [], []
    for found in measured:
        where = found["rows"][0]["placement"]
        for row in found["rows"]:
            peak = max(row["phases"], key=lambda phase: phase["peak_rss_bytes"])
            planned = row["planned_seconds_per_step"]
            body.append([
                where,
                str(row["blocks"]),
                f"{row['weights'] / 1e6:,.0f}",
                f"{row['cpu_seconds_per_step']:.1f}",
                "" if planned is None else f"{row['cpu_seconds_per_step'] / planned:.2f}",
                f"{row['state_bytes'] / 1e6:,.0f}",
                f"{peak['peak_rss_bytes'] / 1e6:,.0f}",
                f"{peak['peak_rss_bytes'] / peak['planned_bytes']:.2f}",
            ])  # fmt: skip
        fitted = found["cpu_seconds_line"]
        if fitted is not None:
            lines.append(
                f"On {where} a line through the seconds, {fitted['a']:.2f} + {fitted['per_block']:.2f} per block, is "
                f"off by {fitted['largest_residual']:.1%} at most; 80 blocks by it: {fitted['at_80']:,.0f} s."
            )
    header = [
        "placement", "blocks", "M weights", "processor seconds per step", "/ planned", "state MB", "peak resident MB",
        "/ planned",
    ]  # fmt: skip
    first = measured[0]
    note = (
        f"Llama 3.1 70B's shape with widths divided by {first['widths_divided_by']}, {first['tokens_per_step']} tokens "
        "per step, one thread. "
    )
    return f"{table(header, body)}\n\n{note}{' '.join(lines)}"


PARTS: dict[str, Callable[[], str]] = {
    "quickstart": quality.quickstart,
    "sweep": quality.sweep,
    "autoround": quality.autoround,
    "scales": quality.scales,
    "allocation": quality.allocation,
    "rotation": quality.rotation,
    "stories260k": quality.stories,
    "training": quality.training,
    "cpu-scale": cpu_scale,
    "export": export,
    "plan": plan,
    "resume": resume,
    "refine": quality.refine,
    "cpu": cpu,
    "gpu": gpu,
    "gpu-scale": gpu_scale,
}


def render(text: str) -> str:
    """Return the text with every generated part replaced.

    Raises:
        ValueError: A part is missing from the text.
    """
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, p=part: f"{m[1]}{p()}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"tables: README.md must hold the part {name} once, got {count}")
    return text


def main() -> int:
    """Rewrite, or with --check say whether a rewrite would change anything."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
