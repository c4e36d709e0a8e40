"""A log without a terminal has lines of what is done, and a terminal a bar; silent ranks have neither."""

import io
import re

from sim_m2f import progress as progress_file
from sim_m2f.progress import progress


class Clock:
    """Every look at it is so many seconds after the one before."""

    def __init__(self, step: int) -> None:
        self.step, self.now = step, 0

    def monotonic(self) -> int:
        self.now += self.step
        return self.now


def test_a_log_has_a_line_with_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress_file, "time", Clock(2))
    monkeypatch.setattr(progress_file, "PERIOD", 0)
    assert list(progress("abc", "label", 103, done=100)) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "label 101/103: 0.50 images/s, 00:04 left",
        "label 102/103: 0.50 images/s, 00:02 left",
        "label 103/103: 0.50 images/s, 00:00 left",
    ]


def test_lines_are_seldom_and_short_work_has_none(monkeypatch, capsys):
    assert list(progress(range(5), "label", 5)) == list(range(5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_file, "time", Clock(7))
    assert list(progress(range(100), "label", 100)) == list(range(100))
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == [f"label {number}/100" for number in range(5, 101, 5)]


def test_a_terminal_has_a_bar_and_a_silent_rank_nothing(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(progress("ab", "check", 2)) == ["a", "b"]
    assert re.search(r"\rcheck:.*\| 0/2 ", terminal.getvalue())
    monkeypatch.setattr("sys.stderr", silent := Terminal())
    assert list(progress("ab", "check", 2, shown=False)) == ["a", "b"]
    assert silent.getvalue() == ""
    monkeypatch.undo()
    monkeypatch.setattr(progress_file, "PERIOD", 0)
    assert list(progress("ab", "check", 2, shown=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
