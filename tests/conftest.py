"""What the tests share: a real RabbitMQ that they started themselves, and scripts run as real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pika
import pytest
import trustme

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from node import Node, free_port  # noqa: E402
from processes import DEADLINE, Script, wait_until  # noqa: E402
from rabbitmq import docker_answers  # noqa: E402
from tcp_proxy import TcpProxy  # noqa: E402

from task_queue import DEAD_LETTERS, QUEUE, declaration  # noqa: E402

# Where the tests run in the background of a script, these two are ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
# It may be set here, and would hide that a script doesn't print each line at once into a pipe.
os.environ.pop("PYTHONUNBUFFERED", None)

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
DONE = " [x] Done"
FOREVER = 60 * "."  # work that takes longer than any test
HIDDEN = "s3cret"  # a password that must never be shown

# A worker or producer as its users would change it.
CHANGED = """
import sys, os, time
sys.path.insert(0, {root!r})
import {script}
from task_queue import address, console, consumer, dead_letters, publisher

{changes}
sys.exit({script}.main())
"""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        # Tests that share a RabbitMQ that is killed, or three, or Docker, run in one process, one after the other.
        for shared in ("mortal_node", "all_nodes", "docker"):
            if shared in item.fixturenames or item.get_closest_marker(shared):
                item.add_marker(pytest.mark.xdist_group(shared))
    # What takes longest comes first: it must not be left alone at the end.
    items.sort(key=lambda item: item.path.name not in ("test_pages.py", "test_tools.py"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("docker") and not docker_answers():
        pytest.skip("no Docker engine answers here")  # from here, so that the summary has one line for all


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
        return self.start("-c", f"import os; os.execvp('bash', ['bash', '-c', {command!r}])")

    def worker(self, *arguments: str, **settings) -> Script:
        """Start a worker and return it when it waits for tasks."""
        worker = self.start("worker.py", *arguments, **settings)
        worker.wait_for("[*] Waiting for messages")
        return worker

    def busy_worker(self, task: str = "long" + FOREVER, *arguments: str, **settings) -> Script:
        """Start a worker, send a task, and return the worker in the middle of it."""
        worker = self.worker(*arguments, **settings)
        self.send(task)
        worker.wait_for("Received")
        return worker

    def both_refused(self, why: str, **settings) -> None:
        """Start the two scripts. Each must refuse with one line that tells why, without the password."""
        for script in ("new_task.py", "worker.py"):
            line = refused(self.start(script, **settings))
            assert why in line
            assert HIDDEN not in line

    def new_task(self, *words: str, within: float = DEADLINE, **settings) -> Script:
        """Run new_task.py to its end."""
        task = self.start("new_task.py", *words, **settings)
        task.ends(within)
        return task

    def send(self, *tasks: str, **settings) -> None:
        """Send tasks one after the other; each must be reported sent."""
        for task in tasks:
            assert self.new_task(task, **settings).output() == [f" [x] Sent {task!r}"]

    def feed(self, *lines: str, script: str = "new_task.py", **settings) -> Script:
        """Start `new_task.py -` and type lines into it. More can follow: say()."""
        producer = self.start(script, "-", stdin=subprocess.PIPE, **settings)
        say(producer, *lines)
        return producer

    def dead_letters(self, command: str) -> list[str]:
        """Run `python -m task_queue.dead_letters COMMAND` and return what it prints."""
        script = self.start("-m", "task_queue.dead_letters", command)
        assert script.ends() == 0, str(script)
        return script.output()

    def close(self) -> None:
        for script in self._scripts:
            script.kill()


def say(producer: Script, *lines: str) -> None:
    """Type lines into a producer."""
    producer.process.stdin.write("".join(line + "\n" for line in lines).encode())
    producer.process.stdin.flush()


def finish(producer: Script, number: int, within: float = DEADLINE) -> None:
    """Type no more into a producer. It must report so many tasks sent, in all."""
    producer.process.stdin.close()
    assert producer.ends(within) == 0, str(producer)
    assert producer.output() == [f" [x] Sent {number} tasks"]


def refused(script: Script) -> str:
    """Wait for the exit status 1 with just one line of diagnosis, and return that line."""
    assert (script.ends(), script.output()) == (1, []), str(script)
    (line,) = script.output("stderr")
    assert line.startswith(" [!] ")
    return line


def stop(*workers: Script) -> None:
    """Stop workers with SIGTERM: they must end in good order, within 6 s even when RabbitMQ doesn't answer."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        assert worker.ends(within=7) == 0
        assert worker.output("stderr")[-1].startswith(" [!] Stopped by SIGTERM.")


