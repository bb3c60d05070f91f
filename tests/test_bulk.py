"""Many tasks at once: `new_task.py -`, and the same from a program that imports new_task."""

import os
import sys

import pexpect
import pika
import pytest

import new_task
from task_queue import QUEUE, QUORUM
from task_queue.publisher import Channel, NotConfirmed


def test_thousands_of_lines_from_a_file_arrive_in_order_and_memory_does_not_grow(broker, shells, tmp_path, changed):
    at_the_end = "import atexit, resource\natexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF)[2]))"
    script, peaks = changed("new_task", at_the_end), []
    lines = [b"Task number %d of some length" % number for number in range(10_000)]
    for times in (1, 10):
        (tmp_path / "tasks.txt").write_bytes(b"".join(line + b"\n" for line in lines) * times)
        with (tmp_path / "tasks.txt").open() as file:
            producer = shells.start(script, "-", stdin=file)
        assert producer.ends(120) == 0
        sent, peak = producer.output()
        assert sent == f" [x] Sent {len(lines) * times} tasks"
        peaks.append(int(peak))
        assert broker.tasks(len(lines) * times) == lines * times
    assert peaks[1] - peaks[0] < 10 * 1024  # kB


def test_progress_is_shown_on_a_terminal_only(broker, shells, tmp_path, changed):
    (tmp_path / "tasks.txt").write_bytes(b"task\n\n" * 30_000)
    # And a small window: whenever it is full, all of it must be confirmed, as for tasks of 30 MB.
    script = changed("new_task", "console.PROGRESS_SECONDS, publisher.WINDOW = 0.1, publisher.ROOM")
    command = f"{sys.executable} {script} - < {tmp_path}/tasks.txt"
    terminal = pexpect.spawn("bash", ["-c", command], env={**os.environ, "AMQP_URL": broker.url}, timeout=60)
    terminal.expect(r" \d+ sent, \d+ confirmed, \d+/s, \d+ s left\x1b\[K\r")
    terminal.expect_exact("\r\x1b[K [x] Sent 30000 tasks")  # and it is gone in the end
    quiet = shells.shell(command)
    assert (quiet.ends(60), quiet.output("stderr")) == (0, [])


@pytest.fixture
def channel(broker, proxy, monkeypatch):
    """The channel of new_task.py, kept by a program, with the proxy before RabbitMQ."""
    monkeypatch.setenv("AMQP_URL", proxy.url)
    with Channel("kept") as channel:
        declare(channel)
        yield channel


def declare(channel) -> None:
    channel.queue_declare(queue=QUEUE, durable=True, arguments=QUORUM)
    channel.confirm_delivery()


def publish(channel, task: bytes, properties=None) -> None:
    channel.basic_publish(exchange="", routing_key=QUEUE, body=task, properties=properties, mandatory=True)
    channel.wait_for_confirms()


def test_a_program_can_keep_its_connection_and_gets_another_when_that_is_lost(broker, proxy, channel):
    for number in range(3):
        publish(channel, b"before")
        assert broker.ready() == number + 1
        declare(channel)  # as some programs do before each task
    assert len(proxy.links) == 1
    assert proxy.cut() == 1
    publish(channel, b"after")
    assert len(proxy.links) == 2
    assert broker.tasks(4) == [b"before", b"before", b"before", b"after"]


def test_what_pika_cannot_encode_harms_no_other_task(broker, channel):
    publish(channel, b"before")
    with pytest.raises(pika.exceptions.UnsupportedAMQPFieldException):
        publish(channel, b"bad", pika.BasicProperties(headers={"odd": object()}))
    publish(channel, b"after")
    assert broker.tasks(2) == [b"before", b"after"]


def test_a_program_learns_what_is_not_confirmed(broker, monkeypatch):
    monkeypatch.setenv("AMQP_URL", broker.url)

    def tasks():
        yield b"first"
        broker.wait_for_ready(1)
        broker.delete_queue()
        yield b"second"

    with pytest.raises(NotConfirmed, match="NO_ROUTE") as failure:
        new_task.send(tasks())
    assert failure.value.confirmed == 1


def test_what_the_tasks_raise_passes_through(broker, monkeypatch):
    monkeypatch.setenv("AMQP_URL", broker.url)

    def tasks():
        yield b"task"
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        new_task.send(tasks())
