"""The pages are true: each command is run in the shell it names, in order, and prints what the page shows."""

import collections
import contextlib
import inspect
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
from node import free_port
from processes import wait_until

import new_task
import worker

PAGES = [str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]
TRANSLATIONS = [("README.md", "README.ko.md"), ("docs/tutorial.md", "docs/tutorial.ko.md")]
TEXT = {name: (ROOT / name).read_text() for name in PAGES}

# What fits beside GitHub's list of files on a screen of 1280 pixels, in characters.
PAGE_WIDTH = 97

# The first command for Docker builds an image; a cluster takes half a minute.
DOCKER_DEADLINE = 240

# The ports of the pages: of RabbitMQ, and of the three nodes of a cluster. Here they may be taken.
CLUSTER_PORTS = r"\b1?567[345]\b"
PORTS = rf"\b1?5672\b|\b15692\b|{CLUSTER_PORTS}"

# What is typed in a console block: a line behind a prompt, or a key.
TYPED = re.compile(r"^(?:[$>] |(?=\^))(.*)\n", re.MULTILINE)
KEYS = {"": "", "^C": "\x03", "^\\": "\x1c"}


def blocks(page: str, kind: str) -> list[str]:
    """Return the blocks of a kind (console, sh, python) of a page."""
    return re.findall(rf"^```{kind}\n(.*?)```$", TEXT[page], re.DOTALL | re.MULTILINE)


def in_shells(page: str) -> list[tuple[str, str]]:
    """Return (number of the shell, block) for each console block: the shell is the last one that the text names."""
    found, shell = [], ""
    for before, block in re.findall(r"(.*?)```console\n(.*?)```", TEXT[page], re.DOTALL):
        shell = re.findall(r"(?:[Ss]hell|셸) (\d)", f"shell {shell} {before}")[-1]
        found.append((shell, block))
    return found


def steps(block: str) -> list[tuple[str, list[str]]]:
    """Return (what is typed, the lines that are shown then) for each step of a block. At first nothing may be typed."""
    parts = ["", *TYPED.split(block.replace("^\\Quit", "^\\\n...\nQuit"))]  # "..." stands for whatever was shown before
    return [(typed, shown.splitlines()) for typed, shown in zip(parts[::2], parts[1::2], strict=True)]


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
        return comparable(self.match[1].replace("\x1b[K", "").rstrip()) or self.next_line()

    def must_show(self, lines: list[str]) -> None:
        """Wait for these lines. There must be no others, except where "..." stands."""
        skipping = False
        for line in map(comparable, lines):
            while line != "..." and (shown := self.next_line()) != line:
                assert skipping, f"{shown!r} instead of {line!r}"
            skipping = line == "..."


