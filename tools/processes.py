"""Runs worker.py and new_task.py as real processes and reads what they print, for whatever plays with them."""

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# How long a line may take to appear. Nothing here takes that long unless it is broken.
DEADLINE = 30

# What ends a program early: Ctrl+C, kill, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A line that a process printed: when (monotonic seconds), where ("stdout" or "stderr"), and its text.
Line = namedtuple("Line", ["at", "stream", "text"])


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
        with self._changed:
            found = self._changed.wait_for(lambda: [one for one in self.lines if text in one.text][times - 1 :], within)
        assert found, f"{text!r} did not come {times} times within {within} s:\n{self}"
        return found[0]

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


class Shells:
    """The shells of a person who tries the scripts. show(shell, line) gets what is typed there and what is printed."""

    def __init__(self, python: str, show, url: str | None = None):
        self.python, self.show, self.url = python, show, url
        self.scripts: dict[int, Script] = {}  # shell -> what runs there, or ran last

    def type(self, shell: int, text: str) -> None:
        """Only show what a person types."""
        self.show(shell, Line(time.monotonic(), "typed", text))

    def run(self, shell: int, command: str) -> Script:
        """Type a command (a script, and its words as bash takes them), and return what it has started."""
        self.type(shell, f"$ {self.python} {command}")
        self.scripts[shell] = Script(*shlex.split(command), url=self.url, see=functools.partial(self.show, shell))
        return self.scripts[shell]

    def work(self, shell: int) -> Script:
        """Start a worker, and return it when it waits for tasks."""
        worker = self.run(shell, "worker.py")
        worker.wait_for("[*] Waiting")
        return worker

    def ctrl_c(self, shell: int) -> None:
        """Press Ctrl+C, and wait until what runs there has ended."""
        self.type(shell, "^C")
        self.scripts[shell].ctrl_c()
        self.scripts[shell].ends()

    def close(self) -> None:
        """End what runs there."""
        for script in self.scripts.values():
            script.kill()


def wait_until(condition, what: str, within: float = DEADLINE, pause: float = 0.05):
    """Return what condition() returns, once it holds; AssertionError if it doesn't come to that in time."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within} s")
        time.sleep(pause)
    return found


@contextlib.contextmanager
def interruptible(*closing):
    """Let signals that end a program raise KeyboardInterrupt here. While it calls closing, then, they do nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for close in closing:
            close()
