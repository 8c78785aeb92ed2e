# SPDX-License-Identifier: Apache-2.0
"""Seconds per GB and peak memory of `discquant export`: a finished run of a synthetic sharded Llama, format by format.

Weights, codes and scales are random: an export packs, copies, hashes and proves bytes whatever they say. Each export is
a process of its own, so its peak is its own. Two depths show that the peak does not grow with the model. One thread:
processor seconds (imports taken off) hold on a busy machine, too. Writes benchmarks/results/export.json after each row
and keeps finished rows; --again repeats them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "export.json"
TOKENIZER = ROOT / "examples" / "tiny_llama"
HIDDEN, WIDE, HEADS, KV_HEADS, GROUP = 2048, 5632, 32, 8, 128
# A symmetric 4-bit grid is one that every format holds; 3 bits are the layouts whose codes straddle words.
FORMATS = {
    4: ("compressed-tensors", "gptq", "gptq-v2", "autoround", "awq", "mlx", "gguf", "onnx"),
    3: ("compressed-tensors", "gptq", "mlx"),
}
IMPORTS = "import torch, safetensors.torch, discquant.cli, discquant.formats.registry, discquant.run.export"


def shapes(depth: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by name."""
    head = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for number in range(depth):
        block = f"model.layers.{number}"
        found |= {
            f"{block}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        rows = {"q": HIDDEN, "k": KV_HEADS * head, "v": KV_HEADS * head, "o": HIDDEN}
        found |= {f"{block}.self_attn.{name}_proj.weight": (count, HIDDEN) for name, count in rows.items()}
        found |= {f"{block}.mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def write_original(folder: Path, depth: int, shard_bytes: int) -> None:
    """A sharded bfloat16 checkpoint with config and tokenizer."""
    import torch

    from discquant.formats.output import ShardWriter

    folder.mkdir(parents=True)
    for file in TOKENIZER.glob("*token*.json"):
        shutil.copyfile(file, folder / file.name)
    vocabulary = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": depth, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, shard_bytes)
    for name, shape in shapes(depth, vocabulary).items():
        writer.add(name, torch.randn(shape, generator=generator).mul_(0.02).bfloat16())
    writer.close()


def write_run(path: Path, original: Path, bits: int) -> None:
    """A finished run's directory, as far as an export reads it."""
    import torch

    from discquant.formats.checkpoint import Checkpoint
    from discquant.formats.coded import CodedLayer
    from discquant.formats.source import model_digest
    from discquant.grids import UniformGrid
    from discquant.run.directory import RunDirectory

    source, generator = Checkpoint(original), torch.Generator().manual_seed(bits)
    layers = []
    for key, info in source.tensors.items():
        if key.endswith("_proj.weight"):
            rows, columns = info.shape
            q = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
            scale = torch.rand(rows, columns // GROUP, generator=generator).add_(0.1).mul_(0.01).bfloat16()
            layers.append(CodedLayer(key.removesuffix(".weight"), q, UniformGrid(bits, GROUP, True, scale)))
    run = RunDirectory(path)
    config = {"bits": bits, "group_size": GROUP, "ignore": ["lm_head"]}
    identity = {"source_digest": model_digest(source.sha256(), source.config()), "config": config}
    run.start({"source": str(original)}, identity)
    run.save_codes({layer.name: layer.q for layer in layers}, {layer.name: layer.grid for layer in layers})


def apart(make: Callable[..., None], *arguments: Any) -> None:
    """Call in a process of its own: what this process once held, Linux counts as its children's peak, too.

    Raises:
        RuntimeError: It failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{make.__name__} ended with {process.exitcode}")


def original_sizes(original: Path) -> tuple[list[int], list[int]]:
    """Bytes of every tensor and of every shard, from the headers."""
    shards = sorted(original.glob("*.safetensors"))
    tensors = []
    for shard in shards:
        with shard.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        rows = (row["data_offsets"] for name, row in header.items() if name != "__metadata__")
        tensors += [end - begin for begin, end in rows]
    return tensors, [shard.stat().st_size for shard in shards]


def measure(command: list[str]) -> dict[str, float]:
    """Run a process to its end; wall seconds, its processor seconds and its peak resident bytes.

    Raises:
        RuntimeError: It failed; the message is its output.
    """
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace"))
    # Linux counts ru_maxrss in KiB.
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def row_of(run: Path, original: Path, format_name: str, out: Path, start: dict[str, float]) -> dict[str, Any]:
    """Export once and say what it took, beside a process that only imports what an export imports."""
    command = [
        sys.executable,
        "-m",
        "discquant",
        "export",
        str(run),
        "--format",
        format_name,
        "--out",
        str(out),
    ]
    took = measure(command)
    tensors, shards = original_sizes(original)
    size = sum(tensors)
    written = sum(file.stat().st_size for file in (out / format_name).rglob("*") if file.is_file())
    shutil.rmtree(out)
    return {
        "format": format_name,
        "original_bytes": size,
        "weights": size // 2,
        "largest_tensor_bytes": max(tensors),
        "largest_shard_bytes": max(shards),
        "shards": len(shards),
        "written_bytes": written,
        "seconds": round(took["seconds"], 2),
        "cpu_seconds": round(took["cpu_seconds"], 2),
        "import_cpu_seconds": round(start["cpu_seconds"], 2),
        "seconds_per_gb": round(took["seconds"] / size * 1e9, 2),
        "cpu_seconds_per_gb": round((took["cpu_seconds"] - start["cpu_seconds"]) / size * 1e9, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "peak_bytes": int(took["peak_bytes"]),
        "peak_over_imports_bytes": int(took["peak_bytes"] - start["peak_bytes"]),
    }


def main() -> None:
    """Measure the chosen formats at both widths and depths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 11], help="blocks of 90 MB each")
    parser.add_argument("--shard-mb", type=int, default=250, help="shards of the original")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--formats", default="", help="comma separated; default: all that hold the width")
    parser.add_argument("--folder", type=Path, help="for models and outputs; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULT)
    os.environ["OMP_NUM_THREADS"] = "1"
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {"rows": {}}
    if given.out.exists():
        found = json.loads(given.out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        start = measure([sys.executable, "-c", IMPORTS])
        for depth in given.depths:
            original = Path(place) / f"model-{depth}"
            apart(write_original, original, depth, given.shard_mb * 10**6)
            for bits in given.bits:
                run = Path(place) / f"run-{depth}-{bits}"
                apart(write_run, run, original, bits)
                for format_name in FORMATS[bits]:
                    key = f"{format_name} {bits} bit, {depth} blocks"
                    chosen = not given.formats or format_name in given.formats.split(",")
                    if not chosen or (key in found["rows"] and not given.again):
                        continue
                    row = row_of(run, original, format_name, Path(place) / "out", start)
                    row["made"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
                    found["rows"][key] = row
                    found["machine"] = {"processor": platform.machine(), "cores": os.cpu_count()}
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    shown = {k: row[k] for k in ("seconds", "cpu_seconds_per_gb", "load_average")}
                    print(
                        key, shown, f"{row['peak_over_imports_bytes'] / 1e6:.0f} MB over imports", flush=True
                    )
                shutil.rmtree(run)
            shutil.rmtree(original)


if __name__ == "__main__":
    main()
