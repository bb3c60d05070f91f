"""The tutorial's experiments, on a real RabbitMQ, with the scripts as real processes."""

import re
import signal
import subprocess
import time

import pytest
from pika.exceptions import ChannelClosedByBroker
from processes import Script

from task_queue import QUEUE

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
DONE = " [x] Done"

# What declaration() returns for the queue that the tutorials of all languages declare.
OUR_DECLARATION = f'{QUEUE}\ttrue\t[{{"x-queue-type","quorum"}}]'


def idle_workers(broker, shells, number: int) -> list[Script]:
    """Start workers; RabbitMQ knows them in the order of the list when this returns."""
    workers = []
    while len(workers) < number:
        workers.append(shells.worker())
        broker.wait_until(lambda: consumers(broker) == len(workers), "RabbitMQ knows the worker")
    return workers


def consumers(broker) -> int:
    with broker.connect() as connection:
        return connection.channel().queue_declare(QUEUE, passive=True).method.consumer_count


def held_tasks(broker) -> int:
    """How many tasks the workers hold, at this moment: what RabbitMQ tells of a queue is up to five seconds old."""
    return sum(map(int, broker.node.ctl("list_channels", "messages_unacknowledged", "--no-table-headers").split()))


def assert_did(worker: Script, *tasks: str) -> None:
    """Wait until a worker has done so many tasks. It must have printed just this."""
    worker.wait_for(DONE, times=len(tasks))
    assert worker.output() == [WAITING, *(line for task in tasks for line in (f" [x] Received {task}", DONE))]
    assert worker.output("stderr") == []


def assert_sent(task: Script, shown: str) -> None:
    assert (task.output(), task.output("stderr"), task.process.returncode) == ([f" [x] Sent {shown}"], [], 0)


def left_by(worker: Script, broker) -> int:
    """Stop a worker and return how many tasks are in the queue then. One that it has not acknowledged is among them."""
    worker.terminate()
    assert worker.ends() == 0
    return broker.ready()


def queue_exists(broker) -> bool:
    with broker.connect() as connection:
        try:
            return bool(connection.channel().queue_declare(QUEUE, passive=True))
        except ChannelClosedByBroker:
            return False


def declaration(broker) -> str:
    """Return name, durability and arguments of the queue as RabbitMQ tells them, nothing if there is no such queue."""
    queues = broker.node.ctl("list_queues", "name", "durable", "arguments", "--no-table-headers").splitlines()
    return "".join(queue for queue in queues if queue.startswith(f"{QUEUE}\t"))


def delete_queue(broker) -> None:
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)


# Sending and receiving


def test_hello_world(broker, shells):
    worker = shells.worker()
    assert_sent(shells.new_task(), "'Hello World!'")
    assert_did(worker, "'Hello World!'")


def test_each_line_is_printed_at_once_into_a_pipe(broker, shells):
    worker = shells.worker(environment={"PYTHONUNBUFFERED": ""})  # which may be set here, and would hide a fault
    shells.send("First message." + 60 * ".")
    worker.wait_for("Received")
    assert worker.running


def test_several_words_are_one_task(broker, shells):
    worker = shells.worker()
    assert_sent(shells.new_task("A", "very hard", "task"), "'A very hard task'")
    assert_did(worker, "'A very hard task'")


@pytest.mark.parametrize("words", [[""], [], ["--"], ["--", ""]], ids=repr)
def test_no_words_are_a_greeting(broker, shells, words):
    worker = shells.worker()
    assert_sent(shells.new_task(*words), "'Hello World!'")
    assert_did(worker, "'Hello World!'")


