"""What several subcommands share."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from math import inf
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn, TypeAlias

from gatework.plugins.errors import GateworkError
from gatework.plugins.machine import MOST_THREADS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
_BUILD_TOOLS = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "ml_dtypes", "tqdm")


class Parser(argparse.ArgumentParser):
    """One whose refusals are one line, as all others are; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit with."""
        raise GateworkError(message, fix=f"see `{self.prog} --help`")


def add_command(
    commands: Commands, name: str, summary: str, about: str, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A subcommand whose help shows `about`, its options, and `examples`.

    run: takes the parsed arguments and returns the exit status.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.dedent(about).strip(),
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def integer(text: str) -> int:
    """For argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number") from None


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}; expected at least 1")
    return value


def number(text: str) -> float:
    """For argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number") from None


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option of that name."""
    parser.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: all)")


def _threads(text: str) -> int:
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"got {value}; expected 1 to {MOST_THREADS}")
    return value


def add_stage_processes(parser: argparse.ArgumentParser) -> None:
    """The option of that name."""
    parser.add_argument(
        "--stage-processes",
        action="store_true",
        help="run each stage of an engine built with --stages in a process of its own (needs PyTorch)",
    )


def add_share_weights(parser: argparse.ArgumentParser) -> None:
    """The option of that name."""
    parser.add_argument(
        "--share-weights",
        action="store_true",
        help="map weights, once for all processes that run the engine, in place of a faster copy (int8 and int4 on CPUs)",
    )


def add_drop_tokens(parser: argparse.ArgumentParser) -> None:
    """The option of that name."""
    parser.add_argument(
        "--drop-tokens",
        action="store_true",
        default=None,
        help="experts drop what is beyond their capacity in a step, as OpenMoE's own code does (OpenMoE only; default: none)",
    )


def read_text(path: Path) -> str:
    """A UTF-8 file's text; GateworkError where it is not UTF-8, OSError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GateworkError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def check_writable(path: Path) -> None:
    """Raise where a file could not be written after all the work."""
    fix = "make it, or write elsewhere"
    try:
        if not path.parent.is_dir():
            raise GateworkError(f"cannot write {path}", got="no such folder", fix=fix)
        if not path.exists():
            TemporaryFile(dir=path.parent).close()
        elif path.is_dir() or not os.access(path, os.W_OK):
            got = "a folder" if path.is_dir() else "a file that is read-only"
            raise GateworkError(f"cannot write {path}", got=got, fix="write elsewhere")
    except OSError as error:
        raise GateworkError(f"cannot write {path}", got=error.strerror, fix="write elsewhere") from None


def memory_size(word: str) -> int:
    """Bytes of "24GiB" or "80GB", for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", word.strip(), re.IGNORECASE | re.ASCII)
    number, unit, binary = ("0", "K", "") if match is None else match.groups()
    nbytes = float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()]
    if not 1 <= nbytes < inf:
        raise argparse.ArgumentTypeError(f"got {word!r}; expected a size such as 24GiB or 80GB")
    return round(nbytes)


def require_build_tools(what: str) -> None:
    """Raise a one-line error unless the packages that read checkpoints and build engines are installed."""
    missing = [name for name in _BUILD_TOOLS if find_spec(name) is None]
    if missing:
        fix = "pip install 'gatework[build]'"
        raise GateworkError(f"{what} needs packages that are not installed", got=f"no {', '.join(missing)}", fix=fix)
