# SPDX-License-Identifier: Apache-2.0
"""Every row of the table: which tool reads which case in which format, and which tool makes which file for refine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cases import GGUF, LONG_BLOCKS
from families import FAMILIES

# Text and steps of a refine by the bits of the file: fewer bits lose more, and get it back from more of both.
REFINE = {
    2: {"nsamples": 8192, "seqlen": 256, "iters": 1024},
    3: {"nsamples": 8192, "seqlen": 256, "iters": 1024},
    4: {"nsamples": 512, "seqlen": 128, "iters": 512},
}


@dataclass(frozen=True)
class Consumer:
    """A tool reads what discquant wrote.

    Attributes:
        tool: Name of its environment.
        script: In tools/, without `.py`.
        case: Key of cases.CASES.
        format: Name in the registry of formats.
        arithmetic: What the tool computes in, a key of compare's baselines; None where it only decodes.
        logprobs: It gives log-probabilities, and not those of the last position.
        extra: More entries of the request.
        limit: Seconds.
    """

    tool: str
    script: str
    case: str
    format: str
    arithmetic: str | None = "float32"
    logprobs: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 900

    @property
    def name(self) -> str:
        """Unique, sortable."""
        return f"{self.script.removeprefix('consume_')} {self.format} {self.case}"


@dataclass(frozen=True)
class Producer:
    """A tool makes a file, discquant refines it, the tool decodes both.

    Attributes:
        tool: Name of the environment that makes it.
        script: In tools/.
        label: What it makes, e.g. `GPTQ 3 bit g64`.
        format: What the registry should take the file for.
        decoder: (tool, script, dtype it runs in): decodes before and after.
        bits: Of the codes; decides the bar.
        request: For the script.
        suffix: Of the file; empty for a folder.
        maker: The tool's name where the environment is called otherwise.
        limit: Seconds for each of making, refining, decoding.
    """

    tool: str
    script: str
    label: str
    format: str
    decoder: tuple[str, str, str]
    bits: int
    request: Mapping[str, Any]
    suffix: str = ""
    maker: str = ""
    limit: float = 3600

    @property
    def name(self) -> str:
        """Unique, sortable, usable as a file name."""
        return f"refine {self.maker or self.tool} {self.label}"

    @property
    def bar(self) -> float:
        """Largest allowed share of the file's own KL."""
        return 0.5 if self.bits <= 3 else 0.7

    @property
    def options(self) -> list[str]:
        """Of `discquant refine`."""
        return ["--dataset", "arithmetic", *(f"--{key}={value}" for key, value in REFINE[self.bits].items())]


def _llama_cpp(case: str, arithmetic: str) -> Consumer:
    return Consumer("llamacpp", "consume_llamacpp", case, "gguf", arithmetic)


# gptqmodel's torch kernels take float16 and bfloat16 only; auto-round's force the model to float16 on the CPU.
HALF = "float16"
# compare.IN_SEQUENCE: how MLX adds up a row on the CPU.
SEQUENCE = "float32, summed in sequence"
SHORT, LONG = "int8 activations, blocks of 32", "int8 activations, blocks of 256"
CONSUMERS = (
    *(
        Consumer("project", "consume_transformers", case, "compressed-tensors")
        for case in ("int3", "int4", "int4_asym", "mixed", "stories_int3", "stories_int4")
    ),
    # Their modules compute in the dtype of the checkpoint.
    *(
        Consumer("project", "consume_transformers", case, "compressed-tensors", "bfloat16")
        for case in ("nvfp4", "mxfp4")
    ),
    *(
        Consumer("gptqmodel", "consume_gptqmodel", case, format_name, HALF)
        for format_name in ("gptq", "gptq-v2")
        for case in ("int3", "int4", "mixed")
    ),
    Consumer("gptqmodel", "consume_gptqmodel", "int4_asym", "awq", HALF),
    *(
        Consumer("autoround", "consume_autoround", case, "autoround", HALF)
        for case in ("int3", "int4", "mixed")
    ),
    *(Consumer("project", "consume_gguf", case, "gguf", None) for case in (*GGUF, "mixed", "stories_q4_0")),
    *(_llama_cpp(kind, LONG if kind.endswith(LONG_BLOCKS) else SHORT) for kind in GGUF),
    _llama_cpp("stories_q4_0", SHORT),
    *(_llama_cpp(name, SHORT) for name in FAMILIES),
    *(
        Consumer("mlx", "consume_mlx", case, "mlx", "float32, summed in sequence")
        for case in ("int3", "int4", "mixed")
    ),
    *(
        Consumer("project", "consume_onnxruntime", case, "onnx")
        for case in ("int3", "int4", "int4_asym", "mixed")
    ),
    *(
        Consumer("vllm", "consume_vllm", "int4", format_name, "bfloat16", logprobs=True, limit=1800)
        for format_name in ("compressed-tensors", "gptq", "autoround")
    ),
    *(
        Consumer("lm_eval", "consume_lm_eval", case, "compressed-tensors", None, limit=1800)
        for case in ("int3", "int4")
    ),
)

_GPTQ = ("gptqmodel", "consume_gptqmodel", HALF)
_AUTO = ("autoround", "consume_autoround", "float32")
_COMPRESSED = ("project", "consume_transformers", "float32")
_GGUF = ("project", "consume_gguf", "float32")


def _gguf(quantizer: str, kind: str, bits: int) -> Producer:
    request = {"quantizer": quantizer, "type": kind}
    tool = "project" if quantizer == "gguf" else quantizer
    return Producer(tool, "produce_gguf", kind, "gguf", _GGUF, bits, request, ".gguf", quantizer)


PRODUCERS = (
    *(
        Producer(
            tool, script, f"{label} {bits} bit g64", kind, decoder, bits, {"bits": bits, "group_size": 64}
        )
        for tool, script, label, kind, decoder in (
            ("gptqmodel", "produce_gptqmodel", "GPTQ", "gptq", _GPTQ),
            ("autoround", "produce_autoround", "AutoRound", "autoround", _AUTO),
            ("llmcompressor", "produce_llmcompressor", "GPTQ", "compressed-tensors", _COMPRESSED),
        )
        for bits in (3, 4)
    ),
    _gguf("gguf", "Q4_0", 4),
    _gguf("llamacpp", "Q4_0", 4),
    _gguf("llamacpp", "Q4_K_S", 4),
    _gguf("llamacpp", "Q3_K_S", 3),
    # Mixes: Q4_K_M holds Q6_K, Q2_K also Q3_K and Q4_K, and both what llama.cpp takes for rows without blocks of 256.
    _gguf("llamacpp", "Q4_K_M", 4),
    _gguf("llamacpp", "Q2_K", 2),
)
