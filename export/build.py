"""Building: a checkpoint becomes an engine directory, or a portable ONNX model, complete or not at all.

What is wrong with the input is found before onnx is imported, which takes longer than finding it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatework.export.checkpoint import Checkpoint
from gatework.export.config import Dtype
from gatework.export.golden import require_polygraphy, write_golden
from gatework.export.options import BuildOptions
from gatework.export.rounded import RoundedCheckpoint
from gatework.export.sharing import plain_files
from gatework.export.staging import check_free, new_directory, new_files
from gatework.export.tensorrt.toolchain import choose_compiler
from gatework.export.tokenizer_files import encode_text, open_tokenizer, read_text
from gatework.export.uptodate import build_inputs, tool_versions
from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError

if TYPE_CHECKING:
    from gatework.export.references import References
    from gatework.export.tensorrt.preflight import Preflight
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
    from gatework.export.engine_writer import finish_engine, write_graph

    if compiler is not None:
        from gatework.export.tensorrt.compile import compile_tensorrt
        from gatework.export.tensorrt.preflight import preflight
        from gatework.export.tensorrt.scales import load_scales

        scales = load_scales(checkpoint, options)
        plan = preflight(checkpoint.config, options, compiler)
        if report is not None:
            report(plan)
    if options.calibration_text is not None:
        token_ids = encode_text(checkpoint.path, tokenizer, read_text(options.calibration_text))
        checkpoint = RoundedCheckpoint.of(checkpoint, options, token_ids, progress=progress)
    with new_directory(Path(out), force) as directory:
        if compiler is None:
            names, facts = write_graph(checkpoint, directory, options, progress)
        else:
            names, facts = compile_tensorrt(checkpoint, directory, options, compiler, scales, progress=progress)
        finish_engine(directory, names, checkpoint, options, inputs, tools, facts)
    return Path(out)


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
    from gatework.export.engine_writer import finish_engine, write_portable

    with place as directory:
        names, facts, shared = write_portable(
            checkpoint,
            directory,
            options.max_seq,
            dtype=dtype,
            all_logits=all_logits,
            in_place=out is None,
            link=link,
            progress=progress,
        )
        if out is not None:
            kind = {"target": "onnx", "precision": _PRECISIONS[dtype]}
            finish_engine(directory, names, checkpoint, options, inputs, tools, facts, shared=shared, **kind)
        if shared is not None and report is not None:
            report(shared)
        if golden is not None:
            write_golden(checkpoint, golden, options.max_seq, all_logits=all_logits)
    return checkpoint.path if out is None else Path(out)


def _open(source: str | os.PathLike[str], drop_tokens: bool) -> tuple[Checkpoint, Tokenizer | None]:
    """A checkpoint and its tokenizer, both checked before any work is done with them."""
    checkpoint = Checkpoint.open(source, drop_tokens=drop_tokens)
    tokenizer = open_tokenizer(checkpoint.path)
    checkpoint.check_small()
    return checkpoint, tokenizer
