"""`gatework::MoE` in TensorRT: what the real parser and builder make of it, what is refused, and with which words."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.launcher import Call
from gatework.plugins.moe.spec import INPUTS, MoEAttributes, MoESizes
from gatework.plugins.moe.tensorrt import NODE_ATTRIBUTES, MoECreator, input_names, register
from gatework.plugins.moe.workspace import layout
from gatework.plugins.tensorrt_module import load_toolchain

if find_spec("tensorrt_rtx") is None:
    pytest.skip("no tensorrt_rtx: the MoE plugin meets no real parser and builder", allow_module_level=True)

pytestmark = pytest.mark.tensorrt

trt = load_toolchain("tensorrt_rtx")
LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)
D, E, I = 32, 4, 17
PROFILE = {"x": [(1, D), (8, D), (64, D)], "router_logits": [(1, E), (8, E), (64, E)]}
FULL = MoEAttributes(
    top_k=3,
    scoring="sigmoid",
    renormalize=False,
    activation="gelu_tanh",
    glu="three_way",
    weight_format="int4",
    group_size=8,
    capacity_factor=1.25,
    min_capacity=4,
)
SHAPES = {
    "x": ("T", D),
    "router_logits": ("T", E),
    "w_in": (E, 2 * I, D),
    "w_out": (E, D, I),
    "b_in": (E, 2 * I),
    "b_out": (E, D),
    "w_in_scale": (E, 2 * I, 1),
    "w_out_scale": (E, D, 1),
}
INT4_SHAPES = {"w_in": (E, 2 * I, D // 2), "w_out": (E, D, 9)}
STORED = {"fp8_e4m3": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8, "int4": TensorProto.INT8}

# All that is legal, one letter per input and the output: A the activation type, F FLOAT, 8 FP8, I INT8.
LEGAL = {
    ("dense", False): "AFAA A",
    ("dense", True): "AFAAAA A",
    ("fp8_e4m3", False): "AF88FF A",
    ("fp8_e4m3", True): "AF88AAFF A",
    ("int8", False): "AFIIFF A",
    ("int8", True): "AFIIAAFF A",
    ("int4", False): "AFIIFF A",
    ("int4", True): "AFIIAAFF A",
}


@pytest.fixture
def creator() -> MoECreator:
    return register(trt)


def model(
    weight_format: str = "dense",
    activation: int = TensorProto.BFLOAT16,
    *,
    has_bias: bool = False,
    names: tuple[str, ...] | None = None,
    types: dict[str, int] | None = None,
    shapes: dict[str, tuple[Any, ...]] | None = None,
    **attributes: Any,
) -> bytes:
    """One MoE node, legal but for what the last four say."""
    settings = MoEAttributes(top_k=2, weight_format=weight_format)  # type: ignore[arg-type]
    names = names or input_names(settings, has_bias=has_bias)
    all_types = dict.fromkeys(INPUTS, activation)
    all_types |= dict.fromkeys(("router_logits", "w_in_scale", "w_out_scale"), TensorProto.FLOAT)
    all_types |= dict.fromkeys(("w_in", "w_out"), STORED.get(weight_format, activation)) | (types or {})
    all_shapes = SHAPES | (INT4_SHAPES if weight_format == "int4" else {}) | (shapes or {})
    values = settings.to_onnx() | NODE_ATTRIBUTES | attributes
    node = helper.make_node("MoE", names, ["y"], name="layers.0.moe", domain="gatework", **values)
    inputs = [helper.make_tensor_value_info(name, all_types[name], all_shapes[name]) for name in names]
    graph = helper.make_graph([node], "moe", inputs, [helper.make_tensor_value_info("y", activation, ("T", D))])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("gatework", 1)]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()


def build(onnx_model: bytes, capability: str = "SM80", profile_shapes: dict[str, Any] = PROFILE) -> tuple[Any, Any]:
    """The parsed network and the plan, either None when TensorRT refuses."""
    builder = trt.Builder(LOGGER)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, LOGGER)
    if not parser.parse(onnx_model):
        return None, None
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in profile_shapes.items():
        profile.set_shape(name, low, best, high)
    config.add_optimization_profile(profile)
    return network, builder.build_serialized_network(network, config)


def description(data_type: Any, tensor_format: Any = trt.TensorFormat.LINEAR, dims: tuple[int, ...] = ()) -> Any:
    result = trt.DynamicPluginTensorDesc()
    result.desc.type, result.desc.format = data_type, tensor_format
    result.min = result.max = result.desc.dims = dims
    return result


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ["BFLOAT16", "FLOAT16"])
@pytest.mark.parametrize("weight_format", ["dense", "fp8_e4m3", "int8", "int4"])
def test_builds_a_plan(creator: MoECreator, weight_format: str, activation: str, has_bias: bool) -> None:
    onnx_model = model(weight_format, getattr(TensorProto, activation), has_bias=has_bias)
    with creator.raising_errors():
        network, plan = build(onnx_model, "SM89" if weight_format == "fp8_e4m3" else "SM80")  # SM80 has no fp8
    assert [network.get_layer(i).type for i in range(network.num_layers)] == [trt.LayerType.PLUGIN_V3]
    tensor = network.get_output(0)
    assert tensor.dtype == {"BFLOAT16": trt.DataType.BF16, "FLOAT16": trt.DataType.HALF}[activation]
    assert tuple(tensor.shape) == (-1, D)
    stored = bytes(plan)
    assert weight_format.encode() in stored
    assert b"capacity_factor" in stored
    assert b"keep_activations" in stored


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": TensorProto.FLOAT}, "input x has the wrong type; got FLOAT; expected HALF or BF16"),
        ({"types": {"w_out": TensorProto.FLOAT16}}, "input w_out has the wrong type; got HALF; expected BF16"),
        ({"types": {"router_logits": TensorProto.BFLOAT16}}, "input router_logits .* got BF16; expected FLOAT"),
        ({"weight_format": "int8", "types": {"w_in": TensorProto.FLOAT8E4M3FN}}, "w_in .* got FP8; expected INT8"),
        ({"weight_format": "int4", "types": {"w_in": TensorProto.UINT8}}, "w_in .* got UINT8; expected INT8"),
        ({"names": INPUTS[:5]}, "number of inputs; got 5; expected 4 or 6 with weight_format dense"),
        ({"scoring": "entmax"}, "unknown MoE scoring; got 'entmax'; expected softmax or sigmoid"),
        ({"scoring": 1}, "unknown MoE scoring; got 1; "),
        ({"top_k": 2.0}, "top_k is out of range; got 2.0"),
        ({"top_k": [2, 2]}, r"top_k is out of range; got \[2, 2\]"),
        ({"renormalize": 2}, "renormalize is not a flag; got 2"),
        ({"shapes": {"w_out": (E, D, I + 1)}}, r"w_out has the wrong shape; got \(4, 32, 18\); expected \(4, 32, 17\)"),
        ({"top_k": 5}, "top_k exceeds the number of experts; got 5; expected 1 to 4"),
    ],
)
def test_refusals_reach_the_user(creator: MoECreator, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GateworkError, match=rf"^layers\.0\.moe: .*{words}"), creator.raising_errors():
        build(model(**changes))


def test_shapes_are_checked_over_the_whole_profile(creator: MoECreator) -> None:
    profile = PROFILE | {"router_logits": [(1, E), (8, E), (65, E)]}
    with (
        pytest.raises(GateworkError, match=r"router_logits .* got \(65, 4\); expected \(64, 4\)"),
        creator.raising_errors(),
    ):
        build(model(shapes={"router_logits": ("R", E)}), profile_shapes=profile)


def test_an_error_is_raised_once(creator: MoECreator) -> None:
    with pytest.raises(GateworkError), creator.raising_errors():
        build(model(scoring="entmax"))
    with creator.raising_errors():
        assert build(model())[1] is not None


def test_attributes_left_out_take_their_defaults(creator: MoECreator) -> None:
    assert create(creator, top_k=2).attributes == MoEAttributes(top_k=2)


def test_unknown_fields_are_refused(creator: MoECreator) -> None:
    with pytest.raises(GateworkError, match="unknown MoE attribute; got topk"):
        create(creator, topk=2)


def fields_of(values: dict[str, Any]) -> list[Any]:
    """As the parser makes them. A PluginFieldCollection does not keep its fields' memory: keep this list."""
    kinds = trt.PluginFieldType
    fields = []
    for name, value in values.items():
        if isinstance(value, str):
            fields.append(trt.PluginField(name, np.frombuffer(value.encode() + b"\0", np.int8), kinds.CHAR))
        elif isinstance(value, float):
            fields.append(trt.PluginField(name, np.array([value], np.float32), kinds.FLOAT32))
        else:
            fields.append(trt.PluginField(name, np.array([value], np.int32), kinds.INT32))
    return fields