def test_a_task_that_is_not_utf_8_is_done_and_acknowledged(broker, shells):
    worker = shells.worker()
    assert_sent(shells.new_task(b"\xff\xfe", b"\x80"), r"b'\xff\xfe \x80'")
    assert_did(worker, r"b'\xff\xfe \x80'")
    assert left_by(worker, broker) == 0


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "'Grüße ☕'"),
        ({"PYTHONIOENCODING": "ascii"}, r"'Gr\xfc\xdfe \u2615'"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, r"'Gr\xfc\xdfe \u2615'"),
    ],
    ids=["UTF-8", "ASCII", "C"],
)
def test_text_that_a_terminal_cannot_show_harms_nobody(broker, shells, terminal, shown):
    worker = shells.worker(environment=terminal)
    assert_sent(shells.new_task("Grüße ☕".encode(), environment=terminal), shown)
    assert_did(worker, shown)


def test_control_characters_in_a_task_do_not_reach_the_terminal(broker, shells):
    worker = shells.worker()
    shown = r"'\x1b[2J\x07\x9b1m\u202eback\r\n [x] Done'"
    assert_sent(shells.new_task("\x1b[2J\x07\x9b1m\u202eback\r\n [x] Done"), shown)
    worker.wait_for(DONE, times=2)  # one is in the task
    assert worker.output() == [WAITING, f" [x] Received {shown}", DONE]


def test_a_task_is_persistent_and_says_what_it_is(broker, shells):
    before = int(time.time())
    shells.send("First message.", "Second message..")
    with broker.connect() as connection:
        channel = connection.channel()
        (method, first, body), (_, second, _) = (channel.basic_get(QUEUE, auto_ack=True) for _ in range(2))
    assert (body, method.exchange, method.routing_key) == (b"First message.", "", "task_queue")
    assert (first.delivery_mode, first.content_type) == (2, "text/plain")
    assert before <= first.timestamp <= time.time()
    assert first.message_id
    assert first.message_id != second.message_id


# Round robin, and fair dispatch


def test_tasks_go_round_robin_to_two_workers(broker, shells):
    one, two = idle_workers(broker, shells, 2)
    shells.send("First message.", "Second message..", "Third message...", "Fourth message....", "Fifth message.....")
    one.wait_for("Fifth")
    assert one.output() == [
        WAITING,
        " [x] Received 'First message.'",
        DONE,
        " [x] Received 'Third message...'",
        DONE,
        " [x] Received 'Fifth message.....'",
    ]
    assert two.output() == [
        WAITING,
        " [x] Received 'Second message..'",
        DONE,
        " [x] Received 'Fourth message....'",
    ]


def test_the_free_worker_takes_all_light_tasks(broker, shells):
    busy, free = idle_workers(broker, shells, 2)
    shells.send("Heavy" + 60 * ".")
    busy.wait_for("Received")
    shells.send("Light 1", "Light 2", "Light 3", "Light 4")
    assert_did(free, "'Light 1'", "'Light 2'", "'Light 3'", "'Light 4'")
    assert busy.output() == [WAITING, f" [x] Received 'Heavy{60 * '.'}'"]


def test_a_busy_worker_holds_one_task_and_the_rest_stay_ready(broker, shells):
    (worker,) = idle_workers(broker, shells, 1)
    shells.send("Heavy" + 60 * ".", "Light 1", "Light 2")
    worker.wait_for("Received")
    assert (held_tasks(broker), broker.ready()) == (1, 2)
    assert DONE not in worker.output()


# Acknowledgement and redelivery


def test_a_task_is_acknowledged_when_it_is_done(broker, shells):
    worker = shells.worker()
    shells.send("Quick")
    assert_did(worker, "'Quick'")
    assert left_by(worker, broker) == 0


def redelivery(broker, shells, end) -> Script:
    """End a worker mid-task by end(worker): an idle one gets the task within a second. Return the one that ended."""
    ended, idle = idle_workers(broker, shells, 2)
    shells.send("Long task..")
    ended.wait_for("Received")
    end(ended)
    at = time.monotonic()
    assert idle.wait_for("Received").at - at < 1
    assert_did(idle, "'Long task..' (redelivered)")
    ended.ends()
    assert ended.output() == [WAITING, " [x] Received 'Long task..'"]
    return ended


