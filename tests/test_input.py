"""What people type: wrong command lines, wrong AMQP_URLs, and tasks from the standard input."""

import os
import sys
import time

import pytest
from conftest import HIDDEN, finish, refused, say

import new_task
import worker
from task_queue import address

# A user that RabbitMQ doesn't know.
LOGIN = f"somebody:{HIDDEN}"

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
        f"amqp://{LOGIN}@127.0.0.1/%2F?ssl_options={HIDDEN}",
        f"amqp://{LOGIN}/@127.0.0.1",
        HIDDEN,
        f"amqp://{LOGIN}@127.0.0.1:1;{HIDDEN}",
    ],
)
def test_a_malformed_url_is_refused(monkeypatch, url):
    monkeypatch.setenv("AMQP_URL", url)
    with pytest.raises(address.Refused, match="AMQP_URL is not a valid AMQP URL") as refusal:
        address.nodes("test")
    assert HIDDEN not in str(refusal.value)


def test_both_scripts_tell_of_a_malformed_url_in_one_line(offline):
    offline.both_refused("AMQP_URL is not a valid AMQP URL", url=f"amqp://{LOGIN}/@127.0.0.1")


def test_a_wrong_password_is_refused(node, offline):
    url = f"amqp://guest:{HIDDEN}@127.0.0.1:{node.port}"
    offline.both_refused(f"RabbitMQ at 127.0.0.1:{node.port} refuses user 'guest'", url=url)


@pytest.mark.parametrize(
    ("where", "why"), [("127.0.0.1:1", " (Connection refused)"), ("no-such-host.invalid:5672", "")]
)
def test_a_worker_waits_where_there_is_no_rabbitmq_and_new_task_does_not(offline, where, why):
    url = f"amqp://{LOGIN}@{where}"
    waiting, sender = offline.start("worker.py", url=url), offline.new_task("task", url=url, within=5)
    assert refused(sender).startswith(f" [!] Not sent: can't reach RabbitMQ at {where}{why}")
    waiting.wait_for(f" [!] can't reach RabbitMQ at {where}{why}")
    assert waiting.running
    waiting.ctrl_c()
    assert (waiting.ends(), waiting.output()) == (0, [])
    assert waiting.output("stderr")[1:] == [" [!] Stopped by Ctrl+C."]
    assert HIDDEN not in f"{sender}{waiting}"


# Tasks from the standard input


ALL_BYTES = bytes({*range(256)} - {ord("\n")})


@pytest.mark.parametrize(
    ("typed", "tasks"),
    [
        (b"First message.\nSecond message..\n", [b"First message.", b"Second message.."]),
        (b"\n\nFirst\n\n\n Second\n\n", [b"First", b" Second"]),
        (b"First\nthe last line without newline", [b"First", b"the last line without newline"]),
        (ALL_BYTES + "\nGrüße ☕\n\r\n \n\0\n-".encode(), [ALL_BYTES, "Grüße ☕".encode(), b"\r", b" ", b"\0", b"-"]),
        (b"", []),
    ],
    ids=["lines", "empty lines", "no newline", "any bytes", "no lines"],
)
def test_each_line_of_the_standard_input_is_a_task(broker, shells, typed, tasks):
    producer = shells.feed()
    producer.process.stdin.write(typed)
    finish(producer, len(tasks))
    assert producer.output("stderr") == []
    assert broker.tasks(len(tasks)) == tasks


def test_a_line_is_sent_as_soon_as_it_comes_and_the_connection_is_kept_meanwhile(broker, shells, proxy):
    producer = shells.feed(url=f"{proxy.url}?heartbeat=1")
    os.write(producer.process.stdin.fileno(), b"First\nSec")
    broker.wait_for_ready(1)
    time.sleep(4)  # RabbitMQ drops a connection that is silent for three heartbeats
    say(producer, "ond")
    broker.wait_for_ready(2)
    finish(producer, 2)
    assert len(proxy.links) == 1
    assert broker.tasks(2) == [b"First", b"Second"]


def test_a_line_without_end_is_refused(broker, shells, tmp_path):
    endless = tmp_path / "endless"
    with endless.open("wb") as file:
        file.write(b"one\n")
        file.truncate(200 * 1024 * 1024)
    with endless.open("rb") as file:
        line = refused(shells.new_task("-", stdin=file, within=60))
    assert "a line is longer than 128 MiB" in line
    assert "The first 1 lines are confirmed" in line


def test_a_standard_input_that_cannot_be_read_is_refused(broker, shells):
    producer = shells.shell(f"exec {sys.executable} new_task.py - 0> /dev/null")
    assert "can't read standard input (Bad file descriptor)" in refused(producer)
