"""Engines for the target cuda, without a GPU: the numbers of their graphs on ONNX Runtime's CPU kernels, as far as there are
such, and the graphs' types and operators.

float32 and float16 graphs run as they are. ONNX Runtime has no CPU kernels for bfloat16, so int8 and int4 graphs, which keep
everything else in it, are lowered by the same passes from a float32 trace; graphs of bfloat16 are checked for their types.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from gatework import LLM, GateworkError, SamplingParams
from gatework.export import lower
from gatework.export.build import build_engine
from gatework.export.lower.graph import Builder
from gatework.export.lower.moe import choose_experts
from gatework.export.reference import Reference
from gatework.export.targets import TARGETS
from gatework.plugins.moe import reference
from gatework.plugins.moe.spec import MoEAttributes
from gatework.runtime.backends.ort import OrtBackend
from gatework.runtime.engine import Engine
from tests.checkpoints import DENSE_FIRST, make_checkpoint, reference_model
from tests.test_quantized_parity import round_weights

GROUPS = TARGETS["cuda"].groups
# Shares of the largest logit. fp32: the order of sums differs, as in tests/test_parity.py. int4: nothing else either. fp16: a
# rounding of 5e-4 after every operator of two layers. int8: ONNX Runtime's CPU experts round activations to 8 bits whatever
# is asked for. Both at the median, since where two experts are nearly tied the other one may be chosen.
RELATIVE = {"fp32": 1e-5, "int4": 1e-4, "fp16": 5e-3, "int8": 0.04}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fp32", "mixtral", {}),
    ("fp32", "mixtral", {"num_experts": 5, "top_k": 3, "head_dim": 24, "vocab_size": 131}),
    ("fp32", "dbrx", {}),
    ("fp32", "mistral", {}),
    ("fp16", "mixtral", {}),
    ("fp16", "dbrx", {"head_dim": 24}),
    ("fp16", "mistral", {}),
    ("fp16", "phi", {}),
    ("fp16", "qwen2_moe", DENSE_FIRST),
    ("int8", "mixtral", {}),
    ("int4", "phi", {}),
    ("int4", "mixtral", {}),
    ("int4", "mixtral", {"num_experts": 5, "top_k": 3, "intermediate_size": 50}),
    ("int4", "dbrx", {}),
]


def on_cpu(path: Path) -> OrtBackend:
    """The engine's graph on CPU kernels, which take what the graph asks of CUDA's."""
    engine = Engine.open(path)
    return OrtBackend(replace(engine, manifest=engine.manifest | {"target": "cpu", "precision": "fp32"}), max_batch=2)


def logits_of(backend: OrtBackend, tokens: list[int]) -> np.ndarray:
    """After prefill in two chunks, and after each token decoded then; the other slot decodes the same in the same steps."""
    got = [backend.prefill(0, tokens[:4], 0).copy(), backend.prefill(0, tokens[4:10], 4).copy()]
    backend.prefill(1, tokens[:10], 0)
    for at in range(10, len(tokens)):
        rows = backend.decode([tokens[at]] * 2, [at] * 2)
        assert np.abs(rows[0] - rows[1]).max() <= 1e-2 * np.abs(rows).max()
        got.append(rows[0].copy())
    return np.stack(got)


@pytest.mark.parametrize(("precision", "model", "sizes"), CASES)
@torch.inference_mode()
def test_graph_equals_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, model: str, sizes: dict[str, Any]
) -> None:
    path = make_checkpoint(tmp_path, model, **sizes)
    if precision in GROUPS:
        monkeypatch.setitem(lower.CUDA_DTYPES, precision, "float32")  # type: ignore[arg-type]
    engine = build_engine(path, tmp_path / "engine", target="cuda", precision=precision, max_seq=32)
    tokens = np.random.default_rng(0).integers(0, 128, 20).tolist()
    got = logits_of(on_cpu(engine), tokens)
    if precision in GROUPS:
        reference = Reference.load(path, 32)
        round_weights(reference.decoder, int(precision[3:]), GROUPS[precision], torch.float32)
        every = reference.logits(tokens)
    else:
        every = reference_model(path)(torch.tensor([tokens])).logits[0].numpy()
    want = every[[3, *range(9, 20)]]
    errors = np.abs(got - want).max(1) / np.abs(want).max()
    error = errors.max() if precision in ("fp32", "int4") else np.median(errors)
    assert error <= RELATIVE[precision], f"max |d| / max |logit| by position: {errors}"


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_are_chosen_before_logits_are_rounded(renormalize: bool) -> None:
    """Where float16 makes pairs of equals, too; scores over the chosen and the share give the definition's weights."""
    T, E = 40, 8
    rng, attributes = np.random.default_rng(0), MoEAttributes(top_k=3, renormalize=renormalize)
    logits = rng.normal(0, 4, (T, E)).astype(np.float32)
    logits[:, E // 2 :] = logits[:, : E // 2] * np.float32(1 + 2**-13)
    graph = ir.Graph([ir.val("logits", ir.DataType.FLOAT, (T, E))], [], nodes=[], opset_imports={"": 24})
    end = ir.node("Identity", [graph.inputs[0]])
    graph.append(end)
    found = [
        value
        for value in choose_experts(Builder(graph, end), graph.inputs[0], attributes, ir.DataType.FLOAT16)
        if value
    ]
    for i, value in enumerate(found):
        value.name, value.type = f"out{i}", ir.TensorType(ir.DataType.FLOAT16)
    graph.outputs.extend(found)
    graph.remove(end)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    narrow, *share = ort.InferenceSession(model).run(None, {"logits": logits})
    ids, weights = reference.route(logits, attributes)
    np.testing.assert_array_equal(np.sort(np.argsort(-narrow, axis=1)[:, :3]), np.sort(ids))
    got = np.take_along_axis(reference.softmax(narrow), ids, axis=1) * (share[0].astype(np.float32) if share else 1)
    np.testing.assert_allclose(got, weights, rtol=8 * 2**-11, atol=1e-6)


def test_an_eight_layer_mixtral_gives_the_cpu_engines_tokens(tmp_path: Path) -> None:
    """The public API on the float32 graph; rows that end at different steps move from slot to slot."""
    path = make_checkpoint(tmp_path, "mixtral", num_layers=8, max_position_embeddings=96)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, length).tolist() for length in (3, 17, 40, 1, 9)]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (48, 5, 30, 48, 12)]
    got = {}
    for target in ("cpu", "cuda"):
        engine = build_engine(path, tmp_path / target, target=target, precision="fp32", max_batch=3, prefill_chunk=16)
        manifest = json.loads((engine / "manifest.json").read_text())
        (engine / "manifest.json").write_text(json.dumps(manifest | {"target": "cpu"}))
        got[target] = [completion.token_ids for completion in LLM(engine).generate(prompts, params)]
    assert got["cuda"] == got["cpu"]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("model", ["mixtral", "dbrx", "mistral", "phi"])
