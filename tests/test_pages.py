"""The pages are true: each command is run in the shell it names, in order, and prints what the page shows."""

import functools
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pexpect
import pytest
import rabbitmq
from conftest import DEADLINE, ROOT
from node import Node, free_port

import new_task
import task_queue
import worker

TRANSLATIONS = [("README.md", "README.ko.md"), ("docs/tutorial.md", "docs/tutorial.ko.md")]
PAGES = [str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
TEXT = {name: (ROOT / name).read_text() for name in PAGES}

# What fits beside GitHub's list of files on a screen of 1280 pixels, in characters.
PAGE_WIDTH = 97

# What make does for these targets, without looking for a .venv.
AS_TYPED = {
    "make dead-letters": "python -m task_queue.dead_letters list",
    "make requeue-dead-letters": "python -m task_queue.dead_letters requeue",
}

MAKE = {"rabbitmq": rabbitmq.find, "kill-rabbitmq": rabbitmq.kill, "stop": rabbitmq.stop}

# RabbitMQ updates what it tells of a queue every five seconds, or every second where make started it.
FIGURES_DEADLINE = 15

# The first command for Docker builds an image; a cluster takes half a minute.
DOCKER_DEADLINE = 240


def blocks(page: str, kind: str) -> list[str]:
    """Return the blocks of a kind (console, sh, python) of a page."""
    return re.findall(rf"^```{kind}\n(.*?)```$", TEXT[page], re.DOTALL | re.MULTILINE)


def in_shells(page: str) -> list[tuple[str, list[str]]]:
    """Return (number of the shell, lines) for each console block: the shell is the last one that the text names."""
    found, shell = [], ""
    for text, block in re.findall(r"(.*?)```console\n(.*?)```", TEXT[page], re.DOTALL):
        shell = re.findall(r"(?:[Ss]hell|셸) (\d)", f"shell {shell} {text}")[-1]
        found.append((shell, block.splitlines()))
    return found


def comparable(line: str) -> str:
    """Return a line without what differs from run to run, from shell to shell, and between node and container."""
    line = re.sub(r"^Quit\b.*", "Quit", re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", line))
    if line.startswith("RabbitMQ:"):
        line = line.replace("container", "node").replace("it with Docker (docker compose up)", "a private node")
        line = re.sub(r"localhost:\d+|,? (after|with) .*", "", line)
    return line


class Shell:
    """A bash on a terminal of its own. Nothing that is typed is echoed, so all there is to read is output."""

    def __init__(self, folder: Path, environment: dict):
        settings = {"PS1": "", "PS2": "", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = "bash --norc --noediting -i"
        self.bash = pexpect.spawn(command, cwd=folder, env=environment | settings, echo=False, encoding="utf-8")
        self.bash.delaybeforesend = None

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


class Player:
    """Plays pages. RabbitMQ is the one that tools/rabbitmq.py starts for `make demo`, in a folder of the test."""

    def __init__(self, folder: Path, url: str, capsys):
        self._new_shell = functools.partial(Shell, folder, {**os.environ, "AMQP_URL": url})
        self._capsys = capsys
        self._shells = {}
        self._printed: list[str] = []  # what an intercepted make has printed, and the page must show next

    def play(self, page: str) -> None:
        for number, lines in in_shells(page):
            self.play_block(self._shells.get(number) or self._shells.setdefault(number, self._new_shell()), lines)
        self.close()

    def play_block(self, shell: Shell, lines: list[str]) -> None:
        skipping = False
        while lines:
            line = lines.pop(0)
            if line == "$ make queues" or line.startswith("$ curl"):
                self.await_figures(line[2:], lines)
            elif line.removeprefix("$ make ") in MAKE:
                self._printed = self.printed_by(MAKE[line.split()[-1]])
            elif line.startswith(("$ ", "> ")):
                shell.bash.sendline(AS_TYPED.get(line[2:], line[2:]))
            elif line == "^C":
                shell.bash.sendcontrol("c")
            elif line.startswith("^\\"):
                shell.bash.sendcontrol("\\")
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

    def printed_by(self, make) -> list[str]:
        """Do what a target of make does, with a RabbitMQ that is the test's own; return what it prints."""
        self._capsys.readouterr()
        make()
        return self._capsys.readouterr().out.splitlines()

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
            return self.printed_by(rabbitmq.queues)
        typed = command.replace("15692", str(rabbitmq.WATCH_PORTS["prometheus"]))
        return subprocess.run(["bash", "-c", typed], capture_output=True, text=True).stdout.splitlines()

    def close(self) -> None:
        for shell in self._shells.values():
            shell.bash.close(force=True)
        self._shells = {}


def copy_project(folder: Path) -> None:
    """Copy what runs, and what Docker needs."""
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".?*", "tests", "docs", "__pycache__"), dirs_exist_ok=True
    )
    shutil.copy(ROOT / ".dockerignore", folder)


ON_DOCKER = pytest.param("docker", marks=[pytest.mark.docker, pytest.mark.xdist_group("test_compose.py")])


@pytest.fixture(params=["a private node", ON_DOCKER])
def player(request, tmp_path, monkeypatch, capsys):
    """Plays pages in a copy of the project. RabbitMQ is there as `make demo` leaves it: a node, or a container."""
    copy_project(tmp_path)
    monkeypatch.delenv("AMQP_URL", raising=False)
    compose = ["docker", "compose", "-p", f"task-queue-test-{os.getpid()}-player"]
    run = functools.partial(subprocess.run, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    monkeypatch.setattr(rabbitmq.Container, "compose", lambda _, *words: run([*compose, *words], check=True).stdout)
    monkeypatch.setattr(rabbitmq, "docker_answers", lambda: request.param == "docker")
    monkeypatch.setattr(rabbitmq, "FOLDER", tmp_path / ".rabbitmq")
    monkeypatch.setattr(rabbitmq, "PORT", free_port())
    monkeypatch.setattr(rabbitmq, "WATCH_PORTS", {what: free_port() for what in rabbitmq.WATCH_PORTS})
    for what, port in {"amqp": rabbitmq.PORT, **rabbitmq.WATCH_PORTS}.items():
        monkeypatch.setenv(f"{what.upper()}_PORT", str(port))  # for Compose
    assert isinstance(rabbitmq.find(), Node) == (request.param != "docker")
    player = Player(tmp_path, f"amqp://localhost:{rabbitmq.PORT}", capsys)
    yield player
    player.close()
    rabbitmq.stop()
    if request.param == "docker":
        run([*compose, "down", "--volumes"])


@pytest.mark.timeout(600)
def test_every_command_does_what_the_page_shows(player):
    player.play("README.md")
    player.play("docs/tutorial.md")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_a_clone_is_all_that_the_demo_needs(tmp_path):
    (lines,) = blocks("README.md", "sh")
    lines = lines.replace("<this repository's URL>", shlex.quote(str(ROOT))).replace("make", "make --dry-run")
    done = subprocess.run(["bash", "-e"], input=lines, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "tools/demo.py" in done.stdout) == (0, True), done.stderr


def test_the_front_page_shows_the_heart_of_both_scripts():
    """When the scripts have changed, put what this expects into the page."""
    shown = [block.rstrip() for block in blocks("README.md", "python")]
    for function in (new_task.send, worker.do_tasks):
        _, _, body = inspect.getsource(function).split('"""', 2)
        assert shown.pop(0) == textwrap.dedent(body.strip("\n"))


def test_a_user_with_the_permissions_of_the_reference_can_do_everything(broker, shells):
    commands = re.findall(r"^    rabbitmqctl (.* anna .*)$", TEXT["docs/reference.md"], re.MULTILINE)
    for command in commands:
        broker.node.ctl(*shlex.split(command))
    with broker.connect() as connection:
        connection.channel().queue_delete(task_queue.QUEUE)  # which she may declare
    shells.url = broker.url.replace("guest:guest", "anna:a-password")
    program = "import sys, worker\ndef work(_):\n    1 / 0\nworker.work = work\nsys.exit(worker.main())"
    failing = shells.start("-c", program)
    shells.send("task")
    failing.wait_for("Set aside 'task'")
    for command in ("list", "requeue"):
        assert shells.start("-m", "task_queue.dead_letters", command).ends() == 0
    failing.wait_for("Received 'task'", times=11)


def test_a_terminal_shows_ctrl_c_on_a_line_of_its_own(broker):
    """The page shows it so, and its shells echo nothing: so here is one that does."""
    environment = {**os.environ, "AMQP_URL": broker.url}
    receiver = pexpect.spawn(sys.executable, ["worker.py"], cwd=ROOT, env=environment, encoding="utf-8")
    receiver.expect_exact("To exit press CTRL+C\r\n", timeout=DEADLINE)
    receiver.sendcontrol("c")
    receiver.expect_exact("^C\r\n [!] Stopped by Ctrl+C.\r\n", timeout=DEADLINE)
    receiver.close()

    sender = pexpect.spawn(sys.executable, ["new_task.py", "-"], cwd=ROOT, env=environment, encoding="utf-8")
    sender.expect_exact("0 sent", timeout=DEADLINE)  # it waits for lines
    sender.sendcontrol("c")
    sender.expect(r"\^C[^!]*\r\n \[!\] Not sent: interrupted", timeout=DEADLINE)
    sender.close()


# The ports of the nodes of the cluster, and of their management UI: they are fixed, and may be taken here.
CLUSTER_PORT = re.compile(r"\b1?567[345]\b")


class DockerPage:
    """Two shells in a copy of the project, with Compose projects of their own, on other ports than the page's."""

    def __init__(self, folder: Path):
        self._ports = {}
        copy_project(folder)
        for path in folder.glob("*.yml"):
            path.write_text(self.on_other_ports(path.read_text()))
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("COMPOSE_", "RABBITMQ_", "AMQP_"))}
        settings |= {"AMQP_PORT": "0", "MANAGEMENT_PORT": "0", "PROMETHEUS_PORT": "0"}  # 0: any that is free
        self._project = settings["COMPOSE_PROJECT_NAME"] = f"task-queue-test-{os.getpid()}-pages"
        self._run = functools.partial(subprocess.run, cwd=folder, env=settings, stdin=subprocess.DEVNULL, check=True)
        self.shells = Shell(folder, settings), Shell(folder, settings)

    def on_other_ports(self, text: str) -> str:
        return CLUSTER_PORT.sub(lambda match: str(self._ports.setdefault(match[0], free_port())), text)

    def enter(self, shell: Shell, line: str, *shown: str) -> None:
        """Type a line, and wait until all that is shown, in that order."""
        shell.bash.sendline(self.on_other_ports(line))
        for text in shown:
            shell.bash.expect_exact(text, timeout=DOCKER_DEADLINE)

    def members(self) -> int:
        """Return how many nodes have a copy of the queue."""
        command = "docker compose -f docker-compose.cluster.yml exec -T rabbit1 rabbitmqctl -q list_queues name members"
        listed = self._run(command.split(), capture_output=True, text=True).stdout
        (line,) = [line for line in listed.splitlines() if line.startswith("task_queue\t")]
        return line.count("rabbit@")

    def containers(self) -> list[str]:
        """Return the containers that are left, whether they run or not."""
        command = ["docker", "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self._project}"]
        return self._run(command, capture_output=True, text=True).stdout.split()

    def close(self) -> None:
        for shell in self.shells:
            shell.bash.close(force=True)
        for file in ("docker-compose.yml", "docker-compose.cluster.yml"):
            down = ["docker", "compose", "-f", file, "--profile", "*", "down"]
            self._run([*down, "--volumes", "--remove-orphans", "--rmi", "local", "--timeout", "0"], capture_output=True)


