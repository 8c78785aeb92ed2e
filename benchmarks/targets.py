# SPDX-License-Identifier: Apache-2.0
"""Compare measured rows with the target table: `python benchmarks/targets.py [results/<device>.csv]`.

Prints one line per target: met, missed, or not measured on a GPU. The last row of each provider, mode and shape counts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]
SCRATCH_LIMIT = 1.2e9
TRAFFIC_LIMIT = 24.0
GRADIENT_BYTES = 4.0  # of that the matmul writes, per weight


class Verdict(NamedTuple):
    """One line of the table; `value` None means that its rows are missing."""

    what: str
    value: float | None
    limit: float
    at_most: bool
    note: str = ""

    def text(self) -> str:
        """One line."""
        sign = "<=" if self.at_most else ">="
        if self.value is None:
            return f"not measured on a GPU  {self.what}: {sign} {self.limit:g}"
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        extra = f" ({self.note})" if self.note else ""
        return f"{'met   ' if met else 'MISSED'}  {self.what}: {self.value:.3g}, target {sign} {self.limit:g}{extra}"


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each (op, provider, mode, shape, dtype)."""
    kept = {tuple(row[key] for key in ("op", "provider", "mode", "shape", "dtype")): row for row in rows}
    return list(kept.values())


def older_rows(rows: list[Row]) -> dict[str, str]:
    """Ops whose newest row of ours is of an earlier day than the file's last row, with that day."""
    newest: dict[str, str] = {}
    for row in rows:
        if row["provider"].startswith(("triton", "discquant")):
            newest[row["op"]] = max(row["date"], newest.get(row["op"], ""))
    return {op: date for op, date in newest.items() if date < rows[-1]["date"]}


def _number(row: Row, field: str) -> float | None:
    return float(row[field]) if row.get(field) else None


def _worst(
    rows: Iterable[Row], value: Callable[[Row], float | None], at_most: bool
) -> tuple[float | None, str]:
    """The least favourable value and where it was seen."""
    seen = [
        (v, f"{row['provider']} {row['mode']} {row['shape']}")
        for row in rows
        if (v := value(row)) is not None
    ]
    if not seen:
        return None, ""
    return max(seen) if at_most else min(seen)


def effective_traffic(row: Row) -> float | None:
    """Bytes per weight that the time of a step's elementwise part would move at a copy's speed.

    And those of the gradient that its matmul writes: the row finds it ready.
    `gb_s` and `share_of_copy` of the row give the copy's speed; `shape` is "<n> weights".
    """
    share, ms, speed = (_number(row, f) for f in ("share_of_copy", "ms_p50", "gb_s"))
    if ms is None or speed is None or not share:
        return None
    return ms * 1e-3 * (speed / share) * 1e9 / float(row["shape"].split()[0]) + GRADIENT_BYTES


def _soft_linear(rows: list[Row]) -> list[Verdict]:
    found = []
    for mode in ("forward", "dx"):
        at = [r for r in rows if r["op"] == "soft_linear" and r["mode"] == mode
              and int(r["shape"].split("x")[0]) >= 4096]  # fmt: skip
        shapes = sorted({r["shape"] for r in at})

        def share(provider: str, shape: str, at: list[Row] = at) -> float | None:
            ratios = [
                ratio for r in at
                if r["shape"] == shape and r["provider"].startswith(provider)
                and (ratio := _number(r, "times_bare_matmul"))
            ]  # fmt: skip
            return 1 / min(ratios) if ratios else None

        fused = [(v, s) for s in shapes if (v := share("triton-fused", s)) is not None]
        auto = [(v, s) for s in shapes if (v := share("triton-auto", s)) is not None]
        least, where = min(fused) if fused else (None, "")
        found.append(
            Verdict(f"soft_linear fused {mode}, 4k to 16k tokens, share of cuBLAS", least, 0.85, False, where)
        )
        if least is None or least < 0.85:
            least, where = min(auto) if auto else (None, "")
            found.append(Verdict(f"soft_linear auto {mode} where fused falls short, share of cuBLAS", least, 0.95,
                                 False, where))  # fmt: skip
    return found


def materialised_bound(rows: list[Row], tokens: int) -> float | None:
    """The share of cuBLAS that is left where the weight is first written once at the speed of a copy.

    Of 4-bit codes and 8-bit positions, so 1.5 bytes read and 2 written per weight; the copy is the one beside which
    soft_weight was measured. The least over the shapes with so many tokens, None without rows.
    """
    rows = latest(rows)
    copies = [
        gb_s / share
        for r in rows
        if r["op"] == "soft_weight"
        and (gb_s := _number(r, "gb_s"))
        and (share := _number(r, "share_of_copy"))
    ]
    found = []
    for row in rows:
        ratio, ms = _number(row, "times_bare_matmul"), _number(row, "ms_p50")
        here = (row["op"], row["provider"], row["mode"]) == ("soft_linear", "triton-materialise", "forward")
        if here and copies and ratio and ms and row["shape"].startswith(f"{tokens}x"):
            _, n, k = map(int, row["shape"].split("x"))
            bare = ms / ratio
            found.append(bare / (bare + 3.5 * n * k / max(copies) / 1e6))
    return min(found, default=None)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """All targets, from rows of one device."""
    rows = latest(rows)
    step = [r for r in rows if r["op"] == "solver_step" and r["provider"] == "triton"]
    long = [r for r in step if r["shape"].startswith("16384 ")]
    alone = [r for r in step if r["mode"] == "lion, elementwise"]
    traffic, _ = _worst(alone, effective_traffic, True)
    ratio, where = _worst(long, lambda r: _number(r, "times_bare_matmul"), True)
    projected = [r for r in rows if r["op"] == "projected_step" and r["provider"] == "triton"]
    share, slowest = _worst(projected, lambda r: _number(r, "share_of_copy"), False)
    kl = [
        r
        for r in rows
        if r["op"] == "linear_kl" and r["provider"] == "triton" and r["shape"] == "16384x4096x128256"
    ]
    # The gradient is an output of the size of the student's hidden states, in bfloat16.
    scratch, _ = _worst(kl, lambda r: None if (m := _number(r, "peak_mib")) is None else m * 2**20 - 2 * 16384 * 4096,
                        True)  # fmt: skip
    kl_ratio, _ = _worst(kl, lambda r: _number(r, "times_bare_matmul"), True)
    return [
        Verdict("solver step, bytes per weight outside the matmuls at copy speed", traffic, TRAFFIC_LIMIT, True,
                "23.6 calculated"),
        Verdict("solver step, 16k tokens, times the bare matmuls", ratio, 1.10, True, where),
        *_soft_linear(rows),
        Verdict("projected_step_, share of copy bandwidth", share, 0.85, False, slowest),
        Verdict("linear_kl 16k x 4096 x 128256, scratch bytes", scratch, SCRATCH_LIMIT, True),
        Verdict("linear_kl 16k x 4096 x 128256, times its bare matmuls", kl_ratio, 1.15, True),
    ]  # fmt: skip


def main() -> int:
    """Command line; always 0, a missed target is a finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", type=Path, help="results/<device>.csv; default this machine's")
    path = parser.parse_args().table
    if path is None:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from harness import result_file

        path = result_file()
    rows: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    if rows:
        print(f"{rows[-1]['device']}, {rows[-1]['date']}, commit {rows[-1]['commit']}")
    for verdict in verdicts(rows):
        print(verdict.text())
    for op, date in older_rows(rows).items() if rows else ():
        print(f"rows of {op} are of {date}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
