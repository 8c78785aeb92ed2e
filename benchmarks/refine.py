# SPDX-License-Identifier: Apache-2.0
"""Refine quantized files of the bundled model: `python benchmarks/refine.py [CASE ...] [--file NAME=PATH ...]`.

Writes benchmarks/results/refine.json after every file and continues from it. Files of other tools come in by --file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from discquant import environment
from discquant.calibration import load_windows
from discquant.config import DataConfig, GridConfig, Method, QuantizeConfig, SolverConfig
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.formats.source import open_source
from discquant.run.refine import RefinePipeline
from discquant.run.served import served_dtype
from discquant.solver.chain import DecoderChain
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.rows import TokenRows
from discquant.solver.solve import lay_grids

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "refine.json"
MODEL = ROOT / "examples" / "tiny_llama"
# Name -> format, grid, how its codes are made. The bar: KL after / KL before, by bits.
CASES: dict[str, tuple[str, GridConfig, Method]] = {
    "gptq-3bit": ("gptq", GridConfig(3, 128, True, "absmax"), "gptq"),
    "gptq-4bit": ("gptq", GridConfig(4, 128, True, "absmax"), "gptq"),
    "autoround-3bit": ("autoround", GridConfig(3, 128, True), "gptq"),
    "q4_0": ("gguf", GridConfig.of_kind("q4_0"), "rtn"),
    "q4_k": ("gguf", GridConfig.of_kind("q4_k"), "rtn"),
    "q3_k": ("gguf", GridConfig.of_kind("q3_k"), "rtn"),
    "q2_k": ("gguf", GridConfig.of_kind("q2_k"), "rtn"),
    "q6_k": ("gguf", GridConfig.of_kind("q6_k"), "rtn"),
}
BARS = {2: 0.5, 3: 0.5, 4: 0.7, 6: 0.9}


def make_file(case: str, folder: Path, dataset: str, windows: int) -> Path:
    """Write the file that a case refines."""
    name, grid, method = CASES[case]
    source = open_source(MODEL, dtype=torch.float32)
    chain = DecoderChain(source.model)
    grids = lay_grids(chain, grid)
    # Another seed than the run's: what made the file saw other text.
    text = load_windows(
        dataset, source.tokenizer, nsamples=windows, seqlen=256, seed=1000, model=source.model
    )
    rows = TokenRows(chain, text.input_ids, text.mask, 8)
    codes = layerwise_codes(
        chain, grids, rows.batches(range(windows)), method, damp=0.05, served=served_dtype(source.config)
    )
    layers = [CodedLayer(layer, q, grids[layer]) for layer, q in codes.items()]
    target = folder / name
    registry.by_name(name).write(Checkpoint(MODEL), target, layers)
    files = sorted(target.glob("*.gguf")) if target.is_dir() else []
    return files[0] if files else target


def measure(file: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Refine one file; return its row."""
    config = QuantizeConfig(
        solver=SolverConfig(iters=options.iters, batch_size=options.batch_size),
        data=DataConfig(options.dataset, options.nsamples, 256),
        baselines=(),
        seed=options.seed,
    )
    begin = time.perf_counter()
    pipeline = RefinePipeline(file, out, MODEL, config)
    summary = pipeline.execute()
    found = summary["refine"]
    bits = pipeline.config.grid.bits
    diff = summary.get("byte_diff") or {}
    return {
        "format": found["format"],
        "bits": bits,
        "kl_before": found["kl_before"],
        "kl_after": summary["methods"]["discquant"]["kl_mean"],
        "ratio": summary["methods"]["discquant"]["kl_mean"] / found["kl_before"],
        "bar": BARS.get(bits),
        "improved": found["improved"],
        "start": found["start"],
        "top1_before": summary["methods"]["file"]["top1"],
        "top1_after": summary["methods"]["discquant"]["top1"],
        "codes": found["codes"],
        "codes_outside_neighbours": found["codes_outside_neighbours"],
        "bytes_changed": diff.get("changed"),
        "bytes_changed_outside_codes": diff.get("outside"),
        "heldout_tokens": summary["held_out"]["tokens"],
        "iters": options.iters,
        "nsamples": options.nsamples,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """Measure the named cases that are not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument(
        "--file", action="append", default=[], help="NAME=PATH of a file made by another tool"
    )
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--nsamples", type=int, default=2048)
    parser.add_argument("--iters", type=int, default=SolverConfig().iters)
    parser.add_argument("--batch-size", type=int, default=SolverConfig().batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure rows that are there already too")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if RESULT.exists():
        rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    given = dict(text.partition("=")[::2] for text in options.file)
    wanted = options.cases or ([] if given else list(CASES))
    for case in [*wanted, *given]:
        if case in rows and not options.again:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = (
                Path(given[case])
                if case in given
                else make_file(case, Path(folder), options.dataset, min(256, options.nsamples))
            )
            row = measure(file, Path(folder) / "out", options)
        maker = "other tool" if case in given else f"discquant {CASES[case][2]}"
        rows[case] = {"made_by": maker, **row}
        facts = environment.facts()
        document = {"versions": facts["versions"], "cpu": facts["cpu"], "rows": rows}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(case, json.dumps(rows[case]), flush=True)


if __name__ == "__main__":
    main()
