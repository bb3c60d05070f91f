"""Whatever comes in, and whatever work() does: the workers go on, and no task is lost."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time

import pika
import pika.data
import pytest
from conftest import DONE, ROOT, WAITING, finish, refused, say, stop
from processes import wait_until

from task_queue import QUEUE, address, declaration


class Raw(bytes):
    """A header's value, already encoded: what other clients send, and pika can't."""


@pytest.fixture
def publish(broker, monkeypatch):
    """Broker.publish(), for headers whose values may be Raw."""
    encode = pika.data.encode_value

    def encode_value(pieces, value):
        if not isinstance(value, Raw):
            return encode(pieces, value)
        pieces.append(bytes(value))
        return len(value)

    monkeypatch.setattr(pika.data, "encode_value", encode_value)
    return broker.publish


def timestamp(number: int) -> Raw:
    return Raw(b"T" + struct.pack(">q", number))


def nested(depth: int, value: bytes = b"") -> Raw:
    """A value in an array in an array, and so on, deeper than pika's encoder goes."""
    for _ in range(depth):
        value = b"A" + struct.pack(">I", len(value)) + value
    return Raw(value)


MILLISECONDS = timestamp(1_700_000_000_000)
ODD_HEADERS = {
    "milliseconds": MILLISECONDS,
    "before 1970": timestamp(-1),
    "the least": timestamp(-(2**63)),
    "the greatest": timestamp(2**63 - 1),
    "in an array": [MILLISECONDS, MILLISECONDS],
    "in a table": {"at": MILLISECONDS, "name": "x"},
    "nested": {"a": [{"at": MILLISECONDS}]},
    "a thousand deep": nested(5000),
    "a long that no int is": Raw(b"L" + struct.pack(">q", -(2**63))),
    "a double that no int is": Raw(b"d" + struct.pack(">d", 1e300)),
    "a decimal": Raw(b"D" + struct.pack(">Bi", 255, -(2**31))),
    "bytes": Raw(b"x\0\0\0\2\xff\xfe"),
    "no text": Raw(b"S\0\0\0\2\xff\xfe"),
}


def test_a_task_with_an_odd_header_is_done_and_acknowledged(broker, shells, publish):
    for name, value in ODD_HEADERS.items():
        publish(name.encode(), {"odd": value})
    worker = shells.worker()
    worker.wait_for(DONE, times=len(ODD_HEADERS))
    assert worker.output()[1::2] == [f" [x] Received {name!r}" for name in ODD_HEADERS]
    stop(worker)
    assert worker.output("stderr") == [" [!] Stopped by SIGTERM."]
    assert broker.ready() == 0


def test_tasks_with_odd_headers_are_set_aside_and_sent_back(broker, shells, publish, worker_with):
    headers = {**ODD_HEADERS, "near the size of a frame": "x" * 130_000}
    for name, value in headers.items():
        publish(name.encode(), {"odd": value, "plain": "kept"}, message_id=name)
    script = worker_with("raise ValueError('\\U0001f600' * 10**6)", "dead_letters.PAUSE_AFTER_FAILURE = 0")
    failing = shells.start(script)
    failing.wait_for("Set aside", times=len(headers), within=120)
    failing.kill()
    assert len(shells.dead_letters("list")) == len(headers)
    assert len(shells.dead_letters("requeue")) == len(headers)
    found = {body.decode(): properties for _, properties, body in broker.take(len(headers))}
    assert {name: properties.message_id for name, properties in found.items()} == {name: name for name in headers}
    assert found["milliseconds"].headers["plain"] == "kept"
    assert "odd" not in found["near the size of a frame"].headers
    assert len(found["near the size of a frame"].headers["x-set-aside-because"]) < 1000


def test_a_count_of_deliveries_that_a_sender_wrote_does_not_count(broker, shells, publish):
    publish(b"task.....", {"x-delivery-count": 50})
    first = shells.worker()
    first.wait_for("Received")
    stop(first)
    shells.worker().wait_for("Received 'task.....' (redelivered)")


def test_arrays_in_arrays_are_decoded_at_any_depth():
    for value in (nested(depth, innermost) for depth in range(600) for innermost in (b"V", MILLISECONDS)):
        assert pika.data.decode_value(value, 0)[1] == len(value)


def test_pika_still_needs_the_patch_of_its_decoder():
    """When this fails, pika can do it by itself: away with _decode_value() in address.py."""
    with pytest.raises((ValueError, OverflowError, OSError)):
        address._decode_value.__defaults__[0](MILLISECONDS, 0)


# What work() does

