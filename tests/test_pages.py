"""The pages are true: each command is run in the shell it names, in order, and prints what the page shows."""

import collections
import contextlib
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
from conftest import DEADLINE, ROOT
from node import Node, free_port

import new_task
import worker

TRANSLATIONS = [("README.md", "README.ko.md"), ("docs/tutorial.md", "docs/tutorial.ko.md")]
PAGES = [str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
TEXT = {name: (ROOT / name).read_text() for name in PAGES}

# What fits beside GitHub's list of files on a screen of 1280 pixels, in characters.
PAGE_WIDTH = 97

# Commands whose figures RabbitMQ updates every five seconds, or every second where make started it.
FIGURES, FIGURES_DEADLINE = ("make queues", "curl"), 15

# The first command for Docker builds an image; a cluster takes half a minute.
DOCKER_DEADLINE = 240

# The ports of the pages: of RabbitMQ, and of the three nodes of a cluster. Here they may be taken.
CLUSTER_PORTS = r"\b1?567[345]\b"
PORTS = rf"\b1?5672\b|\b15692\b|{CLUSTER_PORTS}"

# What stands in the copy of the project in place of this: what one only waits for takes less time, and is installed.
IN_THE_COPY = {
    "time.sleep(1)": "time.sleep(0.4)",
    "PAUSE_AFTER_FAILURE = 1\n": "PAUSE_AFTER_FAILURE = 0.2\n",
    ".venv/bin/python": sys.executable,
}


def blocks(page: str, kind: str) -> list[str]:
    """Return the blocks of a kind (console, sh, python) of a page."""
    return re.findall(rf"^```{kind}\n(.*?)```$", TEXT[page], re.DOTALL | re.MULTILINE)


def in_shells(text: str) -> list[tuple[str, list[str]]]:
    """Return (number of the shell, lines) for each console block: the shell is the last one that the text names."""
    found, shell = [], ""
    for before, block in re.findall(r"(.*?)```console\n(.*?)```", text, re.DOTALL):
        shell = re.findall(r"(?:[Ss]hell|셸) (\d)", f"shell {shell} {before}")[-1]
        found.append((shell, block.splitlines()))
    return found


def comparable(line: str) -> str:
    """Return a line without what differs from run to run, from shell to shell, and between node and container."""
    line = re.sub(r"^Quit\b.*", "Quit", re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", line))
    if line.startswith("RabbitMQ:"):
        line = line.replace("container", "node").replace("it with Docker (docker compose up)", "a private node")
        line = re.sub(r",? (after|with) .*", "", line)
    return line


class Shell(pexpect.spawn):
    """A bash on a terminal of its own. Nothing that is typed is echoed, so all there is to read is output."""

    def __init__(self, folder: Path, environment: dict):
        settings = {"PS1": "", "PS2": "", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        command = "bash --norc --noediting -i"
        super().__init__(command, cwd=folder, env=environment | settings, echo=False, encoding="utf-8")
        self.delaybeforesend = None

    def next_line(self) -> str:
        """Return the next line that is not blank."""
        self.expect(r"([^\r\n]+)\r?\n", timeout=DEADLINE)
        # "Erase the rest of the line" is how the progress of many tasks leaves the terminal.
        return self.match[1].replace("\x1b[K", "").rstrip() or self.next_line()

    def must_show(self, line: str, skipping: bool = False) -> None:
        shown = self.next_line()
        while skipping and comparable(shown) != comparable(line):
            shown = self.next_line()
        assert comparable(shown) == comparable(line)


class Player:
    """Plays pages in a copy of the project, on other ports than a user's own, and as another project for Docker.

    theirs: a RabbitMQ that AMQP_URL names. Without it make starts one: in Docker, or as a private node.
    """

    def __init__(self, folder: Path, docker: bool = False, theirs: Node | None = None):
        self.folder, self.docker, self.theirs = folder, docker, theirs
        self.project = f"task-queue-test-{os.getpid()}-pages"
        self._ports: dict[str, str] = {}
        self._environment = self._settings()
        self.shells = collections.defaultdict(lambda: Shell(self.folder, self._environment))  # opened when needed
        self._copy_project()

    def _settings(self) -> dict:
        """Return the environment, in which nothing that the user has set reaches what runs here."""
        users = ("AMQP_", "COMPOSE_", "MAKE", "RABBITMQ_DEFAULT_", "RABBITMQ_ERLANG_")
        settings = {name: value for name, value in os.environ.items() if not name.startswith(users)}
        settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings["COMPOSE_PROJECT_NAME"] = self.project
        for name, port in {"AMQP_PORT": "5672", "MANAGEMENT_PORT": "15672", "PROMETHEUS_PORT": "15692"}.items():
            settings[name] = self.on_other_ports(port)  # for Compose
        if self.theirs:
            settings["AMQP_URL"] = self.theirs.url
        if not self.docker:
            settings["DOCKER_HOST"] = "unix:///nowhere"
        return settings

    def _copy_project(self) -> None:
        """Copy what runs, and what Docker needs, with a .venv in which nothing is missing."""
        left_out = shutil.ignore_patterns(".?*", "tests", "docs", "__pycache__")
        shutil.copytree(ROOT, self.folder, ignore=left_out, dirs_exist_ok=True)
        shutil.copy(ROOT / ".dockerignore", self.folder)
        for path in (self.folder / "Makefile", *self.folder.rglob("*.py")):
            text = self.on_other_ports(path.read_text())
            for here, there in {**IN_THE_COPY, "task-queue-demo": self.project}.items():
                text = text.replace(here, there)
            path.write_text(text)
        cluster = self.folder / "docker-compose.cluster.yml"
        cluster.write_text(self.on_other_ports(cluster.read_text(), CLUSTER_PORTS))
        (self.folder / ".venv").mkdir()
        (self.folder / ".venv" / "run").touch()

    def on_other_ports(self, text: str, ports: str = PORTS) -> str:
        return re.sub(ports, lambda match: self._ports.setdefault(match[0], str(free_port())), text)

    def run(self, command: str) -> subprocess.CompletedProcess:
        """Run a line of bash."""
        settings = {"cwd": self.folder, "env": self._environment, "stdin": subprocess.DEVNULL}
        return subprocess.run(["bash", "-c", self.on_other_ports(command)], capture_output=True, text=True, **settings)

    def play(self, text: str) -> None:
        """Play a page, or some of its chapters."""
        for number, lines in in_shells(text):
            self.play_block(self.shells[number], lines)
        self.close_shells()

    def play_block(self, shell: Shell, lines: list[str]) -> None:
        skipping = False
        while lines:
            line = lines.pop(0)
            if line.startswith(("$ make ", "$ curl ")):
                expected = list(itertools.takewhile(lambda line: not line.startswith("$ "), lines))
                del lines[: len(expected)]
                self.ask(line[2:], expected)
            elif line.startswith(("$ ", "> ")):
                shell.sendline(line[2:])
            elif line == "^C":
                shell.sendcontrol("c")
            elif line.startswith("^\\"):
                shell.sendcontrol("\\")
                shell.must_show(line[2:], skipping=True)
            elif line == "...":
                skipping = True
                continue
            else:
                shell.must_show(line, skipping)
            skipping = False

    def ask(self, command: str, expected: list[str]) -> None:
        """Give a command to make or curl, which must print what the page shows. If it is a figure, wait for that."""
        expected = [comparable(self.on_other_ports(line)) for line in expected]
        if self.theirs:  # RabbitMQ's own command doesn't pad its columns, and make does nothing
            expected = [re.sub(" +", "\t", line) for line in expected if not line.startswith("RabbitMQ:")]
        deadline = time.monotonic() + FIGURES_DEADLINE
        while (printed := self.answer(command)) != expected:
            assert command.startswith(FIGURES) and time.monotonic() < deadline, "\n".join(printed)

    def answer(self, command: str) -> list[str]:
        """Return what a command prints; or if make refuses it, what that prints which is to be typed instead."""
        done = self.run(command)
        if not self.theirs:
            assert done.returncode == 0, done.stderr
            return [comparable(line) for line in done.stdout.splitlines()]
        if done.returncode == 0:
            return []
        line, from_make = done.stderr.splitlines()
        assert from_make.endswith("Error 1")
        instead = re.search("sudo .*", line)[0]
        assert instead in TEXT["docs/tutorial.md"]
        if "rabbitmqctl" in instead:
            return self.theirs.ctl(*instead.split()[2:]).splitlines()
        assert instead == "sudo systemctl kill --signal=SIGKILL rabbitmq-server"
        self.theirs.kill()
        self.theirs.start()
        return []

    def close_shells(self) -> None:
        while self.shells:
            self.shells.popitem()[1].close(force=True)

    def close(self) -> None:
        self.close_shells()
        self.run("make clean")
        for file in ["docker-compose.yml", "docker-compose.cluster.yml"] * self.docker:
            down = f"docker compose -f {file} --profile '*' down"
            self.run(f"{down} --volumes --remove-orphans --rmi local --timeout 0")


@pytest.fixture
def player_of(tmp_path):
    """A function that returns the player of a set-up."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(contextlib.closing(Player(tmp_path, **settings)))


ON_DOCKER = pytest.param(True, marks=[pytest.mark.docker, pytest.mark.xdist_group("test_compose.py")])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("docker", [False, ON_DOCKER], ids=["a private node", "docker"])
def test_every_command_does_what_the_page_shows(docker, player_of):
    player = player_of(docker=docker)
    started = "with Docker" if docker else "a private node"
    assert started in player.run("make rabbitmq").stdout
    player.play(TEXT["README.md"])
    player.play(TEXT["docs/tutorial.md"])


def test_a_rabbitmq_that_make_did_not_start_needs_the_commands_that_the_page_names(player_of, mortal):
    chapters = TEXT["docs/tutorial.md"].split("\n## ")
    player_of(theirs=mortal.node).play("".join(chapters[number] for number in (1, 2, 5, 9)))
    assert mortal.node.running


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


def test_a_user_with_the_permissions_of_the_reference_can_do_everything(broker, shells, worker_with):
    commands = re.findall(r"^    rabbitmqctl (.* anna .*)$", TEXT["docs/reference.md"], re.MULTILINE)
    for command in commands:
        broker.node.ctl(*shlex.split(command))
    broker.delete_queue()  # which she may declare
    shells.url = broker.url.replace("guest:guest", "anna:a-password")
    failing = shells.start(worker_with("1 / 0"))
    shells.send("task")
    failing.wait_for("Set aside 'task'")
    shells.dead_letters("list")
    shells.dead_letters("requeue")
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


@pytest.mark.docker
@pytest.mark.xdist_group("test_compose.py")
@pytest.mark.timeout(600)
def test_every_command_for_docker_does_what_the_page_says(player_of):
    player = player_of(docker=True)
    one, two = player.shells["1"], player.shells["2"]

    def enter(shell: Shell, line: str, *shown: str) -> None:
        """Type a line, and wait until all that is shown, in that order."""
        shell.sendline(player.on_other_ports(line))
        for text in shown:
            shell.expect_exact(text, timeout=DOCKER_DEADLINE)

    def members() -> int:
        """Return how many nodes have a copy of the queue."""
        command = "docker compose -f docker-compose.cluster.yml exec -T rabbit1 rabbitmqctl -q list_queues name members"
        listed = player.run(command).stdout
        (line,) = [line for line in listed.splitlines() if line.startswith("task_queue\t")]
        return line.count("rabbit@")

    def containers() -> list[str]:
        """Return the containers that are left, whether they run or not."""
        done = player.run(f"docker ps --all --quiet --filter label=com.docker.compose.project={player.project}")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    found = [block.splitlines() for block in blocks("docs/tutorial.md", "sh")]
    (up,), (send,), (cluster, nodes, receive), (alias, status, *grow), downs = found
    enter(one, up, *3 * [" [*] Waiting for messages."])
    enter(two, send, " [x] Sent 'First message.'")
    one.expect(r" \[x\] Received 'First message\.'.* \[x\] Done", timeout=DOCKER_DEADLINE)
    one.sendcontrol("c")
    enter(one, "echo stopped: $?", "stopped: ")

    enter(one, f"{cluster} && echo up: $?", "up: 0")
    enter(one, nodes)
    enter(one, receive, " [*] Waiting for messages.")  # by now the queue is declared, with its three members
    enter(two, alias)
    for node in ("rabbit@rabbit2", "rabbit@rabbit3"):
        enter(two, f"in_rabbit1 rabbitmq-queues shrink {node}; echo shrunk: $?", "shrunk: 0")
    assert (members(), bool(containers())) == (1, True)
    for line in (status, *grow):
        enter(two, f"{line}; echo done: $?", "done: 0")
    assert members() == 3
    one.sendcontrol("c")
    one.expect_exact(" [!] Stopped by Ctrl+C.", timeout=DOCKER_DEADLINE)
    for line in downs:
        enter(two, f"{line}; echo done: $?", "done: 0")
    assert containers() == []


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
    assert in_shells(TEXT[translation]) == in_shells(TEXT[page])
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
