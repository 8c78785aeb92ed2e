# SPDX-License-Identifier: Apache-2.0
"""What a finished run says about itself: divergences of every method, layers, sizes, histogram of `frac`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discquant.calibration import Windows
from discquant.config import AS_LAID, GridRules
from discquant.evaluation.divergence import compare_models
from discquant.formats.bits import bits_per_weight, grid_bits
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.source import pickled_files
from discquant.grids import Grid
from discquant.run.directory import RunDirectory
from discquant.run.served import apply_layers
from discquant.run.work import Codes, Work
from discquant.solver.chain import Chain
from discquant.solver.measure import mean_kl
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve

START = "start.json"
BINS = 50


def coded_layers(codes: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> Iterator[CodedLayer]:
    """Join codes with their grids, in the order of the codes."""
    for name, q in codes.items():
        yield CodedLayer(name, q, grids[name])


def frac_histogram(solve: Solve) -> list[int]:
    """Count the coordinates that may move by `frac`, in equal bins over [0, 1]."""
    total = torch.zeros(BINS, dtype=torch.int64)
    for block in solve.solver.states:
        for state in block:
            total += torch.histc(state.position()[state.live()].cpu(), BINS, 0.0, 1.0).long()
    return [int(count) for count in total]


def layer_table(
    chain: Chain, grids: Mapping[str, Grid], codes: Mapping[str, Tensor], frozen: Container[str] = ()
) -> list[dict[str, Any]]:
    """Count per layer the weights, those that may move, and those whose code is not the nearest.

    Args:
        chain: The original model.
        grids: Grid of every weight.
        codes: Codes of every weight.
        frozen: Names of weights that the solve kept at nearest (experts that no token reached); none of theirs may
            move, and elsewhere those between two grid points may.
    """
    table = []
    for refs in chain.weights:
        for ref in refs:
            grid = grids[ref.name]
            q_down, frac_ref = grid.neighbours(ref.matrix().cpu())
            live = (frac_ref != 0) & (frac_ref != 1)
            nearest = q_down + (frac_ref > 0.5).to(torch.uint8)
            table.append(
                {
                    "name": ref.name,
                    "weights": q_down.numel(),
                    "live": 0 if ref.name in frozen else int(live.sum()),
                    "moved": int((codes[ref.name] != nearest).sum()),
                    "bits": grid.num_bits,
                    "columns": q_down.shape[1],
                }
            )
    return table


def beaten(summary: Mapping[str, Any]) -> str | None:
    """Say which baseline has a lower KL than the run's own method, if one has: few steps or little text, mostly."""
    kl = {name: found["kl_mean"] for name, found in summary["methods"].items()}
    # None: not finite.
    ranked = {name: math.inf if value is None else value for name, value in kl.items()}
    method, best = summary["method"], min(ranked, key=lambda name: ranked[name])
    if ranked[best] >= ranked[method]:
        return None
    own = "one that is not finite" if kl[method] is None else f"{kl[method]:.4f}"
    advice = ": more steps (--iters) and text (--nsamples) lower it" if method == "discquant" else ""
    return f"{best} has the lower KL on held-out text, {kl[best]:.4f}; {method} has {own}{advice}"


def summarize_run(
    directory: RunDirectory,
    work: Work,
    served_grids: Mapping[str, Grid],
    codes: Codes,
    baselines: Mapping[str, Codes],
    solve: Solve | None,
) -> dict[str, Any]:
    """Measure the run's codes and its baselines on the held-out windows and collect what the report shows.

    Args:
        directory: The run.
        work: The original, its grids and the windows.
        served_grids: Those that the final codes are served on: as they were laid, unless their scales have moved.
        codes: Final codes.
        baselines: Codes of other methods on the grids as they were laid.
        solve: The solve, if the method was DiscQuant.

    Returns:
        The summary, plain data; the exporter adds the sizes of what it wrote, and bits per weight as they are there.
    """
    config = directory.config()["identity"]["config"]
    method, grid_of = config["method"], GridRules.of_dict(config)
    source, grids, held = work.source, work.grids, work.held
    measured = {}
    # One candidate at a time: a copy of the model each.
    candidates = {name: (found, grids) for name, found in baselines.items()}
    if solve is not None and solve.config.solver.scale_iters:
        candidates[AS_LAID] = (codes, grids)
    for name, (found, laid) in {**candidates, method: (codes, served_grids)}.items():
        candidate = apply_layers(copy.deepcopy(source.model), coded_layers(found, laid), work.served)
        measured[name] = compare_models(source.model, {name: candidate}, held)[name].to_dict()
        del candidate
    summary: dict[str, Any] = {
        "method": method,
        "methods": measured,
        "held_out": {"windows": len(held), "tokens": held.tokens, "source": held.source},
        "layers": layer_table(work.chain, grids, codes, frozenset() if solve is None else solve.unseen),
        "sizes": {
            "original_bytes": original_bytes(source.path),
            "packed_bytes": None,
            "bits_per_weight": bits_per_weight(
                (grid_bits(layer.grid, shape, grid_of(layer.name).kind), shape)
                for layer in coded_layers(codes, grids)
                for shape in [(layer.q.shape[0], layer.q.shape[1])]
            ),
        },
    }
    if solve is not None:
        edges = [index / BINS for index in range(BINS + 1)]
        start = json.loads((directory.path / START).read_text(encoding="utf-8"))["histogram"]
        summary["frac_histogram"] = {"edges": edges, "start": start, "end": frac_histogram(solve)}
        summary["state_bytes_per_weight"] = _state_bytes(solve)
        summary["kl_before_rounding"] = _soft_kl(solve, held)
        if solve.unseen:
            summary["experts_unseen"] = sorted(solve.unseen)
    return summary


def original_bytes(folder: Path) -> int:
    """Return the bytes of the weight files that were read; the same weights may lie there in another layout, too."""
    files = set(pickled_files(folder)) or {info.file for info in Checkpoint(folder).tensors.values()}
    return sum(file.stat().st_size for file in files)


def weight_bytes(path: Path) -> int:
    """Return the bytes of all weight files of an exported model, a folder or one file."""
    if path.is_file():
        return path.stat().st_size
    kinds = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data")
    return sum(file.stat().st_size for kind in kinds for file in path.glob(kind))


def _state_bytes(solve: Solve) -> float:
    states = [state for block in solve.solver.states for state in block]
    return sum(s.nbytes for s in states) / sum(s.shape[0] * s.shape[1] for s in states)


def _soft_kl(solve: Solve, held: Windows) -> float:
    """KL on the held-out windows with `frac` as it stands, before the last rounding."""
    rows = TokenRows(solve.chain, held.input_ids, held.mask, solve.config.solver.micro_batch)
    return mean_kl(solve.chain, solve.solver.student, rows.batches(range(len(rows))))
