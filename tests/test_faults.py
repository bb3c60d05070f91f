"""Whatever dies, no task is lost: each test brings a fault about for real and sees that it took place."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pika
import pytest
from conftest import ROOT, Broker, Node, Shells

from task_queue import DEAD_LETTERS, QUEUE, address

# A worker whose work is another, as its users would replace it.
OWN_WORK = """
    import sys, os, time
    sys.path.insert(0, {root!r})
    import worker
    from task_queue import consumer, dead_letters

    def work(task):
        {body}

    worker.work = work
    dead_letters.PAUSE_AFTER_FAILURE = 0.1
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
    assert re.search(r" \[!\] Failed 'bad': ValueError: no such\\nfile \(.*own_worker.py:8\)", failures[0])
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


def test_looking_at_dead_letters_often_does_no_harm(broker, shells, worker_with):
    shells.send("bad")
    failing = shells.start(worker_with("raise ValueError"))
    failing.wait_for("Set aside")
    failing.kill()
    for _ in range(25):  # more often than RabbitMQ delivers a task before it drops it
        listed = shells.start("-m", "task_queue.dead_letters", "list")
        assert listed.ends() == 0
        assert "'bad', set aside" in str(listed)
    assert shells.start("-m", "task_queue.dead_letters", "requeue").ends() == 0
    worker = shells.worker()
    worker.wait_for("[x] Done")
    assert worker.output("stderr") == []


def test_a_task_that_cannot_be_set_aside_is_kept_until_it_can(broker, shells, worker_with):
    with broker.connect() as connection:  # a queue of that name with other settings, for instance
        connection.channel().queue_declare(DEAD_LETTERS, durable=True, arguments={"x-max-length": 5})
    script = worker_with("if task == b'bad': raise ValueError")
    source = Path(script).read_text()
    Path(script).write_text(source.replace("worker.work =", "consumer.HOLD_SECONDS = 0.5; worker.work ="))
    worker = shells.start(script)
    shells.send("bad")
    worker.wait_for("Can't set aside 'bad'")
    with broker.connect() as connection:
        connection.channel().queue_delete(DEAD_LETTERS)
    worker.wait_for("Set aside 'bad'")
    shells.send("good")
    worker.wait_for("[x] Done")
    later = time.monotonic() + 1
    broker.wait_until(lambda: time.monotonic() > later, "another attempt would have been due")
    assert worker.output("stderr")[-1].startswith(" [!] Set aside 'bad'")
    assert broker.ready(DEAD_LETTERS) == 1
    assert headers_of_dead_letter(broker)["x-set-aside-after-deliveries"] == 10


def test_an_alarm_does_not_hang_a_worker_that_sets_a_task_aside(mortal, mortal_shells, worker_with):
    mortal_shells.send("bad")
    mortal.node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        worker = mortal_shells.start(worker_with("if task == b'bad': raise ValueError"))
        worker.wait_for("Failed 'bad'", times=9)
        worker.wait_for("Can't set aside 'bad'", within=60)
        worker.ctrl_c()
        assert worker.ends(within=3) == 0
    finally:
        mortal.node.ctl("set_vm_memory_high_watermark", "0.4")
    mortal.wait_until(lambda: mortal.ready() == 1, "the task is back")


@pytest.mark.parametrize(
    "body",
    [
        "import asyncio; raise asyncio.CancelledError",
        "sys.exit(3)",
        "raise type('Odd', (Exception,), {'__str__': lambda self: 1})",
    ],
)
def test_whatever_work_raises_the_worker_goes_on(broker, shells, worker_with, body):
    worker = shells.start(worker_with(f"if task == b'bad': {body}"))
    shells.send("bad", "good")
    worker.wait_for("Failed 'bad'")
    worker.wait_for("[x] Done")
    assert "Traceback" not in str(worker)


def test_a_process_that_work_forks_can_be_terminated(broker, shells, worker_with):
    child = "import multiprocessing as m; p = m.get_context('fork').Process(target=time.sleep, args=(60,)); p.start(); "
    script = worker_with(child + "p.join(1); p.terminate(); p.join(); print(p.exitcode, flush=True)")
    worker = shells.start(script, "--graceful")
    shells.send("fork")
    worker.wait_for("[x] Done", within=10)
    assert "-15" in worker.output()
    assert worker.output("stderr") == []


