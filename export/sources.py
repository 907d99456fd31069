"""Finding a checkpoint's weight files in its folder, and the tensors in them by the names that the files give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gatework.export import ckpt
from gatework.export import folder as folders
from gatework.export.readers import DOWNLOAD, read_safetensors, read_torch
from gatework.export.stored import Stored, StoredTensor, merge
from gatework.export.zarr import HEADER, ZarrArray, read_zarr
from gatework.plugins.errors import GateworkError

Layout = Literal["hf", "consolidated", "ckpt", "t5x"]
FileTensors = dict[Path, dict[str, StoredTensor]]

# Model-parallel shards are joined along this axis, by the last part of the tensor's name (Meta's ColumnParallelLinear,
# RowParallelLinear and ParallelEmbedding); what is not listed is the same in every shard.
SHARD_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}
WEIGHTS = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_torch}  # or the index of either
T5X_EMBEDDING = "target.token_embedder.embedding"
FIX = "give a folder with model.safetensors, pytorch_model.bin (or the index of either), consolidated.* or ckpt-0 files"


@dataclass(frozen=True, slots=True)
class Source:
    """Weights as the files have them.

    layout: whose tensor names they are. config: the file that describes the model; ckpt-0 may lack it. indexes: the files that
    list shards. files: every weight file with its tensors. tensors: the same by name, shards joined.
    """

    layout: Layout
    config: Path | None
    files: Mapping[Path, Mapping[str, StoredTensor | ckpt.ScaledTensor | ZarrArray]]
    tensors: dict[str, Stored]
    indexes: tuple[Path, ...] = ()


def find_source(folder: Path) -> Source:
    """The weights in a folder; Hugging Face files are preferred where a repository has both kinds.

    Only headers are read. Raises GateworkError where nothing is found or a file is damaged, or leads out of the folder.
    """
    if folders.exists(folder, "config.json"):
        for stem, read in WEIGHTS.items():
            if folders.exists(folder, stem):
                return hugging_face(folder, [stem], read)
            if folders.exists(folder, f"{stem}.index.json"):
                return indexed(folder, f"{stem}.index.json", read)
    if folders.exists(folder, f"{T5X_EMBEDDING}/{HEADER}"):
        return t5x(folder)
    if ckpt.has_ckpt(folder):
        files = ckpt.read_ckpt(folder)
        config = folders.member(folder, "config.json") if folders.exists(folder, "config.json") else None
        return Source("ckpt", config, files, {name: tensor for part in files.values() for name, tensor in part.items()})
    if folders.exists(folder, "params.json"):
        return consolidated(folder)
    folders.require(folder, "config.json", "params.json", fix="give a checkpoint folder")
    folders.refuse_others(folder, *WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))
    raise GateworkError(f"{folder} has no weights", fix=FIX)


def t5x(folder: Path) -> Source:
    """T5X's folders, one for each parameter, `target.` before its name; those of the optimiser's state are not read."""
    if not folders.exists(folder, "config.json"):
        fix = "put the config.json of the model's Hugging Face repository beside them"
        raise GateworkError(f"{folder} has T5X's parameters and no config.json", fix=fix)
    homes = sorted(path for path in folder.iterdir() if path.name.startswith("target."))
    arrays = {path.name: read_zarr(folders.member(folder, path.name)) for path in homes}
    files = {array.first: {name: array} for name, array in arrays.items()}
    headers = tuple(array.folder / HEADER for array in arrays.values())
    return Source("t5x", folders.member(folder, "config.json"), files, dict(arrays), headers)


def hugging_face(
    folder: Path, names: list[str], read: Callable[[Path], dict[str, StoredTensor]], indexes: tuple[Path, ...] = ()
) -> Source:
    """One or several files whose tensors are disjoint."""
    files = {path: read(path) for path in (folders.member(folder, name) for name in names)}
    config = folders.member(folder, "config.json")
    return Source("hf", config, files, disjoint(files), indexes)


def indexed(folder: Path, index_name: str, read: Callable[[Path], dict[str, StoredTensor]]) -> Source:
    """Shards named by an index file; a tensor that its shard does not have is a GateworkError."""
    index = folders.member(folder, index_name)
    weight_map = folders.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise GateworkError(f"{index} has no weight_map", expected="an object of tensor names and file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name == index.name:
            expected = "names of the files that hold the tensors"
            raise GateworkError(f"{index} names itself as a file of weights", expected=expected, fix=DOWNLOAD)
        folders.member(folder, name)
        if not folders.exists(folder, name):
            raise GateworkError(f"{index} names a file that is missing", got=repr(name), fix="download it")
    source = hugging_face(folder, names, read, (index,))
    for tensor, name in weight_map.items():
        if tensor not in source.files[folder / name]:
            raise GateworkError(f"tensor {tensor} is missing from {folder / name}, where {index.name} puts it")
    return source


def consolidated(folder: Path) -> Source:
    """Meta's and Mistral's files: one, model-parallel shards (`.pth`), or parts with disjoint names (`.pt`)."""
    config = folders.member(folder, "params.json")
    if folders.exists(folder, "consolidated.safetensors"):
        path = folders.member(folder, "consolidated.safetensors")
        files = {path: read_safetensors(path)}
        return Source("consolidated", config, files, disjoint(files))
    for suffix in ("pth", "pt"):
        paths = numbered(folder, suffix)
        if paths:
            files = {path: read_torch(path) for path in paths}
            return Source("consolidated", config, files, joined(files) if suffix == "pth" else disjoint(files))
    raise GateworkError(f"{folder} has no weights", fix=FIX)


def numbered(folder: Path, suffix: str) -> list[Path]:
    """`consolidated.NN.{suffix}` in order; a gap in the numbers is a GateworkError."""
    names = [p.name for p in folder.iterdir() if re.fullmatch(rf"consolidated\.\d\d\.{suffix}", p.name, re.ASCII)]
    expected = [f"consolidated.{i:02d}.{suffix}" for i in range(len(names))]
    for name in expected:
        if name not in names:
            raise GateworkError(f"{folder / name} is missing", got=", ".join(sorted(names)), fix="download all shards")
    paths = [folders.member(folder, name) for name in expected]
    for path in paths:
        if not path.is_file():
            raise GateworkError(f"{path} is not a file", fix=DOWNLOAD)
    return paths


def disjoint(files: FileTensors) -> dict[str, Stored]:
    """All tensors of all files; one that is in two of them is a GateworkError."""
    homes: dict[str, Path] = {}
    tensors: dict[str, Stored] = {}
    for path, stored in files.items():
        for name, tensor in stored.items():
            if name in homes:
                raise GateworkError(f"tensor {name} is in two files", got=f"{homes[name].name} and {path.name}")
            homes[name], tensors[name] = path, tensor
    return tensors


def joined(files: FileTensors) -> dict[str, Stored]:
    """Model-parallel shards, every file with the same names."""
    shards = list(files.items())
    first_path, first = shards[0]
    for path, stored in shards[1:]:
        for name in sorted(first.keys() ^ stored.keys()):
            lacking = path if name in first else first_path
            raise GateworkError(f"tensor {name} is missing from {lacking}", expected="the same names in all shards")
    tensors: dict[str, Stored] = {}
    for name, tensor in first.items():
        dim = SHARD_DIM.get(name.removesuffix(".weight").rpartition(".")[2])
        tensors[name] = tensor if dim is None else merge(name, [stored[name] for _, stored in shards], dim)
    return tensors
