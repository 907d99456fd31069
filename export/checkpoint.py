"""Checkpoint: a model's weights under canonical names, read from the files of any supported release, piece by piece."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gatework.export import ckpt, mxfp4
from gatework.export import folder as folders
from gatework.export.config import Dtype, ModelConfig
from gatework.export.families import FAMILIES, T5X, family_of, gpt_oss, grok1, params_json
from gatework.export.families.fields import Fields
from gatework.export.sources import Source, find_source
from gatework.export.stored import TORCH_DTYPES, Stored
from gatework.export.weights import Piece, Weight, WeightMap
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.cpu_ops import BLOCK_ROWS

PART_BYTES = 64 << 20
SAMPLE_BYTES = 256  # of every tensor, in the fingerprint


def read_config(path: str | PathLike[str]) -> ModelConfig:
    """ModelConfig of a checkpoint folder, or of a `config.json` or `params.json` alone; needs no weights.

    Raises GateworkError for a missing or malformed file, an unknown family, and a feature that is not supported.
    """
    path = Path(path)
    if path.is_file():
        raw = folders.read_json(path)
        if path.name == "params.json" or "dim" in raw:
            return params_json.read_config(raw)
        return family_of(raw).read_config(raw)
    open_folder(path)
    if folders.exists(path, "config.json"):
        return read_hf_config(path)
    if ckpt.has_ckpt(path):
        return grok1.read_config(grok1.PUBLISHED)
    folders.require(path, "config.json", "params.json", fix="give a checkpoint folder")
    raw = folders.read_json(folders.member(path, "params.json"))
    if raw.get("vocab_size") == -1:
        return read_params(raw, find_source(path))
    return params_json.read_config(raw)


def open_folder(path: Path) -> None:
    """Raise unless `path` is a folder."""
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise GateworkError(f"checkpoint {path} {what}", fix="give a checkpoint folder")


def read_hf_config(folder: Path) -> ModelConfig:
    """`config.json`, with the end-of-text ids that `generation_config.json` adds."""
    raw = folders.read_json(folders.member(folder, "config.json"))
    config = family_of(raw).read_config(raw)
    if not folders.exists(folder, "generation_config.json"):
        return config
    generation = Fields(folders.read_json(folders.member(folder, "generation_config.json")), "generation_config.")
    eos = dict.fromkeys((*config.eos_token_ids, *generation.token_ids("eos_token_id")))
    bos = config.bos_token_id
    if bos is None:
        bos = next(iter(generation.token_ids("bos_token_id")), None)
    return replace(config, bos_token_id=bos, eos_token_ids=tuple(eos))


def read_params(raw: dict[str, object], source: Source) -> ModelConfig:
    """`params.json`, with the vocabulary's size from the stored embedding where the file leaves it open."""
    embedding = source.tensors.get("tok_embeddings.weight")
    return params_json.read_config(raw, embedding.shape[0] if embedding is not None and embedding.shape else None)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights of a model, still in their files.

    path: the folder. config: with the stored weights' dtype. weights: where every canonical weight of
    `config.tensor_shapes()` comes from, in that order. source: the files.
    """

    path: Path
    config: ModelConfig
    weights: WeightMap
    source: Source

    @classmethod
    def open(cls, path: str | PathLike[str], *, drop_tokens: bool = False) -> Checkpoint:
        """Open a checkpoint folder: every header is read and every tensor checked, and no data is read.

        drop_tokens: see ModelConfig.

        Raises GateworkError for a folder, file or tensor that is missing, damaged, unsupported, extra or misshapen.
        """
        path = Path(path)
        open_folder(path)
        source = find_source(path)
        if source.layout == "hf":
            config = read_hf_config(path)
            if mxfp4.is_packed(source.tensors):
                weights = gpt_oss.mxfp4_weight_map(config)
                source = replace(source, tensors=mxfp4.unpacked(source.tensors))
            else:
                weights = FAMILIES[config.family].weight_map(config)
        elif source.layout == "t5x":
            config = read_hf_config(path)
            if config.family not in T5X:
                got, expected = config.family, " or ".join(T5X)
                raise GateworkError("T5X's layout is not read of this family", got=got, expected=expected)
            weights = T5X[config.family](config)
        elif source.layout == "ckpt":
            raw = None if source.config is None else folders.read_json(source.config)
            config = grok1.ckpt_config(raw, list(source.tensors))
            weights = grok1.ckpt_weight_map(config)
        else:
            assert source.config is not None
            config = read_params(folders.read_json(source.config), source)
            stacked = any(".block_sparse_moe." in name for name in source.tensors)
            weights = params_json.weight_map(config, stacked_experts=stacked)
        weights = {name: weights[name] for name in config.tensor_shapes()}
        check(path, weights, source.tensors)
        dtype = cast(Dtype, source.tensors[weights["embed.weight"].pieces[0].name].dtype)
        return cls(path, replace(config, dtype=dtype, drop_tokens=drop_tokens), weights, source)

    @property
    def stored_as(self) -> str:
        """In words, how the files hold most weights."""
        if self._mxfp4:
            return "MXFP4 experts"
        return "int8 with scales" if self._scaled else self.config.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes that the weights take in the files."""
        return sum(path.stat().st_size for path in self.source.files) if self._scaled or self._mxfp4 else self.nbytes

    @property
    def _mxfp4(self) -> bool:
        return any(isinstance(tensor, mxfp4.MxTensor) for tensor in self.source.tensors.values())

    @property
    def _scaled(self) -> bool:
        return any(isinstance(tensor, ckpt.ScaledTensor) for tensor in self.source.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes that all canonical weights take as they are read."""
        return sum(map(self.weight_bytes, self.weights))

    def weight_bytes(self, name: str) -> int:
        """Bytes that a canonical weight takes in its stored dtype."""
        return math.prod(self.weights[name].shape) * self.dtype(name).itemsize

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a canonical weight."""
        return TORCH_DTYPES[self.source.tensors[self.weights[name].pieces[0].name].dtype]

    def read(self, name: str) -> Tensor:
        """A whole canonical weight, contiguous, in its stored dtype."""
        weight = self.weights[name]
        return self.rows(name, 0, count_rows(weight)).view(weight.shape)

    def check_small(self, *, max_bytes: int = 64 << 20) -> None:
        """Read the smallest weights, as many as `max_bytes` hold: norms, biases, scales of codes, or a tiny checkpoint's all.

        What is not finite in them is a GateworkError now, and in others when their turn comes.
        """
        for name in sorted(self.weights, key=self.weight_bytes):
            max_bytes -= self.weight_bytes(name)
            if max_bytes < 0:
                return
            for _ in self.parts(name):
                pass

    def parts(self, name: str, *, max_bytes: int = PART_BYTES) -> Iterator[Tensor]:
        """A canonical weight in pieces along axis 0, in order, so that memory stays bounded by one of them.

        Experts come one by one as [out, in], a weight that is stored (in, out) as a whole, and other weights in multiples of 16
        rows, as many as `max_bytes` hold.
        """
        for start, stop in self.spans(name, max_bytes=max_bytes):
            yield self.rows(name, start, stop)

    def spans(self, name: str, *, max_bytes: int = PART_BYTES) -> Iterator[tuple[int, int]]:
        """First and last row of each of `parts`."""
        weight = self.weights[name]
        total = count_rows(weight)
        if len(weight.shape) == 3:
            step = weight.shape[1]
        elif any(piece.transpose for piece in weight.pieces):  # whose rows take reading all of it
            step = total
        else:
            row = math.prod(weight.shape[1:]) * self.dtype(name).itemsize
            step = max(1, max_bytes // row // BLOCK_ROWS) * BLOCK_ROWS
        for start in range(0, total, step):
            yield start, min(start + step, total)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a canonical weight; those of experts [E, out, in] count as E * out rows.

        A NaN or an infinity in them is a GateworkError that names the checkpoint's tensor.
        """
        weight = self.weights[name]
        columns = weight.shape[-1:] if len(weight.shape) > 1 else ()
        out = torch.empty((stop - start, *columns), dtype=self.dtype(name))
        position = 0  # of the piece's first row
        for piece in weight.pieces:
            size = piece_rows(piece)
            first, last = max(start, position), min(stop, position + size)
            if first < last:
                part = out[first - start : last - start]
                read_piece(piece, self.source.tensors[piece.name], part, first - position)
                check_finite(part, piece.name, self.path)
            position += size
        return out

    def fingerprint(self) -> str:
        """sha256, in hex, over the config and index files, and over the names, sizes and headers of the weight files.

        It stands for the weights without reading them all: of every stored tensor it takes name, dtype, shape and the
        first 256 bytes. The folder's own name and place do not count.
        """
        digest = hashlib.sha256()
        for path in (*filter(None, (self.source.config,)), *self.source.indexes):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
        for path, tensors in sorted(self.source.files.items()):
            digest.update(f"{path.relative_to(self.path)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                for name, tensor in sorted(tensors.items()):
                    file.seek(tensor.offset)
                    digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + file.read(SAMPLE_BYTES))
        return digest.hexdigest()


def check(path: Path, weights: WeightMap, tensors: Mapping[str, Stored]) -> None:
    """Raise unless the checkpoint has exactly the tensors that its config asks for, in shapes and dtypes that fit."""
    expected = {piece.name: piece.shape for weight in weights.values() for piece in weight.pieces}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise GateworkError(f"tensor {missing[0]} is missing from {path}{and_more(missing)}")
    extra = [name for name in tensors if name not in expected and not is_harmless(name, weights)]
    if extra:
        raise GateworkError(f"tensor {extra[0]} in {path} has no place in this model{and_more(extra)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise GateworkError(f"tensor {name} in {path} has the wrong shape", got=tensors[name].shape, expected=shape)
        if (dtype := tensors[name].dtype) not in TORCH_DTYPES:
            known = " or ".join(TORCH_DTYPES)
            raise GateworkError(f"dtype of tensor {name} in {path} is not supported", got=dtype, expected=known)
    for canonical, weight in weights.items():
        dtypes = {tensors[piece.name].dtype for piece in weight.pieces}
        if len(dtypes) > 1:
            got = " and ".join(sorted(dtypes))
            raise GateworkError(f"tensors of {canonical} in {path} differ in dtype", got=got, expected="one dtype")


def check_finite(rows: Tensor, name: str, path: Path) -> None:
    """Raise if a weight is infinite or NaN, which aminmax hands on."""
    low, high = (float(x) for x in rows.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        fix = "download the file again, or repair the model"
        raise GateworkError(f"tensor {name} in {path} has weights that are not finite", got=f"{low} to {high}", fix=fix)


def and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def is_harmless(name: str, weights: WeightMap) -> bool:
    """Tables that the decoder computes itself, and the copies of a shared embedding that some files keep."""
    copies = ("lm_head.weight", "output.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tied = "lm_head.weight" not in weights and name in copies
    return tied or name.endswith("rotary_emb.inv_freq") or name == "rope.freqs"


def count_rows(weight: Weight) -> int:
    """Rows of a canonical weight; those of experts [E, out, in] count as E * out."""
    return math.prod(weight.shape[:-1]) if len(weight.shape) > 1 else weight.shape[0]


def piece_rows(piece: Piece) -> int:
    """Rows that a piece contributes to its weight."""
    if piece.transpose:
        return piece.shape[-1]
    if len(piece.shape) == 3:
        first, last = piece.rows or (0, piece.shape[0])
        return (last - first) * piece.shape[1]
    return piece.shape[0] if piece.rows is None else piece.rows[1] - piece.rows[0]


def read_piece(piece: Piece, stored: Stored, out: Tensor, start: int) -> None:
    """Fill `out` [n, ...] with rows start to start + n of the piece, which see for the steps."""
    first, last = piece.rows or (0, piece.shape[0])
    if piece.transpose or piece.interleaved or len(piece.shape) == 3:
        assert not piece.rope_heads, piece
        block = torch.empty((last - first, *piece.shape[1:]), dtype=out.dtype)
        stored.read_into(block, first)
        rows = block.flatten(0, -2).t() if piece.transpose else block.flatten(0, -2)
        if piece.interleaved:
            axis = 0 if len(piece.shape) == 3 else 1
            rows = rows.unflatten(axis, (-1, 2)).transpose(axis, axis + 1).flatten(axis, axis + 1)
        out.copy_(rows[start : start + out.shape[0]])
    elif piece.rope_heads:
        Dh = (last - first) // piece.rope_heads
        head, stop = start // Dh * Dh, -(-(start + out.shape[0]) // Dh) * Dh  # whole heads around the rows asked for
        block = torch.empty((stop - head, piece.shape[1]), dtype=out.dtype)
        stored.read_into(block, first + head)
        halves = block.view(-1, Dh // 2, 2, piece.shape[1]).transpose(1, 2).reshape(block.shape)
        out.copy_(halves[start - head : start - head + out.shape[0]])
    else:
        stored.read_into(out, first + start)
