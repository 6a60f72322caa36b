"""What every command line of this project does alike: known errors become one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from runtime.errors import EntropyPruneError

FAILED = 2


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Parses and runs; returns the exit code. Errors that are not the project's own keep their traceback."""
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return run(args)
    except EntropyPruneError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{parser.prog}: error: interrupted; what was being made is removed, what was there before is unchanged", file=sys.stderr)
    return FAILED
