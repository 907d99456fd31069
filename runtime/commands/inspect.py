"""gatework inspect: what a checkpoint, a config file or an engine holds, and what memory it takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatework.plugins import engine_format
from gatework.runtime.commands.common import Commands, add_command, memory_size, require_build_tools
from gatework.runtime.formatting import counted, numbers, size, table

if TYPE_CHECKING:
    from gatework.export.config import ModelConfig

_ABOUT = """
    Print architecture, parameters and memory of a checkpoint folder, of a config.json or params.json file alone, or of an
    engine. No weights are read.

    The memory table counts the weights and the KV cache of one sequence at full context, which has 16 bits but for fp32,
    and, on CPUs, for models with dynamic NTK, relative positions or heads of odd widths. int8 and int4 are as on CPUs.
    Activations come on top. Where one device is too small, "on 2" says how many of its size hold the model, whole layers
    each; "no": a layer is too large.
"""
_EXAMPLES = """
    gatework inspect examples/tiny-mixtral
    gatework inspect Mixtral-8x7B-v0.1/params.json --fits 24GiB,80GB
    gatework inspect engines/tiny --json
"""
_BIASES = {
    "qkv": "of q, k and v",
    "attn": "of attention's products",
    "all": "of every product and norm",
}
_GATES = {"none": "not gated", "two_way": "gated", "three_way": "gates twice as wide, one half times the other"}
_DEFAULT_SIZES = "16GiB,24GiB,32GiB,48GiB,80GiB,141GB"
_WEIGHT_FILES: tuple[str, ...] = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.index.json")
_WEIGHT_FILES += ("tensor00000_000", "ckpt-0/tensor00000_000", "target.*")  # Grok-1's and T5X's


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(commands, "inspect", "describe a checkpoint or an engine", _ABOUT, _EXAMPLES, run)
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="checkpoint folder, its config file, or engine directory"
    )
    parser.add_argument(
        "--fits",
        type=_memories,
        default=_DEFAULT_SIZES,
        metavar="SIZES",
        help=f"memory sizes, comma-separated (default: {_DEFAULT_SIZES})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Inspect, and print."""
    is_engine = (args.path / engine_format.MANIFEST).is_file()
    config, facts = _read_engine(args.path) if is_engine else _read_checkpoint(args.path)
    facts |= _sizes(config, facts.get("engine"), args.fits)
    print(json.dumps(facts) if args.json else _text(args.path, config, facts))
    return 0


def _memories(words: str) -> dict[str, int]:
    return {word.strip(): memory_size(word) for word in words.split(",")}


