#!/usr/bin/env python3
"""Chaos: send tasks while everything breaks, then count. The exit status is 0 if no promise was broken, 1 otherwise.

    python tools/chaos.py                         3000 tasks, 60 faults, in about three minutes
    python tools/chaos.py --seed 7 --tasks 500    a shorter run; the seed decides which faults come, and when

Workers do tasks from producers that are fed bit by bit, on a RabbitMQ that is started for this run, on loopback. One
fault after the other hits them. What the scripts print is the record: a task counts as sent when its producer says so,
and as done when a worker prints " [x] Done" after " [x] Received" it. In the end

- every task that was reported sent has been done at least once,
- whatever was done twice had been interrupted by a fault, or sent again by its producer because of one,
- nothing is left in the queue or among the dead letters,
- every worker still works, and leaves with exit status 0 when it is told to stop,
- no script has given up, or printed anything to stderr that is not a line of its own words.

The seed makes the plan; what a fault hits also depends on the machine's timing, so the same seed is the same storm, but
not the same raindrops.
"""

import argparse
import collections
import contextlib
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, TimeoutExpired

import pika
from node import Node, NodeError
from pika.exceptions import AMQPError, ChannelClosedByBroker
from processes import ROOT, Script
from tcp_proxy import TcpProxy

sys.path.insert(0, str(ROOT))
from task_queue import DEAD_LETTERS, QUEUE

# worker.py as its readers are told to use it: with a work() of their own. Shorter than one second per dot, as there
# are many tasks, but some of them longer than the heartbeat.
WORKER = """\
import sys, time
import worker
worker.work = lambda task: time.sleep(0.3 * task.count(b"."))
sys.exit(worker.main())
"""
LONG_TASK = "." * 10

# A stalled connection must be noticed within the run: after up to 2 * (2 s + 5 s) by pika, after 4 to 6 s by RabbitMQ.
HEARTBEAT_SECONDS = 2

# How long anything may take that comes by itself, such as a worker's return. Only what is broken takes that long.
PATIENCE = 60

# How long after " [x] Done" the acknowledgement may be under way (and a line, to us) on a busy machine: a fault in that
# time can make the task come back.
UNDER_WAY_SECONDS = 2

# The faults, how often each is chosen, and what the table says about it. An outage of RabbitMQ costs ten seconds.
FAULTS = {
    "worker-killed": (4, "kill -9, most of them in the middle of a task; another worker starts"),
    "worker-stopped": (4, "SIGTERM, most of them in the middle of a task; another worker starts"),
    "worker-frozen": (4, "SIGSTOP, and SIGCONT some seconds later"),
    "worker-cut": (4, "its connection to RabbitMQ is closed by the network"),
    "worker-stalled": (3, "its connection to RabbitMQ is silently dead from here on"),
    "producer-killed": (4, "kill -9 of a `new_task.py -` that has more to send"),
    "producer-interrupted": (3, "Ctrl+C on a `new_task.py -` that has more to send"),
    "producer-cut": (4, "its connection to RabbitMQ is closed by the network"),
    "producer-stalled": (2, "its connection to RabbitMQ is silently dead from here on"),
    "single-killed": (4, "kill -9 of a `new_task.py WORD ...` on its way"),
    "rabbitmq-killed": (2, "kill -9 while tasks are being sent, then started again"),
    "rabbitmq-stopped": (1, "SIGTERM while tasks are being sent, then started again"),
}


class Stuck(Exception):
    """Something did not happen in time. The message says what."""


@dataclass
class Fault:
    """A fault that took place: from `start` to `end` it could interrupt the scripts that it hit (None: all)."""

    kind: str
    hit: list | None
    start: float
    end: float

    def can_explain(self, script: Script, start: float, end: float) -> bool:
        """Tell whether this can have interrupted what the script did from start to end."""
        return (self.hit is None or script in self.hit) and self.start <= end and start <= self.end


@dataclass
class Doing:
    """One time that a worker did a task, or began to."""

    worker: Script
    received: float
    done: float | None = None


