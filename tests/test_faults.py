"""Whatever dies, no task is lost: each test brings a fault about for real and sees that it took place."""

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import DONE, FOREVER, HIDDEN, WAITING, finish, refused, say, stop
from processes import Script, wait_until

from task_queue import DEAD_LETTERS, QUEUE, dead_letters


def test_a_task_that_raises_is_tried_ten_times_and_set_aside(broker, shells, worker_with):
    # It expires, is for two queues, and was delivered ten times: none of that must be so once more.
    headers = {"x-request": "7", "CC": [QUEUE], "x-delivery-count": 10}
    broker.publish(b"bad", headers, expiration="20000", user_id="guest", message_id="m")
    worker = shells.start(worker_with("raise ValueError('no such\\nfile')"))
    worker.wait_for("Set aside 'bad'")
    assert len([line for line in worker.output() if "Received 'bad'" in line]) == 10
    assert DONE not in worker.output()
    headers, properties, body = broker.dead_letter()
    assert (body, properties.message_id, properties.expiration) == (b"bad", "m", None)
    assert (headers["x-request"], headers["x-set-aside-after-deliveries"]) == ("7", 10)
    assert headers["x-set-aside-because"].startswith("ValueError: no such\\nfile")
    assert headers["x-set-aside-at"].startswith("20")
    assert "CC" not in headers
    assert broker.ready() == 0


def test_a_task_that_kills_its_workers_is_set_aside_after_ten_of_them(broker, shells, worker_with):
    script = worker_with("os.kill(os.getpid(), 9) if task == b'deadly' else None")
    shells.send("deadly", "harmless")
    for _ in range(10):
        worker = shells.start(script)
        assert worker.ends() == -9
        assert worker.output()[1].startswith(" [x] Received 'deadly'")
    worker = shells.start(script)
    worker.wait_for("Set aside 'deadly'")
    worker.wait_for("Received 'harmless'")
    worker.wait_for(DONE)
    assert "Received 'deadly'" not in str(worker)
    assert broker.dead_letter()[0]["x-set-aside-after-deliveries"] == 10


def test_a_task_that_cannot_be_set_aside_is_kept_until_it_can(broker, shells, worker_with):
    with broker.connect() as connection:  # a queue of that name with other settings, for instance
        connection.channel().queue_declare(DEAD_LETTERS, durable=True, arguments={"x-max-length": 5})
    script = worker_with("if task == b'bad': raise ValueError")
    worker = shells.start(script)
    shells.send("bad")
    worker.wait_for("Can't set aside 'bad'")
    shells.send("good")
    worker.wait_for(DONE)
    broker.delete_queue(DEAD_LETTERS)
    stop(worker)
    shells.start(script).wait_for("Set aside 'bad'")
    assert broker.dead_letter()[0]["x-set-aside-after-deliveries"] == 10


def test_an_alarm_does_not_hang_a_worker_that_sets_a_task_aside(broker, shells, worker_with):
    shells.send("bad")
    with broker.trouble():
        worker = shells.start(worker_with("raise ValueError", "address.BLOCKED_SECONDS = 2"))
        worker.wait_for("Can't set aside 'bad'")
        worker.ctrl_c()
        assert worker.ends(within=3) == 0
    broker.wait_for_ready(1)


def test_a_failing_task_on_a_classic_queue_is_tried_with_pauses(broker, shells, worker_with):
    broker.declare_anew(durable=True)
    worker = shells.start(worker_with("raise ValueError"))
    shells.send("bad")
    first, last = worker.wait_for("Received 'bad'"), worker.wait_for("Received 'bad'", times=13)
    assert last.at - first.at > 11 * 0.1  # the pause of worker_with()


def test_handing_back_does_not_count_where_rabbitmq_can_tell(broker, shells):
    stop(shells.busy_worker())
    worker = shells.worker()
    worker.wait_for("(redelivered)")
    stop(worker)
    broker.wait_for_ready(1)
    ((method, properties, _),) = broker.take(1)
    assert method.redelivered
    old = broker.node.ctl("version").startswith("3.")
    assert (properties.headers or {}).get("x-delivery-count", 0) == (2 if old else 0)


def test_dead_letters_are_listed_often_and_sent_back(broker, shells, worker_with, monkeypatch, capfd):
    shells.send("bad \x1b[31m")
    failing = shells.start(worker_with("raise ValueError"))
    failing.wait_for("Set aside")
    failing.kill()
    monkeypatch.setenv("AMQP_URL", broker.url)
    for _ in range(25):  # RabbitMQ drops what it has delivered more than 20 times
        dead_letters.list_or_requeue("list")
        assert capfd.readouterr().out.startswith(r" [x] 'bad \x1b[31m', set aside 2")
    assert shells.dead_letters("requeue") == [r" [x] Requeued 'bad \x1b[31m'"]
    assert broker.tasks(1) == [b"bad \x1b[31m"]
    for command in ("list", "requeue"):
        assert shells.dead_letters(command) == [" [*] No dead letters"]


