"""`gatework::MoE` in PyTorch: it runs eagerly, traces with no data, and exports as one gatework::MoE node.

On CUDA tensors float16 and bfloat16 run by the GPU kernels, compiled when first needed; float32 by PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.launcher import Call, Launcher
from gatework.plugins.moe.spec import (
    DOMAIN,
    GLU_MATRICES,
    INPUTS,
    OP_TYPE,
    REQUIRED_INPUTS,
    VERSION,
    MoEAttributes,
    check_shapes,
)
from gatework.plugins.moe.workspace import layout

STORED = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
TINY = torch.finfo(torch.float32).tiny


def moe(
    x: Tensor,
    router_logits: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    attributes: MoEAttributes,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    w_in_scale: Tensor | None = None,
    w_out_scale: Tensor | None = None,
) -> Tensor:
    """y [T, D] in x's dtype; shapes and dtypes as in `spec`, the operation as in `reference`.

    Eager execution is not differentiable and takes dense weights only, but for the GPU kernels, which take every format, as
    tracing and export do.
    """
    return torch.ops.gatework.moe(
        x, router_logits, w_in, w_out, b_in, b_out, w_in_scale, w_out_scale, **attributes.to_dict()
    )


@torch.library.custom_op("gatework::moe", mutates_args=())
def _moe(
    x: Tensor,
    router_logits: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_in_scale: Tensor | None,
    w_out_scale: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    activation: str,
    glu: str,
    weight_format: str,
    group_size: int,
    capacity_factor: float,
    min_capacity: int,
    alpha: float,
    beta: float,
    limit: float,
    capacity_rule: str,
    second_threshold: float,
    keep_activations: bool,
) -> Tensor:
    routing = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize}
    routing |= {"capacity_factor": capacity_factor, "min_capacity": min_capacity}
    routing |= {"capacity_rule": capacity_rule, "second_threshold": second_threshold}
    expert = {"activation": activation, "glu": glu, "weight_format": weight_format, "group_size": group_size}
    expert |= {"alpha": alpha, "beta": beta, "limit": limit, "keep_activations": keep_activations}
    inputs = (x, router_logits, w_in, w_out, b_in, b_out, w_in_scale, w_out_scale)
    return _eager(dict(zip(INPUTS, inputs, strict=True)), MoEAttributes.from_dict(routing | expert))


def _eager(inputs: dict[str, Tensor | None], attributes: MoEAttributes) -> Tensor:
    """By PyTorch's own operations."""
    if attributes.weight_format != "dense":
        raise GateworkError(
            "PyTorch runs gatework::MoE with dense weights only",
            got=f"weight_format {attributes.weight_format}",
            fix="dequantise the weights first (gatework.plugins.moe.reference.dequantize)",
        )
    check_shapes(attributes, {name: None if value is None else value.shape for name, value in inputs.items()})
    x, router_logits, w_in, w_out, b_in, b_out, *_ = inputs.values()
    assert x is not None and router_logits is not None and w_in is not None and w_out is not None
    return _experts(x, router_logits, w_in, w_out, b_in, b_out, attributes)


@_moe.register_kernel("cuda")
def _moe_cuda(*inputs: Tensor | None, **settings: Any) -> Tensor:
    given, attributes = dict(zip(INPUTS, inputs, strict=True)), MoEAttributes.from_dict(settings)
    x = given["x"]
    assert x is not None
    return _eager(given, attributes) if x.dtype == torch.float32 else _kernels(given, attributes)


def _kernels(inputs: dict[str, Tensor | None], attributes: MoEAttributes) -> Tensor:
    """By the GPU kernels, on the current stream. Once a call of these sizes was made, a CUDA graph captures it."""
    sizes = check_shapes(attributes, {name: None if value is None else value.shape for name, value in inputs.items()})
    given = {name: value for name, value in inputs.items() if value is not None}
    x = given["x"]
    expected = dict.fromkeys(INPUTS, x.dtype)
    expected |= dict.fromkeys(("router_logits", "w_in_scale", "w_out_scale"), torch.float32)
    expected |= dict.fromkeys(("w_in", "w_out"), STORED.get(attributes.weight_format, x.dtype))
    for name, value in given.items():
        if value.dtype != expected[name] or value.device != x.device:
            got, want = f"{value.dtype} on {value.device}", f"{expected[name]} on {x.device}"
            raise GateworkError(f"MoE input {name} has the wrong type or place", got=got, expected=want)
        if not value.is_contiguous():
            raise GateworkError(f"MoE input {name} is not contiguous", fix=f"pass {name}.contiguous()")
    y, nbytes = torch.empty_like(x), layout(sizes, attributes, x.element_size()).total
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
    dtype: Literal["float16", "bfloat16"] = "float16" if x.dtype == torch.float16 else "bfloat16"
    addresses = {name: value.data_ptr() for name, value in given.items()}
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.device(x.device):
        call = Call(attributes, sizes, dtype, addresses, y.data_ptr(), workspace.data_ptr(), stream)
        _launcher(x.device.index)(call)
    return y


@cache
def _launcher(device: int) -> Launcher:
    """For a device that is the current one."""
    return Launcher(compiling=True)


