"""An oracle for quantised graphs: transformers' own model with rounded weights and activations.

The rounding is written out here from its formulas, w = q * scale and x -> clamp(round(x / scale)) * scale with ties to even,
and shares no code with what it judges.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatework.export.calibration import Calibration
from gatework.export.checkpoint import Checkpoint
from tests.checkpoints import reference_model

Precision = Literal["bf16", "fp8", "int8", "int4"]
LARGEST = {"fp8": 448.0, "int8": 127.0}  # the code of the largest magnitude

# transformers' linear layers, by the end of their names, and the canonical weights that they hold.
LINEARS = {
    "q_proj": ("attn.q.weight",),
    "k_proj": ("attn.k.weight",),
    "v_proj": ("attn.v.weight",),
    "Wqkv": ("attn.q.weight", "attn.k.weight", "attn.v.weight"),
    "o_proj": ("attn.o.weight",),
    "out_proj": ("attn.o.weight",),
    "mlp.gate_proj": ("mlp.w_in",),
    "mlp.up_proj": ("mlp.w_in",),
    "mlp.down_proj": ("mlp.w_out",),
    "self_attn.dense": ("attn.o.weight",),
    "mlp.fc1": ("mlp.w_in",),
    "mlp.fc2": ("mlp.w_out",),
    "shared_expert.gate_proj": ("moe.shared.w_in",),
    "shared_expert.up_proj": ("moe.shared.w_in",),
    "shared_expert.down_proj": ("moe.shared.w_out",),
    "ffn.up_proj": ("mlp.w_in",),
    "ffn.down_proj": ("mlp.w_out",),
}
NORMS = {"attn.q.weight": "attn_norm", "attn.k.weight": "attn_norm", "attn.v.weight": "attn_norm"}
NORMS |= {"mlp.w_in": "ffn_norm"}  # whose output a product reads


def round_to(x: Tensor, scale: Tensor, precision: Precision) -> Tensor:
    """x as codes of fp8 or int8 spell it; beyond the largest code they saturate."""
    if precision == "int8":
        return (x / scale).round().clamp(-128, 127) * scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_rows(w: Tensor, precision: Precision) -> Tensor:
    """Weights [..., K] with a scale per row."""
    absmax = w.abs().amax(-1, keepdim=True)
    return round_to(w, torch.where(absmax > 0, absmax, 1.0) / LARGEST[precision], precision)


def round_groups(w: Tensor, group: int, *, positive: bool) -> Tensor:
    """Weights [..., K] in 4 bits, codes -8 to 7, with a scale per `group` neighbours, the last ones padded with zeros.

    Of the scale that puts the largest weight on -8, whatever its sign, or, where scales have to be positive, on 7 or -7, and
    of six that clip, down to 0.7 of it, the one with the least squared error is taken.
    """
    K = w.shape[-1]
    parts = F.pad(w, (0, -K % group)).unflatten(-1, (-1, group))
    peak = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    widest = torch.where(peak == 0, 1.0, peak.abs() / 7 if positive else peak / -8)
    scales = [widest * share for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)]
    tries = torch.stack([(parts / scale).round().clamp(-8, 7) * scale for scale in scales])
    best = (tries - parts).double().square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return tries.gather(0, best.expand(1, *parts.shape))[0].flatten(-2)[..., :K]


class FakeQuantised:
    """transformers' float32 model of a checkpoint in a precision; experts' activations are not rounded.

    group: of int4. calibration: of int8 and fp8, with SmoothQuant's factors if it has any. weight_only: of fp8: experts alone.
    errors: by product, the largest difference from `known` inputs, over the largest magnitude of the input.
    """

    def __init__(
        self,
        path: Path,
        precision: Precision,
        *,
        group: int = 0,
        calibration: Calibration | None = None,
        weight_only: bool = False,
    ) -> None:
        self.model, self.precision, self.group, self.calibration = reference_model(path), precision, group, calibration
        self.weight_only = weight_only
        self.has_experts = Checkpoint.open(path).config.moe is not None
        self.known: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}
        if precision != "bf16":
            with torch.no_grad():
                self._round_experts()
                self._round_products()

    @torch.inference_mode()
    def logits(self, ids: Tensor, known: dict[str, Tensor]) -> Tensor:
        """Logits [B, S, V] of sequences [B, S] that start from an empty cache.

        `known` [B, S, D], by product, are a graph's inputs of the same products before rounding, NaN where it has none. They
        are compared with the oracle's and then taken in their place: so both round the same numbers, and one that float32
        puts on either side of a rounding boundary is no difference that layers behind it could amplify.
        """
        self.known = known
        return self.model(ids).logits

    def spared(self, name: str) -> bool:
        """Whether a dense product has 8 bits under int4, and is not rounded under fp8."""
        return name == "lm_head.weight" or (".attn." in name and self.has_experts)

    def kept(self, name: str) -> bool:
        """Whether a dense product is not rounded at all."""
        return self.precision == "fp8" and (self.weight_only or self.spared(name))

    def _round_products(self) -> None:
        places: dict[str, list[Tensor]] = defaultdict(list)  # by canonical name, the rows that hold it
        for path, module in list(self.model.named_modules()):
            names = canonical(path)
            if not names:
                continue
            module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)  # tied ones part
            rows = [self._rows(name) for name in names] if len(names) > 1 else [len(module.weight)]
            for name, part in zip(names, module.weight.split(rows), strict=True):
                places[name].append(part)
            if self.precision != "int4" and not self.kept(names[0]):
                module.register_forward_pre_hook(partial(self._round_input, names))
        for name, parts in places.items():
            factors = self._factors(name)
            balanced = [part if factors is None else part * factors for part in parts]
            absmax = torch.stack([w.abs().max() for w in balanced]).max()
            for part, w in zip(parts, balanced, strict=True):
                part.copy_(self._rounded(name, w, absmax))

    def _rounded(self, name: str, w: Tensor, absmax: Tensor) -> Tensor:
        """Rows of a dense weight; absmax: of the whole weight."""
        if self.kept(name):
            return w
        if self.precision == "fp8":
            return round_to(w, absmax / LARGEST["fp8"], "fp8")
        group = next((size for size in (128, 64, 32, 16) if size <= self.group and w.shape[1] % size == 0), None)
        if self.precision == "int8" or self.spared(name) or group is None:
            return round_rows(w, "int8")
        return round_groups(w, group, positive=True)

    def _round_experts(self) -> None:
        for name, weight in self.model.named_parameters():
            if self.model.config.model_type == "gpt_oss" and weight.dim() == 3:  # [E, in, out]
                weight.copy_(self._rounded_expert(weight.mT).mT)
            elif name.endswith(("gate_up_proj", "down_proj", "mlp.w1", "mlp.v1")):  # [E, out, in] or [E * out, in]
                weight.copy_(self._rounded_expert(weight))
            elif name.endswith("mlp.w2"):  # [E * in, out]
                by_expert = weight.unflatten(0, (self.model.config.ffn_config.moe_num_experts, -1)).mT
                weight.copy_(self._rounded_expert(by_expert).mT.flatten(0, 1))

    def _rounded_expert(self, w: Tensor) -> Tensor:
        if self.precision == "int4":
            return round_groups(w, self.group, positive=False)
        return round_rows(w, self.precision)

    def _round_input(self, names: list[str], module: nn.Module, args: tuple[Tensor]) -> Tensor:
        assert self.calibration is not None
        (x,), factors = args, self._factors(names[0])
        x = x if factors is None else x / factors
        for name in names:
            known = self.known[name].view_as(x)
            there = known.isfinite()
            assert there.any(), name
            self.errors[name] = ((x - known)[there].abs().max() / x.abs().max()).item()
        scale = torch.tensor(self.calibration.ranges[names[0]].absmax / LARGEST[self.precision])
        return round_to(torch.where(there, known, x), scale, self.precision)

    def _factors(self, name: str) -> Tensor | None:
        """What divides the input of a product, and multiplies the columns of its weight."""
        match = re.fullmatch(r"(layers\.\d+\.)(.*)", name)
        norm = NORMS.get(match[2]) if match else None
        if norm == "ffn_norm" and self.model.config.model_type == "phi":
            norm = "attn_norm"  # attention and MLP read one norm
        norm = f"{match[1]}{norm}.weight" if match else "norm.weight"
        found: Any = self.calibration.smooth.get(norm) if self.calibration is not None else None
        return None if found is None else torch.tensor(found)

    def _rows(self, name: str) -> int:
        """Rows of q, k or v in a fused matrix, DBRX's or MPT's."""
        config = self.model.config
        if config.model_type == "mpt":
            return config.d_model
        heads = config.n_heads if ".attn.q." in name else config.attn_config.kv_n_heads
        return heads * config.d_model // config.n_heads


def canonical(module: str) -> list[str]:
    """Canonical names of the dense weights in one of transformers' modules."""
    if module == "lm_head":
        return ["lm_head.weight"]
    layer = re.search(r"\.(\d+)\.", module)
    endings = [names for end, names in LINEARS.items() if layer and module.endswith(end)]
    return [f"layers.{layer[1]}.{name}" for names in endings for name in names] if layer else []
