"""GroupQueryAttention -> the CPU kernels' CachedAttention, which reads a head's keys once for all of its queries, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gatework.export.lower.attention import alibi_bias, attention_lengths
from gatework.export.lower.graph import MS, Builder, producer, replace
from gatework.export.packing import static_shape
from gatework.plugins.moe import cpu_ops
from gatework.plugins.moe.spec import DOMAIN

_CONTRIB = "GroupQueryAttention"
_INPUTS = (0, 3, 4, 7, 8, 1, 2)  # of it: q (or q|k|v), past k and v, cos, sin, k, v
_POSITION_IDS, _BIAS, _SINKS = 9, 10, 11
_OUR_INPUTS = 10
_CACHE = (1, 2)  # its places among CachedAttention's inputs, and among its outputs


def to_cached_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Replace every GroupQueryAttention whose positions are the cache's slots, and whose bias, if there is one, is ALiBi's.

    Post: if all could be replaced, the cache is float16.
    """
    graph = model.graph
    starts = next((value for value in graph.inputs if value.name == "write_indices"), None)
    modified = False
    for node in [node for node in graph if node.op_type == _CONTRIB]:
        given = [*node.inputs, *[None] * (_SINKS + 1 - len(node.inputs))]
        if given[_POSITION_IDS] is not None:
            continue
        if given[_BIAS] is not None and _slopes(given[_BIAS]) is None:
            continue
        q, past_k, past_v, cos, sin, k, v = (given[place] for place in _INPUTS)
        build = Builder(graph, node)
        if cos is None:
            assert past_k is not None and past_k.shape is not None
            cos = sin = build.constant(np.zeros((int(past_k.shape[2]), 0), np.float32))  # type: ignore[arg-type]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        settings = {name: attributes[name] for name in ("num_heads", "kv_num_heads", "scale")}
        settings |= {"softcap": attributes.get("softcap", 0.0), "window": max(attributes["local_window_size"], 0)}
        inputs = [q, past_k, past_v, starts, cos, sin, k, v, _slopes(given[_BIAS]), given[_SINKS]]
        while inputs[-1] is None:
            inputs.pop()
        _take_over(node, build.op(cpu_ops.ATTENTION, *inputs, domain=DOMAIN, outputs=3, **settings))
        modified = True
    if modified and not any(node.op_type == _CONTRIB for node in graph):
        _set_cache(graph, ir.DataType.FLOAT16)
    return model, modified


def _set_cache(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Change the type of the cache that goes into and comes out of every CachedAttention."""
    for node in graph:
        if node.op_type == cpu_ops.ATTENTION:
            for value in (each[place] for each in (node.inputs, node.outputs) for place in _CACHE):
                assert value is not None
                value.type = ir.TensorType(dtype)  # a clone's values share the type that they had


def _slopes(bias: ir.Value | None) -> ir.Value | None:
    """ALiBi's, out of the bias that `alibi_bias` makes of them."""
    multiply = producer(bias, "Mul")
    return None if multiply is None else multiply.inputs[1]


def to_group_query_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Undo `to_cached_attention`; the cache is float32, since the operator on CPUs has one type for all."""
    nodes = [node for node in model.graph if node.op_type == cpu_ops.ATTENTION]
    if not nodes:
        return model, False
    _set_cache(model.graph, ir.DataType.FLOAT)
    lengths = attention_lengths(model.graph, query_lengths=True)
    bias = None
    for node in nodes:
        given: list[ir.Value | None] = [*node.inputs, *[None] * (_OUR_INPUTS - len(node.inputs))]
        q, past_k, past_v, _, cos, sin, k, v, slopes, sinks = given
        if slopes is not None and bias is None:
            bias = alibi_bias(model.graph, node, lengths, slopes)
        rotary = cos is not None and static_shape(cos)[1] > 0
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        window = settings.pop("window")
        settings |= {"do_rotary": int(rotary), "local_window_size": window or -1}
        tables = (cos, sin) if rotary else (None, None)
        inputs = [q, k, v, past_k, past_v, *lengths.before(tables, None, bias, sinks)]
        _take_over(node, Builder(model.graph, node).op(_CONTRIB, *inputs, domain=MS, outputs=3, **settings))
    return model, True


def _take_over(node: ir.Node, outputs: Sequence[ir.Value]) -> None:
    for old, new in zip(node.outputs, outputs, strict=True):
        replace(old, new)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
