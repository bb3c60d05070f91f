#!/usr/bin/env python3
"""Measure how fast the two scripts are, side by side with minimal loops on the same RabbitMQ, in one run.

    python tools/bench.py                everything, in about 12 minutes; writes docs/benchmarks.md and docs/scaling.svg
    python tools/bench.py --only NAME    one benchmark or several, and write nothing: NAMES
    python tools/bench.py --quick        everything, with numbers too small to mean anything: to see that it works
    python tools/bench.py --profile      where worker.py spends its time, by function

It starts a RabbitMQ of its own on loopback, in a temporary folder. What is compared takes turns, in an order that
changes from round to round, so that whatever else the machine does hits all of it. A ratio is the median of the
rounds' ratios, the smallest and the largest behind it; other figures are medians.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pika
import psutil
from node import Node, NodeError
from pika.exceptions import AMQPError
from processes import ROOT, Script
from rabbitmq import install

sys.path.insert(0, str(ROOT))
from task_queue import QUEUE, QUORUM

TOOLS = Path(__file__).resolve().parent
BASELINES = str(TOOLS / "baselines.py")

# Virtual hosts, each with a task_queue of its own: so a full queue and an empty one, or a quorum queue and a classic
# one, can take turns.
MAIN, OTHER, DEEP, CLASSIC = "main", "other", "deep", "classic"

# How long one run of anything may take. Nothing does, unless it is broken.
LIMIT = 600

# How often to look at what a worker has printed: some tenths of a percent of the time that is measured.
LOOK_SECONDS = 0.005


class Sizes(NamedTuple):
    """How much of everything a run does."""

    rounds: int
    bulk: int  # tasks for a sender that doesn't wait
    slow: int  # tasks for a sender that waits for each confirm
    processes: int  # tasks that are sent by a process each
    work: int  # empty tasks for a worker
    work_rounds: int  # more than of the others: single runs spread most here when the machine is busy
    by_hand: int  # rounds of what takes less than a second
    workers: tuple[int, ...]  # how many workers share one-dot tasks
    dots: int  # one-dot tasks for each of them
    pause: float  # seconds for RabbitMQ to tidy up after one measurement, before the next
    few: int  # tasks in a short list of tasks
    backlog: int  # and in a long one


FULL = Sizes(5, 50_000, 2000, 20, 1000, 31, 21, (1, 2, 4, 8, 16, 32), 5, 0.3, 10_000, 1_000_000)
QUICK = Sizes(1, 300, 20, 1, 60, 1, 1, (1, 2), 1, 0, 100, 2000)


class Failed(Exception):
    """Something that is measured did not do its work. The message is for the user."""


class Usage(NamedTuple):
    """What a task, or a run, took: seconds, and seconds of CPU."""

    wall: float
    cpu: float

    def per(self, tasks: float) -> "Usage":
        """The same for one of so many tasks."""
        return Usage(self.wall / tasks, self.cpu / tasks)


class Signals:
    """Ctrl+C and SIGTERM raise KeyboardInterrupt, but not while `held`: what is just being started must be known."""

    def __init__(self):
        self._holding = self._pending = False
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, *_) -> None:
        self._pending = True
        if not self._holding:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self, for_good: bool = False):
        """Let a signal wait until this block is left; for ever, if that is the end anyway."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before or for_good
        if self._pending and not self._holding:
            raise KeyboardInterrupt


