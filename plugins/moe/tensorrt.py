"""`gatework::MoE` as a TensorRT plugin, for the modules `tensorrt` and `tensorrt_rtx`, either passed in as `trt`.

    creator = register(trt)
    with creator.raising_errors():
        parser.parse(model)

The ONNX parser turns a node into this plugin when the node has the attributes NODE_ATTRIBUTES and the inputs `input_names`:
TensorRT's inputs are positional and none may be absent. It passes on the attributes of ATTRIBUTE_KINDS and drops any
other without a word. So check a model with the ONNX schema first, then add NODE_ATTRIBUTES, which the schema lacks.

    x, b_in, b_out, y                          HALF or BF16, all alike
    router_logits, w_in_scale, w_out_scale     FLOAT
    w_in, w_out     dense: x's type; fp8_e4m3: FP8; int8: INT8; int4: INT8, the bytes that the operator has as uint8

TensorRT learns of an exception in a plugin no more than that there was one, and of one in get_workspace_size or
get_fields_to_serialize not even that: it writes a broken plan. Hence `MoECreator.raising_errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Literal

import numpy as np

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.launcher import ACTIVATION_BYTES, Call
from gatework.plugins.moe.spec import (
    ATTRIBUTE_KINDS,
    DOMAIN,
    INPUTS,
    OP_TYPE,
    VERSION,
    MoEAttributes,
    MoESizes,
    check_shapes,
)
from gatework.plugins.moe.workspace import layout

# The parser's own default is the empty namespace; recent ones then try the node's domain, older ones do not.
NODE_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


def input_names(attributes: MoEAttributes, *, has_bias: bool) -> tuple[str, ...]:
    """The plugin's inputs in order: 4 dense ones, 2 more with biases, 2 more with scales."""
    absent = set() if has_bias else {"b_in", "b_out"}
    if attributes.weight_format == "dense":
        absent |= {"w_in_scale", "w_out_scale"}
    return tuple(name for name in INPUTS if name not in absent)


class MoECreator:
    """Makes plugins from ONNX attributes or from a plan's fields, and keeps the first error that one of them met.

    `launcher`, a gatework.plugins.moe.launcher.Launcher, serves all of its plugins; without one they build but do not run.
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.launcher: Callable[[Call], None] | None = None
        self.error: Exception | None = None
        self.name, self.plugin_version, self.plugin_namespace = OP_TYPE, str(VERSION), DOMAIN
        self.listed = _fields(trt, dict.fromkeys(ATTRIBUTE_KINDS))
        self.field_names = trt.PluginFieldCollection(self.listed)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        """The plugin of node `name`. Attributes left out take their defaults."""
        with self.keeping_error(name):
            return _plugin_type(self.trt)(self, name, _attributes(self.trt, fields))

    @contextmanager
    def raising_errors(self) -> Iterator[None]:
        """Raise, after what is done inside, the first error that a plugin met there, in place of any other."""
        self.error = None
        try:
            yield
        finally:
            if self.error is not None:
                raise self.error

    @contextmanager
    def keeping_error(self, node: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error = GateworkError(f"{node or 'MoE'}: {error}") if isinstance(error, GateworkError) else error
            raise


def _keeping_error(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def keeping(self: MoEPlugin, *arguments: Any) -> Any:
        with self.creator.keeping_error(self.node):
            return method(self, *arguments)

    return keeping


class MoEPlugin:
    """One MoE layer; the methods and their arguments are those of TensorRT's IPluginV3 interfaces."""

    def __init__(self, creator: MoECreator, node: str, attributes: MoEAttributes) -> None:
        self.creator, self.node, self.attributes = creator, node, attributes
        self.sizes: MoESizes | None = None  # known once a context has its shapes
        self.written: list[Any] = []
        self.num_outputs = 1
        self.plugin_name, self.plugin_version, self.plugin_namespace = OP_TYPE, str(VERSION), DOMAIN

    def get_capability_interface(self, kind: Any) -> MoEPlugin:
        return self

    def clone(self) -> MoEPlugin:
        plugin = type(self)(self.creator, self.node, self.attributes)
        plugin.sizes = self.sizes
        return plugin

    def attach_to_context(self, context: Any) -> MoEPlugin:
        return self.clone()

    @_keeping_error
    def get_fields_to_serialize(self) -> Any:
        trt = self.creator.trt
        self.written = _fields(trt, self.attributes.to_onnx())
        return trt.PluginFieldCollection(self.written)

    @_keeping_error
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """The first method to see all inputs' types, and the one that refuses them with a reason."""
        for name, data_type in zip(self._names(len(input_types)), input_types, strict=True):
            legal = self._legal_types(name, input_types[0])
            if data_type not in legal:
                expected = " or ".join(each.name for each in legal)
                raise GateworkError(f"MoE input {name} has the wrong type", got=data_type.name, expected=expected)
        return [input_types[0]]

    @_keeping_error
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, expr_builder: Any) -> list[Any]:
        trt = self.creator.trt
        return [trt.DimsExprs(inputs[0])]

    @_keeping_error
    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Whether entry `pos` is legal after the entries before it, which alone TensorRT has filled in."""
        trt = self.creator.trt
        name = (*self._names(num_inputs), "y")[pos]
        entry, x = in_out[pos].desc, in_out[0].desc
        return entry.format == trt.TensorFormat.LINEAR and entry.type in self._legal_types(name, x.type)

    @_keeping_error
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refuse shapes that do not fit together, at either end of the profile."""
        self._sizes([each.min for each in inputs])
        self._sizes([each.max for each in inputs])

    @_keeping_error
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        sizes = self._sizes([each.max for each in inputs])
        return layout(sizes, self.attributes, ACTIVATION_BYTES).total

    def get_valid_tactics(self) -> list[int]:
        return []  # kernels are chosen by the launcher

    def set_tactic(self, tactic: int) -> None:
        pass

    @_keeping_error
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.sizes = self._sizes([each.dims for each in inputs])

    @_keeping_error
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        if self.creator.launcher is None:
            fix = "set the creator's launcher before running the plan"
            raise GateworkError("the plugin gatework::MoE has no kernels to launch", fix=fix)
        assert self.sizes is not None
        trt = self.creator.trt
        dtype: Literal["float16", "bfloat16"] = "bfloat16"
        if input_desc[0].type == trt.DataType.HALF:
            dtype = "float16"
        pointers = dict(zip(self._names(len(inputs)), inputs, strict=True))
        self.creator.launcher(Call(self.attributes, self.sizes, dtype, pointers, outputs[0], workspace, stream))

    def _names(self, count: int) -> tuple[str, ...]:
        choices = {len(names): names for names in (input_names(self.attributes, has_bias=b) for b in (False, True))}
        if count not in choices:
            expected = f"{' or '.join(map(str, choices))} with weight_format {self.attributes.weight_format}"
            raise GateworkError("MoE node has the wrong number of inputs", got=count, expected=expected)
        return choices[count]

    def _legal_types(self, name: str, x_type: Any) -> tuple[Any, ...]:
        trt = self.creator.trt
        stored = {
            "dense": x_type,
            "fp8_e4m3": trt.DataType.FP8,
            "int8": trt.DataType.INT8,
            "int4": trt.DataType.INT8,
        }
        match name:
            case "x":
                return (trt.DataType.HALF, trt.DataType.BF16)
            case "w_in" | "w_out":
                return (stored[self.attributes.weight_format],)
            case "router_logits" | "w_in_scale" | "w_out_scale":
                return (trt.DataType.FLOAT,)
            case _:
                return (x_type,)

    def _sizes(self, shapes: Sequence[Sequence[int]]) -> MoESizes:
        return check_shapes(self.attributes, dict(zip(self._names(len(shapes)), shapes, strict=True)))


