"""The tutorial's experiments on a real RabbitMQ, but for those that the pages show, which test_pages.py plays."""

import re
import signal
import time

import pytest
from conftest import DONE, FOREVER, WAITING, stop
from processes import Script, wait_until

from task_queue import QUEUE, declaration


def assert_did(worker: Script, *tasks: str) -> None:
    """Wait until a worker has done so many tasks. It must have printed just this."""
    worker.wait_for(DONE, times=len(tasks))
    assert worker.output() == [WAITING, *(line for task in tasks for line in (f" [x] Received {task}", DONE))]
    assert worker.output("stderr") == []


def assert_sent(task: Script, shown: str) -> None:
    assert (task.output(), task.output("stderr"), task.process.returncode) == ([f" [x] Sent {shown}"], [], 0)


@pytest.mark.parametrize(
    ("words", "task"),
    [
        ([], "'Hello World!'"),
        ([""], "'Hello World!'"),
        (["", ""], "'Hello World!'"),
        (["--"], "'Hello World!'"),
        (["--", ""], "'Hello World!'"),
        (["A", "very hard", "task"], "'A very hard task'"),
        (["--", "-x", "--"], "'-x --'"),
        (["a", "-x", "-"], "'a -x -'"),
        (["--", "-"], "'-'"),
    ],
    ids=repr,
)
def test_words_are_one_task_and_no_words_a_greeting(broker, shells, words, task):
    assert_sent(shells.new_task(*words), task)
    assert [repr(body.decode()) for body in broker.tasks(1)] == [task]


def test_a_task_that_is_not_utf_8_is_done_and_acknowledged(broker, shells):
    worker = shells.worker()
    assert_sent(shells.new_task(b"\xff\xfe", b"\x80"), r"b'\xff\xfe \x80'")
    assert_did(worker, r"b'\xff\xfe \x80'")
    stop(worker)
    assert broker.ready() == 0  # the task is acknowledged


@pytest.mark.parametrize(
    ("task", "terminal", "shown"),
    [
        ("Grüße ☕", {"PYTHONIOENCODING": "utf-8"}, "'Grüße ☕'"),
        ("Grüße ☕", {"PYTHONIOENCODING": "ascii"}, r"'Gr\xfc\xdfe \u2615'"),
        ("Grüße ☕", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, r"'Gr\xfc\xdfe \u2615'"),
        ("\x1b[2J\x07\x9b1m\u202e\r\n [x]", {"PYTHONIOENCODING": "utf-8"}, r"'\x1b[2J\x07\x9b1m\u202e\r\n [x]'"),
    ],
    ids=["UTF-8", "ASCII", "C", "control characters"],
)
def test_text_that_a_terminal_cannot_show_does_not_reach_it_and_harms_nobody(broker, shells, task, terminal, shown):
    worker = shells.worker(environment=terminal)
    assert_sent(shells.new_task(task.encode(), environment=terminal), shown)
    assert_did(worker, shown)


def test_a_task_is_persistent_and_says_what_it_is(broker, shells):
    before = int(time.time())
    shells.send("First message.", "Second message..")
    (method, first, body), (_, second, _) = broker.take(2)
    assert (body, method.exchange, method.routing_key) == (b"First message.", "", "task_queue")
    assert (first.delivery_mode, first.content_type) == (2, "text/plain")
    assert before <= first.timestamp <= time.time()
    assert first.message_id
    assert first.message_id != second.message_id


