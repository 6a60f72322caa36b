"""A progress bar over images, and what Ctrl-C says when their numbers are kept in a journal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

__all__ = ["resumable_progress"]


@contextmanager
def resumable_progress(total: int, journal: Path) -> Iterator[Callable[[int], None]]:
    """Gives a function that is called with the number of images that are done, after each.

    Raises:
        KeyboardInterrupt: with a message that says how far it came and where it goes on from.
    """
    done = 0
    with tqdm(total=total, desc="images", unit="image", disable=None, file=sys.stderr) as bar:

        def step(count: int) -> None:
            nonlocal done
            done += count
            bar.update(count)

        try:
            yield step
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after {done} of {total} images; they are kept in {journal}, and the same command goes on from there"
            ) from None