def test_a_task_whose_connection_was_cut_is_done_again(shells, proxy):
    worker = shells.busy_worker("three...", url=proxy.url)
    shells.send("next")
    assert proxy.cut() == 1
    said = worker.wait_for("This task will be done again", within=2)
    finished = worker.wait_for(DONE)
    assert said.at < finished.at
    worker.wait_for("Received 'three...' (redelivered)")
    worker.wait_for("Received 'next'")
    worker.wait_for(DONE, times=3)
    assert len(worker.output("stderr")) == 1
    assert proxy.cut() == 1  # and now while it waits
    worker.wait_for(WAITING, times=3, within=5)


def test_a_connection_that_is_silently_dead_is_noticed(shells, proxy):
    worker = shells.busy_worker(url=proxy.url + "?heartbeat=1")
    assert proxy.stall() == 1
    worker.wait_for("This task will be done again", within=2 * (1 + 5) + 5)
    other = shells.worker()
    other.wait_for("(redelivered)", within=10)


def test_a_queue_that_rabbitmq_cannot_bring_back_is_told_once(mortal, shells):
    if not mortal.node.ctl("version").startswith("3."):
        pytest.skip("only RabbitMQ 3 loses a queue that was deleted just before a kill, and declared again")
    mortal.delete_queue()
    mortal.node.kill()
    mortal.node.start()
    shells.worker().kill()  # it has declared the queue, and waited until that is on disk
    mortal.node.kill()
    mortal.node.start()
    worker = shells.start("worker.py")
    worker.wait_for(WAITING, times=5)
    (line,) = worker.output("stderr")
    assert line.startswith(" [!] RabbitMQ can't serve the queue 'task_queue' (INTERNAL_ERROR (541)): its log tells")
    waits = [line.at for line in worker.lines if line.text == WAITING]
    assert waits[4] - waits[3] > 1  # it was 0.5 s at first
    mortal.node.ctl("delete_queue", QUEUE)  # what the line advises
    shells.send("task")
    worker.wait_for(DONE, within=15)
    mortal.node.kill()
    shutil.rmtree(mortal.node.folder / "data")  # with it, each kill would make the queue unusable from now on


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_workers_wait_for_a_rabbitmq_that_goes_and_comes_back(mortal, shells, how):
    busy = shells.busy_worker("in hand......")
    idle, leaving = shells.worker(), shells.worker()
    getattr(mortal.node, how)()
    busy.wait_for("This task will be done again", within=3)
    for worker in (idle, leaving):
        worker.wait_for("Trying again until it works")
    stop(leaving)
    late = shells.start("worker.py")
    late.wait_for("can't reach RabbitMQ")
    mortal.node.start()
    returned = time.monotonic()
    for worker, times in ((idle, 2), (late, 1), (busy, 2)):
        within = 5 if worker is not busy else 5 + 6  # it does its task to the end first
        assert worker.wait_for(WAITING, times).at - returned < within
    wait_until(lambda: "Received 'in hand......' (redelivered)" in f"{idle}{late}{busy}", "the task comes back")
    wait_until(lambda: mortal.consumers() == 3, "all consume again")
    (line,) = late.output("stderr")  # said once, however often it tried
    assert line.startswith(f" [!] can't reach RabbitMQ at 127.0.0.1:{mortal.node.port} (Connection refused)")


def test_a_deleted_queue_is_declared_again(broker, shells):
    worker = shells.worker()
    shells.send("before")
    done = worker.wait_for(DONE)
    wait_until(lambda: time.monotonic() > done.at + 0.5, "the worker has waited for a while")
    broker.delete_queue()
    worker.wait_for(WAITING, times=2)
    assert worker.output("stderr") == [" [!] The queue 'task_queue' was deleted. Declaring it again."]
    shells.send("two..")
    worker.wait_for("Received 'two..'")
    broker.delete_queue()  # now in the middle of a task
    worker.wait_for(WAITING, times=3)
    shells.send("after")
    worker.wait_for("Received 'after'")
    worker.wait_for(DONE, times=3)


