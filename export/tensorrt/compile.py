"""Compiling a checkpoint for TensorRT: lowered graph, plan, and the expert weights beside it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gatework.export.checkpoint import Checkpoint
from gatework.export.coded import stored_blocks
from gatework.export.config import Dtype
from gatework.export.lower import lower_to_tensorrt
from gatework.export.lower.experts import experts_to_inputs, moe_nodes
from gatework.export.materialize import EXPERTS, GRAPH, write_experts, write_model
from gatework.export.onnx_export import trace, trace_encoder
from gatework.export.options import BuildOptions
from gatework.export.packing import Pack
from gatework.export.taps import show_taps
from gatework.export.tensorrt.builder import PlanRequest, build_plan
from gatework.export.tensorrt.kernels import write_kernels
from gatework.export.tensorrt.scales import StaticScales
from gatework.export.tensorrt.toolchain import Compiler
from gatework.export.weight_facts import weight_facts
from gatework.plugins.engine_format import ENCODER, ENCODER_PLAN, PLAN
from gatework.plugins.moe.launcher import Launcher
from gatework.plugins.moe.tensorrt import register
from gatework.plugins.tensorrt_module import load_toolchain

LAYERS, LOG = "layers.json", "builder.log"
_ENCODER = "encoder."  # begins the names of its files


@dataclass(frozen=True, slots=True)
class Graph:
    """A lowered graph that stands ready on disk.

    path: the ONNX file, dense weights beside it. layers: counts by kind that TensorRT has to understand. profiles: see
    `PlanRequest`.
    """

    path: Path
    layers: dict[str, int]
    profiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Written:
    """The graphs of one model, each by the name of the plan that will be made of it.

    experts: what fills the expert inputs of all of them. facts: of the weights, for the manifest.
    """

    graphs: dict[str, Graph]
    experts: list[Pack]
    facts: dict[str, Any]


def write_graphs(
    checkpoint: Checkpoint, folder: Path, options: BuildOptions, scales: StaticScales, *, progress: bool = False
) -> Written:
    """Lower a checkpoint for TensorRT and write its graph, its encoder's if it has one, and dense weights into `folder`."""
    config, precision, max_seq = checkpoint.config, options.precision, options.max_seq
    assert max_seq is not None
    dtype: Dtype = "float16" if precision == "fp16" else "bfloat16"
    model = trace(config, max_seq, dtype=dtype, fixed_source=True)
    encoder = trace_encoder(config, dtype=dtype) if config.encoder_layers else None
    models = {PLAN: model} | ({ENCODER_PLAN: encoder} if encoder is not None else {})
    blocks = stored_blocks(checkpoint)
    for each in models.values():
        lower_to_tensorrt(
            each,
            precision,  # type: ignore[arg-type]
            group=options.group,
            scales=scales,
            blocks=blocks,
            weight_only=options.weight_only,
        )
    if options.taps:
        show_taps(model, config)
    facts = weight_facts(model, config, encoder)
    experts = [pack for each in models.values() for pack in experts_to_inputs(each)[1]]
    write_model(model, checkpoint, folder, encoder=encoder, progress=progress)
    steps = ((1, options.prefill_chunk), (options.max_batch, 1))
    graphs = {PLAN: Graph(folder / GRAPH, _layers(model, 2 * config.num_layers), steps)}
    if encoder is not None:
        graphs[ENCODER_PLAN] = Graph(folder / ENCODER, _layers(encoder, 0), ((1, max_seq),))
    return Written(graphs, experts, facts)


def _layers(model: ir.Model, cache_updates: int) -> dict[str, int]:
    """What TensorRT has to make of a graph."""
    return {
        "PLUGIN_V3": len(moe_nodes(model)),
        "KV_CACHE_UPDATE": cache_updates,
        "ATTENTION_INPUT": sum(node.op_type == "Attention" for node in model.graph),
    }


def files_beside(plan: str) -> tuple[str, str]:
    """The layer listing and the builder's log of a plan."""
    prefix = _ENCODER if plan == ENCODER_PLAN else ""
    return prefix + LAYERS, prefix + LOG


def compile_tensorrt(
    checkpoint: Checkpoint,
    directory: Path,
    options: BuildOptions,
    compiler: Compiler,
    scales: StaticScales,
    *,
    progress: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """Write plans, experts, kernels, layer listings and builder logs into `directory`; returns names and facts of weights.

    The dense weights pass through a scratch folder, from which TensorRT reads them into the plans.
    """
    trt = load_toolchain(compiler.module)
    if (
        checkpoint.config.moe is not None and compiler.sm is None
    ):  # on the GPU at hand TensorRT may run what it compiles
        register(trt).launcher = Launcher(compiling=True)
    kernels = write_kernels(checkpoint.config, options, directory)
    names: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".graph.", dir=directory) as scratch:
        written = write_graphs(checkpoint, Path(scratch), options, scales, progress=progress)
        for plan, graph in written.graphs.items():
            names += [plan, *_compile_graph(trt, graph, directory / plan, options, compiler, progress)]
    names += kernels
    if written.experts and not options.plan_only:
        write_experts(written.experts, checkpoint, directory / EXPERTS, progress=progress)
        names.append(EXPERTS)
    return names, written.facts


def _compile_graph(
    trt: Any, graph: Graph, plan: Path, options: BuildOptions, compiler: Compiler, progress: bool
) -> tuple[str, str]:
    """Write a plan, its layer listing and its log; returns the names of the last two."""
    listing_name, log = files_beside(plan.name)
    request = PlanRequest(
        graph=graph.path,
        plan=plan,
        sm=compiler.sm,
        layers=graph.layers,
        profiles=graph.profiles,
        log=plan.with_name(log),
        timing_cache=options.timing_cache,
        strip_weights=options.strip_weights,
        progress=progress,
    )
    with register(trt).raising_errors():
        listing = build_plan(trt, request)
    plan.with_name(listing_name).write_text(json.dumps(listing.to_json(), indent=1) + "\n")
    return listing_name, log
