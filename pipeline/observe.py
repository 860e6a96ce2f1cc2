"""What a person sees while it works: progress and notices, on standard error. Names and units in one place.

On a terminal one live bar per stage; elsewhere (a job's log, a pipe) plain lines, at most one in PLAIN_EVERY_S seconds.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import unquote

PLAIN_EVERY_S = 5.0
SELDOM_S = 10.0
MAX_UNSENT = 100

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,31})://", re.IGNORECASE)
_BUCKETS = ("s3", "s3a", "s3n", "gs", "gcs", "oss", "r2")
"""Schemes of stores without ports and users: before an `@` stands nothing but a key."""
_WEB = ("http", "https")
_AT, _COLON, _USER = "(?:@|%40)", "(?:%3A|:)", r"[^/@\s]{0,256}"
_PORT = r"(?!\d*(?:[^\w%@.+=~-]|$))"
_REST = rf".*?{_AT}(?:\S*@)?"
"""Of a password: it may hold `/`, `@` and blanks."""
_IN_BUCKETS = re.compile(rf"{_USER}{_COLON}(?!\s|$){_REST}|[^/?#@\s]+?{_AT}", re.IGNORECASE)
_IN_WEB = re.compile(rf"{_USER}{_COLON}{_PORT}{_REST}|[^/?#@\s]+?{_AT}", re.IGNORECASE)
_IN_OTHERS = re.compile(rf"{_USER}{_COLON}{_PORT}{_REST}|{_USER}(?:AKIA|ASIA)[A-Z0-9]{{12,32}}{_USER}@", re.IGNORECASE)
"""A password, key or token behind `scheme://`; of other schemes a user or a container may stand there."""
_SIGNED = re.compile(
    r"((?:[?&;#]|%3F|%26)(?:sig|googleaccessid|[\w.%-]{0,64}(?:signature|access[_-]?key(?:[_-]?id)?|api[_-]?key|token|secret"
    r"|passw(?:or)?d|pwd|credentials?))(?:=|%3D))[^&;\s'\"]+",
    re.IGNORECASE,
)
"""What in a query string lets anybody in, by its name."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 control characters, line separators, marks that turn the direction of writing, half a surrogate pair."""
_seldom = threading.Lock()
_last_said: dict[str, tuple[float, int]] = {}
_unsent: deque[str] = deque(maxlen=MAX_UNSENT)


def say(text: str) -> None:
    """One notice for a person."""
    _unsent.append(text)
    sys.stderr.write(for_terminal(text) + "\n")
    sys.stderr.flush()


def has_credentials(uri: str) -> bool:
    """Whether a URI has a password, a key or a signature in it, plain or percent-encoded."""
    if "://" not in uri:
        return False
    return any(without_credentials(form) != form for form in {uri, unquote(uri), unquote(unquote(uri))})


def without_credentials(text: str) -> str:
    """A text without the passwords, keys and signatures of its URIs: `...` takes their place."""
    if "://" not in text:  # most texts
        return text
    before, *parts = _SCHEME.split(text)
    for scheme, rest in zip(parts[::2], parts[1::2], strict=True):
        line, *others = rest.split("\n", 1)
        before += "\n".join([f"{scheme}://{_cleaned(scheme.lower(), line)}", *others])
    return before


def _cleaned(scheme: str, line: str) -> str:
    """What follows `scheme://` up to the end of its line, without credentials."""
    line = _SIGNED.sub(r"\1...", line)
    pattern = _IN_BUCKETS if scheme in _BUCKETS else _IN_WEB if scheme in _WEB else _IN_OTHERS
    found = pattern.match(line) if "@" in line or "%40" in line else None
    return f"...@{line[found.end() :]}" if found else line


def printable(text: str) -> str:
    r"""A text of foreign origin as one line that steers no terminal: control characters become escapes such as `\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_controls(text: str) -> str:
    """A text without control characters but line breaks and tabs, for a page that shows texts of foreign origin."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in "\n\t" else "", text)


def for_terminal(text: str) -> str:
    """A text of one or more lines as it may leave this process: without control characters and credentials.

    Lines after the first are indented, so that a line break in an id cannot begin a line that looks like ours.
    """
    first, *others = map(printable, without_credentials(text).split("\n"))
    return "\n".join([first, *(line if line.startswith(" ") or not line else f"  {line}" for line in others)])


