"""Sizes from a config alone against what the builder writes, and against published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gatework.export.build import build_engine, export_onnx
from gatework.export.checkpoint import Checkpoint, read_config
from gatework.export.config import ModelConfig, MoEConfig
from gatework.export.sizes import devices_needed, gpu_weight_bytes, kv_bytes, weight_bytes
from tests.checkpoints import EXPERTS_LAST, make_checkpoint
from tests.switch import make_switch

MIXTRAL = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
MIXTRAL |= {"norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}

CASES: list[tuple[str, str, dict[str, Any], int | None]] = [
    ("mixtral", "fp32", {}, None),
    ("mixtral", "int8", {"intermediate_size": 50, "hidden_size": 48}, None),  # padded experts, groups of 16
    ("mixtral", "int4", {"num_experts": 5, "top_k": 3, "vocab_size": 131}, 64),
    ("dbrx", "int4", {}, None),
    ("phi", "int8", {}, None),
    ("mpt", "int4", {}, None),
    ("qwen2_moe", "int8", {}, None),
    ("qwen3_moe", "int4", EXPERTS_LAST, None),
    ("gpt-oss", "int8", {"intermediate_size": 50}, None),
    ("gpt-oss", "fp32", {}, None),
    ("llama1", "int8", {}, None),  # width 172: padded blocks
    ("llama2", "int4", {"tie_embeddings": True}, None),
    ("llama2", "int8", {"hidden_size": 40, "head_dim": 10}, 16),  # no group fits the embedding: float32
    ("llama2", "fp32", {"tie_embeddings": True}, None),
]


@pytest.mark.parametrize(("model", "precision", "sizes", "group"), CASES)
def test_engines_have_the_size_foretold(
    tmp_path: Path, model: str, precision: Any, sizes: dict[str, Any], group: int | None
) -> None:
    path = make_checkpoint(tmp_path, model, **{"num_layers": 1} | sizes)
    engine = build_engine(path, tmp_path / "engine", precision=precision, group_size=group)
    manifest, config = json.loads((engine / "manifest.json").read_text()), Checkpoint.open(path).config
    assert weight_bytes(config, precision, group) == manifest["weight_bytes"]["total"]
    value = {"float32": 4, "float16": 2}[manifest["cache_dtype"]]
    assert kv_bytes(config, precision, 100) == 100 * config.kv_bytes_per_token(value)


@pytest.mark.parametrize("model", ["switch", "qwen2_moe", "gpt-oss"])
def test_routers_stay_in_float32(tmp_path: Path, model: str) -> None:
    """With their biases, and those of shared experts, beside bfloat16."""
    path = make_switch(tmp_path) if model == "switch" else make_checkpoint(tmp_path, model)
    engine = export_onnx(path, tmp_path / "engine", dtype="bfloat16")
    built = json.loads((engine / "manifest.json").read_text())["weight_bytes"]["total"]
    config = Checkpoint.open(path).config
    assert weight_bytes(config, "bf16") == sum(gpu_weight_bytes(config, "bf16", 0)) == built


def test_mixtral_8x7b(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(MIXTRAL))
    config = read_config(tmp_path / "params.json")
    assert weight_bytes(config, "fp32") == 4 * 46_702_792_704
    assert weight_bytes(config, "bf16") == 2 * 46_702_792_704 + 2 * 32 * 8 * 4096  # routers
    fine = 32 * 4096 * (4096 + 1024 + 1024 + 4096) + 2 * 32000 * 4096  # attention, embedding and head have 8 bits
    expected = (46_702_792_704 - fine) * (0.5 + 2 / 32) + fine * (1 + 2 / 128)
    assert weight_bytes(config, "int4", 32) == pytest.approx(expected, rel=1e-3)
    assert weight_bytes(config, "int8", 128) == pytest.approx(46_702_792_704 * (1 + 2 / 128), rel=1e-3)
    fp8 = weight_bytes(config, "fp8")
    assert fp8 is not None
    # scales; attention, embedding and head of 16 bits
    assert 46_702_792_704 + fine < fp8 < (46_702_792_704 + fine) * 1.004
    assert kv_bytes(config, "bf16", 32_768) == 2 * 32 * 8 * 128 * 2 * 32_768


def test_what_cannot_be_built_has_no_size(tmp_path: Path) -> None:
    config = Checkpoint.open(make_checkpoint(tmp_path, "mixtral", hidden_size=40, head_dim=10)).config
    assert weight_bytes(config, "int8") is None
    assert weight_bytes(config, "fp32") is not None


def test_devices_needed() -> None:
    """Whole layers go to a device, embedding and head included: DBRX in bfloat16 takes two of 141 GB, which hold 263 GB."""
    sizes = {"vocab_size": 100_352, "hidden_size": 6144, "intermediate_size": 10_752, "num_layers": 40, "head_dim": 128}
    sizes |= {"num_heads": 48, "num_kv_heads": 8, "max_position_embeddings": 32_768}
    routers = 2 * 40 * 16 * 6144  # are in float32
    dbrx = ModelConfig(family="dbrx", norm="layer", moe=MoEConfig(num_experts=16, top_k=4), **sizes)  # type: ignore[arg-type]
    assert weight_bytes(dbrx, "bf16") == 263_193_047_040 + routers
    assert devices_needed(dbrx, "bf16", 32_768, 141 * 10**9) == 2
    assert devices_needed(dbrx, "bf16", 32_768, 80 * 10**9) == 4
    assert devices_needed(dbrx, "bf16", 32_768, 300 * 10**9) == 1
    layer = (263_193_047_040 + routers - 2 * 2 * 100_352 * 6144) // 40
    first = layer + 2 * 100_352 * 6144  # with the embedding
    assert devices_needed(dbrx, "bf16", 0, first + 10**6) == 40
    assert devices_needed(dbrx, "bf16", 0, first - 10**6) is None