def test_a_task_longer_than_the_ack_timeout_is_explained_and_work_goes_on(broker, shells):
    timeout = "application:set_env(rabbit, consumer_timeout, {}).".format  # 30 minutes, usually
    with broker.trouble(("eval", timeout(1000)), ("eval", timeout(1_800_000))):
        worker = shells.busy_worker("long.....")
        worker.wait_for(DONE)
        worker.wait_for("longer than consumer_timeout")
        worker.wait_for(WAITING, times=2)
        worker.wait_for("Received 'long.....' (redelivered)")


def test_a_signal_at_any_moment_ends_a_worker_in_good_order(broker, shells):
    """The tasks are empty, so that some signals come during work, some during an acknowledgement."""
    shells.feed(*["task"] * 20_000)
    for attempt in range(12):
        worker = shells.worker()
        worker.wait_for(DONE, times=1 + 20 * attempt)
        (worker.ctrl_c if attempt % 2 else worker.terminate)()
        assert worker.ends() == 0
        (line,) = worker.output("stderr")
        assert line.startswith(" [!] Stopped by")


STOPPED = ["SIGTERM: will stop when this task is done, or at once on a second signal.", "Stopped by SIGTERM."]


@pytest.mark.parametrize(("where", "said"), [("", STOPPED), ("2> >(true)", [])], ids=["told", "nobody reads it"])
def test_a_graceful_worker_finishes_its_task_on_sigterm(broker, shells, where, said):
    worker = shells.shell(f"exec {sys.executable} worker.py --graceful {where}")
    worker.wait_for(WAITING)
    shells.send("three...", "next")
    worker.wait_for("Received")
    worker.terminate()
    assert worker.ends() == 0
    assert worker.output() == [WAITING, " [x] Received 'three...'", DONE]
    assert worker.output("stderr") == [f" [!] {line}" for line in said]
    broker.wait_for_ready(1)  # just the other task


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        ([], Script.ctrl_c, Script.terminate),
        (["--graceful"], Script.terminate, Script.ctrl_c),
        (["--graceful"], Script.terminate, Script.terminate),
    ],
)
def test_a_second_signal_ends_a_worker_at_once(broker, shells, proxy, arguments, first, second):
    worker = shells.busy_worker("long" + FOREVER, *arguments, url=proxy.url)
    assert proxy.stall() == 1  # RabbitMQ does not answer now, so the worker can't hand its task back
    first(worker)
    worker.wait_for("will stop" if arguments else "Stopped by")
    second(worker)
    assert worker.ends(within=2) == 0
    assert proxy.cut() == 1
    broker.wait_for_ready(1)


def test_a_producer_resends_what_is_unconfirmed_after_a_cut(broker, shells, proxy):
    producer = shells.feed("one", url=proxy.url)
    broker.wait_for_ready(1)
    proxy.stall()
    say(producer, "two")
    wait_until(lambda: proxy.held > 0, "the second task is under way")
    assert proxy.cut() == 1
    finish(producer, 2)
    assert broker.ready() == 2
    (line,) = producer.output("stderr")
    assert "Trying again for up to 60 s" in line


def test_a_producer_waits_for_a_rabbitmq_that_restarts_midway(mortal, shells):
    producer = shells.feed("one")
    mortal.wait_for_ready(1)
    mortal.node.kill()
    say(producer, "two", "three")
    producer.wait_for("Trying again for up to 60 s")
    mortal.node.start()
    finish(producer, 3)
    mortal.wait_for_ready(3)


def test_a_producer_that_gives_up_says_how_to_go_on(mortal, shells, changed):
    producer = shells.feed("one", "", "two", script=changed("new_task", "publisher.GIVE_UP_SECONDS = 2"))
    mortal.wait_for_ready(2)
    mortal.node.kill()
    say(producer, "three", "four")
    assert producer.ends() == 1  # though its input is still open
    assert producer.output() == []
    last = producer.output("stderr")[-1]
    assert last.startswith(" [!] Not sent: gave up after 2 s: can't reach RabbitMQ at 127.0.0.1:")
    assert last.endswith("The first 2 lines are confirmed; to send the others: tail -n +3 FILE | python new_task.py -")


def test_ctrl_c_midway_says_how_to_go_on(broker, shells):
    producer = shells.feed("one", "two")
    broker.wait_for_ready(2)
    producer.ctrl_c()
    rest = "The first 2 lines are confirmed; to send the others: tail -n +3 FILE | python new_task.py -"
    assert refused(producer) == f" [!] Not sent: interrupted. {rest}"


