# SPDX-License-Identifier: Apache-2.0
"""Quality of every rounding method on the same grids: `benchmarks/quality.py WHAT`, one of the functions below.

Writes benchmarks/results/<name>.json after every measurement and continues from it, so that it can be stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from discquant import environment
from discquant.allocation import allocate
from discquant.calibration import load_windows
from discquant.config import GridConfig, GridRules, QuantizeConfig, SolverConfig, parse_grid, preset
from discquant.formats import registry
from discquant.formats.source import open_source
from discquant.rotation import rotate
from discquant.run.served import served_dtype
from discquant.solver.chain import DecoderChain
from discquant.solver.energies import energies_of
from discquant.solver.layerwise import layerwise_codes
from discquant.solver.measure import mean_kl
from discquant.solver.rows import TokenRows
from discquant.solver.solve import Solve, lay_grids

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TINY = ROOT / "examples" / "tiny_llama"


class Store:
    """Rows of one result file, keyed; a row that is there is not measured again."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]

    def measure(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of `key`, measuring it first if it is missing."""
        for row in self.rows:
            if row["key"] == key:
                return row
        begin = time.perf_counter()
        row = {"key": key, **run(), "seconds": round(time.perf_counter() - begin, 1)}
        self.rows.append(row)
        facts = environment.facts()
        document = {"versions": facts["versions"], "cpu": facts["cpu"], "threads": torch.get_num_threads()}
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**document, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)
        return row


@dataclasses.dataclass
class Bench:
    """A model with calibration and held-out rows."""

    chain: DecoderChain
    calibration: TokenRows
    heldout: TokenRows
    served: torch.dtype

    def kl(self, grids: Any, codes: dict[str, torch.Tensor]) -> float:
        """Mean KL of codes on the held-out rows."""

        def weights(index: int) -> dict[str, torch.Tensor]:
            return {
                ref.param_name: grids[ref.name].dequantize(codes[ref.name], self.served).float()
                for ref in self.chain.weights[index]
            }

        return mean_kl(self.chain, weights, self.heldout.batches(range(len(self.heldout))))

    def layerwise(
        self, grid: GridConfig, method: str, samples: int, damp: float = 0.1, grids: Any = None
    ) -> dict[str, Any]:
        """Measure RTN, GPTQ or greedy, on `grids` where they are given."""
        grids = lay_grids(self.chain, grid) if grids is None else grids
        batches = (
            self.calibration.batches(range(min(samples, len(self.calibration)))) if method != "rtn" else []
        )
        config = QuantizeConfig(gptq_samples=samples or 1)
        energies = energies_of(self.chain, batches, config) if method == "guided" else None
        codes = layerwise_codes(
            self.chain, grids, batches, method, damp=damp, served=self.served, energies=energies,  # type: ignore[arg-type]
        )  # fmt: skip
        return {"method": method, **dataclasses.asdict(grid), "kl": self.kl(grids, codes), "samples": samples}

    def solve(
        self, grid: GridConfig, solver: SolverConfig, seed: int = 0, grids: Any = None
    ) -> dict[str, Any]:
        """Measure DiscQuant before and after the last rounding, on `grids` where they are given."""
        grids = lay_grids(self.chain, grid) if grids is None else grids
        config = QuantizeConfig(grid=grid, solver=solver, seed=seed)
        run = Solve(self.chain, grids, self.calibration, config, served=self.served)
        moved = fractional = 0.0
        while not run.done:
            record = run.advance()
            moved, fractional = record.moved, record.fractional
        soft = mean_kl(self.chain, run.solver.student, self.heldout.batches(range(len(self.heldout))))
        scales = {"scale_iters": solver.scale_iters, "kl_as_laid": self.kl(grids, run.codes())}
        return {
            "method": "discquant",
            "preset": solver.preset,
            "state": solver.state,
            **dataclasses.asdict(grid),
            "iters": solver.iters,
            **(scales if solver.scale_iters else {}),
            "tokens": solver.steps * solver.batch_size * int(self.calibration.input_ids.shape[1]),
            "seed": seed,
            "kl": self.kl(run.grids(), run.codes()),
            "kl_before_rounding": soft,
            "moved": moved,
            "fractional": fractional,
        }


def _bench(model: Path, calibration: torch.Tensor, heldout: torch.Tensor, masks: Any = (None, None)) -> Bench:
    source = open_source(model, dtype=torch.float32)
    chain = DecoderChain(source.model)
    rows = [TokenRows(chain, ids, mask, 8) for ids, mask in zip((calibration, heldout), masks, strict=True)]
    return Bench(chain, rows[0], rows[1], served_dtype(source.config))


def stories260k(model: Path) -> None:
    """The comparison of method.md section 11: 3 bits, symmetric abs-max, group 32, 256 steps of 16 x 256 tokens."""
    tokens = load_file(model / "tokens.safetensors")
    bench = _bench(model, tokens["calibration"].long(), tokens["heldout"].long())
    store = Store("stories260k")
    grid = GridConfig(3, 32, True, "absmax")
    for method, samples in (("rtn", 0), ("gptq", 256), ("greedy", 256)):
        for damp in (0.1, 0.01) if method == "gptq" else (0.1,):
            store.measure(
                f"{method} {damp}",
                lambda m=method, s=samples, d=damp: {**bench.layerwise(grid, m, s, d), "damp": d},
            )
    budget = {"iters": 256, "batch_size": 16, "warmup": 32}
    default = dataclasses.replace(preset("default", grid), **budget)
    for seed in (0, 1, 2):
        store.measure(f"default seed {seed}", lambda s=seed: bench.solve(grid, default, s))
    small = dataclasses.replace(default, state="u8")
    for seed in (0, 1, 2):
        store.measure(f"default u8 seed {seed}", lambda s=seed: bench.solve(grid, small, s))
    paper = dataclasses.replace(preset("paper", grid), **budget)
    store.measure("paper", lambda: bench.solve(grid, paper))
    search = GridConfig(3, 32, True, "search")
    store.measure("search grid, gptq", lambda: bench.layerwise(search, "gptq", 256))
    store.measure("search grid, default", lambda: bench.solve(search, default))


def _tiny_llama(model: Path) -> Bench:
    """The bundled model, or one with its vocabulary, and the data of its sweep."""
    source = open_source(TINY, dtype=torch.float32)
    windows = [
        load_windows(name, source.tokenizer, nsamples=count, seqlen=256, seed=seed, model=source.model)
        for name, count, seed in (("arithmetic", 2048, 0), ("arithmetic:heldout", 64, 1))
    ]
    return _bench(model, windows[0].input_ids, windows[1].input_ids, (windows[0].mask, windows[1].mask))


def sweep(iters: int) -> None:
    """The bundled model at 2, 3 and 4 bits, groups of 32, 64, 128 and whole rows: RTN, GPTQ and DiscQuant.

    Groups of 64 at 3 and 4 bits also by greedy coordinate descent and by the published recipe, as many steps of as
    many windows.
    """
    bench = _tiny_llama(TINY)
    store = Store("tiny_llama_sweep")
    for bits in (3, 4, 2):
        for group_size in (64, 32, 128, -1):
            grid = GridConfig(bits, group_size, True, "search")
            name = f"{bits} bits, group {group_size}"
            store.measure(f"{name}, rtn", lambda g=grid: bench.layerwise(g, "rtn", 0))
            store.measure(f"{name}, gptq", lambda g=grid: bench.layerwise(g, "gptq", 256))
            store.measure(f"{name}, guided", lambda g=grid: bench.layerwise(g, "guided", 256))
            solver = SolverConfig(iters=iters, warmup=max(1, iters // 8))
            store.measure(f"{name}, discquant", lambda g=grid, s=solver: bench.solve(g, s))
            if group_size == 64 and bits > 2:
                store.measure(f"{name}, greedy", lambda g=grid: bench.layerwise(g, "greedy", 256))
                budget = {"iters": iters, "batch_size": solver.batch_size, "warmup": solver.warmup}
                paper = dataclasses.replace(preset("paper", grid), **budget)
                store.measure(f"{name}, paper", lambda g=grid, s=paper: bench.solve(g, s))


# Bits, steps that choose codes and steps that move scales: the sweep's own in all, and then twice as many.
_SCALES = (
    (3, 192, 64), (4, 192, 64), (2, 192, 64), (3, 384, 128), (3, 512, 0), (2, 384, 128), (2, 512, 0), (4, 384, 128),
    (4, 512, 0),
)  # fmt: skip


def scales() -> None:
    """Scales that move after the codes are chosen (`--scale-iters`), in groups of 64 of the bundled model."""
    bench, store = _tiny_llama(TINY), Store("scales")
    for bits, chosen, moved in _SCALES:
        solver = SolverConfig(iters=chosen, scale_iters=moved, warmup=(chosen + moved) // 8)
        store.measure(
            f"{bits} bits, {chosen} + {moved}",
            lambda b=bits, s=solver: bench.solve(GridConfig(b, 64, True, "search"), s),
        )


# What a layer may get, and bits per weight, scales included: 3.25 is the size of 3 bits everywhere, and so on.
_ALLOCATED = {("2", "3", "4", "5", "6", "8"): (3.25, 4.25, 2.75, 3.75), ("3", "4"): (3.75,)}


def allocation(iters: int) -> None:
    """A width for each layer (`discquant allocate`) in groups of 64 of the bundled model: RTN, GPTQ and DiscQuant."""
    bench, store = _tiny_llama(TINY), Store("allocation")
    base, samples = GridConfig(4, 64, True, "search"), 1024
    mask = bench.calibration.mask
    text = TokenRows(
        bench.chain, bench.calibration.input_ids[:samples], None if mask is None else mask[:samples], 1
    )
    known = {row["key"] for row in store.rows}
    for choices, sizes in _ALLOCATED.items():
        names = {average_bits: f"{average_bits} bits of {','.join(choices)}" for average_bits in sizes}
        if {f"{n}, {method}" for n in names.values() for method in ("rtn", "gptq", "discquant")} <= known:
            continue
        figures = allocate(bench.chain, text, {word: parse_grid(word, base) for word in choices}, sizes[0])
        for average_bits, name in names.items():
            found = figures.at(average_bits)
            grids = lay_grids(bench.chain, GridRules(base, found.layers))
            facts = {
                "average_bits": average_bits, "choices": choices, "windows": samples, "bits_per_weight": found.bits(),
                "predicted_kl": found.damage(), "chosen": {unit.name: unit.chosen for unit in found.units},
            }  # fmt: skip
            for method, count in (("rtn", 0), ("gptq", 256)):
                store.measure(
                    f"{name}, {method}",
                    lambda m=method, n=count, g=grids, f=facts: {**bench.layerwise(base, m, n, grids=g), **f},
                )
            solver = SolverConfig(iters=iters, warmup=max(1, iters // 8))
            store.measure(
                f"{name}, discquant",
                lambda s=solver, g=grids, f=facts: {**bench.solve(base, s, grids=g), **f},
            )


# Bits, group size, and the seeds of the rotations that are tried.
_ROTATED = ((3, 64, (0, 1)), (3, -1, (0,)), (4, 64, (0,)))


def rotation(iters: int) -> None:
    """The bundled model as it is and rotated (`discquant rotate`): RTN, GPTQ and DiscQuant, against what they round.

    A rotated model differs from the bundled one by the rounding of its bfloat16 weights; how much is measured, too.
    """
    store, plain = Store("rotation"), _tiny_llama(TINY)
    with tempfile.TemporaryDirectory() as scratch:
        for bits, group_size, seeds in _ROTATED:
            grid = GridConfig(bits, group_size, True, "search")
            solver = SolverConfig(iters=iters, warmup=max(1, iters // 8))
            for seed in (None, *seeds):
                bench = plain
                if seed is not None:
                    folder = Path(scratch) / str(seed)
                    if not folder.exists():
                        rotate(TINY, folder, seed=seed)
                    bench = _tiny_llama(folder)
                    store.measure(f"bfloat16, seed {seed}", lambda b=bench: {"kl": _kl_of_model(plain, b)})
                facts = {"rotation": seed}
                name = f"{bits} bits, group {group_size}, {'as it is' if seed is None else f'seed {seed}'}"
                for method, samples in (("rtn", 0), ("gptq", 256)):
                    store.measure(
                        f"{name}, {method}",
                        lambda b=bench, g=grid, m=method, n=samples, f=facts: {**b.layerwise(g, m, n), **f},
                    )
                store.measure(
                    f"{name}, discquant", lambda b=bench, g=grid, s=solver, f=facts: {**b.solve(g, s), **f}
                )


# Bits and AutoRound's steps per block: its default, and what its documentation recommends for best quality.
_AUTOROUND = ((3, 200), (4, 200), (3, 1000))
_AUTOROUND_WINDOWS = 1024  # as many tokens as its default of 128 windows of 2048


def autoround(iters: int) -> None:
    """AutoRound itself on the bundled model, in groups of 64, and DiscQuant on the very grid that AutoRound has tuned.

    It runs in the environment that `make interop` builds for it, on the calibration windows of the sweep.
    """
    bench, store = _tiny_llama(TINY), Store("autoround")
    python = ROOT / ".venvs" / "autoround" / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            'quality: AutoRound is not here; `make interop INTEROP_ARGS="--build autoround"` installs it'
        )
    mask = bench.calibration.mask
    whole = torch.ones(len(bench.calibration), dtype=torch.bool) if mask is None else mask.all(dim=1)
    windows = bench.calibration.input_ids[whole][:_AUTOROUND_WINDOWS]
    for bits, steps in _AUTOROUND:
        name = f"{bits} bits, group 64, autoround {steps}"
        folder = RESULTS.parent.parent / "build" / "autoround" / f"{bits}-{steps}"
        facts = {"bits": bits, "group_size": 64, "iters": steps, "windows": len(windows)}

        def produce(folder: Path = folder, facts: dict[str, Any] = facts) -> dict[str, Any]:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"input_ids": windows.contiguous()}, folder / "tokens.safetensors")
            request = {"model": str(TINY), "tokens": str(folder / "tokens.safetensors"), "out": str(folder / "out"),
                       "bits": facts["bits"], "group_size": 64, "iters": facts["iters"], "batch_size": 8}  # fmt: skip
            (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
            tool = ROOT / "tests" / "interop" / "tools" / "produce_autoround.py"
            subprocess.run([str(python), str(tool), str(folder)], check=True)
            versions = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["versions"]
            grids, codes = _of_file(folder / "out")
            return {
                "method": "autoround",
                **facts,
                "kl": bench.kl(grids, codes),
                "tool": versions["auto-round"],
            }

        def better(folder: Path = folder, bits: int = bits) -> dict[str, Any]:
            solver = SolverConfig(iters=iters, warmup=max(1, iters // 8))
            grids, _ = _of_file(folder / "out")
            return {**bench.solve(GridConfig(bits, 64, True), solver, grids=grids), "grid": "autoround"}

        if not (folder / "out").exists():  # DiscQuant needs AutoRound's file itself
            store.rows = [row for row in store.rows if not row["key"].startswith(name)]
        store.measure(name, produce)
        store.measure(f"{name}, discquant on its grid", better)


def _of_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Grids and codes of a quantized model by layer."""
    layers = list(registry.find(path).read(path))
    return {layer.name: layer.grid for layer in layers}, {layer.name: layer.q for layer in layers}


@torch.no_grad()
def _kl_of_model(original: Bench, other: Bench) -> float:
    """Mean KL of an unquantized model to the original on the held-out rows, both computed in float32."""
    total, count = 0.0, 0.0
    ids, mask = original.heldout.input_ids, original.heldout.mask
    for first in range(0, len(ids), 8):
        rows = slice(first, first + 8)
        p, q = (bench.chain.model(ids[rows]).logits.double().log_softmax(-1) for bench in (original, other))
        kl = (p.exp() * (p - q)).sum(-1)
        kept = torch.ones_like(kl) if mask is None else mask[rows].to(kl.dtype)
        total += float((kl * kept).sum())
        count += float(kept.sum())
    return total / count


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", choices=("stories260k", "sweep", "scales", "allocation", "rotation", "autoround")
    )
    parser.add_argument("--model", type=Path, help="folder of stories260k (shared test data)")
    parser.add_argument(
        "--iters", type=int, default=256, help="DiscQuant steps of sweep, allocation, rotation and autoround"
    )
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "scales":
        scales()
        return
    chosen = {"sweep": sweep, "allocation": allocation, "rotation": rotation, "autoround": autoround}.get(
        arguments.what
    )
    if chosen is not None:
        chosen(arguments.iters)
        return
    shared = environment.variable("DISCQUANT_SHARED")
    model = arguments.model or Path(shared or ROOT.parent / "shared") / "models" / "stories260k"
    stories260k(model)


if __name__ == "__main__":
    main()
