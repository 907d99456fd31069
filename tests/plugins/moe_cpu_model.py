"""Graphs of one PackedMoE or PackedMatMul node, and a script that runs them and CachedAttention in a process of its own.

python moe_cpu_model.py LIBRARY OUT.npz      # GATEWORK_CPU_PATH chooses the kernels
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from gatework.export.quantize import dequantize_rows, in_blocks, quantize_rows
from gatework.plugins.moe.spec import MoEAttributes
from tests.plugins.attention_cpu_model import Settings, attention_feeds, attention_model

Array = np.ndarray
FLOAT, UINT8, BFLOAT16 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.BFLOAT16


def packed(rows: Array, bits: int, group: int) -> tuple[Array, Array, Array]:
    """Codes [blocks, steps, 16, 4], scales [blocks, groups, 16] as uint16, and the weights that they stand for, [N, K]."""
    codes, scales = quantize_rows(torch.from_numpy(rows), bits, group, torch.bfloat16)
    codes[::3, 0, :2] = 0  # -128, which rounding to 8 bits avoids and checkpoints may have
    exact = dequantize_rows(codes, scales.float(), bits, rows.shape[1])
    codes, scales = in_blocks(codes, scales, bits)
    return codes.numpy(), scales.view(torch.uint16).numpy(), exact.numpy()


def _constant(name: str, kind: int, array: Array) -> TensorProto:
    return helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)


ROUTED = (
    "x",
    "router_logits",
    "w_in",
    "w_in_scale",
    "w_out",
    "w_out_scale",
    "b_in",
    "b_out",
    "router",
    "gamma",
    "skip",
)
MULTIPLIED = ("x", "w", "w_scale", "gamma", "skip")  # inputs of the two operators


def model_of(
    op_type: str,
    inputs: dict[str, Array],
    attributes: dict[str, Any],
    width: int,
    outputs: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """A graph of the node; x, router_logits and skip are its inputs, all else is constant. outputs: more, and their widths."""
    kinds = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): UINT8, np.dtype(np.uint16): BFLOAT16}
    fed = [name for name in ("x", "router_logits", "skip") if name in inputs]
    rest = {name: array for name, array in inputs.items() if name not in fed}
    names = [name if name in inputs else "" for name in (ROUTED if op_type == "PackedMoE" else MULTIPLIED)]
    widths = {"y": width} | (outputs or {})
    node = helper.make_node(op_type, names, list(widths), domain="gatework", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, FLOAT, [None] * (inputs[name].ndim - 1) + [inputs[name].shape[-1]])
            for name in fed
        ],
        [
            helper.make_tensor_value_info(
                name, FLOAT, None if name == "logits" else [None] * (inputs["x"].ndim - 1) + [size]
            )
            for name, size in widths.items()
            if name
        ],
        [_constant(name, kinds[array.dtype], array) for name, array in rest.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("gatework", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def moe_model(
    attributes: MoEAttributes, bits: int, group: int, *, D: int, E: int, I: int, bias: bool = False, seed: int = 0
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A PackedMoE of random weights, and the weights in full: w_in, w_out and, with bias, b_in, b_out."""
    rng = np.random.default_rng(seed)
    G = attributes.matrices
    w_in = rng.standard_normal((E, G, I, D), np.float32) / np.float32(np.sqrt(D))
    w_out = rng.standard_normal((E, D, I), np.float32) / np.float32(np.sqrt(I))
    codes_in, scales_in, exact_in = zip(
        *[packed(w_in[e, m], bits, group) for e in range(E) for m in range(G)], strict=True
    )
    codes_out, scales_out, exact_out = zip(*[packed(w_out[e], bits, group) for e in range(E)], strict=True)
    exact = {"w_in": np.stack(exact_in).reshape(E, G * I, D), "w_out": np.stack(exact_out)}
    if bias:
        exact |= {"b_in": rng.standard_normal((E, G * I), np.float32), "b_out": rng.standard_normal((E, D), np.float32)}
    inputs = {
        "x": np.zeros((1, D), np.float32),
        "router_logits": np.zeros((1, E), np.float32),
        "w_in": np.stack(codes_in),
        "w_in_scale": np.stack(scales_in),
        "w_out": np.stack(codes_out),
        "w_out_scale": np.stack(scales_out),
        **{name: exact[name] for name in ("b_in", "b_out") if bias},
    }
    settings = {name: value for name, value in attributes.to_onnx().items() if name != "weight_format"}
    settings |= {"bits": bits, "group_size": group, "hidden_size": D, "expert_width": I, "num_experts": E}
    return model_of("PackedMoE", inputs, settings, D), exact


def matmul_model(
    N: int, K: int, bits: int, group: int, *, rank: int = 2, wide: int = 0
) -> tuple[onnx.ModelProto, Array]:
    """A PackedMatMul of random weights, and the weights [N, K] in full."""
    rows = np.random.default_rng([N, K]).standard_normal((N, K), np.float32)
    codes, scales, exact = packed(rows, bits, group)
    inputs = {"x": np.zeros((1,) * (rank - 1) + (K,), np.float32), "w": codes, "w_scale": scales}
    return model_of("PackedMatMul", inputs, {"N": N, "K": K, "bits": bits, "group_size": group, "wide": wide}, N), exact