ERRORS = {
    "raise SyntaxError('bad', ('t.txt', 3, '7', 'text'))": "SyntaxError: bad",
    "raise OSError(2, 'No such file', 'x' * 300_000)": "FileNotFoundError: ",
    "raise ValueError": "ValueError (",
    "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})": "Odd: ",
    "raise type('Odd', (Exception,), {'__str__': lambda self: 1})": "Odd: ",
    "e = ValueError('why'); e.add_note('note') if hasattr(e, 'add_note') else 0; raise e": "ValueError: why (",
    "raise ExceptionGroup('several', [ValueError('one')]) if sys.version_info > (3, 11) else ValueError": "",
    "raise ValueError('two\\nlines')": r"ValueError: two\nlines (",
    "sys.exit(3)": "SystemExit: 3 (",
    "raise KeyboardInterrupt": "KeyboardInterrupt (",
    "raise GeneratorExit": "GeneratorExit (",
    "import asyncio; raise asyncio.CancelledError": "CancelledError (",
    "import pika; raise pika.exceptions.StreamLostError('mine')": "StreamLostError: mine (",
    "raise StopIteration": "StopIteration (",
    "open('/nowhere')": "FileNotFoundError: ",
    "import pathlib; pathlib.Path('/nowhere').read_text()": "FileNotFoundError: ",  # raised in a file of Python's
    "deeper = lambda itself: itself(itself); deeper(deeper)": "RecursionError: ",
}


def test_whatever_work_raises_is_told_in_one_line(broker, shells, worker_with):
    cases = [f"if task == b'{number}': {body}" for number, body in enumerate(ERRORS)]
    worker = shells.start(worker_with("\n".join(cases), "dead_letters.PAUSE_AFTER_FAILURE = 0"))
    finish(shells.feed(*map(str, range(len(ERRORS))), "good"), len(ERRORS) + 1)
    worker.wait_for(DONE)
    worker.wait_for("Set aside", times=len(ERRORS), within=60)
    for number, told in enumerate(ERRORS.values()):
        start = f" [!] Failed '{number}': "
        lines = [line for line in worker.output("stderr") if line.startswith(start)]
        assert len(lines) == 9  # the tenth time it is set aside
        assert lines[0].removeprefix(start).startswith(told)
        assert f"own_worker.py:{8 + number})" in lines[0]  # the place is in the user's file, not in one of Python's
    known = (" [!] Failed '", " [!] Set aside '")
    assert all(line.startswith(known) and len(line) < 700 for line in worker.output("stderr"))


@pytest.mark.parametrize("leave", ["return", "sys.exit()", "raise ValueError", "os._exit(0)"])
def test_a_process_that_work_forks_touches_no_task(broker, shells, worker_with, leave):
    worker = shells.start(worker_with(f"if os.fork() == 0: {leave}\nif task != b'one': time.sleep(60)"))
    shells.send("one", "two", "three")
    worker.wait_for("Received 'two'")
    assert worker.output().count(DONE) == 1
    worker.kill()
    last = shells.worker()  # what the killed worker had in hand is not lost
    last.wait_for("Received 'two' (redelivered)")
    last.wait_for(DONE, times=2)
    assert "Received 'three'" in str(last)
    assert "Traceback" not in str(worker)


def test_a_process_that_work_forks_can_be_terminated(broker, shells, worker_with):
    child = "import multiprocessing as m; p = m.get_context('fork').Process(target=time.sleep, args=(60,)); p.start()"
    script = worker_with(f"{child}\np.join(1); p.terminate(); p.join(); print(p.exitcode, flush=True)")
    worker = shells.start(script, "--graceful")
    shells.send("fork")
    worker.wait_for(DONE, within=10)
    assert "-15" in worker.output()
    assert worker.output("stderr") == []