@pytest.mark.docker
@pytest.mark.xdist_group("test_compose.py")
@pytest.mark.timeout(600)
def test_every_command_for_docker_does_what_the_page_says(tmp_path, request):
    docker_page = DockerPage(tmp_path)
    request.addfinalizer(docker_page.close)
    enter, (one, two) = docker_page.enter, docker_page.shells
    found = [block.splitlines() for block in blocks("docs/tutorial.md", "sh")]
    (up,), (send,), (cluster, nodes, receive), (alias, status, *grow), downs = found
    enter(one, up, *3 * [" [*] Waiting for messages."])
    enter(two, send, " [x] Sent 'First message.'")
    one.bash.expect(r" \[x\] Received 'First message\.'.* \[x\] Done", timeout=DOCKER_DEADLINE)
    one.bash.sendcontrol("c")
    enter(one, "echo stopped: $?", "stopped: ")

    enter(one, f"{cluster} && echo up: $?", "up: 0")
    enter(one, nodes)
    enter(one, receive, " [*] Waiting for messages.")  # by now the queue is declared, with its three members
    enter(two, alias)
    for node in ("rabbit@rabbit2", "rabbit@rabbit3"):
        enter(two, f"in_rabbit1 rabbitmq-queues shrink {node}; echo shrunk: $?", "shrunk: 0")
    assert (docker_page.members(), bool(docker_page.containers())) == (1, True)
    for line in (status, *grow):
        enter(two, f"{line}; echo done: $?", "done: 0")
    assert docker_page.members() == 3
    one.bash.sendcontrol("c")
    one.bash.expect_exact(" [!] Stopped by Ctrl+C.", timeout=DOCKER_DEADLINE)
    for line in downs:
        enter(two, f"{line}; echo done: $?", "done: 0")
    assert docker_page.containers() == []


