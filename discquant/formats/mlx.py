# SPDX-License-Identifier: Apache-2.0
"""MLX affine: `weight` uint32 rows of the dense bit stream, `scales` and `biases` per group; value scale q + bias.

Its engine evaluates that in the dtype of the scales, so files are proven on codes and parameters, not on floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from discquant.errors import CheckpointError, UnrepresentableError, either
from discquant.formats.bitstream import pack, unpack, words_for
from discquant.formats.checkpoint import Checkpoint
from discquant.formats.coded import CodedLayer, Format
from discquant.formats.gptq import most_common
from discquant.formats.layout import StoredLayer
from discquant.formats.safetensors_format import (
    SafetensorsFormat,
    exact,
    expect,
    expect_matrix,
    grouped,
    integer,
    uniform,
)
from discquant.formats.scheme import Scheme
from discquant.grids.affine import AffineGrid
from discquant.grids.fused import experts_of

CODES, SCALES, BIASES = "weight", "scales", "biases"
WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
# Architectures whose per-expert scales and biases mlx-lm 0.32.2 stacks as it does their weights (`sanitize` of its
# models). Of all others with experts it stacks the weights alone, and the file does not load.
STACKED = frozenset(
    (
        "afmoe bailing_hybrid bailing_moe bailing_moe_linear deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 "
        "exaone_moe glm4_moe glm4_moe_lite hunyuan jamba joyai_llm_flash kimi_k2 kimi_vl laguna longcat_flash "
        "mimo_v2_flash mistral4 mixtral olmoe phimoe qwen2_moe"
    ).split()
)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # of Mixtral and Phi-3.5-MoE


class Mlx(SafetensorsFormat):
    """See `coded.Format`."""

    name = "mlx"
    codes = CODES
    metadata: Mapping[str, str] = {"format": "mlx"}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By the key `quantization`, which only MLX writes."""
        said = config.get("quantization")
        return isinstance(said, dict) and "bits" in said and "group_size" in said

    def layers(self, checkpoint: Checkpoint) -> Iterator[StoredLayer]:
        """Modules with `scales`."""
        said = checkpoint.config().get("quantization")
        if not isinstance(said, dict):
            raise CheckpointError(f"{checkpoint.path} is not quantized: config.json has no quantization")
        where = f"{checkpoint.path}/config.json"
        for name, tensors in grouped(checkpoint, SCALES, (CODES, SCALES, BIASES)):
            own = said.get(name, said)
            if not isinstance(own, dict):
                raise CheckpointError(f"{where}: {name} has scales, but quantization says {own!r}")
            mode = own.get("mode", said.get("mode", "affine"))
            if mode != "affine":
                raise NotImplementedError(f"{where}: of MLX only affine is read, got {mode!r}")
            bits = integer(own, "bits", where, 2, 8)
            size = integer(own, "group_size", where, 1, 1 << 24)
            rows, groups = expect_matrix(name, tensors, SCALES, "F16 BF16 F32")
            expect(name, tensors, BIASES, tensors[SCALES].dtype, (rows, groups))
            expect(name, tensors, CODES, "U32", (rows, words_for(groups * size, bits)))
            yield StoredLayer(name, (rows, groups * size), Scheme(bits, size, False, "affine"), tensors)

    def decode(self, stored: StoredLayer) -> CodedLayer:
        """Codes and grid."""
        words, bits = stored.read(CODES).view(torch.int32), stored.scheme.num_bits
        scale = stored.read(SCALES)
        grid = AffineGrid(bits, stored.scheme.group_size, scale, stored.read(BIASES), compute=scale.dtype)
        return CodedLayer(stored.name, unpack(words, bits, stored.shape[1]), grid)

    def repack(self, stored: StoredLayer, q: Tensor) -> Tensor:
        """Rows of the stream."""
        return pack(q, stored.scheme.num_bits).view(torch.uint32)

    def check_scheme(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Refuse widths and groups that MLX has no kernels for."""
        if scheme.kind not in ("int", "affine") or scheme.num_bits not in WIDTHS:
            raise UnrepresentableError(f"mlx holds integers of {either(WIDTHS)} bits; {name} is {scheme}")
        if scheme.group_size not in GROUPS or shape[1] % scheme.group_size:
            raise UnrepresentableError(
                f"mlx has groups of {either(GROUPS)} columns that divide the row; {name} has {shape[1]} columns, "
                f"{scheme}"
            )

    def encode(self, layer: CodedLayer, served: torch.dtype) -> dict[str, Tensor]:
        """Tensors by suffix; bias = -zero_point scale, which must be exact.

        Raises:
            UnrepresentableError: It is not (asymmetric grids mostly), or the grid is neither uniform nor affine.
        """
        dtype = served if served in (torch.float16, torch.bfloat16) else torch.float32
        if isinstance(layer.grid, AffineGrid):
            scale, bias = layer.grid.scale, layer.grid.minimum
        else:
            scale, zero = uniform(layer, self.name)
            bias = -(scale.double() * zero)
        stored = exact(layer.name, "scale", scale.cpu(), dtype, self.name)
        try:
            minimum = exact(layer.name, "bias", bias.cpu(), dtype, self.name)
        except UnrepresentableError as cause:
            raise UnrepresentableError(
                f"mlx: {layer.name}: -zero_point * scale is no {dtype} number; use a symmetric grid"
            ) from cause
        return {
            CODES: pack(layer.q, layer.grid.num_bits).view(torch.uint32),
            SCALES: stored,
            BIASES: minimum,
        }

    def encoded_bytes(self, shape: tuple[int, int], scheme: Scheme) -> int:
        """Bytes that `encode` will need for a 16-bit model."""
        return 4 * shape[0] * (words_for(shape[1], scheme.num_bits) + scheme.groups(shape[1]))

    def configure(
        self, config: dict[str, Any], schemes: Mapping[str, Scheme], ignored: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        """`quantization`, with per-layer overrides by name; MLX leaves modules without scales alone.

        Raises:
            UnrepresentableError: Experts of an architecture of which mlx-lm joins no scales, or that differ where it
                joins them.
        """
        expert = next((name for name in schemes if experts_of(name)), None)
        if expert is not None and config.get("model_type") not in STACKED:
            raise UnrepresentableError(
                f"mlx: mlx-lm does not load quantized experts of {config.get('model_type')} that lie one by one, as "
                f"{expert} does: ignore the experts, or choose another format"
            )
        base = most_common(schemes)
        said: dict[str, Any] = {"group_size": base.group_size, "bits": base.num_bits, "mode": "affine"}
        stacked = _stacked(schemes, ignored, config.get("model_type"))
        for name, scheme in {**schemes, **stacked}.items():
            if (scheme.group_size, scheme.num_bits) != (base.group_size, base.num_bits):
                said[name] = {"group_size": scheme.group_size, "bits": scheme.num_bits}
        config.pop("quantization_config", None)
        config["quantization"] = said
        return {}


def _stacked(schemes: Mapping[str, Scheme], ignored: Iterable[str], model_type: object) -> dict[str, Scheme]:
    """Schemes of what mlx-lm makes of a layer's experts, one module per projection, by the names it asks for.

    Raises:
        UnrepresentableError: Experts differ in a projection.
    """
    found: dict[str, Scheme] = {}
    first: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name, scheme in (*schemes.items(), *((name, None) for name in ignored)):
        experts = experts_of(name)
        if experts is None:
            continue
        last = name.rpartition(".")[2]
        # As its `sanitize` names them; of all of STACKED one keeps "experts".
        parent = experts if model_type == "afmoe" else f"{experts.removesuffix('experts')}switch_mlp"
        whole = f"{parent}.{_PROJECTIONS.get(last, last)}"
        shape = None if scheme is None else (scheme.group_size, scheme.num_bits)
        other, known = first.setdefault(whole, (name, shape))
        if shape != known:
            raise UnrepresentableError(
                f"mlx: mlx-lm joins {last} of a layer's experts, so they need one width and group size; {other} and "
                f"{name} differ"
            )
        if scheme is not None:
            found[whole] = scheme
    return found


FORMAT: Format = Mlx()
