"""What several subcommands share."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from gatework.plugins.errors import GateworkError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
_BUILD_TOOLS = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "ml_dtypes", "tqdm")


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


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def add_stage_processes(parser: argparse.ArgumentParser) -> None:
    """The option of that name."""
    parser.add_argument(
        "--stage-processes",
        action="store_true",
        help="run each stage of an engine built with --stages in a process of its own (needs PyTorch)",
    )


def add_drop_tokens(parser: argparse.ArgumentParser) -> None:
    """The option of that name."""
    parser.add_argument(
        "--drop-tokens",
        action="store_true",
        default=None,
        help="experts drop the tokens of a step that are beyond their capacity, as OpenMoE's own code does (default: none is)",
    )


def read_text(path: Path) -> str:
    """A UTF-8 file's text; GateworkError where it is not UTF-8, OSError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GateworkError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def memory_size(word: str) -> int:
    """Bytes of "24GiB" or "80GB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", word.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise GateworkError("this memory size cannot be read", got=repr(word), expected="a size such as 24GiB or 80GB")
    number, unit, binary = match.groups()
    return round(float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()])


def require_build_tools(what: str) -> None:
    """Raise a one-line error unless the packages that read checkpoints and build engines are installed."""
    missing = [name for name in _BUILD_TOOLS if find_spec(name) is None]
    if missing:
        fix = "pip install 'gatework[build]'"
        raise GateworkError(f"{what} needs packages that are not installed", got=f"no {', '.join(missing)}", fix=fix)
