"""The line on stderr that is written over."""

from __future__ import annotations

import io
import sys

import pytest

from bigdl._base.live import LiveLine

BACK = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def patched(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_line_is_written_over_and_taken_away(monkeypatch):
    terminal = patched(monkeypatch, Terminal())
    with LiveLine() as line:
        line.show("one")
        line.show("two")
        line.keep("done")
        line.show("three")
    assert terminal.getvalue() == f"{BACK}one{BACK}two{BACK}done\n{BACK}three{BACK}"


def test_what_stays_is_not_taken_away(monkeypatch):
    terminal = patched(monkeypatch, Terminal())
    with LiveLine() as line:
        line.keep("done")
    assert terminal.getvalue() == f"{BACK}done\n"


def test_no_terminal_gets_what_stays_only(monkeypatch):
    file = patched(monkeypatch, io.StringIO())
    with LiveLine() as line:
        line.show("now")
        line.keep("done")
    assert file.getvalue() == "done\n"


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_stream_that_is_gone_is_no_error(monkeypatch, stream):
    made = patched(monkeypatch, Terminal() if stream else None)
    with LiveLine() as line:
        if made is not None:
            made.close()
        line.show("now")
        line.keep("done")
