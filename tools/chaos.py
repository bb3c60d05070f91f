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
from node import Node, NodeError, close_all
from processes import ROOT, Script, interruptible, wait_until
from tcp_proxy import TcpProxy

sys.path.insert(0, str(ROOT))
from task_queue import DEAD_LETTERS, QUEUE

# worker.py as its readers are told to use it: with a work() of their own. There are many tasks, so a dot is shorter.
WORKER = """\
import sys, time, worker
worker.work = lambda task: time.sleep(0.3 * task.count(b"."))
sys.exit(worker.main())
"""

# What they print when they have a task.
RECEIVED = re.compile(r" \[x\] Received '(.*)'( \(redelivered\))?$")

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


class Player(Script):
    """A worker.py, or a new_task.py with the tasks that it was given. It has a connection of its own, to be broken."""

    def __init__(self, run: "Run", kind: str, *command: str, given=(), **settings):
        self.given = dict.fromkeys(given, time.monotonic())  # task -> when
        self.may_end_with = {0}  # exit status
        self.proxy = TcpProxy(run.node.port)
        url = f"{self.proxy.url}?heartbeat={HEARTBEAT_SECONDS}"
        super().__init__(*command, url=url, cwd=run.settings.scripts, **settings)
        self.name = f"{kind} {self.process.pid}"

    def __str__(self) -> str:  # with the last that it printed; all of it is in the folder that is kept
        lines = "".join(f"\n  {line.stream}: {line.text}" for line in self.lines[-6:])
        return f"{self.name}, exit status {self.process.poll()}, last lines:{lines}"

    def in_hand(self) -> str | None:
        """Return the task that a worker is working on."""
        found = RECEIVED.match("".join(self.output()[-1:]))
        return found and found[1]

    def give(self, *tasks: str) -> None:
        """Write tasks to a producer's standard input."""
        self.given |= dict.fromkeys(tasks, time.monotonic())
        self.process.stdin.write("".join(f"{task}\n" for task in tasks).encode())
        self.process.stdin.flush()

    def sent(self) -> list[str]:
        """Return the tasks that a producer has reported sent."""
        if self.output() in ([f" [x] Sent {task!r}" for task in self.given], [f" [x] Sent {len(self.given)} tasks"]):
            return list(self.given)
        confirmed = re.search(r"The first (\d+) lines are confirmed", "\n".join(self.output("stderr")))
        return list(self.given)[: int(confirmed[1])] if confirmed else []


@dataclass
class Fault:
    """A fault that took place, from `start` to `end`. victim: the script that it hit; None: all of them."""

    kind: str
    victim: Player | None
    start: float
    end: float = float("inf")

    def explains(self, script: Player, start: float, end: float) -> bool:
        """Tell whether it has hit a script between start and end, and can have doubled what that did then."""
        in_time = self.start <= end + ON_ITS_WAY_SECONDS and start - ON_ITS_WAY_SECONDS <= self.end
        return in_time and self.victim in (None, script) and self.kind not in NO_REASON


