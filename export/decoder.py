"""The reference model: one PyTorch decoder for every family, and the module that the exporter traces.

Shape letters: B batch, S tokens of this step, S_max cache length, D hidden, H query heads, Hkv key/value heads, Dh head
width, I feed-forward width, E experts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatework.export import attention_op, cache_op
from gatework.export.config import ModelConfig
from gatework.plugins.moe import torch_op
from gatework.plugins.moe.spec import MoEAttributes


def moe_attributes(config: ModelConfig) -> MoEAttributes:
    """The operator's settings for this model's feed-forward layers, with dense weights."""
    assert config.moe is not None
    return MoEAttributes(
        top_k=config.moe.top_k,
        renormalize=config.moe.renormalize,
        activation=config.activation,
        glu=config.glu,
        capacity_factor=config.expert_capacity,
        min_capacity=config.min_expert_capacity,
    )


def activate(config: ModelConfig, gate: Tensor) -> Tensor:
    """The activation function of gates."""
    return F.silu(gate) if config.activation == "silu" else F.gelu(gate, approximate="tanh")


def rope_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/Dh), each [length, Dh/2] float32 (RoFormer, arXiv:2104.09864, section 3.2.2)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    angles = torch.outer(torch.arange(length).float(), 1.0 / (config.rope_theta**exponents))
    return angles.cos(), angles.sin()


def attention_mask(config: ModelConfig, position_ids: Tensor, max_seq: int) -> Tensor:
    """True where a query may look: [B, 1, S, S_max], keys at or before it and, with a window, at most W - 1 before it."""
    keys = torch.arange(max_seq, device=position_ids.device)[None, None, None, :]
    queries = position_ids[:, None, :, None]
    mask = keys <= queries
    if config.sliding_window is not None:
        mask = mask & (keys > queries - config.sliding_window)
    return mask


class Linear(nn.Module):
    """y = x W^T without bias."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def norm(config: ModelConfig) -> nn.Module:
    """The model's normalisation layer over D; neither kind has a bias."""
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


class Attention(nn.Module):
    """Grouped-query attention over the KV cache, with rotary positions in halves (j, j + Dh/2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, width, kv_width = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q, self.k, self.v = Linear(width, D), Linear(kv_width, D), Linear(kv_width, D)
        self.o = Linear(D, width)
        if config.qk_norm is not None:
            by_head = config.qk_norm == "head"
            self.q_norm = nn.RMSNorm(config.head_dim if by_head else width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim if by_head else kv_width, eps=config.norm_eps)

    def heads(self, projected: Tensor, norm: str | None = None) -> Tensor:
        """[B, S, n * Dh] -> [B, n, S, Dh], normalised by the submodule `norm` and clipped where the model asks for it."""
        config = self.config
        normalise = None if norm is None or config.qk_norm is None else self.get_submodule(norm)
        if normalise is not None and config.qk_norm == "width":
            projected = normalise(projected)
        if config.qkv_clip is not None:
            projected = projected.clamp(-config.qkv_clip, config.qkv_clip)
        B, S, width = projected.shape
        heads = projected.view(B, S, width // config.head_dim, config.head_dim)
        if normalise is not None and config.qk_norm == "head":
            heads = normalise(heads)
        return heads.transpose(1, 2)

    def forward(self, x: Tensor, step: Step, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x, step)
        k = cache_op.cache_write(past_k, k, step.write_indices)
        v = cache_op.cache_write(past_v, v, step.write_indices)
        return self.o(self.read(q, k, v, step.mask)), k, v

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, Dh], and keys and values [B, Hkv, S, Dh] as the cache holds them."""
        ops = torch.onnx.ops
        q = ops.rotary_embedding(self.heads(self.q(x), "q_norm"), step.cos, step.sin, step.position_ids)
        k = ops.rotary_embedding(self.heads(self.k(x), "k_norm"), step.cos, step.sin, step.position_ids)
        return q, k, self.heads(self.v(x))

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """What the queries find in the cache [B, Hkv, S_max, Dh], [B, S, H * Dh]; mask [B, 1, S, S_max]."""
        scale, softcap = self.config.attention_scale, self.config.attn_softcap
        if softcap is None:
            y, *_ = torch.onnx.ops.attention(q, k, v, mask, scale=scale)
        else:
            y = attention_op.capped_attention(q, k, v, mask, scale, softcap)
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Dense gated feed-forward layer: down(act(gate x) * up x), or down(a * act(b) * up x) with gate x = a | b."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.matrices * config.intermediate_size
        self.w_in = nn.Parameter(torch.empty(rows, config.hidden_size), requires_grad=False)
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        *a, gate, up = F.linear(x, self.w_in).chunk(self.config.matrices, dim=-1)
        hidden = activate(self.config, gate) * up
        return F.linear(a[0] * hidden if a else hidden, self.w_out)


