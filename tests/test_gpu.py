"""Engines on a GPU, end to end: built, loaded and run through the public API, their output against the CPU's and PyTorch's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from gatework import LLM, SamplingParams
from gatework.export.build import build_engine
from gatework.export.targets import TARGETS, Target
from gatework.plugins.machine import gpu_capability
from gatework.runtime.backends.device import Device
from gatework.runtime.backends.kv import DeviceCache, KVLayout, cache_names
from gatework.runtime.cli import main
from gatework.runtime.verify import Bounds, verify
from tests.checkpoints import make_checkpoint, reference_model
from tests.switch import make_switch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_capability() is None, reason="no NVIDIA GPU: no engine is run on one"),
]
needs_ort = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="onnxruntime-gpu is not installed: no cuda engine is run",
)
TINY = Path(__file__).parents[1] / "examples" / "tiny-mixtral"
GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
# Rounding to 8 bits of mantissa after every operator of two layers of random weights; float16 leaves 3e-3 on CPU kernels.
BF16 = Bounds(relative=0.1, mean_kl=0.01)


@needs_ort
@torch.inference_mode()
def test_an_eight_layer_mixtral_gives_pytorchs_tokens(tmp_path: Path) -> None:
    """Rows of several lengths, more of them than slots, that end at different steps: slots are moved."""
    path = make_checkpoint(tmp_path, "mixtral", num_layers=8, max_position_embeddings=128)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, length).tolist() for length in (3, 17, 40, 1, 9, 25)]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (48, 5, 30, 48, 12, 20)]
    engine = build_engine(path, tmp_path / "engine", target="cuda", precision="fp32", max_batch=4, prefill_chunk=16)
    oracle = reference_model(path)
    for prompt, completion in zip(prompts, LLM(engine).generate(prompts, params), strict=True):
        # Greedy: each token is the best one after those before it.
        logits = oracle(torch.tensor([prompt + completion.token_ids])).logits[0]
        assert completion.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@needs_ort
def test_a_float32_engine_passes_its_bounds(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "dbrx")
    report = verify(build_engine(path, tmp_path / "engine", target="cuda", precision="fp32", max_seq=64), path)
    assert report.passed, str(report)


@needs_ort
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "int4"])
def test_the_bundled_model_passes_its_bounds(tmp_path: Path, precision: str) -> None:
    engine = build_engine(TINY, tmp_path / "engine", target="cuda", precision=precision, max_seq=512)
    text = (TINY / "heldout.txt").read_text()[:20_000]
    report = verify(engine, TINY, text=text)
    assert report.passed, str(report)


@needs_ort
@pytest.mark.parametrize("processes", [False, True])
def test_stages_give_the_unsplit_engines_tokens(tmp_path: Path, processes: bool) -> None:
    """Each process takes a GPU in turn, which with one GPU is the same for all."""
    settings: dict[str, Any] = {"target": "cuda", "precision": "fp32", "max_seq": 128}
    tokens = []
    for stages in (1, 2):
        engine = build_engine(TINY, tmp_path / str(stages), stages=stages, **settings)
        with LLM(engine, stage_processes=processes and stages > 1) as llm:
            tokens.append([each.token_ids for each in llm.generate(["The gate opens", "Once"], GREEDY)])
    assert tokens[0] == tokens[1]


@needs_ort
def test_what_the_kernels_renormalise_is_undone(tmp_path: Path) -> None:
    """Of experts whose scores do not add up to 1, in 16 bits, in which two that are nearly tied may change places."""
    path = make_checkpoint(tmp_path, "olmoe")
    report = verify(build_engine(path, tmp_path / "engine", target="cuda", precision="bf16", max_seq=64), path)
    assert report.stages
    assert report.first_divergence is None, str(report)


def target_here() -> Target:
    """The table's first target that is this GPU."""
    found = next((target for target in TARGETS.values() if target.capability == gpu_capability()), None)
    if found is None:
        pytest.skip(f"no target for a GPU of compute capability {gpu_capability()}: no plan is run")
    if not any(find_spec(name) for name in found.toolchains):
        pytest.skip(f"no {' or '.join(found.toolchains)}: no plan is run")
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("model", ["llama2", "mistral", "mixtral", "dbrx"])
def test_a_plan_equals_the_model(tmp_path: Path, model: str) -> None:
    path = make_checkpoint(tmp_path, model)
    settings: dict[str, Any] = {"target": target_here().name, "precision": "bf16", "prefill_chunk": 16, "max_batch": 4}
    engine = build_engine(path, tmp_path / "engine", **settings)
    report = verify(engine, path, bounds=BF16)
    assert report.passed, str(report)