def test_a_killed_workers_task_goes_to_another_worker(broker, shells):
    killed = redelivery(broker, shells, Script.kill)
    assert (killed.process.returncode, killed.output("stderr")) == (-signal.SIGKILL, [])


def test_ctrl_c_hands_the_task_back(broker, shells):
    stopped = redelivery(broker, shells, Script.ctrl_c)
    assert stopped.process.returncode == 0
    assert stopped.output("stderr") == [" [!] Stopped by Ctrl+C. The task in hand goes back to the queue."]


def test_sigterm_hands_the_task_back(broker, shells):
    stopped = redelivery(broker, shells, Script.terminate)
    assert stopped.process.returncode == 0
    assert stopped.output("stderr") == [" [!] Stopped by SIGTERM. The task in hand goes back to the queue."]


def test_a_second_signal_ends_the_worker_at_once(proxy, broker, shells):
    worker = shells.worker(url=proxy.url)
    shells.send("Long task" + 60 * ".")
    worker.wait_for("Received")
    assert proxy.stall() == 1  # RabbitMQ does not answer now, so the worker can't hand its task back
    worker.ctrl_c()
    worker.terminate()
    assert worker.ends(within=2) == 0


@pytest.mark.parametrize(("stop", "name"), [(Script.ctrl_c, "Ctrl+C"), (Script.terminate, "SIGTERM")])
def test_an_idle_worker_stops_with_one_line(broker, shells, stop, name):
    worker = shells.worker()
    stop(worker)
    assert worker.ends() == 0
    assert worker.output() == [WAITING]
    assert worker.output("stderr") == [f" [!] Stopped by {name}."]


def test_rabbitmq_logs_no_warning_about_a_task_that_is_sent(broker, shells):
    """It does about a connection that just ends: who looks for faults there would find one for each task."""
    log = broker.node.folder / "log" / f"{broker.node.name}.log"
    seen_before = log.stat().st_size

    def closings() -> list[str]:
        """Return how grave RabbitMQ found the end of each of new_task.py's connections."""
        logged = log.read_bytes()[seen_before:].decode()
        return re.findall(r"\[(\w+)\] .*closing AMQP connection .*new_task\.py", logged)

    shells.send("First message")
    broker.wait_until(closings, "RabbitMQ logs that new_task.py is gone")
    assert set(closings()) == {"info"}


def test_a_task_longer_than_the_heartbeat_is_done_once(broker, shells):
    worker = shells.worker(url=f"{broker.url}?heartbeat=1")
    assert "1" in broker.node.ctl("list_connections", "timeout", "--no-table-headers").split()
    shells.send("Long task.....")
    assert_did(worker, "'Long task.....'")
    assert left_by(worker, broker) == 0


# The queue


@pytest.fixture
def declare(broker):
    """A function that makes the queue anew, with the settings of somebody else."""

    def declare(**settings):
        with broker.connect() as connection:
            connection.channel().queue_delete(QUEUE)
            connection.channel().queue_declare(QUEUE, **settings)

    yield declare
    delete_queue(broker)


def test_the_durable_classic_queue_of_an_older_tutorial_is_used_as_it_is(declare, broker, shells):
    declare(durable=True)
    shells.send("First message.")
    assert_did(shells.worker(), "'First message.'")
    assert "quorum" not in declaration(broker)


@pytest.mark.parametrize("arguments", [{"x-max-length": 10}, {"x-queue-type": "quorum", "x-delivery-limit": 3}])
def test_a_queue_with_other_settings_is_refused(declare, shells, arguments):
    declare(durable=True, arguments=arguments)
    for script in [shells.start("new_task.py"), shells.start("worker.py")]:
        assert (script.ends(), script.output()) == (1, [])
        (line,) = script.output("stderr")
        assert line.startswith(" [!] ")
        assert "the queue 'task_queue' exists with other settings than ours" in line


