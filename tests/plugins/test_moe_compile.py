"""The GPU kernels compiled ahead of time: the instructions they use, what they need, and how they are called. No GPU."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.bench_layers import SHAPES, with_format
from gatework.plugins.moe.kernels.compile import Compiled, compile_variant, load, save, triton_compile
from gatework.plugins.moe.kernels.launches import MOST_SHARED, Variant, launches, variants
from gatework.plugins.moe.spec import MoEAttributes, MoESizes
from tests.plugins.sass import overwritten_operands

FEW, SOME, MANY = 16, 64, 4096
MIXTRAL = MoESizes(T=MANY, D=4096, E=8, I=14336)
FORMATS: list[dict[str, Any]] = [{"weight_format": each} for each in ("dense", "int8", "fp8_e4m3")]
FORMATS += [{"weight_format": "int4", "group_size": 128}]
FORMATS += [{"weight_format": each, "keep_activations": True} for each in ("int8", "fp8_e4m3")]
TARGETS = [(sm, each) for sm in (80, 90) for each in FORMATS if (sm, each["weight_format"]) != (80, "fp8_e4m3")]
OTHERS = [(89, FORMATS[2]), (89, FORMATS[-1]), (120, FORMATS[0]), (120, FORMATS[1]), (120, FORMATS[-1])]
# What multiplies in tiles of 64 rows and more.
WARPGROUP = {
    "dense": "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16",
    "int4": "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16",
    "int8": "wgmma.mma_async.sync.aligned.m64n{}k32.s32.s8.s8",
    "fp8_e4m3": "wgmma.mma_async.sync.aligned.m64n{}k32.f32.e4m3.e4m3",
}
WARP = {
    "dense": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "int4": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "int8": "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
}


POINTED = {"dense": "bf16", "int8": "i8", "int4": "i8", "fp8_e4m3": "f8E4M3FN"}


@cache
def compiled(variant: Variant, sm: int) -> tuple[Compiled, str, str]:
    """With its PTX, and its TTGIR."""
    asm = triton_compile(variant, sm).asm
    return compile_variant(variant, sm), asm["ptx"], asm["ttgir"]


def asynchronous_copies(ttgir: str) -> Counter[str]:
    """How many of each kind of tile, such as 32x128 of bf16."""
    found = re.findall(r"ttg\.async_copy_global_to_local.*?: tensor<(\d+x\d+)x!tt\.ptr<(\w+)>", ttgir)
    return Counter(" of ".join(each) for each in found)


def expected_copies(variant: Variant, attributes: MoEAttributes) -> Counter[str]:
    """Every operand's tile once for each stage: in front of the loop for all but the last, and in it."""
    constants, kinds = dict(variant.constants), dict(variant.arguments)
    a, BM, BN, BK = kinds.get("x", kinds.get("hidden")), *(int(str(constants[name])) for name in ("BM", "BN", "BK"))
    matrices = attributes.matrices if variant.kernel == "gemm_in" else 1
    wide = POINTED["dense"] if a == "*bf16" else POINTED[attributes.weight_format]
    copies = Counter({f"{BM}x{BK} of {wide}": int(str(constants.get("PARTS", 1)))})
    stored = f"{BK // 2 if attributes.weight_format == 'int4' else BK} of {POINTED[attributes.weight_format]}"
    copies[f"{BN}x{f'{BK // 8} of i32' if constants['NIBBLES'] == 'words' else stored}"] += matrices
    return Counter({tile: count * variant.num_stages for tile, count in copies.items()})


def products(sm: int, attributes: MoEAttributes, T: int, dtype: Any = "bfloat16") -> list[Variant]:
    listed = launches(sm, MIXTRAL._replace(T=T), attributes, dtype)
    return [launch.variant for launch in listed if launch.variant.kernel.startswith("gemm")]


@pytest.mark.parametrize(("sm", "stored"), TARGETS)
def test_instructions(sm: int, stored: dict[str, Any]) -> None:
    attributes = MoEAttributes(top_k=2, **stored)
    multiplied = "dense" if attributes.keep_activations else attributes.weight_format
    for T in (FEW, SOME, MANY):
        for variant in products(sm, attributes, T):
            kernel, ptx, ttgir = compiled(variant, sm)
            constants = dict(variant.constants)
            expected = WARP["dense"] if T == FEW else WARP.get(multiplied)
            if sm == 90 and T > FEW:
                columns = int(str(constants["BM" if multiplied == "int4" else "BN"]))
                expected = WARPGROUP[multiplied].format(min(columns, 128) if multiplied == "int8" else columns)
            found = set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.[\w.]+", ptx))
            assert found == {expected}, (T, variant.kernel, found)
            assert "cp.async.cg.shared.global" in ptx, "weights must arrive in the background"
            assert asynchronous_copies(ttgir) == expected_copies(variant, attributes), (T, variant.kernel)
            assert kernel.spills == 0, (T, variant.kernel, kernel.registers, kernel.spills)