@pytest.mark.tensorrt
def test_an_encoders_and_a_decoders_plan_equal_the_model(tmp_path: Path) -> None:
    """Logits along given tokens; then more prompts than slots, which are moved, give the tokens that each gives alone."""
    path = make_switch(tmp_path)
    settings: dict[str, Any] = {"target": target_here().name, "precision": "bf16", "max_seq": 64, "max_batch": 3}
    engine = build_engine(path, tmp_path / "engine", **settings)
    report = verify(engine, path, bounds=BF16)
    assert report.passed, str(report)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 128, length).tolist() for length in (3, 17, 40, 1, 9, 25)]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (24, 5, 10, 24, 12, 8)]
    with LLM(engine) as llm:
        together = [each.token_ids for each in llm.generate(prompts, params)]
        alone = [llm.generate([ids], each)[0].token_ids for ids, each in zip(prompts, params, strict=True)]
    same = sum(a == b for one, other in zip(together, alone, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 0.9 * sum(map(len, alone))  # bfloat16 may choose otherwise where two tokens are nearly tied


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["bf16", "int4", "fp8"])
def test_a_plan_with_taps_is_verified_step_by_step(tmp_path: Path, precision: str) -> None:
    if precision not in target_here().precisions:
        pytest.skip(f"{target_here().name} has no {precision}: no such plan is run")
    settings: dict[str, Any] = {"target": target_here().name, "precision": precision, "max_seq": 512, "taps": True}
    settings |= {"weight_only": precision == "fp8"}
    report = verify(build_engine(TINY, tmp_path / "engine", **settings), TINY, window=64)
    assert report.first_divergence is None, str(report)
    assert len(report.stages) == 4 * 8 + 2


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_a_quantised_plan_of_the_bundled_model_passes_its_bounds(tmp_path: Path, precision: str) -> None:
    target = target_here()
    if precision not in target.precisions:
        pytest.skip(f"{target.name} has no {precision}: no such plan is run")
    settings: dict[str, Any] = {"target": target.name, "precision": precision, "max_seq": 512}
    if precision != "int4":
        settings["calibration"] = tmp_path / "calibration.json"
        text = str(TINY / "calibration.txt")
        assert main(["calibrate", str(TINY), "--text", text, "--out", str(settings["calibration"])]) == 0
    engine = build_engine(TINY, tmp_path / "engine", **settings)
    report = verify(engine, TINY, text=(TINY / "heldout.txt").read_text()[:20_000])
    assert report.passed, str(report)


@pytest.mark.tensorrt
@pytest.mark.parametrize("model", ["llama2", "mixtral"])
def test_captured_steps_give_what_the_first_run_gave(tmp_path: Path, model: str) -> None:
    """A batch size's first step runs uncaptured, later ones replay its graph: the same prompts twice, the same tokens."""
    path = make_checkpoint(tmp_path, model)
    engine = build_engine(path, tmp_path / "engine", target=target_here().name, precision="bf16", max_batch=4)
    llm = LLM(engine)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    first = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    assert [completion.token_ids for completion in llm.generate(prompts, GREEDY)] == first


def test_slots_move_on_the_device() -> None:
    device = Device()
    layout = KVLayout(cache_names(2), slots=3, heads=2, positions=5, width=8, itemsize=2)
    cache = DeviceCache(layout, device)
    host = device.pinned(layout.total)
    host[:] = np.random.default_rng(0).integers(0, 256, layout.total)
    before = host.copy()
    device.to_device(cache.address("0.k", 0), host, layout.total)
    cache.move(2, 0, 3)
    device.to_host(host, cache.address("0.k", 0), layout.total)
    device.synchronize()
    want = before.copy()
    for each in layout.move(2, 0, 3):
        for row in range(each.rows):
            at = row * each.pitch
            want[each.target + at :][: each.width] = before[each.source + at :][: each.width]
    np.testing.assert_array_equal(host, want)


def test_a_graph_replays_what_was_captured() -> None:
    device = Device()
    block, source, target = device.allocate(256, "test"), device.pinned(256), device.pinned(256)

    def copy() -> None:
        device.to_device(block, source, 256)
        device.to_host(target, block, 256)

    graph = device.capture(copy)
    for value in (1, 2):
        source[:] = value
        device.launch(graph)
        device.synchronize()
        assert (target == value).all()
