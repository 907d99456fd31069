"""Tokenizer files of a checkpoint: regular, inside its folder, of sane sizes, and ones that load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gatework.export import folder as folders
from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError

if TYPE_CHECKING:
    from gatework.runtime.tokenizer import Tokenizer

MAX_BYTES = {"tokenizer.json": 48 << 20, "tokenizer.model": 8 << 20}
MAX_OTHER_BYTES = 8 << 20
MAX_ITEMS = 2_000_000  # in tokenizer.json, counted by its commas; 256,000 tokens and 600,000 merges have 1,500,000


def tokenizer_files(folder: Path) -> list[Path]:
    """Those that the folder has. One that leads out of it, is no file or is too large is a GateworkError."""
    paths = [folders.member(folder, name) for name in engine_format.TOKENIZER_FILES if os.path.lexists(folder / name)]
    for path in paths:
        if not path.is_file():
            raise GateworkError(
                f"{path} is not a file", fix="copy the checkpoint's tokenizer files again, or remove it"
            )
        if path.stat().st_size > (most := MAX_BYTES.get(path.name, MAX_OTHER_BYTES)):
            raise GateworkError(f"{path} is too large for a tokenizer", expected=f"at most {most} bytes")
        if path.name == "tokenizer.json":
            if (commas := path.read_bytes().count(b",")) > MAX_ITEMS:
                got, expected = f"{commas} commas", f"at most {MAX_ITEMS}"
                raise GateworkError(f"{path} is too large for a tokenizer", got=got, expected=expected)
        elif path.suffix == ".json":
            folders.read_json(path)
    return paths


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that an engine of this checkpoint will have, or None. One that is damaged is a GateworkError."""
    from gatework.runtime.tokenizer import load_tokenizer  # the engine's reader: what it refuses, no engine may hold

    tokenizer_files(folder)
    return load_tokenizer(folder)


def encode_text(folder: Path, tokenizer: Tokenizer | None, text: str) -> list[int]:
    """Token ids of a sample text for the checkpoint in `folder`, whose tokenizer this is."""
    if tokenizer is None:
        raise GateworkError(f"{folder} has no tokenizer", fix="put the model's tokenizer files beside its weights")
    if not text:
        raise GateworkError("the text is empty", fix="give some thousands of tokens")
    return tokenizer.encode(text)


def read_text(path: Path) -> str:
    """A UTF-8 file's text; GateworkError where it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise GateworkError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise GateworkError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