class Project:
    """A copy of the project, on other ports than a user's own, and as another project for Docker.

    Nothing that the user has set reaches what runs in it. What one only waits for takes less time there.
    """

    def __init__(self, folder: Path, docker: bool):
        self.folder, self.docker, self._ports = folder, docker, {}
        self.name = f"task-queue-test-{os.getpid()}-pages"
        left_out = shutil.ignore_patterns(".?*", "tests", "docs", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
        shutil.copy(ROOT / ".dockerignore", folder)
        changes = {
            "time.sleep(1)": "time.sleep(0.4)",
            "PAUSE_AFTER_FAILURE = 1\n": "PAUSE_AFTER_FAILURE = 0.2\n",
            ".venv/bin/python": sys.executable,
            "task-queue-demo": self.name,
        }
        for path in (folder / "Makefile", *folder.rglob("*.py")):
            text = self.on_other_ports(path.read_text())
            for there, here in changes.items():
                text = text.replace(there, here)
            path.write_text(text)
        cluster = folder / "docker-compose.cluster.yml"
        cluster.write_text(self.on_other_ports(cluster.read_text(), CLUSTER_PORTS))
        (folder / ".venv").mkdir()
        (folder / ".venv" / "run").touch()  # nothing is missing in it

        users = ("AMQP_", "COMPOSE_", "MAKE", "RABBITMQ_DEFAULT_", "RABBITMQ_ERLANG_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(users)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment["COMPOSE_PROJECT_NAME"] = self.name
        for name, port in {"AMQP_PORT": "5672", "MANAGEMENT_PORT": "15672", "PROMETHEUS_PORT": "15692"}.items():
            self.environment[name] = self.on_other_ports(port)  # for Compose
        if not docker:
            self.environment["DOCKER_HOST"] = "unix:///nowhere"
        self.shells = collections.defaultdict(lambda: Shell(folder, self.environment))  # opened when needed

    def on_other_ports(self, text: str, ports: str = PORTS) -> str:
        return re.sub(ports, lambda match: self._ports.setdefault(match[0], str(free_port())), text)

    def run(self, command: str) -> subprocess.CompletedProcess:
        """Run a line of bash."""
        settings = {"cwd": self.folder, "env": self.environment, "stdin": subprocess.DEVNULL}
        return subprocess.run(["bash", "-c", self.on_other_ports(command)], capture_output=True, text=True, **settings)

    def play(self, page: str) -> None:
        """Type what a page says into new shells, which must show what the page shows."""
        for number, block in in_shells(page):
            for typed, shown in steps(block):
                if typed.startswith(("make ", "curl ")):
                    self.ask(typed, [comparable(self.on_other_ports(line)) for line in shown])
                else:
                    self.shells[number].send(KEYS.get(typed, f"{typed}\n"))
                    self.shells[number].must_show(shown)
        self.close_shells()

    def ask(self, command: str, expected: list[str]) -> None:
        """Give a command to make or curl. RabbitMQ's figures are a second old, so ask for them until they are right."""
        deadline = time.monotonic() + (15 if command.startswith(("make queues", "curl")) else 0)
        while (printed := self.answer(command)) != expected:
            assert time.monotonic() < deadline, printed

    def answer(self, command: str) -> list[str]:
        done = self.run(command)
        assert done.returncode == 0, done.stderr
        return [comparable(line) for line in done.stdout.splitlines()]

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
def project(request, tmp_path):
    """A copy of the project for this test. It has Docker where the test is marked so."""
    docker = request.node.get_closest_marker("docker") is not None
    with contextlib.closing(Project(tmp_path, docker)) as project:
        yield project


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["a private node", pytest.param("with Docker", marks=pytest.mark.docker)])
def test_every_command_does_what_the_page_shows(project, how):
    assert how in project.run("make rabbitmq").stdout
    project.play("README.md")
    project.play("docs/tutorial.md")


def test_a_rabbitmq_that_make_did_not_start_needs_the_commands_that_the_page_names(project, broker, shells):
    project.environment["AMQP_URL"] = broker.url
    assert project.run("make rabbitmq").stdout == "RabbitMQ: using the one that AMQP_URL names\n"
    refusals = [project.run(f"make {target}").stderr.splitlines()[0] for target in ("kill-rabbitmq", "queues")]
    kill, queues = [re.search("sudo (.*)", refusal)[1] for refusal in refusals]
    assert kill.startswith("systemctl kill ")
    assert f"`sudo {kill}`" in TEXT["docs/tutorial.md"]
    assert f"    sudo {queues}\n" in TEXT["docs/tutorial.md"]
    shells.send("Hello World!")
    figures = re.search(r"^\$ make queues\n(.*\n.*)", TEXT["docs/tutorial.md"], re.MULTILINE)[1].split()
    wait_until(lambda: broker.node.ctl(*queues.split()[1:]).split() == figures, "rabbitmqctl shows the same figures")
    assert "nothing to stop" in project.run("make stop").stdout
    assert broker.node.running


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


@pytest.mark.parametrize(
    ("command", "ready", "last_words"),
    [
        ("worker.py", r"To exit press CTRL\+C\r\n", r"\^C\r\n \[!\] Stopped by Ctrl\+C\.\r\n"),
        ("new_task.py - < <(cat)", "0 sent", r"\^C[^!]*\r\n \[!\] Not sent: interrupted"),
    ],
)
def test_a_terminal_shows_ctrl_c_on_a_line_of_its_own(broker, command, ready, last_words):
    """The page shows it so, and its shells echo nothing: so here is one that does."""
    environment = {**os.environ, "AMQP_URL": broker.url}
    command = ["-c", f"exec {sys.executable} {command}"]
    terminal = pexpect.spawn("bash", command, cwd=ROOT, env=environment, encoding="utf-8", timeout=DEADLINE)
    terminal.expect(ready)
    terminal.sendcontrol("c")
    terminal.expect(last_words)
    terminal.close()


@pytest.mark.docker
@pytest.mark.timeout(600)
def test_every_command_for_docker_does_what_the_page_says(project):
    one, two = project.shells["1"], project.shells["2"]

    def enter(shell: Shell, line: str, *shown: str) -> None:
        """Type a line, and wait until all that is shown, in that order."""
        shell.sendline(project.on_other_ports(line))
        for text in shown:
            shell.expect_exact(text, timeout=DOCKER_DEADLINE)

    def members() -> int:
        """Return how many nodes have a copy of the queue."""
        command = "docker compose -f docker-compose.cluster.yml exec -T rabbit1 rabbitmqctl -q list_queues name members"
        listed = project.run(command).stdout
        (line,) = [line for line in listed.splitlines() if line.startswith("task_queue\t")]
        return line.count("rabbit@")

    def containers() -> list[str]:
        """Return the containers that are left, whether they run or not."""
        done = project.run(f"docker ps --all --quiet --filter label=com.docker.compose.project={project.name}")
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
    assert commands(new_task.__doc__) | commands(worker.__doc__) == listed


def test_every_promise_has_its_test():
    promises = re.findall(r"^\| .+ \| \[(.+)\]\(\.\./(tests/\w+\.py)\) \|$", TEXT["docs/reference.md"], re.MULTILINE)
    assert len(promises) > 10
    for name, path in promises:
        assert f"def test_{name.replace(' ', '_')}(" in (ROOT / path).read_text()
