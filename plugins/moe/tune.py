"""Times tiles of the grouped products on a GPU, to choose those of `kernels.launches` by."""

from __future__ import annotations

import itertools
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
    Tile(16, 32, 128, 4, 8),
    Tile(16, 32, 256, 4, 3),
    Tile(16, 32, 256, 4, 4),
    Tile(16, 64, 128, 4, 4),
    Tile(16, 64, 256, 8, 3),
]
SOME_TILES = [
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 5),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 32, 256, 4, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 128, 128, 4, 3),
]
MANY_TILES = [
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 128, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
]
# Of int4: 16 columns or more to a warp.
FEW_INT4_TILES = [Tile(8, 16, 128, 1, 8), Tile(8, 32, 128, 2, 6), Tile(8, 32, 128, 2, 8), Tile(8, 64, 128, 4, 6)]
SOME_INT4_TILES = [Tile(16, 64, 128, 4, 6), Tile(32, 64, 128, 4, 4), Tile(32, 128, 128, 8, 4), Tile(64, 64, 64, 4, 4)]
MANY_INT4_TILES = [Tile(64, 64, 64, 4, 4), Tile(64, 128, 128, 8, 3), Tile(128, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)]


def candidates(T: int, name: str) -> list[Tile]:
    """Tiles worth a try for a number of tokens in a format."""
    few, some, many = (
        (FEW_INT4_TILES, SOME_INT4_TILES, MANY_INT4_TILES) if name == "int4" else (FEW_TILES, SOME_TILES, MANY_TILES)
    )
    return few if T <= FEW else some if T <= SOME else many


def table(shape_name: str, formats: Iterable[str], tokens: Iterable[int]) -> Iterator[str]:
    """Rows of Markdown: microseconds of the whole operator under graph replay, with a tile for one of its products.

    The first row of each is the table's own choice, which the other product keeps. A tile that does not fit into shared
    memory says so.
    """
    shape = SHAPES[shape_name]
    yield "| shape | format | T | product | BM | BN | BK | warps | stages | us |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in formats_of(shape_name, formats):
        attributes = with_format(shape.attributes, name)
        weights = random_weights(shape, attributes, FORMATS[name].dtype)
        for T in tokens:
            x, logits = inputs_of(shape, T, FORMATS[name].dtype)
            call = partial(torch_op.moe, x, logits, attributes=attributes, **weights)
            for product, tile in ((None, None), *itertools.product(("in", "out"), candidates(T, name))):
                with forced(product, tile):
                    found = attempt(partial(microseconds, call))
                words = (product, *tile) if tile else ("chosen", *"-----")
                yield f"| {shape_name} | {name} | {T} | {' | '.join(map(str, words))} | {found.get('us', found)} |"


def microseconds(call: Callable[[], object]) -> dict[str, float]:
    return {"us": round(1e6 * seconds_of(call), 1)}


@contextmanager
def forced(product: str | None, tile: Tile | None) -> Iterator[None]:
    """The product, "in" or "out" of gated experts, uses the tile, in launchers made since; None: the table's."""
    before = launches._tile
    torch_op._launcher.cache_clear()
    if tile is not None:
        chosen = tile
        launches._tile = lambda setting, matrices: (
            chosen if (matrices > 1) == (product == "in") else before(setting, matrices)
        )
    try:
        yield
    finally:
        launches._tile = before
        torch_op._launcher.cache_clear()