@_moe.register_fake
def _(x: Tensor, *others: Any, **attributes: Any) -> Tensor:
    return torch.empty_like(x)


def route(router_logits: Tensor, attributes: MoEAttributes) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] int64 and their weights [T, K] float32; see `reference.route`."""
    logits = router_logits.float()
    # torch.topk leaves open which of two equal logits comes first; a stable sort does not.
    indices = logits.sort(dim=-1, descending=True, stable=True).indices[:, : attributes.top_k]
    scores = logits.softmax(dim=-1) if attributes.scoring == "softmax" else logits.sigmoid()
    weights = scores.gather(-1, indices)
    if attributes.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(TINY)
    if attributes.capacity_factor > 0:
        if attributes.capacity_rule == "gshard":
            weights = weights * _kept_gshard(indices, weights, logits.shape[1], attributes)
        else:
            weights = weights * kept(indices, logits.shape[1], attributes)
    return indices, weights


def kept(indices: Tensor, num_experts: int, attributes: MoEAttributes) -> Tensor:
    """Which choices [T, K] find a free slot; see `reference.kept`."""
    T, K = indices.shape
    chosen = F.one_hot(indices.T.reshape(K * T), num_experts)  # [K*T, E]: first choices, then second choices, ...
    slots = (chosen.cumsum(0) * chosen).sum(-1) - 1
    return (slots < attributes.capacity(T, num_experts)).view(K, T).T


def _kept_gshard(indices: Tensor, weights: Tensor, num_experts: int, attributes: MoEAttributes) -> Tensor:
    """See `reference.kept_gshard`."""
    capacity = attributes.capacity(len(indices), num_experts)
    first, second = F.one_hot(indices, num_experts).unbind(1)  # [T, E]
    first = first * (first.cumsum(0) <= capacity)
    second = second * (weights[:, 1:] > attributes.second_threshold)
    second = second * (second.cumsum(0) + first.sum(0) <= capacity)
    return torch.stack([first.sum(1), second.sum(1)], 1)


def _experts(
    x: Tensor,
    router_logits: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    attributes: MoEAttributes,
) -> Tensor:
    """Each expert once, over the tokens that chose it. Matrices in x's dtype, activation and sum in float32."""
    E, K = w_in.shape[0], attributes.top_k
    indices, weights = route(router_logits, attributes)
    chosen, order = indices.flatten().sort(stable=True)  # choices grouped by expert, in token order
    tokens, weights = order // K, weights.flatten()[order]
    counts = torch.bincount(chosen, minlength=E).tolist()
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    groups = zip(tokens.split(counts), weights.split(counts), strict=True)
    for e, (rows, weight) in enumerate(groups):
        if not len(rows):
            continue
        biases = (None if b is None else b[e] for b in (b_in, b_out))
        out = expert(x[rows], w_in[e], w_out[e], attributes, *biases)
        # No token occurs twice among an expert's rows, so the order of additions is that of the experts.
        y.index_add_(0, rows, weight[:, None] * out.float())
    return y.to(x.dtype)


def expert(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    attributes: MoEAttributes,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
) -> Tensor:
    """One expert's output [rows, D] in x's dtype: x [rows, D], w_in [G*I, D], w_out [D, I], b_in [G*I], b_out [D]."""
    return F.linear(hidden(x, w_in, attributes, b_in), w_out, b_out)


def hidden(x: Tensor, w_in: Tensor, attributes: MoEAttributes, b_in: Tensor | None = None) -> Tensor:
    """What an expert's second matrix reads, [rows, I] in x's dtype; arguments as of `expert`."""
    u = F.linear(x, w_in, b_in).float()
    h = _own_gates(u, attributes) if attributes.has_own_gates else gated(u, attributes.activation, attributes.glu)
    return h.to(x.dtype)


def _own_gates(u: Tensor, attributes: MoEAttributes) -> Tensor:
    """h [rows, I] from u [rows, 2 I]; see `reference.clamped_gate`."""
    gate, up = u.chunk(2, dim=-1)
    if limit := attributes.limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(attributes.alpha * gate) * (up + attributes.beta)


def gated(u: Tensor, activation: str, glu: str) -> Tensor:
    """h [..., I] from u [..., G*I]; see `MoEAttributes`."""
    act = ACTIVATIONS[activation]
    match u.chunk(GLU_MATRICES[glu], dim=-1):
        case [z]:
            return act(z)
        case [gate, up]:
            return act(gate) * up
        case [a, b, up]:
            return a * act(b) * up
    raise AssertionError(glu)


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


def onnx_translation() -> dict[Any, Callable[..., Any]]:
    """Entry for torch.onnx.export's `custom_translation_table`: one node, all attributes set. Registers the schema."""
    from onnxscript.values import Opset

    from gatework.plugins.moe import onnx_op

    onnx_op.register_schema()
    opset = Opset(DOMAIN, VERSION)

    def translate(*inputs: Any, **attributes: Any) -> Any:
        given = list(inputs)
        while len(given) > REQUIRED_INPUTS and given[-1] is None:
            given.pop()
        return getattr(opset, OP_TYPE)(*given, **MoEAttributes.from_dict(attributes).to_onnx())

    return {torch.ops.gatework.moe.default: translate}
