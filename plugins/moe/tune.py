"""Times tiles of the grouped products on a GPU, to choose those of `kernels.launches` by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from gatework.plugins.moe import torch_op
from gatework.plugins.moe.bench_layers import FORMATS, SHAPES, formats_of, inputs_of, random_weights, with_format
from gatework.plugins.moe.kernels import launches
from gatework.plugins.moe.kernels.launches import FEW, SOME, Tile
from gatework.plugins.moe.measure import attempt, seconds_of

FEW_TILES = [
    Tile(16, 32, 128, 4, 4),
    Tile(16, 32, 128, 4, 6),
    Tile(16, 32, 64, 4, 8),
    Tile(16, 64, 128, 4, 4),
    Tile(16, 16, 128, 4, 6),
    Tile(16, 64, 64, 8, 6),
]
SOME_TILES = [
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 5),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 128, 64, 4, 3),
]
MANY_TILES = [
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 64, 128, 8, 3),
    Tile(64, 128, 64, 4, 4),
]


def candidates(T: int) -> list[Tile]:
    """Tiles worth a try for a number of tokens."""
    return FEW_TILES if T <= FEW else SOME_TILES if T <= SOME else MANY_TILES


def table(shape_name: str, formats: Iterable[str], tokens: Iterable[int]) -> Iterator[str]:
    """Rows of Markdown: microseconds of the whole operator under graph replay, with one tile for both products.

    The first row of each is the table's own choice. A tile that does not fit into shared memory says so.
    """
    shape = SHAPES[shape_name]
    yield "| shape | format | T | BM | BN | BK | warps | stages | us |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in formats_of(shape_name, formats):
        attributes = with_format(shape.attributes, name)
        weights = random_weights(shape, attributes, FORMATS[name].dtype)
        for T in tokens:
            x, logits = inputs_of(shape, T, FORMATS[name].dtype)
            call = partial(torch_op.moe, x, logits, attributes=attributes, **weights)
            for tile in (None, *candidates(T)):
                with forced(tile):
                    found = attempt(partial(microseconds, call))
                words = tile or ("chosen", *"----")
                yield f"| {shape_name} | {name} | {T} | {' | '.join(map(str, words))} | {found.get('us', found)} |"


def microseconds(call: Callable[[], object]) -> dict[str, float]:
    return {"us": round(1e6 * seconds_of(call), 1)}


@contextmanager
def forced(tile: Tile | None) -> Iterator[None]:
    """Every product uses the tile, in launchers made since; None: the table's."""
    before = launches._tile
    torch_op._launcher.cache_clear()
    if tile is not None:
        launches._tile = lambda setting, matrices: tile
    try:
        yield
    finally:
        launches._tile = before
        torch_op._launcher.cache_clear()
