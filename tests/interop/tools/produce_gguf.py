# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of a Llama folder, quantized by the gguf package or by llama.cpp.

Shares no code with discquant's writer.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from exchange import serve, versions
from gguf_names import interleave, to_gguf


def _floats(path):
    """Tensors of the folder as float32; numpy has no bfloat16, so its bits are moved into place by hand."""
    with path.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        start = handle.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            handle.seek(start + begin)
            raw = handle.read(end - begin)
            if entry["dtype"] == "BF16":
                array = (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4")
            else:
                array = np.frombuffer(raw, dtype={"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype("<f4")
            yield name, array.reshape(entry["shape"])


def write_file(folder, out, kind):
    """Write metadata, tokenizer and tensors; matrices of the blocks in `kind`, everything else float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    if (folder / "tokenizer.json").exists():
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        special = {entry["id"] for entry in tokenizer["added_tokens"]}
        tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
        for text, index in [
            *vocabulary.items(),
            *((e["content"], e["id"]) for e in tokenizer["added_tokens"]),
        ]:
            tokens[index] = text
        normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([control if index in special else normal for index in range(len(tokens))])
        merges = tokenizer["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
        writer.add_bos_token_id(config["bos_token_id"])
        writer.add_eos_token_id(config["eos_token_id"])
    else:
        writer.add_tokenizer_model("no_vocab")
    for shard in sorted(folder.glob("*.safetensors")):
        for name, value in _floats(shard):
            array = value
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                array = interleave(array, heads if "q_proj" in name else kv_heads)
            array = np.ascontiguousarray(array)
            block = gguf.GGML_QUANT_SIZES[kind][0]
            if kind != gguf.GGMLQuantizationType.F32 and "_proj." in name and array.shape[1] % block == 0:
                writer.add_tensor(to_gguf(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(to_gguf(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def produce(request, tokens):
    """By `gguf` itself for the types its quantizer knows, or by llama.cpp from a float32 file for any type."""
    folder, out = Path(request["model"]), Path(request["out"])
    if request["quantizer"] == "gguf":
        write_file(folder, out, gguf.GGMLQuantizationType[request["type"]])
        return {}, {"versions": versions("gguf")}
    import llama_cpp

    plain = out.with_suffix(".f32.gguf")
    write_file(folder, plain, gguf.GGMLQuantizationType.F32)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
    # Embedding and head stay as they are, as in every other producer here.
    parameters.output_tensor_type = llama_cpp.GGML_TYPE_F32
    parameters.token_embedding_type = llama_cpp.GGML_TYPE_F32
    # Not pure: llama.cpp itself chooses other types where rows fill no block of 256, as its users get them.
    parameters.pure = False
    import ctypes

    status = llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), ctypes.byref(parameters))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status}")
    plain.unlink()
    return {}, {"versions": versions("llama-cpp-python", "gguf")}


serve(produce)