def test_bfloat16_graphs_are_well_typed(tmp_path: Path, model: str, precision: str) -> None:
    """ONNX Runtime infers types and shapes of a whole graph before it looks for kernels, which it has none of on CPUs."""
    path = make_checkpoint(tmp_path, model)
    engine = build_engine(path, tmp_path / "engine", target="cuda", precision=precision, max_seq=32)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED : Could not find an implementation for"):
        ort.InferenceSession(engine / "model.onnx", providers=["CPUExecutionProvider"])
    graph = onnx.load(engine / "model.onnx", load_external_data=False).graph
    ops = Counter(node.op_type for node in graph.node)
    assert ops["GroupQueryAttention"] == 2
    assert ops["MoE" if precision == "bf16" else "QMoE"] == (2 if model in ("mixtral", "dbrx") else 0)
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types["past.0.k"] == types["present.1.v"] == onnx.TensorProto.BFLOAT16
    assert types["logits"] == onnx.TensorProto.FLOAT


def test_a_wrongly_typed_graph_is_noticed(tmp_path: Path) -> None:
    """The check above can fail: scales of another type than the activations."""
    path = make_checkpoint(tmp_path, "mixtral")
    engine = build_engine(path, tmp_path / "engine", target="cuda", precision="int4", max_seq=32)
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "layers.1.moe.w_in.scales")
    scale.data_type = onnx.TensorProto.FLOAT16
    onnx.save(model, engine / "model.onnx")
    with pytest.raises(Exception, match=r"Type Error: Type parameter .* bound to different types"):
        ort.InferenceSession(engine / "model.onnx", providers=["CPUExecutionProvider"])


