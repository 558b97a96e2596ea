# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""A graph as an ONNX file, and such a file with its products in int8."""

from pathlib import Path

import onnx
import torch
from onnx_ir import Node
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript.optimizer import fold_constants

from .export_graphs import Graph

OPSET = 20
"""The first with GELU. onnxruntime reads it since 1.17, in browsers too."""
LAYOUT = {"Reshape", "Slice", "Transpose", "Unsqueeze"}
SEARCH = "quantizer/"
"""How the names of nodes begin that search the codebooks."""


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph with its weights as one file."""
    exported = torch.onnx.export(
        graph.program,
        input_names=graph.input_names,
        output_names=graph.output_names,
        dynamic_shapes=None if graph.state else (graph.axes,),
        opset_version=OPSET,
        verbose=False,
    )
    assert exported is not None
    model = exported.model
    # store weights as they are used: left to itself, the exporter has large ones re-ordered in every call
    fold_constants(model, should_fold=_lays_out_a_weight, output_size_limit=1 << 40)
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        if "modeling_quantizer.py" in node.metadata_props.get("pkg.torch.onnx.stack_trace", ""):
            node.name = f"{SEARCH}{node.name}"
    ClearMetadataAndDocStringPass()(model)  # paths of this machine among it
    exported.save(path, external_data=False)


def write_int8(source: Path, target: Path) -> None:
    """
    Write a float32 file anew with its matrix products in int8: weights per channel, activations scaled in every call.

    Convolutions stay as they are, for in int8 they cost most of the codes, and so does the search of the codebooks.
    """
    model = onnx.load(source)
    quantize_dynamic(
        model,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[node.name for node in model.graph.node if node.name.startswith(SEARCH)],
    )


def _lays_out_a_weight(node: Node) -> bool | None:
    """Yes, unless a table is also read as it is, and would be stored twice; or else what the optimizer thinks."""
    value = node.inputs[0] if node.inputs else None
    if value is None or node.op_type not in LAYOUT:
        return None
    return all(user.op_type != "Gather" for user in value.consumers()) or None
