# SPDX-License-Identifier: Apache-2.0
"""`python tests/interop`: real tools read what discquant writes, and discquant refines what real tools write.

Writes benchmarks/results/interop.json after each row and docs/interop.md from it. A finished row is kept while its
inputs are the same; the same command continues.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import sys
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# The tests and this driver measure agreement, not speed; one thread keeps the machine usable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import environments
import table
import torch
from cases import ROOT, Workshop
from rows import CONSUMERS, PRODUCERS, Consumer, Producer
from runner import Runner, public, timed

RESULT = ROOT / "benchmarks" / "results" / "interop.json"
DOCUMENT = ROOT / "docs" / "interop.md"
WORK = ROOT / "runs" / "interop"


def _load() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"rows": {}}


def _store(name: str, row: dict[str, Any]) -> None:
    """Put one row into both files, rows in the order of rows.py; several drivers may run side by side."""
    order = {known.name: index for index, known in enumerate((*CONSUMERS, *PRODUCERS))}
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = _load()
        results["machine"] = {"cpu": _cpu(), "python": platform.python_version(), "torch": torch.__version__}
        kept = {key: value for key, value in {**results["rows"], name: row}.items() if key in order}
        results["rows"] = dict(sorted(kept.items(), key=lambda entry: order[entry[0]]))
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (RESULT, json.dumps(results, indent=1) + "\n"),
            (DOCUMENT, table.document(results)),
        ):
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)


def _describe(row: Consumer | Producer) -> dict[str, Any]:
    if isinstance(row, Consumer):
        return {"kind": "consumer", "tool": row.tool, "case": row.case, "format": row.format}
    tool = row.maker or row.tool
    return {"kind": "refine", "tool": tool, "label": row.label, "format": row.format, "bits": row.bits}


def _one(runner: Runner, row: Consumer | Producer, again: bool, limit: float) -> bool:
    """Make a row unless it is there; whether it is as it must be."""
    known = _load()["rows"].get(row.name, {})
    tools = [row.tool] if isinstance(row, Consumer) else [row.tool, row.decoder[0]]

    def make() -> dict[str, Any]:
        for tool in tools:
            environments.build(tool, WORK / "build", limit)
        key = runner.key(row)
        if not again and known.get("ok") and known.get("key") == key:
            return known
        made = runner.consume(row) if isinstance(row, Consumer) else runner.refine(row)
        return {**made, "key": key}

    made = timed(make)
    if "made" not in made:
        made["made"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    else:
        made["seconds"] = known["seconds"]
    _store(row.name, {**_describe(row), **made})
    print(f"{'ok ' if made['ok'] else 'NO '} {row.name}  {made.get('message', '')}", flush=True)
    return bool(made["ok"])


def main() -> int:
    """Run the chosen rows; the exit status says whether all of them are as they must be."""
    parser = argparse.ArgumentParser(prog="python tests/interop", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="patterns of row names, e.g. 'gguf*' 'refine*'"
    )
    parser.add_argument("--again", action="store_true", help="repeat rows that are finished")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--build", nargs="*", help="only build these environments (all without names)")
    parser.add_argument("--produce", action="store_true", help="only make the tools' own files, for refine")
    parser.add_argument("--build-limit", type=float, default=7200, help="seconds for one environment")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for row in (*CONSUMERS, *PRODUCERS)
        if any(fnmatch(row.name, f"*{pattern}*") for pattern in arguments.only)
    ]
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return 0
    if arguments.build is not None:
        return _build(arguments.build or environments.TOOLS, arguments.build_limit)
    runner = Runner(Workshop(WORK))
    if arguments.produce:
        return _produce(runner, [row for row in rows if isinstance(row, Producer)], arguments.build_limit)
    failed = [row for row in rows if not _one(runner, row, arguments.again, arguments.build_limit)]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} rows as they must be; table: {DOCUMENT.relative_to(ROOT)}"
    )
    return 1 if failed else 0


def _build(tools: tuple[str, ...] | list[str], limit: float) -> int:
    failed = 0
    for tool in tools:
        try:
            environments.build(tool, WORK / "build", limit)
            print(f"ok  {tool}", flush=True)
        except environments.EnvironmentFailedError as error:
            failed += 1
            print(f"NO  {tool}: {public(str(error))}", flush=True)
    return 1 if failed else 0


def _produce(runner: Runner, rows: list[Producer], limit: float) -> int:
    failed = 0
    for row in rows:
        try:
            environments.build(row.tool, WORK / "build", limit)
            print(f"ok  {runner.produced(row).relative_to(ROOT)}", flush=True)
        except Exception as error:  # one tool's failure must not keep the others from working
            failed += 1
            print(f"NO  {row.name}: {public(str(error))}", flush=True)
    return 1 if failed else 0


def _cpu() -> str:
    """The processor's name without what identifies a machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


if __name__ == "__main__":
    sys.exit(main())
