"""Signals that ask a run to stop, noted instead of obeyed at once."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PATIENCE = 1.0  # seconds; launchers and service managers send a process the same signal twice within them


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT, after a while, ends the process."""

    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopSignal":
        self.received, self._since, self._obey = 0, 0.0, False
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in self.signals
        }
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, and at its beginning, a signal raises SystemExit."""
        self._obey = True
        try:
            if self.received:
                raise SystemExit(128 + self.received)
            yield
        finally:
            self._obey = False

    def _note(self, number: int, _: FrameType | None) -> None:
        insists = number == signal.SIGINT and self.received and time.monotonic() > self._since + PATIENCE
        if not self.received:
            self.received, self._since = number, time.monotonic()
        if self._obey or insists:
            raise SystemExit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
