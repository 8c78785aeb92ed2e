# SPDX-License-Identifier: Apache-2.0
"""Everything that is claimed of packed inference on a CPU, in one run: `python benchmarks/run_packed_cpu.py`.

Per shape, number of threads and number of tokens, all providers take turns, one call each on weights that left the
caches, so that other load on the machine meets all alike; the plain read of the same bytes takes its turn too. Rates
are of the first quartile of the turns; ratios are taken turn by turn, their median counts, and `ms_turns` lets anyone
take others. Then tokens/s of the bundled model and of one block of Llama-3-8B's sizes. Writes
results/packed-<processor>.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cpu_providers as providers
from ggml_peer import Ggml
from harness import machine
from packed_targets import verdicts

from discquant import environment

HERE = Path(__file__).resolve().parent
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B o": (8192, 8192),
    "odd": (4097, 10944),
}
TOKENS = (1, 4, 16, 128)
FIELDS = (
    "op", "provider", "shape", "n", "k", "tokens", "bits", "group", "threads", "turns", "ms_min", "ms_p25", "ms_p50",
    "gb_s", "roof_gb_s", "share_of_roof", "gweights_s", "gflop_s", "times_torch_int4", "tokens_s", "load", "device",
    "torch", "commit", "date", "ms_turns",
)  # fmt: skip
Row = dict[str, Any]


def processor() -> str:
    """The processor's name for a file: what /proc/cpuinfo calls it, and the best instructions it has."""
    name = re.sub(
        r"\(r\)|processor", "", machine()["device"].lower().removeprefix("cpu ").partition(" threads")[0]
    )
    found = environment.facts()["extension"].get("cpu_features") or {}
    best = next((isa for isa in ("amx_int8", "avx512_vnni", "avx512f", "avx2") if found.get(isa)), "")
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {best}").strip("-")


def clock(threads: int) -> Any:
    """With one thread all providers run in the caller, so its own CPU time leaves out what other processes took."""
    return time.thread_time if threads == 1 else time.perf_counter


def measure_shape(
    shape: str, n: int, k: int, threads: list[int], tokens: list[int], seconds: float, library: Ggml | None
) -> list[Row]:
    """Rows of one weight: its providers are built once and shared by all numbers of threads and tokens."""
    weight = providers.Weight(n, k)
    common = [
        *providers.ours(weight, 4, ("a15", "a8", "fp32")), *providers.ours(weight, 3, ("a15", "a8")),
        providers.exact(weight, 3), providers.dense(weight, torch.bfloat16), providers.dense(weight, torch.float32),
        providers.torch_int4(weight),
    ]  # fmt: skip
    num_bytes = next(p for p in common if p is not None).num_bytes
    reads = providers.plain_reads(num_bytes)
    blocks = providers.ggml_blocks(weight, library) if library is not None and k % 256 == 0 else {}
    rows: list[Row] = []
    for count in threads:
        torch.set_num_threads(count)
        peers = [*common, *(providers.onnx_runtime(weight, level, count) for level in (4, 0))]
        if library is not None:
            for kind, data in blocks.items():
                peers += providers.llama_cpp(weight, library, kind, data, count)
        for m in tokens:
            present = [peer for peer in peers if peer is not None and peer.most_tokens >= m]
            x = torch.randn(m, k).bfloat16()
            inputs = {dtype: x.to(dtype).contiguous() for dtype in (torch.bfloat16, torch.float32)}
            for peer in (*reads, *present):
                peer.times = []
                if peer not in reads:
                    providers.check(peer, weight, x)
            end, i = time.monotonic() + seconds, 0
            while i < 9 or (time.monotonic() < end and i < 60):
                for peer in (*reads, *present):
                    # Worker threads spin for a while after their turn: let every provider start from sleeping ones.
                    time.sleep(0.004 if count > 1 else 0)
                    peer.turn(i, inputs[peer.dtype], clock(count))
                i += 1
            roof = min(reads[:2], key=lambda read: read.quantile(0.25))
            rows += [_row(peer, roof, present, shape, weight, m, count) for peer in (*reads, *present)]
        del peers, present
    return rows


def _row(peer: Any, roof: Any, present: list[Any], shape: str, weight: Any, tokens: int, threads: int) -> Row:
    ms, count = peer.quantile(0.25), weight.n * weight.k
    rate, top = peer.num_bytes / ms / 1e6, roof.num_bytes / roof.quantile(0.25) / 1e6
    rival = next((p for p in present if p.name == "torch int4"), None)
    row: Row = {
        "op": "packed_linear", "provider": peer.name, "shape": shape, "n": weight.n, "k": weight.k,
        "tokens": tokens, "bits": peer.bits or "", "group": providers.GROUP, "threads": threads,
        "turns": len(peer.times), "ms_min": f"{min(peer.times):.4f}", "ms_p25": f"{ms:.4f}",
        "ms_p50": f"{peer.quantile(0.5):.4f}", "gb_s": f"{rate:.2f}", "roof_gb_s": f"{top:.2f}",
        "share_of_roof": f"{peer.times_as_fast(roof) * peer.num_bytes / roof.num_bytes:.3f}",
        "ms_turns": " ".join(f"{ms:.4g}" for ms in peer.times),
    }  # fmt: skip
    if peer.bits:
        row |= {"gweights_s": f"{count / ms / 1e6:.2f}", "gflop_s": f"{2 * count * tokens / ms / 1e6:.1f}"}
        row["times_torch_int4"] = f"{peer.times_as_fast(rival):.2f}" if rival is not None else ""
    return row


