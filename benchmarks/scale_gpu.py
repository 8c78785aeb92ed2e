# SPDX-License-Identifier: Apache-2.0
"""Real solver steps on Llama-shaped blocks with random weights on one GPU: resident against streamed from host memory.

`python benchmarks/scale_gpu.py --shape 8b,70b --blocks 4,8 --seconds 100`. Per shape: bare matmuls, the link, then for
every depth and placement seconds, memory, traffic, overlap of copies with kernels, the plan's figures and a fingerprint
of the result. Writes benchmarks/results/<device>-scale.json after every part. `--shape tiny --device cpu` tests it all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scale
import scale_parts as parts
import torch
from harness import machine, result_file

EIGHT = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
# Widths, and how many blocks the whole model has.
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "8b": (EIGHT, 32),
    "70b": (scale.WIDTHS, 80),
    "tiny": (TINY, 4),
}
EXTRA_STEPS = 2  # one before the clock starts, one under the profiler
# So large that the gradient outweighs the linear term: the bytes of the result then depend on it everywhere.
GAIN = 1e8
UNLIMITED = 1e18


def options(given: argparse.Namespace) -> Any:
    """Return the configuration of scale.py with rows that never repeat, so that the teacher runs in every step."""
    config = scale.options(given)
    steps = given.steps + EXTRA_STEPS
    return dataclasses.replace(
        config,
        grid=dataclasses.replace(config.grid, bits=given.bits, group_size=given.group),
        solver=dataclasses.replace(
            config.solver, iters=steps, lr=0.05, optimizer=given.optimizer, kl_weight=GAIN
        ),
        data=dataclasses.replace(config.data, nsamples=steps * given.windows),
    )


def sizes(given: argparse.Namespace, name: str) -> Any:
    """Return the sizes of a model of one block, for the plan."""
    from discquant.planning.shape import read_shape

    with tempfile.TemporaryDirectory() as folder:
        config = json.dumps(scale.model_config(given, 1, SHAPES[name][0]))
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        return read_shape(folder)


def planned(given: argparse.Namespace, found: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
    """Return the plan's memory of the solve and time of a step: with its own rates, and with those measured here."""
    from discquant.planning.hardware import DEVICES, this_device
    from discquant.planning.plan import Machine, make_plan
    from discquant.planning.shape import repeated

    device = this_device() if given.device.type == "cuda" else DEVICES["cpu"]
    if given.device.type == "cuda":
        device = dataclasses.replace(device, memory=UNLIMITED)  # to tell what is needed, not to refuse
    known = {}
    if "bare" in found:
        known["flops"] = found["bare"]["tflop_s"] * 1e12
    if "link" in found:
        known["link"] = min(found["link"]["in_gb_s"], found["link"]["out_gb_s"]) * 1e9
    shape = repeated(given.sizes[found["shape"]], depth)

    def plan(used: Any) -> Any:
        here = Machine(used, UNLIMITED, UNLIMITED)
        return make_plan(
            shape, options(given), here, placement=cast(Any, where), process=given.process
        )  # fmt: skip

    assumed = plan(device)
    solve = next(peak for peak in assumed.peaks if peak.name == "solve")
    return {
        "device_bytes": solve.total("gpu"),
        "host_bytes": solve.total("host"),
        "step_seconds": assumed.step_seconds,
        "step_seconds_at_measured_rates": plan(dataclasses.replace(device, **known)).step_seconds,
    }