def test_a_nacked_task_is_sent_again(broker, shells):
    """A queue that is full for a while is the simplest way to a nack. RabbitMQ notices with a delay that it is full."""
    limit = '{"max-length": 1, "overflow": "reject-publish"}'
    with broker.trouble(("set_policy", "full", "^task_queue$", limit), ("clear_policy", "full")):
        producer, sent = shells.feed(), 0
        while "could not store" not in str(producer):
            assert sent < 10_000, "the queue takes whatever comes"
            say(producer, f"task {sent}")
            sent += 1
            time.sleep(0.01)  # no hope in it: it is the rate at which tasks come
        worker = shells.worker()
        finish(producer, sent)
    worker.wait_for(DONE, times=sent)
    assert {f" [x] Received 'task {number}'" for number in range(sent)} <= set(worker.output())


def test_a_task_that_rabbitmq_gives_back_is_not_reported_sent(broker, shells):
    producer = shells.feed("one")
    broker.wait_for_ready(1)
    broker.delete_queue()
    say(producer, "two")
    line = refused(producer)
    assert line.startswith(" [!] Not sent: RabbitMQ gave a task back (NO_ROUTE)")
    assert "The first 1 lines are confirmed" in line  # RabbitMQ confirms also what it gives back: that doesn't count


def test_an_alarm_that_lasts_ends_a_producer_within_30_seconds(broker, shells):
    """After 25 seconds (see test_input.py), unless the URL says otherwise, as it does here: two seconds save time."""
    with broker.trouble():
        producer = shells.new_task("task", url=f"{broker.url}?blocked_connection_timeout=2", within=15)
    assert (producer.process.returncode, producer.output()) == (1, [])
    assert all("memory" in line for line in producer.output("stderr"))


def test_an_alarm_that_passes_delays_a_producer(broker, shells):
    with broker.trouble(("set_disk_free_limit", str(10**15)), ("set_disk_free_limit", "1000000")):
        producer = shells.start("new_task.py", "task")
        producer.wait_for("disk")
        with pytest.raises(AssertionError, match="did not end"):
            producer.ends(within=1)
        assert producer.output() == []  # not before RabbitMQ has confirmed it
    assert (producer.ends(), producer.output()) == (0, [" [x] Sent 'task'"])
    assert broker.ready() == 1


def test_a_task_larger_than_rabbitmq_accepts_is_refused_with_one_line(broker, shells):
    assert "larger" in refused(shells.feed("fits", "x" * 2_000_001))


def test_a_node_that_is_down_is_skipped(broker, shells):
    urls = ["amqp://guest:guest@127.0.0.1:1/", "amqp://nosuchhost.invalid/", broker.url]
    for turn in range(3):
        url = "; ".join(urls[turn:] + urls[:turn])
        shells.send("task", url=url)
    worker = shells.worker(url=url)
    worker.wait_for(DONE, times=3)


def test_a_password_is_seen_nowhere(broker, shells):
    with broker.user(f"alice:{HIDDEN}") as url:
        worker = shells.worker(url=url)
        task = shells.new_task("task", url=url)
        worker.wait_for(DONE)
        clients = broker.node.ctl("list_connections", "user", "client_properties")
        command = Path(f"/proc/{worker.process.pid}/cmdline").read_bytes().decode()
        assert "worker.py" in clients
        assert "alice" in clients
        broker.node.ctl("close_all_connections", "maintenance")
        line = worker.wait_for("maintenance").text
        assert re.fullmatch(r" \[!\] Lost RabbitMQ \(.+\)\. Trying again until it works\.", line)
        worker.wait_for(WAITING, times=2)
        broker.node.ctl("change_password", "alice", "another")
        broker.node.ctl("close_all_connections", "maintenance")
        assert worker.ends() == 1
        for text in (str(worker), str(task), clients, command):
            assert HIDDEN not in text


def test_a_user_without_permission_gets_one_line(broker, shells):
    with broker.user("bob:bob", configure="^$", write="^$", read="^$") as url:
        shells.both_refused("ACCESS_REFUSED", url=url)


@pytest.mark.parametrize("where", ["| true", "> /dev/full", ">&-", "2>&- >&-"])
def test_an_output_that_nobody_takes_changes_nothing(broker, shells, where):
    producer = shells.shell(f"{sys.executable} new_task.py task {where}")
    assert producer.ends() == 0
    assert broker.ready() == 1
    assert "Traceback" not in str(producer)
    worker = shells.shell(f"exec {sys.executable} worker.py {where.replace('| true', '> >(true)')}")
    broker.wait_for_ready(0)
    shells.send("another")
    broker.wait_for_ready(0)
    worker.terminate()
    assert worker.ends() == 0
    assert "Traceback" not in str(worker)