class Bench:
    """A RabbitMQ with empty queues, and ways to measure on it."""

    def __init__(self, sizes: Sizes, folder: Path):
        self.sizes, self.folder = sizes, folder
        self.scaling: dict[int, float] = {}  # workers -> how many one-dot tasks they did in a second, for the plot
        self._signals = Signals()
        self._running: list[subprocess.Popen | Script] = []
        definitions = folder / "definitions.json"
        definitions.write_text(json.dumps(virtual_hosts()))
        self.node = Node(folder / "node", config=f"load_definitions = {definitions}\n")

    def __enter__(self):
        try:
            with self._signals.held():
                self.node.launch()
            self.node.wait_until_ready()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        with self._signals.held(for_good=True):
            self.end_scripts()
            self.node.close()

    def url(self, vhost: str) -> str:
        """Return AMQP_URL for one of the virtual hosts."""
        return self.node.url.replace("%2F", vhost)

    def connect(self, vhost: str) -> pika.BlockingConnection:
        """Return a connection of our own."""
        return pika.BlockingConnection(pika.URLParameters(self.url(vhost)))

    def empty(self, vhost: str) -> None:
        """Throw away all tasks, once nobody holds any; give RabbitMQ a moment to tidy up."""
        with self.connect(vhost) as connection:
            channel = connection.channel()
            deadline = time.monotonic() + 30
            while channel.queue_declare(QUEUE, passive=True).method.consumer_count:
                if time.monotonic() > deadline:
                    raise Failed("a worker that was killed still has its consumer")
                time.sleep(0.02)
            channel.queue_purge(QUEUE)
        time.sleep(self.sizes.pause)

    def start(self, command, vhost: str, **pipes) -> subprocess.Popen:
        """Start a command; its output goes to files, as reading from a pipe would cost CPU here."""
        environment = {**os.environ, "AMQP_URL": self.url(vhost)}
        with self._signals.held(), self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err} | pipes
            process = subprocess.Popen([str(word) for word in command], env=environment, cwd=ROOT, **pipes)
            self._running.append(process)
        return process

    @property
    def stdout(self) -> Path:
        """The file with what the command prints that start() has started last."""
        return self.folder / "stdout"

    @property
    def stderr(self) -> Path:
        """The same for its diagnostics."""
        return self.folder / "stderr"

    def script(self, *command: str, vhost: str) -> Script:
        """Start a Python script whose lines are looked at."""
        with self._signals.held():
            self._running.append(Script(*command, url=self.url(vhost)))
        return self._running[-1]

    def workers(self, number: int, vhost: str, command=("worker.py",)) -> list[Script]:
        """Start workers and return them when they wait for tasks."""
        scripts = [self.script(*command, vhost=vhost) for _ in range(number)]
        for script in scripts:
            script.wait_for("[*] Waiting")
        return scripts

    def end_scripts(self) -> None:
        """End whatever was started and still runs."""
        with self._signals.held():
            while self._running:
                running = self._running.pop()
                running.kill()  # a Script's waits for the end; a Popen's doesn't
                if isinstance(running, subprocess.Popen) and running.returncode is None:
                    running.wait()

    def run(self, command, vhost: str, tasks: Path | None = None) -> Usage:
        """Run a command to its end, with a file of tasks as its input; it must succeed."""
        with tasks.open("rb") if tasks else contextlib.nullcontext(subprocess.DEVNULL) as stdin:
            began = time.perf_counter()
            process = self.start(command, vhost, stdin=stdin)
            watchdog = threading.Timer(LIMIT, process.kill)
            watchdog.daemon = True
            watchdog.start()
            try:
                _, status, used = os.wait4(process.pid, 0)
            finally:
                watchdog.cancel()
        usage = Usage(time.perf_counter() - began, used.ru_utime + used.ru_stime)
        process.returncode = os.waitstatus_to_exitcode(status)  # as it was waited for behind Popen's back
        self._running.remove(process)
        self._check(process)
        return usage

    def peak_memory(self, tasks: Path, vhost: str) -> float:
        """Return how many megabytes `new_task.py -` has in memory at most while it sends a file of tasks."""
        with tasks.open("rb") as stdin:
            process = self.start([sys.executable, "new_task.py", "-"], vhost, stdin=stdin)
            watched, peak, deadline = psutil.Process(process.pid), 0, time.monotonic() + LIMIT
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    peak = max(peak, watched.memory_info().rss)
                if time.monotonic() > deadline:
                    raise Failed(f"new_task.py - takes longer than {LIMIT} s")
                time.sleep(0.01)
        self._check(process)
        return peak / 1e6

    def _check(self, process) -> None:
        if process.returncode:
            words = " ".join(Path(word).name for word in process.args)
            raise Failed(f"{words} ended with {process.returncode}: {self.stderr.read_text(errors='replace')[-500:]}")

    def work(self, command, vhost: str, tasks: int, filled: bool = False) -> Usage:
        """Return what a task takes a worker, where the queue is full of empty tasks. Its start doesn't count."""
        if not filled:
            self.empty(vhost)
            self.run([sys.executable, "new_task.py", "-"], vhost, self.tasks(tasks))
        process = self.start(command, vhost)
        with self.stdout.open("rb") as printed:
            done, watched, deadline = 0.0, psutil.Process(process.pid), time.monotonic() + LIMIT

            def after(number: int) -> tuple[float, float, float]:
                """Return the time, the CPU time and the tasks done, when at least so many are."""
                nonlocal done
                while done < number:
                    if process.poll() is not None or time.monotonic() > deadline:
                        self._check(process)
                        raise Failed(f"{Path(command[1]).name} did {done} of {tasks} tasks")
                    time.sleep(LOOK_SECONDS)
                    done += printed.read().count(b"\n") / 2  # two lines a task, and never mind the first line
                return time.perf_counter(), sum(watched.cpu_times()[:2]), done

            first, last = after(tasks // 20), after(tasks - 1)
        self.end_scripts()
        wall, cpu, count = (b - a for a, b in zip(first, last, strict=True))
        return Usage(wall, cpu).per(count)

    def tasks(self, number: int) -> Path:
        """Return a file with so many tasks without a dot, one per line."""
        file = self.folder / f"{number}-tasks"
        if not file.exists():
            with file.open("w") as lines:
                lines.writelines(f"task {n}\n" for n in range(number))
        return file

    def in_turns(self, variants: dict, rounds: int) -> dict[str, list]:
        """Call each variant once a round; return what they returned. The order changes from round to round."""
        results = {name: [] for name in variants}
        for turn in range(rounds):
            names = list(variants)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                results[name].append(variants[name]())
        return results

    @functools.cached_property
    def deep(self) -> float:
        """Fill the queue of DEEP with a backlog; return how many megabytes it took the sender at most."""
        return self.peak_memory(self.tasks(self.sizes.backlog), DEEP)

    @functools.cached_property
    def c_client(self) -> Path | None:
        """The C baseline, compiled; None where that can't be done."""
        program = self.folder / "baseline"
        compiler = shutil.which("cc")
        if not compiler:
            return None
        command = [compiler, "-O2", "-o", program, TOOLS / "baseline.c", "-lrabbitmq"]
        compiled = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        return program if compiled.returncode == 0 else None


def virtual_hosts() -> dict:
    """Return the definitions with which RabbitMQ starts. The tutorial's queue is in each virtual host."""
    names = (MAIN, OTHER, DEEP, CLASSIC)
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    queue = {"name": QUEUE, "durable": True, "auto_delete": False}
    return {
        "users": [{"name": "guest", "password": "guest", "tags": "administrator"}],
        "vhosts": [{"name": name} for name in names],
        "permissions": [{"user": "guest", "vhost": name, **everything} for name in names],
        "queues": [{**queue, "vhost": name, "arguments": {} if name == CLASSIC else QUORUM} for name in names],
    }


# How figures are written.


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Return the median of the rounds' ratios, and how far they spread."""
    # What took less than the system's clock can tell, as it may in a quick run, has no ratio.
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b] or [float("nan")]
    if len(ratios) == 1:
        return times(ratios[0])
    return f"**{times(statistics.median(ratios))}** ({times(min(ratios))} to {times(max(ratios))})"


