"""Whatever dies, no task is lost: each test brings a fault about for real and sees that it took place."""

import re
import sys
import textwrap

import pika
import pytest
from conftest import DEADLINE, ROOT, Broker, Node, Shells, TcpProxy

import task_queue
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


@pytest.fixture(scope="module")
def strict_node(tmp_path_factory):
    """A RabbitMQ of little patience: it waits 2 s for an acknowledgement, and takes no task above 100 kB."""
    node = Node(
        tmp_path_factory.mktemp("strict"),
        config="consumer_timeout = 2000\nmax_message_size = 100000\n",
        advanced="[{rabbit, [{channel_tick_interval, 1000}, {quorum_tick_interval, 1000}]}].",
    )
    yield node.start()
    node.close()


@pytest.fixture
def strict(strict_node):
    broker = Broker(strict_node)
    broker.empty()
    return broker


@pytest.fixture
def strict_shells(strict):
    shells = Shells(strict.url)
    yield shells
    shells.close()


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
    assert headers_of_dead_letter(broker)["x-set-aside-after-deliveries"] == 10


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


def test_dead_letters_are_listed_and_sent_back(broker, shells, worker_with):
    shells.send("bad \x1b[31m")
    failing = shells.start(worker_with("raise ValueError"))
    failing.wait_for("Set aside")
    failing.kill()
    for _ in range(2):  # listing changes nothing
        listed = shells.start("tools/dead_letters.py", "list")
        assert listed.ends() == 0
        assert re.fullmatch(
            r" \[x\] 'bad \\x1b\[31m', set aside [-0-9]+ [:0-9]+ after 10 deliveries: ValueError:  \(.*\)",
            "".join(listed.output()),
        )
    requeued = shells.start("tools/dead_letters.py", "requeue")
    assert requeued.ends() == 0
    assert requeued.output() == [r" [x] Requeued 'bad \x1b[31m'"]
    worker = shells.worker()
    worker.wait_for("[x] Done")
    assert worker.output()[1] == r" [x] Received 'bad \x1b[31m'"
    assert shells.start("tools/dead_letters.py", "list").ends() == 0


# A connection that ends


def test_a_worker_comes_back_after_its_connection_was_cut(broker, shells, proxy):
    worker = shells.worker(url=proxy.url)
    assert proxy.cut() == 1
    worker.wait_for("[*] Waiting for messages", times=2, within=5)
    shells.send("after")
    worker.wait_for("[x] Done")
    assert worker.output("stderr") == [" [!] Lost RabbitMQ (Transport indicated EOF). Reconnecting."]


def test_a_task_whose_connection_was_cut_is_done_again(broker, shells, proxy):
    worker = shells.worker(url=proxy.url)
    shells.send("three...", "next")
    worker.wait_for("Received 'three...'")
    assert proxy.cut() == 1
    said = worker.wait_for("This task will be done again", within=2)
    finished = worker.wait_for("[x] Done")
    assert said.at < finished.at
    worker.wait_for("Received 'three...' (redelivered)")
    worker.wait_for("Received 'next'")
    worker.wait_for("[x] Done", times=3)
    assert len(worker.output("stderr")) == 1


def test_a_connection_that_is_silently_dead_is_noticed(broker, shells, proxy):
    worker = shells.worker(url=proxy.url + "?heartbeat=2")
    shells.send("long" + "." * 30)
    worker.wait_for("Received")
    assert proxy.stall() == 1
    worker.wait_for("This task will be done again", within=2 * (2 + 5) + 5)
    other = shells.worker()
    other.wait_for("(redelivered)", within=10)


def test_heartbeats_come_every_20_seconds_unless_the_url_says_otherwise(monkeypatch):
    for url, seconds in {"amqp://h": 20, "amqp://h/?heartbeat=7": 7, "amqp://h/?heartbeat=0": 0}.items():
        monkeypatch.setenv("AMQP_URL", url)
        assert task_queue.nodes("test")[0].heartbeat == seconds


def test_a_worker_comes_back_when_rabbitmq_closes_its_connection(broker, shells):
    worker = shells.worker()
    broker.node.ctl("close_all_connections", "maintenance")
    worker.wait_for("[*] Waiting for messages", times=2, within=10)
    (line,) = worker.output("stderr")
    assert "maintenance" in line


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_workers_wait_for_a_rabbitmq_that_goes_and_comes_back(mortal, mortal_shells, how):
    idle, busy = mortal_shells.worker(), mortal_shells.worker()
    mortal_shells.send("first......", "second......")
    idle.wait_for("Received"), busy.wait_for("Received")
    idle.ctrl_c()  # now one holds a task, the other task waits
    assert idle.ends() == 0
    idle = mortal_shells.worker(url=mortal.url)
    getattr(mortal.node, how)()
    assert not mortal.node.running
    busy.wait_for("This task will be done again", within=3)
    idle.wait_for("Trying until it answers")
    mortal.node.start()
    for worker, times in ((idle, 2), (busy, 2)):
        worker.wait_for("[*] Waiting for messages", times, within=5 + 6)
    mortal.wait_until(lambda: mortal.counts()["consumers"] == 2, "both consume again")
    for task in ("first......", "second......"):
        assert any(f"Received {task!r} (redelivered)" in str(worker) for worker in (idle, busy)), task


def test_a_deleted_queue_is_declared_again(broker, shells):
    worker = shells.worker()
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)
    worker.wait_for("[*] Waiting for messages", times=2)
    shells.send("after")
    worker.wait_for("[x] Done")
    assert worker.output("stderr") == [" [!] The queue 'task_queue' was deleted. Declaring it again."]


def test_a_queue_deleted_during_work_is_declared_again(broker, shells):
    worker = shells.worker()
    shells.send("two..")
    worker.wait_for("Received")
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)
    worker.wait_for("[*] Waiting for messages", times=2)
    shells.send("after")
    worker.wait_for("[x] Done", times=2)


def test_a_task_longer_than_the_ack_timeout_is_explained_and_work_goes_on(strict, strict_shells):
    worker = strict_shells.worker()
    strict_shells.send("long........")
    worker.wait_for("[x] Done")
    worker.wait_for("longer than consumer_timeout")
    worker.wait_for("[*] Waiting for messages", times=2)
    worker.wait_for("Received 'long........' (redelivered)")
    with strict.connect() as connection:
        connection.channel().queue_purge(QUEUE)
    worker.kill()
    worker = strict_shells.worker()
