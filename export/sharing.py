"""A checkpoint's files under second names, so that a folder holds them without a copy of their bytes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from gatework.plugins.errors import GateworkError

_FICLONE = 0x40049409  # ioctl of linux/fs.h
CLONES, LINKS = "shared extents", "hard links"


def share(files: Mapping[Path, Path]) -> str:
    """Make each file, a key, readable under its new name; returns how: CLONES or LINKS.

    Clones share blocks until either file is written to (Btrfs, XFS and others, on Linux). Elsewhere the new names are hard
    links, and a change made in place shows under both names. Either outlives the first name.

    Raises OSError where neither can be had, such as on another file system; nothing is left behind.
    """
    made: list[Path] = []
    how = CLONES
    try:
        for old, new in files.items():
            source = old.resolve()
            made.append(new)
            if how == CLONES and not _clone(source, new):
                how = LINKS
            if how == LINKS:
                os.link(source, new)
    except OSError:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return how


def _clone(source: Path, target: Path) -> bool:
    """Whether the target could be made a clone; if not, it is not there."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return True
        except OSError as error:
            target.unlink()
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS):
                raise
    return False


def plain_files(folder: Path, files: Iterable[Path]) -> None:
    """Raise unless every file is one of the folder and no link: ONNX's readers follow none."""
    home = folder.resolve()
    for path in files:
        if path.resolve() != home / path.relative_to(folder):
            fix = "name a folder of its own with --out and --link"
            raise GateworkError(f"{path} is a link, which ONNX's readers do not follow", fix=fix)
