"""Compiling a checkpoint for TensorRT: lowered graph, plan, and the expert weights beside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from gatework.export.checkpoint import Checkpoint
from gatework.export.config import Dtype
from gatework.export.lower import lower_to_tensorrt
from gatework.export.lower.experts import experts_to_inputs, moe_nodes
from gatework.export.materialize import DENSE, EXPERTS, GRAPH, write_experts, write_model
from gatework.export.onnx_export import trace
from gatework.export.options import BuildOptions
from gatework.export.tensorrt.builder import PlanRequest, build_plan
from gatework.export.tensorrt.scales import StaticScales
from gatework.export.tensorrt.toolchain import Compiler, load_toolchain
from gatework.export.weight_facts import weight_facts
from gatework.plugins.moe.tensorrt import register

PLAN, LAYERS, LOG = "model.plan", "layers.json", "builder.log"


def compile_tensorrt(
    checkpoint: Checkpoint,
    directory: Path,
    options: BuildOptions,
    compiler: Compiler,
    scales: StaticScales,
    *,
    progress: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """Write plan, experts, layer listing and builder log into `directory`; returns the file names and facts of the weights.

    The dense weights pass through a scratch folder, from which TensorRT reads them into the plan; they stay beside the plan
    only when it has none.
    """
    config = checkpoint.config
    assert options.max_seq is not None
    model = trace(config, options.max_seq, dtype=activation_dtype(options.precision))
    model = lower_to_tensorrt(model, options.precision, group=options.group, scales=scales)  # type: ignore[arg-type]
    facts = weight_facts(model, config)
    model, experts = experts_to_inputs(model)
    expected = {
        "PLUGIN_V3": len(moe_nodes(model)),
        "KV_CACHE_UPDATE": 2 * config.num_layers,
        "ATTENTION_INPUT": config.num_layers,
    }
    names = [PLAN, LAYERS, LOG]
    with tempfile.TemporaryDirectory(prefix=".graph.", dir=directory) as scratch:
        write_model(model, checkpoint, Path(scratch), progress=progress)
        request = PlanRequest(
            graph=Path(scratch, GRAPH),
            plan=directory / PLAN,
            sm=compiler.sm,
            layers=expected,
            max_batch=options.max_batch,
            prefill_chunk=options.prefill_chunk,
            log=directory / LOG,
            timing_cache=options.timing_cache,
            strip_weights=options.strip_weights,
            progress=progress,
        )
        trt = load_toolchain(compiler.module)
        with register(trt).raising_errors():
            listing = build_plan(trt, request)
        if options.strip_weights:
            Path(scratch, DENSE).rename(directory / DENSE)
            names.append(DENSE)
    (directory / LAYERS).write_text(json.dumps(listing.to_json(), indent=1) + "\n")
    if experts and not options.plan_only:
        write_experts(experts, checkpoint, directory / EXPERTS, progress=progress)
        names.append(EXPERTS)
    return names, facts


def activation_dtype(precision: str) -> Dtype:
    """What a plan computes in between its products."""
    return "float16" if precision == "fp16" else "bfloat16"
