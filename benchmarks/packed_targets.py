# SPDX-License-Identifier: Apache-2.0
"""Targets of packed inference against measured rows: `python benchmarks/packed_targets.py [FILE.csv ...]`.

Takes the tables of processors, results/packed-*.csv, and those of GPUs; one line per target: met, MISSED, not measured.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]
RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = ("8B qkv", "8B o", "8B gate_up", "8B down")
IN_STREAMS = "read in four streams"
FASTER_THAN = ("torch int4", "onnxruntime", "ggml")


class Verdict(NamedTuple):
    """One target: the least favourable value among its rows, None where there are none."""

    what: str
    value: float | None
    limit: float
    at_most: bool = False
    where: str = ""

    def text(self) -> str:
        """One line."""
        sign = "<=" if self.at_most else ">="
        if self.value is None:
            return f"not measured  {self.what}: {sign} {self.limit:g}"
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        return f"{'met   ' if met else 'MISSED'}  {self.what}: {self.value:.2f} ({self.where}), {sign} {self.limit:g}"


def worst(what: str, found: Iterable[tuple[float, str]], limit: float, *, at_most: bool = False) -> Verdict:
    """The verdict of (value, where) pairs."""
    seen = sorted(found)
    if not seen:
        return Verdict(what, None, limit, at_most)
    value, where = seen[-1] if at_most else seen[0]
    return Verdict(what, value, limit, at_most, where)


def times_as_fast(row: Row, other: Row) -> float:
    """The other's time over the row's: the median of the turns' own ratios; of the first quartiles without turns."""
    mine, theirs = ([float(ms) for ms in (r.get("ms_turns") or "").split()] for r in (row, other))
    if mine and len(mine) == len(theirs):
        return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    return float(other["ms_p25"]) / float(row["ms_p25"])


def cpu(rows: list[Row]) -> Iterator[Verdict]:
    """The CPU targets per mode; single-thread rows, several threads beside them."""
    table = {
        (r["shape"], r["threads"], int(r["tokens"]), r["provider"], r["bits"]): r
        for r in rows
        if r["op"] == "packed_linear"
    }
    for threads in sorted({key[1] for key in table}):
        for mode in ("a8", "a15"):

            def ours(tokens: int, bits: str, mode: str = mode, threads: str = threads) -> Iterator[Row]:
                for shape in SHAPES:
                    row = table.get((shape, threads, tokens, f"discquant {mode}", bits))
                    if row is not None:
                        yield row

            head = f"{mode}, {threads} thread{'s' if threads != '1' else ''}"
            shares = [(float(r["share_of_roof"]), r["shape"]) for r in ours(1, "4")]
            yield worst(f"{head}: M=1, 4 bit, share of plain read", shares, 0.85)
            gains = [
                (times_as_fast(three, four), four["shape"])
                for three in ours(1, "3")
                for four in ours(1, "4")
                if three["shape"] == four["shape"]
            ]
            yield worst(f"{head}: M=1, weights/s of 3 bit over 4 bit", gains, 1.2)
            for tokens, limit in ((1, 1.5), (4, 3.0), (16, 3.0)):
                times = [
                    (float(r["times_torch_int4"]), r["shape"])
                    for r in ours(tokens, "4")
                    if r.get("times_torch_int4")
                ]
                yield worst(f"{head}: M={tokens}, 4 bit, times torch int4", times, limit)
            for rival in FASTER_THAN[1:]:
                faster = [
                    (times_as_fast(r, other), f"{r['shape']}, {name}")
                    for r in ours(1, "4")
                    for (shape, count, tokens, name, bits), other in table.items()
                    if (shape, count, tokens, bits) == (r["shape"], threads, 1, "4")
                    and name.startswith(rival)
                ]
                yield worst(f"{head}: M=1, 4 bit, times {rival}", faster, 1.0)