class MoE(nn.Module):
    """Routed feed-forward layer: the router in float32, then `gatework::MoE`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.attributes = moe_attributes(config)
        E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size
        self.router = Linear(E, D)
        self.w_in = nn.Parameter(torch.empty(E, config.matrices * I, D), requires_grad=False)
        self.w_out = nn.Parameter(torch.empty(E, D, I), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [T, D]
        logits = F.linear(tokens.float(), self.router.weight.float())  # [T, E]
        return torch_op.moe(tokens, logits, self.w_in, self.w_out, self.attributes).view_as(x)


class Step:
    """What every layer of one forward pass shares."""

    def __init__(
        self, config: ModelConfig, position_ids: Tensor, write_indices: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        self.position_ids = position_ids  # [B, S]
        self.write_indices = write_indices  # [B]
        self.cos, self.sin = cos, sin  # [S_max, Dh/2]
        self.mask = attention_mask(config, position_ids, cos.shape[0])


class Layer(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer, each added to the residual stream, normalised or not.

    index: the layer's number, which decides whether it has experts.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn_norm, self.attn = norm(config), Attention(config)
        self.ffn_norm = norm(config)
        self.ffn = "moe" if config.has_experts(index) else "mlp"  # the name under which its weights go
        self.add_module(self.ffn, MoE(config) if config.has_experts(index) else MLP(config))
        self.attn_post_norm = norm(config) if config.post_norms else nn.Identity()
        self.ffn_post_norm = norm(config) if config.post_norms else nn.Identity()
        self.has_extra = config.has_extra(index)
        if self.has_extra:
            self.extra_norm, self.extra_mlp = norm(config), MLP(config)

    def forward(self, x: Tensor, step: Step, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, k, v = self.attend(x, step, past_k, past_v)
        return self.extra(self.feed_forward(x)), k, v

    def attend(self, x: Tensor, step: Step, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half, and the updated cache."""
        y, k, v = self.attn(self.attn_norm(x), step, past_k, past_v)
        return x + self.attn_post_norm(y), k, v

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.ffn_post_norm(self.get_submodule(self.ffn)(self.ffn_norm(x)))

    def extra(self, x: Tensor) -> Tensor:
        """The MLP after the experts, in layers that have one."""
        return x + self.extra_mlp(self.extra_norm(x)) if self.has_extra else x


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """x times a number of the model's, in float32, which holds it better than narrower types do."""
    return x if multiplier == 1.0 else (x.float() * multiplier).to(x.dtype)


class Decoder(nn.Module):
    """A decoder-only transformer with a static-length KV cache; parameters carry the canonical names of ModelConfig.

    Args of `forward`:
        input_ids: [B, S] int64 tokens of this step.
        position_ids: [B, S] int64 absolute positions.
        write_indices: [B] int64 cache slot of each row's first new key.
        cache: 2L tensors [B, Hkv, S_max, Dh] in the activation dtype, k and v of each layer in turn; not modified.

    Returns the logits, [B, 1, V] float32 of the last position ([B, S, V] with `all_logits`), then the updated cache tensors.
    """

    def __init__(self, config: ModelConfig, max_seq: int, *, all_logits: bool = False) -> None:
        super().__init__()
        self.config, self.max_seq, self.all_logits = config, max_seq, all_logits
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = norm(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size)
        cos, sin = rope_tables(config, max_seq)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, write_indices: Tensor, cache: list[Tensor]
    ) -> tuple[Tensor, ...]:
        x = scaled(self.embed(input_ids), self.config.embed_multiplier)  # [B, S, D]
        cos, sin = self.rope_cos.to(x.dtype), self.rope_sin.to(x.dtype)
        step = Step(self.config, position_ids, write_indices, cos, sin)
        present: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, step, cache[2 * i], cache[2 * i + 1])
            present += [k, v]
        if not self.all_logits:
            x = x[:, -1:]
        head = self.embed.weight if self.config.tie_embeddings else self.lm_head.weight
        return scaled(F.linear(self.norm(x), head).float(), self.config.logit_multiplier), *present

    def empty_cache(self, batch: int) -> list[Tensor]:
        """Zeroed cache tensors for `batch` rows."""
        config, weight = self.config, self.embed.weight
        shape = (batch, config.num_kv_heads, self.max_seq, config.head_dim)
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2 * config.num_layers)]
