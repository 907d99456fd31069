"""Building: a checkpoint becomes an engine directory, or a portable ONNX model, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from gatework.export.checkpoint import Checkpoint
from gatework.export.coded import stored_blocks
from gatework.export.config import Dtype, ModelConfig
from gatework.export.golden import require_polygraphy, write_golden
from gatework.export.lower import CUDA_DTYPES, lower_to_cpu, lower_to_cuda
from gatework.export.lower.experts import moe_nodes
from gatework.export.lower.fused import fuse_into_kernels
from gatework.export.lower.packed import to_contrib
from gatework.export.materialize import DENSE, EXPERTS, GRAPH, write_model
from gatework.export.onnx_export import add_function_body, trace, trace_encoder
from gatework.export.options import BuildOptions
from gatework.export.references import References, refer
from gatework.export.rounded import RoundedCheckpoint
from gatework.export.sharing import plain_files, share
from gatework.export.stages import cut, divide
from gatework.export.staging import check_free, new_directory, new_files
from gatework.export.tensorrt.compile import compile_tensorrt
from gatework.export.tensorrt.preflight import Preflight, preflight
from gatework.export.tensorrt.scales import load_scales
from gatework.export.tensorrt.toolchain import choose_compiler
from gatework.export.tokenizer_files import encode_text, open_tokenizer, read_text, tokenizer_files
from gatework.export.uptodate import build_inputs, tool_versions
from gatework.export.weight_facts import weight_facts
from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import OP_TYPE
from gatework.plugins.moe.spec import VERSION as PLUGIN_VERSION

if TYPE_CHECKING:
    from gatework.runtime.tokenizer import Tokenizer

_PRECISIONS: dict[Dtype, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def build_engine(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: bool = False,
    report: Callable[[Preflight], None] | None = None,
    **settings: Any,
) -> Path:
    """Compile a checkpoint folder into an engine directory and return its path.

    Args:
        force: replace an engine that stands at `out`.
        report: receives what is going to be built for a GPU, before the work begins.
        settings: fields of BuildOptions; target "cpu" and precision "int8" unless given.

    Raises:
        GateworkError: bad checkpoint or tokenizer, impossible target or precision, `out` in the way. Nothing is left behind.
    """
    options = BuildOptions(**{"target": "cpu", "precision": "int8", **settings})
    check_free(Path(out), force)
    compiler = None if options.device.capability is None else choose_compiler(options.device, options.toolchain)
    checkpoint, tokenizer = _open(source, options.drop_tokens)
    inputs = build_inputs(checkpoint.path, options)
    tools = tool_versions(options, experts=checkpoint.config.moe is not None)
    options = options.fitted_to(checkpoint.config)
    if compiler is not None:
        scales = load_scales(checkpoint, options)
        plan = preflight(checkpoint.config, options, compiler)
        if report is not None:
            report(plan)
    if options.calibration_text is not None:
        token_ids = encode_text(checkpoint.path, tokenizer, read_text(options.calibration_text))
        checkpoint = RoundedCheckpoint.of(checkpoint, options, token_ids, progress=progress)
    with new_directory(Path(out), force) as directory:
        if compiler is None:
            names, facts = _write_graph(checkpoint, directory, options, progress)
        else:
            names, facts = compile_tensorrt(checkpoint, directory, options, compiler, scales, progress=progress)
        finish_engine(directory, names, checkpoint, options, inputs, tools, facts)
    return Path(out)


def _open(source: str | os.PathLike[str], drop_tokens: bool) -> tuple[Checkpoint, Tokenizer | None]:
    """A checkpoint and its tokenizer, both checked before any work is done with them."""
    checkpoint = Checkpoint.open(source, drop_tokens=drop_tokens)
    tokenizer = open_tokenizer(checkpoint.path)
    checkpoint.check_small()
    return checkpoint, tokenizer


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


def _write_graph(
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
    return files, {"weight_bytes": weight_bytes, **tables, engine_format.STAGES: stages}


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


def export_onnx(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    dtype: Dtype = "float32",
    max_seq: int | None = None,
    all_logits: bool = False,
    drop_tokens: bool = False,
    golden: Path | None = None,
    link: bool = False,
    force: bool = False,
    progress: bool = False,
    report: Callable[[References], None] | None = None,
) -> Path:
    """Write the canonical, portable ONNX model, and return its folder.

    It runs on any ONNX runtime of opset 24: gatework::MoE carries its definition in standard operators. With its manifest the
    folder is an engine as well, for the target "onnx", which ONNX Runtime runs with none of this package's kernels.

    Args:
        out: the folder to make. None: model.onnx goes into the checkpoint's own folder, without manifest, and reads the
            weights from the files there.
        drop_tokens: see BuildOptions.
        golden: a new folder for inputs and the reference's outputs; see `gatework.export.golden`.
        link: let `out` share the checkpoint's files instead of writing the weights again; copies, where the disk cannot.
            What is read from them is not checked to be finite, and the manifest has digests of their headers alone.
        report: receives what is read from the checkpoint's files, if `link` or no `out`.

    Raises:
        GateworkError: bad checkpoint or tokenizer, impossible dtype, `out` in the way. Nothing is left behind.
    """
    if dtype not in _PRECISIONS:
        raise GateworkError("unknown --dtype", got=dtype, expected=" or ".join(_PRECISIONS))
    if golden is not None:
        require_polygraphy(golden)
        if out is not None and golden.resolve().is_relative_to(Path(out).resolve()):
            raise GateworkError("--golden lies in --out", got=golden, fix="choose another --golden")
    checkpoint, _ = _open(source, drop_tokens)
    if golden is not None and checkpoint.config.encoder_layers:
        what, fix = "--golden is for models without an encoder", "leave --golden out"
        raise GateworkError(what, got="a model with one", fix=fix)
    options = BuildOptions(target="cpu", precision="fp32", max_seq=max_seq, drop_tokens=drop_tokens)
    options = options.fitted_to(checkpoint.config)
    assert options.max_seq is not None
    if out is None:
        plain_files(checkpoint.path, checkpoint.source.files)
    inputs, tools = build_inputs(checkpoint.path, options), tool_versions(options, experts=False)
    place = (
        new_files(checkpoint.path, engine_format.IN_PLACE, force) if out is None else new_directory(Path(out), force)
    )
    with place as directory:
        model = trace(checkpoint.config, options.max_seq, dtype=dtype, all_logits=all_logits)
        encoder = trace_encoder(checkpoint.config, dtype=dtype) if checkpoint.config.encoder_layers else None
        graphs = [model] if encoder is None else [model, encoder]
        for graph in graphs:
            add_function_body(graph)
        facts = weight_facts(model, checkpoint.config, encoder)
        shared = _refer(graphs, checkpoint, None if out is None else directory) if link or out is None else None
        files = (DENSE, EXPERTS) if out is not None else engine_format.IN_PLACE[:2]
        names = write_model(model, checkpoint, directory, encoder=encoder, files=files, progress=progress)
        if out is not None:
            kind = {"target": "onnx", "precision": _PRECISIONS[dtype]}
            finish_engine(directory, names, checkpoint, options, inputs, tools, facts, shared=shared, **kind)
        if shared is not None and report is not None:
            report(shared)
        if golden is not None:
            write_golden(checkpoint, golden, options.max_seq, all_logits=all_logits)
    return checkpoint.path if out is None else Path(out)


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