def test_a_dead_letter_keeps_what_it_had_and_neither_expires_nor_multiplies(broker, shells, worker_with):
    with broker.connect() as connection:
        headers = {"x-request": "7", "CC": [QUEUE]}
        properties = pika.BasicProperties(expiration="20000", user_id="guest", message_id="m", headers=headers)
        connection.channel().basic_publish("", QUEUE, b"bad", properties)
    worker = shells.start(worker_with("raise ValueError('x' * 1_000_000)"))
    worker.wait_for("Set aside 'bad'")
    with broker.connect() as connection:
        method, properties, body = connection.channel().basic_get(DEAD_LETTERS)
    assert (body, properties.message_id, properties.expiration) == (b"bad", "m", None)
    assert properties.headers["x-request"] == "7"
    assert "CC" not in properties.headers
    assert method.message_count == 0


def test_a_failing_task_on_a_classic_queue_is_tried_with_pauses(broker, shells, worker_with):
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)
        connection.channel().queue_declare(QUEUE, durable=True)
    assert "task_queue\tclassic" in broker.node.ctl("list_queues", "name", "type").splitlines()
    worker = shells.start(worker_with("raise ValueError"))
    shells.send("bad")
    first, last = worker.wait_for("Received 'bad'"), worker.wait_for("Received 'bad'", times=13)
    assert last.at - first.at > 11 * 0.1  # the pause in OWN_WORK


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
        listed = shells.start("-m", "task_queue.dead_letters", "list")
        assert listed.ends() == 0
        assert re.fullmatch(
            r" \[x\] 'bad \\x1b\[31m', set aside [-0-9]+ [:0-9]+ after 10 deliveries: ValueError \(.*\)",
            "".join(listed.output()),
        )
    requeued = shells.start("-m", "task_queue.dead_letters", "requeue")
    assert requeued.ends() == 0
    assert requeued.output() == [r" [x] Requeued 'bad \x1b[31m'"]
    worker = shells.worker()
    worker.wait_for("[x] Done")
    assert worker.output()[1] == r" [x] Received 'bad \x1b[31m'"
    for command in ("list", "requeue"):
        nothing = shells.start("-m", "task_queue.dead_letters", command)
        assert nothing.ends() == 0
        assert nothing.output() == [" [*] No dead letters"]


# A connection that ends


def test_a_worker_comes_back_after_its_connection_was_cut(broker, shells, proxy):
    worker = shells.worker(url=proxy.url)
    assert proxy.cut() == 1
    worker.wait_for("[*] Waiting for messages", times=2, within=5)
    shells.send("after")
    worker.wait_for("[x] Done")
    (line,) = worker.output("stderr")
    assert re.fullmatch(r" \[!\] Lost RabbitMQ \(.+\)\. Reconnecting\.", line)


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
        assert address.nodes("test")[0].heartbeat == seconds


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


def test_a_signal_at_any_moment_ends_a_worker_in_good_order(broker, shells):
    """The tasks are empty, so that some signals come amid work, some amid an acknowledgement."""
    feeder = shells.start("new_task.py", "-", stdin=subprocess.PIPE)
    feeder.process.stdin.write(b"task\n" * 20_000)
    feeder.process.stdin.flush()
    for attempt in range(12):
        worker = shells.worker()
        worker.wait_for("[x] Done", times=1 + 20 * attempt)
        (worker.ctrl_c if attempt % 2 else worker.terminate)()
        assert worker.ends() == 0
        (line,) = worker.output("stderr")
        assert line.startswith(" [!] Stopped by")


# Stopping in good order


def test_a_graceful_worker_finishes_its_task_on_sigterm(broker, shells):
    worker = shells.worker("--graceful")
    shells.send("three...", "next")
    worker.wait_for("Received")
    worker.terminate()
    assert worker.ends() == 0
    assert worker.output()[1:] == [" [x] Received 'three...'", " [x] Done"]
    assert worker.output("stderr")[1:] == [" [!] Stopped by SIGTERM."]
    broker.wait_until(lambda: broker.ready() == 1, "just the other task waits")


def test_a_graceful_worker_that_is_idle_stops_at_once(broker, shells):
    worker = shells.worker("--graceful")
    worker.terminate()
    assert worker.ends(within=3) == 0


@pytest.mark.parametrize("second", ["ctrl_c", "terminate"])
def test_a_second_signal_ends_a_graceful_worker_at_once(broker, shells, second):
    worker = shells.worker("--graceful")
    shells.send("long" + "." * 60)
    worker.wait_for("Received")
    worker.terminate()
    worker.wait_for("will stop")
    getattr(worker, second)()
    assert worker.ends(within=3) == 0
    broker.wait_until(lambda: broker.ready() == 1, "the task is back")


def test_ctrl_c_hands_back_at_once_also_from_a_graceful_worker(broker, shells):
    worker = shells.worker("--graceful")
    shells.send("long" + "." * 60)
    worker.wait_for("Received")
    worker.ctrl_c()
    assert worker.ends(within=3) == 0
    assert worker.output("stderr") == [" [!] Stopped by Ctrl+C. The task in hand goes back to the queue."]
    broker.wait_until(lambda: broker.ready() == 1, "the task is back")


