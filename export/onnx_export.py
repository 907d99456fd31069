"""Tracing the decoder into the canonical ONNX graph (ai.onnx 24 + gatework::MoE), without a single weight in memory."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from onnxscript import optimizer

from gatework.export import attention_op, cache_op
from gatework.export.config import MAX_SIZE, Dtype, ModelConfig
from gatework.export.decoder import Decoder, MoE, SharedExpert
from gatework.export.encoder import Encoder
from gatework.export.lower.experts import attributes_of, moe_nodes
from gatework.export.packing import identity_pack, set_pack
from gatework.export.positions import relative_buckets, rope_tables
from gatework.export.repeat import repeat_layers
from gatework.export.taps import name_encoder_taps, name_taps
from gatework.plugins.engine_format import CROSS, SOURCE_LENGTHS
from gatework.plugins.moe import onnx_op, torch_op
from gatework.plugins.moe.spec import INPUTS

OPSET = 24
_B_IN = INPUTS.index("b_in")
_TRACED_LAYERS = 2  # at least; the rest are copies of those that are not the first
STEP_INPUTS = ("input_ids", "position_ids", "write_indices")
ROPE_TABLES = ("rope_cos", "rope_sin")
_Module = TypeVar("_Module", bound=torch.nn.Module)


def cache_names(config: ModelConfig, prefix: str) -> list[str]:
    """`past.0.k`, `past.0.v`, `past.1.k`, ... for prefix "past" (or "present")."""
    return [f"{prefix}.{i}.{kind}" for i in range(config.num_layers) for kind in "kv"]


def trace(
    config: ModelConfig,
    max_seq: int,
    *,
    dtype: Dtype = "float32",
    all_logits: bool = False,
    fixed_source: bool = False,
) -> ir.Model:
    """The canonical graph of a model.

    Args:
        fixed_source: the encoder's keys and values have room for max_seq positions, as the cache has, instead of any length.

    Inputs and outputs are those of DESIGN.md's table. Every weight is an initializer that bears its canonical name, dtype
    `dtype` and shape but holds no data; the rotary tables and scalar constants do hold data.
    """
    torch_dtype, config = getattr(torch, dtype), config.within(max_seq)
    templates = [] if config.encoder_layers else _templates(config)
    traced = _shortened(config, config.num_layers - len(templates))
    batch = torch.export.Dim("batch", max=1024)
    with torch.device("meta"):
        decoder = _in_type(Decoder(traced, max_seq, all_logits=all_logits), torch_dtype)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        cache, cross = decoder.empty_cache(2), decoder.empty_cache(2) if config.encoder_layers else None
    lengths = ids[:, 0].clone()
    rows, both = {0: batch}, {0: batch, 1: torch.export.Dim("seq", max=max(max_seq, ids.shape[1]))}
    source = rows if fixed_source else {0: batch, 2: torch.export.Dim("source")}
    inputs: dict[str, tuple[Any, Any]] = {
        "input_ids": (ids, both),
        "position_ids": (ids.clone(), both),
        "write_indices": (lengths.clone(), rows),
        "cache": (cache, [rows] * len(cache)),
    }
    names = [*STEP_INPUTS, *cache_names(traced, "past")]
    if config.ntk_length is not None:
        inputs["prompt_lengths"], names = (lengths, rows), [*names, "prompt_lengths"]
    if cross is not None:
        inputs |= {CROSS: (cross, [source] * len(cross)), SOURCE_LENGTHS: (lengths, rows)}
        names += [*cache_names(traced, CROSS), SOURCE_LENGTHS]
    model = _export(decoder, inputs, names, ["logits", *cache_names(traced, "present")])
    repeat_layers(model.graph, traced.num_layers, templates)
    _drop_notes(model)
    name_taps(model.graph, config)
    for name, table in zip(ROPE_TABLES, rope_tables(config, max_seq), strict=True):
        _fill(model.graph, name, table.to(torch_dtype))  # ALiBi has none
    if config.relative_buckets is not None:
        _fill(model.graph, "relative_bias.buckets", relative_buckets(config, both_sides=False))
    _mark_weights(model.graph, config)
    return model


def trace_encoder(config: ModelConfig, *, dtype: Dtype = "float32") -> ir.Model:
    """The graph of a model's encoder: `Encoder`'s inputs by their names, and outputs `cross.{i}.k`, `.v`; see `trace`."""
    with torch.device("meta"):
        encoder = _in_type(Encoder(config), getattr(torch, dtype))
        ids = torch.zeros(2, 5, dtype=torch.int64)
    batch = torch.export.Dim("batch", max=1024)
    both = {0: batch, 1: torch.export.Dim("seq", max=MAX_SIZE)}
    inputs = {"input_ids": (ids, both), SOURCE_LENGTHS: (ids[:, 0].clone(), {0: batch})}
    model = _export(encoder, inputs, list(inputs), cache_names(config, CROSS))
    _drop_notes(model)
    name_encoder_taps(model.graph, config)
    _fill(model.graph, "encoder.relative_bias.buckets", relative_buckets(config, both_sides=True))
    _mark_weights(model.graph, config)
    return model


def _in_type(module: _Module, dtype: torch.dtype) -> _Module:
    """A module on the meta device with weights of that type, but for routers, which are float32."""
    module.to(dtype).eval()
    for part in module.modules():
        if isinstance(part, MoE | SharedExpert):
            part.router.float()
    return module


def _export(
    module: torch.nn.Module, inputs: dict[str, tuple[Any, Any]], names: list[str], outputs: list[str]
) -> ir.Model:
    """Trace a module on the meta device. inputs: by argument, each with its dynamic shape; names: of all tensors in them."""
    with _quiet():
        program = torch.onnx.export(
            module,
            kwargs={name: value for name, (value, _) in inputs.items()},
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # it would fold weights that are not there; `_fold` folds the rest
            verbose=False,
            dynamic_shapes={name: shape for name, (_, shape) in inputs.items()},
            input_names=names,
            output_names=outputs,
            custom_translation_table={
                **torch_op.onnx_translation(),
                **cache_op.onnx_translation(),
                **attention_op.onnx_translation(),
            },
        )
        assert program is not None
        return _fold(program.model)


def _fill(graph: ir.Graph, name: str, table: torch.Tensor) -> None:
    """Give an initializer its data, if the graph has it."""
    if name in graph.initializers:
        graph.initializers[name].const_value = ir.tensor(table, name=name)


def _mark_weights(graph: ir.Graph, config: ModelConfig) -> None:
    """Let the weights that the graph has be read from a checkpoint."""
    for name in config.tensor_shapes():
        if name in graph.initializers:
            value = graph.initializers[name]
            set_pack([value], identity_pack(value))


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
