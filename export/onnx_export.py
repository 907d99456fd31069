"""Tracing the decoder into the canonical ONNX graph (ai.onnx 24 + gatework::MoE), without a single weight in memory."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from onnxscript import optimizer

from gatework.export import attention_op, cache_op
from gatework.export.config import Dtype, ModelConfig
from gatework.export.decoder import Decoder, MoE, SharedExpert
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.packing import identity_pack, set_pack
from gatework.export.positions import rope_tables
from gatework.export.repeat import repeat_layers
from gatework.export.taps import name_taps
from gatework.plugins.moe import onnx_op, torch_op
from gatework.plugins.moe.spec import INPUTS

OPSET = 24
_B_IN = INPUTS.index("b_in")
_TRACED_LAYERS = 2  # at least; the rest are copies of those that are not the first
STEP_INPUTS = ("input_ids", "position_ids", "write_indices")
ROPE_TABLES = ("rope_cos", "rope_sin")


def cache_names(config: ModelConfig, prefix: str) -> list[str]:
    """`past.0.k`, `past.0.v`, `past.1.k`, ... for prefix "past" (or "present")."""
    return [f"{prefix}.{i}.{kind}" for i in range(config.num_layers) for kind in "kv"]


def trace(config: ModelConfig, max_seq: int, *, dtype: Dtype = "float32", all_logits: bool = False) -> ir.Model:
    """The canonical graph of a model.

    Inputs and outputs are those of DESIGN.md's table. Every weight is an initializer that bears its canonical name, dtype
    `dtype` and shape but holds no data; the rotary tables and scalar constants do hold data.
    """
    torch_dtype, config = getattr(torch, dtype), config.within(max_seq)
    templates = _templates(config)
    traced = _shortened(config, config.num_layers - len(templates))
    with torch.device("meta"):
        decoder = Decoder(traced, max_seq, all_logits=all_logits).to(torch_dtype).eval()
        for module in decoder.modules():
            if isinstance(module, MoE | SharedExpert):
                module.router.float()
        ids = torch.zeros(2, 5, dtype=torch.int64)
        inputs = (ids, ids.clone(), ids[:, 0].clone(), decoder.empty_cache(2))
        lengths = (ids[:, 0].clone(),) if config.ntk_length is not None else ()
    batch, seq = torch.export.Dim("batch", max=1024), torch.export.Dim("seq", max=max(max_seq, ids.shape[1]))
    both, rows = {0: batch, 1: seq}, {0: batch}
    with _quiet():
        program = torch.onnx.export(
            decoder,
            (*inputs, *lengths),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # it would fold weights that are not there; `_fold` folds the rest
            verbose=False,
            dynamic_shapes=(both, both, rows, [rows] * len(inputs[3]), *(rows for _ in lengths)),
            input_names=[*STEP_INPUTS, *cache_names(traced, "past"), *("prompt_lengths" for _ in lengths)],
            output_names=["logits", *cache_names(traced, "present")],
            custom_translation_table={
                **torch_op.onnx_translation(),
                **cache_op.onnx_translation(),
                **attention_op.onnx_translation(),
            },
        )
        assert program is not None
        model = _fold(program.model)
    repeat_layers(model.graph, traced.num_layers, templates)
    _drop_notes(model)
    name_taps(model.graph, config)
    for name, table in zip(ROPE_TABLES, rope_tables(config, max_seq), strict=True):
        if name in model.graph.initializers:  # ALiBi has none
            model.graph.initializers[name].const_value = ir.tensor(table.to(torch_dtype), name=name)
    for name in config.tensor_shapes():
        value = model.graph.initializers[name]
        set_pack([value], identity_pack(value))
    return model


def _templates(config: ModelConfig) -> list[int]:
    """For each of the last layers, as many as can be, the number of an earlier one like it that is traced, not the first."""
    kinds = [(config.window(i), config.has_experts(i)) for i in range(config.num_layers)]
    traced = min(_TRACED_LAYERS, config.num_layers)
    while not set(kinds[traced:]) <= set(kinds[1:traced]):
        traced += 1
    return [kinds.index(kind, 1) for kind in kinds[traced:]]


def _shortened(config: ModelConfig, layers: int) -> ModelConfig:
    """The first layers of a model."""
    return replace(config, num_layers=layers, full_attention=tuple(i for i in config.full_attention if i < layers))


def add_function_body(model: ir.Model) -> None:
    """Attach gatework::MoE's definition in standard operators, so that any ONNX runtime can run the file."""
    for node in moe_nodes(model)[:1]:  # all have the same attributes
        has_bias = len(node.inputs) > _B_IN and node.inputs[_B_IN] is not None
        function = ir.serde.deserialize_function(onnx_op.function_proto(attributes_of(node), has_bias=has_bias))
        model.functions[function.identifier()] = function


def _fold(model: ir.Model) -> ir.Model:
    """Fold scalar constants."""
    for value in model.graph.initializers.values():
        value.const_value = None
    optimizer.optimize_ir(model)
    return model


def _drop_notes(model: ir.Model) -> None:
    """Remove what the exporter noted for debugging."""
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notices about absent optional packages and data-free initializers.

    The garbage collector rests meanwhile: it would walk the exporter's many objects again and again and free none.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if collecting:
            gc.enable()
