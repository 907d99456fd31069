"""The NumPy definition against transformers' own layers, and against per-token formulas where it has none."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from transformers import DbrxConfig, MixtralConfig, NllbMoeConfig, OlmoeConfig
from transformers.activations import ACT2FN
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeDenseActDense, NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import reference, torch_op
from gatework.plugins.moe.spec import CHOICES, MoEAttributes
from tests.plugins.moe_cases import Array, assert_close, gshard_grid, label, quantise, random_inputs

# The oracles compute in float32: sums of up to 100 terms in another order. Errors of meaning show at 1e-3 and more.
FLOAT32 = 2e-6
# Both sides in float64.
FLOAT64 = 1e-12


def random_parameters(module: nn.Module) -> nn.Module:
    """Large enough for routing far from uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().numpy()


def mixtral() -> tuple[nn.Module, dict[str, Array], MoEAttributes]:
    config = MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=5, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    block = random_parameters(MixtralSparseMoeBlock(config))
    weights = {"w_in": block.experts.gate_up_proj, "w_out": block.experts.down_proj, "router": block.gate.weight}
    return block, {k: numpy(v) for k, v in weights.items()}, MoEAttributes(top_k=3)


def olmoe() -> tuple[nn.Module, dict[str, Array], MoEAttributes]:
    """Softmax without renormalisation, as Grok-1's."""
    config = OlmoeConfig(
        hidden_size=24,
        intermediate_size=40,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        hidden_act="gelu",
    )
    config._experts_implementation = "eager"
    block = random_parameters(OlmoeSparseMoeBlock(config))
    weights = {"w_in": block.experts.gate_up_proj, "w_out": block.experts.down_proj, "router": block.gate.weight}
    attributes = MoEAttributes(top_k=2, renormalize=False, activation="gelu")
    return block, {k: numpy(v) for k, v in weights.items()}, attributes


def dbrx() -> tuple[nn.Module, dict[str, Array], MoEAttributes]:
    E, I, D = 16, 40, 24
    ffn = {"hidden_size": D, "ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": 4}
    config = DbrxConfig(d_model=D, n_heads=2, ffn_config=ffn)
    block = random_parameters(DbrxFFN(config))
    mlp = block.experts.mlp
    w1, v1, w2 = (numpy(w).reshape(E, I, D) for w in (mlp.w1, mlp.v1, mlp.w2))
    weights = {"w_in": np.concatenate([w1, v1], axis=1), "w_out": w2.transpose(0, 2, 1)}
    return block, weights | {"router": numpy(block.router.layer.weight)}, MoEAttributes(top_k=4)


@pytest.mark.parametrize("make", [mixtral, olmoe, dbrx])
@torch.inference_mode()
def test_equals_transformers(make: Any) -> None:
    block, weights, attributes = make()
    x = torch.randn(1, 33, 24, generator=torch.Generator().manual_seed(1))
    logits = numpy(x)[0] @ weights["router"].T
    y = reference.moe(numpy(x)[0], logits, weights["w_in"], weights["w_out"], attributes)
    assert_close(y, numpy(block(x))[0], FLOAT32)


@pytest.mark.parametrize("capacity", [2, 5, 8, 64])
@torch.inference_mode()
def test_equals_nllb_with_capacity(capacity: int) -> None:
    """Top-2 with slots, biases, ReLU: its router and its experts (its loop over them misreads the router's mask)."""
    E, D, I, T = 4, 24, 40, 33
    config = NllbMoeConfig(d_model=D, num_experts=E, expert_capacity=capacity, moe_eval_capacity_token_fraction=-1.0)
    config.normalize_router_prob_before_dropping = True
    router = random_parameters(NllbMoeTop2Router(config))
    experts = [random_parameters(NllbMoeDenseActDense(config, I)) for _ in range(E)]
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    _, gates, logits = router(x)
    want = sum(gates[:, e, None] * experts[e](x) for e in range(E))

    attributes = MoEAttributes(
        top_k=2, activation="relu", glu="none", capacity_factor=1e-6, min_capacity=capacity
    )  # the factor alone gives 0 slots
    indices, weights = reference.route(numpy(logits), attributes)
    got = np.zeros((T, E), np.float32)
    np.put_along_axis(got, indices, weights, axis=1)
    assert_close(got, numpy(gates), FLOAT32)
    np.testing.assert_array_equal(got != 0, numpy(gates) != 0)
    assert (weights == 0).any() == (capacity < 64), "the capacity must bind"

    parameters = {"w_in": "fc1.weight", "w_out": "fc2.weight", "b_in": "fc1.bias", "b_out": "fc2.bias"}
    stacked = {
        name: np.stack([numpy(expert.get_parameter(parameter)) for expert in experts])
        for name, parameter in parameters.items()
    }
    y = reference.moe(numpy(x), numpy(logits), attributes=attributes, **stacked)
    assert_close(y, numpy(want), FLOAT32)


def gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1 + np.tanh(0.7978845608028654 * z * (1 + 0.044715 * z * z)))


def test_grok_1_by_token() -> None:
    """Softmax over 8 in float32, two largest, no renormalisation; linear_1(gelu_tanh(linear x) * linear_v x)."""
    attributes = MoEAttributes(top_k=2, renormalize=False, activation="gelu_tanh")
    inputs = random_inputs(attributes, 33, E=8, I=20)
    x, logits = inputs["x"].astype(np.float64), inputs["router_logits"].astype(np.float64)
    want = np.zeros_like(x)
    for t, row in enumerate(logits):
        p = [math.exp(z) / sum(math.exp(other) for other in row) for z in row]
        for e in sorted(range(8), key=lambda e: -p[e])[:2]:
            linear, linear_v = inputs["w_in"][e, :20], inputs["w_in"][e, 20:]
            want[t] += p[e] * (inputs["w_out"][e] @ (gelu_tanh(linear @ x[t]) * (linear_v @ x[t])))
    assert_close(reference.moe(attributes=attributes, **inputs), want, 1e-6)  # the routing is in float32


def gshard_by_token(probabilities: Array, capacity: int, threshold: float) -> tuple[Array, int]:
    """Gates [T, E] of GShard's top-2 routing and how many choices it dropped, token by token, from softmax outputs [T, E].

    Written from the rule of Mesh TensorFlow's moe.py: the two best gates are divided by their sum; first choices fill their
    experts in order; then second choices that the policy lets through, counted from the first choices that found room.
    """
    gates, dropped = np.zeros_like(probabilities), 0
    used = [0] * probabilities.shape[1]
    pairs = []
    for row in probabilities:
        best = max(range(len(row)), key=lambda e: (row[e], -e))
        next_best = max((e for e in range(len(row)) if e != best), key=lambda e: (row[e], -e))
        total = row[best] + row[next_best] + 1e-9
        pairs.append(((best, row[best] / total), (next_best, row[next_best] / total)))
    for t, ((e, gate), _) in enumerate(pairs):
        if used[e] < capacity:
            gates[t, e] = gate
            used[e] += 1
        else:
            dropped += 1
    asked = list(used)  # a second choice that finds no room is counted all the same
    for t, (_, (e, gate)) in enumerate(pairs):
        if threshold >= 0 and not gate > threshold:
            continue
        if asked[e] < capacity:
            gates[t, e] = gate
        else:
            dropped += 1
        asked[e] += 1
    return gates, dropped


@pytest.mark.parametrize("attributes", gshard_grid(), ids=label)
@pytest.mark.parametrize("T", [1, 7, 33])
def test_gshard_by_token(attributes: MoEAttributes, T: int) -> None:
    inputs = random_inputs(attributes, T)
    inputs["router_logits"][:, 3] += 2  # a favourite, so that the capacity binds
    powers = np.exp(inputs["router_logits"].astype(np.float64))
    slots = max(4, min(T, int(T * attributes.capacity_factor / 5)))
    want, dropped = gshard_by_token(powers / powers.sum(1, keepdims=True), slots, attributes.second_threshold)
    assert dropped or T < 33, "the capacity must bind"

    got = np.zeros((T, 5), np.float32)
    indices, weights = reference.route(inputs["router_logits"], attributes)
    np.put_along_axis(got, indices, weights, axis=1)
    np.testing.assert_array_equal(got != 0, want != 0)
    assert_close(got, want, FLOAT32)

    eager = torch_op.moe(attributes=attributes, **{name: torch.from_numpy(value) for name, value in inputs.items()})
    assert_close(eager.numpy(), reference.moe(attributes=attributes, **inputs), FLOAT32)


