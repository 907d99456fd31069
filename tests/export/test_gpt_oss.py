"""gpt-oss: both layouts, what its config says, MXFP4 and YaRN against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gatework.export.build import build_engine
from gatework.export.checkpoint import Checkpoint
from gatework.export.config import MoEConfig
from gatework.export.families import gpt_oss
from gatework.export.mxfp4 import codes_of, products, scales_of
from gatework.export.positions import rope_tables
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import cpu_ops
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine
from gatework.runtime.verify import verify
from tests.export.test_coded import unpacked
from tests.export.test_families import GPT_OSS_20B, read
from tests.mxfp4_format import EXPERTS, WEIGHTS, write_release

GATE_UP = EXPERTS.format(0, "gate_up_proj")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As released, and in floats."""
    return write_release(tmp_path_factory.mktemp("gpt-oss"))


def test_both_layouts_give_the_same_bits(layouts: tuple[Path, Path]) -> None:
    released, floats = map(Checkpoint.open, layouts)
    assert released.stored_as == "MXFP4 experts"
    assert released.stored_bytes < floats.stored_bytes
    assert released.config == floats.config
    for name in floats.weights:
        assert torch.equal(released.read(name), floats.read(name)), name
        parts = zip(released.parts(name), floats.parts(name), strict=True)
        assert all(torch.equal(a, b) for a, b in parts), name
        middle = slice(1, floats.weights[name].shape[0])  # rows from the middle of an expert, or of a matrix
        assert torch.equal(released.rows(name, middle.start, middle.stop), floats.rows(name, middle.start, middle.stop))


def test_every_code_and_scale_is_what_transformers_makes_of_it() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, -1, -1).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, -1, 16).contiguous()
    want = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    scales = scales_of(scales).to(torch.bfloat16)
    assert torch.equal(products(codes_of(blocks), scales).to(torch.bfloat16), want)


@pytest.mark.parametrize(("group_size", "kept"), [(None, 32), (16, 16), (64, None)])
def test_int8_engines_hold_the_released_numbers(
    layouts: tuple[Path, Path], tmp_path: Path, group_size: int | None, kept: int | None
) -> None:
    """Twice the 4-bit floats, and half their scales; in groups that are wider they are rounded, as those of floats are."""
    engines = [build_engine(path, tmp_path / path.name, precision="int8", group_size=group_size) for path in layouts]
    released = Engine.open(engines[0])
    names = [f"layers.{i}.moe.{name}" for i in range(2) for name in ("w_in", "w_out")]
    assert released.manifest["kept"] == ({} if kept is None else dict.fromkeys(names, kept))
    for name in names:
        (codes, scales), others = (unpacked(engine, name) for engine in engines)
        if kept is None:
            assert all(np.array_equal(a, b) for a, b in zip((codes, scales), others, strict=True)), name
            continue
        assert np.abs(codes).max() == 12
        assert codes.shape[-1] // scales.shape[-1] == kept
        weights = codes * scales.astype(np.float32).repeat(kept, -1)
        assert np.array_equal(weights, Checkpoint.open(layouts[1]).read(name).float().numpy()), name


def test_verification_expects_no_error_of_released_experts(
    layouts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our kernels it passes, and ONNX Runtime's give the same logits, but for what they round of activations."""
    engine = Engine.open(build_engine(layouts[0], tmp_path / "engine", precision="int8", max_seq=40, prefill_chunk=16))
    report = verify(engine.path, layouts[0], tokens=4, threads=1)
    assert report.passed, str(report)
    tokens = list(range(1, 17))
    native = OrtBackend(engine, max_batch=1, threads=1).prefill(0, tokens, 0).copy()
    monkeypatch.setattr(cpu_ops, "find_library", lambda: None)
    with pytest.warns(UserWarning, match="ONNX Runtime's are used, which are slower"):
        fallback = OrtBackend(engine, max_batch=1, threads=1).prefill(0, tokens, 0)
    assert np.abs(native - fallback).max() <= 0.04 * np.abs(native).max()


def spoilt(layouts: tuple[Path, Path], folder: Path, **tensors: Any) -> Path:
    """A copy of the release with other tensors, or without those that are None."""
    path = Path(shutil.copytree(layouts[0], folder / "spoilt"))
    kept: dict[str, Tensor] = load_file(path / WEIGHTS)
    for end, value in tensors.items():
        kept.pop(f"{GATE_UP}{end}", None)
        if value is not None:
            kept[f"{GATE_UP}{end}"] = value
    save_file(kept, path / WEIGHTS)
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"_scales": None}, "gate_up_proj_scales is missing, which belongs to"),
        ({"_blocks": None}, "gate_up_proj is missing"),
        ({"_scales": torch.zeros(8, 192, 3, dtype=torch.uint8)}, "do not fit together; got U8"),
        ({"_scales": torch.zeros(8, 192, 2)}, "do not fit together; got U8"),
        ({"_blocks": torch.zeros(8, 192, 2, 15, dtype=torch.uint8)}, "do not fit together; got U8"),
        ({"_blocks": torch.zeros(8, 192, 32, dtype=torch.uint8)}, "do not fit together; got U8"),
        ({"": torch.zeros(8, 64, 192)}, "is there in MXFP4 and in floats"),
        (
            {
                "_blocks": torch.zeros(8, 192, 1, 16, dtype=torch.uint8),
                "_scales": torch.zeros(8, 192, 1, dtype=torch.uint8),
            },
            "gate_up_proj .* has the wrong shape",
        ),
    ],
)
def test_misfits_are_refused(layouts: tuple[Path, Path], tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(GateworkError, match=message):
        Checkpoint.open(spoilt(layouts, tmp_path, **tensors))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("scale", "message"), [(255, "a scale in MXFP4 is no number"), (254, "are not finite")])
