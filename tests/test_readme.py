"""The README is run: each command in the shell it names, in order, and what it prints is compared with the page."""

import functools
import itertools
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
from node import Node, free_port

import task_queue

README = (ROOT / "README.md").read_text()

# What make does for these targets, without looking for a .venv.
AS_TYPED = {
    "make dead-letters": "python -m task_queue.dead_letters list",
    "make requeue-dead-letters": "python -m task_queue.dead_letters requeue",
}

# RabbitMQ updates what it tells of a queue every five seconds.
FIGURES_DEADLINE = 15

# The first command for Docker builds an image; a cluster takes half a minute.
DOCKER_DEADLINE = 240


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
    return re.sub(r"(localhost:|after )\d+", r"\1N", line) if "RabbitMQ:" in line else line


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
            if line == "$ make queues" or line.startswith("$ curl"):
                self.await_figures(line[2:], lines)
            elif line in ("$ make rabbitmq", "$ make kill-rabbitmq", "$ make stop"):
                self.make(line.split()[-1])
            elif line.startswith(("$ ", "> ")):
                shell.type(AS_TYPED.get(line[2:], line[2:]))
            elif line == "^C":
                shell.press("c")
            elif line.startswith("^\\"):
                shell.press("\\")
                shell.must_show(line[2:], skipping=True)
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
        {"rabbitmq": rabbitmq.find, "kill-rabbitmq": rabbitmq.kill, "stop": rabbitmq.stop}[target]()
        self._printed = self._capsys.readouterr().out.splitlines()

    def await_figures(self, command: str, lines: list[str]) -> None:
        """Ask RabbitMQ for figures until they are those of the page."""
        expected = list(itertools.takewhile(lambda line: not line.startswith("$ "), lines))
        del lines[: len(expected)]
        deadline = time.monotonic() + FIGURES_DEADLINE
        while (shown := self.figures(command)) != expected:
            assert time.monotonic() < deadline, "\n".join(shown)

    def figures(self, command: str) -> list[str]:
        """Return what one of the two commands shows that ask RabbitMQ for figures."""
        if command == "make queues":
            self._capsys.readouterr()
            rabbitmq.queues()
            return self._capsys.readouterr().out.splitlines()
        typed = command.replace("15692", str(rabbitmq.WATCH_PORTS["prometheus"]))
        return subprocess.run(["bash", "-c", typed], capture_output=True, text=True).stdout.splitlines()

    def close(self) -> None:
        for shell in self._shells.values():
            shell.bash.close(force=True)


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    """The page, to be played in a copy of the scripts, with a RabbitMQ as `make demo` leaves it."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    for folder in ("task_queue", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.delenv("AMQP_URL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")  # or it would be a container
    monkeypatch.setattr(rabbitmq, "FOLDER", tmp_path / ".rabbitmq")
    monkeypatch.setattr(rabbitmq, "PORT", free_port())
    monkeypatch.setattr(rabbitmq, "WATCH_PORTS", {what: free_port() for what in rabbitmq.WATCH_PORTS})
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
    rabbitmq.stop()


@pytest.mark.timeout(400)
def test_every_command_does_what_the_page_shows(page):
    for number, lines in blocks():
        page.play(number, list(lines))


def test_a_terminal_shows_ctrl_c_on_a_line_of_its_own(broker):
    """The page shows it so, and its shells echo nothing: so here is one that does."""
    environment = {**os.environ, "AMQP_URL": broker.url}
    worker = pexpect.spawn(sys.executable, ["worker.py"], cwd=ROOT, env=environment, encoding="utf-8")
    worker.expect_exact("To exit press CTRL+C\r\n", timeout=DEADLINE)
    worker.sendcontrol("c")
    worker.expect_exact("^C\r\n [!] Stopped by Ctrl+C.\r\n", timeout=DEADLINE)
    worker.close()

    sender = pexpect.spawn(sys.executable, ["new_task.py", "-"], cwd=ROOT, env=environment, encoding="utf-8")
    sender.expect_exact("0 sent", timeout=DEADLINE)  # it waits for lines
    sender.sendcontrol("c")
    sender.expect(r"\^C[^!]*\r\n \[!\] Not sent: interrupted", timeout=DEADLINE)
    sender.close()


def test_queues_are_listed_in_columns(broker, monkeypatch, capsys):
    with broker.connect() as connection:
        connection.channel().queue_declare(task_queue.DEAD_LETTERS, durable=True, arguments=task_queue.QUORUM)
    monkeypatch.setattr(rabbitmq, "started", lambda: broker.node)
    rabbitmq.queues()
    heading, *rows = capsys.readouterr().out.splitlines()
    assert {row.split()[0] for row in rows} >= {task_queue.QUEUE, task_queue.DEAD_LETTERS}
    for column in heading.split()[1:]:
        start = heading.index(column)
        assert all(row[start - 1].isspace() and row[start].isdigit() for row in rows)


# The ports of the nodes of the cluster, and of their management UI: they are fixed, and may be taken here.
CLUSTER_PORT = re.compile(r"\b1?567[345]\b")


class DockerPage:
    """Two shells in a copy of the project, with Compose projects of their own, on other ports than the page's."""

    files = ("docker-compose.yml", "docker-compose.cluster.yml")

    def __init__(self, folder: Path):
        self._ports = {}
        for path in [ROOT / "Dockerfile", ROOT / ".dockerignore", ROOT / "requirements.txt", *ROOT.glob("*.py")]:
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "task_queue", folder / "task_queue")
        for name in self.files:
            (folder / name).write_text(self.on_other_ports((ROOT / name).read_text()))
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("COMPOSE_", "RABBITMQ_", "AMQP_"))}
        settings |= {"AMQP_PORT": "0", "MANAGEMENT_PORT": "0", "PROMETHEUS_PORT": "0"}  # 0: any that is free
        self._project = f"task-queue-test-{os.getpid()}-readme"
        settings |= {"COMPOSE_PROJECT_NAME": self._project, "PS1": "", "TERM": "dumb"}
        settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._run = functools.partial(subprocess.run, cwd=folder, env=settings, stdin=subprocess.DEVNULL, check=True)
        self.shells = Shell(folder, settings), Shell(folder, settings)

    def on_other_ports(self, text: str) -> str:
        return CLUSTER_PORT.sub(lambda match: str(self._ports.setdefault(match[0], free_port())), text)

    def enter(self, shell: Shell, line: str, *shown: str) -> None:
        """Type a line, and wait until all that is shown, in that order."""
        shell.type(self.on_other_ports(line))
        for text in shown:
            shell.bash.expect_exact(text, timeout=DOCKER_DEADLINE)

    def members(self) -> int:
        """Return how many nodes have a copy of the queue."""
        listed = self._ask("exec", "-T", "rabbit1", "rabbitmqctl", "-q", "list_queues", "name", "members")
        (line,) = [line for line in listed.splitlines() if line.startswith("task_queue\t")]
        return line.count("rabbit@")

    def containers(self) -> list[str]:
        """Return the containers that are left, whether they run or not."""
        command = ["docker", "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self._project}"]
        return self._run(command, capture_output=True, text=True).stdout.split()

    def _ask(self, *arguments: str) -> str:
        command = ["docker", "compose", "-f", "docker-compose.cluster.yml", *arguments]
        return self._run(command, capture_output=True, text=True).stdout

    def close(self) -> None:
        for shell in self.shells:
            shell.bash.close(force=True)
        for file in self.files:
            down = ["docker", "compose", "-f", file, "--profile", "*", "down"]
            self._run([*down, "--volumes", "--remove-orphans", "--rmi", "local", "--timeout", "0"], capture_output=True)


