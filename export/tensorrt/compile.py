"""Compiling a checkpoint for TensorRT: lowered graph, plan, and the expert weights beside it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatework.export.checkpoint import Checkpoint
from gatework.export.coded import stored_blocks
from gatework.export.lower import lower_to_tensorrt
from gatework.export.lower.experts import experts_to_inputs, moe_nodes
from gatework.export.materialize import EXPERTS, GRAPH, write_experts, write_model
from gatework.export.onnx_export import trace
from gatework.export.options import BuildOptions
from gatework.export.packing import Pack
from gatework.export.taps import show_taps
from gatework.export.tensorrt.builder import PlanRequest, build_plan
from gatework.export.tensorrt.kernels import write_kernels
from gatework.export.tensorrt.scales import StaticScales
from gatework.export.tensorrt.toolchain import Compiler
from gatework.export.weight_facts import weight_facts
from gatework.plugins.moe.launcher import Launcher
from gatework.plugins.moe.tensorrt import register
from gatework.plugins.tensorrt_module import load_toolchain

PLAN, LAYERS, LOG = "model.plan", "layers.json", "builder.log"


@dataclass(frozen=True, slots=True)
class Graph:
    """A lowered graph that stands ready on disk.

    path: the ONNX file, dense weights beside it. layers: counts by kind that TensorRT has to understand. experts: what fills
    the expert inputs. facts: of the weights, for the manifest.
    """

    path: Path
    layers: dict[str, int]
    experts: list[Pack]
    facts: dict[str, Any]


def write_graph(
    checkpoint: Checkpoint, folder: Path, options: BuildOptions, scales: StaticScales, *, progress: bool = False
) -> Graph:
    """Lower a checkpoint for TensorRT and write graph and dense weights into `folder`."""
    config = checkpoint.config
    assert options.max_seq is not None
    model = trace(config, options.max_seq, dtype="float16" if options.precision == "fp16" else "bfloat16")
    blocks = stored_blocks(checkpoint)
    model = lower_to_tensorrt(model, options.precision, group=options.group, scales=scales, blocks=blocks)  # type: ignore[arg-type]
    if options.taps:
        show_taps(model, config)
    facts = weight_facts(model, config)
    model, experts = experts_to_inputs(model)
    layers = {
        "PLUGIN_V3": len(moe_nodes(model)),
        "KV_CACHE_UPDATE": 2 * config.num_layers,
        "ATTENTION_INPUT": sum(node.op_type == "Attention" for node in model.graph),
    }
    write_model(model, checkpoint, folder, progress=progress)
    return Graph(folder / GRAPH, layers, experts, facts)


def compile_tensorrt(
    checkpoint: Checkpoint,
    directory: Path,
    options: BuildOptions,
    compiler: Compiler,
    scales: StaticScales,
    *,
    progress: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """Write plan, experts, kernels, layer listing and builder log into `directory`; returns names and facts of weights.

    The dense weights pass through a scratch folder, from which TensorRT reads them into the plan.
    """
    trt = load_toolchain(compiler.module)
    if (
        checkpoint.config.moe is not None and compiler.sm is None
    ):  # on the GPU at hand TensorRT may run what it compiles
        register(trt).launcher = Launcher(compiling=True)
    names = [PLAN, LAYERS, LOG, *write_kernels(checkpoint.config, options, directory)]
    with tempfile.TemporaryDirectory(prefix=".graph.", dir=directory) as scratch:
        graph = write_graph(checkpoint, Path(scratch), options, scales, progress=progress)
        request = PlanRequest(
            graph=graph.path,
            plan=directory / PLAN,
            sm=compiler.sm,
            layers=graph.layers,
            max_batch=options.max_batch,
            prefill_chunk=options.prefill_chunk,
            log=directory / LOG,
            timing_cache=options.timing_cache,
            strip_weights=options.strip_weights,
            progress=progress,
        )
        with register(trt).raising_errors():
            listing = build_plan(trt, request)
    (directory / LAYERS).write_text(json.dumps(listing.to_json(), indent=1) + "\n")
    if graph.experts and not options.plan_only:
        write_experts(graph.experts, checkpoint, directory / EXPERTS, progress=progress)
        names.append(EXPERTS)
    return names, graph.facts
