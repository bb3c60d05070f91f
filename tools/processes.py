"""Run worker.py and new_task.py as real processes and read what they print, for the tests, chaos and the benchmarks."""

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


class Line(NamedTuple):
    """A line that a process printed: when (monotonic seconds), where ("stdout" or "stderr"), and its text."""

    at: float
    stream: str
    text: str


class Script:
    """A running script. Its output is read line by line as it comes, into `lines`.

    command: the words behind `python`. url: AMQP_URL for it. stdin: as for Popen; nothing by default.
    """

    def __init__(self, *command: str, url: str, cwd: Path = ROOT, stdin=subprocess.DEVNULL, environment=()):
        self.name = " ".join(os.fsdecode(word) for word in command)
        self.lines: list[Line] = []
        self._changed = threading.Condition()
        settings = {**os.environ, "AMQP_URL": url, **dict(environment)}
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=settings, **pipes)
        streams = {"stdout": self.process.stdout, "stderr": self.process.stderr}
        self._readers = [threading.Thread(target=self._read, args=item, daemon=True) for item in streams.items()]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: str, pipe) -> None:
        for line in pipe:
            with self._changed:
                self.lines.append(Line(time.monotonic(), stream, line.decode(errors="backslashreplace").rstrip("\n")))
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
        if self.running:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        self.process.wait()

    def output(self, stream: str = "stdout") -> list[str]:
        """Return the lines of one stream so far."""
        return [line.text for line in self.lines if line.stream == stream]

    def __str__(self) -> str:
        printed = "\n".join(f"  {line.stream}: {line.text}" for line in self.lines)
        return f"{self.name} (exit status {self.process.poll()}) printed\n{printed}"
