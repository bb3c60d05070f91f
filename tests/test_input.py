"""What people type: wrong command lines, wrong AMQP_URLs, and tasks from the standard input."""

import os
import shlex
import sys
import time

import pytest
from conftest import DONE, HIDDEN, finish, refused, say

import new_task
import worker
from task_queue import address

LOGIN = f"somebody:{HIDDEN}"  # a user that RabbitMQ doesn't know

WRONG = {
    "new_task.py": ["-x", "--helpme", "--help me", "- 'First message.'"],
    "worker.py": ["'First message.'", "''", "-", "--helpme", "--help me"],
}


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_command_line_gets_the_usage(offline, script):
    for words in WRONG[script]:
        run = offline.start(script, *shlex.split(words))
        assert (run.ends(), run.output()) == (2, []), words
        (line,) = run.output("stderr")
        assert line.startswith(f"usage: python {script}")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("module", [new_task, worker], ids=["new_task", "worker"])
def test_help_is_what_the_file_opens_with(offline, module, option):
    script = offline.start(f"{module.__name__}.py", option)
    assert (script.ends(), script.output("stderr")) == (0, [])
    assert script.output() == module.__doc__.strip().splitlines()


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
        f"amqp://guest:1/{HIDDEN}@127.0.0.1",
        HIDDEN,
        f"amqp://{LOGIN}@127.0.0.1:1;{HIDDEN}",
    ],
)
def test_a_malformed_url_is_refused(monkeypatch, url):
    monkeypatch.setenv("AMQP_URL", url)
    with pytest.raises(address.Refused, match="AMQP_URL is not a valid AMQP URL") as refusal:
        address.nodes("test")
    assert HIDDEN not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "authority", "why"),
    [
        ("amqp://guest:1/{hidden}@127.0.0.1", "ca", "AMQP_URL is not a valid AMQP URL"),
        ("amqp://guest:{hidden}@127.0.0.1:{port}", "ca", "RabbitMQ at 127.0.0.1:{port} refuses user 'guest'"),
        ("amqps://guest:{hidden}@127.0.0.1:{port}", "ca", "TLS with 127.0.0.1"),
        ("amqps://guest:{hidden}@localhost:{tls_port}", "other-ca", "verify failed"),
        ("amqps://guest:{hidden}@127.0.0.1:{tls_port}", "ca", "verify failed"),  # its certificate lacks that name
    ],
    ids=["malformed", "wrong password", "no TLS", "unknown authority", "another name"],
)
def test_what_waiting_cannot_cure_is_refused_in_one_line(node, offline, url, authority, why):
    here = {"hidden": HIDDEN, "port": node.port, "tls_port": node.tls_port}
    trust = {"SSL_CERT_FILE": f"{node.folder}/{authority}.pem"}
    offline.both_refused(why.format(**here), url=url.format(**here), environment=trust)


def test_a_server_that_the_systems_authorities_vouch_for_is_trusted(node, shells):
    shells.url = f"amqps://guest:guest@localhost:{node.tls_port}/"
    trust = {"SSL_CERT_FILE": f"{node.folder}/ca.pem"}
    shells.send("task", environment=trust)
    shells.worker(environment=trust).wait_for(DONE)


def test_timeouts_are_short_unless_the_url_says_otherwise(monkeypatch):
    for query, timeouts in {"": (20, 25), "?heartbeat=0": (0, 25), "?blocked_connection_timeout=7": (20, 7)}.items():
        monkeypatch.setenv("AMQP_URL", f"amqp://h/{query}")
        (node,) = address.nodes("test")
        assert (node.heartbeat, node.blocked_connection_timeout) == timeouts


def test_the_nodes_of_a_url_are_tried_in_random_order(monkeypatch):
    monkeypatch.setenv("AMQP_URL", "amqp://a;amqp://b;amqp://c")
    assert {address.nodes("test")[0].host for _ in range(100)} == {"a", "b", "c"}


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
