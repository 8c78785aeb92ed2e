# SPDX-License-Identifier: Apache-2.0
"""Which engines serve what, and what would break: the preflight table, with the month it was true.

The field moves; a row says what was seen then (formats.md sections 11 and 12), not what must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from discquant.errors import either
from discquant.formats.gguf_types import TYPES
from discquant.formats.scheme import Scheme
from discquant.grids.fused import FUSED, experts_of

AS_OF = "2026-09"  # a row that was tried later says when in its note
# What engines call GPTQ is v1; v2 is read by gptqmodel, other readers of it were not looked up.
_V1, _V2, _ANY = ("gptq",), ("gptq-v2",), None
_GPTQ = (*_V1, *_V2)


@dataclass(frozen=True)
class EngineRow:
    """One engine's answer to one format and grid.

    Attributes:
        engine: Name.
        formats: Formats the row is about.
        kinds: Kinds of scheme (`int`, `affine`, `nvfp4`, GGUF block types, ...).
        bits: Code widths; None is every width.
        symmetric: Which grids; None is both.
        verdict: `yes`, `no` or `unclear`.
        note: Under which condition, or since when.
    """

    engine: str
    formats: tuple[str, ...]
    kinds: tuple[str, ...]
    bits: tuple[int, ...] | None
    symmetric: bool | None
    verdict: str
    note: str = ""

    def about(self, format_name: str, scheme: Scheme) -> bool:
        """Whether the row speaks about this."""
        return (
            format_name in self.formats
            and scheme.kind in self.kinds
            and (self.bits is None or scheme.num_bits in self.bits)
            and self.symmetric in (None, scheme.symmetric)
        )


_INT = ("int",)
_BLOCKS = ("int", "affine", *(name.lower() for name in TYPES), *TYPES)
_UNSEEN = "not looked up for this width or grid"
_HUMMING = "only with --quantization humming; no act-order"
_V2_UNSEEN = "most loaders expect v1 (--format gptq)"
# Only what formats.md section 11 states is a yes or a no; everything else that a format can hold is unclear.
ROWS: tuple[EngineRow, ...] = (
    EngineRow("vLLM", ("compressed-tensors",), _INT, (4,), _ANY, "yes", "Machete, Marlin"),
    EngineRow("vLLM", ("compressed-tensors",), _INT, (3,), True, "yes", "Humming (#46389; MoE #48918)"),
    EngineRow("vLLM", ("compressed-tensors",), _INT, (3,), False, "no", "ValueError; #46528 is open"),
    EngineRow("vLLM", ("compressed-tensors",), _INT, (2, 5, 6, 7, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("vLLM", ("compressed-tensors",), ("nvfp4", "mxfp4"), (4,), _ANY, "unclear", _UNSEEN),
    EngineRow("vLLM", _V1, _INT, (4,), True, "yes", "no act-order"),
    EngineRow("vLLM", _V1, _INT, (4,), False, "no", "dropped (#45051)"),
    EngineRow("vLLM", _V1, _INT, (3,), True, "yes", _HUMMING),
    EngineRow("vLLM", _V1, _INT, (3,), False, "yes", _HUMMING + ", with zero points"),
    EngineRow("vLLM", _V1, _INT, (2, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("vLLM", _V2, _INT, None, _ANY, "unclear", _V2_UNSEEN),
    EngineRow("vLLM", ("awq",), _INT, (4,), _ANY, "yes"),
    EngineRow("vLLM", ("autoround",), _INT, (4,), True, "yes"),
    EngineRow("vLLM", ("autoround",), _INT, (4,), False, "yes", "in the AWQ layout, which is what is written"),
    EngineRow("vLLM", ("autoround",), _INT, (3,), True, "yes", "Humming (#52890)"),
    EngineRow("vLLM", ("autoround",), _INT, (3,), False, "unclear"),
    EngineRow("vLLM", ("autoround",), _INT, (2, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("vLLM", ("gguf",), _BLOCKS, None, _ANY, "yes", "plug-in vllm-gguf-plugin"),
    EngineRow("SGLang", ("compressed-tensors",), _INT, (4,), _ANY, "yes"),
    EngineRow("SGLang", ("compressed-tensors",), _INT, (3,), _ANY, "unclear", "Humming merged (#23754), untested"),
    EngineRow("SGLang", ("compressed-tensors",), _INT, (2, 5, 6, 7, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("SGLang", ("awq",), _INT, (4,), _ANY, "unclear", "Humming merged (#23754), untested"),
    EngineRow("SGLang", _V1, _INT, (4,), True, "yes"),
    EngineRow("SGLang", _V1, _INT, (4,), False, "unclear", "seen from compressed-tensors only"),
    EngineRow("SGLang", _V1, _INT, (3,), True, "yes", "GPTQ kernels in float16"),
    EngineRow("SGLang", _V1, _INT, (3,), False, "unclear", "Humming merged (#23754), untested"),
    EngineRow("SGLang", _V1, _INT, (2, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("SGLang", _V2, _INT, None, _ANY, "unclear", _V2_UNSEEN),
    EngineRow("transformers", ("compressed-tensors",), _INT, (2, 4), True, "yes", "library compressed-tensors"),
    EngineRow("transformers", ("compressed-tensors",), _INT, (4,), False, "yes",
              "library compressed-tensors; transformers 5.17.0 to 5.22.2, later ones only with dequantize=True"),
    EngineRow("transformers", ("compressed-tensors",), _INT, (3,), True, "yes",
              "library compressed-tensors 0.18 or later; earlier ones read 3 bits in another layout"),
    EngineRow("transformers", ("compressed-tensors",), _INT, (2, 3), False, "unclear", _UNSEEN),
    EngineRow("transformers", ("compressed-tensors",), _INT, (5, 6, 7, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("transformers", ("compressed-tensors",), ("nvfp4", "mxfp4"), (4,), _ANY, "yes",
              "transformers 5.22.2, library compressed-tensors 0.20: every code right on a CPU (2026-11-30)"),
    EngineRow("transformers", _GPTQ, _INT, (3, 4), _ANY, "yes", "library gptqmodel"),
    EngineRow("transformers", _GPTQ, _INT, (2, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("transformers", ("autoround",), _INT, (4,), _ANY, "yes", "library auto-round"),
    EngineRow("transformers", ("autoround",), _INT, (3,), _ANY, "yes", "library auto-round; accuracy trouble reported"),
    EngineRow("transformers", ("autoround",), _INT, (2, 8), _ANY, "unclear", _UNSEEN),
    EngineRow("transformers", ("awq",), _INT, (4,), _ANY, "yes"),
    EngineRow("llama.cpp", ("gguf",), _BLOCKS, None, _ANY, "yes"),
    EngineRow("MLX", ("mlx",), ("int", "affine"), (3, 4), _ANY, "yes"),
    EngineRow("MLX", ("mlx",), ("int", "affine"), (2, 5, 6, 8), _ANY, "unclear", "decoded, not served"),
    EngineRow("ONNX Runtime", ("onnx",), _INT, (2,), _ANY, "yes", "MatMulNBits from 1.24 on, CPU and WebGPU, not CUDA"),
    EngineRow("ONNX Runtime", ("onnx",), _INT, (4, 8), _ANY, "yes", "MatMulNBits"),
    EngineRow("ONNX Runtime", ("onnx",), _INT, (3,), _ANY, "yes", "MatMulNBits, stored as 4 bits"),
    EngineRow("ONNX Runtime", ("onnx",), _INT, (5, 6, 7), _ANY, "yes", "MatMulNBits, stored as 8 bits"),
    EngineRow("TensorRT-LLM", (*_V1, "awq"), _INT, (4,), True, "unclear", "from memory"),
    EngineRow("TGI", (*_V1, "awq"), _INT, (4,), True, "unclear", "from memory"),
)  # fmt: skip


# Formats whose engines keep every matrix by itself.
_APART = ("gguf", "onnx", "mlx")
# What transformers calls an expert's matrices in memory, whatever the file does.
_IN_MEMORY = frozenset(("gate_proj", "up_proj", "down_proj"))
_ORDER = ("no", "unclear", "yes")


def engine_rows(format_name: str, schemes: Mapping[str, Scheme]) -> list[dict[str, Any]]:
    """What each engine says to a file: its worst answer over the file's schemes, with the notes of all such answers.

    Returns:
        Rows with engine, verdict, note and as_of; engines that have nothing to do with the format are left out.
    """
    kinds = dict.fromkeys(schemes.values())
    said: dict[str, list[tuple[str, str]]] = {}
    for row in ROWS:
        said.setdefault(row.engine, [])
        said[row.engine] += [(row.verdict, row.note) for kind in kinds if row.about(format_name, kind)]
    said = {engine: answers for engine, answers in said.items() if answers}
    for engine, answers in said.items():
        asked = [row for row in ROWS if row.engine == engine]
        missing = [kind for kind in kinds if not any(row.about(format_name, kind) for row in asked)]
        answers += [("unclear", f"not looked up for {kind}") for kind in missing]
        if engine == "transformers":
            answers += [("no", note) for note in _experts_of_transformers(format_name, schemes)]
    rows = []
    for engine, answers in said.items():
        worst = min((verdict for verdict, _ in answers), key=_ORDER.index)
        notes = dict.fromkeys(note for verdict, note in answers if verdict == worst and note)
        rows.append({"engine": engine, "verdict": worst, "note": "; ".join(notes), "as_of": AS_OF})
    return rows


def _experts_of_transformers(format_name: str, schemes: Mapping[str, Scheme]) -> list[str]:
    """Why transformers does not read a file's experts, which it joins to tensors of three dimensions.

    Tried with small random models of Qwen3-MoE and Mixtral (2026-12-01): compressed-tensors with transformers 5.22.2
    and the library 0.20.0, the others with transformers 5.24.0, gptqmodel 7.6.0 and auto-round 0.16.1.
    """
    experts = {name: scheme for name, scheme in schemes.items() if experts_of(name)}
    kinds, found = set(experts.values()), []
    odd = next((name for name in experts if name.rpartition(".")[2] not in _IN_MEMORY), None)
    unfound = f"looks for {', '.join(sorted(_IN_MEMORY))} and does not find {odd}"
    if format_name == "compressed-tensors":
        if any(kind.kind == "nvfp4" for kind in kinds):
            found.append("experts lose their global scales (nvfp4)")
        if any(kind.kind == "int" and not kind.symmetric for kind in kinds):
            found.append("asymmetric experts are not read")
        if len(kinds) > 1:
            found.append("all experts of a model are read on one grid, and these have several")
    elif format_name in (*_GPTQ, "awq") and experts:
        own = "reads them" if odd is None else unfound
        found.append(f"experts get random weights; gptqmodel's own loader (GPTQModel.load) {own}")
    elif format_name == "autoround" and odd is not None:
        found.append(f"auto-round {unfound}")
    return found


def _serving(format_name: str, scheme: Scheme) -> list[str]:
    return [row.engine for row in ROWS if row.verdict == "yes" and row.about(format_name, scheme)]


def _unlike(schemes: Mapping[str, Scheme | None]) -> list[str]:
    """A sentence for each set of matrices that engines run as one and that differ; None is not quantized."""
    found: dict[str, None] = {}
    layers: dict[str, set[Scheme | None]] = {}
    for name, scheme in schemes.items():
        experts = experts_of(name)
        if experts is not None:
            layers.setdefault(experts, set()).add(scheme)
            continue
        parent, _, last = name.rpartition(".")
        for members in FUSED:
            names = [f"{parent}.{member}" for member in members] if last in members else []
            if len({schemes[other] for other in names if other in schemes}) > 1:
                text = f"{parent}: engines fuse {', '.join(members)}, which do not share one grid"
                found[text] = None
    unlike = [experts for experts, held in layers.items() if len(held) > 1]
    return [
        *found,
        *(f"{experts}: engines run all of them on one grid, and they do not share one" for experts in unlike),
    ]


def problems(
    format_name: str,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    plain: Iterable[str] = (),
) -> list[str]:
    """What some engines will refuse, one sentence each.

    Args:
        format_name: Name in the registry.
        schemes: Scheme of every quantized module.
        shapes: (out_features, in_features) of each.
        plain: Modules that stay as they are, as far as known.
    """
    found = [
        f"{name} is {shapes[name][0]} x {shapes[name][1]}: some engines want multiples of 32"
        for name in schemes
        if shapes[name][0] % 32 or shapes[name][1] % 32
    ]
    if format_name not in _APART:
        found += _unlike({**schemes, **dict.fromkeys(plain)})
    kinds = dict.fromkeys(schemes.values())
    for scheme in kinds:
        if scheme.num_bits != 3 or scheme.symmetric or scheme.kind != "int":
            continue
        served = _serving(format_name, scheme)
        lost = [name for name in _serving(format_name, replace(scheme, symmetric=True)) if name not in served]
        if lost:
            found.append(f"3 bits asymmetric: not known to be served by {either(lost)}; symmetric is")
            break
    wide = sorted({scheme.group_size for scheme in kinds if scheme.group_size not in (-1, 16, 32, 64, 128)})
    if wide:
        found.append(
            f"group size {', '.join(map(str, wide))}: kernels are made for 32, 64, 128 or whole rows"
        )
    return found
