"""The walk finds what it is made to find: each snippet is right but for one mistake, or entirely."""

from __future__ import annotations

import re
from textwrap import dedent

import pytest

from tests.contract.bindings import MODULES, surface
from tests.contract.walk import Walk

MISTAKES = {
    "class": ("trt.Bilder(logger)", "Bilder: no such name"),
    "function": ("trt.get_plugin_registri()", "get_plugin_registri: no such name"),
    "base class": ("class Mine(trt.ILoger): ...", "ILoger: no such name"),
    "enum member": ("config.set_flag(trt.BuilderFlag.STRIP_PLANS)", "BuilderFlag.STRIP_PLANS: no such name"),
    "nested enum member": ("trt.ILogger.FATAL", "ILogger.FATAL: no such name"),
    "method": ("builder.create_netwrk(0)", "Builder.create_netwrk: no such name"),
    "attribute": ("network.number_of_layers", "INetworkDefinition.number_of_layers: no such name"),
    "attribute of a result": ("builder.create_network(0).get_layer(0).kind", "ILayer.kind: no such name"),
    "attribute of an assigned result": ("x = trt.Builder(logger); y = x; y.nothing", "Builder.nothing: no such name"),
    "attribute of a choice": ("(None if x else builder).nothing", "Builder.nothing: no such name"),
    "attribute of a property": ("tensor.dtype.label", "DataType.label: no such name"),
    "attribute of an element": ("[field.kind for field in fields]", "PluginField.kind: no such name"),
    "attribute of an unknown parameter": (
        """
        def load(runtime: Any):
            return runtime.deserialize_cuda_engine
        """,
        "runtime.deserialize_cuda_engine: of no known type",
    ),
    "attribute set": ("config.progress_monitors = 1", "IBuilderConfig.progress_monitors: no such name"),
    "read-only attribute": ("network.num_layers = 1", "INetworkDefinition.num_layers: cannot be set"),
    "too many arguments": ("builder.create_builder_config(1)", "create_builder_config(): cannot be called with 2"),
    "too few arguments": ("network.get_layer()", "get_layer(): cannot be called with 1 arguments"),
    "too many arguments of a class": ("trt.OnnxParser(network, logger, 1)", "OnnxParser.__init__(): cannot be called"),
    "too many arguments of a function": ("trt.get_plugin_registry(1)", "get_plugin_registry(): cannot be called"),
    "no self": ("trt.ILogger.__init__()", "ILogger.__init__(): cannot be called with 0 arguments"),
    "wrong keyword": ("config.set_timing_cache(1, ignore=False)", "cannot be called with 2 arguments and ['ignore']"),
    "keyword given twice": ("network.get_layer(0, index=0)", "cannot be called with 2 arguments and ['index']"),
    "unpacked keywords": ("network.get_layer(**x)", "cannot be called with 1 arguments and ['**']"),
    "method that nothing calls": (
        """
        class Monitor(trt.IProgressMonitor):
            def phase_begin(self, phase_name, parent_phase, num_steps): ...
        """,
        "IProgressMonitor.phase_begin: neither TensorRT's nor in tables.OURS",
    ),
    "method called with more": (
        """
        class Monitor(trt.IProgressMonitor):
            def phase_start(self, phase_name, num_steps): ...
        """,
        "IProgressMonitor.phase_start: is called as",
    ),
    "method called with less": (
        """
        class Writer(trt.IStreamWriter):
            def write(self, data, size): ...
        """,
        "IStreamWriter.write: is called as",
    ),
    "method of a class mixed in": (
        """
        class Mixed:
            def enqueue(self, inputs, outputs, workspace, stream): ...
        class Plugin(Mixed, trt.IPluginV3, trt.IPluginV3OneRuntime): ...
        """,
        "IPluginV3OneRuntime.enqueue: is called as",
    ),
    "argument of an override": (
        """
        class Logger(trt.ILogger):
            def log(self, severity, message):
                return severity.label
        """,
        "ILogger.Severity.label: no such name",
    ),
    "elements that an override gets": (
        """
        class Plugin(trt.IPluginV3OneBuild):
            def configure_plugin(self, inputs, outputs):
                return [each.minimum for each in inputs]
        """,
        "DynamicPluginTensorDesc.minimum: no such name",
    ),
    "attribute that nothing reads": (
        """
        class Creator(trt.IPluginCreatorV3One):
            def __init__(self):
                self.fieldnames = []
        """,
        "IPluginCreatorV3One.fieldnames: neither TensorRT's nor in tables.OURS",
    ),
    "class without a constructor": ("class Mine(trt.ILayer): ...", "ILayer.__init__(): cannot be called"),
}

RIGHT = """
    def build(trt, builder, network, config: Any, tensor: Any, fields, logger) -> None:
        network, parser = builder.create_network(flags=0), trt.OnnxParser(network, logger)
        with logger.writing_to("x") as logger:
            logger.anything
        for number in range(parser.num_errors):
            parser.get_error(number).desc()
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=True)
        if (layer := network.get_layer(0)) is not None:
            layer.type.name
        return [trt.PluginField(field.name, field.data) for field in fields]

    def typed_as_ours(config: ModelConfig, fields: list[str]) -> None:
        config.num_layers = fields[0].kind
"""


def problems(snippet: str, name: str, file: str = "x.py") -> list[str]:
    names = "builder, network, config, tensor, fields, logger"
    body = dedent(snippet).strip().replace("\n", "\n    ")
    source = snippet if snippet is RIGHT else f"def check(trt, {names}):\n    {body}\n"
    return [str(use) for use in Walk(file, dedent(source), surface(name)).uses if use.problem is not None]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("snippet", "problem"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(snippet: str, problem: str, name: str) -> None:
    found = problems(snippet, name)
    assert len(found) == 1
    assert re.match(rf"x\.py:\d+: .*{re.escape(problem)}", found[0])


@pytest.mark.parametrize("name", MODULES)
def test_nothing_else_is_found(name: str) -> None:
    assert problems(RIGHT, name) == []


@pytest.mark.parametrize("name", MODULES)
def test_unknown_kinds_of_layers_are_found(name: str) -> None:
    snippet = "return {'PLUGIN_V3': 1, 'KV_CACHE': 2, 'anything': 3}"
    expected = ["export/tensorrt/compile.py:2: LayerType.KV_CACHE: no such name"]
    assert problems(snippet, name, "export/tensorrt/compile.py") == expected
