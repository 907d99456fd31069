"""The MoE kernels on a GPU, launched as engines launch them: the interpreter's cases, the plugin, CUDA graphs, PyTorch."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import gpu_capability
from gatework.plugins.moe import torch_op
from gatework.plugins.moe.kernels.compile import save
from gatework.plugins.moe.kernels.launches import SMS, variants
from gatework.plugins.moe.launcher import Call, Launcher, served_by
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from gatework.plugins.moe.tensorrt import input_names, register
from gatework.plugins.tensorrt_module import load_toolchain
from tests.plugins.moe_cases import Array, random_inputs
from tests.plugins.moe_checks import CHECKED, ON_DEVICE, REPLAYED, THROUGH_PYTORCH, Case, Dtype, Run, check
from tests.plugins.moe_memory import SCRATCH, CallMemory

pytestmark = pytest.mark.gpu
if gpu_capability() is None or not torch.cuda.is_available():
    pytest.skip("no GPU: no kernel runs, only the interpreter's", allow_module_level=True)

SM = served_by(10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1])
if SM not in SMS:
    pytest.skip(f"no kernels for sm_{SM}: none runs", allow_module_level=True)


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    torch.cuda.init()
    return Launcher(compiling=True)


@pytest.fixture(scope="module")
def run(launcher: Launcher) -> Run:
    return partial(on_device, launcher)


class OnDevice:
    """A call's memory on the GPU."""

    def __init__(self, memory: CallMemory, dtype: Dtype) -> None:
        self.memory = memory
        self.blocks = {name: torch.from_numpy(block).cuda() for name, block in memory.blocks.items()}
        at = {name: block.data_ptr() for name, block in self.blocks.items()}
        inputs = {name: at[name] for name in memory.inputs}
        self.call = Call(memory.attributes, memory.sizes, dtype, inputs, at["y"], at[SCRATCH], 0)

    def clear(self) -> None:
        for name in ("y", SCRATCH):
            self.blocks[name].fill_(0xFF)

    def results(self) -> dict[str, Array]:
        torch.cuda.synchronize()
        for name, block in self.blocks.items():
            np.copyto(self.memory.blocks[name], block.cpu().numpy())
        return self.memory.results()


def on_device(
    launcher: Launcher, sm: int, attributes: MoEAttributes, inputs: dict[str, Array], dtype: Dtype
) -> dict[str, Array]:
    device = OnDevice(CallMemory(attributes, inputs, dtype), dtype)
    launcher(device.call._replace(stream=torch.cuda.current_stream().cuda_stream))
    return device.results()


def skip_fp8(case: Case) -> None:
    if case.attributes.weight_format == "fp8_e4m3" and SM < 89:
        pytest.skip(f"sm_{SM} has no fp8 arithmetic")


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_stages(run: Run, case: Case) -> None:
    skip_fp8(case)
    check(run, case.attributes, case.inputs(), case.dtype, SM, ON_DEVICE)


@pytest.mark.parametrize("case", REPLAYED, ids=str)
def test_a_replayed_graph_gives_the_same_bits(launcher: Launcher, case: Case) -> None:
    skip_fp8(case)
    device = OnDevice(CallMemory(case.attributes, case.inputs(), case.dtype), case.dtype)
    launcher(device.call)
    first = {name: value.tobytes() for name, value in device.results().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher(device.call._replace(stream=torch.cuda.current_stream().cuda_stream))
    for _ in range(3):
        device.clear()
        graph.replay()
        again = {name: value.tobytes() for name, value in device.results().items()}
        assert [name for name in first if first[name] != again[name]] == []


def test_kernels_from_an_engines_folder(tmp_path: Any) -> None:
    attributes, sizes = MoEAttributes(top_k=2), MoESizes(T=40, D=64, E=5, I=48)
    save(tmp_path, SM, variants(SM, sizes, attributes, "float16"))
    stored = Launcher()
    stored.add(tmp_path)
    inputs = random_inputs(attributes, sizes.T, D=sizes.D, E=sizes.E, I=sizes.I)
    check(partial(on_device, stored), attributes, inputs, "float16", SM, ON_DEVICE)
    with pytest.raises(GateworkError, match=r"no kernel .* was compiled for this call"):
        on_device(stored, SM, attributes, random_inputs(attributes, 3, D=32), "float16")


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_the_plugin_enqueues_on_the_stream(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"no {module}: its plugin class launches nothing")
    trt = load_toolchain(module)
    creator = register(trt)
    monkeypatch.setattr(creator, "launcher", launcher)
    attributes = MoEAttributes(top_k=2)
    device = OnDevice(CallMemory(attributes, random_inputs(attributes, 33, D=96, I=64), "bfloat16"), "bfloat16")
    fields = [trt.PluginField("top_k", np.array([2], np.int32), trt.PluginFieldType.INT32)]
    plugin = creator.create_plugin("moe", trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)
    names = input_names(attributes, has_bias=False)
    described = []
    for name in names:
        full = trt.DynamicPluginTensorDesc()
        full.desc.type = trt.DataType.FLOAT if name == "router_logits" else trt.DataType.BF16
        full.desc.format, full.desc.dims = trt.TensorFormat.LINEAR, device.memory.inputs[name].shape
        described.append(full.desc)
    call, stream = device.call, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with creator.raising_errors():
        plugin.on_shape_change(described, described[:1])
        addresses = [call.inputs[name] for name in names]
        plugin.enqueue(described, described[:1], addresses, [call.y], call.workspace, stream.cuda_stream)
    got = device.results()["y"].tobytes()
    device.clear()
    launcher(call)
    assert device.results()["y"].tobytes() == got


@pytest.mark.parametrize("case", THROUGH_PYTORCH, ids=str)
def test_pytorchs_operator_launches_the_kernels(launcher: Launcher, case: Case) -> None:
    skip_fp8(case)
    memory = CallMemory(case.attributes, case.inputs(), case.dtype)
    device = OnDevice(memory, case.dtype)
    launcher(device.call)
    want = device.results()["y"].tobytes()
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}
    dtypes |= {"int8": torch.int8, "uint8": torch.uint8}
    tensors = {
        name: torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        .view(dtypes[value.dtype.name])
        .reshape(value.shape)
        .cuda()
        for name, value in memory.inputs.items()
    }
    y = torch_op.moe(attributes=case.attributes, **tensors)
    assert y.view(torch.uint8).cpu().numpy().tobytes() == want