def openmoe_by_token(inputs: dict[str, Array], capacity: int) -> tuple[Array, int]:
    """OpenMoE's PyTorch port, one token at a time: y, and the number of dropped choices."""
    x, logits, I = inputs["x"].astype(np.float64), inputs["router_logits"], inputs["w_out"].shape[2]
    y, dropped = np.zeros_like(x), 0
    used = [0] * logits.shape[1]
    best = logits.argmax(axis=1)
    rest = logits.copy()
    rest[np.arange(len(best)), best] = -np.inf
    for choices in (best, rest.argmax(axis=1)):  # all first choices before any second choice
        for t, e in enumerate(choices):
            used[e] += 1
            if used[e] > capacity:
                dropped += 1
                continue
            p = math.exp(logits[t, e]) / sum(math.exp(z) for z in logits[t])
            a, b, up = (inputs["w_in"][e, i * I : (i + 1) * I] @ x[t] for i in range(3))
            y[t] += p * (inputs["w_out"][e] @ (a * (b / (1 + np.exp(-b))) * up))
    return y, dropped


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("T", "capacity"), [(1, 4), (7, 4), (33, 16), (40, 20)])  # 8 experts: 2 * 2 * 33 / 8 = 16.5
def test_openmoe_by_token(T: int, capacity: int, seed: int) -> None:
    attributes = MoEAttributes(
        top_k=2, renormalize=False, activation="silu", glu="three_way", capacity_factor=2.0, min_capacity=4
    )
    inputs = random_inputs(attributes, T, E=8, I=20, seed=seed)
    inputs["router_logits"][:, 3] += 5  # a favourite, so that the capacity binds
    want, dropped = openmoe_by_token(inputs, capacity)
    assert (dropped > 0) == (T > 4)
    assert_close(reference.moe(attributes=attributes, **inputs), want, 1e-6)  # the routing is in float32


def test_softmax_then_top_k_then_renormalise_is_top_k_then_softmax() -> None:
    logits = random_inputs(MoEAttributes(top_k=3), 33)["router_logits"]
    indices, weights = reference.route(logits, MoEAttributes(top_k=3))
    chosen = np.take_along_axis(logits, indices, axis=1).astype(np.float64)
    assert_close(weights, np.exp(chosen) / np.exp(chosen).sum(axis=1, keepdims=True), FLOAT32)


@pytest.mark.parametrize("renormalize", [True, False])
def test_sigmoid_scores(renormalize: bool) -> None:
    logits = np.array([[0.5, -1.0, 2.0, 1.0]], np.float32)
    indices, weights = reference.route(logits, MoEAttributes(top_k=2, scoring="sigmoid", renormalize=renormalize))
    want = np.array([[1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))]])
    np.testing.assert_array_equal(indices, [[2, 3]])
    assert_close(weights, want / want.sum() if renormalize else want, FLOAT32)


def test_ties_go_to_the_lowest_index() -> None:
    logits = np.array([[1, 1, 1, 1, 1], [0, 2, 1, 2, 2], [3, -1, 3, 3, 0], [-0.0, 0.0, -1, 0.0, -2]], np.float32)
    indices, _ = reference.route(logits, MoEAttributes(top_k=3))
    np.testing.assert_array_equal(indices, [[0, 1, 2], [1, 3, 4], [0, 2, 3], [0, 1, 3]])


def test_scores_that_saturate_do_not_tie() -> None:
    """In float32 the sigmoids of 20 and 30 are both 1 and those of -200 and -300 both 0; the logits still rank them."""
    attributes = MoEAttributes(top_k=2, scoring="sigmoid")
    indices, weights = reference.route(np.array([[20, 30, 25], [-300, -200, -250]], np.float32), attributes)
    np.testing.assert_array_equal(indices, [[1, 2], [1, 2]])
    np.testing.assert_array_equal(weights, [[0.5, 0.5], [0, 0]])


@pytest.mark.parametrize("name", CHOICES["activation"])
def test_activations(name: str) -> None:
    z = np.concatenate([np.linspace(-30, 30, 601), [-1000, 1000]])
    want = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)](torch.from_numpy(z))
    assert_close(reference.ACTIVATIONS[name](z), want.numpy(), FLOAT64)
    assert reference.ACTIVATIONS[name](z.astype(np.float32)).dtype == np.float32