def times(value: float) -> str:
    """Return a ratio with as many digits as mean something."""
    return f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.2g}" if value < 0.1 else f"{value:,.0f}"


def median(values, unit: str = "", scale: float = 1) -> str:
    """Return the median with three digits, and thousands apart."""
    value = statistics.median(values) * scale
    digits = max(0, 2 - len(str(int(abs(value))))) + (abs(value) < 10)
    return f"{value:,.{digits}f}{unit and ' ' + unit}"


def table(*rows) -> str:
    """Return a Markdown table that reads well as plain text, too; the first row is its head."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def speed_table(what: str, results: dict[str, list[Usage]], against: str) -> str:
    """Return a table of speed and CPU per task. `against` is the variant that the others are compared with."""
    base = results[against]
    rows = [
        (
            name,
            ratio([usage.wall for usage in base], [usage.wall for usage in usages]) if name != against else "1",
            ratio([usage.cpu for usage in usages], [usage.cpu for usage in base]) if name != against else "1",
            median([1 / usage.wall for usage in usages]),
            median([usage.cpu for usage in usages], "µs", 1e6),
        )
        for name, usages in results.items()
    ]
    return table((what, "speed, ratio", "CPU per task, ratio", "tasks a second", "CPU per task"), *rows)


# The benchmarks. Each returns a section of the report; its docstring is what the section says below its title.


def bulk(bench: Bench) -> str:
    """Many tasks in

    How fast a list of tasks gets in, start-up included. The speed of all is divided by that of the tutorial's loop,
    which sends tasks and never learns what became of them; amqp-publish doesn't, either. Those with "confirmed" know
    that RabbitMQ has each task on disk.
    """
    sizes = bench.sizes

    def sender(command, number: int):
        def send() -> Usage:
            bench.empty(MAIN)
            return bench.run(command, MAIN, bench.tasks(number)).per(number)

        return send

    def one_process_each() -> Usage:
        bench.empty(MAIN)
        runs = [bench.run([sys.executable, "new_task.py", "task"], MAIN) for _ in range(sizes.processes)]
        return Usage(*map(sum, zip(*runs, strict=True))).per(sizes.processes)

    loop = "the tutorial's loop, unconfirmed"
    variants = {
        "`new_task.py -`, confirmed": sender([sys.executable, "new_task.py", "-"], sizes.bulk),
        loop: sender([sys.executable, BASELINES, "unconfirmed"], sizes.bulk),
        "the same, each one confirmed before the next": sender([sys.executable, BASELINES, "confirmed"], sizes.slow),
        "`new_task.py WORD` for each task, confirmed": one_process_each,
    }
    notes = []
    if program := shutil.which("amqp-publish"):
        command = [program, "-u", bench.url(MAIN), "-r", QUEUE, "-p", "-l"]
        variants["`amqp-publish -l`, a C program, unconfirmed"] = sender(command, sizes.bulk)
    else:
        notes.append("amqp-publish (package amqp-tools) is left out, as it is not installed here.")
    if bench.c_client:
        variants["tools/baseline.c, 2000 under way, confirmed"] = sender([bench.c_client, "publish"], sizes.bulk)
    else:
        notes.append(NO_C_CLIENT)
    results = bench.in_turns(variants, sizes.rounds)
    return "\n\n".join([speed_table("sender", results, loop), *notes])


NO_C_CLIENT = "The C client is left out, as there is no C compiler or no librabbitmq (package librabbitmq-dev) here."


def worker(bench: Bench) -> str:
    """The worker's overhead

    Tasks without a dot, so there is no work: what is left is receiving, printing and acknowledging them one by one.
    All print each line at once. The tutorial's loop has no heartbeats while it works, no reconnecting, no handling of
    signals and of tasks that fail: what `worker.py` adds costs the difference.
    """
    tasks, loop = bench.sizes.work, "the tutorial's loop"
    commands = {"`worker.py`": [sys.executable, "worker.py"], loop: [sys.executable, BASELINES, "work"]}
    notes = [] if bench.c_client else [NO_C_CLIENT]
    if bench.c_client:
        commands["tools/baseline.c"] = [bench.c_client, "work"]
    variants = {name: functools.partial(bench.work, command, MAIN, tasks) for name, command in commands.items()}
    results = bench.in_turns(variants, bench.sizes.work_rounds)
    return "\n\n".join([speed_table("worker", results, loop), *notes])


def by_hand(bench: Bench) -> str:
    """One task by hand

    `python new_task.py hello` against the tutorial's sender, from the start of Python to its end. Ours waits for the
    confirm, theirs doesn't. Most of either is the import of pika. A ratio below 1 says that ours takes less.
    """
    bench.empty(MAIN)
    ours, theirs = "`new_task.py hello`, confirmed", "the tutorial's sender, unconfirmed"
    commands = {ours: ["new_task.py", "hello"], theirs: [BASELINES, "one", "hello"]}
    variants = {name: functools.partial(bench.run, [sys.executable, *words], MAIN) for name, words in commands.items()}
    results = bench.in_turns(variants, bench.sizes.by_hand)
    walls, cpus = ({name: [u[n] for u in usages] for name, usages in results.items()} for n in (0, 1))
    return table(
        ("sender", "time, ratio", "CPU, ratio", "time", "CPU"),
        *(
            (
                name,
                ratio(walls[name], walls[theirs]) if name == ours else "1",
                ratio(cpus[name], cpus[theirs]) if name == ours else "1",
                median(walls[name], "ms", 1000),
                median(cpus[name], "ms", 1000),
            )
            for name in results
        ),
    )


def latency(bench: Bench) -> str:
    """From the sender to an idle worker

    What someone sees who has a worker waiting in one shell and sends a task in another. The worker can have the task
    before its sender has the confirm, so "Sent to Received" may be negative: the worker printed its line first.
    """
    pairs = {
        "`new_task.py` and `worker.py`": (MAIN, ("new_task.py",), ("worker.py",)),
        "the tutorial's pair": (OTHER, (BASELINES, "one"), (BASELINES, "work")),
    }

    def sends(vhost: str, sender, worker):
        bench.empty(vhost)
        (receiver,) = bench.workers(1, vhost, worker)

        def send() -> tuple[float, float]:
            before, began = len(receiver.output()), time.monotonic()
            script = bench.script(*sender, "hello", vhost=vhost)
            sent = script.wait_for("Sent")
            received = receiver.wait_for("Received", times=before // 2 + 1)
            script.ends()
            return received.at - began, received.at - sent.at

        return send

    variants = {name: sends(*pair) for name, pair in pairs.items()}
    results = bench.in_turns(variants, bench.sizes.by_hand)
    bench.end_scripts()
    ours, theirs = ([all_of for all_of, _ in rounds] for rounds in results.values())
    ratios = {name: "1" for name in results} | {next(iter(results)): ratio(ours, theirs)}
    return table(
        ("pair", "command to Received, ratio", "command to Received", "Sent to Received"),
        *(
            (name, ratios[name], *(median(values, "ms", 1000) for values in zip(*rounds, strict=True)))
            for name, rounds in results.items()
        ),
    )


def redelivery(bench: Bench) -> str:
    """When a worker is killed

    Two workers wait, one gets a task, and `kill -9` hits it in the middle: the time until the other one has the task.
    RabbitMQ gives it back as soon as the connection breaks, so there is nothing that a worker could do better here.
    """

    def kills(command):
        def kill() -> float:
            bench.empty(MAIN)
            pair = bench.workers(2, MAIN, command)
            bench.run([sys.executable, "new_task.py", "." * 60], MAIN)
            busy = first(pair)
            pair.remove(busy)
            began = time.monotonic()
            busy.kill()
            received = pair[0].wait_for("Received").at - began
            bench.end_scripts()
            return received

        return kill

    def first(pair: list[Script]) -> Script:
        deadline = time.monotonic() + 30
        while True:
            for script in pair:
                if "Received" in str(script):
                    return script
            if time.monotonic() > deadline:
                raise Failed("no worker received the task")
            time.sleep(0.01)

    variants = {"`worker.py`": kills(("worker.py",)), "the tutorial's loop": kills((BASELINES, "work"))}
    results = bench.in_turns(variants, bench.sizes.rounds)
    ours, theirs = results.values()
    ratios = (ratio(ours, theirs), "1")
    return table(
        ("worker", "kill to redelivery, ratio", "kill to redelivery"),
        *((name, ratios[n], median(results[name], "ms", 1000)) for n, name in enumerate(results)),
    )


def scaling(bench: Bench) -> str:
    """More workers

    One-dot tasks (a second of sleep each), as many for each worker. Efficiency is the ideal time divided by the time
    from the first "Received" to the last "Done". Sleeping workers don't compete for CPU: this shows what the queue
    and the scripts cost, and not how many busy workers the machine can carry.
    """
    sizes, efficiency = bench.sizes, {number: [] for number in bench.sizes.workers}

    def makespan(workers: list[Script]) -> float:
        """Return the seconds from the first task's start to the last one's end."""
        before, number = [len(worker.output()) for worker in workers], len(workers) * sizes.dots
        list_of_tasks = bench.folder / "one-dot-tasks"
        list_of_tasks.write_text("one second.\n" * number)
        bench.run([sys.executable, "new_task.py", "-"], MAIN, list_of_tasks)
        deadline = time.monotonic() + 30 + 5 * sizes.dots
        while sum(len(worker.output()) for worker in workers) - sum(before) < 2 * number:
            if time.monotonic() > deadline:
                raise Failed(f"{len(workers)} workers did not do {number} one-dot tasks in time")
            time.sleep(0.02)
        times = [line.at for n, worker in zip(before, workers, strict=True) for line in worker.lines[n:]]
        return max(times) - min(times)

    for _ in range(sizes.rounds):
        bench.empty(MAIN)
        workers: list[Script] = []
        for number in sizes.workers:  # those that are there stay: to start 63 of them takes longer than 32
            workers += bench.workers(number - len(workers), MAIN)
            efficiency[number].append(sizes.dots / makespan(workers))
        bench.end_scripts()
    bench.scaling = {number: number * statistics.median(values) for number, values in efficiency.items()}
    rows = [
        (
            str(number),
            ratio(values, [1] * len(values)),
            median([sizes.dots / e for e in values], "s"),
            f"{sizes.dots} s",
        )
        for number, values in efficiency.items()
    ]
    picture = "![Tasks a second against the number of workers](scaling.svg)"
    return table(("workers", "efficiency", "time", "ideal"), *rows) + "\n\n" + picture


def backlog(bench: Bench) -> str:
    """A long queue

    Sending to, and working on, a queue with nothing else in it and one with a backlog (in another virtual host). A
    speed ratio of 1 says that a backlog slows nothing down.
    """
    sizes = bench.sizes
    assert bench.deep  # from here on it is filled
    return two_queues(
        bench,
        {"an empty queue": MAIN, f"{sizes.backlog:,} tasks in the queue": DEEP},
        keep={DEEP},
        against="an empty queue",
    )


def quorum(bench: Bench) -> str:
    """Quorum queue and classic queue

    `new_task.py -` and `worker.py` on the queue that they declare themselves, and on a durable classic queue, as older
    tutorials left it. Below 1, the quorum queue is slower: that is the price for its log of every step, which is what
    a cluster needs to lose nothing, and for its count of deliveries.
    """
    return two_queues(bench, {"quorum": MAIN, "classic": CLASSIC}, keep=set(), against="classic")


def two_queues(bench: Bench, vhosts: dict[str, str], keep: set[str], against: str) -> str:
    """Return tables of sending to, and working on, queues that differ. Those in `keep` keep their tasks."""
    sizes = bench.sizes

    def send(vhost: str) -> Usage:
        if vhost not in keep:
            bench.empty(vhost)
        return bench.run([sys.executable, "new_task.py", "-"], vhost, bench.tasks(sizes.bulk)).per(sizes.bulk)

    def work(vhost: str) -> Usage:
        return bench.work([sys.executable, "worker.py"], vhost, sizes.work, filled=vhost in keep)

    sent = bench.in_turns({name: functools.partial(send, v) for name, v in vhosts.items()}, sizes.rounds)
    done = bench.in_turns({name: functools.partial(work, v) for name, v in vhosts.items()}, sizes.work_rounds)
    tables = speed_table("`new_task.py -`", sent, against), speed_table("`worker.py`", done, against)
    return "\n\n".join(tables)


def memory(bench: Bench) -> str:
    """Memory for a long list

    How much memory `new_task.py -` takes at most (resident set size): what it holds is a window of tasks that are not
    confirmed, never the list. The long list is sent once, as the peak hardly varies.
    """
    sizes = bench.sizes
    few = [bench.peak_memory(bench.tasks(sizes.few), OTHER) for _ in range(sizes.rounds)]
    bench.empty(OTHER)
    many = bench.deep
    return table(
        ("tasks", "peak memory, ratio", "peak memory", "more than for the short list"),
        (f"{sizes.few:,}", "1", median(few, "MB"), ""),
        (
            f"{sizes.backlog:,}",
            ratio([many], [statistics.median(few)]),
            median([many], "MB"),
            f"{many - statistics.median(few):.1f} MB",
        ),
    )


BENCHMARKS = {
    "bulk": bulk,
    "worker": worker,
    "by-hand": by_hand,
    "latency": latency,
    "redelivery": redelivery,
    "scaling": scaling,
    "quorum": quorum,
    "memory": memory,
    "backlog": backlog,
}


# The report.

METHOD = __doc__.strip().rpartition("\n\n")[2]  # the paragraph at the top of this file

HEAD = """\
# Benchmarks

