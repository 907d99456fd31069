"""One CachedAttention node, and its definition in float64."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

Array = np.ndarray
FLOAT, FLOAT16, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
LARGEST_HALF = 65504.0
SLOTS = 1300


@dataclass(frozen=True)
class Settings:
    """Attributes of the operator."""

    num_heads: int = 4
    kv_num_heads: int = 2
    scale: float = 0.25
    softcap: float = 0.0
    window: int = 0


def attention_model(settings: Settings, *, joined: bool, slopes: bool = False, sinks: bool = False) -> onnx.ModelProto:
    """A graph of the node, all of whose inputs are the graph's."""
    kinds = {"q": 3, "past_k": 4, "past_v": 4, "write_indices": 1, "cos": 2, "sin": 2}
    if not joined:
        kinds |= {"k": 3, "v": 3}
    if slopes:
        kinds |= {"slopes": 1}
    if sinks:
        kinds |= {"sinks": 1}
    outputs = {"y": 3, "present_k": 4, "present_v": 4}
    node = helper.make_node(
        "CachedAttention", _places(list(kinds)), list(outputs), domain="gatework", **asdict(settings)
    )

    def value(name: str, rank: int) -> onnx.ValueInfoProto:
        kind = FLOAT16 if name.startswith(("past", "present")) else INT64 if name == "write_indices" else FLOAT
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    infos = [[value(*item) for item in each.items()] for each in (kinds, outputs)]
    graph = helper.make_graph([node], "one", infos[0], infos[1])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("gatework", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _places(names: list[str]) -> list[str]:
    """Inputs in their places, those not given left empty."""
    order = ["q", "past_k", "past_v", "write_indices", "cos", "sin", "k", "v", "slopes", "sinks"]
    while order[-1] not in names:
        order.pop()
    return [name if name in names else "" for name in order]


def attention_feeds(
    settings: Settings, starts: list[int], S: int, *, width: int, rotary: int, joined: bool, seed: int = 0
) -> dict[str, Array]:
    """Random inputs, and for angles those of RoPE."""
    rng = np.random.default_rng(seed)
    B, H, kv = len(starts), settings.num_heads, settings.kv_num_heads
    q, k, v = (rng.standard_normal((B, S, heads * width), np.float32) for heads in (H, kv, kv))
    past = {
        name: rng.standard_normal((B, kv, SLOTS, width), np.float32).astype(np.float16) for name in ("past_k", "past_v")
    }
    angles = np.outer(np.arange(SLOTS), 10_000.0 ** (-np.arange(0, rotary, 2) / max(rotary, 1)))
    feeds = {"q": np.concatenate([q, k, v], axis=-1) if joined else q, **past}
    feeds |= {"write_indices": np.array(starts, np.int64)}
    feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return feeds if joined else feeds | {"k": k, "v": v}


def definition(settings: Settings, feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
    """y, present_k and present_v, in float64; keys and values are rounded to float16."""
    H, kv, width = settings.num_heads, settings.kv_num_heads, feeds["past_k"].shape[-1]
    B, S, _ = feeds["q"].shape
    q = feeds["q"].astype(np.float64)
    if "k" in feeds:
        k, v = feeds["k"].astype(np.float64), feeds["v"].astype(np.float64)
    else:
        q, k, v = np.split(q, [H * width, (H + kv) * width], axis=-1)
    keys, values = feeds["past_k"].astype(np.float64), feeds["past_v"].astype(np.float64)
    y = np.zeros((B, S, H, width))
    for b, start in enumerate(feeds["write_indices"]):
        for s in range(S):
            cos, sin = feeds["cos"][start + s], feeds["sin"][start + s]
            keys[b, :, start + s] = _halves(_rotated(k[b, s].reshape(kv, width), cos, sin))
            values[b, :, start + s] = _halves(v[b, s].reshape(kv, width))
            first = max(0, start + s + 1 - settings.window) if settings.window else 0
            seen = slice(first, start + s + 1)
            for head, query in enumerate(_rotated(q[b, s].reshape(H, width), cos, sin)):
                group = head // (H // kv)
                scores = keys[b, group, seen] @ query * settings.scale
                if settings.softcap:
                    scores = settings.softcap * np.tanh(scores / settings.softcap)
                if "slopes" in feeds:
                    scores = scores + feeds["slopes"][head] * np.arange(first - start - s, 1)
                sink = feeds["sinks"][head] if "sinks" in feeds else -np.inf
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                y[b, s, head] = weights @ values[b, group, seen] / (weights.sum() + np.exp(sink - top))
    return y.reshape(B, S, -1), keys, values


def _halves(values: Array) -> Array:
    """Rounded; a kernel that computed them in float32 may have the neighbours of a few."""
    return values.clip(-LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float64)


def _rotated(heads: Array, cos: Array, sin: Array) -> Array:
    half = len(cos)
    a, b, rest = np.split(heads, [half, 2 * half], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
