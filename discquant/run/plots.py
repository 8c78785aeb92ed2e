# SPDX-License-Identifier: Apache-2.0
"""Plots of a run, drawn with matplotlib's Agg backend: no display is needed and none is touched.

Each function takes plain data and a path, and returns whether there was anything to draw.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from discquant.config import AS_LAID

# One colour per method in every plot (Okabe and Ito: told apart by colour-blind eyes and in grey).
COLOURS = {
    "original": "#555555", "rtn": "#D55E00", "greedy": "#CC79A7", "gptq": "#009E73", "guided": "#56B4E9",
    "discquant": "#0072B2",
}  # fmt: skip
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F", "#B8A900")
NAMES = {
    "rtn": "RTN", "greedy": "greedy", "gptq": "GPTQ", "guided": "guided GPTQ",
    AS_LAID: "DiscQuant, scales as laid", "discquant": "DiscQuant",
    "original": "original",
}  # fmt: skip
_STYLE = {
    "figure.dpi": 140, "savefig.dpi": 140, "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#E3E3E3", "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8.5, "lines.linewidth": 1.7,
}  # fmt: skip


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        return importlib.import_module("matplotlib") is not None
    except ImportError:
        return False


def _draw(path: Path, size: tuple[float, float], paint: Callable[..., None], *, panels: int = 1) -> None:
    """Make a figure of `panels` axes side by side, let `paint` fill them, save it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
        paint(*axes)
        # No version or date in the file: the same run gives the same bytes.
        figure.savefig(path, format="png", metadata={"Software": None})


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}%"))