Written by `make bench`, which measures all this again, on your machine (`make bench ARGS="--help"` tells more).

{explanation}

{machine}
"""


def title(benchmark) -> str:
    """Return the first line of a benchmark's docstring."""
    return benchmark.__doc__.splitlines()[0]


def explanation(text: str) -> str:
    """Return a docstring without its first paragraph and its indentation."""
    return "\n".join(line.strip() for line in text.split("\n\n", 1)[1].strip().splitlines())


def machine(bench: Bench, load: float) -> str:
    """Return a table of what was measured with what, and where."""
    sizes = bench.sizes
    with bench.connect(MAIN) as connection:
        server = connection._impl.server_properties  # BlockingConnection has no public name for it
    rabbitmq = f"{server['version']} on {server['platform']}, one node, on the same machine"
    rows = [
        ("CPU", f"{cpu_model()}, {os.cpu_count()} cores"),
        ("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        ("system", operating_system()),
        ("Python, pika", f"{platform.python_version()}, {importlib.metadata.version('pika')}"),
        ("RabbitMQ", rabbitmq),
        ("date", f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"),
        (
            "rounds",
            f"{sizes.rounds}; {sizes.work_rounds} for workers; {sizes.by_hand} for what takes less than a second",
        ),
        ("load before", f"{load:.1f} processes wanted a CPU in the minute before"),
    ]
    return table(("measured", "with"), *rows)


def cpu_model() -> str:
    """Return the name of the CPU, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def operating_system() -> str:
    """Return the name of the system and of its kernel."""
    with contextlib.suppress(OSError):
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    return platform.platform()


def plot(tasks_per_second: dict[int, float], file: Path) -> None:
    """Draw the scaling. Everything is a colour that can be seen on white and on black."""
    import matplotlib  # here, as it takes a second, and memory

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey, blue = "#808080", "#3b8eea"
    style = {f"{part}.color": grey for part in ("xtick", "ytick", "text")}
    style |= {"axes.edgecolor": grey, "axes.labelcolor": grey, "svg.fonttype": "none", "svg.hashsalt": "scaling"}
    style |= {"font.family": "sans-serif", "font.size": 11}
    workers = list(tasks_per_second)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 4))
        axes.plot(workers, workers, color=grey, linestyle="--", linewidth=1, label="ideal")
        axes.plot(workers, list(tasks_per_second.values()), color=blue, marker="o", linewidth=2, label="measured")
        for scale, ticks in ((axes.set_xscale, axes.set_xticks), (axes.set_yscale, axes.set_yticks)):
            scale("log", base=2)
            ticks(workers, [str(number) for number in workers])
        axes.set_xlabel("workers")
        axes.set_ylabel("one-dot tasks done in a second")
        axes.grid(color=grey, alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(file, transparent=True, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def profile(bench: Bench) -> None:
    """Print where worker.py spends its time on empty tasks: the functions that take most, without what they call."""
    bench.run([sys.executable, "new_task.py", "-"], MAIN, bench.tasks(bench.sizes.work))
    saved = bench.folder / "profile"
    process = bench.start([sys.executable, "-m", "cProfile", "-o", saved, "worker.py"], MAIN)
    deadline = time.monotonic() + LIMIT
    while bench.stdout.read_bytes().count(b"\n") < 2 * bench.sizes.work and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.wait()
    show = "import pstats, sys; pstats.Stats(sys.argv[1]).strip_dirs().sort_stats('tottime').print_stats(25)"
    subprocess.run([sys.executable, "-c", show, str(saved)], check=True)


def measure(bench: Bench, names: list[str], load: float) -> str:
    """Run the benchmarks of those names, print each one's section as it is there, and return the whole report."""
    report = [HEAD.format(explanation=METHOD, machine=machine(bench, load))]
    print(report[0])
    for name in names:
        benchmark = BENCHMARKS[name]
        report.append(f"## {title(benchmark)}\n\n{explanation(benchmark.__doc__)}\n\n{benchmark(bench)}\n")
        print(report[-1], flush=True)
    return "\n".join(report)


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    description = __doc__.replace("NAMES", ", ".join(BENCHMARKS))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=BENCHMARKS, help="do these benchmarks only")
    parser.add_argument("--quick", action="store_true", help="see that each benchmark works; the figures mean nothing")
    parser.add_argument("--profile", action="store_true", help="show where worker.py spends its time")
    parser.add_argument("--write", metavar="FOLDER", type=Path, help="write the report there; a full run: docs")
    chosen = parser.parse_args()
    if not (chosen.only or chosen.quick or chosen.profile):
        chosen.write = chosen.write or ROOT / "docs"
    return chosen


def install_c_clients() -> None:
    """Install the two C clients through apt where that may be used. Without them, their rows are left out."""
    if not shutil.which("amqp-publish"):
        install("amqp-tools")
    if not any(Path(include, "amqp.h").exists() for include in ("/usr/include", "/usr/local/include")):
        install("librabbitmq-dev")


def main() -> int:
    """Measure; return the exit status."""
    chosen = arguments()
    load = os.getloadavg()[0]
    if not (chosen.quick or chosen.profile):
        install_c_clients()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    began = time.monotonic()
    try:
        with Bench(QUICK if chosen.quick else FULL, folder) as bench:
            if chosen.profile:
                profile(bench)
                return 0
            report = measure(bench, chosen.only or list(BENCHMARKS), load)
        if chosen.write:
            chosen.write.mkdir(parents=True, exist_ok=True)
            (chosen.write / "benchmarks.md").write_text(report)
            if bench.scaling:
                plot(bench.scaling, chosen.write / "scaling.svg")
        print(
            f"Measured in {time.monotonic() - began:.0f} s" + (f", written to {chosen.write}" if chosen.write else "")
        )
        return 0
    except (Failed, NodeError, AMQPError, AssertionError) as problem:
        print(f" [!] {problem or repr(problem)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" [!] Interrupted", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
