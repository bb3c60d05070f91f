"""The command line, how a task is shown, and lines that never fail. Nothing here needs pika or RabbitMQ."""

import os
import sys
from collections.abc import Callable

# How much of a task is shown, in characters (or bytes, if it is not text); how often the line of progress is drawn.
SHOWN, PROGRESS_SECONDS = 500, 0.5


def arguments(usage: str, fit: Callable[[list[str]], bool]) -> list[str]:
    """Return the words of the command line if fit(words). Otherwise, or on --help, print the usage and end."""
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # the shell closed 0, 1 or 2, and a connection must not get its number
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        say(usage.strip())
        sys.exit(0)
    if not fit(words):
        say(usage.partition("\n")[0], to=2)
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


def say(line: str, end: str = "\n", to: int = 1) -> None:
    """Print a line at once to 1, standard output, or 2, standard error. Never fail: a lost line must cost no task."""
    try:
        os.write(to, (line + end).encode(getattr(sys.__stdout__, "encoding", "utf-8"), "backslashreplace"))
    except OSError as error:  # a reader that is gone (`| head`), or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), to)
        if to == 1:
            warn(f"can't write to standard output ({error.strerror}); going on without.")


def warn(message: str, after_ctrl_c: bool = False) -> None:
    """Print one line of diagnosis. After Ctrl+C on a line of its own, as a terminal shows ^C there."""
    say(("\n" if after_ctrl_c and os.isatty(2) else "") + f" [!] {printable(message)}", to=2)


def draw(file: int, seconds: float, sent: int, confirmed: int) -> None:
    """Show how far the sending of a file has come, unless nobody sees it or somebody is typing the tasks."""
    if os.isatty(file) or not os.isatty(2):
        return
    line = f" {sent} sent, {confirmed} confirmed, {confirmed / seconds:.0f}/s"
    if os.path.isfile(file) and (read := os.lseek(file, 0, os.SEEK_CUR)):  # noqa: PTH113, a Path can't hold a number
        line += f", {max(0, os.fstat(file).st_size / read - 1) * seconds:.0f} s left"
    # Erased to its right, and the cursor back at its left: what is printed next takes its place.
    say(f"{line}\x1b[K", end="\r", to=2)