def solve(given: argparse.Namespace, found: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
    """Build the state and take steps as `quantize` does; return what they took."""
    from discquant.run.phases import Phases
    from discquant.solver.chain import DecoderChain
    from discquant.solver.engine import Engine
    from discquant.solver.rows import TokenRows
    from discquant.solver.solve import Solve, lay_grids

    device, config = given.device, options(given)
    engine = Engine(cast(Any, where), device=device)
    phases, building = Phases(device), 0
    with tempfile.TemporaryDirectory() as folder:
        widths = scale.model_config(given, depth, SHAPES[found["shape"]][0])
        dtype = getattr(torch, given.dtype)
        with phases.phase("open"):
            model = parts.open_model(Path(folder), widths, device, dtype, whole=where == "resident")
            chain = DecoderChain(model)
    with phases.phase("grid"):
        grids = lay_grids(chain, config.grid)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, given.vocab, (config.data.nsamples, given.seqlen), generator=generator)
    rows = TokenRows(chain, ids, None, given.micro_batch)
    seconds, records = [], []

    def marks(place: Any, kept: Any) -> tuple[float, ...]:
        return place.bytes_in, place.bytes_out, kept.bytes_moved, place.waited

    with contextlib.ExitStack() as closing:
        with phases.phase("solve"):
            begin = time.perf_counter()
            run = Solve(chain, grids, rows, config, fresh=False, served=torch.bfloat16, engine=engine)
            closing.callback(run.close)
            place, kept = run.solver.placement, run.solver.boundaries
            built = time.perf_counter() - begin
            if device.type == "cuda":
                building = torch.cuda.max_memory_allocated(device)
            records.append(run.advance())
            parts.synchronize(device)
            first = time.perf_counter() - begin - built
            before, began = marks(place, kept), time.perf_counter()
            for _ in range(given.steps):
                at = time.perf_counter()
                records.append(run.advance())
                seconds.append(
                    time.perf_counter() - at
                )  # a step ends by reading its counts: the device is done
            # Copies home may still be under way: they count, too.
            parts.synchronize(device)
            wall = (time.perf_counter() - began) / given.steps
            per_step = [(b - a) / given.steps for a, b in zip(before, marks(place, kept), strict=True)]
            reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        # What follows holds memory of its own, which is none of the solve's.
        copies = parts.profiled(lambda: records.append(run.advance()), device)
        state_bytes, notes = place.nbytes, list(place.notes)
        prints = parts.fingerprint(run.solver)
    weights = depth * given.sizes[found["shape"]].weights
    memory = {record["name"]: record for record in phases.records}["solve"]
    return {
        "blocks": depth,
        "placement": where,
        "weights": weights,
        "seconds_per_step": wall,
        "steps": seconds,
        "first_step_seconds": first,
        "build_seconds": built,
        "tflop_s": 10.0 * given.tokens * weights / wall / 1e12,
        "peak_device_bytes": memory.get("peak_device_bytes", 0),
        "building_device_bytes": building,
        "peak_device_reserved_bytes": reserved,
        "peak_host_bytes": memory["peak_rss_bytes"],
        "state_bytes": state_bytes,
        "bytes_in_per_step": per_step[0],
        "bytes_out_per_step": per_step[1],
        "boundary_bytes_per_step": per_step[2],
        "waited_seconds_per_step": per_step[3],
        "overlap": copies,
        "loss": [record.loss for record in records],
        "saturated": records[-1].saturated,
        "moved": records[-1].moved,
        "notes": notes,
        "planned": planned(given, found, where, depth),
        **prints,
    }


