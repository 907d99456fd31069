"""GroupQueryAttention -> the CPU kernels' CachedAttention, which reads a head's keys once for all of its queries, and back."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gatework.export.lower.attention import attention_lengths
from gatework.export.lower.graph import MS, Builder, replace
from gatework.plugins.moe import cpu_ops
from gatework.plugins.moe.spec import DOMAIN

_CONTRIB = "GroupQueryAttention"
_SIDE_BY_SIDE = (0, 3, 4, 7, 8, 1, 2)  # its inputs q (or q|k|v), past k and v, cos, sin, k, v
_EXTRA = slice(9, 16)  # its inputs that CachedAttention has not


def to_cached_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Replace every GroupQueryAttention that has neither bias nor sinks."""
    starts = next(value for value in model.graph.inputs if value.name == "write_indices")
    modified = False
    for node in [node for node in model.graph if node.op_type == _CONTRIB]:
        if any(node.inputs[_EXTRA]):
            continue
        q, past_k, past_v, cos, sin, k, v = (node.inputs[place] for place in _SIDE_BY_SIDE)
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        settings = {name: given[name] for name in ("num_heads", "kv_num_heads", "scale")}
        settings |= {"softcap": given.get("softcap", 0.0), "window": max(given["local_window_size"], 0)}
        separate = [k, v] if k is not None else []
        inputs = [q, past_k, past_v, starts, cos, sin, *separate]
        outputs = Builder(model.graph, node).op(cpu_ops.ATTENTION, *inputs, domain=DOMAIN, outputs=3, **settings)
        _take_over(node, outputs)
        modified = True
    return model, modified


def to_group_query_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Undo `to_cached_attention`."""
    nodes = [node for node in model.graph if node.op_type == cpu_ops.ATTENTION]
    if not nodes:
        return model, False
    lengths = attention_lengths(model.graph, query_lengths=True)
    for node in nodes:
        q, past_k, past_v, _, cos, sin, *separate = node.inputs
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        window = settings.pop("window")
        settings |= {"do_rotary": 1, "local_window_size": window or -1}
        inputs = [q, *(separate or (None, None)), past_k, past_v, *lengths.before(cos, sin)]
        _take_over(node, Builder(model.graph, node).op(_CONTRIB, *inputs, domain=MS, outputs=3, **settings))
    return model, True


def _take_over(node: ir.Node, outputs: Sequence[ir.Value]) -> None:
    for old, new in zip(node.outputs, outputs, strict=True):
        replace(old, new)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
