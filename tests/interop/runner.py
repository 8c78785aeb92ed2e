# SPDX-License-Identifier: Apache-2.0
"""Runs a tool's script in its environment, and turns what comes back into one row of the table."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare
import environments
import torch
from cases import CASES, MODELS, ROOT, Case, Workshop, file_digest
from filediff import outside_codes
from rows import Consumer, Producer
from safetensors.torch import load_file
from torch import Tensor

from discquant.formats import registry

HERE = Path(__file__).resolve().parent
TOOL_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "GPTQMODEL_CPU_WORKERS": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class ToolError(RuntimeError):
    """A tool failed; the message is its own."""


def run_script(
    arguments: Sequence[str | Path], log: Path, limit: float, environment: Mapping[str, str] | None = None
) -> None:
    """Run a process of its own group at low priority until it ends or its time is over.

    Raises:
        ToolError: It failed (its last error line), or took longer than `limit` seconds.
    """
    with log.open("w", encoding="utf-8") as handle:
        process = subprocess.Popen(
            ["nice", "-n", str(environments.NICE), *map(str, arguments)],
            stdout=handle,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=log.parent,  # some tools write logs where they are started
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except BaseException as cause:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(cause, subprocess.TimeoutExpired):
                raise ToolError(f"stopped after {limit:.0f} s") from cause
            raise
    if status:
        raise ToolError(environments.last_error(log))


def public(message: str) -> str:
    """A tool's message without paths and addresses of this machine."""
    short = message.replace(str(ROOT), ".")
    short = re.sub(r"\w+://\S+", "<address>", short)
    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+([\w.@+-]+)", r"\1", short)