def derive(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what follows from the runs so far: ratios, identity, the whole model."""
    runs, bare = found["runs"], found.get("bare")
    by = {(row["blocks"], row["placement"]): row for row in runs}
    found["compared"] = [
        {
            "blocks": blocks,
            "host_over_resident": row["seconds_per_step"] / other["seconds_per_step"],
            "codes_identical": row["codes_sha256"] == other["codes_sha256"],
            "state_identical": row["state_checksum"] == other["state_checksum"],
        }
        for (blocks, where), row in by.items()
        if where == "host" and (other := by.get((blocks, "resident"))) is not None
    ]
    found["lines"], found["extrapolated"] = {}, {}
    depth = SHAPES[found["shape"]][1]
    for where in given.placements:
        fitted = parts.line([row for row in runs if row["placement"] == where])
        if fitted is None:
            continue
        if bare is not None:
            fitted["times_bare_matmul"] = fitted["per_block"] / bare["seconds_per_block"]
            fitted["tflop_s"] = bare["tflop_s"] * bare["seconds_per_block"] / max(1e-12, fitted["per_block"])
        found["lines"][where] = fitted
        plan = planned(given, found, where, depth)
        found["extrapolated"][where] = {
            "blocks": depth,
            "seconds_per_step": fitted["fixed"] + fitted["per_block"] * depth,
            "formula": f"{fitted['fixed']:.4g} + {fitted['per_block']:.4g} * {depth}; memory from the plan",
            "planned": plan,
        }
    lines = found["lines"]
    if {"host", "resident"} <= lines.keys():
        found["host_over_resident_per_block"] = lines["host"]["per_block"] / lines["resident"]["per_block"]


def describe(part: str, result: dict[str, Any]) -> str:
    """Return one line on a finished part."""
    if "error" in result or "seconds_per_step" not in result:
        return f"{part}: {json.dumps(result)[:300]}"
    share = result["overlap"].get("share")
    return (
        f"{part}: {result['seconds_per_step']:.3f} s a step, {result['tflop_s']:.0f} TFLOP/s, device "
        f"{result['peak_device_bytes'] / 1e9:.1f} GB (plan {result['planned']['device_bytes'] / 1e9:.1f}), host "
        f"{result['peak_host_bytes'] / 1e9:.1f} GB (plan {result['planned']['host_bytes'] / 1e9:.1f}), in "
        f"{result['bytes_in_per_step'] / 1e9:.2f} GB, copies under kernels {'-' if share is None else f'{share:.0%}'}, "
        f"codes {result['codes_sha256'][:8]}, state {result['state_checksum'][:8]}, part {result['part_seconds']:.0f} s"
    )


class Recorder:
    """The result file, the clock, and what is left of the budget."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Keep what the file says of other shapes."""
        self.given, self.failed = given, False
        self.rate = 0.0  # seconds of a run per weight, known from the first on
        self.began = time.perf_counter()
        old = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
        self.result: dict[str, Any] = {
            "machine": machine(),
            "tokens_per_step": given.tokens,
            "flop_rule": "10 * tokens * weights (teacher, student, recompute, dX, dW); attention and head not counted",
            "shapes": old.get("shapes", {}),
        }

    def left(self) -> float:
        """Return the seconds that are left."""
        return float(self.given.seconds - (time.perf_counter() - self.began))

    def write(self) -> None:
        """Replace the file as a whole."""
        self.given.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.given.out.with_name(f".{self.given.out.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.given.out)

    def part(self, name: str, call: Any, keep: Any, needs: float = 0.0) -> float:
        """Run one part, keep its result or why there is none, write the file; return the seconds it took."""
        begin = time.perf_counter()
        if self.left() < needs:
            result: dict[str, Any] = {
                "error": f"left out: about {needs:.0f} s needed, {self.left():.0f} left"
            }
        else:
            try:
                result = call()
            except Exception as error:  # the other parts are still worth having; the exit status tells
                traceback.print_exc(limit=-4)
                result = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.failed |= "error" in result
        result["part_seconds"] = time.perf_counter() - begin
        keep(result)
        self.write()
        print(describe(name, result), flush=True)
        # A failed part's frames held tensors until here.
        gc.collect()
        if self.given.device.type == "cuda":
            torch.cuda.empty_cache()
        return float(result["part_seconds"])


def measure_shape(given: argparse.Namespace, recorder: Recorder, name: str) -> None:
    """Run every part of one shape, the cheapest first."""
    found: dict[str, Any] = {
        "shape": name,
        "config": scale.model_config(given, 0, SHAPES[name][0]),
        "options": {"bits": given.bits, "group": given.group, "optimizer": given.optimizer, "dtype": given.dtype,
                    "windows": given.windows, "seqlen": given.seqlen, "micro_batch": given.micro_batch},
        "runs": [], "left_out": [],
    }  # fmt: skip
    recorder.result["shapes"][name] = found
    given.sizes[name] = sizes(given, name)
    block = given.sizes[name].blocks[0]
    linears = [(m.rows, m.columns) for m in block.matrices for _ in range(m.count)]

    def bare() -> dict[str, Any]:
        seconds = parts.bare_matmuls(linears, given.tokens, given.device, getattr(torch, given.dtype))
        work = 10.0 * given.tokens * block.weights
        found = {"seconds_per_block": seconds, "weights_per_block": block.weights}
        return {**found, "tflop_s": work / seconds / 1e12}

    def keep(key: str) -> Any:
        return lambda result: None if "error" in result else found.update({key: result})

    def keep_run(result: dict[str, Any]) -> None:
        found["left_out" if "error" in result else "runs"].append(result)
        derive(given, found)

    recorder.part(f"{name} bare matmuls", bare, keep("bare"))
    recorder.part(f"{name} link", lambda: parts.link(given.device), keep("link"))
    for depth in given.blocks:
        for where in given.placements:
            weights, before = depth * block.weights, len(found["runs"])
            took = recorder.part(
                f"{name} {depth} blocks {where}",
                lambda d=depth, w=where: solve(given, found, w, d),
                keep_run,
                recorder.rate * weights,
            )
            # The first part also compiles kernels and is no measure of those that follow; nor is one that failed.
            if len(found["runs"]) > before:
                recorder.rate = min(recorder.rate or 1.0, took / weights)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8b,70b", help=f"of {', '.join(SHAPES)}, comma separated")
    parser.add_argument(
        "--blocks", default="4,8", help="depths; up to 3 blocks stay in the slots and nothing streams in"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that is not")
    parser.add_argument("--tokens", type=int, default=16384, help="per step")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, help="windows per pass; all of the step's where left out")
    parser.add_argument("--placements", default="resident,host")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--optimizer", default="momentum", choices=("momentum", "lion", "adamw", "sgd"))
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=100, help="no part is begun that would end later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=result_file().with_name(f"{result_file().stem}-scale.json")
    )
    given = parser.parse_args(arguments)
    given.shape, given.placements = given.shape.split(","), given.placements.split(",")
    given.blocks = [int(depth) for depth in given.blocks.split(",")]
    if unknown := [name for name in given.shape if name not in SHAPES]:
        parser.error(f"--shape must be of {', '.join(SHAPES)}, got {unknown[0]}")
    if given.tokens % given.seqlen:
        parser.error(f"--tokens must be a multiple of --seqlen = {given.seqlen}, got {given.tokens}")
    given.device, given.windows = torch.device(given.device), given.tokens // given.seqlen
    given.divide = 1
    given.micro_batch, given.sizes = given.micro_batch or given.windows, {}
    return given


def main(arguments: list[str] | None = None) -> int:
    """Measure every shape; 0 if no part failed or was left out."""
    given = parse(arguments)
    recorder = Recorder(given)
    import transformers

    from discquant.run.phases import resident_bytes
    from discquant.solver.engine import Engine

    assert transformers.LlamaForCausalLM  # imported now, so that it counts with the process
    if given.device.type == "cuda":
        import discquant.triton_kernels  # of the installed package: without it every op would be the slow reference

        assert discquant.triton_kernels.__name__
        given.device = torch.device("cuda", given.device.index or 0)
        Engine(device=given.device)  # settles cuBLAS's workspace, which is read at the first product
        torch.zeros(1, device=given.device)
    given.process = float(resident_bytes())
    print(f"start {time.perf_counter() - recorder.began:.1f} s, {machine()['device']}", flush=True)
    gc.collect()
    gc.freeze()  # what was imported need not be looked through between parts
    try:
        for name in given.shape:
            measure_shape(given, recorder, name)
    finally:
        gc.unfreeze()
    return int(recorder.failed)


if __name__ == "__main__":
    sys.exit(main())
