"""Runs worker.py and new_task.py as real processes and reads what they print, for whatever plays with them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# How long a line may take to appear. Nothing here takes that long unless it is broken.
DEADLINE = 30

# What ends a program early: Ctrl+C, kill, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Line(NamedTuple):
    """A line that a process printed: when (monotonic seconds), where ("stdout" or "stderr"), and its text."""

    at: float
    stream: str
    text: str


class Script:
    """A running script. Its output is read line by line as it comes, into `lines`.

    command: the words behind `python`. url: AMQP_URL for it; None: as it is here. stdin: as for Popen; nothing by
    default. see: called with each line as it comes, on another thread.
    """

    def __init__(self, *command: str, url: str | None, cwd=ROOT, stdin=subprocess.DEVNULL, environment=(), see=None):
        self.name = " ".join(os.fsdecode(word) for word in command)
        self.lines: list[Line] = []
        self._see = see or (lambda line: None)
        self._changed = threading.Condition()
        settings = {**os.environ, **({"AMQP_URL": url} if url else {}), **dict(environment)}
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=settings, **pipes)
        streams = {"stdout": self.process.stdout, "stderr": self.process.stderr}
        self._readers = [threading.Thread(target=self._read, args=item, daemon=True) for item in streams.items()]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: str, pipe) -> None:
        for text in pipe:
            line = Line(time.monotonic(), stream, text.decode(errors="backslashreplace").rstrip("\n"))
            with self._changed:
                self.lines.append(line)
                self._see(line)
                self._changed.notify_all()

    def wait_for(self, text: str, times: int = 1, within: float = DEADLINE) -> Line:
        """Return the line that contains `text` for the `times`-th time. AssertionError if it doesn't come in time."""

        def found() -> list[Line]:
            return [line for line in self.lines if text in line.text]

        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= times, within):
                raise AssertionError(f"{text!r} did not come {times} times within {within} s:\n{self}")
            return found()[times - 1]

    def ends(self, within: float = DEADLINE) -> int:
        """Return the exit status, once the process has ended and all it printed is in `lines`."""
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {within} s:\n{self}") from None
        for reader in self._readers:
            reader.join()
        return self.process.returncode

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def ctrl_c(self) -> None:
        """Press Ctrl+C."""
        self.process.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM, as `kill` does."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, as `kill -9` does, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def output(self, stream: str = "stdout") -> list[str]:
        """Return the lines of one stream so far."""
        return [line.text for line in self.lines if line.stream == stream]

    def __str__(self) -> str:
        printed = "\n".join(f"  {line.stream}: {line.text}" for line in self.lines)
        return f"{self.name} (exit status {self.process.poll()}) printed\n{printed}"


def wait_until(condition, what: str, within: float = DEADLINE, pause: float = 0.05):
    """Return what condition() returns, once it holds; AssertionError if it doesn't come to that in time."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within} s")
        time.sleep(pause)
    return found


def raise_on_signals() -> None:
    """Let the signals that end a program raise KeyboardInterrupt, with the signal's number as its argument."""

    def interrupt(number: int, _) -> None:
        raise KeyboardInterrupt(number)

    for number in SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    """Let them do nothing: what a program does at its end must not be left undone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