OTHER_GATES: list[dict[str, Any]] = [{"glu": glu, "activation": "gelu_tanh"} for glu in ("none", "three_way")]
OTHER_GATES += [{"alpha": 1.702, "beta": 1.0, "limit": 7.0}]


@pytest.mark.parametrize("gate", OTHER_GATES)
@pytest.mark.parametrize(("sm", "weight_format"), [(80, "dense"), (90, "dense"), (90, "int8")])
def test_other_gates_do_not_spill(sm: int, weight_format: Any, gate: dict[str, Any]) -> None:
    attributes = MoEAttributes(top_k=2, weight_format=weight_format, **gate)
    for T in (FEW, SOME, MANY):
        variant = products(sm, attributes, T, "float16")[0]
        kernel, *_ = compiled(variant, sm)
        assert kernel.spills == 0, (T, kernel.registers, kernel.spills)


@pytest.mark.parametrize("shape", ["mixtral", "grok-1", "openmoe-8b"])
def test_four_bits_become_numbers_in_registers(shape: str) -> None:
    """Those of Hopper's left operand: weights in shared memory are as they are stored. And a product keeps its operands."""
    sizes, attributes = SHAPES[shape].sizes, with_format(SHAPES[shape].attributes, "int4")
    for variant in variants(90, sizes._replace(T=MANY), attributes, "bfloat16"):
        kernel, _, ttgir = compiled(variant, 90)
        if "warp_group_dot" in ttgir:
            assert not re.search(r"ttg\.local_(alloc %|store)", ttgir), variant.constants
            products, overwriting = overwritten_operands(kernel.cubin)
            assert products >= int(str(dict(variant.constants)["BK"])) // 16
            assert overwriting == [], variant.constants


@pytest.mark.parametrize("shape", ["dbrx", "openmoe-8b"])
def test_gates_on_groups_do_not_spill(shape: str) -> None:
    """Addresses take registers too, and their number depends on the sizes."""
    sizes, attributes = SHAPES[shape].sizes, with_format(SHAPES[shape].attributes, "int4")
    for T in (SOME, MANY):
        listed = launches(90, sizes._replace(T=T), attributes, "bfloat16")
        (variant,) = (launch.variant for launch in listed if launch.variant.kernel == "gemm_in")
        kernel, *_ = compiled(variant, 90)
        assert kernel.spills == 0, (T, kernel.registers, kernel.spills)


@pytest.mark.parametrize(("sm", "stored"), [*TARGETS, *OTHERS])
def test_every_kernel_fits_and_is_deterministic(sm: int, stored: dict[str, Any]) -> None:
    attributes = MoEAttributes(top_k=2, capacity_factor=1.0, **stored)
    for variant in variants(sm, MIXTRAL, attributes, "bfloat16"):
        kernel, ptx, _ = compiled(variant, sm)
        assert kernel.spills == 0
        assert 0 < kernel.registers * kernel.block[0] <= 65536
        assert kernel.shared <= MOST_SHARED[sm]
        assert not re.search(r"\b(atom|red)\.", ptx), "atomics add in any order"


def test_saved_kernels_load(tmp_path: Path) -> None:
    sizes, attributes = MoESizes(T=16, D=48, E=3, I=40), MoEAttributes(top_k=2)
    listed = variants(80, sizes, attributes, "float16")
    names = save(tmp_path / "kernels", 80, listed)
    assert sorted(names) == sorted(path.name for path in (tmp_path / "kernels").iterdir())
    sm, found = load(tmp_path / "kernels")
    assert (sm, found) == (80, {variant.name: compile_variant(variant, 80) for variant in listed})
    for kernel in found.values():
        assert kernel.cubin.startswith(b"\x7fELF")
        assert b".py" not in kernel.cubin, "names a file of the machine that compiled it"


def test_an_altered_kernel_is_refused(tmp_path: Path) -> None:
    (variant, *_) = variants(80, MoESizes(T=1, D=48, E=3, I=40), MoEAttributes(top_k=2), "float16")
    save(tmp_path, 80, [variant])
    cubin = tmp_path / f"{variant.name}.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    with pytest.raises(GateworkError, match=f"{variant.name}.cubin is damaged or missing; fix: build the engine again"):
        load(tmp_path)


def test_refusal_names_the_kernel() -> None:
    variant = products(90, MoEAttributes(top_k=2, weight_format="fp8_e4m3"), SOME)[0]
    with pytest.raises(GateworkError, match="Triton does not compile gemm_in for sm_80"):
        compile_variant(variant, 80)
