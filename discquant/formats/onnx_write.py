# SPDX-License-Identifier: Apache-2.0
"""An ONNX folder from codes: weights streamed into one file of external data, the graph built around them, proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discquant import environment
from discquant.errors import ProofError, UnrepresentableError
from discquant.formats.bits import bits_per_weight
from discquant.formats.card import origin_of, write_card
from discquant.formats.checkpoint import Checkpoint, check_unquantized
from discquant.formats.coded import CodedLayer
from discquant.formats.engines import engine_rows
from discquant.formats.onnx_blocks import RUNTIMES, NBits, encode
from discquant.formats.onnx_file import DATA, FILE, TYPE_NAMES, WIDENED
from discquant.formats.onnx_graph import IR_VERSION, OPSET, GraphBuilder, build_decoder
from discquant.formats.output import MANIFEST, PROOF, atomic_directory, check_space
from discquant.formats.rewrite import digest
from discquant.formats.safetensors_file import read_bytes, tensor_bytes
from discquant.formats.scheme import Scheme

# Runtimes map the data; tensors begin where a page may.
_ALIGNMENT = 4096
_CHUNK = 1 << 18  # weights that are proven at a time: a core's cache holds them
_ONNX_TYPES = {name: number for number, name in TYPE_NAMES.items()}


class _Data:
    """The file of external data; remembers an initializer for each tensor."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.initializers: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]
    ) -> None:
        from onnx import TensorProto

        self.stream.write(b"\0" * (-self.stream.tell() % _ALIGNMENT))
        start, written, found = self.stream.tell(), 0, hashlib.sha256()
        for piece in pieces:
            self.stream.write(piece)
            found.update(piece)
            written += len(piece)
        tensor = TensorProto(
            name=name, data_type=_ONNX_TYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", DATA), ("offset", start), ("length", written)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        self.rows[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "sha256": found.hexdigest(),
            "shard": DATA,
            "bytes": written,
        }

    def put(self, name: str, tensor: Tensor) -> None:
        dtype = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        self.add(name, dtype, tuple(tensor.shape), [tensor_bytes(tensor)])


def space(source: Checkpoint) -> int:
    """Bytes of the external data, which is written in its place: no larger than the original."""
    return sum(info.num_bytes for info in source.tensors.values())