def anchors(page: str) -> list[str]:
    """Return the names that GitHub gives to the headings of a page; those of code are none."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    assert len(anchors(page)) == len(set(anchors(page)))
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', TEXT[page]):
        path, _, anchor = "".join(target).partition("#")
        if "://" not in path:
            target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
            assert target.exists(), path
            assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_wider_than_a_page(page):
    for block in blocks(page, r"\w*"):
        assert max(map(len, block.splitlines())) <= PAGE_WIDTH


@pytest.mark.parametrize(("page", "translation"), TRANSLATIONS)
def test_a_translation_has_the_same_blocks_in_the_same_shells(page, translation):
    assert in_shells(translation) == in_shells(page)
    assert blocks(translation, r"\w*") == blocks(page, r"\w*")
    for one, other in ((page, translation), (translation, page)):
        assert f"]({Path(other).name})" in TEXT[one][:200]


def test_the_page_and_the_help_know_the_same_commands():
    def commands(text: str) -> set[str]:
        found = re.findall(r"(?<=python )(?:new_task|worker)\.py(?: -(?!-h)[-a-z]*)?(?= |`|$)", text, re.MULTILINE)
        return {command.strip() for command in found}

    listed = commands(TEXT["docs/reference.md"].partition("## Commands")[2].partition("\nTo send the lines")[0])
    assert listed == {"new_task.py", "new_task.py -", "worker.py", "worker.py --graceful"}
    for script in ("new_task.py", "worker.py"):
        help_text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert commands(help_text) == {command for command in listed if command.startswith(script)}


def test_every_promise_has_its_test():
    promises = re.findall(r"^\| .+ \| \[(.+)\]\(\.\./(tests/\w+\.py)\) \|$", TEXT["docs/reference.md"], re.MULTILINE)
    assert len(promises) > 10
    for name, path in promises:
        assert f"def test_{name.replace(' ', '_')}(" in (ROOT / path).read_text()
