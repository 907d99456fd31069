"""Hostile T5X checkpoints: what is done to the headers and folders of a sound one, and what the refusal says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import hostile
from tests.golden.openmoe import weights as openmoe
from tests.t5x_format import write_t5x

FORM = "t5x"
EMBEDDING, NORM = "target.token_embedder.embedding", "target.decoder.decoder_norm.scale"


def make(folder: Path) -> Path:
    """A sound checkpoint of two layers."""
    return write_t5x(folder / FORM, *openmoe.make(num_layers=2))


def header(**fields: Any) -> Callable[[Path], object]:
    """Change fields of the norm's header."""

    def craft(path: Path) -> None:
        file = path / NORM / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return craft


def text(content: str) -> Callable[[Path], object]:
    return lambda path: (path / NORM / ".zarray").write_text(content)


def moved_outside(path: Path) -> None:
    shutil.move(path / NORM, path.parent / "elsewhere")
    hostile.link(path / NORM, path.parent / "elsewhere")


def linked_chunk(path: Path) -> None:
    hostile.link(path / NORM / ".zarray", "/etc/passwd")


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "another family's config": (
        lambda path: (path / "config.json").write_text(
            json.dumps(json.loads((path / "config.json").read_text()) | LLAMA)
        ),
        "is not read of this family; got llama",
    ),
    "no JSON": (text("{"), "is not JSON"),
    "a list": (text("[]"), "holds no JSON object"),
    "no fields": (text("{}"), "dtype is not supported"),
    "another version": (header(zarr_format=3), "zarr_format"),
    "columns first": (header(order="F"), "order"),
    "a filter": (header(filters=[{"id": "delta"}]), "filters"),
    "blosc": (header(compressor={"id": "blosc"}), "compressor"),
    "a compressor of a million": (header(compressor=1_000_000), "compressor"),
    "float64": (header(dtype="<f8"), "dtype"),
    "a list of types": (header(dtype=[["a", "<f4"]]), "dtype"),
    "no shape": (header(shape=None), "shape is wrong"),
    "negative shape": (header(shape=[-48]), "shape is wrong"),
    "shape of truths": (header(shape=[True]), "shape is wrong"),
    "five axes": (header(shape=[1] * 5, chunks=[1] * 5), "shape is wrong"),
    "no chunks": (header(chunks=[0]), "chunks is wrong"),
    "chunks of other axes": (header(chunks=[32, 1]), "chunks is wrong"),
    "chunks of 4 TB": (header(shape=[2**39], chunks=[2**39]), "chunks is wrong"),
    "a trillion chunks": (header(shape=[2**39], chunks=[1]), "chunks is wrong"),
    "chunk missing": (lambda path: (path / NORM / "1").unlink(), "scale/1 is missing"),
    "header missing": (lambda path: (path / NORM / ".zarray").unlink(), "zarray is missing"),
    "header that is a pipe": (lambda path: hostile.pipe(path / NORM / ".zarray"), "zarray is missing"),
    "header that leads outside": (linked_chunk, "leads outside"),
    "folder that leads outside": (moved_outside, "leads outside"),
    "folder missing": (lambda path: shutil.rmtree(path / NORM), "decoder_norm.scale is missing"),
    "another shape": (header(shape=[47]), "has the wrong shape"),
    "parameter too many": (lambda path: shutil.copytree(path / NORM, path / "target.extra"), "has no place"),
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
