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
from gatework.export.positions import RelativeBias, attention_mask, query_scale, rope_positions, rope_tables
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
        capacity_factor=config.expert_capacity if config.drop_tokens else 0.0,
        min_capacity=config.min_expert_capacity if config.drop_tokens else 0,
        alpha=config.moe.alpha,
        beta=config.moe.beta,
        limit=config.moe.limit,
    )


def weight(*shape: int) -> nn.Parameter:
    """One to be filled."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T, plus a bias where the model has one."""

    def __init__(self, out_features: int, in_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = weight(out_features, in_features)
        self.bias = weight(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def norm(config: ModelConfig) -> nn.Module:
    """The model's normalisation layer over D."""
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Attention(nn.Module):
    """Grouped-query attention over the KV cache, with rotary positions in halves (j, j + R/2) of a head's first R values.

    window: keys that are visible; none: all.
    """

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.config, self.window = config, window
        D, width, kv_width = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q, self.k, self.v = (Linear(n, D, bias=config.bias is not None) for n in (width, kv_width, kv_width))
        self.o = Linear(D, width, bias=config.bias in ("attn", "all"))
        self.sinks = weight(config.num_heads) if config.attn_sinks else None
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
        return self.o(self.read(q, k, v, step.masks[self.window])), k, v

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, Dh], and keys and values [B, Hkv, S, Dh] as the cache holds them."""
        q = self.q(x)
        if step.query_scale is not None:
            q = q * step.query_scale.to(q.dtype)
        q, k, v = self.heads(q, "q_norm"), self.heads(self.k(x), "k_norm"), self.heads(self.v(x))
        return self.rotated(q, step), self.rotated(k, step), v

    def rotated(self, heads: Tensor, step: Step) -> Tensor:
        """Heads [B, n, S, Dh], turned to their positions, if the model turns them."""
        if not self.config.rotary_dim:
            return heads
        part = 0 if self.config.rope_dim is None else self.config.rope_dim  # 0: all of a head
        angles = (step.cos, step.sin, step.rope_positions)
        return torch.onnx.ops.rotary_embedding(heads, *angles, rotary_embedding_dim=part)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """What the queries find in the cache [B, Hkv, S_max, Dh], [B, S, H * Dh]; mask: see `attention_mask`."""
        scale, softcap = self.config.attention_scale, self.config.attn_softcap
        if self.sinks is not None:
            k, v, mask = with_sinks(k, v, mask, self.sinks.to(q.dtype))
        if softcap is None:
            y, *_ = torch.onnx.ops.attention(q, k, v, mask, scale=scale)
        else:
            y = attention_op.capped_attention(q, k, v, mask, scale, softcap)
        return y.transpose(1, 2).flatten(2)


def with_sinks(k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, Hkv, S_max + 1, Dh], the last ones zeros, and what is added to the logits, there the sinks [H].

    So the softmax has one more term for each head, which reads nothing. mask: [B, 1, S, S_max], true where a query may look.
    """
    nothing = k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3])
    bias = torch.where(mask, 0.0, torch.finfo(k.dtype).min).to(k.dtype)
    column = sinks[:, None, None].expand(mask.shape[0], -1, mask.shape[2], 1)
    bias = torch.cat([bias.expand(-1, len(sinks), -1, -1), column], dim=-1)  # [B, H, S, S_max + 1]
    return torch.cat([k, nothing], dim=2), torch.cat([v, nothing], dim=2), bias


