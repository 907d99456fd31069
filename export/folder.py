"""Files of a checkpoint folder that may come from anyone: paths that stay inside it, and JSON that is an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gatework.plugins.errors import GateworkError

MAX_JSON_BYTES = 4 << 20  # the index of a model with 12,000 experts has 3.5 MB
MAX_JSON_PARTS = (
    100_000  # objects and lists, which take 35 times as much memory as text; brackets in strings count as well
)
MAX_JSON_DEPTH = 100


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
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(target.is_relative_to(h) for h in homes):
        raise GateworkError(f"{folder} names a file outside the checkpoint folder", got=repr(name))
    return path


def exists(folder: Path, name: str) -> bool:
    """Whether `folder` has a regular file, or a link to one, of that name."""
    try:
        return (folder / name).is_file()
    except OSError:  # such as a name that is too long
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else in it is a GateworkError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise GateworkError(f"{path} is too large for a JSON file", expected=f"at most {MAX_JSON_BYTES} bytes")
        text = path.read_bytes()
        if (parts := text.count(b"{") + text.count(b"[")) > MAX_JSON_PARTS:
            expected = f"at most {MAX_JSON_PARTS} objects and lists"
            raise GateworkError(f"{path} is too large for a JSON file", got=parts, expected=expected)
        value = json.loads(text)
        if depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise GateworkError(f"{path} is not JSON: {reason}") from None
    except OSError as error:
        raise GateworkError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(value, dict):
        raise GateworkError(f"{path} holds no JSON object", got=type(value).__name__)
    return value


def depth(value: Any) -> int:
    """How many objects and lists lie within each other at most."""
    level, count = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        count += 1
    return count