@contextlib.contextmanager
def frozen(node: Node):
    """In this block a node stands still: its connections stay open, but nobody answers on them."""
    os.killpg(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(node.pid, signal.SIGCONT)


class Broker:
    """What a test asks RabbitMQ itself, as `rabbitmqctl list_queues` would tell it."""

    def __init__(self, node: Node):
        self.node = node

    @property
    def url(self) -> str:
        """AMQP_URL for the scripts."""
        return self.node.url

    def connect(self):
        return pika.BlockingConnection(pika.URLParameters(self.node.url))

    def ready(self, queue: str = QUEUE) -> int:
        """How many tasks wait in the queue, without those that a worker holds."""
        with self.connect() as connection:
            return connection.channel().queue_declare(queue, passive=True).method.message_count

    def wait_for_ready(self, number: int, within: float = DEADLINE) -> None:
        """Return when so many tasks wait."""
        wait_until(lambda: self.ready() == number, f"{number} tasks wait", within)

    def consumers(self) -> int:
        """How many workers RabbitMQ knows."""
        with self.connect() as connection:
            return connection.channel().queue_declare(QUEUE, passive=True).method.consumer_count

    def take(self, count: int, queue: str = QUEUE) -> list[tuple]:
        """Take all tasks, so many, out of a queue in its order, each as (method, properties, body)."""
        assert self.ready(queue) == count
        with self.connect() as connection:
            deliveries = connection.channel().consume(queue, auto_ack=True)
            return [next(deliveries) for _ in range(count)]

    def tasks(self, count: int) -> list[bytes]:
        """Take all tasks, so many, out of the queue."""
        return [body for _, _, body in self.take(count)]

    def dead_letter(self) -> tuple:
        """Take the only dead letter, as (headers, properties, body)."""
        ((_, properties, body),) = self.take(1, DEAD_LETTERS)
        return properties.headers, properties, body

    def publish(self, task: bytes, headers=None, **properties) -> None:
        """Send a task as another program does."""
        with self.connect() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish("", QUEUE, task, pika.BasicProperties(headers=headers, **properties), mandatory=True)

    def delete_queue(self, queue: str = QUEUE) -> None:
        with self.connect() as connection:
            connection.channel().queue_delete(queue)

    def declare_anew(self, **settings) -> None:
        """Declare the queue with the settings of somebody else. empty() makes up for it before the next test."""
        self.delete_queue()
        with self.connect() as connection:
            connection.channel().queue_declare(QUEUE, **settings)

    @contextlib.contextmanager
    def trouble(self, command=("set_vm_memory_high_watermark", "0"), end=("set_vm_memory_high_watermark", "0.4")):
        """In this block RabbitMQ is out of memory, or what the two commands for rabbitmqctl begin and end."""
        self.node.ctl(*command)
        try:
            yield
        finally:
            self.node.ctl(*end)

    @contextlib.contextmanager
    def user(self, login: str, configure=".*", write=".*", read=".*"):
        """In this block there is such a user. login: NAME:PASSWORD. Gives its AMQP_URL."""
        name, password = login.split(":")
        self.node.ctl("add_user", name, password)
        self.node.ctl("set_permissions", name, configure, write, read)
        try:
            yield f"amqp://{login}@127.0.0.1:{self.node.port}/"
        finally:
            self.node.ctl("delete_user", name)

    def empty(self) -> "Broker":
        """Throw away all tasks, dead ones too, and return this. The queue stays, as it takes two seconds to make."""
        with self.connect() as connection:
            channel = connection.channel()
            channel.queue_delete(DEAD_LETTERS)
            # A test may kill RabbitMQ right away: the queue must be old enough for that.
            ours = False
            while not ours:
                with contextlib.suppress(declaration.Refused):
                    _, ours = declaration.declare(connection, QUEUE)
                if not ours:
                    connection.channel().queue_delete(QUEUE)  # a test left another one
            wait_until(lambda: self.consumers() == 0, "the workers of the test before are gone")
            channel.queue_purge(QUEUE)
        return self


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """One RabbitMQ for all tests that don't harm it. It looks every second for tasks that take too long.

    On its tls_port it speaks TLS, as localhost and under no other name. Its folder has ca.pem, of the authority that
    signs its certificate, and other-ca.pem, of another.
    """
    folder, tls_port, ca = tmp_path_factory.mktemp("rabbitmq"), free_port(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    config = f"""
        listeners.ssl.1 = 127.0.0.1:{tls_port}
        ssl_options.cacertfile = {folder}/ca.pem
        ssl_options.certfile = {folder}/server.pem
        ssl_options.keyfile = {folder}/server.pem
        max_message_size = 2000000
    """
    ticks = "[{rabbit, [{channel_tick_interval, 1000}, {quorum_tick_interval, 1000}]}]."
    with contextlib.closing(Node(folder, config=textwrap.dedent(config), advanced=ticks)) as node:
        node.tls_port = tls_port
        yield node.start()


@pytest.fixture
def broker(node):
    """RabbitMQ with an empty task_queue."""
    return Broker(node).empty()


@pytest.fixture(scope="session")
def mortal_node(tmp_path_factory):
    """A RabbitMQ that a test may kill; each test gets it running."""
    with contextlib.closing(Node(tmp_path_factory.mktemp("mortal"))) as node:
        yield node


@pytest.fixture
def mortal(mortal_node):
    """The same with an empty task_queue."""
    return Broker(mortal_node.start()).empty()


@pytest.fixture
def shells(request):
    """Shells whose scripts talk to the RabbitMQ of the test: that of all tests, unless it asks for another."""
    (asked,) = {"mortal", "cluster"}.intersection(request.fixturenames) or {"broker"}
    with contextlib.closing(Shells(request.getfixturevalue(asked).url)) as shells:
        yield shells


@pytest.fixture
def offline():
    """Shells for what must be answered without any RabbitMQ."""
    with contextlib.closing(Shells("amqp://127.0.0.1:1")) as shells:
        yield shells


@pytest.fixture
def proxy(node):
    """A network between the scripts and RabbitMQ that can be broken."""
    with contextlib.closing(TcpProxy(node.port)) as proxy:
        yield proxy


@pytest.fixture
def changed(tmp_path):
    """A function that writes a script as its users would change it, and returns its path."""

    def write(script: str, changes: str) -> str:
        path = tmp_path / f"own_{script}.py"
        path.write_text(CHANGED.format(root=str(ROOT), script=script, changes=changes))
        return str(path)

    return write


@pytest.fixture
def worker_with(changed):
    """A function that writes a worker with another work(), whose lines are `body`, and returns its path."""

    def write(body: str, *settings: str) -> str:
        work = f"def work(task):\n{textwrap.indent(body, '    ')}\n\nworker.work = work"
        return changed("worker", "\n".join((work, "dead_letters.PAUSE_AFTER_FAILURE = 0.1", *settings)))

    return write
