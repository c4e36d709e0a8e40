"""How far long work is: a bar on a terminal; for a log, a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
PERIOD = 30.0  # seconds between two lines; shorter work tells nothing


def progress(items: Iterable[T], name: str, total: int, done: int = 0, shown: bool = True) -> Iterator[T]:
    """The items as they are, while standard error tells how many are done and how long the others will take.

    Args:
        items: images, or what belongs to one each.
        name: of the work.
        total: of the items, with those that are done before.
        done: so many of them.
        shown: False on ranks that are silent.
    """
    if not shown or sys.stderr.isatty():
        yield from tqdm(items, name, total, initial=done, unit="image", disable=not shown, leave=False)
        return
    start = told = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told > PERIOD:
            told = now
            print(_line(name, done + number, total, number / (now - start)), file=sys.stderr, flush=True)


def _line(name: str, done: int, total: int, rate: float) -> str:
    left = tqdm.format_interval((total - done) / rate)
    return f"{name} {done}/{total}: {rate:.2f} images/s, {left} left"
