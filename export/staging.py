"""Writing a folder complete or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gatework.plugins import engine_format
from gatework.plugins.errors import GateworkError

_PARTIAL = ".partial"
_SETTLED = 5  # seconds after which a folder's maker has surely locked it


@contextmanager
def new_directory(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends well, and is removed when it does not.

    force: replace an engine that stands at `out`.
    """
    check_free(out, force)
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent, f".{glob.escape(out.name)}.*{_PARTIAL}")
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_PARTIAL, dir=out.parent))
    except OSError as error:
        raise GateworkError(f"cannot write to {out.parent}", got=error.strerror, fix="choose another --out") from None
    with hold(staging):
        try:
            staging.chmod(0o755)
            yield staging
            check_free(out, force)  # another build may have been faster
            if out.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
                out.rename(retired / out.name)
                staging.rename(out)
                shutil.rmtree(retired)
            else:
                staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            with suppress(OSError):  # somebody else may use them by now
                for folder in made:
                    folder.rmdir()
            raise


@contextmanager
def new_files(folder: Path, names: Iterable[str], force: bool) -> Iterator[Path]:
    """A temporary folder whose files, of these names, move into `folder` when the block ends well; the last one goes last.

    force: replace files of these names that stand there.
    """
    names = list(names)
    taken = [name for name in names if os.path.lexists(folder / name)]
    if taken and not force:
        raise GateworkError(
            f"{folder / taken[0]} exists", fix="pass --force to replace it, or name a folder with --out"
        )
    try:
        staging = Path(tempfile.mkdtemp(prefix=".onnx.", suffix=_PARTIAL, dir=folder))
    except OSError as error:
        fix = "name a folder with --out"
        raise GateworkError(f"cannot write to {folder}", got=error.strerror, fix=fix) from None
    try:
        yield staging
        for name in names:
            (folder / name).unlink(missing_ok=True)
            if (staging / name).exists():
                (staging / name).rename(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(out: Path, force: bool, option: str = "--out") -> None:
    """Raise unless `new_directory` may make, or replace, the folder `out`, which the command line calls `option`."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        fix = f"choose another {option}"
        raise GateworkError(f"{out} is in the way", got="a file or link", expected="a folder to make", fix=fix)
    if out.exists() and any(out.iterdir()):
        is_engine = (out / engine_format.MANIFEST).is_file()
        if not (force and is_engine):
            fix = "pass --force to replace it" if is_engine and option == "--out" else f"choose another {option}"
            raise GateworkError(f"{out} exists and is not empty", fix=fix)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which says that it is in use."""
    lock = _lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def remove_abandoned(parent: Path, pattern: str) -> None:
    """Delete what killed processes of this user left: folders that nobody holds the lock of, and that are not brand-new."""
    for folder in parent.glob(pattern):
        with suppress(OSError):
            facts = folder.lstat()
            ours = stat.S_ISDIR(facts.st_mode) and (sys.platform == "win32" or facts.st_uid == os.getuid())
            if ours and time.time() - facts.st_mtime > _SETTLED and (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the folder's lock until it is closed or the process ends; None if another has it."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