@pytest.fixture
def docker_page(tmp_path):
    page = DockerPage(tmp_path)
    yield page
    page.close()


@pytest.mark.docker
@pytest.mark.xdist_group("test_compose.py")
@pytest.mark.timeout(600)
def test_every_command_for_docker_does_what_the_page_says(docker_page):
    enter, (one, two) = docker_page.enter, docker_page.shells
    (up,), (send,), (cluster, worker), (status, *grow), downs = [
        block.splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    ]
    enter(one, up, *3 * [" [*] Waiting for messages."])
    enter(two, send, " [x] Sent 'First message.'")
    one.bash.expect_exact(" [x] Received 'First message.'", timeout=DOCKER_DEADLINE)
    one.bash.expect_exact(" [x] Done", timeout=DOCKER_DEADLINE)
    one.press("c")
    enter(one, "echo stopped: $?", "stopped: ")

    enter(one, f"{cluster} && echo up: $?", "up: 0")
    enter(one, worker, " [*] Waiting for messages.")  # by now the queue is declared, with its three members
    in_cluster = status.partition("rabbitmq-queues")[0]
    for node in ("rabbit@rabbit2", "rabbit@rabbit3"):
        enter(two, f"{in_cluster} rabbitmq-queues shrink {node}; echo shrunk: $?", "shrunk: 0")
    assert docker_page.members() == 1
    assert docker_page.containers()
    for line in (status, *grow):
        enter(two, f"{line}; echo done: $?", "done: 0")
    assert docker_page.members() == 3
    one.press("c")
    one.bash.expect_exact(" [!] Stopped by Ctrl+C.", timeout=DOCKER_DEADLINE)
    for line in downs:
        enter(two, f"{line}; echo done: $?", "done: 0")
    assert docker_page.containers() == []


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
            assert anchor in map(as_anchor, re.findall(r"^#+ (.+)$", README, re.MULTILINE))


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
