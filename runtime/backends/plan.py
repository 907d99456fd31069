"""A TensorRT plan and its execution contexts: loading, checking, binding, running. `trt` is tensorrt or tensorrt_rtx.

Addresses, sizes and streams are plain integers.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from gatework.plugins.engine_format import SOURCE_LENGTHS, TAP_OUTPUT
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.tensorrt import MoECreator
from gatework.plugins.tensorrt_module import process_logger


def load_plan(trt: Any, creator: MoECreator, path: Path) -> Any:
    """The trt.ICudaEngine of a plan file. The plan belongs to one kind of GPU and one version of TensorRT."""
    logger = process_logger(trt)
    logger.errors.clear()  # of builds in this process
    with creator.raising_errors():
        runtime = trt.Runtime(logger)
        plan = runtime.deserialize_cuda_engine(path.read_bytes())
        if plan is None:
            fix = "build it with the TensorRT installed here, on or for this GPU"
            raise GateworkError(f"{trt.__name__} cannot load {path}", got=_reason(logger), fix=fix)
    return plan


def tensor_names(plan: Any) -> list[str]:
    """All inputs and outputs."""
    return [plan.get_tensor_name(number) for number in range(plan.num_io_tensors)]


def check_types(trt: Any, plan: Any) -> None:
    """Raise unless the plan reads and writes the types that the buffers hold."""
    expected = dict.fromkeys(("input_ids", "position_ids", "write_indices", SOURCE_LENGTHS), trt.DataType.INT64)
    expected["logits"] = trt.DataType.FLOAT
    for name in expected.keys() & set(tensor_names(plan)):
        data_type = expected[name]
        if (found := plan.get_tensor_dtype(name)) != data_type:
            raise GateworkError(f"the plan's {name} has the wrong type", got=found.name, expected=data_type.name)


def scratch_bytes(plan: Any) -> int:
    """Memory that a context of any profile needs."""
    profiles = range(plan.num_optimization_profiles)
    return max(plan.get_device_memory_size_for_profile_v2(profile) for profile in profiles)


def new_context(trt: Any, plan: Any, profile: int, stream: int) -> Any:
    """An execution context of a profile, without scratch memory."""
    by_user = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        settings = plan.create_runtime_config()
        settings.set_execution_context_allocation_strategy(by_user)
        # TensorRT-RTX compiles kernels for new shapes at run time; by default in the background, where a capture misses them.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = eager
        context = plan.create_execution_context(settings)
    else:
        context = plan.create_execution_context(by_user)
    if context is None or not context.set_optimization_profile_async(profile, stream):
        got = _reason(process_logger(trt))
        raise GateworkError(f"{trt.__name__} makes no execution context for profile {profile}", got=got)
    return context


def is_capturable(trt: Any, context: Any, stream: int) -> bool:
    """Whether a CUDA graph can capture the context; TensorRT-RTX alone has ones that it cannot."""
    if not hasattr(trt.IExecutionContext, "is_stream_capturable"):
        return True
    return context.is_stream_capturable(stream)


def share_scratch(context: Any, address: int, nbytes: int) -> None:
    """Let the context work in a block that others use as well, at other times."""
    context.set_device_memory(address, nbytes)


def check_addresses(plan: Any, known: Container[str]) -> None:
    """Raise unless every tensor of the plan is known, or a tap."""
    unknown = [name for name in tensor_names(plan) if name not in known and not name.endswith(TAP_OUTPUT)]
    if unknown:
        raise GateworkError("the plan reads tensors that the engine does not hold", got=", ".join(unknown[:3]))


def bind(context: Any, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    """Set every tensor's address and every open shape."""
    for name, address in addresses.items():
        if not context.set_tensor_address(name, address):
            raise GateworkError(f"TensorRT does not take an address for {name}")
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise GateworkError(f"TensorRT does not take a shape for {name}", got=shape)


def execute(trt: Any, context: Any, stream: int) -> None:
    """Queue the plan on a stream."""
    if not context.execute_async_v3(stream):
        raise GateworkError(f"{trt.__name__} cannot run the plan", got=_reason(process_logger(trt)))


def _reason(logger: Any) -> str:
    return next(iter(logger.errors), "no reason")