def block_rows(threads: int, steps: int, sizes: tuple[int, int]) -> list[Row]:
    """Milliseconds of one decoder block of Llama-3-8B's sizes per token: plain bfloat16, then packed in place."""
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    from discquant.formats.codes import QuantizedLinear
    from discquant.modules import load_packed

    hidden, inner = sizes
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, dtype=torch.bfloat16,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_num_threads(threads)

    def coded(name: str, shape: torch.Size, bits: int) -> QuantizedLinear:
        q = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        step = torch.full((shape[0], shape[1] // 128), 2.0**-8).bfloat16()
        return QuantizedLinear(name, q, step, None, bits, 128)

    rows = []
    for bits, mode in ((16, ""), (4, "a15"), (4, "a8"), (3, "a15"), (3, "a8")):
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config).bfloat16()
        model = model.to_empty(device="cpu").eval()
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        if bits < 16:
            names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
            load_packed(
                model,
                (coded(n, model.get_submodule(n).weight.shape, bits) for n in names),
                mode=mode,  # type: ignore[arg-type]
            )
        cache, token, times = DynamicCache(config=config), torch.zeros(1, 1, dtype=torch.long), []
        with torch.inference_mode():
            for i in range(steps + 2):
                start = clock(threads)()
                model(input_ids=token, past_key_values=cache, use_cache=True)
                if i >= 2:
                    times.append(clock(threads)() - start)
        ms = sorted(times)[len(times) // 4] * 1e3
        rows.append({
            "op": "decode one block", "provider": f"discquant {mode}" if mode else "torch bfloat16",
            "shape": f"hidden {hidden}, inner {inner}", "tokens": 1, "bits": bits, "group": 128, "threads": threads,
            "turns": len(times), "ms_min": f"{min(times) * 1e3:.3f}", "ms_p25": f"{ms:.3f}",
            "ms_p50": f"{sorted(times)[len(times) // 2] * 1e3:.3f}", "tokens_s": f"{1e3 / ms:.1f}",
        })  # fmt: skip
    return rows


def bundled_rows(threads: int, new_tokens: int) -> list[Row]:
    """Greedy tokens/s of the bundled model from 3-bit codes, each way to load it, the best of three."""
    import discquant
    from discquant.config import GridConfig, QuantizeConfig
    from discquant.formats import export_compressed_tensors

    folder = HERE.parent / "examples" / "tiny_llama"
    if not (folder / "config.json").exists():
        print("bundled model: absent, left out")
        return []
    torch.set_num_threads(threads)
    config = QuantizeConfig(grid=GridConfig(3, 64), method="rtn")
    ids = torch.randint(3, 1000, (2, 16))
    result = discquant.quantize(discquant.load(folder), None, config, calibration=ids)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        export_compressed_tensors(folder, Path(place) / "out", result.layers())
        for mode in ("plain", "exact", "fp32", "a15", "a8"):
            model: Any = discquant.load(Path(place) / "out", mode=mode)  # type: ignore[arg-type]
            settings = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
            best = float("inf")
            for _ in range(3):
                start = clock(threads)()
                model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), pad_token_id=0, **settings)
                best = min(best, clock(threads)() - start)
            rows.append({
                "op": "generate", "provider": f"discquant {mode}", "shape": "tiny_llama", "tokens": new_tokens,
                "bits": 3, "group": 64, "threads": threads, "turns": 3, "ms_min": f"{best * 1e3:.1f}",
                "tokens_s": f"{new_tokens / best:.1f}",
            })  # fmt: skip
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1,2", help="numbers of threads, comma-separated")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--shapes", default="8B qkv,8B o,8B gate_up,8B down", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--seconds", type=float, default=2.5, help="per shape, threads and tokens")
    parser.add_argument("--ggml", type=Path, help="folder with libggml-base and libggml-cpu (llama.cpp)")
    parser.add_argument("--skip-models", action="store_true", help="no tokens/s")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/packed-<processor>.csv")
    options = parser.parse_args()
    options.out = options.out or HERE / "results" / f"packed-{processor()}.csv"
    library = None
    if options.ggml is not None:
        library = Ggml(options.ggml)
    else:
        print("llama.cpp: left out; give --ggml FOLDER")
    if providers.package("onnxruntime") is None or providers.package("onnx") is None:
        print("ONNX Runtime: left out; onnxruntime and onnx are not installed")
    threads = [int(count) for count in options.threads.split(",")]
    tokens = [int(m) for m in options.tokens.split(",")]
    torch.manual_seed(0)
    options.out.parent.mkdir(exist_ok=True)
    begin = time.monotonic()
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()

        def record(rows: list[Row]) -> None:
            facts = {key: machine()[key] for key in ("device", "torch", "commit", "date")}
            facts["device"] = facts["device"].rpartition(" threads")[0]
            for row in rows:
                writer.writerow(row | facts | {"load": f"{os.getloadavg()[0]:.1f}"})
            file.flush()
            print(f"{time.monotonic() - begin:5.0f} s  {rows[0]['shape'] if rows else ''}: {len(rows)} rows")

        if not options.skip_models:
            for count in threads:
                record(bundled_rows(count, 48))
                record(block_rows(count, 12, (4096, 14336)))
        for shape in options.shapes.split(","):
            record(measure_shape(shape, *SHAPES[shape], threads, tokens, options.seconds, library))
    for verdict in verdicts(options.out):
        print(verdict.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
