"""Many tasks at once: `new_task.py -`, and the same from a program that imports new_task."""

import os
import pty
import subprocess
import sys
import time

import pika
import pytest
from conftest import ROOT

import new_task
from task_queue import QUEUE, QUORUM
from task_queue.publisher import Channel, NotConfirmed


@pytest.fixture
def amqp_url(broker, monkeypatch):
    """Make this very process a user of RabbitMQ."""
    monkeypatch.setenv("AMQP_URL", broker.url)


def tasks_in(broker, count: int) -> list[bytes]:
    with broker.connect() as connection:
        channel = connection.channel()
        return [channel.basic_get("task_queue", auto_ack=True)[2] for _ in range(count)]


def test_a_slow_pipe_sends_each_line_at_once_and_keeps_its_connection(broker, shells, proxy):
    producer = shells.start("new_task.py", "-", stdin=subprocess.PIPE, url=f"{proxy.url}?heartbeat=1")
    for number in (1, 2):
        producer.process.stdin.write(b"line\n")
        producer.process.stdin.flush()
        broker.wait_until(lambda count=number: broker.ready() == count, "the line came")
        idle = time.monotonic() + 4  # RabbitMQ drops a connection that is silent for three heartbeats
        broker.wait_until(lambda deadline=idle: time.monotonic() > deadline, "it had time to be dropped")
        assert proxy.accepted == 1
    producer.process.stdin.close()
    assert producer.ends() == 0
    assert producer.output("stderr") == []


def test_progress_is_shown_on_a_terminal_only(broker, shells, tmp_path):
    (tmp_path / "tasks.txt").write_bytes(b"task\n" * 30_000)
    script = tmp_path / "eager.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import new_task\nfrom task_queue import console\nconsole.PROGRESS_SECONDS = 0.1\nsys.exit(new_task.main())\n"
    )
    terminal, end = pty.openpty()
    with (tmp_path / "tasks.txt").open() as tasks:
        environment = {**os.environ, "AMQP_URL": broker.url}
        producer = subprocess.Popen(
            [sys.executable, str(script), "-"], env=environment, stdin=tasks, stdout=subprocess.PIPE, stderr=end
        )
        assert producer.communicate(timeout=60)[0] == b" [x] Sent 30000 tasks\n"
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    assert " sent, " in shown
    assert " confirmed, " in shown
    assert "/s, " in shown
    assert " s left" in shown
    assert shown.endswith("\x1b[K")  # and it is gone in the end
    quiet = shells.start(str(script), "-", stdin=(tmp_path / "tasks.txt").open())
    assert quiet.ends(60) == 0
    assert quiet.output("stderr") == []


def test_memory_does_not_grow_with_the_number_of_tasks(broker, shells, tmp_path):
    script = tmp_path / "measured.py"
    script.write_text(
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import new_task\nnew_task.main()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (10_000, 100_000):
        (tmp_path / "tasks.txt").write_bytes(b"a task of some length\n" * count)
        producer = shells.start(str(script), "-", stdin=(tmp_path / "tasks.txt").open())
        assert producer.ends(120) == 0
        sent, peak = producer.output()
        assert sent == f" [x] Sent {count} tasks"
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 10 * 1024  # kB


def test_a_program_sends_tasks_and_returns_when_they_are_confirmed(broker, amqp_url):
    assert new_task.send(b"task %d" % number for number in range(100)) == 100
    assert tasks_in(broker, 100) == [b"task %d" % number for number in range(100)]


@pytest.fixture
def channel(broker, proxy, monkeypatch):
    """The channel of new_task.py, kept by a program, with the proxy before RabbitMQ."""
    monkeypatch.setenv("AMQP_URL", proxy.url)
    with Channel("kept") as channel:
        channel.queue_declare(queue=QUEUE, durable=True, arguments=QUORUM)
        channel.confirm_delivery()
        yield channel


def publish(channel, task: bytes, properties=None) -> None:
    channel.basic_publish(exchange="", routing_key=QUEUE, body=task, properties=properties, mandatory=True)
    channel.wait_for_confirms()


def test_a_program_can_keep_its_connection(broker, proxy, channel):
    for number in range(3):
        publish(channel, b"task")
        assert broker.ready() == number + 1
    assert proxy.accepted == 1


def test_a_program_may_declare_the_queue_with_each_task(broker, proxy, channel):
    for number in range(3):
        channel.queue_declare(queue=QUEUE, durable=True, arguments=QUORUM)
        channel.confirm_delivery()
        publish(channel, b"task")
        assert broker.ready() == number + 1
    assert proxy.accepted == 1


def test_a_kept_connection_that_was_lost_is_made_anew(broker, proxy, channel):
    publish(channel, b"before")
    assert proxy.cut() == 1
    publish(channel, b"after")
    assert proxy.accepted == 2
    assert tasks_in(broker, 2) == [b"before", b"after"]


def test_what_pika_cannot_encode_harms_no_other_task(broker, channel):
    publish(channel, b"before")
    with pytest.raises(pika.exceptions.UnsupportedAMQPFieldException):
        publish(channel, b"bad", pika.BasicProperties(headers={"odd": object()}))
    publish(channel, b"after")
    assert tasks_in(broker, 2) == [b"before", b"after"]


def test_a_program_learns_what_is_not_confirmed(broker, amqp_url, monkeypatch):
    def tasks():
        yield b"first"
        broker.wait_until(lambda: broker.ready() == 1, "the first is there")
        with broker.connect() as connection:
            connection.channel().queue_delete("task_queue")
        yield b"second"

    with pytest.raises(NotConfirmed, match="NO_ROUTE") as failure:
        new_task.send(tasks())
    assert failure.value.confirmed == 1
    monkeypatch.setenv("AMQP_URL", "amqp://guest:guest@127.0.0.1:1/")
    with pytest.raises(NotConfirmed, match="can't reach RabbitMQ") as failure:
        new_task.send([b"task"])
    assert failure.value.confirmed == 0


def test_what_the_tasks_raise_passes_through(broker, amqp_url):
    def tasks():
        yield b"task"
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        new_task.send(tasks())