class Record:
    """What the workers have done, as they printed it."""

    RECEIVED = re.compile(r" \[x\] Received '(.*)'( \(redelivered\))?")

    def __init__(self):
        self.doings = collections.defaultdict(list)  # task -> what was done about it
        self.latest = {}  # worker -> its task and Doing that came last
        self.waiting = {}  # worker -> when it last said that it waits for tasks
        self.last_change = 0.0
        self._read = {}  # worker -> how many of its lines are taken note of

    def update(self, workers: list[Script]) -> None:
        """Take note of what these workers have printed since the last time."""
        for worker in workers:
            begin = self._read.get(worker, 0)
            lines = worker.lines[begin:]
            self._read[worker] = begin + len(lines)
            for line in lines:
                if line.stream == "stdout":
                    self._note(worker, line)

    def _note(self, worker: Script, line) -> None:
        self.last_change = line.at
        received = self.RECEIVED.fullmatch(line.text)
        if received:
            doing = Doing(worker, line.at)
            self.doings[received[1]].append(doing)
            self.latest[worker] = (received[1], doing)
        elif line.text == " [x] Done":
            self.latest[worker][1].done = line.at
        elif line.text.startswith(" [*] Waiting"):
            self.waiting[worker] = line.at

    def in_hand(self, worker: Script) -> str | None:
        """Return the task that a worker is working on."""
        task, doing = self.latest.get(worker, (None, None))
        return task if doing and doing.done is None else None

    def done(self, task: str) -> list[Doing]:
        """Return each time that a task was done."""
        return [doing for doing in self.doings.get(task, ()) if doing.done]


class Place:
    """Where a worker runs, or the next one after its end, and how it reaches RabbitMQ."""

    def __init__(self, number: int, node: Node):
        self.number = number
        self.proxy = TcpProxy(node.port) if number % 3 else None
        self.url = with_heartbeat((self.proxy or node).url)
        self.arguments = ["--graceful"] if number % 2 else []
        self.script = None
        self.frozen = False
        self.stopping = False  # whether it was told to stop
        self.reconnects_since = 0.0  # when it, or its connection, last began anew

    def __str__(self):
        return f"worker {self.number} (pid {self.script.process.pid})"


class Producer:
    """A new_task.py and the tasks that it was given."""

    def __init__(self, script: Script, proxied: bool, single: str | None = None):
        self.script, self.proxied, self.single = script, proxied, single
        self.given = {single: time.monotonic()} if single else {}  # task -> when
        self.started = time.monotonic()
        self.quota = 0  # after so many tasks its input ends
        self.ended_by_us = ""

    def give(self, tasks: list[str]) -> None:
        """Write tasks to its standard input."""
        self.given |= dict.fromkeys(tasks, time.monotonic())
        try:
            self.script.process.stdin.write("".join(f"{task}\n" for task in tasks).encode())
            self.script.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it printed tells which tasks are sent

    def end_of_input(self) -> None:
        """Let it know that there are no more tasks."""
        with contextlib.suppress(BrokenPipeError):
            self.script.process.stdin.close()

    @property
    def takes_tasks(self) -> bool:
        """Whether it runs and waits for more."""
        return not self.single and self.script.running and not self.script.process.stdin.closed

    def sent(self) -> list[str]:
        """Return the tasks that it has reported sent."""
        if self.single:
            return [self.single] if f" [x] Sent {self.single!r}" in self.script.output() else []
        if self.script.process.returncode == 0:
            return list(self.given)
        confirmed = re.search(r"The first (\d+) lines are confirmed", str(self.script))
        return list(self.given)[: int(confirmed[1])] if confirmed else []

    def complaint(self, faults: list[Fault]) -> str:
        """Return what is wrong with the way it ended, or nothing."""
        status, tasks = self.script.process.returncode, len(self.given)
        if status == 0 and not self.single and self.script.output() != [f" [x] Sent {tasks} tasks"]:
            return f"was given {tasks} tasks, but said {self.script.output()}"
        if status == 0 and self.single and not self.sent():
            return f"did not say that {self.single!r} is sent"
        if status == 0 or status == {"killed": -signal.SIGKILL, "interrupted": 1}.get(self.ended_by_us):
            return ""
        # It fails at once when it can't reach RabbitMQ, but only then.
        begin, end = self.started - UNDER_WAY_SECONDS, time.monotonic()
        if "can't reach RabbitMQ" in str(self.script) and any(f.can_explain(self.script, begin, end) for f in faults):
            return ""
        return f"gave up with exit status {status}: {self.script.output('stderr')}"