class CrossAttention(nn.Module):
    """The decoder's half of attention to the encoder's output, whose keys and values the encoder computes; see `encoder`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.num_heads * config.head_dim
        self.q, self.o = Linear(width, config.hidden_size), Linear(config.hidden_size, width)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.o(self.read(self.queries(x), k, v, mask))

    def queries(self, x: Tensor) -> Tensor:
        """[B, H, S, Dh]."""
        return self.q(x).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """What the queries find in keys and values [B, Hkv, L, Dh], [B, S, H * Dh]; mask: [B, 1, S, L]."""
        y, *_ = torch.onnx.ops.attention(q, k, v, mask, scale=self.config.attention_scale)
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Dense feed-forward layer: down(act(up x)), down(act(gate x) * up x), or down(a * act(b) * up x) with gate x = a | b."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        D, rows, bias = config.hidden_size, config.matrices * width, config.bias == "all"
        self.activation, self.glu = config.activation, config.glu
        self.w_in, self.w_out = weight(rows, D), weight(D, width)
        self.b_in = weight(rows) if bias else None
        self.b_out = weight(D) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch_op.gated(F.linear(x, self.w_in, self.b_in), self.activation, self.glu)
        return F.linear(h, self.w_out, self.b_out)


class SharedExpert(MLP):
    """An expert that every token goes through, weighed by the sigmoid of its router's score, which is in float32."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config, width)
        self.router = Linear(1, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.share(x) * super().forward(x)

    def share(self, x: Tensor) -> Tensor:
        """[B, S, 1]."""
        return F.linear(x.float(), self.router.weight.float()).sigmoid().to(x.dtype)


class MoE(nn.Module):
    """Routed feed-forward layer: the router in float32, then `gatework::MoE`, and the shared expert if there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.attributes = moe_attributes(config)
        E, D, I = config.moe.num_experts, config.hidden_size, config.intermediate_size
        rows, bias = self.attributes.w_in_rows(I), config.moe.bias
        self.router = Linear(E, D, bias=bias)
        self.w_in, self.w_out = weight(E, rows, D), weight(E, D, I)
        self.b_in = weight(E, rows) if bias else None
        self.b_out = weight(E, D) if bias else None
        self.sequence_capacity = config.sequence_capacity
        width = config.moe.shared_width
        self.shared = None if width is None else SharedExpert(config, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [T, D]
        logits = self.scores(tokens)
        weights = (self.w_in, self.w_out, self.attributes)
        y = torch_op.moe(tokens, logits, *weights, b_in=self.b_in, b_out=self.b_out).view_as(x)
        if self.sequence_capacity:
            y = y * served(logits.unflatten(0, x.shape[:2]), self.sequence_capacity).to(y.dtype)
        return y if self.shared is None else y + self.shared(x)

    def scores(self, tokens: Tensor) -> Tensor:
        """The router's logits [T, E] float32 of tokens [T, D]."""
        shift = None if self.router.bias is None else self.router.bias.float()
        return F.linear(tokens.float(), self.router.weight.float(), shift)


def served(logits: Tensor, capacity: int) -> Tensor:
    """1 where an expert takes a token, which is one of the first `capacity` in its sequence to choose it, else 0: [B, S, 1].

    logits: the router's, [B, S, E].
    """
    experts = torch.arange(logits.shape[-1], device=logits.device)
    chosen = (logits.argmax(-1, keepdim=True) == experts).to(torch.int64)
    return (chosen.cumsum(1) * chosen).sum(-1, keepdim=True) <= capacity


class Step:
    """What every layer of one forward pass shares.

    max_seq: S_max. cos, sin: `rope_tables`. prompt_lengths: see `rope_positions`. masked: with the masks, by window,
    which the projections alone do not need. relative_bias: of the model, if it has one. cross: by layer and kind, keys
    and values of the encoder's output, [B, Hkv, L, Dh]; source_lengths [B]: how many of them there are.
    """

    def __init__(
        self,
        config: ModelConfig,
        position_ids: Tensor,
        write_indices: Tensor,
        max_seq: int,
        cos: Tensor,
        sin: Tensor,
        *,
        prompt_lengths: Tensor | None = None,
        masked: bool = True,
        relative_bias: RelativeBias | None = None,
        cross: list[Tensor] | None = None,
        source_lengths: Tensor | None = None,
    ) -> None:
        self.write_indices = write_indices  # [B]
        self.cos, self.sin = cos, sin
        self.rope_positions = rope_positions(config, position_ids, prompt_lengths, max_seq)  # [B, S]
        self.query_scale = query_scale(config, position_ids)
        windows = dict.fromkeys(map(config.window, range(config.num_layers))) if masked else {}
        self.masks = {
            window: attention_mask(config, position_ids, max_seq, cos.dtype, window=window, relative_bias=relative_bias)
            for window in windows
        }
        self.cross = cross
        if cross is not None:
            assert source_lengths is not None
            self.cross_mask = source_mask(source_lengths, position_ids.shape[1], cross[0].shape[2])


def source_mask(lengths: Tensor, queries: int, keys: int) -> Tensor:
    """True for the first so many keys of each row: [B, 1, queries, keys]."""
    visible = torch.arange(keys, device=lengths.device) < lengths[:, None]
    return visible[:, None, None].expand(-1, -1, queries, -1)


class Layer(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer, each added to the residual stream, normalised again or not.

    In a parallel one both read the same norm of the stream as it came in. Where there is an encoder, attention to its output
    lies between the two.

    index: the layer's number, which decides whether it has experts, and a window.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn_norm, self.attn = norm(config), Attention(config, config.window(index))
        self.parallel = config.parallel
        if not config.parallel:
            self.ffn_norm = norm(config)
        self.ffn = "moe" if config.has_experts(index) else "mlp"  # the name under which its weights go
        self.add_module(self.ffn, MoE(config) if config.has_experts(index) else MLP(config, config.mlp_width))
        self.index, self.has_cross = index, bool(config.encoder_layers)
        if self.has_cross:
            self.cross_norm, self.cross = norm(config), CrossAttention(config)
        self.attn_post_norm = norm(config) if config.post_norms else nn.Identity()
        self.ffn_post_norm = norm(config) if config.post_norms else nn.Identity()
        self.has_extra = config.has_extra(index)
        if self.has_extra:
            self.extra_norm, self.extra_mlp = norm(config), MLP(config, config.mlp_width)

    def forward(self, x: Tensor, step: Step, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle, k, v = self.attend(x, step, past_k, past_v)
        return self.extra(self.feed_forward(self.attend_source(middle, step), x)), k, v

    def attend(self, x: Tensor, step: Step, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half, and the updated cache."""
        y, k, v = self.attn(self.attn_norm(x), step, past_k, past_v)
        return x + self.attn_post_norm(y), k, v

    def attend_source(self, middle: Tensor, step: Step) -> Tensor:
        """Attention to the encoder's output, where there is one."""
        if not self.has_cross:
            return middle
        assert step.cross is not None
        k, v = step.cross[2 * self.index : 2 * self.index + 2]
        return middle + self.cross(self.cross_norm(middle), k, v, step.cross_mask)

    def feed_forward(self, middle: Tensor, x: Tensor) -> Tensor:
        """The second half, up to the extra MLP; arguments: the stream after the first half, and before it."""
        return middle + self.ffn_post_norm(self.get_submodule(self.ffn)(self.ffn_input(middle, x)))

    def ffn_input(self, middle: Tensor, x: Tensor) -> Tensor:
        """What the feed-forward layer reads; arguments as of `feed_forward`."""
        return self.attn_norm(x) if self.parallel else self.ffn_norm(middle)

    def extra(self, x: Tensor) -> Tensor:
        """The MLP after the experts, in layers that have one."""
        return x + self.extra_mlp(self.extra_norm(x)) if self.has_extra else x


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """x times a number of the model's, in float32, which holds it better than narrower types do."""
    return x if multiplier == 1.0 else (x.float() * multiplier).to(x.dtype)


class Decoder(nn.Module):
    """A transformer decoder with a static-length KV cache; parameters carry the canonical names of ModelConfig.

    Args of `forward`:
        input_ids: [B, S] int64 tokens of this step.
        position_ids: [B, S] int64 absolute positions.
        write_indices: [B] int64 cache slot of each row's first new key.
        cache: 2L tensors [B, Hkv, S_max, Dh] in the activation dtype, k and v of each layer in turn; not modified.
        prompt_lengths: [B] int64, where the model has dynamic NTK and S_max is longer than what it was trained on.
        cross, source_lengths: where there is an encoder, what it returned, of any length L, and each row's length, [B] int64.

    Returns the logits, [B, 1, V] float32 of the last position ([B, S, V] with `all_logits`), then the updated cache tensors.
    """

    def __init__(self, config: ModelConfig, max_seq: int, *, all_logits: bool = False) -> None:
        super().__init__()
        config = config.within(max_seq)
        self.config, self.max_seq, self.all_logits = config, max_seq, all_logits
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = norm(config)
        self.relative_bias = None if config.relative_buckets is None else RelativeBias(config, both_sides=False)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size, bias=config.bias == "all")
        cos, sin = rope_tables(config, max_seq)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        cache: list[Tensor],
        prompt_lengths: Tensor | None = None,
        cross: list[Tensor] | None = None,
        source_lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        x = scaled(self.embed(input_ids), self.config.embed_multiplier)  # [B, S, D]
        cos, sin = self.rope_cos.to(x.dtype), self.rope_sin.to(x.dtype)
        lengths = None if prompt_lengths is None else prompt_lengths[:, None]
        step = Step(
            self.config,
            position_ids,
            write_indices,
            self.max_seq,
            cos,
            sin,
            prompt_lengths=lengths,
            relative_bias=self.relative_bias,
            cross=cross,
            source_lengths=source_lengths,
        )
        present: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, step, cache[2 * i], cache[2 * i + 1])
            present += [k, v]
        if not self.all_logits:
            x = x[:, -1:]
        x = self.norm(x)
        logits = F.linear(x, self.embed.weight) if self.config.tie_embeddings else self.lm_head(x)
        return scaled(logits.float(), self.config.logit_multiplier), *present

    def empty_cache(self, batch: int) -> list[Tensor]:
        """Zeroed cache tensors for `batch` rows."""
        config, weight = self.config, self.embed.weight
        shape = (batch, config.num_kv_heads, self.max_seq, config.head_dim)
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2 * config.num_layers)]