def _log(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis; 2 and 5 between the powers of ten where there are few of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """Three digits, large numbers written out."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _legend_below(axes: Any, columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns)


def draw_kl(
    path: Path,
    validation: Sequence[dict[str, Any]],
    final: dict[str, float],
    training: Sequence[dict[str, Any]] = (),
) -> bool:
    """KL over steps, before and after rounding, with the other methods as lines.

    Args:
        path: PNG to write.
        validation: Lines with step, kl_soft, kl_rounded (nats).
        final: Mean KL by method on all held-out windows.
        training: Lines with step and loss (of the solver's own batches, nats), drawn faintly.
    """
    if not validation and not training:
        return False
    losses = [line["loss"] for line in training]

    def paint(axes: Any) -> None:
        if training:
            axes.plot(
                [line["step"] for line in training], losses,
                color="#BBBBBB", linewidth=0.8, label="training batches, before rounding", zorder=1,
            )  # fmt: skip
        if validation:
            steps = [line["step"] for line in validation]
            axes.plot(steps, [line["kl_rounded"] for line in validation], color=COLOURS["discquant"], marker="o",
                      markersize=3.5, label="watched windows, after rounding", zorder=4)  # fmt: skip
            axes.plot(steps, [line["kl_soft"] for line in validation], color="#56B4E9", linestyle="--", marker="s",
                      markersize=3, label="watched windows, before rounding", zorder=3)  # fmt: skip
        for name, value in final.items():
            if name != "discquant" and value > 0:
                label = f"{NAMES.get(name, name)}: {value:.3g}"
                axes.axhline(
                    value, color=COLOURS.get(name, "#7F7F7F"), linestyle="-.", linewidth=1.2, label=label
                )
        if final.get("discquant", 0) > 0:
            axes.plot([], [], " ", label=f"DiscQuant at the end: {final['discquant']:.3g}")
        rounded = [
            value for value in (*(line["kl_rounded"] for line in validation), *final.values()) if value > 0
        ]
        others = [value for value in (*(line["kl_soft"] for line in validation), *losses) if value > 0]
        if rounded or others:
            axes.set_yscale("log")
            # A run that starts at the original's weights begins with a KL of next to nothing: not worth the decades.
            floor = min(rounded) / 8 if rounded else 0.0
            low, high = max(floor, min(rounded + others)), max(rounded + others)
            axes.set_ylim(low / 1.3, high * 1.3)
            _log(axes.yaxis, low, high)
        axes.set_xlabel("step")
        axes.set_ylabel("mean KL to the original, nats")
        axes.set_title("KL divergence before and after rounding")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    _draw(path, (8.2, 3.7), paint)
    return True


def draw_shares(path: Path, training: Sequence[dict[str, Any]]) -> bool:
    """Share of coordinates fractional, off the starting choice and at the clamp over steps; the schedule.

    Args:
        path: PNG to write.
        training: Lines with step, fractional, moved, saturated, lr, linear_weight, hardening.
    """
    if not training:
        return False
    steps = [line["step"] for line in training]

    def paint(shares: Any, schedule: Any) -> None:
        for key, label, colour in (
            ("fractional", "still fractional", COLOURS["discquant"]),
            ("saturated", "gradient at the clamp", "#E69F00"),
            ("moved", "off the starting choice", COLOURS["gptq"]),
        ):
            values = [line.get(key) for line in training]
            if any(value is not None for value in values):
                shares.plot(steps, values, label=label, color=colour)
        shares.set_ylim(bottom=0)
        _percent(shares.yaxis)
        shares.set_xlabel("step")
        shares.set_ylabel("share of coordinates that may move")
        shares.set_title("Coordinates over steps")
        _legend_below(shares, 3)
        # Each quantity against its own peak: their units differ, their shapes are what matters.
        for place, (key, label) in enumerate(
            (("lr", "learning rate"), ("linear_weight", "linear term"), ("hardening", "hardening"),
             ("kl_weight", "gain on the KL gradient"))
        ):  # fmt: skip
            numbers = [float(line.get(key) or 0.0) for line in training]
            peak = max(numbers)
            if peak > 0:
                schedule.plot(steps, [value / peak for value in numbers], label=f"{label}, peak {_short(peak)}",
                              color=SERIES[(place * 2 + 1) % len(SERIES)])  # fmt: skip
        schedule.set_ylim(0, 1.04)
        _percent(schedule.yaxis)
        schedule.set_xlabel("step")
        schedule.set_ylabel("of its peak")
        schedule.set_title("Schedule")
        _legend_below(schedule, 2)

    _draw(path, (9.6, 4.0), paint, panels=2)
    return True


def draw_histogram(path: Path, histogram: dict[str, Sequence[float]]) -> bool:
    """Histogram of `frac` at the start and at the end.

    Args:
        path: PNG to write.
        histogram: edges (bins + 1 values in [0, 1]), start and end (counts).
    """
    edges = list(histogram.get("edges", ()))
    series = [(key, list(histogram.get(key, ()))) for key in ("start", "end")]
    series = [(key, counts) for key, counts in series if len(counts) == len(edges) - 1 and sum(counts) > 0]
    if not series:
        return False
    smallest = min(count / sum(counts) for _, counts in series for count in counts if count)

    def paint(axes: Any) -> None:
        for key, counts in series:
            shares = [count / sum(counts) for count in counts]
            colour = "#E69F00" if key == "start" else COLOURS["discquant"]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.30 if key == "start" else 0.35)
            axes.stairs(shares, edges, color=colour, linewidth=1.4, label=f"{key} of the run")
        axes.set_yscale("log")
        axes.set_ylim(smallest / 2, 2)
        axes.set_xlim(edges[0], edges[-1])
        _percent(axes.yaxis)
        axes.set_xlabel("frac: 0 is the lower grid point, 1 the upper")
        axes.set_ylabel("share of coordinates")
        axes.set_title("Where the coordinates stand between their neighbours")
        axes.legend(loc="upper center")

    _draw(path, (6.6, 3.5), paint)
    return True


def moved_share(layer: dict[str, Any]) -> float:
    """Share of a layer's weights that were rounded away from nearest; counts are taken as counts."""
    weights = int(layer.get("weights") or 0)
    return float(layer.get("moved") or 0) / weights if weights else 0.0


def draw_moved(path: Path, layers: Sequence[dict[str, Any]]) -> bool:
    """Share of weights off nearest: one line per kind of layer over the blocks, bars where layers have no number.

    Args:
        path: PNG to write.
        layers: name, weights and moved (counts) of each layer in the model's order.
    """
    if not layers:
        return False
    kinds: dict[str, dict[int, float]] = {}
    for layer in layers:
        match = re.match(r"^(.*?)\.(\d+)\.(.+)$", layer["name"])
        if match is None:
            kinds = {}
            break
        kinds.setdefault(match[3], {})[int(match[2])] = moved_share(layer)
    numbered = bool(kinds) and len(kinds) <= len(SERIES) and max(len(places) for places in kinds.values()) > 1

    def lines(axes: Any) -> None:
        for place, (kind, values) in enumerate(kinds.items()):
            order = sorted(values)
            axes.plot(order, [values[block] for block in order], color=SERIES[place], marker="osD^vP*X"[place],
                      markersize=4.5, linewidth=1.2, label=kind)  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        _percent(axes.yaxis)
        axes.set_xlabel("block")
        axes.set_ylabel("share of the layer's weights")
        axes.set_title("Weights rounded away from nearest")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    def bars(axes: Any) -> None:
        places = range(len(layers))
        axes.barh(places, [moved_share(layer) for layer in layers], color=COLOURS["discquant"], height=0.75)
        axes.set_yticks(places, [layer["name"] for layer in layers], fontsize=7.5)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(y=0.01)
        _percent(axes.xaxis)
        axes.set_xlabel("share of the layer's weights")
        axes.set_title("Weights rounded away from nearest")

    if numbered:
        _draw(path, (8.2, 3.5), lines)
    else:
        _draw(path, (7.6, min(40.0, 1.2 + 0.19 * len(layers))), bars)
    return True


def draw_phases(path: Path, phases: Sequence[dict[str, Any]]) -> bool:
    """Wall time and peak resident memory of each phase.

    Args:
        path: PNG to write.
        phases: name, seconds and peak_rss_bytes, in the order they ran.
    """
    if not phases:
        return False
    names = [phase["name"] for phase in phases]
    places = range(len(names))

    def bars(axes: Any, values: list[float], colour: str, form: Callable[[float], str]) -> None:
        drawn = axes.barh(places, values, color=colour, height=0.66)
        axes.bar_label(drawn, [form(value) for value in values], padding=3, fontsize=8.5)
        axes.margins(x=0.17)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    def paint(time: Any, memory: Any) -> None:
        bars(
            time,
            [phase.get("seconds") or 0.0 for phase in phases],
            "#0072B2",
            lambda value: f"{value:,.1f} s",
        )
        time.set_xlabel("wall time, seconds")
        time.set_title("Time per phase")
        megabytes = [(phase.get("peak_rss_bytes") or 0) / 1e6 for phase in phases]
        bars(memory, megabytes, "#E69F00", lambda value: f"{value:,.0f} MB")
        memory.set_xlabel("peak resident memory, MB (1e6 bytes)")
        memory.set_title("Memory per phase")
        memory.tick_params(axis="y", labelleft=False)

    _draw(path, (9.6, 1.3 + 0.34 * len(names)), paint, panels=2)
    return True