def ending_of(script: Script) -> str:
    """Return how a script has ended, with the last that it printed: more is in the folder that is kept."""
    lines = "".join(f"\n  {line.stream}: {line.text}" for line in script.lines[-6:])
    return f"exit status {script.process.poll()}, last lines:{lines}"


def with_heartbeat(url: str) -> str:
    """Return an AMQP URL with the heartbeat of this run."""
    return f"{url}?heartbeat={HEARTBEAT_SECONDS}"


class Run:
    """One run: RabbitMQ, workers, producers, and what happened to them."""

    def __init__(self, settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.random = random.Random(settings.seed)
        self.plan = make_plan(settings, self.random)
        self.began = time.monotonic()
        self.deadline = self.began + settings.limit
        self.node = Node(folder / "rabbitmq")
        self.places, self.producers, self.faults, self.broken = [], [], [], []
        self.workers: list[Script] = []  # all that ever ran
        self.record = Record()
        self.sending = {}  # whether through the proxy -> the producer that takes tasks
        self.tasks = 0  # how many there are so far
        self.interrupted = False  # whether the user wants it to end
        self.proxy = None  # between RabbitMQ and half of the producers
        self._later = []  # (when, what to do)
        self._failure = None  # why RabbitMQ did not come back
        self._outage = None  # the thread that brings RabbitMQ back
        self._ending = threading.Event()
        self._node_lock = threading.Lock()  # for starting RabbitMQ, or seeing to it that nobody does

    # The course of a run.

    def play(self) -> None:
        """Do it all. Stuck if something that must happen does not."""
        self.in_background(self.bring_up)
        self.wait_for_rabbitmq()
        (self.folder / "chaos_worker.py").write_text(WORKER)
        self.proxy = TcpProxy(self.node.port)
        self.places = [Place(number, self.node) for number in range(self.settings.workers)]
        for place in self.places:
            self.start_worker(place)
        self.wait_until(lambda: all(map(self.is_connected, self.places)), "every worker waits for tasks")
        for number, kind in enumerate(self.plan, 1):
            share = self.settings.tasks // len(self.plan) + (number <= self.settings.tasks % len(self.plan))
            getattr(self, kind.replace("-", "_"))(self.new_tasks(share))
        self.end_of_faults()
        self.roll_call()
        self.stop_workers(self.places)
        self.look_into_the_queues()

    def end_of_faults(self) -> None:
        """Let everything that was broken come back, and every task be sent and done."""
        self.wait_until(lambda: not self._later, "the frozen worker goes on")
        self.wait_for_rabbitmq()
        for producer in self.producers:
            if producer.takes_tasks:
                producer.end_of_input()
        self.wait_until(lambda: not any(p.script.running for p in self.producers), "every producer ends", 2 * PATIENCE)
        self.wait_until(lambda: all(map(self.is_connected, self.places)), "every worker is back")
        self.wait_until_all_is_done()

    def roll_call(self) -> None:
        """See to it that each worker does a task now: as many tasks as it takes for all to have had one."""
        begin = time.monotonic()

        def missing() -> list[Place]:
            doings = {place: self.record.latest.get(place.script) for place in self.places}
            return [place for place, latest in doings.items() if not latest or latest[1].received < begin]

        while missing():
            if time.monotonic() > begin + PATIENCE:
                self.broken += [f"{place} does not work any more, {ending_of(place.script)}" for place in missing()]
                return
            producer = self.start_producer(proxied=False)
            producer.give([self.new_task(".") for _ in self.places])
            producer.end_of_input()
            self.wait_until(lambda p=producer: not p.script.running, "a producer ends")
            self.wait_until_all_is_done()

    def stop_workers(self, places: list[Place]) -> None:
        """Tell workers to stop. They must, with exit status 0, and a graceful one with nothing in hand."""
        for place in places:
            place.stopping = True
            place.script.terminate()
        with contextlib.suppress(Stuck):  # it is told below which one
            self.wait_until(lambda: not any(place.script.running for place in places), "workers stop", 20)
        for place in places:
            if place.script.running:
                place.script.kill()
                self.broken.append(f"{place} did not stop when told: {ending_of(place.script)}")
            elif place.script.ends() != 0:
                self.broken.append(f"{place} was told to stop: {ending_of(place.script)}")
            self.record.update([place.script])
            if place.arguments and self.record.in_hand(place.script):
                self.broken.append(f"{place} stopped amid its task: {ending_of(place.script)}")

    def look_into_the_queues(self) -> None:
        """Nothing may be left, now that no worker holds a task."""
        self.wait_until(lambda: self.counts(QUEUE)[1] == 0, "RabbitMQ notices that all workers have gone")
        for queue in (QUEUE, DEAD_LETTERS):
            left, _ = self.counts(queue)
            if left:
                self.broken.append(f"{left} tasks are left in {queue}")

    # The faults. Each gets its share of new tasks, and sends them so that the fault hits where it hurts.

    def worker_killed(self, tasks) -> None:
        """Kill a worker."""
        place = self.a_worker_at_work(tasks)
        self.took_place("worker-killed", [place.script], self.with_task(place))
        place.script.kill()
        self.start_worker(place)

    def worker_stopped(self, tasks) -> None:
        """Ask a worker to stop, and wait until it does."""
        place = self.a_worker_at_work(tasks)
        fault = self.took_place("worker-stopped", [place.script], self.with_task(place))
        self.stop_workers([place])
        fault.end = time.monotonic()
        self.start_worker(place)

    def worker_frozen(self, tasks) -> None:
        """Let a worker stand still, as one does that is swapped out or on a suspended machine."""
        place = self.a_worker_at_work(tasks)
        pause = self.random.choice([1, 3 * HEARTBEAT_SECONDS])  # RabbitMQ does not notice the first, but the second
        fault = self.took_place(
            "worker-frozen", [place.script], f"{self.with_task(place)}, for {pause} s", endless=True
        )
        place.frozen = True
        place.script.process.send_signal(signal.SIGSTOP)

        def thaw() -> None:
            place.script.process.send_signal(signal.SIGCONT)
            place.frozen = False
            fault.end = time.monotonic() + UNDER_WAY_SECONDS

        self._later.append((time.monotonic() + pause, thaw))

    def worker_cut(self, tasks) -> None:
        """Cut a worker's connection."""
        place = self.a_worker_at_work(tasks, proxied=True)
        place.reconnects_since = time.monotonic()
        self.took_place("worker-cut", [place.script], self.with_task(place), place.proxy.cut)

    def worker_stalled(self, tasks) -> None:
        """Let no byte through a worker's connection any more. verdict() knows when that ends: with its next one."""
        place = self.a_worker_at_work(tasks, proxied=True)
        place.reconnects_since = time.monotonic()
        self.took_place("worker-stalled", [place.script], self.with_task(place), place.proxy.stall, endless=True)

    def producer_killed(self, tasks) -> None:
        """Kill a producer."""
        producer = self.a_producer_amid(tasks, proxied=self.random.random() < 0.5)
        self.took_place("producer-killed", [producer.script], f"pid {producer.script.process.pid}")
        producer.ended_by_us = "killed"
        producer.script.kill()

    def producer_interrupted(self, tasks) -> None:
        """Press Ctrl+C on a producer, which must tell then what is confirmed."""
        producer = self.a_producer_amid(tasks, proxied=self.random.random() < 0.5)
        self.took_place("producer-interrupted", [producer.script], f"pid {producer.script.process.pid}")
        producer.ended_by_us = "interrupted"
        producer.script.ctrl_c()
        self.wait_until(lambda: not producer.script.running, "a producer ends on Ctrl+C", 10)

    def producer_cut(self, tasks) -> None:
        """Cut the connections of all producers that are behind the proxy."""
        self.a_producer_amid(tasks, proxied=True)
        hit = self.behind_the_proxy()
        self.took_place("producer-cut", hit, "", self.proxy.cut)

    def producer_stalled(self, tasks) -> None:
        """Let no byte through these connections any more."""
        self.a_producer_amid(tasks, proxied=True)
        hit = self.behind_the_proxy()
        self.took_place("producer-stalled", hit, "", self.proxy.stall, endless=True)
        # It takes a while to notice and to send its tasks again; the faults to come shall not wait for that.
        self.sending.pop(True).end_of_input()

    def single_killed(self, tasks) -> None:
        """Kill a producer of one task, somewhere between its start and its end."""
        *tasks, single = tasks
        pause, proxied = self.random.uniform(0.1, 0.5), self.random.random() < 0.5
        self.send(tasks)
        producer = self.start_producer(proxied, single)
        with contextlib.suppress(TimeoutExpired):
            while True:
                producer.script.process.wait(pause)
                pause /= 2  # this one was faster: then the next one, sooner
                producer = self.start_producer(proxied, self.new_task())
        self.took_place("single-killed", [producer.script], f"with {producer.single!r}")
        producer.ended_by_us = "killed"
        producer.script.kill()

    def rabbitmq_killed(self, tasks) -> None:
        """Kill RabbitMQ: in half of the cases when the first of the tasks has come through, else at any moment."""
        fault = self.outage("rabbitmq-killed", tasks, at_first_task=self.random.random() < 0.5)
        self.node.kill()
        self.in_background(self.bring_back, fault, self.random.uniform(0, 2))

    def rabbitmq_stopped(self, tasks) -> None:
        """Stop RabbitMQ in good order. That takes seconds, in which other faults may come."""
        fault = self.outage("rabbitmq-stopped", tasks, at_first_task=True)
        self.in_background(self.bring_back, fault, self.random.uniform(0, 2))

    def outage(self, kind: str, tasks, at_first_task: bool) -> Fault:
        """Return the fault, when it is time for it: while a producer sends the tasks."""
        self.wait_for_rabbitmq()
        pause = self.random.uniform(0, 0.05)
        producer = self.a_producer_at_work(proxied=False)
        producer.give(tasks)
        if at_first_task:
            given = set(tasks)
            self.wait_until(lambda: given & self.record.doings.keys(), "the first of many tasks is received")
        else:
            time.sleep(pause)
        for place in self.places:
            place.reconnects_since = time.monotonic()
        return self.took_place(kind, None, "", endless=True)

    def bring_back(self, fault: Fault, pause: float) -> None:
        """See RabbitMQ's end and start it again after a pause. Other faults go on meanwhile."""
        self.node.stop()
        if not self._ending.wait(pause):
            self.bring_up()
            fault.end = time.monotonic() + UNDER_WAY_SECONDS

    def bring_up(self) -> None:
        """Start RabbitMQ, unless the run is at its end."""
        with self._node_lock:
            if self._ending.is_set():
                return
            self.node.launch()
        self.node.wait_until_ready()

    def in_background(self, function, *arguments) -> None:
        """Do something to RabbitMQ in a thread of its own."""

        def do() -> None:
            try:
                function(*arguments)
            except (NodeError, OSError) as error:
                self._failure = str(error)

        self._outage = threading.Thread(target=do)
        self._outage.start()

    # What the faults need.

    def took_place(self, kind: str, hit, what: str, break_connections=None, endless: bool = False) -> Fault:
        """Take down and print a fault that comes at once. break_connections() brings it about, and tells how many."""
        now = time.monotonic()
        if break_connections and not break_connections():
            raise Stuck(f"there was no connection for {kind}")
        self.faults.append(Fault(kind, hit, now, float("inf") if endless else now))
        print(f"{now - self.began:7.1f} s  {len(self.faults):3}/{len(self.plan)}  {kind:22}{what}", flush=True)
        return self.faults[-1]

    def with_task(self, place: Place) -> str:
        """Return a worker with what it has in hand, for printing."""
        self.record.update([place.script])
        task = self.record.in_hand(place.script)
        return f"{place}" + (f", working on {task!r}" if task else "")

    def a_worker_at_work(self, tasks, proxied: bool = False) -> Place:
        """Send the tasks, and return a worker: in most cases one that is in the middle of a task, else any one."""
        busy = self.random.random() < 0.75
        choice, pause = self.random.random(), self.random.uniform(0, 0.1)
        self.send(tasks)

        def candidates() -> list[Place]:
            return [
                place
                for place in self.places
                if self.is_connected(place)
                and not place.frozen
                and (place.proxy or not proxied)
                and (not busy or "." in (self.record.in_hand(place.script) or ""))
            ]

        self.wait_until(lambda: candidates() or self.bait(busy), "a worker is fit for a fault")
        found = candidates()
        if not busy:
            time.sleep(pause)
        return found[int(choice * len(found))]

    def bait(self, busy: bool) -> None:
        """Send a task that takes a while, now and then, if a busy worker is wanted and there is none."""
        if busy and time.monotonic() - self.record.last_change > 1:
            self.record.last_change = time.monotonic()
            self.send([self.new_task(".") for _ in self.places], mostly=False)

    def a_producer_at_work(self, proxied: bool) -> Producer:
        """Return the producer that takes tasks, once a task has come through it just now."""
        probes = {}  # producer -> a task that it was given

        def is_at_work() -> bool:
            producer = self.producer(proxied)  # another one than before, if that could not reach RabbitMQ
            if producer not in probes:
                probes[producer] = self.new_task()
                producer.give([probes[producer]])
            return probes[producer] in self.record.doings

        self.wait_until(is_at_work, "a producer's task is received")
        return self.sending[proxied]

    def a_producer_amid(self, tasks, proxied: bool) -> Producer:
        """Give the tasks to a producer, and return it when it has sent none, some, or all of them."""
        pause = self.random.uniform(0, 0.02)
        producer = self.a_producer_at_work(proxied)
        producer.give(tasks)
        time.sleep(pause)
        return producer

    def behind_the_proxy(self) -> list[Script]:
        """Return the producers that a fault of the proxy hits."""
        return [p.script for p in self.producers if p.proxied and p.script.running]

    def is_connected(self, place: Place) -> bool:
        """Whether a worker has said that it waits for tasks since its last disturbance."""
        return self.record.waiting.get(place.script, 0) > place.reconnects_since

    def start_worker(self, place: Place) -> None:
        """Start a worker in this place."""
        place.stopping = False
        place.reconnects_since = time.monotonic()
        command = (str(self.folder / "chaos_worker.py"), *place.arguments)
        paths = [("PYTHONPATH", str(self.settings.scripts))]
        place.script = Script(*command, url=place.url, cwd=self.settings.scripts, environment=paths)
        self.workers.append(place.script)

    def start_producer(self, proxied: bool, single: str | None = None) -> Producer:
        """Start a new_task.py with a single task on its command line, or one that takes them from standard input."""
        url = with_heartbeat((self.proxy if proxied else self.node).url)
        stdin = {} if single else {"stdin": PIPE}
        script = Script("new_task.py", single or "-", url=url, cwd=self.settings.scripts, **stdin)
        self.producers.append(Producer(script, proxied, single))
        return self.producers[-1]

    def producer(self, proxied: bool) -> Producer:
        """Return a producer that takes tasks: the one that did so before, or a new one when that had enough."""
        producer = self.sending.get(proxied)
        if producer and producer.takes_tasks and len(producer.given) >= producer.quota:
            producer.end_of_input()
        if not producer or not producer.takes_tasks:
            producer = self.sending[proxied] = self.start_producer(proxied)
            producer.quota = max(50, self.settings.tasks // 30)
        return producer

    def send(self, tasks: list[str], mostly: bool | None = None) -> None:
        """Spread tasks over the producers: one to a new_task.py of its own, the others to the two that take many.

        mostly: the one of these two that gets them all.
        """
        tasks = list(tasks)
        if tasks and mostly is None:
            self.start_producer(len(self.producers) % 2 == 1, tasks.pop())
            self.producer(True).give(tasks[::2])
            self.producer(False).give(tasks[1::2])
        elif tasks:
            self.producer(mostly).give(tasks)

    def new_task(self, dots: str = "") -> str:
        """Return a task that there was not before."""
        self.tasks += 1
        return f"task {self.tasks} {dots}".strip()

    def new_tasks(self, number: int) -> list[str]:
        """Return tasks: most of them take no time, some of them a moment, and a few longer than the heartbeat."""
        return [self.new_task(*self.random.choices(["", ".", LONG_TASK], [87, 12, 1])) for _ in range(number)]

    # Waiting.

    def wait_until(self, condition, what: str, within: float = PATIENCE) -> None:
        """Return when condition() holds. Meanwhile do what is due."""
        deadline = min(time.monotonic() + within, self.deadline)
        self.tick()
        while not condition():
            if time.monotonic() > deadline:
                limit = " (the run's time is over)" if deadline == self.deadline else f" within {within} s"
                raise Stuck(f"waited in vain for this: {what}{limit}")
            time.sleep(0.02)
            self.tick()

    def tick(self) -> None:
        """Do what is due."""
        if self.interrupted:
            raise KeyboardInterrupt
        if self._failure:
            raise Stuck(self._failure)
        self.record.update(self.workers)
        due = [item for item in self._later if item[0] <= time.monotonic()]
        for item in due:
            self._later.remove(item)
            item[1]()
        for place in self.places:
            if place.script and not place.script.running and not place.stopping:
                self.broken.append(f"{place} ended by itself, {ending_of(place.script)}")
                self.start_worker(place)

    def wait_for_rabbitmq(self) -> None:
        """Return when RabbitMQ is back."""
        if self._outage:
            self.wait_until(lambda: not self._outage.is_alive(), "RabbitMQ is back", 120)

    def wait_until_all_is_done(self) -> None:
        """Return when no task waits, and none is in a worker's hands."""

        def idle() -> bool:
            at_work = any(self.record.in_hand(place.script) for place in self.places)
            quiet = time.monotonic() - self.record.last_change > 1
            return quiet and not at_work and self.counts(QUEUE)[0] == 0

        self.wait_until(idle, "all tasks are taken and done", PATIENCE + self.tasks / 50)

    def counts(self, queue: str) -> tuple[int, int]:
        """Return how many tasks wait in a queue, and how many workers it has."""
        with pika.BlockingConnection(pika.URLParameters(self.node.url)) as connection:
            try:
                found = connection.channel().queue_declare(queue, passive=True).method
            except ChannelClosedByBroker:  # there is no such queue
                return 0, 0
            return found.message_count, found.consumer_count

    # The end.

    def scripts(self) -> list[Script]:
        """Return every script that ever ran."""
        return [*self.workers, *(producer.script for producer in self.producers)]

    def close(self) -> None:
        """End everything that this run has started."""
        self._ending.set()
        for producer in self.producers:
            if producer.script.running:
                producer.ended_by_us = "killed"
        for script in self.scripts():
            script.kill()
        with self._node_lock:
            self.node.close()
        if self._outage:
            self._outage.join()
        for proxy in [self.proxy, *(place.proxy for place in self.places)]:
            if proxy:
                proxy.close()

    def verdict(self) -> int:
        """Print the table of faults and the tally; return the exit status."""
        self.record.update(self.workers)
        self.end_the_stalls()
        sent = [task for producer in self.producers for task in producer.sent()]
        lost = [task for task in sent if not self.record.done(task)]
        done = [task for task in self.record.doings if self.record.done(task)]
        twice = [task for task in done if len(self.record.done(task)) > 1]
        self.complain(lost, twice)
        self.print_faults()
        print(f"\n{self.tasks:6} tasks given to {len(self.producers)} producers")
        print(f"{len(sent):6} reported sent\n{len(done):6} done\n{len(twice):6} done twice or more")
        print(f"{len(lost):6} lost", flush=True)
        for line in self.broken:
            print(f" [!] {line}", file=sys.stderr)
        if not self.broken:
            print(f" [x] No task was lost (seed {self.settings.seed})")
        return 1 if self.broken else 0

    def end_the_stalls(self) -> None:
        """A stall lasted until its worker had a new connection."""
        for fault in self.faults:
            if fault.kind == "worker-stalled":
                lines = [line.at for line in fault.hit[0].lines if "Waiting for messages" in line.text]
                fault.end = min((at for at in lines if at > fault.start), default=fault.end)

    def complain(self, lost: list[str], twice: list[str]) -> None:
        """Take down every broken promise."""
        if lost:
            self.broken.append(f"{len(lost)} tasks were reported sent and never done: {', '.join(map(repr, lost))}")
        self.broken += [
            f"{task!r} was done twice without a reason: {why}" for task in twice if (why := self.no_reason(task))
        ]
        for producer in self.producers:
            complaint = producer.script.running is False and producer.complaint(self.faults)
            if complaint:
                self.broken.append(f"the producer of {list(producer.given)[:3]}...: {complaint}")
        for script in self.scripts():
            odd = [line for line in script.lines if line.stream == "stderr" and not self.is_expected(script, line)]
            if odd:
                self.broken.append(
                    f"unexpected on stderr: {odd[0].text!r}, pid {script.process.pid}, {ending_of(script)}"
                )

    def is_expected(self, script: Script, line) -> bool:
        """Tell whether a line on stderr is in the script's own words, and a fault explains it."""
        if line.text.startswith((" [!] Stopped by", " [!] Not sent: interrupted")):
            return True
        begin = line.at - UNDER_WAY_SECONDS
        return line.text.startswith(" [!] ") and any(f.can_explain(script, begin, line.at) for f in self.faults)

    def no_reason(self, task: str) -> str:
        """Return what tells that a task was done too often, or nothing if faults explain each time but the last."""
        doings = self.record.done(task)
        undisturbed = [
            doing
            for doing in doings
            if not any(
                fault.can_explain(doing.worker, doing.received - UNDER_WAY_SECONDS, doing.done + UNDER_WAY_SECONDS)
                for fault in self.faults
            )
        ]
        producer = next(producer for producer in self.producers if task in producer.given)
        # A producer that sends again, after a fault, says so: with its last line, or before it.
        end = max((line.at for line in producer.script.lines), default=0)
        again = [f for f in self.faults if f.can_explain(producer.script, producer.given[task], end)]
        if len(undisturbed) <= 1 + len(again):
            return ""
        return ", ".join(f"{d.done - self.began:.1f} s by pid {d.worker.process.pid}" for d in doings)

    def print_faults(self) -> None:
        """Print how often each kind of fault took place."""
        counted = collections.Counter(fault.kind for fault in self.faults)
        print("\nfault                 times")
        for kind, (_, what) in FAULTS.items():
            print(f"{kind:22}{counted[kind]:5}   {what}")

    def write_down(self) -> None:
        """Leave all that the scripts printed in the folder, beside RabbitMQ's logs."""
        for script in self.scripts():
            lines = [f"{line.at - self.began:8.3f} {line.stream}: {line.text}\n" for line in script.lines]
            kind = "worker" if script in self.workers else "producer"
            (self.folder / f"{kind}-{script.process.pid}.log").write_text("".join(lines))


def make_plan(settings, chance: random.Random) -> list[str]:
    """Return the kinds of faults to come, in order: each one at least once, if there are enough of them."""
    kinds = chance.sample(settings.kinds, len(settings.kinds))[: settings.faults]
    more = chance.choices(settings.kinds, [FAULTS[kind][0] for kind in settings.kinds], k=settings.faults - len(kinds))
    return chance.sample(kinds + more, settings.faults)


def arguments():
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3000, help="how many tasks to send, at least (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10000), help="which faults come, and when (random)"
    )
    parser.add_argument("--workers", type=int, default=5, help="how many workers at a time (%(default)s)")
    parser.add_argument("--faults", type=int, help="how many faults (one for 50 tasks, and one of each kind)")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="which faults, separated by commas (all)")
    parser.add_argument("--scripts", type=Path, default=ROOT, help="folder of the scripts to try (%(default)s)")
    parser.add_argument(
        "--limit", type=float, help="end after so many seconds, as a failure (120, and 10 for each fault)"
    )
    found = parser.parse_args()
    found.kinds = found.kinds.split(",")
    unknown = [kind for kind in found.kinds if kind not in FAULTS]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}. There are: {', '.join(FAULTS)}")
    if found.workers < 2 or found.tasks < 1:
        parser.error("at least 2 workers and 1 task, please")
    found.faults = found.faults or max(found.tasks // 50, len(found.kinds))
    found.limit = found.limit or 120 + 10 * found.faults
    found.scripts = found.scripts.resolve()
    return found


def main() -> int:
    """Make one run; return the exit status."""
    settings = arguments()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {settings.seed}: {settings.tasks} tasks, {settings.workers} workers, {settings.faults} faults")
    run = Run(settings, folder)

    def interrupt(*_) -> None:
        run.interrupted = True  # and no exception at any place: what is just being started must be known, to be ended

    # Set explicitly, as a shell lets `make chaos &` and all its children ignore Ctrl+C.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    status = 1
    try:
        try:
            run.play()
        except (Stuck, NodeError, AMQPError) as problem:
            run.broken.append(str(problem) or repr(problem))
        finally:
            run.close()
        status = run.verdict()
    except KeyboardInterrupt:
        print(" [!] Interrupted", file=sys.stderr)
    if status == 0 or not run.broken:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        run.write_down()
        print(f" [!] Seed {settings.seed}. What the scripts printed, and RabbitMQ's logs: {folder}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
