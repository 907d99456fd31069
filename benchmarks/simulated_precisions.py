"""How good a checkpoint is in the precisions that GPU engines have, simulated on the CPU.

    python benchmarks/simulated_precisions.py examples/tiny-mixtral --calibration-text examples/tiny-mixtral/calibration.txt \\
        --text examples/tiny-mixtral/heldout.txt

bf16 is the reference decoder in bfloat16. The others compute in float32 with exactly the weights, scales and rounded
activations of a TensorRT engine; what an engine rounds to bfloat16 in between is not rounded. Experts of fp8 and int8 round
their activations too, with a scale per token, in steps of many tokens: x to one code, and what the second matrix reads to two,
the second of what the first left. In steps of up to 16 tokens they do without, as do the rows
"few tokens"; int4 rounds no activation anywhere, nor does fp8 built with `--weight-only`, whose dense products have 16 bits.
"weights as they are" rounds activations alone. "by text" are weights that `gatework build --calibration-text` rounded with
knowledge of the calibration text, all of it.

First the simulation, without the rounding in experts, is compared with the graph that TensorRT gets, run by ONNX Runtime.
Perplexity is that of `gatework verify`. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from gatework.export.calibrate import calibrate
from gatework.export.calibration import Calibration, dense_products
from gatework.export.checkpoint import Checkpoint
from gatework.export.decoder import Decoder, MoE
from gatework.export.groups import GPU_GROUPS, fine, fit_group
from gatework.export.lower import WEIGHT_FORMATS, lower_to_tensorrt
from gatework.export.lower.experts import encode_expert, with_format
from gatework.export.lower.products import HEAD, LARGEST
from gatework.export.materialize import GRAPH, write_model
from gatework.export.onnx_export import add_function_body, trace
from gatework.export.options import BuildOptions
from gatework.export.quantize import dequantize_rows, quantize_fp8, quantize_int8_rows, quantize_rows
from gatework.export.reference import Reference, load_decoder
from gatework.export.rounded import RoundedCheckpoint
from gatework.export.smoothing import balance_columns, balance_norm, balanced_products
from gatework.export.tensorrt.scales import StaticScales
from gatework.plugins.moe import reference, torch_op
from gatework.plugins.moe.spec import MoEAttributes
from gatework.plugins.moe.workspace import FINER, HIDDEN_CODES
from gatework.runtime.tokenizer import load_tokenizer
from gatework.runtime.verify.compare import Comparison, Place
from gatework.runtime.verify.perplexity import WINDOW, negative_log_likelihood, perplexity, windows

CALIBRATION_TOKENS = 8192  # as many as `gatework calibrate` takes
ALPHA = 0.5  # SmoothQuant's
GROUP = GPU_GROUPS["int4"]
SIMULATED = ("fp8", "int8", "int8 smoothed", "int4")
AGREE = 1e-4  # mean KL of simulation and graph: codes that float32 puts on either side of a rounding boundary make 1e-6
WEIGHT_ONLY = "weight-only"
ROWS = (
    *("bf16", "fp8", "fp8, few tokens", "fp8, weight-only", "fp8, weights as they are"),
    *("fp8 by text", "fp8 by text, few tokens", "fp8 by text, weight-only"),
    *("int8", "int8, few tokens", "int8 smoothed", "int4", "int4 by text"),
)
Logits = Callable[[list[int]], np.ndarray]  # [S] -> [S, V]


def rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """x as codes of int8 or fp8 e4m3 spell it."""
    if kind == "int8":
        return (x / scale).round().clamp(-128, 127) * scale
    return (x / scale).clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn).float() * scale


class RoundedProducts(TorchFunctionMode):
    """While active, products `F.linear(x, weight)` with a weight of `by_weight` take what is kept for it instead.

    by_weight: id of the weight -> rounded weight, and the rounding of its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_weight: dict[int, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self.by_weight:
            weight, round_input = self.by_weight[id(args[1])]
            return F.linear(round_input(args[0]), weight)
        return func(*args, **(kwargs or {}))


class RoundedExperts(nn.Module):
    """Stands for the decoder's MoE: weights as `kind` stores them, or as they are, and activations rounded per token or not."""

    def __init__(self, moe: MoE, kind: str, round_activations: bool, round_weights: bool) -> None:
        super().__init__()
        self.kind, self.round_activations = kind, round_activations
        self.attributes, self.router = moe.attributes, moe.router
        stored = with_format(moe.attributes, WEIGHT_FORMATS[kind], GROUP)  # type: ignore[index]
        self.w_in, self.w_out = (
            torch.stack([expert_weight(part, stored) if round_weights else part for part in weight])
            for weight in (moe.w_in, moe.w_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [T, D]
        indices, weights = torch_op.route(F.linear(tokens, self.router.weight), self.attributes)  # [T, K]
        y, tokens = torch.zeros_like(tokens), self.round_tokens(tokens)
        for e, (w_in, w_out) in enumerate(zip(self.w_in, self.w_out, strict=True)):
            rows, choice = (indices == e).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[rows], w_in).chunk(2, dim=-1)
            h = self.round_tokens(F.silu(gate) * up, HIDDEN_CODES.get(WEIGHT_FORMATS[self.kind], 1))
            y.index_add_(0, rows, weights[rows, choice, None] * F.linear(h, w_out))
        return y.view_as(x)

    def round_tokens(self, x: Tensor, codes: int = 1) -> Tensor:
        """[tokens, D], each with the scale of its own range, as sums of so many codes."""
        if not self.round_activations:
            return x
        absmax = x.abs().amax(-1, keepdim=True)
        scale = torch.where(absmax == 0, 1.0, absmax) / LARGEST[self.kind]
        first = rounded(x, scale, self.kind)
        finer = scale / FINER if self.kind == "int8" else scale
        return first if codes == 1 else first + rounded(x - first, finer, self.kind)


def expert_weight(part: Tensor, stored: MoEAttributes) -> Tensor:
    """One expert's matrix [rows, columns], there and back."""
    codes, scales = encode_expert(part, stored)
    array = (
        codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) if codes.is_floating_point() else codes.numpy()
    )
    return torch.from_numpy(reference.dequantize(array, scales.numpy(), stored, columns=part.shape[1]))


def product_weight(name: str, w: Tensor, kind: str, dtype: torch.dtype, *, experts: bool) -> Tensor:
    """A dense product's weight [N, K], there and back; dtype: of the scales; experts: the model has some."""
    group = fit_group(w.shape[1], GROUP) if kind == "int4" and not fine(name, experts=experts) else None
    if group is not None:
        codes, scales = quantize_rows(w, 4, group, dtype, positive=True)
        return dequantize_rows(codes, scales.float(), 4, w.shape[1])
    codes, scales = quantize_fp8(w, w.abs().max(), dtype) if kind == "fp8" else quantize_int8_rows(w, dtype)
    return codes.float() * scales.float().reshape(-1, 1)


def simulate(
    checkpoint: Checkpoint,
    row: str,
    calibration: Calibration,
    dtype: torch.dtype,
    *,
    round_experts: bool,
    rounded_by_text: RoundedCheckpoint | None = None,
) -> Logits:
    """The reference decoder with rounded weights and activations; dtype: of norms, embedding table and dense scales."""
    kind, config = row.split()[0].rstrip(","), checkpoint.config
    decoder = load_decoder(checkpoint, WINDOW, all_logits=True)
    if rounded_by_text is not None:
        for name in rounded_by_text.rounder.grids:
            weight = decoder.get_parameter(name)
            weight.copy_(torch.stack([*rounded_by_text.parts(name)]).view_as(weight))
    mode, scales = RoundedProducts(), StaticScales(checkpoint, calibration)
    columns = {}
    for norm, names in balanced_products(config).items():
        if norm in calibration.smooth:
            decoder.get_parameter(norm).copy_(balance_norm(decoder.get_parameter(norm), calibration.smooth[norm]))
            columns |= dict.fromkeys(names, calibration.smooth[norm])
    for name in dense_products(config):
        if kind == "fp8" and (WEIGHT_ONLY in row or fine(name, experts=config.moe is not None)):
            continue
        weight = decoder.get_parameter("embed.weight" if name == HEAD and config.tie_embeddings else name)
        w = balance_columns(weight, columns[name]) if name in columns else weight
        mode.by_weight[id(weight)] = (
            product_weight(name, w, kind, dtype, experts=config.moe is not None),
            input_rounding(name, kind, scales, dtype),
        )
    for layer in decoder.layers:
        if config.moe is not None:
            moe: Any = layer.get_submodule("moe")
            layer.add_module("moe", RoundedExperts(moe, kind, round_experts, "weights as they are" not in row))
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1 or name == "embed.weight":
            parameter.copy_(parameter.to(dtype))
    return run(decoder, mode)


def input_rounding(name: str, kind: str, scales: StaticScales, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What a product's input goes through: rounding with its static scale, or nothing."""
    if kind not in LARGEST:
        return lambda x: x
    scale = torch.tensor(scales.activation(name, LARGEST[kind])).to(dtype).float()
    return lambda x: rounded(x, scale, kind)


def run(decoder: Decoder, mode: Any = None) -> Logits:
    answers = Reference(decoder)

    def logits(ids: list[int]) -> np.ndarray:
        with mode or nullcontext():
            return answers.logits(ids)

    return logits


def lowered_graph(checkpoint: Checkpoint, row: str, calibration: Calibration, folder: Path) -> Logits:
    """The graph that TensorRT gets, in float32, on ONNX Runtime."""
    kind: Any = row.split()[0]
    model = trace(checkpoint.config, WINDOW, all_logits=True)
    scales = StaticScales(checkpoint, calibration)
    model = lower_to_tensorrt(model, kind, group=GROUP if kind == "int4" else 0, scales=scales)
    add_function_body(model)
    write_model(model, checkpoint, folder)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((1, *i.shape[1:]), np.float32) for i in session.get_inputs() if i.name.startswith("past.")}

    def logits(ids: list[int]) -> np.ndarray:
        steps = {"input_ids": np.array([ids]), "position_ids": np.arange(len(ids))[None]}
        return session.run(["logits"], past | steps | {"write_indices": np.zeros(1, np.int64)})[0][0]

    return logits


@dataclass(slots=True)
class Measure:
    """A model beside the reference."""

    rows: Comparison = field(default_factory=Comparison)
    losses: list[float] = field(default_factory=list)

    def result(self, reference_perplexity: float | None) -> dict[str, float]:
        found = perplexity(self.losses)
        change = found / reference_perplexity - 1 if reference_perplexity is not None else 0.0
        return {
            "perplexity": round(found, 4),
            "change": round(change, 6),
            "mean_kl": float(f"{np.mean(self.rows.kl):.3g}"),
            "top1": round(float(np.mean(self.rows.top1)), 5),
        }


def measure(want: Logits, got: Logits, parts: Iterable[list[int]], name: str) -> Measure:
    """Run both over windows of token ids."""
    found = Measure()
    for ids in tqdm(list(parts), desc=name, leave=False):
        logits = got(ids)
        found.rows.add(want(ids), logits, [Place(at, name) for at in range(len(ids))])
        found.losses += negative_log_likelihood(logits[:-1], ids[1:]).tolist()
    return found


def check(checkpoint: Checkpoint, calibrations: dict[str, Calibration], parts: list[list[int]]) -> dict[str, float]:
    """Mean KL between the lowered graphs and the simulation without rounding in experts, both with float32 scales."""
    found = {}
    for row in SIMULATED:
        with tempfile.TemporaryDirectory() as scratch:
            graph = lowered_graph(checkpoint, row, calibrations[row], Path(scratch))
            ours = simulate(checkpoint, row, calibrations[row], torch.float32, round_experts=False)
            found[row] = float(f"{np.mean(measure(graph, ours, parts, f'check {row}').rows.kl):.3g}")
            assert found[row] <= AGREE, f"{row}: mean KL {found[row]} between simulation and lowered graph"
    return found


def encode(checkpoint: Checkpoint, text: Path) -> list[int]:
    tokenizer = load_tokenizer(checkpoint.path)
    assert tokenizer is not None, f"{checkpoint.path} has no tokenizer"
    return tokenizer.encode(text.read_text(encoding="utf-8"))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration-text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, metavar="N", help="of 256 tokens, from the text's start (default: all)")
    parser.add_argument("--rows", default="", metavar="WORD", help="only those whose names hold it (default: all)")
    args = parser.parse_args()

    checkpoint = Checkpoint.open(args.checkpoint)
    text_ids = encode(checkpoint, args.calibration_text)
    calibration_ids = text_ids[:CALIBRATION_TOKENS]
    plain, smoothed = (calibrate(checkpoint, calibration_ids, smooth=alpha) for alpha in (None, ALPHA))
    calibrations = {row: smoothed if "smoothed" in row else plain for row in ROWS}
    parts = windows(encode(checkpoint, args.text))[: args.windows]
    checked = check(checkpoint, calibrations, parts[:2])
    print("mean KL between simulation and lowered graph:", ", ".join(f"{row} {kl:g}" for row, kl in checked.items()))

    want = run(load_decoder(checkpoint, WINDOW, all_logits=True))
    base = perplexity([loss for ids in parts for loss in negative_log_likelihood(want(ids)[:-1], ids[1:])])
    results = {"reference": {"perplexity": round(base, 4), "change": 0.0, "mean_kl": 0.0, "top1": 1.0}}
    print(f"{'':28}{'perplexity':>10}{'change':>9}{'mean KL':>10}{'top-1':>8}")
    print(f"{'reference, float32':28}{base:10.4f}")
    for row in (row for row in ROWS if args.rows in row):
        if row == "bf16":
            got = run(load_decoder(checkpoint, WINDOW, dtype=torch.bfloat16, all_logits=True))
        else:
            bare, by_text = "few tokens" in row or WEIGHT_ONLY in row or row.startswith("int4"), None
            if "by text" in row:
                options = BuildOptions(target="h100", precision=row.split()[0])
                by_text = RoundedCheckpoint.of(checkpoint, options, text_ids)
            scales = {"round_experts": not bare, "rounded_by_text": by_text}
            got = simulate(checkpoint, row, calibrations[row], torch.bfloat16, **scales)  # type: ignore[arg-type]
        found = results[row] = measure(want, got, parts, row).result(base)
        print(f"{row:28}{found['perplexity']:10.4f}{found['change']:9.2%}{found['mean_kl']:10.2g}{found['top1']:8.2%}")
    facts = {"checkpoint": args.checkpoint.name, "scored": sum(len(ids) - 1 for ids in parts), "check_mean_kl": checked}
    print(json.dumps(facts | {"results": results}))


if __name__ == "__main__":
    main()
