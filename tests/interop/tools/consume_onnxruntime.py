# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime runs the exported graph, and each MatMulNBits node alone on the unit vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from exchange import serve, versions
from onnx import TensorProto, helper


def _session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _weight(node, constants):
    """The matrix of one node: its output for the identity."""
    width = next(a.i for a in node.attribute if a.name == "K")
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.input[0], alone.output[0] = "a", "y"
    graph = helper.make_graph(
        [alone],
        "one",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [width, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [constants[name] for name in node.input[1:] if name],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    return _session(model.SerializeToString()).run(None, {"a": np.eye(width, dtype=np.float32)})[0].T


def consume(request, tokens):
    """Find layers by node name (`/model/layers.0/...` or the module path), run the whole graph."""
    path = Path(request["model"])
    path = path if path.is_file() else next(iter(sorted(path.glob("*.onnx"))))
    model = onnx.load(path)
    constants = {constant.name: constant for constant in model.graph.initializer}
    names = [name for name, _ in request["layers"]]
    arrays, unknown = {}, []
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        text = " ".join([node.name, *node.input[1:]]).replace("/", ".")
        found = [name for name in names if name in text]
        if len(found) == 1:
            arrays[f"weight/{found[0]}"] = _weight(node, constants)
        else:
            unknown.append(node.name)
    facts = {"versions": versions("onnxruntime", "onnx"), "unknown_nodes": unknown}
    if tokens is not None:
        session = _session(str(path))
        inputs = {entry.name: entry for entry in session.get_inputs()}
        facts |= {"inputs": sorted(inputs), "outputs": [entry.name for entry in session.get_outputs()]}
        rows = []
        for window in tokens:
            feed = {}
            for name in inputs:
                if name == "input_ids":
                    feed[name] = window[None]
                elif name == "position_ids":
                    feed[name] = np.arange(len(window), dtype=np.int64)[None]
                elif name == "attention_mask":
                    feed[name] = np.ones((1, len(window)), dtype=np.int64)
            rows.append(session.run(["logits"], feed)[0][0].astype(np.float32))
        arrays["logits"] = np.stack(rows)
    return arrays, facts


serve(consume)