def say_seldom(key: str, text: str) -> None:
    """A notice that may come in swarms: of one key at most one in SELDOM_S seconds, with how many were left out."""
    now_s = time.monotonic()
    with _seldom:
        last_s, left_out = _last_said.get(key, (-SELDOM_S, 0))
        quiet = now_s - last_s < SELDOM_S
        _last_said[key] = (last_s, left_out + 1) if quiet else (now_s, 0)
    if not quiet:
        say(text + (f" ({left_out:,} more like it since the last time)" if left_out else ""))


def unsent() -> list[str]:
    """What was said in this process since the last call, at most the last MAX_UNSENT: a worker hands it home."""
    heard = []
    while _unsent:
        heard.append(_unsent.popleft())
    return heard


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def spoken(seconds: float, of: str = "") -> str:
    """Seconds to two or three digits: `0.42 s`, `12 s`, `3 min 20 s`, `2 h 5 min`; of something: `2.5 CPU-minutes`."""
    if of:
        size, name = (3600, "hours") if seconds >= 7200 else (60, "minutes") if seconds >= 120 else (1, "seconds")
        return f"{seconds / size:,.{0 if seconds / size >= 10 else 1}f} {of}-{name}"
    if seconds < 10:
        return f"{seconds:.2g} s"
    size, large, small = (3600, "h", "min") if round(seconds) >= 3600 else (60, "min", "s")
    whole, rest = divmod(round(seconds * 60 / size), 60)
    return f"{whole:,} {large} {rest} {small}" if whole else f"{rest} {small}"


def rate(examples: float, seconds: float) -> str:
    """Examples per second, readable."""
    return f"{examples / seconds:,.0f} examples/s" if seconds > 0 and examples else ""


class Progress:
    """Progress of one stage.

    Args:
        stage: Name of the stage.
        total: How many there are in all.
        unit: What is counted.
        done: How many were done before this start; they count as done, not as speed.
        shown: False for work that is not worth a line.
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self._shown = shown
        self._stage, self._total, self._unit = stage, total, unit
        self._before, self.done, self._examples = done, done, 0
        self._start_s, self._shown_s, self._shown_done = time.monotonic(), 0.0, -1
        self._live, self._shown_line = sys.stderr.isatty(), ""
        self.at_work = ""
        """What workers are at, beside what is done."""

    def __enter__(self) -> Progress:
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live or self._shown_done != self.done:
            self._show(last=True)

    def advance(self, examples: int = 0) -> None:
        """One more is done, with so many examples."""
        self._examples += examples
        self.at(self.done + 1)

    def at(self, done: int) -> None:
        """So many are done in all."""
        self.done = done
        if self._live or time.monotonic() - self._shown_s >= PLAIN_EVERY_S:
            self._show()

    def line(self) -> str:
        """The progress as one line of text."""
        elapsed_s = time.monotonic() - self._start_s
        fresh = self.done - self._before
        left = duration((self._total - self.done) * elapsed_s / fresh) if fresh else "?"
        parts = [
            f"{self._stage:<6}{self.done:,}/{self._total:,} {self._unit}",
            f"{self.done / self._total:4.0%}" if self._total else "",
            rate(self._examples, elapsed_s),
            f"took {duration(elapsed_s)}" if self.done >= self._total else f"ETA {left}",
            self.at_work if self.done < self._total else "",
        ]
        return "  ".join(part for part in parts if part)

    def _show(self, last: bool = False) -> None:
        self._shown_s, self._shown_done = time.monotonic(), self.done
        if not self._shown:
            return
        line = self.line()
        if self._live:
            sys.stderr.write(f"\r\x1b[K{for_terminal(line)}" + ("\n" if last else ""))
            sys.stderr.flush()
        elif line != self._shown_line:
            say(line)
        self._shown_line = line


@contextmanager
def every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Run an action over and over in a thread, as long as the block lasts; the last time at its end."""
    stopped = threading.Event()

    def guarded() -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  whoever looks on must not end what it looks at
            say_seldom(f"every {action!r}", f"warning: {error}")

    def loop() -> None:
        while not stopped.wait(seconds):
            guarded()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
    guarded()
