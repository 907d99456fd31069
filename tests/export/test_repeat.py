"""Repeating a traced layer gives the graph that tracing every layer gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from gatework.export import onnx_export
from gatework.export.checkpoint import read_config
from gatework.export.config import ModelConfig
from gatework.export.onnx_export import trace
from tests.checkpoints import hf_config

MODELS = ["llama2", "dbrx", "qwen3_moe", "olmoe", "phi", "mpt", "qwen2_moe", "gpt-oss"]  # one of each shape of graph


def config_of(model: str, layers: int, tmp_path: Path) -> ModelConfig:
    hf_config(model).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    return replace(config, num_layers=layers, full_attention=(1, 2) if config.full_attention else ())


def describe(model: ir.Model) -> tuple[list, set]:
    """Every node with its operands (a made value as number of its node, a constant as its content), and the graph's edges."""
    graph = model.graph
    weights = [value for value in graph.initializers.values() if value.const_value is None]
    names = {value: value.name for value in (*graph.inputs, *graph.initializers.values())}
    constants = [
        value for value in graph.initializers.values() if value.const_value is not None and value.const_value.size < 8
    ]
    names |= {value: f"constant {value.const_value.numpy().tolist()}" for value in constants}
    nodes = []
    for number, node in enumerate(graph):
        attributes = {name: str(attribute.value) for name, attribute in sorted(node.attributes.items())}
        operands = [names.get(value) for value in node.inputs]
        if node.op_type == "Shape" and operands[0].startswith("past."):
            operands = ["past"]  # the batch size is read off one cache tensor, no matter which
        nodes.append((node.op_type, operands, attributes))
        names |= {value: f"{number}.{index}" for index, value in enumerate(node.outputs)}
        for value in node.outputs:
            assert value.dtype is not None
            assert value.shape is not None
    edges = {(value.name, value.dtype, str(value.shape)) for value in (*graph.inputs, *weights)}
    return nodes, edges | {(value.name, names[value], value.dtype, str(value.shape)) for value in graph.outputs}


@pytest.mark.parametrize("model", MODELS)
def test_repeated_layers_equal_traced_ones(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model, 4, tmp_path)
    nodes, edges = describe(trace(config, 32))
    monkeypatch.setattr(onnx_export, "_TRACED_LAYERS", 4)
    traced_nodes, traced_edges = describe(trace(config, 32))
    assert [node[0] for node in nodes].count("Attention") == 4
    assert nodes == traced_nodes
    assert edges == traced_edges