# A producer in trouble


def feed(shells, **settings):
    """Start new_task.py - with a pipe to feed it through."""
    return shells.start("new_task.py", "-", stdin=subprocess.PIPE, **settings)


def say(producer, *lines: str) -> None:
    producer.process.stdin.write("".join(line + "\n" for line in lines).encode())
    producer.process.stdin.flush()


def test_a_producer_resends_what_is_unconfirmed_after_a_cut(broker, shells, proxy):
    producer = feed(shells, url=proxy.url)
    say(producer, "one")
    broker.wait_until(lambda: broker.ready() == 1, "the first task came")
    proxy.stall()
    say(producer, "two")
    broker.wait_until(lambda: proxy.held > 0, "the second task is under way")
    assert proxy.cut() == 1
    producer.process.stdin.close()
    assert producer.ends() == 0
    assert producer.output() == [" [x] Sent 2 tasks"]
    assert broker.ready() == 2
    (line,) = producer.output("stderr")
    assert "Reconnecting, to send again what is not confirmed" in line


def test_a_producer_that_is_killed_midway_has_lost_nothing_it_reported(broker, shells):
    producer = feed(shells)
    say(producer, "one")
    broker.wait_until(lambda: broker.ready() == 1, "the first task came")
    producer.kill()
    assert broker.ready() == 1
    assert "Sent" not in str(producer)


def test_a_producer_waits_for_a_rabbitmq_that_restarts_midway(mortal, mortal_shells):
    producer = feed(mortal_shells)
    say(producer, "one")
    mortal.wait_until(lambda: mortal.ready() == 1, "the first task came")
    mortal.node.kill()
    say(producer, "two", "three")
    producer.wait_for("Trying for up to 60 s")
    mortal.node.start()
    producer.process.stdin.close()
    assert producer.ends() == 0
    assert producer.output() == [" [x] Sent 3 tasks"]
    mortal.wait_until(lambda: mortal.ready() == 3, "all three are there")


def test_a_producer_that_gives_up_says_how_to_go_on(mortal, mortal_shells, tmp_path):
    script = tmp_path / "impatient.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import new_task\nfrom task_queue import publisher\npublisher.GIVE_UP_SECONDS = 2\nsys.exit(new_task.main())\n"
    )
    producer = mortal_shells.start(str(script), "-", stdin=subprocess.PIPE)
    say(producer, "one", "", "two")
    mortal.wait_until(lambda: mortal.ready() == 2, "two tasks came")
    mortal.node.kill()
    say(producer, "three", "four")
    assert producer.ends() == 1  # though its input is still open
    assert producer.output() == []
    last = producer.output("stderr")[-1]
    assert last.startswith(" [!] Not sent: gave up after 2 s: can't reach RabbitMQ at 127.0.0.1:")
    assert last.endswith("The first 3 lines are confirmed; to send the others: tail -n +4 FILE | python new_task.py -")


def test_ctrl_c_midway_says_how_to_go_on(broker, shells):
    producer = feed(shells)
    say(producer, "one", "two")
    broker.wait_until(lambda: broker.ready() == 2, "two tasks came")
    producer.ctrl_c()
    assert producer.ends() == 1
    assert producer.output("stderr") == [
        " [!] Not sent: interrupted. The first 2 lines are confirmed; "
        "to send the others: tail -n +3 FILE | python new_task.py -"
    ]


def test_a_nacked_task_is_sent_again(broker, shells):
    """A queue that is full for a while is the simplest way to a nack. RabbitMQ notices with a delay that it is full."""
    limit = '{"max-length": 1, "overflow": "reject-publish"}'
    broker.node.ctl("set_policy", "full", "^task_queue$", limit, "--apply-to", "queues")
    try:
        producer = feed(shells)
        sent = 0
        while "could not store" not in str(producer):
            assert sent < 10_000, "the queue takes whatever comes"
            say(producer, f"task {sent}")
            sent += 1
            time.sleep(0.01)  # no hope in it: it is the rate at which tasks come
        worker = shells.worker()
        producer.process.stdin.close()
        assert producer.ends() == 0
    finally:
        broker.node.ctl("clear_policy", "full")
    assert producer.output() == [f" [x] Sent {sent} tasks"]
    worker.wait_for("[x] Done", times=sent)
    assert {f" [x] Received 'task {number}'" for number in range(sent)} <= set(worker.output())


