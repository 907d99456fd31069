"""Run as `python objects.py MODULE [FOLDER]`: make and use objects of our classes under TensorRT's, without its libraries."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any

from gatework.export.tensorrt.builder import _make_monitor, _Stop, _writer_class
from gatework.plugins.moe.spec import MoEAttributes
from gatework.plugins.moe.tensorrt import Call, _fields, register
from gatework.plugins.tensorrt_module import process_logger


class Registry:
    """TensorRT's own is in its libraries."""

    def register_creator(self, creator: Any, namespace: str) -> bool:
        return True


class Calls:
    """A launcher that notes what it would have computed in."""

    def __init__(self) -> None:
        self.dtypes: list[str] = []

    def __call__(self, call: Call) -> None:
        self.dtypes.append(call.dtype)


def check_builder(trt: Any) -> None:
    file = io.BytesIO()
    assert _writer_class(trt)(file).write(b"plan") == 4
    assert file.getvalue() == b"plan"
    monitor = _make_monitor(trt, _Stop(), progress=False)
    monitor.phase_start("build", None, 2)
    assert monitor.step_complete("build", 0)
    monitor.phase_finish("build")
    process_logger(trt).log(trt.ILogger.ERROR, "no")
    assert process_logger(trt).errors == ["no"]


def check_plugin(trt: Any) -> None:
    trt.get_plugin_registry = Registry
    creator = register(trt)
    attributes = MoEAttributes(top_k=3, scoring="sigmoid", capacity_factor=1.25, weight_format="int8")
    fields = _fields(trt, attributes.to_onnx())
    plugin = creator.create_plugin("moe", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD).clone()
    read = creator.create_plugin("moe", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert read.attributes == attributes
    half, full, int8 = trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.INT8
    inputs = [trt.DynamicPluginTensorDesc() for _ in range(7)]
    types = [half, full, int8, int8, full, full, half]
    shapes = [(5, 32), (5, 4), (4, 34, 32), (4, 32, 17), (4, 34, 1), (4, 32, 1), (5, 32)]
    for each, data_type, shape in zip(inputs, types, shapes, strict=True):
        each.desc.type, each.desc.format = data_type, trt.TensorFormat.LINEAR
        each.min = each.max = each.desc.dims = shape
    assert plugin.get_output_data_types(types[:6]) == [half]
    assert all(plugin.supports_format_combination(pos, inputs, 6) for pos in range(7))
    plugin.configure_plugin(inputs[:6], inputs[6:])
    assert plugin.get_workspace_size(inputs[:6], inputs[6:]) > 0
    creator.launcher = calls = Calls()
    plugin.on_shape_change([each.desc for each in inputs[:6]], [inputs[6].desc])
    plugin.enqueue([each.desc for each in inputs[:6]], [inputs[6].desc], list(range(6)), [6], 7, 8)
    assert calls.dtypes == ["float16"]


if __name__ == "__main__":
    sys.path[:1] = sys.argv[2:]
    module = importlib.import_module(sys.argv[1])
    check_builder(module)
    check_plugin(module)
    print("objects: ok")