@cache  # one creator for each module, alive as long as the process
def register(trt: Any) -> MoECreator:
    """Make TensorRT know the plugin, for parsing and for loading plans; further calls return the same creator."""

    class Creator(MoECreator, trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            MoECreator.__init__(self, trt)

    creator, registry = Creator(), trt.get_plugin_registry()
    if not registry.register_creator(creator, DOMAIN):
        raise GateworkError(f"TensorRT already has another plugin {DOMAIN}::{OP_TYPE}, version {VERSION}")
    return creator


@cache
def _plugin_type(trt: Any) -> type[MoEPlugin]:
    class Plugin(MoEPlugin, trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self, creator: MoECreator, node: str, attributes: MoEAttributes) -> None:
            for interface in Plugin.__bases__[1:]:
                interface.__init__(self)  # each of the bindings' classes insists
            MoEPlugin.__init__(self, creator, node, attributes)

    return Plugin


def _fields(trt: Any, values: dict[str, Any]) -> list[Any]:
    """Attribute values as TensorRT's fields, those that are None without data.

    A PluginFieldCollection points at the memory of its fields but does not keep it: whoever makes one keeps the list.
    """
    kinds = {
        "INT": (np.int32, trt.PluginFieldType.INT32),
        "FLOAT": (np.float32, trt.PluginFieldType.FLOAT32),
        "STRING": (np.int8, trt.PluginFieldType.CHAR),
    }
    fields = []
    for name, value in values.items():
        dtype, field_type = kinds[ATTRIBUTE_KINDS[name]]
        listed = list(value.encode()) if isinstance(value, str) else [] if value is None else [value]
        fields.append(trt.PluginField(name, np.array(listed, dtype), field_type))
    return fields


def _attributes(trt: Any, fields: Any) -> MoEAttributes:
    """Inverse of `_fields`. The parser gives a field the type that the ONNX attribute has, and ends strings with a zero."""
    values: dict[str, Any] = {}
    for field in fields:
        listed = field.data.tolist()
        if field.type == trt.PluginFieldType.CHAR:
            values[field.name] = bytes(listed).rstrip(b"\0")
        else:
            values[field.name] = listed[0] if len(listed) == 1 else listed
    return MoEAttributes.from_onnx(values)
