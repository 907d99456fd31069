"""The CPU kernels, through ONNX Runtime, against the operator's definition; and that every path gives the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatework.export.groups import DEFAULT_GROUPS
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe import cpu_ops
from gatework.plugins.moe.reference import moe
from gatework.plugins.moe.spec import MoEAttributes
from tests.plugins.moe_cases import attribute_grid, label
from tests.plugins.moe_cpu_model import matmul_model, model_of, moe_model, norm_of, run_all, session, with_norm

ROOT = Path(__file__).parents[2]
# Activations have 8 bits per group; random numbers lose the most by that, as their groups have the least to gain from it.
RELATIVE = 1e-2


@pytest.fixture(scope="module")
def library() -> Path:
    path = cpu_ops.find_library()
    assert path is not None, "the environment was set up without a C++ compiler"
    return path


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, of all elements together."""
    assert got.shape == want.shape
    assert got.size > 0
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("attributes", attribute_grid(), ids=label)
def test_experts_equal_the_definition(library: Path, attributes: MoEAttributes, bits: int) -> None:
    D, E, I, T = 96, 5, 80, 40
    model, exact = moe_model(attributes, bits, 32, D=D, E=E, I=I, bias=attributes.renormalize)
    rng = np.random.default_rng(1)
    x, logits = rng.standard_normal((T, D), np.float32), 2 * rng.standard_normal((T, E), np.float32)
    (y,) = session(model, library).run(None, {"x": x, "router_logits": logits})
    assert relative(y, moe(x, logits, attributes=attributes, **exact)) <= RELATIVE


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_as_engines_have_them(library: Path, bits: int) -> None:
    attributes = MoEAttributes(top_k=2)
    D, E, I, T = 512, 3, 768, 9
    model, exact = moe_model(attributes, bits, DEFAULT_GROUPS[f"int{bits}"], D=D, E=E, I=I)
    rng = np.random.default_rng(2)
    x, logits = rng.standard_normal((T, D), np.float32), rng.standard_normal((T, E), np.float32)
    (y,) = session(model, library).run(None, {"x": x, "router_logits": logits})
    assert relative(y, moe(x, logits, attributes=attributes, **exact)) <= RELATIVE


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 80), st.integers(1, 9), st.integers(1, 80), st.integers(0, 70)),
    st.sampled_from((8, 4)),
    st.sampled_from((16, 32, 128)),
    st.integers(0, 2**32 - 1),
)
def test_any_shape(sizes: tuple[int, int, int, int], bits: int, group: int, seed: int) -> None:
    library = cpu_ops.find_library()
    assert library is not None
    D, E, I, T = sizes
    rng = np.random.default_rng(seed)
    attributes = MoEAttributes(top_k=int(rng.integers(1, E + 1)))
    model, exact = moe_model(attributes, bits, group, D=D, E=E, I=I, seed=seed)
    x, logits = rng.standard_normal((T, D), np.float32), rng.standard_normal((T, E), np.float32)
    logits[: T // 2, rng.integers(E)] += 100  # half of the tokens agree on an expert
    (y,) = session(model, library).run(None, {"x": x, "router_logits": logits})
    want = moe(x, logits, attributes=attributes, **exact)
    assert y.shape == want.shape
    if T:  # few and short sums average little of the rounding out
        assert np.abs(y - want).max() <= 0.05 * np.abs(want).max() + 1e-6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K", "group"), [(1, 16, 16), (35, 100, 32), (300, 1000, 128), (32, 256, 256)])
def test_products(library: Path, N: int, K: int, group: int, bits: int) -> None:
    model, exact = matmul_model(N, K, bits, group, rank=3)
    x = np.random.default_rng(3).standard_normal((2, 50, K), np.float32)
    want = x.astype(np.float64) @ exact.T.astype(np.float64)
    assert relative(session(model, library).run(None, {"x": x})[0], want) <= RELATIVE
    model, _ = matmul_model(N, K, bits, group, rank=3, wide=1)
    assert relative(session(model, library).run(None, {"x": x})[0], want) <= RELATIVE / 200


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("T", [1, 50])
def test_a_norm_before_a_product(library: Path, T: int, centred: bool) -> None:
    """The sum is exact, and y that of a node without a norm, up to activations that round the other way."""
    x, skip = (np.random.default_rng(i).standard_normal((T, 100), np.float32) for i in range(2))
    model, exact = matmul_model(35, 100, 8, 32, wide=1)
    y, total = session(with_norm(model, x, centred=centred), library).run(None, {"x": x, "skip": skip})
    assert np.array_equal(total, x + skip)
    assert relative(y, norm_of(total, centred) @ exact.T.astype(np.float64)) <= RELATIVE / 200
    (alone,) = session(with_norm(model, x, skip=False, centred=centred), library).run(None, {"x": total})
    assert np.array_equal(alone, y)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_norm_and_a_router_before_experts(library: Path, skipped: bool) -> None:
    D, E, I, T = 96, 9, 80, 39
    x, skip = (np.random.default_rng(i).standard_normal((1, T, D), np.float32) for i in range(2))
    router = np.random.default_rng(2).standard_normal((E, D), np.float32)
    model, exact = moe_model(MoEAttributes(top_k=2), 8, 32, D=D, E=E, I=I)
    feeds = {"x": x} | ({"skip": skip} if skipped else {})
    y, *rest = session(with_norm(model, x, skip=skipped, router=router), library).run(None, feeds)
    logits = rest[-1]
    normed = norm_of(x + skip if skipped else x, False)[0].astype(np.float32)
    assert relative(logits, normed @ router.T) <= 1e-6
    assert relative(y[0], moe(normed, logits, attributes=MoEAttributes(top_k=2), **exact)) <= RELATIVE
    if skipped:
        assert np.array_equal(rest[0], x + skip)


def test_misfitting_norms_are_refused(library: Path) -> None:
    x = np.zeros((1, 64), np.float32)
    model = with_norm(matmul_model(40, 64, 8, 32)[0], x)
    with pytest.raises(Exception, match="input skip has 128 elements, expected 64"):
        session(model, library).run(None, {"x": x, "skip": np.zeros((2, 64), np.float32)})
    del model.graph.node[0].output[1], model.graph.output[1]
    with pytest.raises(Exception, match="output 1 is missing"):
        session(model, library).run(None, {"x": x, "skip": x})
    model = with_norm(
        moe_model(MoEAttributes(top_k=2), 8, 32, D=64, E=3, I=32)[0], x, router=np.zeros((4, 64), np.float32)
    )
    with pytest.raises(Exception, match="input router has 256 elements, expected 192"):
        session(model, library).run(None, {"x": x, "skip": x})


def test_routing_is_that_of_the_definition(library: Path) -> None:
    """Experts that return a number of their own tell which were chosen: ties go to the lower index, NaN comes last."""
    E, K, D, I = 6, 2, 16, 16
    attributes = MoEAttributes(top_k=K)
    model, exact = moe_model(attributes, 8, 16, D=D, E=E, I=I, bias=True)
    logits = np.array(
        [[1, 1, 1, 1, 1, 1], [0, 5, 5, 0, 5, 0], [np.nan, 1, 2, np.nan, 1, 0], [-9, -9, -9, -9, 80, 80]], np.float32
    )
    x = np.zeros((len(logits), D), np.float32)
    (y,) = session(model, library).run(None, {"x": x, "router_logits": logits})
    rows = [0, 1, 3]
    assert relative(y[rows], moe(x[rows], logits[rows], attributes=attributes, **exact)) <= RELATIVE
    same_choice = np.array([[0, 1, 2, 0, 1, 0]], np.float32)  # experts 2 and 1, as the row with NaN
    (want,) = session(model, library).run(None, {"x": x[:1], "router_logits": same_choice})
    assert np.isnan(y[2]).all() or np.array_equal(y[2], want[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_same_bits_alone_and_on_any_number_of_threads(library: Path, bits: int) -> None:
    model, _ = moe_model(MoEAttributes(top_k=2), bits, 32, D=96, E=5, I=200)
    rng = np.random.default_rng(4)
    feeds = {"x": rng.standard_normal((77, 96), np.float32), "router_logits": rng.standard_normal((77, 5), np.float32)}
    (want,) = session(model, library, 1).run(None, feeds)
    for threads in (2, 3, 7):
        assert np.array_equal(session(model, library, threads).run(None, feeds)[0], want)
    alone = session(model, library)
    for t in range(77):
        (y,) = alone.run(None, {name: array[t : t + 1] for name, array in feeds.items()})
        assert np.array_equal(y[0], want[t])


def test_not_a_number_stays_one(library: Path) -> None:
    model, _ = matmul_model(20, 64, 8, 32)
    x = np.ones((3, 64), np.float32)
    x[1, 5], x[2, 40] = np.nan, np.inf
    (y,) = session(model, library).run(None, {"x": x})
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1:]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((2, 16, 16, 4), np.uint8)}, "input w has"),
        ({"w_scale": np.zeros((3, 1, 16), np.uint16)}, "input w_scale has"),
        ({"group_size": 24}, "group_size a multiple of 16"),
        ({"bits": 5}, "bits must be 4 or 8"),
        ({"N": 0}, "attribute N is out of range"),
        ({"wide": 2}, "attribute wide is out of range"),
        ({"K": 65}, "last dimension of x is not 65"),
    ],
)
def test_misfits_are_refused(library: Path, change: dict[str, object], message: str) -> None:
    """A damaged graph must not make the kernels read beyond a tensor."""
    inputs = {
        "x": np.zeros((1, 64), np.float32),
        "w": np.zeros((3, 16, 16, 4), np.uint8),
        "w_scale": np.zeros((3, 2, 16), np.uint16),
    }
    attributes: dict[str, object] = {"N": 40, "K": 64, "bits": 8, "group_size": 32, "wide": 0}
    for name, value in change.items():
        (inputs if name in inputs else attributes)[name] = value  # type: ignore[index]
    with pytest.raises(Exception, match=message):
        session(model_of("PackedMatMul", inputs, attributes, 40), library).run(None, {"x": inputs["x"]})


