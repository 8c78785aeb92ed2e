# SPDX-License-Identifier: Apache-2.0
"""Bar charts from the measurement tables: `python benchmarks/plot.py [results/<device>.csv ...]`, one per op.

The last row of each (op, provider, mode, shape) counts; nothing is typed in by hand.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NEEDED = {"op", "provider", "mode", "shape", "ms_p50"}


def latest(path: Path) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """op -> (mode, shape) -> provider -> median milliseconds."""
    found: dict[str, dict[tuple[str, str], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open() as file:
        reader = csv.DictReader(file)
        if not set(reader.fieldnames or ()) >= NEEDED:
            print(f"{path.name}: skipped, it is no table of the harness")
            return {}
        for row in reader:
            if row.get("ms_p50"):
                found[row["op"]][(row["mode"], row["shape"])][row["provider"]] = float(row["ms_p50"])
    return found


def draw(path: Path) -> list[Path]:
    """One figure per op."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for op, groups in latest(path).items():
        figure, axes = plt.subplots(figsize=(8, 0.6 + 0.16 * sum(len(g) + 1.5 for g in groups.values())))
        place, ticks, labels = 0.0, [], []
        for (mode, shape), providers in sorted(groups.items()):
            for provider, value in sorted(providers.items(), key=lambda item: item[1]):
                axes.barh(
                    place, value, color="C0" if provider.startswith(("triton", "cpp")) else "C7", height=0.8
                )
                ticks.append(place)
                labels.append(f"{mode} {shape} {provider}")
                place += 1
            place += 0.5
        axes.set_yticks(ticks, labels, fontsize=6)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds, median")
        axes.set_title(f"{op} on {path.stem}", fontsize=9)
        figure.tight_layout()
        target = path.with_name(f"{path.stem}-{op}.png")
        figure.savefig(target, dpi=120)
        plt.close(figure)
        written.append(target)
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the measurement tables.")
    parser.add_argument("tables", nargs="*", type=Path)
    options = parser.parse_args()
    for path in options.tables or sorted(RESULTS.glob("*.csv")):
        for target in draw(path):
            print(target.name)


if __name__ == "__main__":
    main()