def test_a_task_that_no_queue_takes_is_not_reported_as_sent(broker, shells):
    sender = shells.start("new_task.py", "-", stdin=subprocess.PIPE)
    sender.process.stdin.write(b"First message.\n")
    sender.process.stdin.flush()
    broker.wait_until(lambda: broker.ready() == 1, "the first task is sent")
    delete_queue(broker)
    sender.process.stdin.write(b"Second message.\n")
    sender.process.stdin.close()
    assert (sender.ends(), sender.output()) == (1, [])
    (line,) = sender.output("stderr")
    assert line.startswith(" [!] Not sent: RabbitMQ gave a task back")
    assert "The first 1 lines are confirmed" in line  # RabbitMQ confirms also what it gives back: that doesn't count


def test_a_task_is_not_reported_as_sent_before_rabbitmq_confirms_it(broker, shells):
    broker.node.ctl("set_vm_memory_high_watermark", "0")  # out of memory: RabbitMQ reads no more from publishers
    try:
        task = shells.start("new_task.py", "First message.")
        task.wait_for("RabbitMQ takes no tasks for now")
        with pytest.raises(AssertionError, match="did not end"):
            task.ends(within=3)
        assert task.output() == []
    finally:
        broker.node.ctl("set_vm_memory_high_watermark", "0.4")
    assert task.ends() == 0
    assert task.output() == [" [x] Sent 'First message.'"]
    assert broker.ready() == 1


# No RabbitMQ for a while


def test_new_task_fails_at_once_where_there_is_no_rabbitmq(shells):
    task = shells.new_task("First message.", url="amqp://127.0.0.1:1", within=5)
    assert (task.process.returncode, task.output()) == (1, [])
    (line,) = task.output("stderr")
    assert line.startswith(" [!] Not sent: can't reach RabbitMQ at 127.0.0.1:1 (Connection refused)")


def test_tasks_survive_a_restart_of_rabbitmq_and_a_worker_waits_for_it(mortal, mortal_shells):
    mortal_shells.send("First message.", "Second message.")
    mortal.node.stop()
    worker = mortal_shells.start("worker.py")
    worker.wait_for("can't reach RabbitMQ")
    mortal.node.start()
    returned = time.monotonic()
    assert worker.wait_for(WAITING).at - returned < 5
    worker.wait_for(DONE, times=2)
    assert worker.output() == [
        WAITING,
        " [x] Received 'First message.'",
        DONE,
        " [x] Received 'Second message.'",
        DONE,
    ]
    (line,) = worker.output("stderr")  # said once, however often it tried
    assert line.startswith(f" [!] can't reach RabbitMQ at 127.0.0.1:{mortal.node.port} (Connection refused)")


def test_a_task_survives_rabbitmqs_death_in_the_queue_that_new_task_has_just_created(mortal, mortal_shells):
    delete_queue(mortal)
    mortal_shells.start("new_task.py", "First message.").wait_for("[x] Sent")
    mortal.node.kill()
    mortal.node.start()
    assert_did(mortal_shells.worker(), "'First message.'")
    assert declaration(mortal) == OUR_DECLARATION


def test_a_task_survives_rabbitmqs_death_in_the_queue_that_a_worker_has_just_created(mortal, mortal_shells):
    delete_queue(mortal)
    worker = mortal_shells.start("worker.py")
    mortal.wait_until(lambda: queue_exists(mortal), "the worker has created the queue")
    mortal_shells.start("new_task.py", "First message..").wait_for("[x] Sent")
    mortal.node.kill()
    mortal.node.start()
    worker.wait_for(WAITING, times=2)
    mortal.wait_until(lambda: worker.output()[-1] == DONE, "the worker has done it", within=10)
    received = worker.output()[worker.output().index(WAITING, 1) + 1]  # the first try was cut off, if there was one
    assert received.startswith(" [x] Received 'First message..'")
    assert left_by(worker, mortal) == 0
    assert declaration(mortal) == OUR_DECLARATION