def write_onnx(
    source: Checkpoint,
    out: Path,
    layers: Iterable[CodedLayer],
    *,
    recipe: Mapping[str, Any] | None = None,
    prove_from: Callable[[], Iterable[CodedLayer]] | None = None,
) -> dict[str, Any]:
    """Write a folder with `model.onnx`; arguments, result and errors as `coded.Format.write`."""
    import onnx

    check_unquantized(source)
    config = source.config()
    recipe = dict(recipe or {})
    summary = recipe.pop("summary", None)
    check_space(out, space(source))
    with atomic_directory(out) as partial:
        left = {name: info for name, info in source.tensors.items() if not name.endswith(".inv_freq")}
        nodes: dict[str, tuple[NBits, tuple[int, int]]] = {}
        table: dict[str, dict[str, Any]] = {}
        schemes: dict[str, Scheme] = {}
        with (partial / DATA).open("wb") as stream:
            data = _Data(stream)
            for layer in layers:
                key = f"{layer.name}.weight"
                if key not in left or tuple(layer.q.shape) != left[key].shape:
                    raise UnrepresentableError(
                        f"onnx: {source.path} holds no {key} of shape {list(layer.q.shape)}, or the layer came twice; "
                        "a layer that shares its weight with another (a tied head) must be ignored"
                    )
                del left[key]
                stored = encode(layer.grid, layer.q, layer.name)
                parts = {"qweight": stored.packed, "scales": stored.scales}
                if stored.zero_points is not None:
                    parts["zero_points"] = stored.zero_points
                for suffix, tensor in parts.items():
                    data.put(f"{layer.name}.{suffix}", tensor)
                # The node keeps names and attributes only: one layer's tensors are in memory at a time.
                nodes[layer.name] = (
                    NBits(
                        stored.bits,
                        stored.block,
                        stored.offset,
                        torch.empty(0),
                        torch.empty(0),
                        None if stored.zero_points is None else torch.empty(0),
                    ),
                    (layer.q.shape[0], layer.q.shape[1]),
                )
                schemes[layer.name] = Scheme(layer.grid.num_bits, layer.grid.group_size, layer.grid.symmetric)
                table[layer.name] = {
                    **asdict(schemes[layer.name]),
                    "stored_bits": stored.bits,
                    "block_size": stored.block,
                    "shape": list(layer.q.shape),
                    "bits": 8 * sum(data.rows[f"{layer.name}.{suffix}"]["bytes"] for suffix in parts),
                }
            for name, info in left.items():
                if info.dtype not in ("F32", "F16", "BF16"):
                    raise UnrepresentableError(f"onnx: {name} is {info.dtype}, which the graph does not cast")
                data.add(name, info.dtype, info.shape, read_bytes(info))
        model = _graph(config, left, nodes, data)
        (partial / FILE).write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(partial / FILE))
        _copy_beside(source.path, partial)
        weights = sum(row["shape"][0] * row["shape"][1] for row in table.values())
        stored_bits = {row["stored_bits"] for row in table.values()} or {4}
        widened = sorted({row["num_bits"] for row in table.values() if row["stored_bits"] != row["num_bits"]})
        manifest = {
            "manifest_version": 2,
            "format": "onnx",
            "requires": {"onnxruntime": ".".join(map(str, max(map(RUNTIMES.__getitem__, stored_bits))))},
            "versions": environment.versions(),
            "source": origin_of(source.path, source.sha256()),
            "recipe": recipe,
            "engines": engine_rows("onnx", schemes),
            "warnings": [
                *(
                    f"{bits}-bit codes are stored in the next wider type that MatMulNBits has; values are the same"
                    for bits in widened
                ),
                *(["MatMulNBits of 2 bits runs on CPU and WebGPU, not on CUDA"] if 2 in stored_bits else []),
            ],
            "quantized_weights": weights,
            "bits_per_weight": bits_per_weight((row["bits"], row["shape"]) for row in table.values()),
            "weight_file_bytes": sum((partial / file).stat().st_size for file in (FILE, DATA)),
            "layers": table,
            "shards": {
                file: {"bytes": (partial / file).stat().st_size, "sha256": digest(partial / file)}
                for file in (FILE, DATA)
            },
            "tensors": {key: data.rows[key] for key in sorted(data.rows)},
        }
        _write_json(partial / MANIFEST, manifest)
        if prove_from is not None:
            _write_json(partial / PROOF, prove_onnx(source, partial / FILE, prove_from()))
        write_card(partial, source.path, summary)
    return manifest


def _graph(
    config: Mapping[str, Any],
    plain: Mapping[str, object],
    nodes: Mapping[str, tuple[NBits, tuple[int, int]]],
    data: _Data,
) -> Any:
    from onnx import TensorProto, helper

    used: set[str] = set()
    present = {*plain, *(f"{name}.weight" for name in nodes)}
    tied = "lm_head.weight" not in present

    def stored(build: GraphBuilder, name: str) -> str:
        if name not in plain:
            raise UnrepresentableError(
                f"onnx: the model has no tensor {name}, or it is quantized and must not be"
            )
        used.add(name)
        if data.rows[name]["dtype"] == "F32":
            return name
        output = f"{name}/float"
        if not any(node.name == output for node in build.nodes[-4096:]):
            build.op("Cast", [name], output, to=TensorProto.FLOAT)
        return output

    def linear(build: GraphBuilder, module: str, x: str) -> str:
        if module not in nodes:
            weight = "model.embed_tokens" if module == "lm_head" and tied else module
            turned = build.op(
                "Transpose", [stored(build, f"{weight}.weight")], f"{module}/transposed", perm=[1, 0]
            )
            return build.op("MatMul", [x, turned], f"{module}/product")
        form, (rows, columns) = nodes[module]
        parts = [f"{module}.qweight", f"{module}.scales"]
        if form.zero_points is not None:
            parts.append(f"{module}.zero_points")
        used.update(parts)
        output = f"{module}/product"
        build.nodes.append(
            helper.make_node(
                "MatMulNBits", [x, *parts], [output], name=module, domain="com.microsoft",
                K=columns, N=rows, bits=form.bits, block_size=form.block, accuracy_level=0,
            )
        )  # fmt: skip
        return output

    build = GraphBuilder(linear, stored)
    build_decoder(build, config, dict.fromkeys(present))
    unused = sorted(set(data.initializers) - used)
    if unused:
        raise UnrepresentableError(f"onnx: the graph has no place for {', '.join(unused[:8])}")
    vocabulary = int(config["vocab_size"])
    graph = helper.make_graph(
        build.nodes,
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])],
        initializer=[*build.constants.values(), *data.initializers.values()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="discquant")
    widened = {name: form.bits - _lost(form) for name, (form, _) in sorted(nodes.items()) if form.offset}
    if widened:
        model.metadata_props.add(key=WIDENED, value=json.dumps(widened))
    return model


