"""The launch table of the GPU kernels: what it lists, for whom, and that no number of tokens needs a kernel unlisted."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.kernels.launches import SMS, Launch, launches, variants
from gatework.plugins.moe.spec import CHOICES, INPUTS, MoEAttributes, MoESizes
from gatework.plugins.moe.workspace import buffers

SETTINGS = [
    (sm, MoEAttributes(top_k=2, weight_format=weight_format, group_size=group_size))  # type: ignore[arg-type]
    for sm in SMS
    for weight_format in CHOICES["weight_format"]
    for group_size in ((0,) if weight_format == "dense" else (0, 8, 128))
    if sm >= 90 or weight_format != "fp8_e4m3"
]
SETTINGS += [
    (sm, MoEAttributes(top_k=2, weight_format=weight_format, keep_activations=True))  # type: ignore[arg-type]
    for sm, weight_format in ((80, "int8"), (90, "fp8_e4m3"), (120, "fp8_e4m3"))
]


def kernels(listed: tuple[Launch, ...]) -> list[str]:
    return [launch.variant.kernel for launch in listed]


def constant(launch: Launch, name: str) -> Any:
    return dict(launch.variant.constants)[name]


def test_kernels_in_order() -> None:
    sizes, few = MoESizes(T=64, D=4096, E=8, I=14336), MoESizes(T=16, D=4096, E=8, I=14336)
    dense, int8 = MoEAttributes(top_k=2), MoEAttributes(top_k=2, weight_format="int8", capacity_factor=1.0)
    assert kernels(launches(90, sizes, dense, "bfloat16")) == ["route", "dispatch", "gemm_in", "gemm_out", "combine"]
    assert kernels(launches(90, few, int8, "bfloat16")) == [
        "route",
        "drop",
        "dispatch",
        "gemm_in",
        "gemm_out",
        "combine",
    ]
    assert kernels(launches(90, sizes, int8, "bfloat16")) == [
        "route",
        "drop",
        "dispatch",
        "quantize",
        "gemm_in",
        "quantize",
        "gemm_out",
        "combine",
    ]
    kept = replace(int8, keep_activations=True)
    assert kernels(launches(90, sizes, kept, "bfloat16")) == kernels(launches(90, few, int8, "bfloat16"))
    assert launches(90, sizes._replace(T=0), dense, "bfloat16") == ()


def test_the_rule_of_gshard_is_refused() -> None:
    attributes = MoEAttributes(top_k=2, capacity_factor=2.0, capacity_rule="gshard")
    with pytest.raises(GateworkError, match="GPU kernels drop no choices by this rule; got gshard"):
        launches(90, MoESizes(T=64, D=4096, E=8, I=14336), attributes, "bfloat16")


def test_decode_of_mixtral_by_hand() -> None:
    listed = launches(90, MoESizes(T=3, D=4096, E=8, I=14336), MoEAttributes(top_k=2), "bfloat16", has_bias=True)
    gemm_in = listed[2]
    names = ("x", "w_in", "b_in", "expert_offsets", "token_order", "hidden")
    assert gemm_in.values == (*names, 6)  # 6 choices: 6 experts at most, with a tile of rows each
    assert gemm_in.grid == (6 * 14336 // 32, 1, 1)
    assert [kind for _, kind in gemm_in.variant.arguments] == ["*bf16"] * 3 + ["*i32"] * 2 + ["*bf16", "i32"]
    assert constant(gemm_in, "x_scale") is constant(gemm_in, "w_in_scale") is None


@pytest.mark.parametrize(
    ("group_size", "few", "more"), [(128, "ahead", "weight"), (32, "ahead", "weight"), (24, *["element"] * 2)]
)
def test_scales_of_groups(group_size: int, few: str, more: str) -> None:
    attributes = MoEAttributes(top_k=2, weight_format="int4", group_size=group_size)
    for T, scaling in ((16, few), (17, more), (400, more)):
        listed = launches(90, MoESizes(T, D=256, E=5, I=384), attributes, "bfloat16")
        products = [launch for launch in listed if launch.variant.kernel.startswith("gemm")]
        assert [constant(launch, "SCALING") for launch in products] == [scaling] * 2


@pytest.mark.parametrize(("sm", "attributes"), SETTINGS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_buffers_exist_and_are_written_before_they_are_read(sm: int, attributes: MoEAttributes, has_bias: bool) -> None:
    absent = set() if has_bias else {"b_in", "b_out"}
    if attributes.weight_format == "dense":
        absent |= {"w_in_scale", "w_out_scale"}
    for T in (1, 17, 400):
        sizes = MoESizes(T, D=256, E=5, I=384)
        known = set(INPUTS) - absent
        for launch in launches(sm, sizes, attributes, "float16", has_bias=has_bias):
            written = {
                "route": {"topk_ids", "topk_weights"},
                "dispatch": {"expert_offsets", "token_order"},
                "quantize": {str(value) for value in launch.values[1:3]},
                "gemm_in": {"hidden"},
                "gemm_out": {"expert_out"},
                "combine": {"y"},
            }[launch.variant.kernel]
            names = {value for value in launch.values if isinstance(value, str)}
            assert written <= names <= known | written
            for (_, kind), value in zip(launch.variant.arguments, launch.values, strict=True):
                assert (kind == "i32") == isinstance(value, int)
            known |= written
        coded = {"x_codes", "x_scale", "hidden_codes", "hidden_scale"}
        eight_bit = attributes.weight_format in ("int8", "fp8_e4m3") and attributes.group_size == 0
        unused = set() if (eight_bit and T > 16) or attributes.keep_activations else coded
        assert known - {"y"} == set(INPUTS) - absent | set(buffers(sizes, attributes, 2)) - unused


@pytest.mark.parametrize(("sm", "attributes"), SETTINGS)
def test_variants_are_those_of_every_number_of_tokens(sm: int, attributes: MoEAttributes) -> None:
    sizes = MoESizes(T=300, D=256, E=7, I=384)
    listed = variants(sm, sizes, attributes, "bfloat16")
    used = {
        launch.variant
        for T in range(1, sizes.T + 1)
        for launch in launches(sm, sizes._replace(T=T), attributes, "bfloat16")
    }
    assert len(listed) == len(set(listed)) == len({variant.name for variant in listed})
    assert set(listed) == used
    assert set(variants(sm, sizes._replace(T=16), attributes, "bfloat16")) < used


@pytest.mark.parametrize("seed", range(20))
def test_grid_has_a_tile_for_every_load(seed: int) -> None:
    rng = np.random.default_rng(seed)
    T, E = int(rng.integers(1, 400)), int(rng.integers(1, 20))
    K = int(rng.integers(1, E + 1))
    listed = launches(90, MoESizes(T, D=32, E=E, I=32), MoEAttributes(top_k=K), "float16")
    gemm_in = next(launch for launch in listed if launch.variant.kernel == "gemm_in")
    BM = constant(gemm_in, "BM")
    skewed = rng.standard_normal((T, E)) + 5 * rng.standard_normal(E)
    for logits in (skewed, np.broadcast_to(np.arange(E), (T, E))):
        loads = np.bincount(np.argsort(-logits, axis=1)[:, :K].ravel(), minlength=E)
        assert np.ceil(loads / BM).sum() <= gemm_in.values[-1]


def test_table_and_saved_kernels_need_no_compiler() -> None:
    names = ("launches", "compile")
    imports = "; ".join(f"import gatework.plugins.moe.kernels.{name}" for name in names)
    script = f"import sys; {imports}; print(sorted({{'triton', 'torch', 'onnx'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_capacity_is_the_definition() -> None:
    attributes = MoEAttributes(top_k=2, capacity_factor=1.25, min_capacity=4)
    for T, capacity in ((3, 3), (64, 20), (100, 32)):  # 4 but for T; 20; 31.25
        drop = launches(90, MoESizes(T, D=32, E=8, I=32), attributes, "float16")[1]
        assert drop.values == ("topk_ids", "topk_weights", T, capacity)


@pytest.mark.parametrize(
    ("sm", "dtype", "weight_format", "width", "message"),
    [
        (
            75,
            "float16",
            "dense",
            64,
            "no MoE kernels for this GPU; got sm_75; expected sm_80 or sm_89 or sm_90 or sm_120",
        ),
        (90, "float32", "dense", 64, "no such activations; got float32; expected float16 or bfloat16"),
        (80, "float16", "fp8_e4m3", 64, "fp8 experts need sm_89 or newer; got sm_80"),
        (80, "float16", "dense", 2**26, "too large for 32-bit indices"),
    ],
)
def test_refusals(sm: int, dtype: Any, weight_format: Any, width: int, message: str) -> None:
    attributes = MoEAttributes(top_k=2, weight_format=weight_format)
    with pytest.raises(GateworkError, match=message):
        launches(sm, MoESizes(4, D=64, E=8, I=width), attributes, dtype)
