"""Names for the values inside a layer that verification compares; every lowering pass keeps them."""

from __future__ import annotations

import onnx_ir as ir

from gatework.export.config import ModelConfig
from gatework.plugins.engine_format import ENCODER_TAPS, TAP_OUTPUT, encoder_taps, graph_taps, layer_taps
from gatework.plugins.moe.spec import DOMAIN


def name_taps(graph: ir.Graph, config: ModelConfig) -> None:
    """Give the values of the canonical graph that `graph_taps` lists their names."""
    _name_embedding(graph, "")
    _name_layers(graph, config, "")


def name_encoder_taps(graph: ir.Graph, config: ModelConfig) -> None:
    """Give the values of a canonical encoder's graph that `encoder_taps` lists their names; config: of the whole model."""
    assert config.encoder is not None
    _name_embedding(graph, ENCODER_TAPS)
    for i in range(config.encoder_layers):
        for name, weight in (("key", "k"), ("value", "v")):
            product = _product(graph, f"{ENCODER_TAPS}layers.{i}.attn.{weight}.weight")
            _with_bias(product.outputs[0]).name = f"{ENCODER_TAPS}layers.{i}.{name}"
    _name_layers(graph, config.encoder, ENCODER_TAPS)
    last = _product(graph, "layers.0.cross.k.weight").inputs[0]
    assert last is not None
    last.name = f"{ENCODER_TAPS}norm"


def _name_embedding(graph: ir.Graph, prefix: str) -> None:
    (gather,) = (node for node in graph.initializers["embed.weight"].consumers() if node.op_type == "Gather")
    embedded = gather.outputs[0]
    embedded.name = "embedding.rows"  # the exporter calls it "embedding" by itself
    while len(users := embedded.consumers()) == 1 and users[0].op_type in (
        "Cast",
        "Mul",
    ):  # by the embedding's multiplier
        embedded = users[0].outputs[0]
    embedded.name = f"{prefix}embedding"


def _name_layers(graph: ir.Graph, config: ModelConfig, prefix: str) -> None:
    """Values of the layers of a stack, what `layer_taps` lists, after the prefix of its weights."""
    model = config.to_dict()
    for i in range(config.num_layers):
        layer = f"{prefix}layers.{i}"
        project = _product(graph, f"{layer}.attn.o.weight")
        attention = _with_bias(project.outputs[0])
        residual = _sum_with(attention)
        values: dict[str, ir.Value | None] = {
            "context": project.inputs[0],
            "attention": attention,
            "residual": residual,
        }
        if config.encoder_layers:
            cross = _product(graph, f"{layer}.cross.o.weight")
            values |= {"cross_context": cross.inputs[0], "cross_attention": cross.outputs[0]}
            values["cross_residual"] = _sum_with(cross.outputs[0])
        if not config.has_experts(i):
            branch = _with_bias(_product(graph, f"{layer}.mlp.w_out").outputs[0])
            values["mlp"] = branch
        else:
            router = values["router"] = _product(graph, f"{layer}.moe.router.weight").outputs[0]
            (node,) = (node for node in router.consumers() if node.domain == DOMAIN)
            values["experts"] = node.outputs[0]
            (reshape,) = node.outputs[0].consumers()
            branch = reshape.outputs[0]
            if config.has_shared(i):
                (total,) = branch.consumers()
                values["shared"] = next(value for value in total.inputs if value is not branch)
                branch = total.outputs[0]
        if config.has_extra(i):
            values["routed"] = _sum_with(branch)
            branch = values["extra"] = _product(graph, f"{layer}.extra_mlp.w_out").outputs[0]
        values["output"] = _sum_with(branch)
        for name, tensor in zip(layer_taps(i, model), values, strict=True):
            value = values[tensor]
            assert value is not None
            value.name = prefix + name


def show_taps(model: ir.Model, config: ModelConfig, *, encoder: bool = False) -> None:
    """Make the values that `name_taps` named, or of an encoder's graph `name_encoder_taps`, outputs of a lowered graph.

    They are in float32.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    taps = encoder_taps if encoder else graph_taps
    for name in taps(config.to_dict()):
        node = ir.node("Cast", [values[name]], {"to": ir.DataType.FLOAT})
        graph.append(node)
        (output,) = node.outputs
        output.name, output.type, output.shape = name + TAP_OUTPUT, ir.TensorType(ir.DataType.FLOAT), values[name].shape
        graph.outputs.append(output)


def _product(graph: ir.Graph, weight: str) -> ir.Node:
    """The product that reads the weight, as it is or transposed."""
    (node,) = graph.initializers[weight].consumers()
    while node.op_type in ("Transpose", "Cast"):
        (node,) = node.outputs[0].consumers()
    assert node.op_type in ("MatMul", "Gemm"), node.op_type
    return node


def _with_bias(product: ir.Value) -> ir.Value:
    """The product's result, after its bias was added if it has one."""
    (user,) = product.consumers()
    has_bias = any(value is not None and value.is_initializer() for value in user.inputs)
    return user.outputs[0] if user.op_type == "Add" and has_bias else product


def _sum_with(branch: ir.Value) -> ir.Value:
    """The residual stream after a branch, as it is or changed, was added to it."""
    (add,) = branch.consumers()
    if add.op_type in ("RMSNormalization", "Mul"):  # normalised, or without the tokens that experts did not take
        (add,) = add.outputs[0].consumers()
    assert add.op_type == "Add", add.op_type
    return add.outputs[0]