def test_scales_that_no_weight_has(
    layouts: tuple[Path, Path], tmp_path: Path, scale: int, message: str, precision: str
) -> None:
    """6 * 2^127 is beyond bfloat16."""
    blocks = torch.full((8, 192, 2, 16), 0x77, dtype=torch.uint8)
    path = spoilt(layouts, tmp_path, _blocks=blocks, _scales=torch.full((8, 192, 2), scale, dtype=torch.uint8))
    with pytest.raises(GateworkError, match=message):
        build_engine(path, tmp_path / "engine", precision=precision)
    assert not (tmp_path / "engine").exists()


def test_mxfp4_is_of_gpt_oss_alone() -> None:
    config = read({"model_type": "mixtral"} | {k: v for k, v in GPT_OSS_20B.items() if k in _SHARED})
    with pytest.raises(GateworkError, match="MXFP4 is read of gpt-oss alone; got mixtral"):
        gpt_oss.mxfp4_weight_map(config)


_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_SHARED += ("num_local_experts", "num_experts_per_tok", "num_key_value_heads")


def test_config() -> None:
    config = read(GPT_OSS_20B)
    assert (config.head_dim, config.bias, config.attn_sinks, config.sliding_window) == (64, "attn", True, 128)
    assert [config.window(i) for i in range(4)] == [128, None, 128, None]
    assert config.moe == MoEConfig(num_experts=32, top_k=4, bias=True, alpha=1.702, beta=1.0, limit=7.0)
    assert config.yarn is not None
    assert (config.yarn.factor, config.yarn.original_length, config.yarn.truncate) == (32.0, 4096, False)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    silent = {k: v for k, v in GPT_OSS_20B.items() if k not in ("layer_types", "rope_scaling", "sliding_window")}
    assert read(silent) == config
    assert read(GPT_OSS_20B | {"layer_types": ["full_attention"] * 24}).sliding_window is None
    turned = read(GPT_OSS_20B | {"layer_types": ["full_attention", *["sliding_attention"] * 23]})
    assert turned.full_attention == (0,)


def test_published_totals() -> None:
    """20.9 and 116.8 billion, of which 3.6 and 5.1 are active where the embedding table does not count."""
    for layers, experts, total, active in ((24, 32, 20.91e9, 3.61e9), (36, 128, 116.83e9, 5.13e9)):
        config = read(GPT_OSS_20B | {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": None})
        assert config.num_parameters() == pytest.approx(total, rel=2.5e-4)
        embedding = config.vocab_size * config.hidden_size
        assert config.num_active_parameters() - embedding == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_angles_are_those_of_transformers(truncate: bool, factor: float) -> None:
    scaling = {"rope_type": "yarn", "factor": factor, "truncate": truncate, "original_max_position_embeddings": 4096}
    for extra in ({}, {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5}):
        rope = scaling | extra | {"rope_theta": 150000.0}
        theirs = transformers.GptOssConfig(rope_parameters=rope, head_dim=64, num_hidden_layers=2)
        tables = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(theirs)
        positions = torch.arange(0, 131_072, 997)
        want = tables(torch.zeros(1), positions[None])
        raw = {k: v for k, v in GPT_OSS_20B.items() if not k.startswith("rope")} | {"rope_parameters": rope}
        for ours, table in zip(rope_tables(read(raw), 131_072), want, strict=True):
            assert (ours[positions] - table[0]).abs().max() < 2e-2  # angles of 10^5 radians
            assert (ours[positions[:3]] - table[0, :3]).abs().max() < 1e-4
