# SPDX-License-Identifier: Apache-2.0
"""Rows of `evaluate` as tables for the terminal, whole at any width: one column per candidate, split where needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LINES = (
    ("KL mean", "kl_mean", ".4g"), ("  standard error", "kl_stderr", ".1g"), ("KL median", "kl_median", ".3g"),
    ("KL 99 %", "kl_p99", ".3g"), ("KL 99.9 %", "kl_p999", ".3g"), ("KL max", "kl_max", ".3g"),
    ("top-1 agreement", "top1", ".2%"), ("perplexity", "perplexity", ".4g"),
    ("  ratio to the original", "perplexity_ratio", ".4f"), ("exact answers", "exact_match", ".1%"),
    ("bits per weight", "bits_per_weight", ".3f"), ("non-finite positions", "nonfinite", ",d"),
)  # fmt: skip
ORIGINAL = {"perplexity": "perplexity_original", "exact_match": "exact_match_original"}
NAME = 18  # longer names of candidates are broken into lines
BORDER = 3  # of a column: a line and two blanks


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell it from the others; equal paths are numbered."""
    parts = [Path(path).parts for path in paths]
    names = []
    for place, own in enumerate(parts):
        others = [other for index, other in enumerate(parts) if index != place and other != own]
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        number = parts[: place + 1].count(own)
        names.append("/".join(own[-depth:]) + (f" ({number})" if parts.count(own) > 1 else ""))
    return names


class _Comparison:
    """Rows of `evaluate` for a `rich` console: one column per candidate, in as many tables as its width asks for."""

    def __init__(self, rows: Sequence[dict[str, Any]], title: str | None) -> None:
        first = rows[0] if rows else {}
        self.title = title
        self.caption = (
            f"KL(original || candidate) in nats over {first.get('tokens', 0):,} positions of "
            f"{first.get('dataset', '')}"
        )
        self.headings, self.original = [""], ["original"]
        self.columns = [[name] for name in short_names([str(row["path"]) for row in rows])]
        for heading, key, form in LINES:
            values = [row.get(key) for row in rows]
            # Nothing to say: no problems were asked, or every position is finite.
            if (key == "nonfinite" and not any(values)) or all(value is None for value in values):
                continue
            reference = first.get(ORIGINAL[key]) if key in ORIGINAL else None
            self.headings.append(heading)
            self.original.append("" if reference is None else format(reference, form))
            for column, value in zip(self.columns, values, strict=True):
                column.append("-" if value is None else format(value, form))

    def _width(self, column: list[str]) -> int:
        """Of a candidate's column: its values stay whole, its name is broken where it must."""
        return max(min(len(column[0]), NAME), *(len(value) for value in column[1:]), 0)

    def _groups(self, width: int) -> list[list[list[str]]]:
        """Columns that fit into one table each; at least one."""
        fixed = 1 + sum(max(map(len, column)) + BORDER for column in (self.headings, self.original))
        groups: list[list[list[str]]] = [[]]
        used = fixed
        for column in self.columns:
            wanted = self._width(column) + BORDER
            if groups[-1] and used + wanted > width:
                groups.append([])
                used = fixed
            groups[-1].append(column)
            used += wanted
        return groups

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text  # paths are no markup

        groups = self._groups(options.max_width)
        for place, group in enumerate(groups):
            last = place == len(groups) - 1
            result = Table(title=None if place else self.title, caption=Text(self.caption) if last else None)
            result.add_column("", overflow="fold")
            result.add_column("original", justify="right", overflow="fold")
            for column in group:
                result.add_column(
                    Text(column[0]), justify="right", overflow="fold", max_width=self._width(column)
                )
            for cells in list(zip(self.headings, self.original, *group, strict=True))[1:]:
                result.add_row(*cells)
            yield result


def table(rows: Sequence[dict[str, Any]], *, title: str | None = None) -> Any:
    """Rows of `evaluate`, one column per candidate, to print with a `rich` console.

    What is wider than the console goes on in a further table below, with the same headings.
    """
    return _Comparison(rows, title)


def print_table(rows: Sequence[dict[str, Any]], *, title: str | None = None) -> None:
    """Print rows of `evaluate` to the terminal."""
    from rich.console import Console

    Console().print(table(rows, title=title))
