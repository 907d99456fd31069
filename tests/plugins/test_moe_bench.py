"""The benchmark's own arithmetic, and its peers, on the CPU: what it compares must compute the same operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gatework.plugins.moe import bench, peers, reference
from gatework.plugins.moe.spec import MoEAttributes
from tests.plugins.moe_cases import assert_close, random_inputs

# Two bfloat16 roundings of u and h and one of each expert's output.
BFLOAT16 = 3 * 2**-8


@pytest.mark.parametrize("peer", [peers.grouped, peers.loop])
@pytest.mark.parametrize(
    "attributes", [bench.SHAPES[name].attributes for name in ("mixtral", "grok-1")], ids=["a", "b"]
)
def test_peers_compute_the_operator(peer: Any, attributes: MoEAttributes) -> None:
    inputs = random_inputs(attributes, 9, D=32, E=5, I=48)
    narrow = {k: torch.from_numpy(v) for k, v in inputs.items()}
    narrow = {k: v if k == "router_logits" else v.bfloat16() for k, v in narrow.items()}
    want = reference.moe(attributes=attributes, **{k: v.float().numpy() for k, v in narrow.items()})
    assert_close(peer(attributes=attributes, **narrow).float().numpy(), want, BFLOAT16)


@pytest.mark.parametrize("name", bench.FORMATS)
def test_dequantised_weights_are_the_definitions(name: str) -> None:
    attributes = bench.with_format(MoEAttributes(top_k=2), name)
    inputs = random_inputs(attributes, 1, D=256, E=3, I=16)
    weights = {k: v for k, v in inputs.items() if k.startswith("w_")}
    given = {
        k: torch.from_numpy(v.view(np.uint8)).view(torch.float8_e4m3fn)
        if v.dtype.itemsize == 1 and name == "fp8"
        else torch.from_numpy(v)
        for k, v in weights.items()
    }
    got = bench.dequantized(given, "w_in", 256, attributes).numpy()
    want = reference.dequantize(weights["w_in"], weights.get("w_in_scale"), attributes, columns=256, dtype=np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark runs")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert capsys.readouterr().err == (
        "the MoE benchmark needs a CUDA GPU; got none; fix: run it on a machine that has one\n"
    )