class Run:
    """One run: RabbitMQ, workers, producers, and what happened to them."""

    def __init__(self, settings, folder: Path):
        self.settings, self.random = settings, random.Random(settings.seed)
        kinds, weights = settings.kinds, [FAULTS[kind][0] for kind in settings.kinds]
        plan = self.random.sample(kinds, len(kinds))[: settings.faults]  # each one at least once
        plan += self.random.choices(kinds, weights, k=settings.faults - len(plan))
        self.plan = self.random.sample(plan, len(plan))
        self.began, self.node = time.monotonic(), Node(folder / "rabbitmq")
        self.workers, self.producers, self.crew = [], [], []  # all that ever ran, and the workers that should run now
        self.faults, self.broken = [], []  # what took place, and what is wrong
        self.tasks = 0  # how many there are so far

    def play(self) -> None:
        """Do it all. AssertionError if something that must happen does not."""
        self.node.start()
        for _ in range(self.settings.workers):
            self.start_worker()
        for kind in self.plan:
            self.play_fault(kind)
        self.roll_call()
        wait_until(self.is_idle, "all tasks are sent and done", 2 * PATIENCE + self.tasks / 50)
        for worker in self.crew:
            worker.terminate()
            worker.ends(20)
        wait_until(lambda: self.counts(QUEUE)[1] == 0, "RabbitMQ notices that all workers have gone", PATIENCE)
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
        producer.give(first)
        self.taker_of(first)
        self.taker_of(alone)  # before that they fail, as they must, if they can't reach RabbitMQ
        victim = self.choose(kind, producer, tasks)
        fault = Fault(kind, victim, time.monotonic())
        self.faults.append(fault)
        who = victim.name + (f", working on {victim.in_hand()!r}" if victim.in_hand() else "")
        at, number = fault.start - self.began, len(self.faults)
        print(f"{at:7.1f} s  {number:3}/{len(self.plan)}  {kind:22}{who}", flush=True)
        self.strike(fault, victim)
        if victim in self.crew and not victim.running:
            self.crew.remove(victim)
            self.start_worker()
        with contextlib.suppress(BrokenPipeError):  # this producer was the victim, and has ended
            producer.give(last)
            producer.process.stdin.close()

    def choose(self, kind: str, producer: Player, tasks: list[str]) -> Player:
        """Give tasks to a producer that has sent one already. Return the victim of a fault, when it is time for it."""
        longer = self.new_task("...")
        producer.give(longer, *tasks)
        if kind.startswith("worker"):  # most of them in the middle of a longer task, the others at any moment
            worker = self.taker_of(longer if self.random.random() < 0.75 else self.random.choice(tasks))
            time.sleep(self.random.uniform(0, 0.1))
            return worker
        if kind.startswith("single"):  # somewhere between its start and its end
            pause = self.random.uniform(0.1, 0.5)
            producer = None
            while not (producer and producer.running):
                producer = self.start_producer(self.new_task())
                time.sleep(pause)
                pause /= 2  # if it was faster than this
        elif self.random.random() < 0.5:
            self.taker_of(longer)  # it is still sending the others, if they are many
        else:
            time.sleep(self.random.uniform(0, 0.05))
        return producer

    def strike(self, fault: Fault, victim: Player) -> None:
        """Do to the victim what the fault is."""
        assert victim.proxy.connections or fault.kind == "single-killed", f"{victim.name} has no connection"
        pause = 0
        match fault.kind.split("-"):
            case "rabbitmq", how:
                fault.victim = None
                self.node.kill() if how == "killed" else self.node.stop()
                self.node.start()
            case _, "killed":
                victim.kill()
                victim.may_end_with = {0, -signal.SIGKILL}  # 0: it was just about to end
            case _, "stopped":
                victim.terminate()
                victim.ends(20)
            case _, "interrupted":
                victim.ctrl_c()
                victim.may_end_with = {1}
                victim.ends(10)
            case _, "frozen":
                pause = self.random.choice([1, 3 * HEARTBEAT_SECONDS])  # RabbitMQ notices the second, not the first
                victim.process.send_signal(signal.SIGSTOP)
                thaw = threading.Timer(pause, victim.process.send_signal, [signal.SIGCONT])
                thaw.daemon = True
                thaw.start()
            case _, "cut":
                victim.proxy.cut()
            case _, "stalled":
                victim.proxy.stall()
        fault.end = time.monotonic() + pause

    def roll_call(self) -> None:
        """See to it that each worker takes a task now: as many tasks as it takes for all to have had one."""
        begin, producer, missing = time.monotonic(), self.start_producer(), set(self.crew)
        while missing:
            assert time.monotonic() < begin + PATIENCE, f"takes no tasks any more: {missing.pop()}"
            tasks = [self.new_task(".") for _ in self.crew]
            producer.give(*tasks)
            missing -= {self.taker_of(task) for task in tasks}
        producer.process.stdin.close()

    def is_idle(self) -> bool:
        """Tell whether no task is with a producer, in the queue, in a worker's hands, or on its way there."""
        quiet = time.monotonic() - max(worker.lines[-1].at for worker in self.crew) > 1
        busy = any(producer.running for producer in self.producers) or any(worker.in_hand() for worker in self.crew)
        return quiet and not busy and self.counts(QUEUE)[0] == 0

    def start_worker(self) -> None:
        """Start a worker. Every other one is graceful."""
        graceful = ["--graceful"] * (len(self.workers) % 2)
        self.workers.append(Player(self, "worker", "-c", WORKER, *graceful))
        self.crew.append(self.workers[-1])

    def start_producer(self, *single: str) -> Player:
        """Start a producer of a single task on its command line, or of those that it will get on standard input."""
        self.producers.append(Player(self, "producer", "new_task.py", *single or "-", given=single, stdin=PIPE))
        return self.producers[-1]

    def new_task(self, dots: str = "") -> str:
        """Return a task that there was not before."""
        self.tasks += 1
        return f"task {self.tasks} {dots}".strip()

    def taker_of(self, task: str) -> Player:
        """Return the worker that has received a task, as soon as one has: a fault must come while it is still at it."""
        sign, what = f"Received {task!r}", f"a worker takes {task!r}"
        return wait_until(lambda: [w for w in self.crew if sign in "".join(w.output())], what, PATIENCE, pause=0.01)[-1]

    def counts(self, queue: str) -> tuple[int, int]:
        """Return how many tasks wait in a queue, and how many workers it has."""
        connection = pika.BlockingConnection(pika.URLParameters(self.node.url))
        with connection, contextlib.suppress(pika.exceptions.ChannelClosedByBroker):  # there is no such queue
            found = connection.channel().queue_declare(queue, passive=True).method
            return found.message_count, found.consumer_count
        return 0, 0

    def close(self) -> None:
        """End everything that this run has started."""
        for script in self.workers + self.producers:
            if script.running:
                script.kill()
                script.may_end_with = {-signal.SIGKILL}  # what kept the run from its end is told elsewhere
            script.ends()
            script.proxy.close()
        close_all()

    # The verdict, once everything has ended.

    def verdict(self) -> bool:
        """Print the table of faults, the tally, and what is wrong. Tell whether nothing is."""
        done = collections.defaultdict(list)  # task -> each time that it was done: by which worker, from when to when
        for worker in self.workers:
            for line in worker.lines:
                if received := RECEIVED.match(line.text):
                    task, begin = received[1], line.at
                elif line.text == " [x] Done":
                    done[task].append((worker, begin, line.at))
        sent = [task for producer in self.producers for task in producer.sent()]
        lost = [task for task in sent if task not in done]
        twice = [task for task, doings in done.items() if len(doings) > 1]
        if lost:
            self.broken.append(f"{len(lost)} tasks were reported sent and never done: {', '.join(map(repr, lost))}")
        for task in twice:
            if not self.is_explained(task, done[task]):
                self.broken.append(f"{task!r} was done {len(done[task])} times, and no fault explains that")
        unfinished = [worker for worker in self.workers[1::2] if worker.in_hand()]  # the graceful ones
        unfinished += [producer for producer in self.producers if producer.sent() != list(producer.given)]
        for script in self.workers + self.producers:
            status, odd = script.process.returncode, [t for t in script.output("stderr") if not t.startswith(" [!] ")]
            if status not in script.may_end_with or (status == 0 and script in unfinished) or odd:
                self.broken.append(f"ended or spoke as it must not: {script}")
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

    def is_explained(self, task: str, doings: list[tuple[Player, float, float]]) -> bool:
        """Tell whether faults explain how often a task was done. Once needs no reason.

        Its producer may have sent it once more for each fault that hit the producer before that ended or a worker had
        the task. Each worker that was hit between Received and Done may not have acknowledged it: then it comes back.
        """
        producer = next(producer for producer in self.producers if task in producer.given)
        sent = min([received for _, received, _ in doings] + [line.at for line in producer.lines[-1:]])
        resent = [fault for fault in self.faults if fault.explains(producer, producer.given[task], sent)]
        returned = [doing for doing in doings if any(fault.explains(*doing) for fault in self.faults)]
        return len(doings) <= 1 + len(resent) + len(returned)


