"""What the walk over the code cannot know by itself. The tests refuse entries that nothing needs."""

from __future__ import annotations

from tests.contract.surface import Value

# Parameters without a type of ours (Any or nothing), by name.
PARAMETERS = {
    "builder": Value("instance", "Builder"),
    "config": Value("instance", "IBuilderConfig"),
    "context": Value("instance", "IExecutionContext"),
    "fields": Value("items", "PluginField"),
    "logger": Value("instance", "ILogger"),
    "network": Value("instance", "INetworkDefinition"),
    "plan": Value("instance", "ICudaEngine"),
    "tensor": Value("instance", "ITensor"),
}

# Functions of which the docstring does not tell the result.
RESULTS = {"get_plugin_registry": "IPluginRegistry"}

# Files where a word in capitals names a kind of layer.
LAYER_KINDS = ("export/tensorrt/compile.py", "export/tensorrt/listing.py")

# Attributes that our classes add to a class of TensorRT, by the first such base.
OURS = {
    "ILogger": {"errors", "file", "hide", "writing_to"},
    "IPluginCreatorV3One": {"error", "keeping_error", "launcher", "listed", "raising_errors", "trt"},
    "IPluginV3": {"attributes", "creator", "node", "sizes", "written"},
    "IProgressMonitor": {"bars", "close", "lock"},
    "IStreamWriter": {"error", "file"},
}

# What a version lacks, and why the code never uses it there.
_AHEAD_OF_TIME = "only tensorrt_rtx compiles for a GPU that is not there"
_AT_RUN_TIME = "only tensorrt_rtx compiles and allocates at run time; asked for with hasattr"
_LACKED_BY_TENSORRT = dict.fromkeys(
    ("ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"),
    _AHEAD_OF_TIME,
) | dict.fromkeys(
    (
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "DynamicShapesKernelSpecializationStrategy",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    ),
    _AT_RUN_TIME,
)
LACKING = {"10.16.1.11": _LACKED_BY_TENSORRT, "11.4.0.106": _LACKED_BY_TENSORRT, "tensorrt_rtx": {}}