def with_norm(
    model: onnx.ModelProto, x: Array, *, skip: bool = True, centred: bool = False, router: Array | None = None
) -> onnx.ModelProto:
    """The node of `matmul_model` or `moe_model` with a norm of its input x, and a router [E, D], before it; see `norm_of`."""
    (node,) = model.graph.node
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs: dict[str, Array] = {"x": x, "gamma": gamma_of(x.shape[-1])}
    outputs: dict[str, int] = {}
    if skip:
        inputs["skip"], outputs["sum"] = x, x.shape[-1]
    if router is not None:
        inputs["router"] = router
        outputs |= {"logits": len(router)} if skip else {"": 0, "logits": len(router)}
    kinds = {FLOAT: np.float32, UINT8: np.uint8, BFLOAT16: np.uint16}
    for name, tensor in constants.items():
        inputs[name] = np.frombuffer(tensor.raw_data, kinds[tensor.data_type]).reshape(tensor.dims)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes |= {"epsilon": EPSILON, "centred": float(centred)}
    width = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    return model_of(node.op_type, inputs, attributes, width, outputs)


EPSILON = 1e-3


def gamma_of(width: int) -> Array:
    """The weight of every norm here."""
    return np.linspace(0.5, 2, width, dtype=np.float32)


def norm_of(x: Array, centred: bool) -> Array:
    """What a node of `with_norm` makes of x + skip, in float64."""
    rows = x.astype(np.float64)
    rows = rows - rows.mean(-1, keepdims=True) * centred
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + EPSILON) * gamma_of(x.shape[-1])


def session(model: onnx.ModelProto, library: Path | str, threads: int = 2) -> ort.InferenceSession:
    """The graph on the kernels of a library."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_all(library: Path | str) -> dict[str, Array]:
    """Outputs by case: both operators, both widths, sizes that divide nothing, no, one and many tokens."""
    outputs = {}
    rng = np.random.default_rng(7)
    for bits in (8, 4):
        for K, group in ((16, 16), (100, 32), (300, 128)):
            for N in (1, 35, 144):
                for wide in (0, 1):
                    run = session(matmul_model(N, K, bits, group, wide=wide)[0], library)
                    for T in (0, 1, 3, 70):
                        feeds = {"x": rng.standard_normal((T, K), np.float32)}
                        (outputs[f"matmul {bits} {N} {K} {T} {wide}"],) = run.run(None, feeds)
        for attributes in (
            MoEAttributes(top_k=2),
            MoEAttributes(top_k=3, glu="three_way", activation="gelu_tanh", scoring="sigmoid", capacity_factor=1.1),
            MoEAttributes(top_k=1, glu="none", activation="gelu", renormalize=False),
            MoEAttributes(top_k=4, alpha=1.702, beta=1.0, limit=0.5),
        ):
            D, E, I = 60, 7, 41
            run = session(moe_model(attributes, bits, 32, D=D, E=E, I=I, bias=attributes.top_k >= 3)[0], library)
            for T in (0, 1, 2, 5, 67, 200):
                x, logits = rng.standard_normal((T, D), np.float32), rng.standard_normal((T, E), np.float32)
                key = f"moe {bits} {attributes.top_k} {T}"
                (outputs[key],) = run.run(None, {"x": x, "router_logits": logits})
        for T in (0, 1, 6, 67):
            x, skip = (rng.standard_normal((T, 100), np.float32) for _ in range(2))
            for centred in (False, True):
                model = with_norm(matmul_model(35, 100, bits, 32)[0], x, centred=centred)
                y, total = session(model, library).run(None, {"x": x, "skip": skip})
                outputs |= {f"norm {bits} {T} {centred}": y, f"sum {bits} {T} {centred}": total}
            router = np.random.default_rng(T).standard_normal((7, 100), np.float32)
            model = with_norm(
                moe_model(MoEAttributes(top_k=2), bits, 32, D=100, E=7, I=41)[0], x, skip=T < 6, router=router
            )
            results = session(model, library).run(None, {"x": x} | ({"skip": skip} if T < 6 else {}))
            outputs |= {f"routed {bits} {T} {i}": result for i, result in enumerate(results)}
    for settings in (Settings(), Settings(num_heads=8, kv_num_heads=1, softcap=3.0, window=40)):
        run = session(attention_model(settings, joined=True, sinks=settings.window > 0), library)
        for S in (1, 60):
            feeds = attention_feeds(settings, [0, 1200], S, width=144, rotary=32, joined=True)
            if settings.window:
                feeds["sinks"] = np.linspace(-3, 3, settings.num_heads, dtype=np.float32)
            y, present_k, _ = run.run(None, feeds)
            outputs |= {f"attention {settings.softcap} {S}": y, f"keys {settings.softcap} {S}": present_k}
    run = session(attention_model(Settings(), joined=True), library)
    feeds = attention_feeds(Settings(), [0], 600, width=16, rotary=0, joined=True)
    feeds["q"] = hard_to_halve(feeds["q"].size).reshape(feeds["q"].shape)
    _, *present = run.run(None, feeds)
    return outputs | {f"halves {kind}": cache.view(np.uint16) for kind, cache in zip("kv", present, strict=True)}


def hard_to_halve(count: int) -> np.ndarray:
    """Numbers float32 of every size and sign that float16 has, and beyond, midway between two of them and beside that."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7BFF, count).astype(np.uint16)  # below the largest
    values = bits.view(np.float16).astype(np.float32)
    steps = np.spacing(bits.view(np.float16)).astype(np.float32)
    middle = values + steps * rng.choice([0, 0.25, 0.5, 0.75], count).astype(np.float32)
    middle = np.nextafter(middle, middle + rng.choice([-1, 0, 1], count).astype(np.float32))
    middle[::97] = 10.0 ** rng.uniform(-12, 30, len(middle[::97]))
    return (middle * rng.choice([-1, 1], count)).astype(np.float32)


if __name__ == "__main__":
    np.savez(sys.argv[2], **run_all(sys.argv[1]))