def test_the_death_of_a_worker_is_noticed_though_a_process_that_it_forked_lives(broker, shells, worker_with):
    child = "import multiprocessing as m; m.get_context('fork').Process(target=time.sleep, args=(30,)).start()"
    worker = shells.start(worker_with(f"if task == b'fork': {child}; print('forked'); time.sleep(30)"))
    shells.send("fork")
    worker.wait_for("forked")
    os.kill(worker.process.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    other = shells.worker()
    other.wait_for("Received 'fork' (redelivered)")
    assert time.monotonic() - killed_at < 5


@pytest.mark.parametrize(
    "what",
    [
        "sys.stdout.close()",
        "sys.stdout = None",
        "sys.stdout = open(os.devnull, 'w')",
        "import threading; threading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_what_work_leaves_behind_stops_nobody(broker, shells, worker_with, what):
    worker = shells.start(worker_with(what))
    shells.send("one", "two", "three")
    broker.wait_for_ready(0)
    stop(worker)
    assert worker.output("stderr") == [" [!] Stopped by SIGTERM."]
    assert worker.output().count(DONE) == 3


def test_lines_appear_though_a_program_has_replaced_standard_output(offline):
    replaced = "import io, sys; sys.stdout = io.StringIO()"
    script = offline.start("-c", f"{replaced}; from task_queue import console; console.say('ü')")
    assert (script.ends(), script.output()) == (0, ["ü"])


def test_a_long_task_is_shown_shortened_and_done_whole(broker, shells, worker_with):
    finish(shells.feed("x" * 1_000_000), 1)
    shells.new_task("y" * 100_000)
    worker = shells.start(worker_with("print(len(task))"))
    worker.wait_for(DONE, times=2)
    long, short = [line for line in worker.output() if "Received" in line]
    assert long.endswith("xxx'... (1000000 bytes)")
    assert max(len(long), len(short)) < 600
    assert {"1000000", "100000"} <= set(worker.output())


def test_tasks_that_cannot_be_set_aside_stop_no_worker(broker, shells, worker_with):
    work = "if task.startswith(b'bad'): raise ValueError\ntime.sleep(1)"
    script = worker_with(work, "dead_letters.PAUSE_AFTER_FAILURE = 0")
    bad = [f"bad {number}." for number in range(12)]
    with broker.user("poor:poor", write="^(?!amq.default$).*") as url:  # it may not publish to the default exchange
        one, two = workers = [shells.start(script, *options, url=url) for options in ([], ["--graceful"])]
        finish(shells.feed(*bad), len(bad))
        wait_until(lambda: all(f"Can't set aside {task!r}" in f"{one}{two}" for task in bad), "all are held")
        finish(shells.feed("good 1", "good 2", "good 3", "good 4", "good 5", "good 6"), 6)
        for worker in workers:
            worker.wait_for("Received 'good")
        assert broker.ready() == 4  # each worker has one task besides those that it holds
        wait_until(lambda: f"{one}{two}".count(DONE) == 6, "the others are done")
        assert f"{one}{two}".count("Can't set aside") == len(bad)
        stop(*workers)  # before their user is deleted
    broker.wait_for_ready(len(bad))  # none is lost
    assert all(properties.headers["x-delivery-count"] < 15 for _, properties, _ in broker.take(len(bad)))


def test_a_worker_that_may_have_no_second_connection_holds_what_it_cannot_set_aside(broker, shells, worker_with):
    with broker.user("lone:lone") as url:
        broker.node.ctl("set_user_limits", "lone", '{"max-connections": 1}')
        worker = shells.start(worker_with("if task == b'bad': raise ValueError"), url=url)
        shells.send("bad")
        worker.wait_for("Can't set aside 'bad': RabbitMQ at 127.0.0.1")
        shells.send("good")
        worker.wait_for(DONE)
        stop(worker)
    broker.wait_for_ready(1)


def test_workers_that_rabbitmq_does_not_answer_stop_with_their_line(broker, shells, proxy):
    busy = shells.busy_worker(url=proxy.url)
    waiting = shells.worker(url=proxy.url), shells.worker("--graceful", url=proxy.url)
    assert proxy.stall() == 3
    proxy.silent = True
    connecting = shells.start("worker.py", url=proxy.url)
    wait_until(lambda: len(proxy.connections) == 4, "it connects")
    stop(busy, *waiting, connecting)
    proxy.cut()
    broker.wait_for_ready(1)


def test_a_worker_whose_output_nobody_reads_stops(broker, shells):
    reader, writer = os.pipe()
    settings = {"cwd": ROOT, "env": {**os.environ, "AMQP_URL": broker.url}, "stdout": writer, "stderr": writer}
    worker = subprocess.Popen([sys.executable, "worker.py"], **settings)
    try:
        wait_until(lambda: broker.consumers() == 1, "it waits for tasks")
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x")
        os.set_blocking(writer, True)
        shells.send("task")
        broker.wait_for_ready(0)  # the worker has it, and can't say so
        worker.terminate()
        assert worker.wait(timeout=7) == 0
    finally:
        worker.kill()
        worker.wait()
        os.close(reader)
        os.close(writer)


# What happens around a worker or a producer, and how they stop


@pytest.mark.parametrize(
    ("begin", "end", "why"),
    [
        (["set_user_limits", "guest", '{"max-connections": 0}'], ["clear_user_limits", "guest", "all"], "connection"),
        (["set_vhost_limits", '{"max-queues": 0}'], ["clear_vhost_limits"], "queue"),
    ],
    ids=["no connections", "no queues"],
)
def test_a_worker_that_cannot_consume_backs_off_and_says_why_once(broker, shells, proxy, begin, end, why):
    broker.delete_queue()
    with broker.trouble(begin, end):
        worker = shells.start("worker.py", url=proxy.url)
        worker.wait_for(f"{why} limit")
        wait_until(lambda: len(proxy.links) > 3, "it tries again and again")
        assert len(worker.output("stderr")) == 1
    worker.wait_for(WAITING, within=8)


def test_a_worker_whose_virtual_host_is_deleted_ends(broker, shells):
    broker.node.ctl("add_vhost", "brief")
    broker.node.ctl("set_permissions", "-p", "brief", "guest", ".*", ".*", ".*")
    worker = shells.worker(url=broker.url.replace("%2F", "brief"))
    broker.node.ctl("delete_vhost", "brief")
    assert worker.ends() == 1
    assert "consumer_timeout" not in str(worker)
    assert "has no virtual host 'brief'" in worker.output("stderr")[-1]


def test_one_channel_is_enough(broker, shells):
    broker.delete_queue()
    url = f"{broker.url}?channel_max=1"
    shells.send("task", url=url)
    shells.worker(url=url).wait_for(DONE)


def test_a_producer_that_was_stopped_for_long_goes_on(broker, shells, changed):
    # A pause of its own counts as STOPPED_SECONDS, whatever its length.
    impatient = changed("new_task", "publisher.GIVE_UP_SECONDS, publisher.STOPPED_SECONDS = 4, 2")
    producer = shells.feed("one", script=impatient, url=f"{broker.url}?heartbeat=1")
    broker.wait_for_ready(1)
    producer.process.send_signal(signal.SIGSTOP)
    say(producer, "two")
    time.sleep(5)  # for longer than it would try
    producer.process.send_signal(signal.SIGCONT)
    finish(producer, 2)


def test_ctrl_c_ends_a_producer_that_declares_the_queue_through_a_silent_network(shells, proxy, changed):
    pause = """
declare = publisher.declaration.declare
def declare_later(*arguments):
    print("connected", flush=True)
    sys.stdin.readline()
    return declare(*arguments)
publisher.declaration.declare = declare_later
"""
    producer = shells.start(changed("new_task", pause), "task", stdin=subprocess.PIPE, url=proxy.url)
    producer.wait_for("connected")
    assert proxy.stall() == 1
    say(producer, "go on")
    wait_until(lambda: proxy.held > 0, "it declares the queue")
    producer.ctrl_c()
    assert producer.ends(within=5) == 1
    assert producer.output("stderr") == [" [!] Not sent: interrupted."]


def test_a_classic_queue_that_comes_behind_the_look_for_it_is_used(broker, monkeypatch):
    broker.declare_anew(durable=True)
    monkeypatch.setattr(declaration, "_declare", lambda *_, **how: None)  # as the look was before that
    with broker.connect() as connection:
        began = time.monotonic()
        channel, counts = declaration.declare(connection, QUEUE)
        assert (channel.is_open, counts) == (True, False)
        assert time.monotonic() > began + declaration.SETTLE_SECONDS  # nobody knows how old it is


AT_AN_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(module, *_):
        if module == {!r}:
            {}
sys.meta_path.insert(0, Finder)
"""


@pytest.fixture
def start(offline, tmp_path):
    """A function that starts a script in which something happens when a module is to be imported."""

    def start(module: str, event: str, *command: str):
        (tmp_path / "sitecustomize.py").write_text(AT_AN_IMPORT.format(module, event))
        return offline.start(*command, environment={"PYTHONPATH": str(tmp_path)})

    return start


@pytest.mark.parametrize(
    ("script", "status", "line"),
    [("new_task.py", 1, " [!] Not sent: interrupted."), ("worker.py", 0, " [!] Stopped by Ctrl+C.")],
)
def test_ctrl_c_during_the_imports_gets_one_line(start, script, status, line):
    for module in ("task_queue.console", "pika", "pika.adapters.blocking_connection", "random"):
        interrupted = start(module, "os.kill(os.getpid(), signal.SIGINT)", script)
        assert (interrupted.ends(), interrupted.output("stderr")) == (status, [line]), module


@pytest.mark.parametrize("script", ["new_task", "worker"])
def test_without_pika_one_line_says_how_to_install_it(start, script):
    no_pika = "pika", "raise ModuleNotFoundError(name=module)"
    line = refused(start(*no_pika, f"{script}.py"))
    assert line.startswith(" [!] pika is not installed.")
    assert "source .venv/bin/activate" in line
    importing = start(*no_pika, "-c", f"try: import {script}\nexcept ImportError: print(1)")
    assert (importing.ends(), importing.output()) == (0, ["1"])
