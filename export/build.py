"""Building: a checkpoint becomes an engine directory, or a portable ONNX model, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir

from gatework.export.checkpoint import Checkpoint
from gatework.export.config import Dtype, ModelConfig
from gatework.export.groups import DEFAULT_GROUPS, GROUP_SIZES
from gatework.export.lower import CpuPrecision, lower_to_cpu
from gatework.export.materialize import write_model
from gatework.export.onnx_export import add_function_body, trace
from gatework.export.packing import TensorSpec, is_weight, pack_of
from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import VERSION as PLUGIN_VERSION

TARGETS: dict[str, tuple[str, ...]] = {"cpu": get_args(CpuPrecision)}
_TOOLS = ("gatework", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


def build_engine(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "cpu",
    precision: str = "int8",
    max_seq: int | None = None,
    max_batch: int = 8,
    prefill_chunk: int = 512,
    group_size: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Compile a checkpoint folder into an engine directory and return its path.

    Args:
        max_seq: cache positions per sequence, prompt and output together; default: the model's own context length.
        max_batch: sequences decoded at once.
        prefill_chunk: most prompt tokens in one step.
        group_size: weights that share a scale, at most, a power of two from 16 to 256; a matrix whose rows it does not divide
            takes the largest size that does. Default: 256 for int8, 32 for int4.
        force: replace an engine that stands at `out`.

    Raises:
        GateworkError: bad checkpoint, impossible target or precision, `out` in the way. Nothing is left behind.
    """
    _check_pair(target, precision)
    group = DEFAULT_GROUPS.get(precision, 0) if group_size is None else group_size
    if group_size is not None and group not in GROUP_SIZES:
        raise GateworkError("group size cannot be used", got=group_size, expected="16, 32, 64, 128 or 256")
    for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise GateworkError(f"{name} is not positive", got=value, expected="at least 1")
    checkpoint = Checkpoint.open(source)
    length = check_max_seq(checkpoint.config, max_seq)
    with _new_directory(Path(out), force) as directory:
        model = trace(checkpoint.config, length)
        model = lower_to_cpu(model, checkpoint.config, precision, group)  # type: ignore[arg-type]
        names = write_model(model, checkpoint, directory, progress=progress)
        names += _copy_tokenizer(checkpoint.path, directory)
        limits = {"max_batch": max_batch, "max_seq": length, "prefill_chunk": min(prefill_chunk, length)}
        manifest = {
            "format_version": engine_format.FORMAT_VERSION,
            "gatework_version": version("gatework"),
            "target": target,
            "precision": precision,
            "model": checkpoint.config.to_dict(),
            "limits": limits,
            "toolchain": _toolchain(),
            "plugin_version": PLUGIN_VERSION,
            "checkpoint": _checkpoint_facts(checkpoint),
            **_weight_facts(model, checkpoint.config),
            "files": engine_format.file_table(directory, names),
        }
        (directory / engine_format.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return Path(out)


def export_onnx(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Dtype = "float32",
    max_seq: int | None = None,
    all_logits: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write the canonical, portable ONNX model (model.onnx and safetensors beside it) into the folder `out`.

    It runs on any ONNX runtime of opset 24: gatework::MoE carries its definition in standard operators.
    """
    if dtype not in get_args(Dtype):
        raise GateworkError("unknown dtype", got=dtype, expected=" or ".join(get_args(Dtype)))
    checkpoint = Checkpoint.open(source)
    with _new_directory(Path(out), force) as directory:
        model = trace(checkpoint.config, check_max_seq(checkpoint.config, max_seq), dtype=dtype, all_logits=all_logits)
        add_function_body(model, checkpoint.config)
        write_model(model, checkpoint, directory, progress=progress)
    return Path(out)


def check_max_seq(config: ModelConfig, max_seq: int | None) -> int:
    """The cache length asked for, or the model's own."""
    if max_seq is None:
        return config.max_position_embeddings
    if not 1 <= max_seq <= config.max_position_embeddings:
        raise GateworkError(
            "max_seq is out of range",
            got=max_seq,
            expected=f"1 to {config.max_position_embeddings}, the model's context",
        )
    return max_seq


def _check_pair(target: str, precision: str) -> None:
    pairs = ", ".join(f"{name}: {'|'.join(precisions)}" for name, precisions in TARGETS.items())
    if precision not in TARGETS.get(target, ()):
        raise GateworkError("this target and precision cannot be built", got=f"{target} {precision}", expected=pairs)


@contextmanager
def _new_directory(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends well, and is removed when it does not."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise GateworkError(f"{out} is in the way", got="a file or link", expected="a folder to make")
    if out.exists() and any(out.iterdir()):
        ours = (out / engine_format.MANIFEST).is_file() or (out / "model.onnx").is_file()
        if not (force and ours):
            fix = "pass --force to replace it" if ours else "choose another --out"
            raise GateworkError(f"{out} exists and is not empty", fix=fix)
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise GateworkError(f"cannot write to {out.parent}", got=error.strerror, fix="choose another --out") from None
    try:
        staging.chmod(0o755)
        yield staging
        if out.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
            out.rename(retired / out.name)
            staging.rename(out)
            shutil.rmtree(retired)
        else:
            staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # somebody else may use them by now
            for folder in made:
                folder.rmdir()
        raise


def _copy_tokenizer(source: Path, directory: Path) -> list[str]:
    names = [name for name in engine_format.TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return names


def _toolchain() -> dict[str, str]:
    versions = {}
    for tool in _TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return versions


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "fingerprint": checkpoint.fingerprint(),
        "num_parameters": config.num_parameters(),
        "num_active_parameters": config.num_active_parameters(),
    }


def _weight_facts(model: ir.Model, config: ModelConfig) -> dict[str, Any]:
    """The tensor table, and weight bytes: in all, and read for one decoded token (chosen experts, one embedding row)."""
    tensors, total, per_token = {}, 0, 0.0
    for value in model.graph.initializers.values():
        if not is_weight(value):
            continue
        spec = next(spec for spec in pack_of(value).outputs if spec.name == value.name)
        nbytes = _nbytes(spec)
        tensors[spec.name] = {"dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
        total += nbytes
        share = 1.0
        if ".moe.w_" in spec.name and config.moe is not None:
            share = config.moe.top_k / config.moe.num_experts
        elif spec.name.startswith("embed.") and not _feeds_product(value):
            share = 1 / config.vocab_size
        per_token += nbytes * share
    return {"weight_bytes": {"total": total, "per_token": round(per_token)}, "tensors": tensors}


def _nbytes(spec: TensorSpec) -> int:
    size = spec.dtype.itemsize
    for dim in spec.shape:
        size *= dim
    return size


def _feeds_product(value: ir.Value) -> bool:
    """Whether an embedding table is the output head as well."""
    return any("MatMul" in user.op_type for user, _ in value.uses())
