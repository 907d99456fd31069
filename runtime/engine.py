"""Reading an engine directory: the manifest, and the proof that every file is what the builder wrote."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError
from gatework.plugins.moe.spec import VERSION as PLUGIN_VERSION

Check = Literal["auto", "full", "sizes"]
_PLACE = re.compile(rf"(({engine_format.KERNELS}|{engine_format.CHECKPOINT}|stage[0-9]+)/)?[^/]+")  # of a file
_MAX_MANIFEST = 8 << 20  # bytes
_AUTO_LIMIT = 4 << 30  # bytes hashed at load by default; hashing more would take longer than loading


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine was built for: sequences decoded at once, positions per sequence, prompt tokens per step."""

    max_batch: int
    max_seq: int
    prefill_chunk: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of an engine that was cut at layer boundaries: layers [first, end), in a folder of the engine."""

    number: int
    first: int
    end: int
    weight_bytes: int

    @property
    def name(self) -> str:
        """For messages."""
        layers = f"layer {self.first}" if self.end - self.first == 1 else f"layers {self.first} to {self.end - 1}"
        return f"stage {self.number} ({layers})"


@dataclass(frozen=True, slots=True)
class Engine:
    """An opened engine directory.

    `model` is the description that the exporter wrote (`ModelConfig.to_dict()`): vocab_size, num_layers, num_kv_heads,
    head_dim, eos_token_ids and so on.
    """

    path: Path
    manifest: dict[str, Any]
    limits: Limits

    @property
    def model(self) -> dict[str, Any]:
        """The model's description."""
        model: dict[str, Any] = self.manifest["model"]
        return model

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of packed weights: `total`, and `per_token`, those that one decoded token reads."""
        sizes: dict[str, int] = self.manifest["weight_bytes"]
        return sizes

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the prompt, and the decoder begins with a start token."""
        return bool(self.model.get("encoder_layers"))

    @property
    def stages(self) -> list[Stage]:
        """Its parts, in the order in which a token passes through them; none where it is one graph."""
        parts = self.manifest.get(engine_format.STAGES, [])
        layers = [part["layers"] for part in parts]
        sizes = [part["weight_bytes"]["total"] for part in parts]
        return [Stage(i, first, end, sizes[i]) for i, (first, end) in enumerate(layers)]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: Check = "auto") -> Engine:
        """Read and check an engine directory: every file's size, every small file's SHA-256, and the weights' as well.

        Args:
            check: "full" hashes the weights, "sizes" does not, "auto" does so up to 4 GiB.

        Raises:
            GateworkError: not an engine, of another format, incomplete, or altered; names the file.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        _check_sizes(path, manifest["files"])
        _check_numbers(path / engine_format.MANIFEST, manifest)
        engine = cls(path, manifest, Limits(**manifest["limits"]))
        engine._check_hashes([name for name in manifest["files"] if not _is_weights(name)])
        engine.check_weights(check)
        return engine

    def check_prompt(self, tokens: int) -> None:
        """Raise where the engine cannot read a prompt of so many tokens."""
        if tokens > self.limits.max_seq:
            got, expected = f"{tokens} tokens", f"at most {self.limits.max_seq}"
            raise GateworkError("the prompt is too long", got=got, expected=expected, fix=_shorten(self))

    def room_after(self, prompt: int) -> int:
        """Positions that a prompt of so many tokens leaves to new ones: behind an encoder all but the start token's."""
        return self.limits.max_seq - (1 if self.has_encoder else prompt)

    def check_weights(self, check: Check) -> None:
        """Compare the weight files' hashes with the manifest's, as `open` does."""
        files = self.manifest["files"]
        weights = [name for name in files if _is_weights(name)]
        small = sum(files[name]["size"] for name in weights) <= _AUTO_LIMIT
        if check == "full" or (check == "auto" and small):
            self._check_hashes(weights)

    def _check_hashes(self, names: list[str]) -> None:
        files = self.manifest["files"]
        heads = {name: files[name]["head"] for name in names if "head" in files[name]}
        for name, facts in engine_format.file_table(self.path, names, heads).items():
            if facts["sha256"] != files[name]["sha256"]:
                raise _damaged(self.path / name, "its content was altered")


