"""Writing: the files of an engine directory, and of a portable ONNX model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gatework.export.checkpoint import Checkpoint
from gatework.export.coded import stored_blocks
from gatework.export.config import Dtype, ModelConfig
from gatework.export.lower import CUDA_DTYPES, lower_to_cpu, lower_to_cuda
from gatework.export.lower.experts import moe_nodes
from gatework.export.lower.fused import fuse_into_kernels
from gatework.export.lower.packed import to_contrib
from gatework.export.materialize import DENSE, EXPERTS, GRAPH, write_model
from gatework.export.onnx_export import add_function_body, trace, trace_encoder
from gatework.export.options import BuildOptions
from gatework.export.references import References, refer
from gatework.export.sharing import share
from gatework.export.stages import cut, divide
from gatework.export.tokenizer_files import tokenizer_files
from gatework.export.weight_facts import weight_facts
from gatework.plugins import engine_format
from gatework.plugins.moe.spec import OP_TYPE
from gatework.plugins.moe.spec import VERSION as PLUGIN_VERSION


def write_graph(
    checkpoint: Checkpoint, directory: Path, options: BuildOptions, progress: bool
) -> tuple[list[str], dict[str, Any]]:
    """The lowered graph for ONNX Runtime, or that of each stage, and the weights; returns file names and facts."""
    assert options.max_seq is not None
    config, precision = checkpoint.config.within(options.max_seq), options.precision
    dtype: Dtype = CUDA_DTYPES[precision] if options.target == "cuda" else "float32"  # type: ignore[index]
    model = trace(config, options.max_seq, dtype=dtype)
    if config.encoder_layers:
        return _write_lowered(model, config, checkpoint, directory, options, progress, trace_encoder(config))
    if options.stages == 1:
        return _write_lowered(model, config, checkpoint, directory, options, progress)
    files: list[str] = []
    stages: list[dict[str, Any]] = []
    tables: dict[str, dict[str, Any]] = {"tensors": {}, engine_format.KEPT: {}}
    for number, layers in enumerate(divide(config, options.stages, precision, options.group)):  # type: ignore[arg-type]
        folder = directory / engine_format.stage_folder(number)
        folder.mkdir()
        part = cut(model, layers, config.num_layers)
        names, facts = _write_lowered(part, config, checkpoint, folder, options, progress)
        files += [f"{folder.name}/{name}" for name in names]
        for name, table in tables.items():
            table |= facts[name]
        stages.append({"layers": [layers.start, layers.stop], "weight_bytes": facts["weight_bytes"]})
    weight_bytes = {name: sum(stage["weight_bytes"][name] for stage in stages) for name in ("total", "per_token")}
    cache = {engine_format.CACHE_DTYPE: facts[engine_format.CACHE_DTYPE]}
    return files, {"weight_bytes": weight_bytes, **tables, **cache, engine_format.STAGES: stages}


def _write_lowered(
    model: ir.Model,
    config: ModelConfig,
    checkpoint: Checkpoint,
    directory: Path,
    options: BuildOptions,
    progress: bool,
    encoder: ir.Model | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Lower a canonical graph, and its encoder's, in place, and write them with their weights."""
    on_cpu = partial(lower_to_cpu, blocks=stored_blocks(checkpoint, options.group_size))
    lower = partial(lower_to_cuda if options.target == "cuda" else on_cpu, pure=options.pure)
    for graph in (model, *([encoder] if encoder is not None else [])):
        lower(graph, config, options.precision, options.group)
        if any(node.op_type == OP_TYPE for node in moe_nodes(graph)):
            add_function_body(graph)
    names = write_model(model, checkpoint, directory, encoder=encoder, progress=progress)
    facts = weight_facts(model, config, encoder)
    if options.target == "cpu":
        names += _finish_graphs(model, encoder, directory)
    return names, facts


def _finish_graphs(model: ir.Model, encoder: ir.Model | None, directory: Path) -> list[str]:
    """Write the graph for machines without the kernels' library, and those for machines with it anew; returns new names."""
    names = []
    if encoder is None:
        contrib, packed = to_contrib(model.clone())
        if packed:
            ir.save(contrib, directory / engine_format.FALLBACK)
            names.append(engine_format.FALLBACK)
    for graph, name in ((model, GRAPH), (encoder, engine_format.ENCODER)):
        if graph is not None and fuse_into_kernels(graph)[1]:
            ir.save(graph, directory / name)
    return names