def reading(rows: list[Row], tokens: int) -> dict[str, float]:
    """How many times as fast as torch's int4 matmul the plain read of the same weight is, the least, per threads."""
    found: dict[str, float] = {}
    here = [
        r for r in rows if r["op"] == "packed_linear" and r["tokens"] == str(tokens) and r["shape"] in SHAPES
    ]
    for rival in (r for r in here if r["provider"] == "torch int4"):
        place = (rival["shape"], rival["threads"])
        reads = [
            r for r in here if (r["shape"], r["threads"]) == place and r["provider"].startswith("plain read")
        ]
        if reads:
            best = max(times_as_fast(read, rival) for read in reads)
            found[rival["threads"]] = min(best, found.get(rival["threads"], best))
    return found


def streamed(rows: list[Row]) -> dict[str, dict[str, float]]:
    """The most that a read in four streams gains over the faster plain one, and the least of it that one token reaches.

    Per threads ``{"read": times as fast, "a8": share, "a15": share}``, at 4 bits; empty without such reads.
    """
    found: dict[str, dict[str, float]] = {}
    here = [r for r in rows if r["op"] == "packed_linear" and r["tokens"] == "1" and r["shape"] in SHAPES]
    for read in (r for r in here if r["provider"] == IN_STREAMS):
        of_threads = found.setdefault(read["threads"], {})
        place = [r for r in here if (r["shape"], r["threads"]) == (read["shape"], read["threads"])]
        gain = min(times_as_fast(read, r) for r in place if r["provider"].startswith("plain read"))
        of_threads["read"] = max(gain, of_threads.get("read", gain))
        for mode in ("a8", "a15"):
            for row in (r for r in place if (r["provider"], r["bits"]) == (f"discquant {mode}", "4")):
                share = times_as_fast(row, read)  # of as many bytes, but for a page
                of_threads[mode] = min(share, of_threads.get(mode, share))
    return found


def gpu(rows: list[Row]) -> Iterator[Verdict]:
    """The GPU targets; rows as benchmarks/packed_gpu.py writes them."""
    table = {(r["shape"], r["provider"], r["mode"]): r for r in rows if r["op"] == "packed_linear"}

    def ours(shape: str, tokens: Iterable[int], bits: int) -> Iterator[tuple[int, Row]]:
        for m in tokens:
            row = table.get((f"{shape} M={m}", "discquant", f"{bits} bit"))
            if row is not None:
                yield m, row

    for shape, limit in (("70B gate_up", 0.75), ("8B gate_up", 0.6), ("8B qkv", 0.45), ("8B o", 0.45)):
        shares = [(float(r["share_of_copy"]), f"M={m}") for m, r in ours(shape, (1, 4, 16), 4)]
        yield worst(f"decode, {shape}: share of a copy", shares, limit)
    ratios = [
        (float(three["ms_p50"]) / float(four["ms_p50"]), f"{shape}, M={m}")
        for shape in ("8B gate_up", "70B gate_up")
        for m, three in ours(shape, (1, 4, 16), 3)
        for same, four in ours(shape, (1, 4, 16), 4)
        if same == m
    ]
    yield worst("decode, time of 3 bit over 4 bit on layers from 60 MB", ratios, 0.8, at_most=True)
    rivals = [
        (float(other["ms_p50"]) / float(r["ms_p50"]), f"{shape}, M={m}, {provider}")
        for shape in (*SHAPES, "70B gate_up")
        for m, r in ours(shape, (1, 4, 16), 4)
        for (place, provider, mode), other in table.items()
        if place == f"{shape} M={m}" and mode == "4 bit" and not provider.startswith("discquant")
    ]
    yield worst("decode, times the fastest baseline that ran", rivals, 1.0)
    for tokens, limit in (((256, 1024), 0.8), ((2048,), 0.9)):
        shares = [
            (1 / float(r["times_bare_matmul"]), f"{shape}, M={m}, {bits} bit")
            for shape in (*SHAPES, "70B gate_up")
            for bits in (3, 4)
            for m, r in ours(shape, tokens, bits)
            if r["times_bare_matmul"]
        ]
        yield worst(f"prefill, M={tokens[0]} on: times cuBLAS bf16", shares, limit)


def verdicts(path: Path) -> list[Verdict]:
    """All targets that a table can answer."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list(cpu(rows) if rows and "share_of_roof" in rows[0] else gpu(rows))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("packed-*.csv")))
    for path in parser.parse_args().files:
        print(path.name)
        for verdict in verdicts(path):
            print(f"  {verdict.text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