def test_a_task_that_rabbitmq_gives_back_is_not_reported_sent(broker, shells):
    producer = feed(shells)
    say(producer, "one")
    broker.wait_until(lambda: broker.ready() == 1, "the first task came")
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)
    say(producer, "two")
    assert producer.ends() == 1
    assert producer.output() == []
    (line,) = producer.output("stderr")
    assert "gave a task back (NO_ROUTE)" in line
    assert "The first 1 lines are confirmed" in line


def test_an_alarm_that_lasts_ends_a_producer_within_30_seconds(mortal, mortal_shells):
    mortal.node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        start = time.monotonic()
        producer = mortal_shells.new_task("task", within=60)
        assert time.monotonic() - start < 30
    finally:
        mortal.node.ctl("set_vm_memory_high_watermark", "0.4")
    assert producer.ends() == 1
    assert producer.output() == []
    assert all("memory" in line for line in producer.output("stderr"))


def test_an_alarm_that_passes_delays_a_producer(mortal, mortal_shells):
    mortal.node.ctl("set_disk_free_limit", str(10**15))
    try:
        producer = mortal_shells.start("new_task.py", "task")
        producer.wait_for("disk")
    finally:
        mortal.node.ctl("set_disk_free_limit", "1000000")
    assert producer.ends() == 0
    assert producer.output() == [" [x] Sent 'task'"]


def test_a_task_larger_than_rabbitmq_accepts_is_refused_with_one_line(strict, strict_shells):
    producer = feed(strict_shells)
    say(producer, "fits", "x" * 100_001)
    assert producer.ends() == 1
    assert producer.output() == []
    (line,) = producer.output("stderr")
    assert "larger" in line


# Several nodes, and who may talk to them


def test_a_node_that_is_down_is_skipped(broker, shells):
    urls = ["amqp://guest:guest@127.0.0.1:1/", "amqp://nosuchhost.invalid/", broker.url]
    for turn in range(3):
        url = "; ".join(urls[turn:] + urls[:turn])
        assert shells.new_task("task", url=url).output() == [" [x] Sent 'task'"]
    worker = shells.worker(url=url)
    worker.wait_for("[x] Done", times=3)


def test_workers_try_the_nodes_in_random_order(monkeypatch):
    monkeypatch.setenv("AMQP_URL", "amqp://a;amqp://b;amqp://c")
    first = {address.nodes("test")[0].host for _ in range(100)}
    assert first == {"a", "b", "c"}


def test_a_password_is_seen_nowhere(broker, shells):
    broker.node.ctl("add_user", "alice", "s3cr3t-word")
    broker.node.ctl("set_permissions", "alice", ".*", ".*", ".*")
    url = f"amqp://alice:s3cr3t-word@127.0.0.1:{broker.node.port}/"
    worker = shells.worker(url=url)
    task = shells.new_task("task", url=url)
    worker.wait_for("[x] Done")
    clients = broker.node.ctl("list_connections", "user", "client_properties")
    command = Path(f"/proc/{worker.process.pid}/cmdline").read_bytes().decode()
    assert "worker.py" in clients
    assert "alice" in clients
    broker.node.ctl("close_all_connections", "maintenance")
    worker.wait_for("[*] Waiting for messages", times=2)
    broker.node.ctl("change_password", "alice", "another")
    broker.node.ctl("close_all_connections", "maintenance")
    assert worker.ends() == 1
    for text in (str(worker), str(task), clients, command):
        assert "s3cr3t-word" not in text


def test_a_user_without_permission_gets_one_line(broker, shells):
    broker.node.ctl("add_user", "bob", "bob")
    broker.node.ctl("set_permissions", "bob", "^$", "^$", "^$")
    url = f"amqp://bob:bob@127.0.0.1:{broker.node.port}/"
    for script in (shells.start("worker.py", url=url), shells.start("new_task.py", url=url)):
        assert script.ends() == 1
        (line,) = script.output("stderr")
        assert "ACCESS_REFUSED" in line


# What is printed, and can't be


@pytest.mark.parametrize("where", ["| true", "> /dev/full", ">&-", "2>&- >&-"])
def test_an_output_that_nobody_takes_changes_nothing(broker, shells, where):
    producer = shells.shell(f"{sys.executable} new_task.py task {where}")
    assert producer.ends() == 0
    assert broker.ready() == 1
    assert "Traceback" not in str(producer)
    worker = shells.shell(f"exec {sys.executable} worker.py {where.replace('| true', '> >(true)')}")
    broker.wait_until(lambda: broker.ready() == 0, "the worker took the task")
    shells.send("another")
    broker.wait_until(lambda: broker.ready() == 0, "and goes on")
    worker.terminate()
    assert worker.ends() == 0
    assert "Traceback" not in str(worker)