@pytest.mark.parametrize(
    ("end", "arguments", "status", "said"),
    [
        (Script.kill, [], -signal.SIGKILL, []),
        (Script.ctrl_c, [], 0, [" [!] Stopped by Ctrl+C. The task in hand goes back to the queue."]),
        (Script.terminate, [], 0, [" [!] Stopped by SIGTERM. The task in hand goes back to the queue."]),
        (Script.ctrl_c, ["--graceful"], 0, [" [!] Stopped by Ctrl+C. The task in hand goes back to the queue."]),
    ],
    ids=["kill -9", "Ctrl+C", "SIGTERM", "Ctrl+C and --graceful"],
)
def test_a_killed_workers_task_goes_to_another_worker(broker, shells, end, arguments, status, said):
    busy = shells.worker(*arguments)
    wait_until(lambda: broker.consumers() == 1, "RabbitMQ knows the first, which gets the task")
    idle = shells.worker("--graceful")
    wait_until(lambda: broker.consumers() == 2, "RabbitMQ knows both")
    shells.send("Long task..")
    busy.wait_for("Received")
    end(busy)
    at = time.monotonic()
    assert idle.wait_for("Received").at - at < 1
    assert_did(idle, "'Long task..' (redelivered)")
    assert (busy.ends(), busy.output("stderr")) == (status, said)
    assert busy.output() == [WAITING, " [x] Received 'Long task..'"]
    stop(idle)
    assert idle.output("stderr") == [" [!] Stopped by SIGTERM."]


def test_a_busy_worker_holds_one_task_and_the_free_one_takes_the_others(broker, shells):
    busy = shells.busy_worker("Heavy" + FOREVER)
    shells.send("Light 1", "Light 2", "Light 3")
    assert broker.ready() == 3
    assert_did(shells.worker(), "'Light 1'", "'Light 2'", "'Light 3'")
    assert busy.output() == [WAITING, f" [x] Received 'Heavy{FOREVER}'"]


def test_rabbitmq_logs_no_warning_about_a_task_that_is_sent(broker, shells):
    """It does about a connection that just ends: who looks for faults there would find one for each task."""
    log = broker.node.folder / "log" / f"{broker.node.name}.log"
    shells.send("First message", url=f"{broker.url}?client_properties={{'connection_name':'brief'}}")
    closing = re.compile(r"\[(\w+)\] .*closing AMQP connection .* - brief\b")
    logged = wait_until(lambda: closing.findall(log.read_text()), "RabbitMQ logs that the connection is closed")
    assert set(logged) == {"info"}


def test_a_task_longer_than_the_heartbeat_is_done_once(broker, shells):
    worker = shells.worker(url=f"{broker.url}?heartbeat=1")
    assert "1" in broker.node.ctl("list_connections", "timeout", "--no-table-headers").split()
    shells.send("Long task.....")
    assert_did(worker, "'Long task.....'")
    stop(worker)
    assert broker.ready() == 0  # the task is acknowledged


@pytest.mark.parametrize("arguments", [{"x-max-length": 10}, {"x-queue-type": "quorum", "x-delivery-limit": 3}])
def test_a_queue_with_other_settings_is_refused(broker, shells, arguments):
    broker.declare_anew(durable=True, arguments=arguments)
    shells.both_refused("the queue 'task_queue' exists with other settings than ours")


def test_a_task_survives_rabbitmqs_death_in_the_queue_that_new_task_has_just_created(mortal, shells):
    mortal.delete_queue()
    shells.start("new_task.py", "First message.").wait_for("[x] Sent")
    mortal.node.kill()
    mortal.node.start()
    assert_did(shells.worker(), "'First message.'")


def test_a_task_survives_rabbitmqs_death_in_the_queue_that_a_worker_has_just_created(mortal, shells):
    mortal.delete_queue()
    worker = shells.start("worker.py")
    with mortal.connect() as connection:
        wait_until(lambda: declaration._declare(connection, QUEUE, passive=True), "the worker has created the queue")
    shells.start("new_task.py", "First message..").wait_for("[x] Sent")
    mortal.node.kill()
    mortal.node.start()
    worker.wait_for(WAITING, times=2)
    wait_until(lambda: worker.output()[-1] == DONE, "the worker has done it", within=10)
    received = worker.output()[worker.output().index(WAITING, 1) + 1]  # the first try was cut off, if there was one
    assert received.startswith(" [x] Received 'First message..'")
    stop(worker)
    assert mortal.ready() == 0  # the task is acknowledged
