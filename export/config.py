"""ModelConfig: everything the decoder, the exporter and the size tables need to know about a model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from gatework.export.yarn import YarnConfig
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import GLU_MATRICES, Activation, Glu

MAX_SIZE = 1 << 24  # of any dimension: 64 times the largest vocabulary, more than the longest context
MAX_LAYERS = 1_000
MAX_GATE = 1e4
MAX_EXPERTS = 65_536  # over all layers: a weight map is made before any tensor is looked at

_LISTS = ("eos_token_ids", "full_attention", "dense_layers")  # in JSON

Norm = Literal["rms", "layer"]
QKNorm = Literal["head", "width"]
Bias = Literal["qkv", "attn", "all"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Routing of a mixture-of-experts feed-forward layer.

    renormalize: the K chosen scores are divided by their sum (Mixtral, DBRX).
    shared_width: of an expert besides, which every token goes through, weighed by the sigmoid of a score of its own.
    bias: the router and both products of an expert add one.
    alpha, beta, limit: of the experts' gates, see `gatework.plugins.moe.spec.MoEAttributes`.
    """

    num_experts: int
    top_k: int
    renormalize: bool = True
    shared_width: int | None = None
    bias: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise GateworkError("num_experts is not positive", got=self.num_experts, expected="at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise GateworkError(
                "top_k is out of range", got=self.top_k, expected=f"1 to num_experts={self.num_experts}"
            )
        if self.shared_width is not None and not 1 <= self.shared_width <= MAX_SIZE:
            raise GateworkError("shared_width is out of range", got=self.shared_width, expected=f"1 to {MAX_SIZE}")
        for name in ("alpha", "beta", "limit"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= MAX_GATE):
                raise GateworkError(
                    f"{name} of the gates is out of range", got=repr(value), expected=f"0 to {MAX_GATE}"
                )
        if self.has_own_gates and self.shared_width is not None:
            raise GateworkError("a shared expert has plain gates", got=f"alpha, beta or limit, and {self.shared_width}")

    @property
    def has_own_gates(self) -> bool:
        """Whether gates differ from those of dense layers."""
        return (self.alpha, self.beta, self.limit) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A transformer decoder, and the encoder before it where there is one, described by features and never by name.

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
    full_attention: tuple[int, ...] = ()  # layers that see all keys all the same
    attn_sinks: bool = False  # one more logit per head, learned, in the softmax, for a key without a value
    yarn: YarnConfig | None = None
    qk_norm: QKNorm | None = None  # RMS norm of q and k before RoPE: of each head by itself, or of all heads as one
    rope_dim: int | None = None  # the first so many values of a head rotate; none: all of them
    ntk_length: int | None = None  # prompts longer than this rotate by a larger base (dynamic NTK)
    logn_length: int | None = None  # queries beyond it are multiplied by the logarithm of their position, to this base
    alibi_bias_max: float | None = None  # ALiBi in the place of rotation: the last head's slope is 2^-max
    relative_buckets: int | None = (
        None  # in the place of rotation a bias of scores, learned by bucket of distances (T5)
    )
    relative_distance: int = 128  # from which on all distances fall into the last bucket
    qkv_clip: float | None = None  # clamp q, k and v to [-c, c], after qk_norm "width" and before "head"
    bias: Bias | None = None  # of q, k and v; of all of attention's products; of all products and norms, and the head's
    parallel: bool = False  # attention and feed-forward layer read one norm, and both are added to what came before it
    glu: Glu = "two_way"  # none: act(up); act(gate) * up; or a * act(b) * up, where the gate a | b is twice as wide
    attn_scale: float | None = None  # of q k^T; None: 1 / sqrt(Dh)
    attn_softcap: float | None = None  # c: scaled attention logits z become c tanh(z / c), before the mask
    post_norms: bool = False  # RMS norms of what attention and feed-forward part give, before it is added to the stream
    activation: Activation = "silu"
    embed_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    tie_embeddings: bool = False
    moe: MoEConfig | None = None
    moe_interval: int = 1  # n: every n-th layer has experts, the last of each n; the others are dense
    dense_layers: tuple[int, ...] = ()  # of those that would have experts, layers that are dense all the same
    dense_width: int | None = None  # of dense feed-forward parts, where experts are I wide and those are not
    expert_capacity: float = 0.0  # factor of the choices that an expert serves in one step; 0: there is no such rule
    min_expert_capacity: int = 0
    drop_tokens: bool = False  # that rule is applied, so that a token's result depends on the others of its step
    sequence_capacity: int = 0  # tokens of one sequence that an expert serves in one step; 0: none is dropped
    extra_mlp: bool = False  # after the experts of a layer: a dense feed-forward part with a norm of its own
    encoder_layers: int = 0  # before the decoder, whose layers attend to the encoder's output as well; 0: no encoder
    start_token_id: int | None = None  # what the decoder of an encoder-decoder model begins with
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
        layers = self.num_layers + self._checked_encoder()
        if layers > MAX_LAYERS or layers * experts > MAX_EXPERTS:
            got = f"{layers} layers of {experts} experts" if self.moe else f"{layers} layers"
            expected = f"at most {MAX_LAYERS} layers and {MAX_EXPERTS} experts in all"
            raise GateworkError("the model is too large", got=got, expected=expected)
        if self.num_heads % self.num_kv_heads:
            raise GateworkError(
                "num_heads is not a multiple of num_kv_heads", got=f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise GateworkError("head_dim is odd, rotary embedding needs pairs", got=self.head_dim)
        self._check_positions()
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
        self._check_full_attention()
        if self.qk_norm not in (None, *get_args(QKNorm)):
            raise GateworkError("qk_norm is not known", got=repr(self.qk_norm), expected="head, width or none")
        if self.qkv_clip is not None and not self.qkv_clip > 0:
            raise GateworkError("qkv_clip is not positive", got=self.qkv_clip, expected="a positive bound, or none")
        self._check_layers()

    def _check_positions(self) -> None:
        if self.rope_dim is not None and (self.rope_dim % 2 or not 2 <= self.rope_dim <= self.head_dim):
            expected = f"an even number up to head_dim={self.head_dim}"
            raise GateworkError("rope_dim is out of range", got=self.rope_dim, expected=expected)
        if self.alibi_bias_max is not None and not (math.isfinite(self.alibi_bias_max) and self.alibi_bias_max > 0):
            raise GateworkError("alibi_bias_max is not a positive number", got=self.alibi_bias_max)
        if self.relative_buckets is not None:
            least, most = 4, MAX_SIZE
            if not (type(self.relative_buckets) is int and least <= self.relative_buckets <= most):
                expected = f"{least} to {most}, or none"
                raise GateworkError(
                    "relative_buckets is out of range", got=repr(self.relative_buckets), expected=expected
                )
            least = self.relative_buckets // 2 + 1
            if not (type(self.relative_distance) is int and least <= self.relative_distance <= most):
                expected = f"{least} to {most}"
                raise GateworkError(
                    "relative_distance is out of range", got=repr(self.relative_distance), expected=expected
                )
        for kind, others in (
            ("alibi_bias_max", ("rope_dim", "ntk_length", "yarn")),
            (
                "relative_buckets",
                ("rope_dim", "ntk_length", "yarn", "alibi_bias_max", "logn_length", "sliding_window", "attn_softcap"),
            ),
        ):
            for name in others if getattr(self, kind) is not None else ():
                if getattr(self, name) is not None:
                    raise GateworkError(f"{name} and {kind} exclude each other", got=getattr(self, name))
        for name in ("ntk_length", "logn_length"):
            length = getattr(self, name)
            if length is not None and not (type(length) is int and 2 <= length <= MAX_SIZE):
                raise GateworkError(f"{name} is out of range", got=repr(length), expected=f"2 to {MAX_SIZE}, or none")
        if self.ntk_length is not None and self.rotary_dim < 4:
            raise GateworkError("dynamic NTK needs more than one pair that rotates", got=self.rotary_dim)
        if self.yarn is not None and (self.ntk_length is not None or self.rope_theta == 1.0):
            got = f"rope_theta {self.rope_theta}, ntk_length {self.ntk_length}"
            raise GateworkError("YaRN does not go with this", got=got, expected="a base above 1, and no dynamic NTK")

    def _check_full_attention(self) -> None:
        layers = self.full_attention
        if not all(type(i) is int and 0 <= i < self.num_layers for i in layers) or len(set(layers)) < len(layers):
            expected = f"numbers of layers below {self.num_layers}, once each"
            raise GateworkError("full_attention is out of range", got=str(layers)[:80], expected=expected)
        if layers and self.sliding_window is None:
            raise GateworkError("full_attention needs layers with a window", got="no sliding_window")

    def _checked_encoder(self) -> int:
        """The number of its layers, once they are known to fit the decoder."""
        layers, start = self.encoder_layers, self.start_token_id
        if not (type(layers) is int and 0 <= layers <= MAX_LAYERS):
            raise GateworkError("encoder_layers is out of range", got=repr(layers), expected=f"0 to {MAX_LAYERS}")
        if (layers > 0) != (start is not None):
            got = f"{layers} encoder layers, start token {start}"
            raise GateworkError("an encoder and a start token go together", got=got, expected="both, or neither")
        if start is not None and not (type(start) is int and 0 <= start < self.vocab_size):
            raise GateworkError("start_token_id is out of range", got=repr(start), expected=f"below {self.vocab_size}")
        if layers and (self.relative_buckets is None or self.parallel or self.qk_norm or self.bias or self.post_norms):
            got = "other positions, norms, biases or parallel layers"
            raise GateworkError("this encoder is not supported", got=got, expected="a relative bias and plain layers")
        return layers

    def _check_layers(self) -> None:
        """What a layer is made of."""
        for name, kind in (("bias", Bias), ("activation", Activation), ("glu", Glu)):
            known = get_args(kind)
            if getattr(self, name) not in known and not (name == "bias" and self.bias is None):
                raise GateworkError(f"{name} is not known", got=repr(getattr(self, name)), expected=" or ".join(known))
        if not (0 <= self.expert_capacity < MAX_SIZE and 0 <= self.min_expert_capacity < MAX_SIZE):
            got = f"{self.expert_capacity} and {self.min_expert_capacity}"
            raise GateworkError("expert_capacity or min_expert_capacity is out of range", got=got, expected="0 or more")
        if self.drop_tokens and not self.expert_capacity:
            what = "this model has no experts that could drop tokens"
            if self.moe is not None:
                what = "this model's experts have no capacity beyond which they could drop tokens"
            if self.sequence_capacity:
                served = f"each serves {self.sequence_capacity} of a prompt"
                what = f"this model's experts drop tokens already, as its config says: {served}"
            raise GateworkError(what, got="--drop-tokens", fix="leave --drop-tokens out")
        if not (type(self.sequence_capacity) is int and 0 <= self.sequence_capacity < MAX_SIZE):
            raise GateworkError(
                "sequence_capacity is out of range", got=repr(self.sequence_capacity), expected="0 or more"
            )
        if self.sequence_capacity and (self.moe is None or self.moe.top_k > 1):
            got = "no experts" if self.moe is None else f"top {self.moe.top_k}"
            raise GateworkError("sequence_capacity is for one expert per token", got=got, expected="top 1")
        if self.moe is not None and self.moe_interval > self.num_layers:
            expected = f"at most num_layers={self.num_layers}"
            raise GateworkError("moe_interval leaves no layer with experts", got=self.moe_interval, expected=expected)
        self._check_dense_layers()
        if self.glu == "three_way" and (self.parallel or self.bias == "all"):
            what = "in parallel layers" if self.parallel else "with biases of all products"
            raise GateworkError(f"glu is not supported {what}", got=self.glu, expected="none or two_way")
        if self.moe is not None and (self.parallel or self.bias == "all"):
            what = "parallel layers" if self.parallel else "biases of all products"
            raise GateworkError(f"{what} are for dense models", got=f"{self.moe.num_experts} experts")
        if self.moe is not None and self.moe.has_own_gates:
            if (self.activation, self.glu) != ("silu", "two_way"):
                expected = "two-way silu gates"
                raise GateworkError("alpha, beta and limit are of other gates", got=self.glu, expected=expected)
            if self.moe_interval > 1 or self.dense_layers or self.extra_mlp:
                raise GateworkError("alpha, beta and limit are for experts in every layer", got="dense MLPs besides")
        for name in ("alibi_bias_max", "relative_buckets"):
            if getattr(self, name) is not None and self.attn_sinks:
                raise GateworkError(f"attn_sinks and {name} exclude each other", got=getattr(self, name))
        if self.attn_softcap is not None and self.attn_sinks:
            raise GateworkError("attn_sinks and attn_softcap exclude each other", got=self.attn_softcap)
        if self.bias == "all" and self.tie_embeddings:
            raise GateworkError("a head with a bias is no embedding table", fix="check the checkpoint's config")

    def _check_dense_layers(self) -> None:
        layers, width = self.dense_layers, self.dense_width
        known = all(type(i) is int and 0 <= i < self.num_layers for i in layers) and len(set(layers)) == len(layers)
        if not known or (layers and self.moe_layers == 0):
            expected = f"numbers of layers below {self.num_layers}, once each, that leave one with experts"
            raise GateworkError("dense_layers are out of range", got=str(layers)[:80], expected=expected)
        if width is not None and (self.moe is None or not (type(width) is int and 1 <= width <= MAX_SIZE)):
            expected = f"1 to {MAX_SIZE}, beside experts alone"
            raise GateworkError("dense_width is out of range", got=repr(width), expected=expected)

    @property
    def rotary_dim(self) -> int:
        """Values of a head that rotate."""
        if self.alibi_bias_max is not None or self.relative_buckets is not None:
            return 0
        return self.head_dim if self.rope_dim is None else self.rope_dim

    @property
    def context_limit(self) -> int:
        """Positions that the model can be run on: with ALiBi or a relative bias more than it was made for."""
        endless = self.alibi_bias_max is not None or self.relative_buckets is not None
        return MAX_SIZE if endless else self.max_position_embeddings

    def ntk_alphas(self, length: int) -> list[int]:
        """Dynamic NTK's factors for prompts of up to `length` positions: 1, and 3, 7, 15, ... from each doubling on."""
        found = [1]
        while self.ntk_length is not None and length > self.ntk_length << (len(found) - 1):
            found.append(2 * found[-1] + 1)
        return found

    def within(self, max_seq: int) -> ModelConfig:
        """The same model where no sequence has more positions: what begins to matter beyond is left out."""
        ntk, logn = (
            length if length is not None and length < max_seq else None
            for length in (self.ntk_length, self.logn_length)
        )
        return replace(self, ntk_length=ntk, logn_length=logn)

    @property
    def matrices(self) -> int:
        """G: how many I-row matrices a feed-forward part applies to its input."""
        return GLU_MATRICES[self.glu]

    def window(self, layer: int) -> int | None:
        """Keys that are visible in the layer; none: all."""
        return None if layer in self.full_attention else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward part is routed."""
        return self.moe is not None and (layer + 1) % self.moe_interval == 0 and layer not in self.dense_layers

    @property
    def mlp_width(self) -> int:
        """Of dense feed-forward parts."""
        return self.intermediate_size if self.dense_width is None else self.dense_width

    def has_shared(self, layer: int) -> bool:
        """Whether the layer has a shared expert beside its routed ones."""
        return self.moe is not None and self.moe.shared_width is not None and self.has_experts(layer)

    def has_extra(self, layer: int) -> bool:
        """Whether the layer has an extra MLP after its experts."""
        return self.extra_mlp and self.has_experts(layer)

    @property
    def moe_layers(self) -> int:
        """How many of the decoder's layers have experts."""
        return sum(map(self.has_experts, range(self.num_layers)))

    @property
    def encoder(self) -> ModelConfig | None:
        """The encoder's layers as a model of their own."""
        if not self.encoder_layers:
            return None
        return replace(self, num_layers=self.encoder_layers, encoder_layers=0, start_token_id=None)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every weight, in graph order. Matrices are (out, in); experts are (E, out, in)."""
        D = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, D)}
        if self.encoder is not None:
            shapes |= {f"encoder.{name}": shape for name, shape in self.encoder._stack_shapes().items()}
        shapes |= self._stack_shapes()
        if not self.tie_embeddings:
            shapes |= _product("lm_head", self.vocab_size, D, self.bias == "all")
        return shapes

    def _stack_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the layers, what they share, and the norm after them."""
        D, I, Dh, G = self.hidden_size, self.intermediate_size, self.head_dim, self.matrices
        width = self.mlp_width
        on_qkv, on_o, on_all = self.bias is not None, self.bias in ("attn", "all"), self.bias == "all"
        shapes: dict[str, tuple[int, ...]] = {}
        if self.relative_buckets is not None:
            shapes["relative_bias.weight"] = (self.relative_buckets, self.num_heads)
        for i in range(self.num_layers):
            layer = self._norm_shapes("attn_norm")
            for name, heads in (("q", self.num_heads), ("k", self.num_kv_heads), ("v", self.num_kv_heads)):
                layer |= _product(f"attn.{name}", heads * Dh, D, on_qkv)
            if self.qk_norm is not None:
                q, k = (self.num_heads, self.num_kv_heads) if self.qk_norm == "width" else (1, 1)
                layer |= {"attn.q_norm.weight": (q * Dh,), "attn.k_norm.weight": (k * Dh,)}
            if self.attn_sinks:
                layer |= {"attn.sinks": (self.num_heads,)}
            layer |= _product("attn.o", D, self.num_heads * Dh, on_o)
            if self.post_norms:
                layer |= self._norm_shapes("attn_post_norm")
            if self.encoder_layers:
                layer |= self._norm_shapes("cross_norm")
                for name, rows in (("q", self.num_heads), ("k", self.num_kv_heads), ("v", self.num_kv_heads)):
                    layer |= _product(f"cross.{name}", rows * Dh, D, False)
                layer |= _product("cross.o", D, self.num_heads * Dh, False)
            if not self.parallel:
                layer |= self._norm_shapes("ffn_norm")
            if self.moe is None or not self.has_experts(i):  # gate rows first, then up rows
                layer |= {"mlp.w_in": (G * width, D), "mlp.w_out": (D, width)}
                layer |= {"mlp.b_in": (G * width,), "mlp.b_out": (D,)} if on_all else {}
            else:
                E = self.moe.num_experts
                layer |= _product("moe.router", E, D, self.moe.bias)
                layer |= {"moe.w_in": (E, G * I, D), "moe.w_out": (E, D, I)}
                layer |= {"moe.b_in": (E, G * I), "moe.b_out": (E, D)} if self.moe.bias else {}
                if (shared := self.moe.shared_width) is not None:
                    layer |= {"moe.shared.router.weight": (1, D)}
                    layer |= {"moe.shared.w_in": (G * shared, D), "moe.shared.w_out": (D, shared)}
            if self.post_norms:
                layer |= self._norm_shapes("ffn_post_norm")
            if self.has_extra(i):
                layer |= self._norm_shapes("extra_norm")
                layer |= {"extra_mlp.w_in": (G * width, D), "extra_mlp.w_out": (D, width)}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes | self._norm_shapes("norm")

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        kinds = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{name}.{kind}": (self.hidden_size,) for kind in kinds}

    @property
    def norm_bias(self) -> bool:
        """Whether norms add a bias, which RMS norms never do."""
        return self.bias == "all" and self.norm == "layer"

    def num_parameters(self) -> int:
        """All weights."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def num_active_parameters(self) -> int:
        """Weights that one token passes through: all but the experts it is not routed to."""
        if self.moe is None:
            return self.num_parameters()
        expert = (self.matrices + 1) * self.hidden_size * self.intermediate_size
        expert += self.moe.bias * (self.matrices * self.intermediate_size + self.hidden_size)
        layers = self.moe_layers + (self.encoder.moe_layers if self.encoder is not None else 0)
        return self.num_parameters() - layers * (self.moe.num_experts - self.moe.top_k) * expert

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that the keys and values of one position take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, inverse of `from_dict`."""
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return asdict(self) | lists

    @property
    def attention_scale(self) -> float:
        """What q k^T is multiplied by."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Rebuild a config written by `to_dict`; an unknown or missing field is a GateworkError."""
        fields = dict(fields)
        try:
            for name, kind in (("moe", MoEConfig), ("yarn", YarnConfig)):
                if fields.get(name) is not None:
                    fields[name] = kind(**fields[name])
            for name in _LISTS:
                fields[name] = tuple(fields.get(name, ()))
            return cls(**fields)
        except TypeError as error:
            fix = "upgrade gatework, or build the engine again"
            raise GateworkError(f"model description does not fit this version: {error}", fix=fix) from None


def _product(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})
