"""What the tests share: a real RabbitMQ that they started themselves, and scripts run as real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pika
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from node import Node  # noqa: E402
from processes import DEADLINE, Script  # noqa: E402
from tcp_proxy import TcpProxy  # noqa: E402

import task_queue  # noqa: E402
from task_queue import declaration  # noqa: E402

# Where the tests run in the background of a script, these two are ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config):
    config.addinivalue_line("markers", "docker: needs a Docker engine with Compose")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        # Tests that share a RabbitMQ of their own, or three, run in one process, one after the other.
        for shared in ("mortal_node", "strict_node", "tls_port", "test_cluster.py", "test_compose.py"):
            if shared in (*item.fixturenames, item.path.name):
                item.add_marker(pytest.mark.xdist_group(shared))
    # What takes longest comes first: it must not be left alone at the end.
    items.sort(key=lambda item: item.path.name not in ("test_pages.py", "test_chaos.py"))
    # The tests of the Compose files are left out where no Docker engine answers; the summary says so.
    needing = [item for item in items if item.get_closest_marker("docker")]
    if needing and not docker_answers():
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)
        config.stash[LEFT_OUT] = len(needing)


def pytest_terminal_summary(terminalreporter, config):
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} tests of the Compose files left out: no Docker engine answers here.")


def docker_answers() -> bool:
    """Tell whether there is an engine behind the docker command, and Compose."""
    try:
        for command in (["docker", "info"], ["docker", "compose", "version"]):
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class Shells:
    """Types commands as a user would, each worker in a shell of its own. Everything is ended after the test."""

    def __init__(self, url: str):
        self.url = url
        self._scripts = []

    def start(self, *command: str, url=None, **settings) -> Script:
        """Start `python COMMAND...` and return it running."""
        self._scripts.append(Script(*command, url=url or self.url, **settings))
        return self._scripts[-1]

    def shell(self, command: str) -> Script:
        """Start a line of bash, for what only a shell can do."""
        program = f"import os; os.execvp('bash', ['bash', '-c', {command!r}])"
        return self.start("-c", program)

    def worker(self, *arguments: str, **settings) -> Script:
        """Start a worker and return it when it waits for tasks."""
        worker = self.start("worker.py", *arguments, **settings)
        worker.wait_for("[*] Waiting for messages")
        return worker

    def new_task(self, *words: str, within: float = DEADLINE, **settings) -> Script:
        """Run new_task.py to its end."""
        task = self.start("new_task.py", *words, **settings)
        task.ends(within)
        return task

    def send(self, *tasks: str) -> None:
        """Send tasks one after the other; each must be reported sent."""
        for task in tasks:
            assert self.new_task(task).output() == [f" [x] Sent {task!r}"]

    def close(self) -> None:
        for script in self._scripts:
            script.kill()


class Broker:
    """What a test asks RabbitMQ itself, as `rabbitmqctl list_queues` would tell it."""

    def __init__(self, node: Node):
        self.node = node

    @property
    def url(self) -> str:
        return self.node.url

    def connect(self):
        return pika.BlockingConnection(pika.URLParameters(self.url))

    def ready(self, queue: str = task_queue.QUEUE) -> int:
        """How many tasks wait in the queue, without those that a worker holds."""
        with self.connect() as connection:
            return connection.channel().queue_declare(queue, passive=True).method.message_count

    def counts(self, queue: str = task_queue.QUEUE) -> dict:
        """What rabbitmqctl says: {"messages_ready": ..., "messages_unacknowledged": ..., "consumers": ...}."""
        columns = ("name", "messages_ready", "messages_unacknowledged", "consumers")
        for line in self.node.ctl("list_queues", *columns, "--no-table-headers").splitlines():
            name, *numbers = line.split("\t")
            if name == queue:
                return dict(zip(columns[1:], map(int, numbers), strict=True))
        return {}

    def wait_until(self, condition, what: str, within: float = DEADLINE) -> None:
        """Return when condition() holds; AssertionError if it doesn't come to that in time."""
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {within} s"
            time.sleep(0.1)

    def empty(self) -> None:
        """Throw away all tasks, dead ones too. The queue itself stays, as it takes two seconds to make."""
        with self.connect() as connection:
            channel = connection.channel()
            channel.queue_delete(task_queue.DEAD_LETTERS)

            # A test may kill RabbitMQ right away: the queue must be old enough for that.
            while not declaration.declare(connection, task_queue.QUEUE)[1]:
                channel.queue_delete(task_queue.QUEUE)  # a test left a classic one

            def is_idle() -> bool:
                return channel.queue_declare(task_queue.QUEUE, passive=True).method.consumer_count == 0

            self.wait_until(is_idle, "the workers of the test before are gone")
            channel.queue_purge(task_queue.QUEUE)


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """One RabbitMQ for all tests that don't harm it."""
    node = Node(tmp_path_factory.mktemp("rabbitmq"))
    yield node.start()
    node.close()


@pytest.fixture
def broker(node):
    """RabbitMQ with an empty task_queue."""
    broker = Broker(node)
    broker.empty()
    return broker


@pytest.fixture(scope="module")
def mortal_node(tmp_path_factory):
    """A RabbitMQ that a test may kill; each test gets it running."""
    node = Node(tmp_path_factory.mktemp("mortal"))
    yield node
    node.close()


@pytest.fixture
def mortal(mortal_node):
    """The same with an empty task_queue."""
    if not mortal_node.running:
        mortal_node.start()
    broker = Broker(mortal_node)
    broker.empty()
    return broker


@pytest.fixture
def shells(broker):
    """Shells whose scripts talk to the RabbitMQ of all tests."""
    shells = Shells(broker.url)
    yield shells
    shells.close()


@pytest.fixture
def mortal_shells(mortal):
    """Shells whose scripts talk to the RabbitMQ that may be killed."""
    shells = Shells(mortal.url)
    yield shells
    shells.close()


@pytest.fixture
def proxy(node):
    """A network between the scripts and RabbitMQ that can be broken."""
    proxy = TcpProxy(node.port)
    yield proxy
    proxy.close()
