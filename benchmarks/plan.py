# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory and seconds per step of whole runs on a CPU against their plan: `python benchmarks/plan.py`.

Each case first measures this machine's rates (`discquant plan --measure`) for its own shapes; for the times other work
should rest. Writes benchmarks/results/plan.json after each case; with --only, the others stay as they are. The plan's
share for the allocator comes from runs of the bundled model, so the other half is a random model of another shape,
whose tensors are below and above what the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from discquant import environment

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_llama"
RESULT = ROOT / "benchmarks" / "results" / "plan.json"
# Name -> whether it is the random model, windows, tokens per window, windows per step and per pass, more options.
CASES: dict[str, tuple[bool, int, int, int, int, tuple[str, ...]]] = {
    "bundled, fp32 AdamW": (False, 4096, 256, 8, 8, ()),
    "bundled, u8 momentum": (False, 1024, 512, 16, 4, ("--state", "u8", "--optimizer", "momentum")),
    "bundled, short windows": (False, 512, 128, 16, 16, ()),
    "6 x 512 random, fp32 AdamW": (True, 512, 256, 8, 8, ()),
    "6 x 512 random, u8 AdamW": (True, 512, 256, 8, 2, ("--state", "u8")),
    "6 x 512 random, long windows": (True, 64, 1024, 8, 8, ()),
}


def random_model(out: Path) -> None:
    """Write a random Llama of 6 blocks of width 512 with the bundled model's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(case: str, model: Path, out: Path, iters: int) -> dict[str, Any]:
    """Run one case in a process of its own; return what its summary says of plan and actual."""
    _, rows, seqlen, batch, micro, extra = CASES[case]
    options = [
        "--bits", "3", "--group-size", "64", "--dataset", "arithmetic", "--nsamples", str(rows),
        "--seqlen", str(seqlen), "--batch-size", str(batch), "--micro-batch", str(micro), "--iters", str(iters),
        "--baselines", "none", *extra,
    ]  # fmt: skip
    environ = {**os.environ, "DISCQUANT_CACHE": str(out.with_suffix(".rates"))}
    for words in (
        ("plan", str(model), "--measure", *options),
        ("quantize", str(model), str(out), "--gptq-samples", "32", *options),
    ):
        command = [sys.executable, "-m", "discquant", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if done.returncode != 0:
            raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    plan = json.loads((out / "summary.json").read_text(encoding="utf-8"))["plan"]
    return {
        "windows": rows, "seqlen": seqlen, "batch_size": batch, "micro_batch": micro, "iters": iters,
        "peak_ratio": plan["peak_ratio"], "within": plan["within"]["memory"], "phases": plan["memory"],
        "step": plan["step_seconds"],
    }  # fmt: skip


def main() -> None:
    """Run every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iters", type=int, default=4)
    parser.add_argument("--only", help="cases whose name contains this")
    given = parser.parse_args()
    facts = environment.facts()
    found: dict[str, Any] = {}
    if given.only and RESULT.exists():
        found = json.loads(RESULT.read_text(encoding="utf-8"))["cases"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_model(folder / "random")
        for number, (case, (random, *_)) in enumerate(CASES.items()):
            if given.only and given.only not in case:
                continue
            model = folder / "random" if random else MODEL
            found[case] = measure(case, model, folder / str(number), given.iters)
            print(case, found[case]["peak_ratio"], found[case]["step"], flush=True)
            ordered = {name: found[name] for name in CASES if name in found}
            document = {"versions": facts["versions"], "cpu": facts["cpu"], "cases": ordered}
            RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
