"""The `gatework` command: argparse, exit codes, and errors in one line.

Exit codes: 0 done, 1 a check failed (verify), 2 a mistake of the user's or a lack of disk or memory, 130 Ctrl-C,
143 SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import Any

from gatework.plugins.errors import GateworkError, GateworkWarning
from gatework.runtime.commands import bench, build, calibrate, export, generate, inspect, refit, verify
from gatework.runtime.commands.common import Parser

_EXAMPLES = """\
examples:
  gatework inspect examples/tiny-mixtral
  gatework build examples/tiny-mixtral --precision int8 --out engines/tiny
  gatework generate engines/tiny --prompt "def main():"
  gatework verify engines/tiny --reference examples/tiny-mixtral
  gatework bench engines/tiny

`gatework COMMAND --help` shows each command's options and examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and texts may have what its encoding lacks
    with _cleaning_up_on_termination(), _warnings_in_one_line():
        try:
            args, unknown = _parser().parse_known_args(argv)
            if unknown:
                raise GateworkError(
                    f"unknown arguments: {' '.join(unknown)}", fix=f"see `gatework {args.command} --help`"
                )
            status: int = args.run(args)
            print(end="", flush=True)
            return status
        except GateworkError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader of our output is gone, as after `| head`
            _drop_output()
            return 141
        except OSError as error:
            _drop_output()
            return _fail(_reason(error))
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            return _fail("out of memory; fix: free memory, or use a smaller model, --max-seq or --max-batch")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gatework",
        description="Compiles mixture-of-experts and dense language models into engines, runs them and checks them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"gatework {version('gatework')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in (build, export, calibrate, refit, generate, verify, bench, inspect):
        command.add(commands)
    return parser


@contextmanager
def _cleaning_up_on_termination() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that half-written folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Warnings of ours are told as errors are, without the place in the code."""
    show_other = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, GateworkWarning):
            print(f"gatework: warning: {message}", file=sys.stderr)
        else:
            show_other(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _fail(message: str) -> int:
    print(f"gatework: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "no space left; fix: free some, or write elsewhere"
    places = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*places, error.strerror or str(error)])


def _is_lack_of_memory(error: Exception) -> bool:
    """Python's error, or PyTorch's, which is a RuntimeError of its CPU allocator."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _drop_output() -> None:
    """Send what is still buffered for standard output nowhere: Python would fail on it once more at exit."""
    try:
        print(end="", flush=True)
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
