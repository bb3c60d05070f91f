"""The command line, how a task is shown, and output that never fails. Nothing here needs pika or RabbitMQ."""

import io
import os
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

# How much of a task is shown, in characters (or bytes, if it is no text); how often the line of progress is drawn.
SHOWN, PROGRESS_SECONDS = 500, 0.5


def arguments(usage: str, fit: Callable[[list[str]], bool]) -> list[str]:
    """Return the words of the command line, if fit(words). --help and a wrong command line end the program here.

    usage: what --help prints. Its first line is all that a wrong command line gets.
    """
    tidy_output()
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(usage.strip())
        sys.exit(0)
    if not fit(words):
        print(usage.partition("\n")[0], file=sys.stderr)
        sys.exit(2)
    return words


def shown(task: bytes) -> str:
    """Return a task as it is printed: the repr of its text, or of its bytes if that is not UTF-8; shortened if long."""
    try:
        text: str | bytes = task.decode()
    except UnicodeDecodeError:
        text = task
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(task)} bytes)"


def printable(text: str) -> str:
    """Return text with control characters escaped: it may come from anyone, and must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str, after_ctrl_c: bool = False) -> None:
    """Print one line of diagnosis. After Ctrl+C on a line of its own, as a terminal shows ^C there."""
    if after_ctrl_c and sys.stderr.isatty():
        print(file=sys.stderr)
    print(f" [!] {printable(message)}", file=sys.stderr, flush=True)


class Progress:
    """A line on a terminal that tells how far the sending of a file is; nothing if it is no file, or no terminal."""

    def __init__(self, tasks: Any):
        self.of_lines = hasattr(tasks, "fileno")
        self._file = tasks.fileno() if self.of_lines and sys.stderr.isatty() else None
        self._began = self._drawn_at = time.monotonic()

    def show(self, sent: int, confirmed: int) -> None:
        """Draw the line, unless that was done just now."""
        now = time.monotonic()
        if self._file is None or now < self._drawn_at + PROGRESS_SECONDS:
            return
        self._drawn_at, seconds = now, now - self._began
        line = f" {sent} sent, {confirmed} confirmed, {confirmed / seconds:.0f}/s"
        status = os.fstat(self._file)
        if stat.S_ISREG(status.st_mode) and (read := os.lseek(self._file, 0, os.SEEK_CUR)):
            line += f", {max(0, status.st_size / read - 1) * seconds:.0f} s left"
        # Erased to its right, and the cursor back at its left: what is printed next takes its place.
        print(f"{line}\x1b[K", end="\r", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Erase the line."""
        if self._drawn_at > self._began:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


class _Output(io.TextIOWrapper):
    """Standard output or error that goes silent, with one line on the other, when nobody takes it any more."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:  # a reader that is gone (`| head`), or a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self is sys.stdout:
                warn(f"can't write to standard output ({error.strerror}); going on without.")
        except ValueError:  # work() has taken it apart
            pass
        return len(text)

    def close(self) -> None:
        """Stay open, if work() closes it: the worker's own lines are still to come."""

    def detach(self) -> Any:
        """Stay whole."""
        return self.buffer


_ours: list[_Output] = []


def tidy_output() -> None:
    """Print line by line also into a pipe, and never fail: a task must not be lost because a line is."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(nowhere)  # None: the shell closed it
    for stream in (sys.stdout or os.fdopen(nowhere, "w"), sys.stderr or os.fdopen(nowhere, "w")):
        _ours.append(_Output(stream.detach(), stream.encoding, "backslashreplace", line_buffering=True))
    restore_output()


def restore_output() -> None:
    """Undo what work() may have done to standard output and error."""
    sys.stdout, sys.stderr = _ours[-2:]