def _lost(form: NBits) -> int:
    """Bits by which symmetric codes were widened: offset = 2^(wide-1) - 2^(narrow-1)."""
    narrow: int = 2 ** (form.bits - 1) - form.offset
    return form.bits - narrow.bit_length()


def prove_onnx(source: Checkpoint, file: Path, layers: Iterable[CodedLayer]) -> dict[str, Any]:
    """Read a written folder back with onnx and single bits, and compare it with codes and original.

    Raises:
        ProofError: The first difference.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(file), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    quantized, weights = set(), 0
    parts: set[str] = set()
    for layer in layers:
        node = nodes.get(layer.name)
        if node is None:
            raise ProofError(f"proof: {layer.name} is no MatMulNBits node of the file")
        attributes = {row.name: row.i for row in node.attribute}
        rows, columns, bits = attributes["N"], attributes["K"], attributes["bits"]
        block = attributes["block_size"]
        values = [numpy_helper.to_array(tensors[name], str(file.parent)) for name in node.input[1:]]
        parts |= set(node.input[1:])
        blocks = values[1].shape[1]
        expected = layer.grid.dequantize(layer.q, torch.float32).cpu().numpy()
        if expected.shape != (rows, columns):
            raise ProofError(
                f"proof: {layer.name} is {rows} x {columns} in the file, {expected.shape} solved"
            )
        step = max(1, _CHUNK // max(1, columns))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            octets = values[0][part]
            q = _single_bits(octets.reshape(len(octets), -1), bits, blocks * block)
            zero: Any = 2 ** (bits - 1)
            if len(values) > 2:
                zero = np.repeat(_single_bits(values[2][part], bits, blocks), block, axis=1)
            steps = np.repeat(values[1][part], block, axis=1) * (q.astype(np.float32) - zero)
            decoded = steps[:, :columns].astype(np.float32)
            if not np.array_equal(decoded, expected[part]):
                row, column = np.argwhere(decoded != expected[part])[0].tolist()
                raise ProofError(
                    f"proof: {layer.name}: the file's weights differ, the first at {[start + row, column]}"
                )
        quantized.add(f"{layer.name}.weight")
        weights += layer.q.numel()
    copied = 0
    left = [name for name in source.tensors if name not in quantized and not name.endswith(".inv_freq")]
    for name in left:
        if name not in tensors:
            raise ProofError(f"proof: {name} is missing from the file")
        place = {row.key: row.value for row in tensors[name].external_data}
        with (file.parent / DATA).open("rb") as stream:
            stream.seek(int(place.get("offset", 0)))
            for piece in read_bytes(source.tensors[name]):
                if stream.read(len(piece)) != piece:
                    raise ProofError(f"proof: {name} is not the source's byte for byte")
        copied += source.tensors[name].num_bytes
    # Constants of the graph lie in the graph.
    extra = {name for name, tensor in tensors.items() if tensor.external_data} - {*left, *parts}
    if extra:
        raise ProofError(f"proof: tensors are in the file that nobody asked for: {sorted(extra)[:8]}")
    return {
        "layers": len(quantized),
        "weights": weights,
        "copied_tensors": len(left),
        "copied_bytes": copied,
        "shards_hashed": 2,
        "result": "every decoded weight and every copied tensor is identical",
    }


def _single_bits(octets: np.ndarray[Any, Any], bits: int, count: int) -> np.ndarray[Any, Any]:
    """Rows of bytes to codes, uint8, bit by bit."""
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    found = np.zeros((len(octets), count), dtype=np.uint8)
    for place in range(bits):
        found += stream[:, place::bits] << place
    return found


def _copy_beside(source: Path, partial: Path) -> None:
    """Configuration and tokenizer."""
    for pattern in ("*.json", "*.model", "*.jinja", "merges.txt"):
        for file in sorted(source.glob(pattern)):
            if (
                file.is_file()
                and not file.name.endswith(".index.json")
                and file.name not in (MANIFEST, PROOF)
            ):
                (partial / file.name).write_bytes(file.read_bytes())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