def write_portable(
    checkpoint: Checkpoint,
    directory: Path,
    max_seq: int,
    *,
    dtype: Dtype,
    all_logits: bool,
    in_place: bool,
    link: bool,
    progress: bool,
) -> tuple[list[str], dict[str, Any], References | None]:
    """The canonical graph, and its encoder's, and the weights; returns file names, facts and what the checkpoint's files hold.

    in_place: `directory` will be part of the checkpoint's folder. link: the checkpoint's files are to be shared with it.
    """
    model = trace(checkpoint.config, max_seq, dtype=dtype, all_logits=all_logits)
    encoder = trace_encoder(checkpoint.config, dtype=dtype) if checkpoint.config.encoder_layers else None
    graphs = [model] if encoder is None else [model, encoder]
    for graph in graphs:
        add_function_body(graph)
    facts = weight_facts(model, checkpoint.config, encoder)
    shared = _refer(graphs, checkpoint, None if in_place else directory) if link or in_place else None
    files = engine_format.IN_PLACE[:2] if in_place else (DENSE, EXPERTS)
    names = write_model(model, checkpoint, directory, encoder=encoder, files=files, progress=progress)
    return names, facts, shared


def _refer(models: list[ir.Model], checkpoint: Checkpoint, directory: Path | None) -> References:
    """Let the models read the checkpoint's files: in their own folder, or shared with `directory`."""
    if directory is None:
        return refer(models, checkpoint, "in place", lambda path: path.relative_to(checkpoint.path).as_posix())
    files = {path: f"{engine_format.CHECKPOINT}/{path.name}" for path in checkpoint.source.files}
    (directory / engine_format.CHECKPOINT).mkdir()
    try:
        how = share({path: directory / name for path, name in files.items()})
    except OSError as error:
        (directory / engine_format.CHECKPOINT).rmdir()
        return References(f"copied, since the files cannot be shared: {error.strerror}")
    shared = refer(models, checkpoint, how, files.__getitem__)
    for path in files.keys() - shared.starts.keys():
        (directory / files[path]).unlink()
    return shared


def finish_engine(
    directory: Path,
    names: list[str],
    checkpoint: Checkpoint,
    options: BuildOptions,
    inputs: dict[str, Any],
    tools: dict[str, str],
    facts: dict[str, Any],
    *,
    target: str | None = None,
    precision: str | None = None,
    shared: References | None = None,
) -> None:
    """Add the tokenizer's files and the manifest to the files `names` of a folder.

    inputs: see `build_inputs`. tools: versions. facts: see `weight_facts`. target, precision: where they are not the options'.
    shared: what the graph reads from the checkpoint's files, which lie in the folder as well.
    """
    names = names + _copy_tokenizer(checkpoint.path, directory)
    heads: dict[str, int] = {}
    if shared is not None:
        heads = {
            f"{engine_format.CHECKPOINT}/{path.name}": min(start, engine_format.MAX_HEAD)
            for path, start in shared.starts.items()
        }
        facts |= {"shared": {"how": shared.how, "bytes": shared.nbytes, "written": shared.written}}
    manifest = {
        "format_version": engine_format.FORMAT_VERSION,
        "gatework_version": version("gatework"),
        "target": target or options.target,
        "precision": precision or options.precision,
        "model": checkpoint.config.to_dict(),
        "limits": {name: getattr(options, name) for name in ("max_batch", "max_seq", "prefill_chunk")},
        "toolchain": tools,
        "plugin_version": PLUGIN_VERSION,
        "checkpoint": _checkpoint_facts(checkpoint),
        "inputs": inputs,
        **facts,
        "files": engine_format.file_table(directory, [*names, *heads], heads),
    }
    (directory / engine_format.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _copy_tokenizer(source: Path, directory: Path) -> list[str]:
    files = tokenizer_files(source)
    for file in files:
        shutil.copyfile(file, directory / file.name)
    return [file.name for file in files]


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "fingerprint": checkpoint.fingerprint(),
        "num_parameters": config.num_parameters(),
        "num_active_parameters": config.num_active_parameters(),
    }