def test_int4_layout() -> None:
    np.testing.assert_array_equal(reference.pack_int4(np.array([-8, 7, 0, 1, -1])), [0xF0, 0x98, 0x87])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(reference.pack_int4(reference.unpack_int4(every)), every)
    with pytest.raises(GateworkError, match="-8 to 8"):
        reference.pack_int4(np.array([-8, 8]))


@pytest.mark.parametrize("columns", [16, 17, 24])
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("weight_format", ["fp8_e4m3", "int8", "int4"])
def test_dequantize_by_element(weight_format: Any, group_size: int, columns: int) -> None:
    attributes = MoEAttributes(top_k=1, weight_format=weight_format, group_size=group_size)
    w = np.random.default_rng(0).standard_normal((2, 3, columns), np.float32)
    q, scale = quantise(w, attributes)
    got = reference.dequantize(q, scale, attributes, columns=columns)
    assert got.dtype == np.float32
    for e, row, c in np.ndindex(got.shape):
        match weight_format:
            case "int4":
                value = float((int(q[e, row, c // 2]) >> (4 * (c % 2)) & 15) - 8)
            case "int8":
                value = float(q[e, row, c])
            case _:
                value = torch.tensor(q[e, row, c].view(np.uint8)).view(torch.float8_e4m3fn).item()
        factor = scale[e, row, c // group_size if group_size else 0]
        assert got[e, row, c] == np.float32(value) * factor
    step = {"int4": 1 / 14, "int8": 1 / 254, "fp8_e4m3": 1 / 28}[weight_format]  # half a step at the largest weight
    assert_close(got, w, 1.01 * step)


@pytest.mark.parametrize("weight_format", ["fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("group_size", [0, 8])
def test_quantised_is_dense_on_dequantised_weights(weight_format: Any, group_size: int) -> None:
    attributes = MoEAttributes(top_k=3, weight_format=weight_format, group_size=group_size)
    inputs = random_inputs(attributes, 7, bias=True)
    dense = {k: v for k, v in inputs.items() if not k.endswith("_scale")}
    for name, columns in (("w_in", 24), ("w_out", 17)):
        scale = inputs[f"{name}_scale"]
        dense[name] = reference.dequantize(inputs[name], scale, attributes, columns=columns, dtype=np.float64)
    want = reference.moe(attributes=MoEAttributes(top_k=3), **dense)
    assert_close(reference.moe(attributes=attributes, **inputs), want, FLOAT64)


@pytest.mark.parametrize("weight_format", CHOICES["weight_format"])
def test_no_tokens(weight_format: Any) -> None:
    attributes = MoEAttributes(top_k=3, weight_format=weight_format, capacity_factor=1.0)
    y = reference.moe(attributes=attributes, **random_inputs(attributes, 0, bias=True))
    assert y.shape == (0, 24)


def test_float32_accumulation_and_narrow_inputs() -> None:
    attributes = MoEAttributes(top_k=3)
    inputs = random_inputs(attributes, 33, bias=True)
    narrow = {k: v if k == "router_logits" else v.astype(ml_dtypes.bfloat16) for k, v in inputs.items()}
    want = reference.moe(attributes=attributes, **{k: v.astype(np.float32) for k, v in narrow.items()})
    assert want.dtype == np.float64
    got = reference.moe(attributes=attributes, accumulate=np.float32, **narrow)
    assert got.dtype == np.float32
    assert_close(got, want, FLOAT32)


def test_unfit_inputs_are_refused() -> None:
    attributes = MoEAttributes(top_k=3)
    inputs = random_inputs(attributes, 7)
    with pytest.raises(GateworkError, match=r"w_out.*expected \(5, 24, 17\)"):
        reference.moe(attributes=attributes, **inputs | {"w_out": inputs["w_out"].transpose(0, 2, 1)})
    with pytest.raises(GateworkError, match="router_logits"):
        reference.route(inputs["router_logits"], MoEAttributes(top_k=6))
    int8 = MoEAttributes(top_k=3, weight_format="int8")
    scales = {"w_in_scale": np.ones((5, 34, 1), np.float32), "w_out_scale": np.ones((5, 24, 1), np.float32)}
    with pytest.raises(GateworkError, match="int8 weights have the wrong dtype; got float32; expected int8"):
        reference.moe(attributes=int8, **inputs | scales)
