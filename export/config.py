"""ModelConfig: everything the decoder, the exporter and the size tables need to know about a model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from gatework.plugins.errors import GateworkError

MAX_SIZE = 1 << 24  # of any dimension: 64 times the largest vocabulary, more than the longest context
MAX_LAYERS = 1_000
MAX_EXPERTS = 50_000  # over all layers: a weight map is made before any tensor is looked at

Norm = Literal["rms", "layer"]
QKNorm = Literal["head", "width"]
Activation = Literal["silu", "gelu_tanh"]
Glu = Literal["two_way", "three_way"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Routing of a mixture-of-experts feed-forward layer.

    renormalize: the K chosen scores are divided by their sum (Mixtral, DBRX).
    """

    num_experts: int
    top_k: int
    renormalize: bool = True

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise GateworkError("num_experts is not positive", got=self.num_experts, expected="at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise GateworkError(
                "top_k is out of range", got=self.top_k, expected=f"1 to num_experts={self.num_experts}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, described by its features and never by its name.

    Letters: V vocab_size, D hidden_size, H num_heads, Hkv num_kv_heads, Dh head_dim, I intermediate_size.
    `family` names the entry of `gatework.export.families.FAMILIES` that the checkpoint was read with; nothing branches on it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int | None = None  # W keys are visible, the query's own position included
    qk_norm: QKNorm | None = None  # RMS norm of q and k before RoPE: of each head by itself, or of all heads as one
    qkv_clip: float | None = None  # clamp q, k and v to [-c, c], after qk_norm "width" and before "head"
    attn_scale: float | None = None  # of q k^T; None: 1 / sqrt(Dh)
    attn_softcap: float | None = None  # c: scaled attention logits z become c tanh(z / c), before the mask
    post_norms: bool = False  # RMS norms of what attention and feed-forward part give, before it is added to the stream
    activation: Activation = "silu"  # of gates
    glu: Glu = "two_way"  # act(gate) * up, or a * act(b) * up, where the gate a | b is twice as wide
    embed_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    tie_embeddings: bool = False
    moe: MoEConfig | None = None
    moe_interval: int = 1  # n: every n-th layer has experts, the last of each n; the others are dense
    expert_capacity: float = (
        0.0  # factor of the choices that an expert serves in one step, more are dropped; 0: none is
    )
    min_expert_capacity: int = 0
    extra_mlp: bool = False  # after the experts of a layer: a dense feed-forward part with a norm of its own
    dtype: Dtype = "float32"  # of the stored weights
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_position_embeddings", "moe_interval"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise GateworkError(
                    f"{name} is not a positive integer", got=repr(value), fix="check the checkpoint's config"
                )
            if value > MAX_SIZE:
                raise GateworkError(f"{name} is too large", got=value, expected=f"at most {MAX_SIZE}")
        experts = 1 if self.moe is None else self.moe.num_experts
        if self.num_layers > MAX_LAYERS or self.num_layers * experts > MAX_EXPERTS:
            got = f"{self.num_layers} layers of {experts} experts" if self.moe else f"{self.num_layers} layers"
            expected = f"at most {MAX_LAYERS} layers and {MAX_EXPERTS} experts in all"
            raise GateworkError("the model is too large", got=got, expected=expected)
        if self.num_heads % self.num_kv_heads:
            raise GateworkError(
                "num_heads is not a multiple of num_kv_heads", got=f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise GateworkError("head_dim is odd, rotary embedding needs pairs", got=self.head_dim)
        for name in ("norm_eps", "rope_theta", "attn_scale", "attn_softcap", "embed_multiplier", "logit_multiplier"):
            value = getattr(self, name)
            if value is None and name.startswith("attn_"):
                continue
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise GateworkError(f"{name} is not a positive number", got=repr(value))
        if self.sliding_window is not None and self.sliding_window < 1:
            raise GateworkError(
                "sliding_window is not positive", got=self.sliding_window, expected="at least 1, or none"
            )
        if self.qk_norm not in (None, *get_args(QKNorm)):
            raise GateworkError("qk_norm is not known", got=repr(self.qk_norm), expected="head, width or none")
        for name, known in {"activation": get_args(Activation), "glu": get_args(Glu)}.items():
            if getattr(self, name) not in known:
                raise GateworkError(f"{name} is not known", got=repr(getattr(self, name)), expected=" or ".join(known))
        if not (0 <= self.expert_capacity < MAX_SIZE and 0 <= self.min_expert_capacity < MAX_SIZE):
            got = f"{self.expert_capacity} and {self.min_expert_capacity}"
            raise GateworkError("expert_capacity or min_expert_capacity is out of range", got=got, expected="0 or more")
        if self.moe is not None and self.moe_interval > self.num_layers:
            expected = f"at most num_layers={self.num_layers}"
            raise GateworkError("moe_interval leaves no layer with experts", got=self.moe_interval, expected=expected)
        if self.qkv_clip is not None and not self.qkv_clip > 0:
            raise GateworkError("qkv_clip is not positive", got=self.qkv_clip, expected="a positive bound, or none")

    @property
    def matrices(self) -> int:
        """G: how many I-row matrices a feed-forward part applies to its input."""
        return 2 if self.glu == "two_way" else 3

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is routed."""
        return self.moe is not None and (layer + 1) % self.moe_interval == 0

    def has_extra(self, layer: int) -> bool:
        """Whether the layer has an extra MLP after its experts."""
        return self.extra_mlp and self.has_experts(layer)

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return self.num_layers // self.moe_interval if self.moe is not None else 0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every weight, in graph order. Matrices are (out, in); experts are (E, out, in)."""
        D, I, Dh, G = self.hidden_size, self.intermediate_size, self.head_dim, self.matrices
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, D)}
        for i in range(self.num_layers):
            layer = {
                "attn_norm.weight": (D,),
                "attn.q.weight": (self.num_heads * Dh, D),
                "attn.k.weight": (self.num_kv_heads * Dh, D),
                "attn.v.weight": (self.num_kv_heads * Dh, D),
            }
            if self.qk_norm is not None:
                q, k = (self.num_heads, self.num_kv_heads) if self.qk_norm == "width" else (1, 1)
                layer |= {"attn.q_norm.weight": (q * Dh,), "attn.k_norm.weight": (k * Dh,)}
            layer["attn.o.weight"] = (D, self.num_heads * Dh)
            if self.post_norms:
                layer["attn_post_norm.weight"] = (D,)
            layer["ffn_norm.weight"] = (D,)
            if self.moe is None or not self.has_experts(i):  # gate rows first, then up rows
                layer |= {"mlp.w_in": (G * I, D), "mlp.w_out": (D, I)}
            else:
                E = self.moe.num_experts
                layer |= {"moe.router.weight": (E, D), "moe.w_in": (E, G * I, D), "moe.w_out": (E, D, I)}
            if self.post_norms:
                layer["ffn_post_norm.weight"] = (D,)
            if self.has_extra(i):
                layer |= {"extra_norm.weight": (D,), "extra_mlp.w_in": (G * I, D), "extra_mlp.w_out": (D, I)}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["norm.weight"] = (D,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    def num_parameters(self) -> int:
        """All weights."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def num_active_parameters(self) -> int:
        """Weights that one token passes through: all but the experts it is not routed to."""
        if self.moe is None:
            return self.num_parameters()
        expert = (self.matrices + 1) * self.hidden_size * self.intermediate_size
        return self.num_parameters() - self.moe_layers * (self.moe.num_experts - self.moe.top_k) * expert

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that the keys and values of one position take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, inverse of `from_dict`."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @property
    def attention_scale(self) -> float:
        """What q k^T is multiplied by."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Rebuild a config written by `to_dict`; an unknown or missing field is a GateworkError."""
        fields = dict(fields)
        try:
            if fields.get("moe") is not None:
                fields["moe"] = MoEConfig(**fields["moe"])
            fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
            return cls(**fields)
        except TypeError as error:
            raise GateworkError(f"model description does not fit this version: {error}") from None
