"""What every command line of this project does alike: an error is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from runtime.errors import EntropyPruneError, shown

FAILED = 2
MAX_DIGITS = 10


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage that `--help` prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, _line(self, f"{message} (see --help)") + "\n")


def keep_argument(text: str) -> int | str:
    """The type of `--keep` where one setting is chosen: a number of tokens, "all" or "auto"."""
    if text in ("all", "auto"):
        return text
    if text.isdecimal() and len(text) < MAX_DIGITS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{shown(text)} is neither a number of tokens nor 'all' or 'auto'")


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Parses and runs; returns the exit code. Errors that are not the project's own keep their traceback.

    A command that keeps what it has done when it is interrupted raises KeyboardInterrupt anew, with a message that says so.
    """
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # --help, or an error that the parser has told
        return end.code if isinstance(end.code, int) else FAILED
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except EntropyPruneError as error:
        message = str(error)
    except KeyboardInterrupt as stop:
        message = str(stop) or "interrupted; what was being made is removed, what was there before is unchanged"
    except OSError as error:
        if error.filename is not None:  # not the output that could not be written
            raise
        message = f"cannot write the output: {error.strerror}"
    print(_line(parser, message), file=sys.stderr)
    return FAILED


def _line(parser: argparse.ArgumentParser, message: str) -> str:
    return f"{parser.prog}: error: {' '.join(message.split())}"
