"""The README is run: each command in the shell it names, in order, and what it prints is compared with the page."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
import rabbitmq
from conftest import DEADLINE, ROOT
from rabbitmq_node import Node, free_port

README = (ROOT / "README.md").read_text()

# What make does for these targets, without looking for a .venv.
AS_TYPED = {
    "make dead-letters": "python tools/dead_letters.py list",
    "make requeue-dead-letters": "python tools/dead_letters.py requeue",
}

# RabbitMQ updates what it tells of a queue every five seconds.
FIGURES_DEADLINE = 15


def blocks() -> list[tuple[str, list[str]]]:
    """Return (number of the shell, lines) for each console block: the shell is the last one that the text names."""
    found, shell = [], ""
    for text, block in re.findall(r"(.*?)```console\n(.*?)```", README, re.DOTALL):
        shell = re.findall(r"[Ss]hell (\d)", f"shell {shell} {text}")[-1]
        found.append((shell, block.splitlines()))
    return found


def comparable(line: str) -> str:
    """Return a line without what differs from run to run: times and ports."""
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", line)
    return re.sub(r"(localhost:|after )\d+( s$)?", r"\1N\2", line) if "RabbitMQ:" in line else line


class Shell:
    """A bash on a terminal of its own. Nothing that is typed is echoed, so all there is to read is output."""

    def __init__(self, folder: Path, environment: dict):
        self.bash = pexpect.spawn(
            "bash", ["--norc", "--noediting", "-i"], cwd=folder, env=environment, echo=False, encoding="utf-8"
        )
        self.bash.delaybeforesend = None

    def type(self, line: str) -> None:
        self.bash.sendline(line)

    def press(self, key: str) -> None:
        self.bash.sendcontrol(key)

    def next_line(self) -> str:
        """Return the next line that is not blank."""
        while True:
            try:
                self.bash.expect(r"([^\r\n]*)\r?\n", timeout=DEADLINE)
            except pexpect.TIMEOUT:
                return f"(nothing more for {DEADLINE} s)"
            # "Erase the rest of the line" is how the progress of many tasks leaves the terminal.
            if line := self.bash.match.group(1).replace("\x1b[K", "").rstrip():
                return line

    def must_show(self, line: str, skipping: bool) -> None:
        shown = self.next_line()
        while skipping and comparable(shown) != comparable(line):
            assert "nothing more" not in shown, f"the page shows {line!r}, which doesn't come"
            shown = self.next_line()
        assert comparable(shown) == comparable(line)


class Page:
    """Plays the page. RabbitMQ is the one that tools/rabbitmq.py starts for `make demo`, in a folder of the test."""

    def __init__(self, folder: Path, environment: dict, capsys):
        self._folder, self._environment, self._capsys = folder, environment, capsys
        self._shells = {}
        self._printed = []  # what an intercepted make has printed, and the page must show next

    def shell(self, number: str) -> Shell:
        if number not in self._shells:
            self._shells[number] = Shell(self._folder, self._environment)
        return self._shells[number]

    def play(self, number: str, lines: list[str]) -> None:
        shell, skipping = self.shell(number), False
        while lines:
            line = lines.pop(0)
            if line == "$ make queues":
                self.await_figures(lines)
            elif line in ("$ make rabbitmq", "$ make kill-rabbitmq"):
                self.make(line.split()[-1])
            elif line.startswith(("$ ", "> ")):
                shell.type(AS_TYPED.get(line[2:], line[2:]))
            elif line == "^C":
                shell.press("c")
            elif line == "^\\":
                shell.press("\\")
                shell.must_show("Quit", skipping=True)
            elif line == "...":
                skipping = True
                continue
            elif self._printed:
                assert comparable(self._printed.pop(0)) == comparable(line)
            else:
                shell.must_show(line, skipping)
            skipping = False
        assert not self._printed

    def make(self, target: str) -> None:
        """Do what the target does, with a RabbitMQ that is the test's own."""
        self._capsys.readouterr()
        {"rabbitmq": rabbitmq.find, "kill-rabbitmq": rabbitmq.kill}[target]()
        self._printed = self._capsys.readouterr().out.splitlines()

    def await_figures(self, lines: list[str]) -> None:
        """`make queues` until it shows what the page shows."""
        expected = [lines.pop(0) for _ in range(2)]
        deadline = time.monotonic() + FIGURES_DEADLINE
        while True:
            self._capsys.readouterr()
            rabbitmq.queues()
            shown = self._capsys.readouterr().out.splitlines()
            if shown == expected:
                return
            assert time.monotonic() < deadline, "\n".join(shown)

    def close(self) -> None:
        for shell in self._shells.values():
            shell.bash.close(force=True)


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    """The page, to be played in a copy of the scripts, with a RabbitMQ as `make demo` leaves it."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    monkeypatch.delenv("AMQP_URL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")  # or it would be a container
    monkeypatch.setattr(rabbitmq, "FOLDER", tmp_path / ".rabbitmq")
    monkeypatch.setattr(rabbitmq.Container, "record", tmp_path / ".rabbitmq" / "container.json")
    monkeypatch.setattr(rabbitmq, "PORT", free_port())
    rabbitmq.find()
    environment = {
        **os.environ,
        "AMQP_URL": Node.load(rabbitmq.FOLDER).url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PS1": "",
        "PS2": "",
        "TERM": "dumb",
    }
    page = Page(tmp_path, environment, capsys)
    yield page
    page.close()
    node = Node.load(rabbitmq.FOLDER)
    node.close()


@pytest.mark.timeout(400)
def test_every_command_does_what_the_page_shows(page):
    for number, lines in blocks():
        page.play(number, list(lines))


def as_anchor(heading: str) -> str:
    """Return the name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def test_every_link_leads_somewhere():
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', README):
        path, _, anchor = "".join(target).partition("#")
        if "://" in path:
            continue
        assert (ROOT / path).exists(), path
        if anchor:
            headings = [
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)
            ]
            assert anchor in headings


def test_the_page_and_the_help_know_the_same_commands():
    def commands(text: str) -> set[str]:
        found = re.findall(r"(?<=python )(?:new_task|worker)\.py(?: -(?!-h)[-a-z]*)?(?= |`|$)", text, re.MULTILINE)
        return {command.strip() for command in found}

    listed = commands(README.partition("### Commands")[2].partition("### Settings")[0])
    assert listed == {"new_task.py", "new_task.py -", "worker.py", "worker.py --graceful"}
    for script in ("new_task.py", "worker.py"):
        help_text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert commands(help_text) == {command for command in listed if command.startswith(script)}


def test_every_promise_has_its_test():
    promises = re.findall(r"^\| .+ \| \[(.+)\]\((tests/\w+\.py)\) \|$", README, re.MULTILINE)
    assert len(promises) > 10
    for name, path in promises:
        assert f"def test_{name.replace(' ', '_')}(" in (ROOT / path).read_text()
