"""The CPU kernels' attention, through ONNX Runtime, against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from gatework.plugins.moe import cpu_ops
from tests.plugins.attention_cpu_model import (
    LARGEST_HALF,
    SLOTS,
    Settings,
    attention_feeds,
    attention_model,
    definition,
)
from tests.plugins.moe_cpu_model import hard_to_halve, session

# float32, against float64, which now and then round to different neighbours in float16.
RELATIVE = 2e-5


def run(settings: Settings, feeds: dict[str, np.ndarray], threads: int = 2) -> list[np.ndarray]:
    library = cpu_ops.find_library()
    assert library is not None, "the environment was set up without a C++ compiler"
    given = {name: name in feeds for name in ("slopes", "sinks")}
    model = attention_model(settings, joined="k" not in feeds, **given)
    return session(model, library, threads).run(None, feeds)  # type: ignore[no-any-return]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert want.size > 0
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("S", [1, 2, 100])
@pytest.mark.parametrize(
    ("settings", "width", "rotary"),
    [
        (Settings(), 64, 64),
        (Settings(num_heads=6, kv_num_heads=6), 16, 16),
        (Settings(num_heads=8, kv_num_heads=1, softcap=3.0), 80, 32),
        (Settings(num_heads=5, kv_num_heads=1), 272, 0),
        (Settings(window=50), 128, 128),
        (Settings(num_heads=24, kv_num_heads=2, window=3, softcap=30.0), 32, 8),
    ],
    ids=str,
)
def test_the_definition(settings: Settings, width: int, rotary: int, S: int) -> None:
    for starts, joined in (([0, 5, 777], True), ([1300 - S], False)):
        feeds = attention_feeds(settings, starts, S, width=width, rotary=rotary, joined=joined)
        for got, want in zip(run(settings, feeds), definition(settings, feeds), strict=True):
            assert relative(got, want) <= RELATIVE


def test_the_cache_rounds_like_numpy_and_never_to_infinity() -> None:
    settings = Settings(num_heads=1, kv_num_heads=1)
    feeds = attention_feeds(settings, [0], SLOTS, width=16, rotary=0, joined=True)
    feeds["q"] = hard_to_halve(feeds["q"].size).reshape(feeds["q"].shape)
    _, keys, values = run(settings, feeds)
    largest = np.float32(LARGEST_HALF)
    for got, given in zip((keys, values), np.split(feeds["q"], 3, axis=-1)[1:], strict=True):
        want = given.clip(-largest, largest).astype(np.float16)
        assert np.array_equal(got[0, 0].view(np.uint16), want[0].view(np.uint16))
    feeds["q"][0, 5, 20] = np.nan
    assert np.isnan(run(settings, feeds)[1][0, 0, 5, 4])


def test_a_context_of_several_splits() -> None:
    feeds = attention_feeds(Settings(), [1200], 1, width=64, rotary=64, joined=True)
    assert relative(run(Settings(), feeds)[0], definition(Settings(), feeds)[0]) <= RELATIVE


@pytest.mark.parametrize(("S", "joined"), [(1, True), (1, False), (40, True)])
def test_alibi_without_rotation(S: int, joined: bool) -> None:
    settings = Settings(num_heads=6, kv_num_heads=3, window=70)
    feeds = attention_feeds(settings, [100, 0], S, width=32, rotary=0, joined=joined)
    feeds["slopes"] = 2.0 ** -np.arange(1, 7, dtype=np.float32)
    for got, want in zip(run(settings, feeds), definition(settings, feeds), strict=True):
        assert relative(got, want) <= RELATIVE


@pytest.mark.parametrize("S", [1, 40])
def test_sinks(S: int) -> None:
    """Below all scores, among them and above, in one split and in several."""
    settings = Settings(num_heads=6, kv_num_heads=2, window=0 if S == 1 else 30)
    feeds = attention_feeds(settings, [1200, 0, 7], S, width=32, rotary=16, joined=True)
    feeds["sinks"] = np.array([-90, -1, 0, 2, 9, 90], np.float32)
    for got, want in zip(run(settings, feeds), definition(settings, feeds), strict=True):
        assert relative(got, want) <= RELATIVE


@pytest.mark.parametrize("S", [1, 60])
def test_same_bits_alone_and_on_any_number_of_threads(S: int) -> None:
    settings = Settings(num_heads=8, kv_num_heads=2)
    feeds = attention_feeds(settings, [3, 1100, 64], S, width=32, rotary=32, joined=True)
    feeds["sinks"] = np.linspace(-2, 2, 8, dtype=np.float32)
    want = run(settings, feeds, threads=1)
    for threads in (2, 5):
        for got, expected in zip(run(settings, feeds, threads), want, strict=True):
            assert np.array_equal(got, expected)
    for b in range(3):
        alone = {name: feeds[name] if name in ("cos", "sin", "sinks") else feeds[name][b : b + 1] for name in feeds}
        for got, expected in zip(run(settings, alone), want, strict=True):
            assert np.array_equal(got[0], expected[b])


def test_large_scores_and_what_is_no_number() -> None:
    settings = Settings(num_heads=2, kv_num_heads=2, scale=100.0)
    feeds = attention_feeds(settings, [20], 12, width=16, rotary=16, joined=True)
    y, want = run(settings, feeds)[0], definition(settings, feeds)[0]
    assert np.abs(y - want).max() <= 1e-3 * np.abs(want).max()
    feeds["q"][0, 4, 3] = np.nan  # of the first head alone
    broken = run(settings, feeds)[0]
    assert np.isnan(broken[0, 4, :16]).all()
    assert np.array_equal(broken[0, 4, 16:], y[0, 4, 16:])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("write_indices", np.array([1299]), "outside the cache"),
        ("write_indices", np.array([-1]), "outside the cache"),
        ("write_indices", np.array([0, 0]), "write_indices has 2 elements, expected 1"),
        ("q", np.zeros((1, 2, 100), np.float32), "input q has"),
        ("cos", np.zeros((1300, 32), np.float32), "narrower than their rotation"),
        ("sin", np.zeros((7, 8), np.float32), "input sin has"),
        ("past_v", np.zeros((1, 2, 4, 32), np.float16), "input past_v has"),
        ("sinks", np.zeros(3, np.float32), "input sinks has 3 elements, expected 4"),
    ],
)
def test_misfits_are_refused(name: str, change: np.ndarray, message: str) -> None:
    """A damaged graph or a wrong position must not make the kernels touch memory beyond a tensor."""
    feeds = attention_feeds(Settings(), [0], 2, width=32, rotary=16, joined=True)
    with pytest.raises(Exception, match=message):
        run(Settings(), feeds | {name: change})


def test_heads_that_do_not_divide_are_refused() -> None:
    feeds = attention_feeds(Settings(num_heads=6), [0], 1, width=16, rotary=16, joined=True)
    with pytest.raises(Exception, match="not a multiple"):
        run(Settings(num_heads=6, kv_num_heads=4), feeds)
