#!/usr/bin/env python3
"""Chaos: send tasks while everything breaks, then count. The exit status is 0 if no promise was broken, 1 otherwise.

    python tools/chaos.py                         3000 tasks, 60 faults, in about three minutes
    python tools/chaos.py --seed 7 --tasks 500    a shorter run; the seed makes the plan, the machine's timing the rest

Workers do tasks from producers, on a RabbitMQ that is started for this run, and one fault after the other hits them.
What they print is the record: a task is sent when its producer says so, and done when a worker says so. In the end

- every task that was reported sent has been done,
- every task that was done twice is explained by a fault (Run.is_explained tells how),
- nothing is left in the queue or among the dead letters,
- every worker still works, and leaves with exit status 0 when it is told to stop,
- no producer has given up, but for those that were killed or interrupted,
- every line on stderr begins with " [!] ".
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
from subprocess import PIPE

import pika
from node import Node, NodeError
from processes import ROOT, Line, Script, wait_until
from tcp_proxy import TcpProxy

sys.path.insert(0, str(ROOT))
from task_queue import DEAD_LETTERS, QUEUE

# worker.py as its readers are told to use it: with a work() of their own. There are many tasks, so a dot is shorter.
WORKER = """\
import sys, time, worker
worker.work = lambda task: time.sleep(0.3 * task.count(b"."))
sys.exit(worker.main())
"""

# A stalled connection must be noticed within the run: after up to 2 * (2 s + 5 s) by pika, after 4 to 6 s by RabbitMQ.
HEARTBEAT_SECONDS = 2

# How long anything may take that comes by itself, such as a worker's return. Only what is broken takes that long.
PATIENCE = 60

# How long a line may be on its way to us, or an acknowledgement to RabbitMQ, on a busy machine.
ON_ITS_WAY_SECONDS = 2

# The faults: how often each is chosen (an outage of RabbitMQ costs seconds), and what the table says about it.
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

# No reason to do a task twice: a producer that has ended sends nothing again, a worker acknowledges before it stops.
NO_REASON = ("worker-stopped", "producer-killed", "producer-interrupted", "single-killed")


class Proxied(Script):
    """A script with a connection of its own to RabbitMQ, which can be broken."""

    def __init__(self, run: "Run", *command: str, **settings):
        self.may_end_with = {0}  # exit status
        self.proxy = TcpProxy(run.node.port)
        url = f"{self.proxy.url}?heartbeat={HEARTBEAT_SECONDS}"
        super().__init__(*command, url=url, cwd=run.settings.scripts, **settings)
        self.name = f"{type(self).__name__.lower()} {self.process.pid}"

    def ending(self) -> str:
        """Return how it has ended, with the last that it printed. All of it is in the folder that is kept."""
        lines = "".join(f"\n  {line.stream}: {line.text}" for line in self.lines[-6:])
        return f"{self.name}, exit status {self.process.poll()}, last lines:{lines}"


@dataclass
class Doing:
    """One time that a worker received a task, and did it or not."""

    task: str
    worker: Script
    received: float
    done: float | None = None


class Worker(Proxied):
    """A worker.py."""

    def __init__(self, run: "Run", graceful: bool):
        self.graceful, self.all_doings = graceful, run.doings
        self.doing: Doing | None = None  # its last one
        super().__init__(run, "-c", WORKER, *["--graceful"] * graceful, see=self._take_note)

    def _take_note(self, line: Line) -> None:
        if received := re.fullmatch(r" \[x\] Received '(.*)'( \(redelivered\))?", line.text):
            self.doing = Doing(received[1], self, line.at)
            self.all_doings.append(self.doing)
        elif line.text == " [x] Done":
            self.doing.done = line.at

    def in_hand(self) -> str | None:
        """Return the task that it is working on."""
        return self.doing.task if self.doing and not self.doing.done else None

    def is_unfinished(self) -> bool:
        """Tell whether it has stopped too early."""
        return self.graceful and self.in_hand() is not None


class Producer(Proxied):
    """A new_task.py, and the tasks that it was given: one on its command line, or many on its standard input."""

    def __init__(self, run: "Run", single: str | None):
        self.single = single
        self.given = {single: time.monotonic()} if single else {}  # task -> when
        super().__init__(run, "new_task.py", single or "-", stdin=PIPE)

    def give(self, tasks: list[str]) -> None:
        """Write tasks to its standard input."""
        self.given |= dict.fromkeys(tasks, time.monotonic())
        self.process.stdin.write("".join(f"{task}\n" for task in tasks).encode())
        self.process.stdin.flush()

    def sent(self) -> list[str]:
        """Return the tasks that it has reported sent."""
        every_one = f" [x] Sent {self.single!r}" if self.single else f" [x] Sent {len(self.given)} tasks"
        if self.output() == [every_one]:
            return list(self.given)
        confirmed = re.search(r"The first (\d+) lines are confirmed", str(self))
        return list(self.given)[: int(confirmed[1])] if confirmed else []

    def is_unfinished(self) -> bool:
        """Tell whether it has not reported all of its tasks sent."""
        return self.sent() != list(self.given)


@dataclass
class Fault:
    """A fault that took place, from `start` to `end`. victim: the script that it hit; None: all of them."""

    kind: str
    victim: Proxied | None
    start: float
    end: float

    def explains(self, script: Script, start: float, end: float) -> bool:
        """Tell whether it has hit a script between start and end, and can have doubled what that did then."""
        in_time = self.start <= end + ON_ITS_WAY_SECONDS and start - ON_ITS_WAY_SECONDS <= self.end
        return in_time and self.victim in (None, script) and self.kind not in NO_REASON


class Run:
    """One run: RabbitMQ, workers, producers, and what happened to them."""

    def __init__(self, settings, folder: Path):
        self.settings = settings
        self.random = random.Random(settings.seed)
        kinds, weights = settings.kinds, [FAULTS[kind][0] for kind in settings.kinds]
        plan = self.random.sample(kinds, len(kinds))[: settings.faults]  # each one at least once
        plan += self.random.choices(kinds, weights, k=settings.faults - len(plan))
        self.plan = self.random.sample(plan, len(plan))
        self.began = time.monotonic()
        self.node = Node(folder / "rabbitmq")
        self.workers: list[Worker] = []  # all that ever ran
        self.crew: list[Worker] = []  # those that should run now
        self.doings: list[Doing] = []
        self.producers: list[Producer] = []
        self.faults: list[Fault] = []
        self.broken: list[str] = []  # what is wrong
        self.tasks = 0  # how many there are so far
        self.interrupted = threading.Event()  # the user wants it to end

    def play(self) -> None:
        """Do it all. AssertionError if something that must happen does not."""
        self.node.start()
        for _ in range(self.settings.workers):
            self.start_worker()
        for kind in self.plan:
            self.play_fault(kind)
        self.roll_call()
        self.wait_until(self.is_idle, "all tasks are sent and done", 2 * PATIENCE + self.tasks / 50)
        self.stop(self.crew)
        self.wait_until(lambda: self.counts(QUEUE)[1] == 0, "RabbitMQ notices that all workers have gone")
        left = {queue: self.counts(queue)[0] for queue in (QUEUE, DEAD_LETTERS)}
        self.broken += [f"{number} tasks are left in {queue}" for queue, number in left.items() if number]

    def play_fault(self, kind: str) -> None:
        """Let a fault come while its share of the tasks is being sent: one task before, and one after it."""
        share = max(4, round(self.settings.tasks / len(self.plan)))
        # Most tasks take no time, some of them a moment, and a few longer than the heartbeat.
        dots = self.random.choices(["", ".", "." * 10], [87, 12, 1], k=share)
        first, alone, last, *tasks = map(self.new_task, dots)
        producer = self.start_producer()
        self.start_producer(alone)
        producer.give([first])
        self.taker_of(first)
        self.taker_of(alone)  # before that they fail, as they must, if they can't reach RabbitMQ
        victim = self.choose(kind, producer, tasks)
        now = time.monotonic()
        self.faults.append(Fault(kind, victim, now, now))
        who = victim.name + (f", working on {victim.in_hand()!r}" if victim in self.crew and victim.in_hand() else "")
        print(f"{now - self.began:7.1f} s  {len(self.faults):3}/{len(self.plan)}  {kind:22}{who}", flush=True)
        self.strike(self.faults[-1], victim)
        if victim in self.crew and not victim.running:
            self.crew.remove(victim)
            self.start_worker()
        with contextlib.suppress(BrokenPipeError):  # this producer was the victim, and has ended
            producer.give([last])
            producer.process.stdin.close()

    def roll_call(self) -> None:
        """See to it that each worker takes a task now: as many tasks as it takes for all to have had one."""
        begin = time.monotonic()
        producer = self.start_producer()
        while missing := [w for w in self.crew if not w.doing or w.doing.received < begin]:
            assert time.monotonic() < begin + PATIENCE, f"takes no tasks any more: {missing[0].ending()}"
            tasks = [self.new_task(".") for _ in self.crew]
            producer.give(tasks)
            self.taker_of(tasks[-1])
        producer.process.stdin.close()

    def is_idle(self) -> bool:
        """Tell whether no task is with a producer, in the queue, in a worker's hands, or on its way there."""
        quiet = time.monotonic() - max(worker.lines[-1].at for worker in self.crew) > 1
        busy = any(producer.running for producer in self.producers) or any(worker.in_hand() for worker in self.crew)
        return quiet and not busy and self.counts(QUEUE)[0] == 0

    def close(self) -> None:
        """End everything that this run has started."""
        for script in self.workers + self.producers:
            if script.running:
                script.kill()
                script.may_end_with = {-signal.SIGKILL}  # what kept the run from its end is told elsewhere
            script.ends()
            script.proxy.close()
        self.node.close()

    def choose(self, kind: str, producer: Producer, tasks: list[str]) -> Proxied:
        """Give tasks to a producer that has sent one already. Return the victim of a fault, when it is time for it."""
        longer = self.new_task("...")
        producer.give([longer, *tasks])
        if kind.startswith("single"):
            return self.single_on_its_way()
        if kind.startswith("worker"):  # most of them in the middle of a longer task, the others at any moment
            worker = self.taker_of(longer if self.random.random() < 0.75 else self.random.choice(tasks))
            time.sleep(self.random.uniform(0, 0.1))
            return worker
        if self.random.random() < 0.5:
            self.taker_of(longer)  # it is still sending the others, if they are many
        else:
            time.sleep(self.random.uniform(0, 0.05))
        return producer

    def single_on_its_way(self) -> Producer:
        """Return a producer of one task, somewhere between its start and its end."""
        pause = self.random.uniform(0.1, 0.5)
        while True:
            single = self.start_producer(self.new_task())
            time.sleep(pause)
            if single.running:
                return single
            pause /= 2  # it was faster than this

    def strike(self, fault: Fault, victim: Proxied) -> None:
        """Do to the victim what the fault is."""
        assert victim.proxy.connections or fault.kind == "single-killed", f"{victim.name} has no connection"
        match fault.kind:
            case "worker-killed" | "producer-killed" | "single-killed":
                victim.kill()
                victim.may_end_with = {0, -signal.SIGKILL}  # 0: it was just about to end
            case "worker-stopped":
                self.stop([victim])
            case "worker-frozen":
                pause = self.random.choice([1, 3 * HEARTBEAT_SECONDS])  # RabbitMQ notices the second, not the first
                victim.process.send_signal(signal.SIGSTOP)
                thaw = threading.Timer(pause, victim.process.send_signal, [signal.SIGCONT])
                thaw.daemon = True
                thaw.start()
                fault.end += pause
            case "worker-cut" | "producer-cut":
                victim.proxy.cut()
            case "worker-stalled" | "producer-stalled":
                victim.proxy.stall()
            case "producer-interrupted":
                victim.ctrl_c()
                victim.may_end_with = {1}
                self.wait_until(lambda: not victim.running, "a producer ends on Ctrl+C", 10)
            case "rabbitmq-killed" | "rabbitmq-stopped":
                fault.victim, fault.end = None, float("inf")
                self.node.kill() if fault.kind == "rabbitmq-killed" else self.node.stop()
                self.node.start()
                fault.end = time.monotonic()

    def stop(self, workers: list[Worker]) -> None:
        """Tell workers to stop, and see them do so."""
        for worker in workers:
            worker.terminate()
        self.wait_until(lambda: not any(worker.running for worker in workers), "workers stop when they are told to", 20)

    def start_worker(self) -> None:
        """Start a worker. Every other one is graceful."""
        self.workers.append(Worker(self, graceful=len(self.workers) % 2 == 1))
        self.crew.append(self.workers[-1])

    def start_producer(self, single: str | None = None) -> Producer:
        """Start a new_task.py with a single task on its command line, or one that takes them from standard input."""
        self.producers.append(Producer(self, single))
        return self.producers[-1]

    def new_task(self, dots: str = "") -> str:
        """Return a task that there was not before."""
        self.tasks += 1
        return f"task {self.tasks} {dots}".strip()

    def taker_of(self, task: str) -> Worker:
        """Return the worker that has received a task, as soon as one has."""
        takers = self.wait_until(lambda: [d.worker for d in self.doings if d.task == task], f"a worker takes {task!r}")
        return takers[-1]

    def wait_until(self, condition, what: str, within: float = PATIENCE):
        """Return what condition() returns, once it holds; AssertionError if that takes too long, or on Ctrl+C."""
        # In short steps: a fault must come while its victim is still at it.
        found = wait_until(lambda: self.interrupted.is_set() or condition(), what, within, pause=0.01)
        assert not self.interrupted.is_set(), "interrupted"
        return found

    def counts(self, queue: str) -> tuple[int, int]:
        """Return how many tasks wait in a queue, and how many workers it has."""
        connection = pika.BlockingConnection(pika.URLParameters(self.node.url))
        with connection, contextlib.suppress(pika.exceptions.ChannelClosedByBroker):  # there is no such queue
            found = connection.channel().queue_declare(queue, passive=True).method
            return found.message_count, found.consumer_count
        return 0, 0

    # The verdict, once everything has ended.

    def verdict(self) -> bool:
        """Print the table of faults, the tally, and what is wrong. Tell whether nothing is."""
        doings = [doing for doing in self.doings if doing.done]
        done = collections.Counter(doing.task for doing in doings)
        sent = [task for producer in self.producers for task in producer.sent()]
        lost = [task for task in sent if task not in done]
        twice = [task for task, times in done.items() if times > 1]
        if lost:
            self.broken.append(f"{len(lost)} tasks were reported sent and never done: {', '.join(map(repr, lost))}")
        for task in twice:
            if not self.is_explained(task, [doing for doing in doings if doing.task == task]):
                self.broken.append(f"{task!r} was done {done[task]} times, and no fault explains that")
        for script in self.workers + self.producers:
            status, odd = script.process.returncode, [t for t in script.output("stderr") if not t.startswith(" [!] ")]
            if status not in script.may_end_with or (status == 0 and script.is_unfinished()) or odd:
                self.broken.append(f"ended or spoke as it must not: {script.ending()}")
        faults = collections.Counter(fault.kind for fault in self.faults)
        print("\nfault                 times")
        for kind, (_, what) in FAULTS.items():
            print(f"{kind:22}{faults[kind]:5}   {what}")
        print(f"\n{self.tasks:6} tasks given to {len(self.producers)} producers\n{len(sent):6} reported sent")
        print(f"{len(done):6} done\n{len(twice):6} done twice or more\n{len(lost):6} lost", flush=True)
        for line in self.broken:
            print(f" [!] {line}", file=sys.stderr)
        if not self.broken:
            print(f" [x] No task was lost (seed {self.settings.seed})")
        return not self.broken

    def is_explained(self, task: str, doings: list[Doing]) -> bool:
        """Tell whether faults explain how often a task was done. Once needs no reason.

        Its producer may have sent it once more for each fault that hit the producer before that ended or a worker had
        the task. Each worker that was hit between Received and Done may not have acknowledged it: then it comes back.
        """
        producer = next(producer for producer in self.producers if task in producer.given)
        sent = min([doing.received for doing in doings] + [line.at for line in producer.lines[-1:]])
        resent = [fault for fault in self.faults if fault.explains(producer, producer.given[task], sent)]
        returned = [d for d in doings if any(fault.explains(d.worker, d.received, d.done) for fault in self.faults)]
        return len(doings) <= 1 + len(resent) + len(returned)


