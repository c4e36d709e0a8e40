"""Signals that ask a run to stop, noted instead of obeyed at once."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sim_m2f.data.loader import end_workers
from sim_m2f.distributed import is_first_rank

PATIENCE = 1.0  # seconds; launchers and service managers send a process the same signal twice within them


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT, after a while, ends the process."""

    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopSignal":
        self.received, self._since = 0, 0.0
        self._last_words: str | None = None
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in self.signals
        }
        return self

    @contextlib.contextmanager
    def at_once(self, last_words: str) -> Iterator[None]:
        """Within the block, and at its beginning, a signal ends the process; the first rank says why.

        Not by an exception: Python prints and forgets those that come up in forks, destructors and callbacks.
        """
        self._last_words = last_words
        try:
            if self.received:
                self._end(self.received)
            yield
        finally:
            self._last_words = None

    def _note(self, number: int, _: FrameType | None) -> None:
        insists = number == signal.SIGINT and self.received and time.monotonic() > self._since + PATIENCE
        if not self.received:
            self.received, self._since = number, time.monotonic()
        if self._last_words is not None:
            self._end(number)
        if insists:
            raise SystemExit(128 + number)

    def _end(self, number: int) -> None:
        try:
            with contextlib.suppress(RuntimeError):  # the signal may have come while this was being written
                if sys.__stdout__:  # sys.stdout is None while COCO's scores are computed in silence
                    sys.__stdout__.flush()
            if is_first_rank():
                os.write(1, f"\n{self._last_words}\n".encode())
            end_workers()
        finally:
            os._exit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
