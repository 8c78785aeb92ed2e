# SPDX-License-Identifier: Apache-2.0
"""A 70B-shaped model of few blocks, end to end on the CPU: cost per block, and plan against actual.

Blocks have Llama-3.1-70B's widths (or an even fraction of them, --divide); tokens are few. With --where disk original
weights stay in the checkpoint, state and boundaries in files, so memory does not limit depth (this needs the streaming
engine). Each depth has its own process; a step must cost a + b * blocks. Writes benchmarks/results/scale_WHERE.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
RANDOM = 1 << 22  # different values; matrices repeat them from different places


def model_config(given: argparse.Namespace, depth: int, widths: Mapping[str, int] = WIDTHS) -> dict[str, Any]:
    """Return config.json of the synthetic model; `widths` may hold any of its sizes."""
    widths = {key: value // given.divide for key, value in widths.items()}
    widths["num_key_value_heads"] = max(1, widths["num_key_value_heads"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": given.vocab,
        "num_hidden_layers": depth,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **widths,
    }


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write random bfloat16 weights, one file per block; never zeros, which compute faster."""
    import torch
    from safetensors.torch import save_file

    from discquant.planning.shape import empty_model

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    from transformers import AutoConfig

    shapes = {
        key: value.shape
        for key, value in empty_model(AutoConfig.from_pretrained(folder)).state_dict().items()
    }
    source = torch.randn(RANDOM, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(part, []).append(name)
    table = {}
    for number, (part, names) in enumerate(files.items()):
        tensors = {}
        for place, name in enumerate(names):
            shape = shapes[name]
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            count = math.prod(shape)
            turned = source.roll(-7919 * (31 * number + place))
            tensors[name] = turned.repeat(-(-count // RANDOM))[:count].view(shape)
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        table |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def options(given: argparse.Namespace) -> Any:
    """Return the run's configuration: u8 momentum from the original weights, no rates or gains to find first."""
    from discquant.config import DataConfig, GridConfig, QuantizeConfig, SolverConfig

    return QuantizeConfig(
        grid=GridConfig(3, 128, grid="absmax"),
        solver=SolverConfig(
            iters=given.steps, batch_size=given.windows, micro_batch=given.micro_batch, warmup=0, lr=0.01, lr_floor=0.1,
            optimizer="momentum", state="u8", start="ref", kl_weight=1.0, compute_dtype=given.dtype, linear_until=1.0,
            harden_from=1.0, harden_until=1.0, snap_from=1.0, curvature=0.0,
        ),
        data=DataConfig("random", given.windows, given.seqlen),
        baselines=(),
        format="none",
    )  # fmt: skip


def _lazy(folder: Path, dtype: Any) -> Any:
    """Return the model with its weights left in the checkpoint."""
    from discquant.formats.checkpoint import Checkpoint
    from discquant.formats.lazy import build_lazy

    model = build_lazy(folder, Checkpoint(folder), dtype)
    assert model is not None
    return model


def _engine(given: argparse.Namespace) -> Any:
    """Return the streaming engine with its files beside the model."""
    from discquant.solver.engine import Engine

    return Engine(given.where, folder=given.folder / "state")


def one_depth(given: argparse.Namespace, depth: int) -> dict[str, Any]:
    """Load, lay grids, build the state and take steps; return what each took."""
    import torch

    from discquant.planning.hardware import DEVICES
    from discquant.planning.plan import Machine, make_plan
    from discquant.planning.rates import Rates
    from discquant.planning.shape import shape_of
    from discquant.run.phases import Phases, resident_bytes
    from discquant.solver.chain import DecoderChain
    from discquant.solver.rows import TokenRows
    from discquant.solver.solve import Solve, lay_grids

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = given.folder / "model"
    write_checkpoint(folder, model_config(given, depth))
    config = options(given)
    import transformers

    assert transformers.LlamaForCausalLM  # imported now, so that it counts with the process
    process = float(resident_bytes())
    phases = Phases()
    with phases.phase("open"):
        dtype = getattr(torch, given.dtype)
        if given.where == "resident":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        else:
            model = _lazy(folder, dtype)
        chain = DecoderChain(model)
    with phases.phase("grid"):
        grids = lay_grids(chain, config.grid)
    ids = torch.randint(3, given.vocab, (given.windows, given.seqlen))
    rows = TokenRows(chain, ids, None, given.micro_batch)
    extra = {} if given.where == "resident" else {"engine": _engine(given)}
    wall, processor = [], []
    with phases.phase("solve"):
        run = Solve(chain, grids, rows, config, fresh=False, served=torch.bfloat16, **extra)
        while not run.done:
            begin, begin_processor = time.perf_counter(), time.process_time()
            run.advance()
            wall.append(time.perf_counter() - begin)
            processor.append(time.process_time() - begin_processor)
        # One layer's codes at a time.
        checksum = sum(int(codes.sum()) for codes in run.coded().values())
    placement = getattr(run.solver, "placement", None)
    shape = shape_of(chain.model, name="synthetic")
    rates = Rates(**json.loads(given.rates)) if given.rates else None
    plan = make_plan(
        shape,
        config,
        Machine(DEVICES["cpu"], 1e18, 1e18),
        placement=given.where,
        rates=rates,
        process=process,
    )
    planned = {peak.name: peak.total("host") for peak in plan.peaks}
    result = {
        "blocks": depth,
        "weights": shape.weights,
        "placement": given.where,
        "wall_seconds_per_step": round(min(wall), 3),
        "cpu_seconds_per_step": round(min(processor), 3),
        "planned_seconds_per_step": round(plan.step_seconds, 3) if rates else None,
        "phases": [
            {**record, "planned_bytes": round(planned[record["name"]])} for record in phases.records
        ],
        "state_bytes": sum(state.nbytes for block in run.solver.states for state in block),
        "bytes_in_per_step": placement.bytes_in // len(wall) if placement else 0,
        "bytes_out_per_step": placement.bytes_out // len(wall) if placement else 0,
        "codes_checksum": checksum,
    }  # fmt: skip
    if placement is not None:
        run.close()
    return result


def machine_rates(given: argparse.Namespace) -> dict[str, Any]:
    """Time one block of this shape here, by the processor's own clock."""
    import dataclasses

    import torch

    from discquant.planning.shape import read_shape
    from discquant.planning.timing import measure

    torch.set_num_threads(1)
    folder = given.folder / "shape"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config(given, 1)), encoding="utf-8")
    shape = read_shape(folder)
    return dataclasses.asdict(measure(folder, shape, options(given), clock=time.process_time))


def child(given: argparse.Namespace, folder: Path, extra: list[str]) -> dict[str, Any]:
    """Run one part in a fresh process and return what it printed last."""
    kept = ("divide", "vocab", "windows", "micro_batch", "seqlen", "steps", "dtype", "where")
    passed = [word for name in kept for word in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    command = [sys.executable, str(Path(__file__)), *passed, "--folder", str(folder), *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(rows: list[dict[str, Any]], key: str) -> dict[str, float] | None:
    """Least-squares a + b * blocks and its largest relative residual; None from fewer than three depths."""
    if len(rows) < 3:
        return None
    import numpy as np

    depth = np.array([row["blocks"] for row in rows], dtype=float)
    value = np.array([row[key] for row in rows], dtype=float)
    slope, base = np.polyfit(depth, value, 1)
    off = float(np.abs(value / (base + slope * depth) - 1).max())
    return {
        "a": float(base),
        "per_block": float(slope),
        "largest_residual": off,
        "at_80": float(base + 80 * slope),
    }


def write(given: argparse.Namespace, rates: dict[str, Any] | None, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far."""
    result = {
        "shape": {key: value for key, value in model_config(given, 0).items() if key != "num_hidden_layers"},
        "widths_divided_by": given.divide,
        "tokens_per_step": given.windows * given.seqlen,
        "dtype": given.dtype,
        "threads": 1,
        "processor": platform.processor() or platform.machine(),
        "rates": rates,
        "rows": rows,
        "cpu_seconds_line": line(rows, "cpu_seconds_per_step"),
        "state_bytes_line": line(rows, "state_bytes"),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--divide", type=int, default=1, help="divide the widths by this")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--where", default="resident", help="resident, host or disk")
    parser.add_argument("--no-rates", action="store_true", help="do not time the machine first")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/scale_WHERE.json")
    parser.add_argument(
        "--folder", type=Path, help="for weights and state (several GB per block); default temporary"
    )
    parser.add_argument("--one-depth", type=int)
    parser.add_argument("--rates-here", action="store_true")
    parser.add_argument("--rates", default="")
    given = parser.parse_args()
    given.out = given.out or ROOT / "benchmarks" / "results" / f"scale_{given.where}.json"
    return given


def main() -> None:
    """Run all depths and write the result."""
    given = parse()
    if given.rates_here:
        print(json.dumps(machine_rates(given)))
        return
    if given.one_depth:
        print(json.dumps(one_depth(given, given.one_depth)))
        return
    base = Path(tempfile.mkdtemp(dir=given.folder))
    rows: list[dict[str, Any]] = []
    try:
        rates = None if given.no_rates else child(given, base / "rates", ["--rates-here"])
        for depth in given.depths:
            extra = ["--one-depth", str(depth), *(["--rates", json.dumps(rates)] if rates else [])]
            rows.append(child(given, base / str(depth), extra))
            shutil.rmtree(base / str(depth))
            print(rows[-1], flush=True)
            write(given, rates, rows)  # after every depth: the deep ones may take longer than one has
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