def arguments():
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3000, help="how many tasks to send, about (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10000), help="which faults come, when (random)")
    parser.add_argument("--workers", type=int, default=5, help="how many workers at a time (%(default)s)")
    parser.add_argument("--faults", type=int, help="how many faults (one for 50 tasks, and one of each kind)")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="which faults, separated by commas (all)")
    parser.add_argument("--scripts", type=Path, default=ROOT, help="folder of the scripts to try (%(default)s)")
    found = parser.parse_args()
    found.kinds = found.kinds.split(",")
    if not set(found.kinds) <= set(FAULTS):
        parser.error(f"no such kind of fault. There are: {', '.join(FAULTS)}")
    found.faults = found.faults or max(found.tasks // 50, len(found.kinds))
    return found


def main() -> int:
    """Make one run; return the exit status."""
    settings = arguments()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {settings.seed}: {settings.tasks} tasks, {settings.workers} workers, {settings.faults} faults")
    run = Run(settings, folder)
    # A flag: what is just being started must be known, to be ended. And set here: `make chaos &` ignores Ctrl+C.
    signal.signal(signal.SIGINT, lambda *_: run.interrupted.set())
    signal.signal(signal.SIGTERM, lambda *_: run.interrupted.set())
    try:
        run.play()
    except (AssertionError, NodeError, OSError, pika.exceptions.AMQPError) as problem:
        run.broken.append(str(problem) or repr(problem))
    finally:
        run.close()
    if run.interrupted.is_set():
        print(" [!] Interrupted", file=sys.stderr)
    elif not run.verdict():
        log = sorted((line.at - run.began, s.name, line.text) for s in run.workers + run.producers for line in s.lines)
        (folder / "scripts.log").write_text("".join(f"{at:8.3f} {name:16} {text}\n" for at, name, text in log))
        print(f" [!] Seed {settings.seed}. RabbitMQ's logs, and what the scripts printed: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if run.interrupted.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