def main() -> str | None:
    """Make one run; return what was wrong, if anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3000, help="how many tasks to send, about (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10000), help="which faults come, when (random)")
    parser.add_argument("--workers", type=int, default=5, help="how many workers at a time (%(default)s)")
    parser.add_argument("--faults", type=int, help="how many faults (one for 50 tasks, and one of each kind)")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="which faults, separated by commas (all)")
    parser.add_argument("--scripts", type=Path, default=ROOT, help="folder of the scripts to try (%(default)s)")
    settings = parser.parse_args()
    settings.kinds = settings.kinds.split(",")
    if not set(settings.kinds) <= set(FAULTS):
        parser.error(f"no such kind of fault. There are: {', '.join(FAULTS)}")
    settings.faults = settings.faults or max(settings.tasks // 50, len(settings.kinds))
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {settings.seed}: {settings.tasks} tasks, {settings.workers} workers, {settings.faults} faults")
    run = Run(settings, folder)
    try:
        with interruptible(run.close):
            run.play()
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        return " [!] Interrupted"
    except (AssertionError, NodeError, OSError, pika.exceptions.AMQPError) as problem:
        run.broken.append(str(problem) or repr(problem))
    if run.verdict():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    log = sorted((line.at - run.began, s.name, line.text) for s in run.workers + run.producers for line in s.lines)
    (folder / "scripts.log").write_text("".join(f"{at:8.3f} {name:16} {text}\n" for at, name, text in log))
    return f" [!] Seed {settings.seed}. RabbitMQ's logs, and what the scripts printed: {folder}"


if __name__ == "__main__":
    sys.exit(main())
