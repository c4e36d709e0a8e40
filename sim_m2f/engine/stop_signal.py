"""Signals that ask a run to stop, noted instead of obeyed at once."""

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one of either is not caught."""

    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "StopSignal":
        self.received = 0
        self.previous: dict[int, Any] = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