def test_alibi_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mpt")
    with pytest.raises(GateworkError, match=r"no kernel for ALiBi; fix: use --target cpu"):
        build_engine(path, tmp_path / "engine", target="cuda", precision="bf16", max_seq=32)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_sinks_are_refused(tmp_path: Path, precision: str) -> None:
    path = make_checkpoint(tmp_path, "gpt-oss")
    with pytest.raises(GateworkError, match=r"sinks have not been tried on this target; fix: use --target cpu"):
        build_engine(path, tmp_path / "engine", target="cuda", precision=precision, max_seq=32)
    assert not (tmp_path / "engine").exists()


def nodes_of(path: Path, tmp_path: Path, precision: str) -> list[onnx.NodeProto]:
    engine = build_engine(path, tmp_path / precision, target="cuda", precision=precision, max_seq=32)
    return list(onnx.load(engine / "model.onnx", load_external_data=False).graph.node)


def test_only_what_cuda_kernels_know(tmp_path: Path) -> None:
    """CUDA has no bfloat16 Clip and no float32 GroupQueryAttention; older versions know fewer inputs and attributes."""
    path = make_checkpoint(tmp_path, "dbrx")
    for node in nodes_of(path, tmp_path, "int8"):
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert "accuracy_level" not in attributes
        if node.op_type == "GroupQueryAttention":
            assert len(node.input) == 9  # the last is sin_cache
        if node.op_type == "QMoE":
            assert attributes["block_size"] == 64
            assert attributes["weights_prepacked"] == 0
    assert "GroupQueryAttention" not in {node.op_type for node in nodes_of(path, tmp_path, "fp32")}
    nodes = nodes_of(path, tmp_path, "bf16")
    makers = {name: node for node in nodes for name in node.output}
    clips = [node for node in nodes if node.op_type == "Clip"]
    assert len(clips) == 2
    for clip in clips:
        cast = makers[clip.input[0]]
        assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)


def test_experts_of_quantised_kernels_come_in_multiples_of_64(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral", intermediate_size=50)
    engine = build_engine(path, tmp_path / "engine", target="cuda", precision="int8", max_seq=32)
    tensors = Engine.open(engine).manifest["tensors"]
    assert tensors["layers.0.moe.w_in.codes"]["shape"] == [8, 2 * 64, 64]
    assert tensors["layers.0.moe.w_out.codes"]["shape"] == [8, 64, 64]
    assert tensors["layers.0.moe.w_out.scales"] == {"dtype": "bfloat16", "shape": [8, 64, 1]}


def test_dense_experts_of_odd_width_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral", intermediate_size=50)
    for precision, multiple in (("fp32", 4), ("bf16", 8)):
        with pytest.raises(
            GateworkError, match=f"do not fit .*; got hidden size 64, width 50; expected .* {multiple};"
        ):
            build_engine(path, tmp_path / "engine", target="cuda", precision=precision)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, r"got cuda fp8; expected .*cuda: fp32\|bf16\|fp16\|int8\|int4"),
        ({"precision": "int8", "group_size": 256}, "--group-size cannot be used; got 256; expected 32, 64 or 128"),
        ({"precision": "bf16", "group_size": 64}, "bf16 on cuda has no groups of weights"),
        ({"precision": "bf16", "plan_only": True}, "--plan-only is for TensorRT's targets; got --target cuda"),
        (
            {"precision": "int8"},
            "experts cannot be quantised for this target; got hidden size 96; expected a multiple of 64",
        ),
    ],
)
def test_refused_builds(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = make_checkpoint(tmp_path, "mixtral", hidden_size=96, head_dim=16)
    with pytest.raises(GateworkError, match=message):
        build_engine(path, tmp_path / "engine", target="cuda", **settings)
    assert not (tmp_path / "engine").exists()
