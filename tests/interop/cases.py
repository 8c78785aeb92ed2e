# SPDX-License-Identifier: Apache-2.0
"""What the consumers get: models rounded by the solver on each grid, exported to each format, with what is expected.

A case is one model on one grid. Its codes come from a short run of the solver: not the nearest ones, so that a reader
that rounds again is caught.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import families
import transformers
from families import FAMILIES, make
from safetensors.torch import load_file, save_file
from torch import Tensor

from discquant.calibration import load_windows
from discquant.config import DataConfig, GridConfig, LayerGrid, QuantizeConfig, SolverConfig
from discquant.formats import registry
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer
from discquant.run.directory import RunDirectory
from discquant.run.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
MODELS = {"tiny_llama": ROOT / "examples" / "tiny_llama", "stories260k": STORIES}
DATASETS = {"tiny_llama": ("arithmetic", "arithmetic:heldout")}
DATASETS["stories260k"] = tuple(
    f"{STORIES / 'tokens.safetensors'}:{key}" for key in ("calibration", "heldout")
)
WINDOWS, SEQLEN = 8, 128  # of held-out text that every consumer runs
CALIBRATION_WINDOWS = 64  # for the solver and for the tools that quantize
RECIPE = {"iters": 4, "batch_size": 4, "micro_batch": 4, "warmup": 1, "lr": 0.03, "start": "ref"}
SOLVER = SolverConfig(**RECIPE)


@dataclass(frozen=True)
class Case:
    """A model on a grid.

    Attributes:
        name: Short, e.g. `int3`.
        model: Key of MODELS.
        grid: The grid.
        ignore: Modules left alone, beside the head.
        layers: Rules of `--layer-grid`.
    """

    name: str
    model: str
    grid: GridConfig
    ignore: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[LayerGrid, ...]:
        """The rules as they are configured."""
        return tuple(LayerGrid.parse(rule, self.grid) for rule in self.layers)


# K-quants have blocks of 256 columns; the bundled model's down_proj has 640.
NO_DOWN = ("down_proj",)
LONG_BLOCKS = ("_k", "_xs")
GGUF = ("q4_0", "q4_1", "q4_k", "q3_k", "q5_0", "q5_1", "q2_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
CASES = {
    case.name: case
    for case in (
        # Searched scales: some are negative, which every tool has to take.
        Case("int3", "tiny_llama", GridConfig(3, 64)),
        Case("int4", "tiny_llama", GridConfig(4, 64)),
        Case("int4_asym", "tiny_llama", GridConfig(4, 64, sym=False)),
        Case("int3_asym", "tiny_llama", GridConfig(3, 64, sym=False)),
        Case("nvfp4", "tiny_llama", GridConfig.of_kind("nvfp4")),
        Case("mxfp4", "tiny_llama", GridConfig.of_kind("mxfp4")),
        *(
            Case(kind, "tiny_llama", GridConfig.of_kind(kind), NO_DOWN if kind.endswith(LONG_BLOCKS) else ())
            for kind in GGUF
        ),
        # What `discquant allocate` makes of a model; widths that every tool of integers reads.
        Case(
            "mixed", "tiny_llama", GridConfig(4, 64), (), ("down_proj:3", "*.layers.1.*:8", "*.layers.2.*:3")
        ),
        # Rows of 172 columns divide into no group of 32 or 64: whole rows, or that layer left alone.
        Case("stories_int3", "stories260k", GridConfig(3, -1)),
        Case("stories_int4", "stories260k", GridConfig(4, -1)),
        Case("stories_q4_0", "stories260k", GridConfig.of_kind("q4_0"), NO_DOWN),
        *(Case(name, name, GridConfig.of_kind("q4_0"), plain) for name, (_, _, plain) in FAMILIES.items()),
    )
}


def file_digest(*paths: Path) -> str:
    """SHA-256 over files and the files of folders, names included."""
    digest = hashlib.sha256()
    for path in paths:
        for entry in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if entry.is_file() and "__pycache__" not in entry.parts:
                digest.update(entry.relative_to(path.parent).as_posix().encode())
                digest.update(hashlib.sha256(entry.read_bytes()).digest())
    return digest.hexdigest()


class Workshop:
    """Makes and keeps what the rows need, below one folder; everything is made again when its inputs change."""

    def __init__(self, folder: Path) -> None:
        """Bind to a folder."""
        self.folder = folder

    @cached_property
    def format_digest(self) -> str:
        """Of the code that writes files."""
        return file_digest(ROOT / "discquant" / "formats", ROOT / "discquant" / "grids")

    def kept(self, place: Path, key: str, make: Callable[[Path], Any]) -> Path:
        """Return `place`, made by `make(place)` unless it was made under the same key."""
        stamp = place.with_name(f"{place.name}.key")
        place.parent.mkdir(parents=True, exist_ok=True)
        # Drivers side by side wait for one another here rather than make the same thing twice.
        with place.with_name(f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if place.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
                return place
            stamp.unlink(missing_ok=True)
            if place.is_dir():
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
            make(place)
            stamp.write_text(key, encoding="utf-8")
        return place

    def source(self, model: str) -> Path:
        """The original of a case; of a family a random one."""
        if model not in FAMILIES:
            return MODELS[model]
        key = f"{file_digest(Path(families.__file__), MODELS['tiny_llama'])} {transformers.__version__}"
        return self.kept(
            self.folder / "models" / model, key, lambda place: make(model, MODELS["tiny_llama"], place)
        )

    def tokens(self, model: str, part: str) -> Path:
        """Token ids: `heldout` for consumers, `calibration` for producers, `judge` (more held-out text) for KL."""
        if model in FAMILIES:
            model = "tiny_llama"  # whose tokenizer they have
        count, length = {
            "heldout": (WINDOWS, SEQLEN),
            "calibration": (CALIBRATION_WINDOWS, SEQLEN),
            "judge": (48, 256),
        }[part]

        def make(place: Path) -> None:
            dataset = DATASETS[model][0 if part == "calibration" else 1]
            tokenizer = None
            if model == "tiny_llama":
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(MODELS[model])
            seed = {"heldout": 11, "calibration": 12, "judge": 13}[part]
            windows = load_windows(dataset, tokenizer, nsamples=count, seqlen=length, seed=seed)
            save_file({"input_ids": windows.input_ids.long().contiguous()}, place)

        key = f"{file_digest(MODELS[model])} {part} {count} {length}"
        return self.kept(self.folder / "tokens" / f"{model}.{part}.safetensors", key, make)

    def read_tokens(self, model: str, part: str) -> Tensor:
        """The ids, int64, [windows, tokens]."""
        return load_file(self.tokens(model, part))["input_ids"]

    def solved(self, case: Case) -> list[CodedLayer]:
        """Codes that the solver chose for a case."""
        model = self.source(case.model)
        config = QuantizeConfig(
            grid=case.grid,
            layers=case.rules,
            solver=SOLVER,
            data=DataConfig(DATASETS.get(case.model, DATASETS["tiny_llama"])[0], CALIBRATION_WINDOWS, SEQLEN),
            format="none",
            ignore=("lm_head", *case.ignore),
            gptq_samples=16,
            baselines=(),
            validation_windows=4,
        )
        # The solver's code is not part of the key: any codes on the grid prove the formats.
        key = f"{file_digest(model)} {case} {json.dumps(RECIPE)} {CALIBRATION_WINDOWS} {SEQLEN}"
        place = self.kept(
            self.folder / "solved" / case.name, key, lambda out: Pipeline(str(model), out, config).execute()
        )
        return list(RunDirectory(place).coded_layers())

    def exported(self, case: Case, format_name: str) -> Path:
        """The case in a format, written by the registry's own writer, with its proof."""
        layers = self.solved(case)
        run = self.folder / "solved" / case.name

        def make(place: Path) -> None:
            registry.by_name(format_name).write(
                Checkpoint(self.source(case.model)),
                place,
                layers,
                recipe={"case": case.name, **RECIPE},
                prove_from=lambda: layers,
            )

        key = f"{file_digest(run / 'codes.safetensors')} {self.format_digest}"
        return self.kept(self.folder / "exported" / f"{case.name}.{format_name}", key, make)
