"""Writing a graph and its weights: model.onnx, with every tensor as external data inside safetensors files."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from gatework.export.checkpoint import Checkpoint
from gatework.export.coded import coded_parts
from gatework.export.packing import TORCH_DTYPES, Pack, TensorSpec, is_weight, pack_of, static_shape
from gatework.export.safetensors_writer import SafetensorsWriter
from gatework.plugins import engine_format
from gatework.plugins.machine import usable_cpus

GRAPH, DENSE, EXPERTS = "model.onnx", "weights.safetensors", "experts.safetensors"
EXPERT_ALIGN = 4096  # bytes, a page
_INLINE_BYTES = 1024  # smaller constants stay in the graph file
_PART_BYTES = 16 << 20  # of a dense weight, encoded at once


def write_model(
    model: ir.Model,
    checkpoint: Checkpoint,
    directory: Path,
    *,
    encoder: ir.Model | None = None,
    files: tuple[str, str] = (DENSE, EXPERTS),
    progress: bool = False,
) -> list[str]:
    """Write the graph, and its encoder's, and their tensors into `directory`; returns the file names.

    Memory stays bounded by a few parts of a weight. Expert weights go to the second of `files`, page-aligned for memory
    mapping; everything else to the first. Tensors that lie in files already stay there. What both graphs read is there once.
    """
    models = {GRAPH: model} | ({engine_format.ENCODER: encoder} if encoder is not None else {})
    values = [value for each in models.values() for value in each.graph.initializers.values()]
    packs = list({pack_of(value).outputs: pack_of(value) for value in values if is_weight(value)}.values())
    experts = [pack for pack in packs if len(checkpoint.weights[pack.sources[0]].shape) == 3]
    dense = [pack for pack in packs if pack not in experts]
    tables = {
        _table_name(file, value): value
        for file, each in models.items()
        for value in each.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes > _INLINE_BYTES
    }
    names = list(models)
    first, second = files
    with _bar(packs, checkpoint, progress) as bar:
        for name, group, constants, align in ((first, dense, tables, 64), (second, experts, {}, EXPERT_ALIGN)):
            if group or constants:
                places = _write_file(checkpoint, directory / name, group, constants, align, bar)
                for file, each in models.items():
                    _point_to(each.graph, directory / name, places, file)
                names.append(name)
    for file, each in models.items():
        ir.save(each, directory / file)
    return names


def _table_name(file: str, value: ir.Value) -> str:
    """Of a constant in a weight file: the exporter numbers those of each graph by itself."""
    assert value.name is not None
    return value.name if file == GRAPH else f"{file}.{value.name}"


def write_experts(packs: list[Pack], checkpoint: Checkpoint, path: Path, *, progress: bool = False) -> None:
    """Write expert weights that are inputs of a graph, page-aligned for memory mapping."""
    with _bar(packs, checkpoint, progress) as bar:
        _write_file(checkpoint, path, packs, {}, EXPERT_ALIGN, bar)


def _bar(packs: list[Pack], checkpoint: Checkpoint, progress: bool) -> tqdm:
    total = sum(checkpoint.weight_bytes(source) for pack in packs for source in pack.sources)
    return tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress, file=sys.stderr)


def _write_file(
    checkpoint: Checkpoint, path: Path, packs: list[Pack], constants: dict[str, ir.Value], align: int, bar: tqdm
) -> dict[str, tuple[int, int]]:
    """Write the outputs of packs, and constants; returns offset and length of each tensor."""
    specs = [spec for pack in packs for spec in pack.outputs]
    for name, value in constants.items():
        assert value.dtype is not None
        specs.append(TensorSpec(name, TORCH_DTYPES[value.dtype], static_shape(value)))
    with SafetensorsWriter(path, specs, align=align) as writer:
        for name, value in constants.items():
            assert value.const_value is not None
            writer.append(name, _as_torch(value.const_value))
        for pack, part_bytes, encoded in _encode(checkpoint, packs):
            for spec, data in zip(pack.outputs, encoded, strict=True):
                writer.append(spec.name, data)
            bar.update(part_bytes)
    return {spec.name: writer.location(spec.name) for spec in specs}


def _point_to(graph: ir.Graph, path: Path, places: dict[str, tuple[int, int]], file: str) -> None:
    """Let initializers of the graph that goes to `file` read their data from the file `path`."""
    for name, value in graph.initializers.items():
        place = name if is_weight(value) else _table_name(file, value)
        if place not in places:
            continue
        offset, length = places[place]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            path.name, offset, length, value.dtype, shape=value.shape, name=name, base_dir=path.parent
        )


def _encode(checkpoint: Checkpoint, packs: list[Pack]) -> Iterator[tuple[Pack, int, tuple[Tensor, ...]]]:
    """Encoded parts in order, with the bytes read for each. One thread encodes one part; few are in flight at a time."""
    workers = usable_cpus()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pending: deque[tuple[Pack, int, Future[tuple[Tensor, ...]]]] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for pack in packs:
                encode: Callable[..., tuple[Tensor, ...]] = pack.encode if pack.keep is None else pack.keep.encode
                for source in pack.sources:
                    for part in _parts(checkpoint, pack, source):
                        nbytes = part[0].numel() * checkpoint.dtype(source).itemsize
                        pending.append((pack, nbytes, pool.submit(encode, *part)))
                        if len(pending) > workers:
                            yield _finish(pending.popleft())
            while pending:
                yield _finish(pending.popleft())
    finally:
        torch.set_num_threads(threads)


def _parts(checkpoint: Checkpoint, pack: Pack, source: str) -> Iterator[tuple[Tensor, ...]]:
    """What the pack encodes: rows in floats, or codes and scales."""
    if pack.keep is not None:
        yield from coded_parts(checkpoint, source, max_bytes=_PART_BYTES)
        return
    for part in checkpoint.parts(source, max_bytes=_PART_BYTES):
        yield (part,)


def _finish(item: tuple[Pack, int, Future[tuple[Tensor, ...]]]) -> tuple[Pack, int, tuple[Tensor, ...]]:
    pack, part_bytes, future = item
    return pack, part_bytes, future.result()


def _as_torch(tensor: ir.TensorProtocol) -> Tensor:
    raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
    return raw if isinstance(raw, Tensor) else torch.from_numpy(tensor.numpy())
