"""Files of a checkpoint folder that may come from anyone: paths that stay inside it, and JSON that is an object."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gatework.plugins.errors import GateworkError

MAX_JSON_BYTES = 4 << 20  # the index of a model with 12,000 experts has 3.5 MB
MAX_JSON_PARTS = (
    100_000  # objects and lists, which take 35 times as much memory as text; brackets in strings count as well
)
MAX_JSON_DEPTH = 100
MAX_DIGITS = 4000  # of a number; Python itself turns no more than 4300 into one
_REPLACE = "replace the file by a sound one"


def member(folder: Path, name: str) -> Path:
    """The path of file `name` inside `folder`; a name or a link that leads out of it is a GateworkError.

    The folder may be a snapshot in the Hugging Face cache, whose files are links into the repository's `blobs`.
    """
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a null in it
        raise GateworkError(f"{folder} has a file that no path leads to", got=repr(name)) from None
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        fix = "put the file into the folder, and write its name without a path"
        raise GateworkError(f"{folder} names a file outside the checkpoint folder", got=repr(name), fix=fix)
    if not any(target.is_relative_to(h) for h in homes):
        link = next(place for place in (path, *path.parents) if place.is_symlink())
        fix = "put what it leads to in its place, as cp -rL does"
        raise GateworkError(f"{link} is a symbolic link that leads outside the checkpoint folder", got=target, fix=fix)
    return path


def exists(folder: Path, name: str) -> bool:
    """Whether `folder` has a regular file, or a link to one, of that name."""
    try:
        return (folder / name).is_file()
    except OSError:  # such as a name that is too long
        return False


def require(folder: Path, *names: str, fix: str) -> None:
    """Raise unless `folder` has a regular file of one of these names. fix: what to do where nothing has such a name."""
    if not any(exists(folder, name) for name in names):
        refuse_others(folder, *names)
        raise GateworkError(f"{folder} has neither {' nor '.join(names)}", fix=fix)


def refuse_others(folder: Path, *names: str) -> None:
    """Raise where something in `folder` has one of these names and is no regular file."""
    for path in (folder / name for name in names):
        if os.path.lexists(path) and not exists(folder, path.name):
            nowhere = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "a pipe or a device"
            got = "a folder" if path.is_dir() else nowhere
            raise GateworkError(f"{path} is not a file", got=got, fix=f"put the model's own {path.name} in its place")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else in it is a GateworkError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise GateworkError(f"{path} is too large for a JSON file", expected=f"at most {MAX_JSON_BYTES} bytes")
        text = path.read_bytes()
        if (parts := text.count(b"{") + text.count(b"[")) > MAX_JSON_PARTS:
            if _brackets_depth(text) > MAX_JSON_DEPTH:
                raise RecursionError
            got, expected = f"{parts} objects and lists", f"at most {MAX_JSON_PARTS}"
            raise GateworkError(f"{path} is too large for a JSON file", got=got, expected=expected)
        value = json.loads(text, parse_int=partial(_integer, path))
        if depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
    except RecursionError:
        expected = f"at most {MAX_JSON_DEPTH} objects and lists within each other"
        raise GateworkError(f"{path} is nested too deeply", expected=expected, fix=_REPLACE) from None
    except ValueError as error:
        raise GateworkError(f"{path} is not JSON: {error}", fix=_REPLACE) from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(value, dict):
        raise GateworkError(f"{path} holds no JSON object", got=type(value).__name__)
    return value


def _integer(path: Path, digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        got, expected = f"{len(digits)} digits", f"at most {MAX_DIGITS}"
        raise GateworkError(f"{path} has a number that is too long", got=got, expected=expected, fix=_REPLACE)
    return int(digits)


def _brackets_depth(text: bytes) -> int:
    """How many brackets are open at once at most, those in strings counted as well."""
    codes = np.frombuffer(text, np.uint8)
    steps = np.isin(codes, list(b"[{")).astype(np.int32) - np.isin(codes, list(b"]}"))
    return int(steps.cumsum().max())


def depth(value: Any) -> int:
    """How many objects and lists lie within each other at most."""
    level, count = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        count += 1
    return count