def outputs_of(library: Path, path: str, out: Path, **environment: str) -> dict[str, np.ndarray]:
    """What a process that is told to use one path computes."""
    env = os.environ | {"GATEWORK_CPU_PATH": path, "PYTHONPATH": str(ROOT)} | environment
    script = Path(__file__).with_name("moe_cpu_model.py")
    subprocess.run([sys.executable, script, library, out], env=env, check=True)
    return dict(np.load(out))


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    assert len(want) > 50
    for name, array in want.items():
        assert np.array_equal(got[name], array), name


@pytest.mark.parametrize("path", cpu_ops.PATHS)
def test_paths_give_the_same_bits(library: Path, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWORK_CPU_PATH", path)
    try:
        assert cpu_ops.chosen_path(library) == path
    except GateworkError:
        pytest.skip(f"this processor lacks {path}")
    assert_same_bits(outputs_of(library, path, tmp_path / "out.npz"), run_all(library))


def test_unknown_path_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWORK_CPU_PATH", "sse9")
    with pytest.raises(GateworkError, match="names no kernels of this machine; got sse9; expected one of avx512_vnni"):
        cpu_ops.chosen_path(library)


def compiled(folder: Path, *options: str) -> Path:
    """The library, built again with other options."""
    command = ["cmake", "-S", ROOT / "plugins/moe/cpu", "-B", folder, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return folder / "libgatework_cpu.so"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    library = compiled(tmp_path / "build", "-DGATEWORK_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++")
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter early enough for the former to see its exceptions
    ]
    settings = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    outputs_of(library, "", tmp_path / "best.npz", **settings)
    outputs_of(library, "portable", tmp_path / "portable.npz", **settings)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/include/simde").is_dir(), reason="needs SIMDe's headers and cmake")
def test_emulated_paths_give_the_same_bits(library: Path, tmp_path: Path) -> None:
    """Paths for processors other than this one."""
    emulated = compiled(tmp_path / "build", "-DGATEWORK_EMULATE=ON")
    want = run_all(library)
    for path in cpu_ops.PATHS:
        assert_same_bits(outputs_of(emulated, path, tmp_path / f"{path}.npz"), want)