def is_engine(path: Path) -> bool:
    """Whether the folder says that it is an engine."""
    return (path / engine_format.MANIFEST).is_file()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / engine_format.MANIFEST
    if not path.is_dir():
        raise GateworkError(f"{path} is not an engine", got="no such folder", fix="build one with `gatework build`")
    if not file.is_file():
        raise GateworkError(f"{path} is not an engine", got=f"no {file.name}", fix="build one with `gatework build`")
    try:
        if file.stat().st_size > _MAX_MANIFEST:
            raise _damaged(file, "it is too large")
        manifest = json.loads(file.read_text())
    except (ValueError, RecursionError):
        raise _damaged(file, "it is not JSON") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise _damaged(file, "it has no format_version")
    if version != engine_format.FORMAT_VERSION:
        newer = version > engine_format.FORMAT_VERSION
        fix = "upgrade gatework or rebuild the engine" if newer else "build the engine again"
        what = f"{path} has {'a newer' if newer else 'an older'} engine format"
        raise GateworkError(what, got=version, expected=engine_format.FORMAT_VERSION, fix=fix)
    for name, kind in engine_format.MANIFEST_FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise _damaged(file, f"its field {name} is missing or of the wrong type")
    if (version := manifest["plugin_version"]) != PLUGIN_VERSION:
        what = f"{path} was built with another version of the MoE operator"
        raise GateworkError(what, got=version, expected=PLUGIN_VERSION, fix="build the engine again")
    return manifest


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".plan"))


def _check_sizes(path: Path, files: dict[str, Any]) -> None:
    manifest = path / engine_format.MANIFEST
    for name, facts in files.items():
        file = path / name
        if not _PLACE.fullmatch(name) or Path(name).name != name.rpartition("/")[2]:
            raise _damaged(manifest, f"it names {name!r}, which is not a plain file name")
        known = isinstance(facts, dict) and set(facts) - {"head"} == {"size", "sha256"}
        if not known or not (type(head := facts.get("head", 0)) is int and 0 <= head <= engine_format.MAX_HEAD):
            raise _damaged(manifest, f"it does not tell the size and SHA-256 of {name}")
        if not file.is_file():
            raise _damaged(file, "it is missing")
        if (size := file.stat().st_size) != facts["size"]:
            raise _damaged(file, f"it has {size} bytes, not {facts['size']}")


def _check_numbers(file: Path, manifest: dict[str, Any]) -> None:
    """Raise unless limits, sizes and token ids, which loops and allocations rely on, are counts."""
    limits, model, weights = manifest["limits"], manifest["model"], manifest["weight_bytes"]
    if set(limits) != {"max_batch", "max_seq", "prefill_chunk"} or not all(map(_is_count, limits.values())):
        raise _damaged(file, "its limits are not known")
    if not all(_is_count(weights.get(name)) for name in ("total", "per_token")):
        raise _damaged(file, "its weight_bytes are not known")
    eos = model.get("eos_token_ids")
    if not _is_count(model.get("vocab_size")) or not isinstance(eos, list) or not all(type(x) is int for x in eos):
        raise _damaged(file, "its model's vocabulary is not known")
    if not all(_is_count(model.get(name)) for name in ("num_layers", "num_kv_heads", "head_dim")) or "moe" not in model:
        raise _damaged(file, "its model's layers are not known")
    layers, start = model.get("encoder_layers", 0), model.get("start_token_id")
    starts = type(start) is int and 0 <= start < model["vocab_size"]
    encoders = {engine_format.ENCODER, engine_format.ENCODER_PLAN}
    if layers and not (_is_count(layers) and starts and encoders & manifest["files"].keys()):
        raise _damaged(file, "its model's encoder is not known")
    _check_stages(file, manifest)


def _check_stages(file: Path, manifest: dict[str, Any]) -> None:
    """Raise unless the stages, if there are any, hold each layer once and in order."""
    parts, end = manifest.get(engine_format.STAGES, []), 0
    try:
        for part in parts:
            first, stop = part["layers"]
            whole = first == end and _is_count(stop) and stop > first and _is_count(part["weight_bytes"]["total"])
            end = stop if whole else -1
    except (KeyError, TypeError, ValueError):
        end = -1
    if not isinstance(parts, list) or (engine_format.STAGES in manifest and end != manifest["model"]["num_layers"]):
        raise _damaged(file, "its stages are not known")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _damaged(file: Path, why: str) -> GateworkError:
    return GateworkError(f"{file} is damaged: {why}", fix="build the engine again")


def _shorten(engine: Engine) -> str:
    """What helps against a prompt that is too long."""
    from gatework.export.config import ModelConfig

    limit = ModelConfig.from_dict(engine.model).context_limit
    if limit == engine.limits.max_seq:
        return "shorten the prompt: the engine has the model's whole context"
    return f"shorten the prompt, or build the engine again with a larger --max-seq, up to {limit}"