class Runner:
    """Makes rows, in one working folder."""

    def __init__(self, workshop: Workshop) -> None:
        """Bind to the workshop that keeps the inputs."""
        self.workshop = workshop

    def ask(
        self, tool: str, script: str, folder: Path, request: Mapping[str, Any], limit: float
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Run tools/<script>.py on a request; give its facts and arrays.

        Raises:
            ToolError: See run_script.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "request.json").write_text(json.dumps(request, default=str), encoding="utf-8")
        run_script(
            [environments.python(tool), HERE / "tools" / f"{script}.py", folder],
            folder / "log",
            limit,
            TOOL_ENVIRONMENT,
        )
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        return facts, load_file(folder / "arrays.safetensors")

    def key(self, row: Consumer | Producer) -> str:
        """Digest of everything a finished row depends on; the row is kept while it stays the same."""
        shared = [HERE / "tools" / name for name in ("exchange.py", "torch_models.py", "gguf_names.py")]
        scripts = [row.script] if isinstance(row, Consumer) else [row.script, row.decoder[1]]
        files = [*shared, *(HERE / "tools" / f"{script}.py" for script in scripts)]
        files += [HERE / "compare.py", HERE / "filediff.py", environments.requirements(row.tool)]
        if isinstance(row, Consumer):
            return file_digest(*files, self.workshop.exported(CASES[row.case], row.format))
        digest = file_digest(*files, MODELS["tiny_llama"], ROOT / "discquant")
        return " ".join((digest, *row.options))

    def consume(self, row: Consumer) -> dict[str, Any]:
        """Check one tool on one exported case.

        Raises:
            ToolError: The tool failed.
        """
        case = CASES[row.case]
        layers = self.workshop.solved(case)
        path = self.workshop.exported(case, row.format)
        folder = self.workshop.folder / "rows" / row.name.replace(" ", "_")
        request: dict[str, Any] = {
            "model": path / "model.gguf" if row.format == "gguf" else path,
            "dtype": row.arithmetic if row.arithmetic in compare.EPSILON else "float32",
            "layers": [[layer.name, layer.q.shape[1]] for layer in layers],
            **row.extra,
        }
        if row.script == "consume_lm_eval":
            return self._lm_eval(row, case, folder, request)
        if row.arithmetic is not None:
            request["tokens"] = self.workshop.tokens(case.model, "heldout")
        if row.script == "consume_llamacpp" and case.model == "tiny_llama":
            request["texts"] = self._texts(case.model)
        facts, arrays = self.ask(row.tool, row.script, folder, request, row.limit)
        result = {key: value for key, value in facts.items() if key not in ("inputs", "outputs")}
        weights = {name[7:]: array for name, array in arrays.items() if name.startswith("weight/")}
        if weights:
            result |= compare.compare_weights(layers, weights)
        if "logits" in arrays and row.arithmetic is not None:
            result |= self._compare_logits(row, case, arrays["logits"])
        result["ok"] = self._agrees(result, bit_for_bit=row.script == "consume_gguf")
        return result

    def _agrees(self, result: Mapping[str, Any], bit_for_bit: bool) -> bool:
        """Whether every number that a row holds is as it must be."""
        checks = []
        if "weights" in result:
            checks += [not result["missing"], result["codes_equal"] == result["weights"]]
        if bit_for_bit:
            checks.append(result["bits_equal"] == result["weights"] and result["bits_equal_as"] == "float32")
        if "difference" in result:
            checks.append(result["difference"] <= result["bound"])
        if "texts" in result:
            checks.append(result["texts_same"] == result["texts"])
        return bool(checks) and all(checks)

    def _compare_logits(self, row: Consumer, case: Case, found: Tensor) -> dict[str, Any]:
        ids = self.workshop.read_tokens(case.model, "heldout")
        layers, path = self.workshop.solved(case), self.workshop.source(case.model)
        oracle = compare.logits(compare.load_model(path, torch.float64, compare.dense_weights(layers)), ids)
        assert row.arithmetic is not None
        plain = compare.baseline(path, layers, ids, row.arithmetic)
        original = compare.logits(compare.load_model(path, torch.float64), ids)
        if row.logprobs:
            oracle, plain, original = (
                torch.log_softmax(part, -1)[:, :-1] for part in (oracle, plain, original)
            )
        return {
            "arithmetic": row.arithmetic,
            "positions": found.shape[0] * found.shape[1],
            "difference": float((found.double() - oracle).abs().max()),
            "bound": compare.logit_bound(oracle, plain, row.arithmetic),
            "kl_rounded_tool": compare.mean_kl(oracle, found),
            "kl_original_rounded": compare.mean_kl(original, oracle),
            "perplexity_tool": compare.perplexity(found, ids),
            "perplexity_rounded": compare.perplexity(oracle, ids),
        }

    def _texts(self, model: str) -> list[list[Any]]:
        """Held-out documents with the original tokenizer's ids."""
        from transformers import AutoTokenizer

        from discquant.calibration.arithmetic import calibration_documents

        tokenizer = AutoTokenizer.from_pretrained(MODELS[model])
        texts = calibration_documents("heldout", 40)
        return [[text, tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]

    def _lm_eval(self, row: Consumer, case: Case, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        """The task's metrics on the quantized folder must be those of the same weights as plain floats."""
        layers, source = self.workshop.solved(case), MODELS[case.model]

        def save(place: Path) -> None:
            from transformers import AutoTokenizer

            model = compare.load_model(source, torch.float32, compare.dense_weights(layers))
            model.save_pretrained(place)
            AutoTokenizer.from_pretrained(source).save_pretrained(place)

        key = file_digest(self.workshop.exported(case, row.format))
        request["rounded"] = self.workshop.kept(self.workshop.folder / "rounded" / case.name, key, save)
        request["tasks"], request["task"] = self._task(), "discquant_arithmetic"
        facts, _ = self.ask(row.tool, row.script, folder, request, row.limit)
        same = [
            abs(value - facts["rounded"][name]) <= 1e-4 * abs(facts["rounded"][name])
            for name, value in facts["quantized"].items()
        ]
        return {**facts, "ok": bool(same) and all(same)}

    def _task(self) -> Path:
        """A folder with lm-eval's description of a task and its problems, held-out ones."""
        from discquant.calibration.arithmetic import problems, prompt

        folder = self.workshop.folder / "lm_eval_task"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "problems.jsonl").open("w", encoding="utf-8") as handle:
            for problem in problems("heldout", 40):
                handle.write(json.dumps({"prompt": prompt(problem), "solution": problem.solution}) + "\n")
        task = {
            "task": "discquant_arithmetic",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "problems.jsonl")}},
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{solution}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }
        # JSON is YAML.
        (folder / "discquant_arithmetic.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")
        return folder

    def produced(self, row: Producer) -> Path:
        """The tool's own file, made again when the model changes."""
        source = MODELS["tiny_llama"]
        place = (
            self.workshop.folder
            / "produced"
            / f"{row.maker or row.tool}_{row.label}{row.suffix}".replace(" ", "_")
        )
        scripts = [HERE / "tools" / f"{name}.py" for name in (row.script, "exchange", "gguf_names")]

        def make(out: Path) -> None:
            folder = self.workshop.folder / "rows" / f"{out.name}_made"
            request = {
                "model": source,
                "tokens": self.workshop.tokens("tiny_llama", "calibration"),
                "out": out,
                **row.request,
            }
            self.ask(row.tool, row.script, folder, request, row.limit)

        return self.workshop.kept(
            place, f"{file_digest(source, *scripts)} {json.dumps(dict(row.request), sort_keys=True)}", make
        )

    def refine(self, row: Producer) -> dict[str, Any]:
        """Make the tool's file, refine it, decode both with the tool's own reader, and measure both.

        Raises:
            ToolError: One of these failed.
        """
        source = MODELS["tiny_llama"]
        before = self.produced(row)
        folder = self.workshop.folder / "rows" / row.name.replace(" ", "_")
        run = self.workshop.folder / "refined" / before.name
        shutil.rmtree(run, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "discquant",
            "refine",
            before,
            run,
            "--original",
            source,
            *row.options,
        ]
        run_script(command, folder / "refine.log", row.limit)
        found = registry.find(before).name
        if found != row.format:
            raise ToolError(f"{before.name} was taken for {found}, which is not {row.format}")
        out = run / found / before.name if before.is_file() else run / found
        ids = self.workshop.read_tokens("tiny_llama", "judge")
        original = compare.logits(compare.load_model(source, torch.float32), ids)
        kl, facts = {}, {}
        for name, path in (("before", before), ("after", out)):
            weights, facts = self._decoded(row, path, folder / name)
            kl[name] = compare.mean_kl(
                original, compare.logits(compare.load_model(source, torch.float32, weights), ids)
            )
        changed = outside_codes(before, out)
        ratio = kl["after"] / kl["before"]
        return {
            "versions": facts["versions"],
            "kl_before": kl["before"],
            "kl_after": kl["after"],
            "ratio": ratio,
            "bar": row.bar,
            "outside_codes_changed": changed,
            "ok": ratio <= row.bar and not changed,
        }

    def _decoded(self, row: Producer, path: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every block's matrices as the tool's own reader gives them."""
        layers = [
            [name, module.in_features]
            for name, module in compare.load_model(MODELS["tiny_llama"], torch.float32).named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        ]
        tool, script, dtype = row.decoder
        request = {"model": path, "dtype": dtype, "layers": layers}
        facts, arrays = self.ask(tool, script, folder, request, row.limit)
        wanted = {name for name, _ in layers}
        return {name[7:]: array for name, array in arrays.items() if name[7:] in wanted}, facts


def timed(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with its seconds; a failure of a tool, or of discquant, becomes a row that says so."""
    begin = time.perf_counter()
    try:
        result = make()
    except Exception as error:  # whatever happens in one row, the others are still wanted
        result = {"ok": False, "message": public(f"{type(error).__name__}: {error}".splitlines()[0])[:300]}
    return {**result, "seconds": round(time.perf_counter() - begin, 1)}
