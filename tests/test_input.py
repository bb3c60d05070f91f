"""What people type: wrong command lines, wrong AMQP_URLs, and tasks from the standard input."""

import os
import subprocess

import pytest
from conftest import Shells
from processes import Script

import new_task
import worker
from task_queue import QUEUE

# A user that RabbitMQ doesn't know, with a password that must never be shown.
LOGIN = "somebody:s3cret"


@pytest.fixture
def offline():
    """Shells for what must be answered without any RabbitMQ."""
    shells = Shells("amqp://127.0.0.1:1")
    yield shells
    shells.close()


def assert_refused(script: Script) -> str:
    """Wait for the exit status 1 with just one line of diagnosis, and return that line."""
    assert (script.ends(), script.output()) == (1, [])
    (line,) = script.output("stderr")
    assert line.startswith(" [!] ")
    assert "s3cret" not in line
    return line


def assert_both_refuse(shells, url: str, why: str) -> None:
    for script in [shells.start("new_task.py", url=url), shells.start("worker.py", url=url)]:
        assert why in assert_refused(script)


# The command line


@pytest.mark.parametrize(
    "command",
    [
        ("new_task.py", "-x"),
        ("new_task.py", "--helpme"),
        ("new_task.py", "--help", "me"),
        ("new_task.py", "-", "First message."),
        ("worker.py", "First message."),
        ("worker.py", ""),
        ("worker.py", "-"),
        ("worker.py", "--helpme"),
        ("worker.py", "--help", "me"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_gets_the_usage(offline, command):
    script = offline.start(*command)
    assert (script.ends(), script.output()) == (2, [])
    (line,) = script.output("stderr")
    assert line.startswith(f"usage: python {command[0]}")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("module", [new_task, worker], ids=["new_task", "worker"])
def test_help_is_what_the_file_opens_with(offline, module, option):
    script = offline.start(f"{module.__name__}.py", option)
    assert (script.ends(), script.output("stderr")) == (0, [])
    assert script.output() == module.__doc__.strip().splitlines()


@pytest.mark.parametrize(
    ("words", "task"), [(("--", "-x", "--"), "'-x --'"), (("a", "-x", "-"), "'a -x -'"), (("--", "-"), "'-'")]
)
def test_words_may_begin_with_a_dash(broker, shells, words, task):
    assert shells.new_task(*words).output() == [f" [x] Sent {task}"]


# AMQP_URL


@pytest.mark.parametrize(
    "url",
    [
        f"{LOGIN}@127.0.0.1",
        f"//{LOGIN}@127.0.0.1",
        f"http://{LOGIN}@127.0.0.1",
        f"amqp://{LOGIN}@127.0.0.1:port",
        f"amqp://{LOGIN}@127.0.0.1:99999",
        f"amqp://{LOGIN}@[127.0.0.1",
        f"amqp://{LOGIN}@127.0.0.1/%2F?heartbeat=often",
        f"amqp://{LOGIN}@127.0.0.1/%2F?ssl_options=s3cret",
        f"amqp://{LOGIN}/@127.0.0.1",
        "s3cret",
        f"amqp://{LOGIN}@127.0.0.1:1;s3cret",
    ],
)
def test_a_malformed_url_is_refused(offline, url):
    assert_both_refuse(offline, url, "AMQP_URL is not a valid AMQP URL")


def test_a_wrong_password_is_refused(node, offline):
    url = f"amqp://guest:s3cret@127.0.0.1:{node.port}"
    assert_both_refuse(offline, url, f"RabbitMQ at 127.0.0.1:{node.port} refuses user 'guest'")


def test_an_unknown_virtual_host_is_refused(node, offline):
    url = node.url.replace("%2F", "nowhere")
    assert_both_refuse(offline, url, f"RabbitMQ at 127.0.0.1:{node.port} has no virtual host 'nowhere'")


UNKNOWN_HOST = f"amqp://{LOGIN}@no-such-host.invalid"


def test_new_task_does_not_wait_for_an_unknown_host(offline):
    line = assert_refused(offline.start("new_task.py", url=UNKNOWN_HOST))
    assert "can't reach RabbitMQ at no-such-host.invalid:5672" in line


def test_a_worker_waits_for_an_unknown_host(offline):
    worker = offline.start("worker.py", url=UNKNOWN_HOST)
    worker.wait_for(" [!] can't reach RabbitMQ at no-such-host.invalid:5672")
    assert worker.running
    worker.ctrl_c()
    assert (worker.ends(), worker.output()) == (0, [])
    assert worker.output("stderr")[1:] == [" [!] Stopped by Ctrl+C."]
    assert "s3cret" not in str(worker)


# Tasks from the standard input


def type_in(shells, lines: bytes) -> Script:
    """Run `new_task.py -` with these lines to its end."""
    script = shells.start("new_task.py", "-", stdin=subprocess.PIPE)
    script.process.stdin.write(lines)
    script.process.stdin.close()
    script.ends()
    return script


def assert_sent(script: Script, number: int) -> None:
    assert (script.output(), script.output("stderr")) == ([f" [x] Sent {number} tasks"], [])
    assert script.process.returncode == 0


def tasks_in(broker) -> list[bytes]:
    """Take all tasks out of the queue, and return them in its order."""
    with broker.connect() as connection:
        channel = connection.channel()
        number = channel.queue_declare(QUEUE, passive=True).method.message_count
        deliveries = channel.consume(QUEUE, auto_ack=True)
        return [next(deliveries)[2] for _ in range(number)]


def test_each_line_of_the_standard_input_is_a_task(broker, shells):
    assert_sent(type_in(shells, b"First message.\nSecond message..\nThird message...\n"), 3)
    assert tasks_in(broker) == [b"First message.", b"Second message..", b"Third message..."]


def test_empty_lines_are_no_tasks(broker, shells):
    assert_sent(type_in(shells, b"\n\nFirst\n\n\n Second\n\n"), 2)
    assert tasks_in(broker) == [b"First", b" Second"]


def test_the_last_line_needs_no_newline(broker, shells):
    assert_sent(type_in(shells, b"First\nSecond"), 2)
    assert tasks_in(broker) == [b"First", b"Second"]


def test_bytes_are_passed_on_as_they_are(broker, shells):
    lines = [bytes({*range(256)} - {ord("\n")}), "Grüße ☕".encode(), b"\r", b" ", b"\0", b"-"]
    assert_sent(type_in(shells, b"\n".join(lines)), len(lines))
    assert tasks_in(broker) == lines


def test_no_lines_are_no_tasks(broker, shells):
    assert_sent(type_in(shells, b""), 0)
    assert broker.ready() == 0


def test_thousands_of_lines_from_a_file_arrive_in_order(broker, shells, tmp_path):
    lines = [b"Task number %d." % number for number in range(10_000)]
    jobs = tmp_path / "jobs.txt"
    jobs.write_bytes(b"\n".join(lines))
    with jobs.open("rb") as file:
        sender = shells.new_task("-", stdin=file)
    assert_sent(sender, len(lines))
    assert tasks_in(broker) == lines


def test_a_line_is_sent_as_soon_as_it_comes(broker, shells):
    sender = shells.start("new_task.py", "-", stdin=subprocess.PIPE)
    os.write(sender.process.stdin.fileno(), b"First\nSec")
    broker.wait_until(lambda: broker.ready() == 1, "the first line is sent")
    os.write(sender.process.stdin.fileno(), b"ond\n")
    broker.wait_until(lambda: broker.ready() == 2, "the second line is sent")
    sender.process.stdin.close()
    sender.ends()
    assert_sent(sender, 2)


def test_ctrl_c_amid_the_lines_is_not_reported_as_sent(broker, shells):
    sender = shells.start("new_task.py", "-", stdin=subprocess.PIPE)
    os.write(sender.process.stdin.fileno(), b"First\n")
    broker.wait_until(lambda: broker.ready() == 1, "the first line is sent")
    sender.ctrl_c()
    assert assert_refused(sender).startswith(" [!] Not sent: interrupted")
