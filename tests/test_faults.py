"""Whatever dies, no task is lost: each test brings a fault about for real and sees that it took place."""

import re
import sys
import textwrap

import pika
import pytest
from conftest import DEADLINE, ROOT, Broker, Node, Shells, TcpProxy

from task_queue import DEAD_LETTERS, QUEUE

# A worker whose work is another, as its users would replace it.
OWN_WORK = """
    import sys, os, time
    sys.path.insert(0, {root!r})
    import worker

    def work(task):
        {body}

    worker.work = work
    worker.PAUSE_AFTER_FAILURE = 0.1
    sys.exit(worker.main())
"""


@pytest.fixture
def worker_with(tmp_path):
    """Write a worker.py with another work() and return its path."""

    def write(body: str) -> str:
        path = tmp_path / "own_worker.py"
        path.write_text(textwrap.dedent(OWN_WORK).format(root=str(ROOT), body=body))
        return str(path)

    return write


def headers_of_dead_letter(broker) -> dict:
    with broker.connect() as connection:
        _, properties, body = connection.channel().basic_get(DEAD_LETTERS)
        assert body is not None, "no dead letter"
        return properties.headers


# A task that fails, or kills


def test_a_task_that_raises_is_tried_ten_times_and_set_aside(broker, shells, worker_with):
    worker = shells.start(worker_with("raise ValueError('no such\\nfile')"))
    shells.send("bad", "good?")
    worker.wait_for("Set aside 'bad'")
    worker.wait_for("Set aside 'good?'")
    assert len([line for line in worker.output() if "Received 'bad'" in line]) == 10
    assert " [x] Done" not in worker.output()
    failures = [line for line in worker.output("stderr") if "Failed 'bad'" in line]
    assert len(failures) == 9
    assert re.search(r" \[!\] Failed 'bad': ValueError: no such\\nfile \(.*own_worker.py:7\)", failures[0])
    headers = headers_of_dead_letter(broker)
    assert headers["x-set-aside-because"].startswith("ValueError: no such\\nfile")
    assert headers["x-set-aside-after-deliveries"] == 10
    assert headers["x-set-aside-at"] > 0
    assert broker.ready() == 0


def test_a_task_that_kills_its_workers_is_set_aside_after_ten_of_them(broker, shells, worker_with):
    script = worker_with("os.kill(os.getpid(), 9) if task == b'deadly' else None")
    shells.send("deadly", "harmless")
    for killed in range(11):
        worker = shells.start(script)
        if killed < 10:
            assert worker.ends() == -9
            assert worker.output()[1].startswith(" [x] Received 'deadly'")
    worker.wait_for("Set aside 'deadly'")
    worker.wait_for("Received 'harmless'")
    worker.wait_for("[x] Done")
    assert "Received 'deadly'" not in str(worker)
    assert headers_of_dead_letter(broker)["x-set-aside-after-deliveries"] == 11


def test_a_failing_task_on_a_classic_queue_is_tried_with_pauses(broker, shells, worker_with):
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)
        connection.channel().queue_declare(QUEUE, durable=True)
    worker = shells.start(worker_with("raise ValueError"))
    shells.send("bad")
    received = [worker.wait_for("Received 'bad'", times) for times in range(1, 13)]
    assert all(b.at - a.at >= 0.1 for a, b in zip(received, received[1:], strict=False))
    worker.kill()
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)


def test_handing_back_does_not_count_where_rabbitmq_can_tell(broker, shells):
    shells.send("long" + "." * 60)
    for _ in range(2):
        worker = shells.worker()
        worker.wait_for("Received")
        worker.ctrl_c()
        assert worker.ends() == 0
    broker.wait_until(lambda: broker.ready() == 1, "the task is back")
    with broker.connect() as connection:
        method, properties, _ = connection.channel().basic_get(QUEUE)
    assert method.redelivered
    old = broker.node.ctl("version").startswith("3.")
    assert (properties.headers or {}).get("x-delivery-count", 0) == (2 if old else 0)