def _read_engine(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    from gatework.export.config import ModelConfig
    from gatework.runtime.engine import Engine

    engine = Engine.open(path, check="sizes")
    names = ("format_version", "gatework_version", "target", "precision", "limits", "weight_bytes", "toolchain")
    about = {name: engine.manifest[name] for name in (*names, engine_format.CACHE_DTYPE)}
    about["weight_only"] = engine.manifest["inputs"]["settings"].get("weight_only", False)
    about["kept"] = engine.manifest.get(engine_format.KEPT, {})
    about["stages"] = engine.manifest.get(engine_format.STAGES, [])
    about["files"] = {name: facts["size"] for name, facts in engine.manifest["files"].items()}
    return ModelConfig.from_dict(engine.model), {"kind": "engine", "engine": about}


def _read_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    require_build_tools("inspecting a checkpoint")
    from gatework.export.checkpoint import Checkpoint, read_config

    if path.is_dir() and any(True for pattern in _WEIGHT_FILES for _ in path.glob(pattern)):
        checkpoint = Checkpoint.open(path)
        stored = {"stored_as": checkpoint.stored_as, "stored_bytes": checkpoint.stored_bytes}
        return checkpoint.config, {"kind": "checkpoint", **stored}
    return read_config(path), {"kind": "config"}


def _sizes(config: ModelConfig, engine: dict[str, Any] | None, memories: dict[str, int]) -> dict[str, Any]:
    """Bytes in every precision at full context; of an engine's own, those that it has and is limited to."""
    from gatework.export.sizes import PRECISIONS, caches, devices_needed, kv_bytes, weight_bytes

    context = config.max_position_embeddings if engine is None else engine["limits"]["max_seq"]
    weights = {precision: weight_bytes(config, precision) for precision in PRECISIONS}
    if engine is not None and engine["precision"] in weights:
        weights[engine["precision"]] = engine["weight_bytes"]["total"]
    cache = {precision: kv_bytes(config, precision, context) for precision in PRECISIONS}
    if engine is not None and engine["precision"] in cache:
        cache[engine["precision"]] = caches(config) * context * config.kv_bytes_per_token(_value_bytes(engine))
    fits = {
        precision: {name: nbytes + cache[precision] <= limit for name, limit in memories.items()}
        for precision, nbytes in weights.items()
        if nbytes is not None
    }
    return {
        "model": config.to_dict(),
        "num_parameters": config.num_parameters(),
        "num_active_parameters": config.num_active_parameters(),
        "weight_bytes": weights,
        "kv_bytes_per_token": {"fp32": config.kv_bytes_per_token(4), "bf16": config.kv_bytes_per_token(2)},
        "context": context,
        "kv_bytes_at_context": cache,
        "fits": fits,
        "devices": {
            precision: {
                name: 1 if one else devices_needed(config, precision, context, memories[name])
                for name, one in fits[precision].items()
            }
            for precision in PRECISIONS
            if precision in fits
        },
    }


def _value_bytes(engine: dict[str, Any]) -> int:
    """Bytes of a cached key or value."""
    return 4 if engine[engine_format.CACHE_DTYPE] == "float32" else 2


def _text(path: Path, config: ModelConfig, facts: dict[str, Any]) -> str:
    sections = [f"{path}: {facts['kind']}\n" + table(_architecture(config), "<<")]
    if "engine" in facts:
        sections.append(table(_engine_rows(config, facts["engine"]), "<<"))
    if "stored_bytes" in facts:
        sections.append(f"stored as {facts['stored_as']}, {facts['stored_bytes']:,} bytes")
    sections.append(_kv_text(config, facts))
    sections.append(_memory_text(facts))
    return "\n\n".join(sections)


def _architecture(config: ModelConfig) -> list[tuple[str, str]]:
    kind = "dense" if config.moe is None else "mixture of experts"
    rows = [
        ("family", f"{config.family}, {kind}"),
        ("parameters", f"{config.num_parameters():,}"),
        ("active per token", f"{config.num_active_parameters():,}"),
        ("layers", f"{config.num_layers}{f', and {n} of an encoder' if (n := config.encoder_layers) else ''}"),
        ("hidden size", f"{config.hidden_size}"),
        ("attention heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, {config.head_dim} wide"),
        ("feed-forward width", f"{config.intermediate_size}"),
    ]
    if config.moe is not None:
        rule = "renormalised" if config.moe.renormalize else "not renormalised"
        rows.append(("experts", f"{config.moe.num_experts}, top {config.moe.top_k}, weights {rule}"))
        if config.moe.bias:
            rows.append(("router and experts", "with biases"))
        if (limit := config.moe.limit) > 0:
            rows.append(("experts' gates", f"up to {limit:g}, sigmoid of {config.moe.alpha:g} times"))
        if config.moe.shared_width is not None:
            rows.append(("shared expert", f"{config.moe.shared_width} wide, weighed by a sigmoid"))
    rows += [
        ("vocabulary", f"{config.vocab_size:,}{', tied embeddings' if config.tie_embeddings else ''}"),
        ("context", counted(config.max_position_embeddings, "token")),
        ("sliding window", _window(config)),
        ("rotary base", f"{config.rope_theta:,.10g}" if config.rotary_dim else f"none, {_bias(config)}"),
        ("norm", f"{'RMSNorm' if config.norm == 'rms' else 'LayerNorm'}, epsilon {config.norm_eps:g}"),
    ]
    return rows + _features(config)


def _features(config: ModelConfig) -> list[tuple[str, str]]:
    """What few models have."""
    rows: list[tuple[str, str]] = []
    if config.qk_norm is not None:
        rows.append(("q, k normalised", "each head by itself" if config.qk_norm == "head" else "all heads as one"))
    if config.rope_dim is not None:
        rows.append(("rotates", f"the first {config.rope_dim} of a head's {config.head_dim} values"))
    if config.yarn is not None:
        yarn = config.yarn
        rows.append(("YaRN", f"{yarn.factor:g} times the {yarn.original_length:,} tokens trained on"))
    if config.bias is not None:
        rows.append(("biases", _BIASES[config.bias]))
    if config.attn_sinks:
        rows.append(("attention sinks", "one to a head"))
    if config.parallel:
        rows.append(("layers", "attention and feed-forward side by side"))
    if config.moe is not None and config.moe_layers < config.num_layers:
        rows.append(("layers with experts", f"{_moe_layers(config)}; the others are {config.mlp_width} wide"))
    if config.sequence_capacity:
        served = counted(config.sequence_capacity, "token")
        rows.append(("an expert serves", f"{served} of a prompt; the others pass by"))
    if config.expert_capacity:
        rows += _capacity(config)
    if config.extra_mlp:
        rows.append(("after the experts", "a dense MLP"))
    if (config.activation, config.glu) != ("silu", "two_way"):
        rows.append(("activation", f"{config.activation}, {_GATES[config.glu]}"))
    if config.attn_scale is not None:
        rows.append(("attention scale", f"{config.attn_scale:g}"))
    if config.attn_softcap is not None:
        rows.append(("attention logits", f"capped to ±{config.attn_softcap:g}"))
    if config.post_norms:
        rows.append(("added to the stream", "normalised"))
    if config.embed_multiplier != 1 or config.logit_multiplier != 1:
        rows.append(("multipliers", f"embedding {config.embed_multiplier:g}, logits {config.logit_multiplier:g}"))
    if config.ntk_length is not None:
        rows.append(("dynamic NTK", f"prompts longer than {config.ntk_length:,} tokens"))
    if config.logn_length is not None:
        rows.append(("queries scaled", f"beyond {config.logn_length:,} tokens"))
    if config.qkv_clip is not None:
        rows.append(("q, k, v clipped to", f"±{config.qkv_clip:g}"))
    return rows


def _moe_layers(config: ModelConfig) -> str:
    """Which of them: "6 of 24: 3, 7, … 23"."""
    layers = numbers(filter(config.has_experts, range(config.num_layers)), config.moe_interval)
    found = f"{config.moe_layers} of {config.num_layers}: {layers}"
    if config.encoder is None:
        return found
    encoder = _moe_layers(config.encoder)
    return f"{found}, as in the encoder" if encoder == found else f"{found}, and in the encoder {encoder}"


def _capacity(config: ModelConfig) -> list[tuple[str, str]]:
    """Of experts that have one."""
    rule = (
        f"up to {config.expert_capacity:g} times its share of a step's choices, at least {config.min_expert_capacity}"
    )
    if not config.drop_tokens:
        return [("an expert serves", f"all tokens that choose it; with --drop-tokens {rule}")]
    return [
        ("an expert serves", rule),
        ("dropped", "choices beyond that: a token's result depends on the others of its step"),
    ]


def _window(config: ModelConfig) -> str:
    if config.sliding_window is None:
        return "none"
    layers = config.num_layers - len(config.full_attention)
    where = f", in {layers} of {config.num_layers} layers" if config.full_attention else ""
    return f"{counted(config.sliding_window, 'token')}{where}"


def _bias(config: ModelConfig) -> str:
    if config.relative_buckets is None:
        return "ALiBi"
    return f"{config.relative_buckets} buckets of distances up to {config.relative_distance}"


def _engine_rows(config: ModelConfig, engine: dict[str, Any]) -> list[tuple[str, str]]:
    from gatework.export.sizes import caches

    limits, weights = engine["limits"], engine["weight_bytes"]
    note = ", half of it cross-attention's" if config.encoder_layers else ""
    positions = caches(config) * limits["max_batch"] * limits["max_seq"]
    sequences = f"{counted(limits['max_batch'], 'sequence')} of {counted(limits['max_seq'], 'token')}"
    stages = [_stage_row(config, number, stage) for number, stage in enumerate(engine["stages"])]
    return [
        ("built for", f"{engine['target']}, {engine['precision']}{', weight-only' if engine['weight_only'] else ''}"),
        ("limits", f"{sequences}, prefill by {limits['prefill_chunk']}"),
        ("weights", f"{size(weights['total'])}, of which a decoded token reads {size(weights['per_token'])}"),
        ("KV cache when full", size(positions * config.kv_bytes_per_token(_value_bytes(engine))) + note),
        *([("as stored", _kept(engine["kept"]))] if engine["kept"] else []),
        *stages,
        ("files", ", ".join(f"{name} {size(nbytes)}" for name, nbytes in _listed(engine["files"]).items())),
        ("built with", ", ".join(f"{tool} {version}" for tool, version in engine["toolchain"].items())),
    ]


def _kept(names: dict[str, int]) -> str:
    """Weights with the checkpoint's own codes."""
    experts = sum(".moe." in name for name in names)
    kinds = ((experts, "stack of experts", "stacks of experts"), (len(names) - experts, "matrix", "matrices"))
    return f"codes and scales of {' and '.join(counted(*kind) for kind in kinds if kind[0])}"


def _stage_row(config: ModelConfig, number: int, stage: dict[str, Any]) -> tuple[str, str]:
    first, end = stage["layers"]
    parts = ["embedding"] if first == 0 else []
    parts.append(f"layer {first}" if end - first == 1 else f"layers {first} to {end - 1}")
    parts += ["head"] if end == config.num_layers else []
    return f"stage {number}", f"{', '.join(parts)}: {size(stage['weight_bytes']['total'])}"


def _listed(files: dict[str, int]) -> dict[str, int]:
    """Sizes by name, with all kernels as one."""
    listed: dict[str, int] = {}
    for name, nbytes in files.items():
        folder, slash, _ = name.partition("/")
        listed[folder + slash] = listed.get(folder + slash, 0) + nbytes
    return listed


def _kv_text(config: ModelConfig, facts: dict[str, Any]) -> str:
    per_token, context = facts["kv_bytes_per_token"], facts["context"]
    rows = [("KV cache", "bytes per token", f"at {counted(context, 'token')}")]
    rows += [(name, f"{nbytes:,}", size(facts["kv_bytes_at_context"][name])) for name, nbytes in per_token.items()]
    note = (
        "\nhalf of the total is cross-attention's: keys and values of a prompt as long" if config.encoder_layers else ""
    )
    return table(rows, "<>>") + note


def _needed(devices: int | None) -> str:
    """A cell of the memory table."""
    if devices is None:
        return "no"
    return "fits" if devices == 1 else f"on {devices}"


def _memory_text(facts: dict[str, Any]) -> str:
    memories = list(next(iter(facts["fits"].values())))
    rows = [("precision", "bytes of weights", "weights", "weights + KV", *memories)]
    for precision, nbytes in facts["weight_bytes"].items():
        if nbytes is None:
            rows.append((precision, "cannot be built", "", "", *("" for _ in memories)))
            continue
        fits = (_needed(facts["devices"][precision][name]) for name in memories)
        total = nbytes + facts["kv_bytes_at_context"][precision]
        rows.append((precision, f"{nbytes:,}", size(nbytes), size(total), *fits))
    note = "bf16 and fp8 are for GPUs; int8 and int4 are as on CPUs"
    return table(rows, "<>>>" + ">" * len(memories)) + ("" if facts["kind"] == "engine" else f"\n{note}")
