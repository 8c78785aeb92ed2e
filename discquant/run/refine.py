# SPDX-License-Identifier: Apache-2.0
"""Refine: a quantized file and its original in, the same file with better codes out.

Scales, zero points, types and order stay; only codes change. The file itself is always measured beside the result, and
is kept where the result is not better on held-out text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from discquant.config import GridConfig, QuantizeConfig
from discquant.errors import CheckpointError, ConfigError, ResumeError
from discquant.formats import registry
from discquant.formats.bits import file_bits_per_weight
from discquant.formats.card import origin_of
from discquant.formats.checkpoint import Checkpoint, read_json
from discquant.formats.coded import CodedLayer
from discquant.formats.output import MANIFEST
from discquant.formats.refined import finish_refined
from discquant.formats.rewrite import weight_files
from discquant.formats.safetensors_format import SafetensorsFormat, beyond_weights, weights_only
from discquant.formats.source import Source, pickled_files
from discquant.grids import Grid
from discquant.run.derive import Derivation, check_derivation, common_grid
from discquant.run.events import Events
from discquant.run.identity import told_options
from discquant.run.pipeline import Pipeline
from discquant.run.served import served_dtype
from discquant.run.solving import kept_start
from discquant.run.summary import layer_table, weight_bytes
from discquant.run.told_grids import kinds_of_file, of_file
from discquant.run.work import Codes, Work
from discquant.solver.chain import Chain, DecoderChain
from discquant.solver.engine import Engine
from discquant.solver.measure import mean_kl, served_weights
from discquant.solver.solve import START_KL_ROWS, Solve

FILE = "file"
_CHUNK = 16 << 20


class RefinePipeline(Pipeline):
    """One run from a quantized file and its original; `execute` does everything that is left to do."""

    # Original weights are in memory: they are compared with the file, and scaled where its basis asks for it.
    blockwise = False

    def __init__(
        self,
        quantized: str | Path,
        out: str | Path,
        original: str | Path,
        config: QuantizeConfig | None = None,
        *,
        resume: bool = True,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        events: Events | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Name inputs and output.

        Args:
            quantized: A folder or file in any format that is read.
            out: Run directory; the refined model lands in it under the format's name.
            original: The model that it was quantized from.
            config: Solver, data, seed; `grid`, `format` and `ignore` are those of the file. None is the default with
                no baseline but the file.
            resume: Continue a run that is there.
            trust_remote_code: See `open_source`.
            allow_pickle: See `open_source`.
            events: What to call on progress.
            engine: Where and how; None is the CPU, resident.

        Raises:
            ConfigError: A method that does not refine, or steps that move scales.
            MissingModelError, CheckpointError: There is no quantized file that can be read.
        """
        self.quantized = Path(quantized)
        self.chosen = registry.find(self.quantized)
        config = config or QuantizeConfig(baselines=())
        if config.method == "rtn":
            raise ConfigError(
                "refine: rounding to nearest is no refinement; use discquant, guided, gptq or greedy"
            )
        if config.method == "discquant" and config.solver.scale_iters:
            raise ConfigError(
                f"refine: scale_iters must be 0, for the file keeps its scales, got {config.solver.scale_iters}"
            )
        self.file_layers = {layer.name: layer for layer in self.chosen.read(self.quantized)}
        bits, group, sym = common_grid(self.file_layers)
        grid = GridConfig(bits, group if group == -1 or group % 8 == 0 else -1, sym)
        config = dataclasses.replace(config, grid=grid, layers=(), format=self.chosen.name)
        self.derivation: Derivation | None = None
        self._fixed: dict[str, CodedLayer] = {}
        super().__init__(
            original,
            out,
            config,
            resume=resume,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            events=events,
            engine=engine,
        )

    def _chain(self, source: Source) -> DecoderChain:
        """Check that the file derives from the original; quantize exactly what the file has quantized."""
        every = DecoderChain(source.model, ("lm_head",), routers=True)
        tokens = torch.arange(16).unsqueeze(0) % int(source.model.get_input_embeddings().weight.shape[0])
        self.derivation = check_derivation(self.chosen, self.quantized, self.file_layers, source, tokens)
        more = beyond_weights(self.chosen, self.quantized)
        if more:
            self.events.say(f"note: {weights_only(more)}, and only they are compared with the original")
        for name in self.derivation.folded:
            self.events.say(f"note: the file's weights are scaled by {name}; refined in its basis")
        if self.derivation.not_compared:
            few = ", ".join(self.derivation.not_compared[:4])
            self.events.say(f"note: not compared with the original: {few}")
        names = {ref.name for refs in every.weights for ref in refs}
        # Layers outside the blocks (a quantized head) keep their codes; teacher and student see them as they are.
        self._fixed = {name: layer for name, layer in self.file_layers.items() if name not in names}
        absent = tuple(sorted(names - set(self.file_layers)))
        if names <= set(absent):
            raise CheckpointError("refine: the file quantizes no layer of the decoder blocks")
        self._settle(source.model)
        return DecoderChain(source.model, ("lm_head", *absent), routers=True)

    def _check_formats(self, source: Source, chain: Chain) -> None:
        """Nothing to refuse: the file exists in its format already."""

    def _identity(self, source: Source) -> dict[str, Any]:
        return {**super()._identity(source), "refines": {self.chosen.name: _digest(self.quantized)}}

    def _record(self, source: Source) -> dict[str, Any]:
        kinds = kinds_of_file(self.chosen.describe(self.quantized).layers, self.chosen.name)
        return {
            **super()._record(source),
            "quantized": str(self.quantized.resolve()),
            "file_grids": kinds,
        }

    def _grids(self, chain: Chain, source: Source) -> dict[str, Grid]:
        """The file's own grids."""
        return {name: layer.grid for name, layer in self.file_layers.items()}

    def _served(self, source: Source) -> torch.dtype:
        """What the file's engine dequantizes to: the dtype its configuration names; llama.cpp works in float32."""
        if isinstance(self.chosen, SafetensorsFormat):
            return served_dtype(read_json(self.quantized / "config.json"))
        return torch.float32

    def _choose_start(self, work: Work) -> Codes | None:
        """Start from the file's codes or from GPTQ's on the file's grids, whichever is nearer to the original."""
        if self.config.solver.start != "gptq":
            return None
        chain, dtype = work.chain, self._compute_dtype()
        candidates: dict[str, Codes] = {
            FILE: {ref.name: self.file_layers[ref.name].q for refs in chain.weights for ref in refs},
            "gptq": self._layerwise(work, "gptq"),
        }
        batches = work.rows.batches(range(min(START_KL_ROWS, len(work.rows))))
        found = {
            name: mean_kl(chain, served_weights(chain, work.grids, codes, work.served, dtype), batches)
            for name, codes in candidates.items()
        }
        chosen = min(found, key=lambda name: found[name])
        self.events.say(
            f"starting from {'the file' if chosen == FILE else 'GPTQ'}'s codes: KL "
            + ", ".join(f"{name} {value:.5f}" for name, value in found.items())
        )
        return candidates[chosen]

    def _final(self, codes: Codes) -> Codes:
        """Keep the file's code wherever it stands for the same weight (a group of one level, the two zeros of e2m1)."""
        final = {}
        for name, layer in self.file_layers.items():
            if name in self._fixed:
                final[name] = layer.q
                continue
            same = layer.grid.dequantize(codes[name], torch.float32) == layer.dequantize(torch.float32)
            final[name] = torch.where(same, layer.q, codes[name])
        return final

    def _baselines(self, work: Work, codes: Codes, solve: Solve | None) -> dict[str, Codes]:
        """The file itself, and what was asked for besides."""
        fixed = {name: layer.q for name, layer in self._fixed.items()}
        found: dict[str, Codes] = {FILE: {name: layer.q for name, layer in self.file_layers.items()}}
        for name in self.config.baselines:
            found[name] = {**self._layerwise(work, name), **fixed}
        return found

    def _export(self, work: Work, codes: Codes, grids: Mapping[str, Grid], summary: dict[str, Any]) -> None:
        """Write the file with the better codes, and say which they are."""
        methods = summary["methods"]
        before, after = methods[FILE]["kl_mean"], methods[self.config.method]["kl_mean"]
        # None: no position could be measured.
        better = before is not None and after is not None and after < before
        if not better:
            result, file = ("-" if kl is None else f"{kl:.5f}" for kl in (after, before))
            self.events.say(
                f"the result is not better on held-out text (KL {result}, the file {file}): its codes are kept"
            )
            codes = {name: layer.q for name, layer in self.file_layers.items()}
            self.directory.save_codes(codes, grids)
            # What is served is the file: card and report must not give it the numbers of the rejected solve.
            summary["method"] = FILE
            summary["layers"] = layer_table(work.chain, grids, codes, summary.get("experts_unseen", ()))
        assert self.derivation is not None
        summary["refine"] = {
            "format": self.chosen.name,
            "kl_before": before,
            "kl_after": after if better else before,
            "kl_ratio": None if before is None else (after if better else before) / max(before, 1e-30),
            "improved": better,
            "rejected": None if better else self.config.method,
            "start": self._started_from(),
            **_outside(work.chain, self.file_layers),
            "codes_changed": sum(
                int((codes[name] != layer.q).sum()) for name, layer in self.file_layers.items()
            ),
            "derivation": dataclasses.asdict(self.derivation),
        }
        target = self.directory.path / self.chosen.name
        if target.exists():
            manifest = read_json(target / MANIFEST)
            if "refined_from" not in manifest:
                raise ResumeError(
                    f"refine: {target} was written by an earlier version; remove that folder, and the same command "
                    "writes it anew"
                )
        else:
            # config.grid only stands for the file's grids.
            kinds = self.directory.config().get("file_grids")
            recipe = {**of_file(told_options(self.config), kinds), "summary": summary}
            # Pickled weights are hashed by file, and together with config.json.
            original = work.source.path
            pickled = pickled_files(original)
            sha256 = work.source.digest if pickled else Checkpoint(original).sha256()
            origin = origin_of(original, sha256)
            manifest = self.chosen.rewrite(
                self.quantized,
                target,
                codes,
                finish=lambda folder: finish_refined(self.chosen, folder, original, origin, recipe),
            )
        summary["byte_diff"] = manifest["byte_diff"]
        summary["refine"]["file"] = manifest["refined_from"]
        summary["sizes"]["bits_per_weight"] = file_bits_per_weight(self.chosen, target)
        summary["sizes"]["packed_bytes"] = weight_bytes(target)
        summary["sizes"]["formats"] = {self.chosen.name: weight_bytes(target)}

    def _started_from(self) -> str | None:
        """Name what the solve started from; None for methods without a start."""
        if self.config.method != "discquant":
            return None
        kept = kept_start(self.directory)
        if kept is None:
            return self.config.solver.start
        same = all(torch.equal(q, self.file_layers[name].q) for name, q in kept.items())
        return FILE if same else "gptq"


def _outside(chain: Chain, layers: Mapping[str, CodedLayer]) -> dict[str, int]:
    """Count the file's codes, and those that are neither neighbour of the original weight."""
    outside = total = 0
    for ref in (ref for refs in chain.weights for ref in refs):
        layer = layers[ref.name]
        q_down, _ = layer.grid.neighbours(ref.matrix().cpu())
        value = layer.dequantize(torch.float32)
        down = layer.grid.dequantize(q_down, torch.float32)
        up = layer.grid.dequantize(q_down + 1, torch.float32)
        outside += int(((value != down) & (value != up)).sum())
        total += value.numel()
    return {"codes": total, "codes_outside_neighbours": outside}


def _digest(path: Path) -> str:
    """Hash the bytes of a quantized model: a file, or the weights and configuration of a folder."""
    digest = hashlib.sha256()
    files = [*weight_files(path), *(sorted(path.glob("*.json")) if path.is_dir() else [])]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(_CHUNK):
                digest.update(piece)
    return digest.hexdigest()
