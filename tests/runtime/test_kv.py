"""The KV cache's layout: where slots lie, and what a move copies."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import pytest

from gatework.runtime.backends.kv import ALIGNMENT, HostCache, KVLayout, cache_names

LAYOUT = KVLayout(cache_names(2), slots=3, heads=2, positions=5, width=6, itemsize=4)


def view(cache: HostCache, name: str, slot: int) -> np.ndarray:
    """A slot [Hkv, S_max, Dh], through its address."""
    nbytes = cache.layout.slot_bytes
    block = (ctypes.c_uint8 * nbytes).from_address(cache.address(name, slot))
    return np.frombuffer(block, np.float32).reshape(cache.layout.shape(1)[1:])


def test_names() -> None:
    assert cache_names(2) == ("0.k", "0.v", "1.k", "1.v")


def test_slots_follow_each_other_and_tensors_are_aligned() -> None:
    slot = 2 * 5 * 6 * 4
    assert LAYOUT.slot_bytes == slot
    assert [LAYOUT.offset("0.k", i) for i in range(3)] == [0, slot, 2 * slot]
    assert LAYOUT.offset("0.v", 0) == LAYOUT.tensor_bytes == 768  # 720 rounded up
    assert LAYOUT.total == 4 * 768


def test_no_two_slots_share_a_byte() -> None:
    starts = [LAYOUT.offset(name, slot) for name in LAYOUT.names for slot in range(LAYOUT.slots)]
    assert len(starts) == 12
    assert all(a + LAYOUT.slot_bytes <= b for a, b in pairwise(starts))
    assert starts[-1] + LAYOUT.slot_bytes <= LAYOUT.total


def test_the_cache_starts_empty_and_aligned() -> None:
    cache = HostCache(LAYOUT)
    assert all(cache.address(name, 0) % ALIGNMENT == 0 for name in LAYOUT.names)
    assert not any(view(cache, name, slot).any() for name in LAYOUT.names for slot in range(3))


@pytest.mark.parametrize(("source", "target", "length"), [(2, 0, 3), (0, 2, 5), (1, 0, 1)])
def test_a_move_copies_the_first_positions_of_every_head_and_nothing_else(
    source: int, target: int, length: int
) -> None:
    cache = HostCache(LAYOUT)
    rng = np.random.default_rng(0)
    for name in LAYOUT.names:
        for slot in range(3):
            view(cache, name, slot)[:] = rng.normal(size=(2, 5, 6))
    before = {(name, slot): view(cache, name, slot).copy() for name in LAYOUT.names for slot in range(3)}
    cache.move(source, target, length)
    for (name, slot), old in before.items():
        want = old.copy()
        if slot == target:
            want[:, :length] = before[name, source][:, :length]
        np.testing.assert_array_equal(view(cache, name, slot), want)