def create(creator: MoECreator, **values: Any) -> Any:
    fields = fields_of(values)
    return creator.create_plugin("moe", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


KEPT = MoEAttributes(top_k=1, weight_format="fp8_e4m3", keep_activations=True)


@pytest.mark.parametrize("attributes", [FULL, KEPT, MoEAttributes(top_k=1)])
def test_fields_and_clones_keep_everything(creator: MoECreator, attributes: MoEAttributes) -> None:
    built = create(creator, **attributes.to_onnx())
    written = built.get_fields_to_serialize()
    gc.collect()
    plugin = creator.create_plugin("moe", written, trt.TensorRTPhase.RUNTIME)
    plugin.sizes = MoESizes(1, 2, 3, 4)
    for copy in (plugin, plugin.clone(), plugin.attach_to_context(None)):
        assert (copy.creator, copy.node, copy.attributes, copy.sizes) == (creator, "moe", attributes, plugin.sizes)
        assert (copy.plugin_name, copy.plugin_version, copy.plugin_namespace) == ("MoE", "1", "gatework")
        assert copy.num_outputs == 1
    assert {field.name for field in creator.field_names} == set(attributes.to_dict())


@pytest.mark.parametrize(("weight_format", "has_bias"), LEGAL)
def test_exactly_the_legal_formats_are_supported(creator: MoECreator, weight_format: str, has_bias: bool) -> None:
    pattern = LEGAL[weight_format, has_bias].replace(" ", "")
    names = {"F": "FLOAT", "8": "FP8", "I": "INT8"}
    expected = {
        tuple((names.get(letter, activation), "LINEAR") for letter in pattern) for activation in ("HALF", "BF16")
    }
    plugin = create(creator, top_k=2, weight_format=weight_format)
    every = list(product(trt.DataType.__members__, trt.TensorFormat.__members__))
    supported: set[tuple[tuple[str, str], ...]] = {()}
    for pos in range(len(pattern)):  # the plugin gets no entry after `pos`
        supported = {
            (*before, last)
            for before, last in product(supported, every)
            if plugin.supports_format_combination(pos, descriptions((*before, last)), len(pattern) - 1)
        }
    assert supported == expected


def descriptions(entries: tuple[tuple[str, str], ...]) -> list[Any]:
    return [description(trt.DataType.__members__[t], trt.TensorFormat.__members__[f]) for t, f in entries]


def test_workspace_is_that_of_the_most_tokens(creator: MoECreator) -> None:
    shapes = [(48, D), (48, E), (E, 2 * I, D), (E, D, I)]
    inputs = [description(trt.DataType.HALF, dims=shape) for shape in shapes]
    for entry in inputs[:2]:
        entry.min = (1, entry.max[1])
    most = layout(MoESizes(48, D, E, I), MoEAttributes(top_k=2), 2)
    assert create(creator, top_k=2).get_workspace_size(inputs, []) == most.total


def run(plugin: Any, half: bool) -> None:
    shapes = [(5, D), (5, E), (E, 2 * I, D), (E, D, I)]
    types = trt.DataType
    activation = types.HALF if half else types.BF16
    inputs = [description(types.FLOAT if i == 1 else activation, dims=shape).desc for i, shape in enumerate(shapes)]
    plugin.on_shape_change(inputs, inputs[:1])
    plugin.enqueue(inputs, inputs[:1], [16, 32, 48, 64], [80], 96, 7)


def test_without_kernels_running_fails(creator: MoECreator) -> None:
    plugin = create(creator, top_k=2)
    match = "^moe: the plugin gatework::MoE has no kernels to launch"
    with pytest.raises(GateworkError, match=match), creator.raising_errors():
        run(plugin, half=True)


@pytest.mark.parametrize("half", [True, False])
def test_the_launcher_gets_the_call(creator: MoECreator, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    calls: list[Call] = []
    monkeypatch.setattr(creator, "launcher", calls.append)
    run(create(creator, top_k=2).clone(), half)
    inputs = {"x": 16, "router_logits": 32, "w_in": 48, "w_out": 64}
    dtype = "float16" if half else "bfloat16"
    assert calls == [Call(MoEAttributes(top_k=2), MoESizes(5, D, E, I), dtype, inputs, 80, 96, 7)]  # type: ignore[arg-type]


def test_there_is_one_creator(creator: MoECreator) -> None:
    assert register(trt) is creator
    registry = trt.get_plugin_registry()
    assert registry.get_creator("MoE", "1", "gatework") is not None
    with pytest.raises(GateworkError, match="already has another plugin gatework::MoE"):
        register.__wrapped__(trt)
