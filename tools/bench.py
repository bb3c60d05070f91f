"""Measure how fast the two scripts are, side by side with minimal loops on the same RabbitMQ, in one run.

    python tools/bench.py                everything, in about 15 minutes; writes docs/benchmarks.md, docs/scaling.svg,
                                         and the table of docs/how-far.md
    python tools/bench.py --only NAME    one benchmark or several, and write nothing: NAMES
    python tools/bench.py --quick        everything, with numbers too small to mean anything: to see that it works

It starts RabbitMQ nodes of its own on loopback, in a temporary folder. What is compared takes turns, in an order that
changes from round to round, so that whatever else the machine does hits all of it. A ratio is the median of the
rounds' ratios, the smallest and the largest behind it; other figures are medians.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pika
import psutil
from node import Node, NodeError, cluster_nodes
from processes import ROOT, Script, ignore_signals, raise_on_signals, wait_until

sys.path.insert(0, str(ROOT))
from task_queue import QUEUE, QUORUM

BASELINES = str(ROOT / "tools" / "baselines.py")
LOOP, SENDER = [sys.executable, BASELINES, "unconfirmed"], [sys.executable, "new_task.py", "-"]
WORKER, PLAIN_WORKER = [sys.executable, "worker.py"], [sys.executable, BASELINES, "work"]

# Virtual hosts, each with a task_queue of its own, so that a full queue and an empty one can take turns.
MAIN, OTHER, DEEP, CLASSIC = "main", "other", "deep", "classic"

# How long one run of anything may take. Nothing does, unless it is broken.
LIMIT = 900


class Sizes(NamedTuple):
    """How much of everything a run does."""

    rounds: int
    bulk: int  # tasks for a sender that doesn't wait
    slow: int  # tasks for a sender that waits for each confirm
    processes: int  # tasks that are sent by a process each
    work: int  # empty tasks for a worker
    short: int  # rounds of what takes less than a second
    workers: tuple[int, ...]  # how many workers share one-dot tasks
    dots: int  # one-dot tasks for each of them
    backlog: int  # tasks in a long list
    connections: int  # connections to weigh


FULL = Sizes(5, 50_000, 2000, 20, 1000, 21, (1, 2, 4, 8, 16, 32), 5, 1_000_000, 400)
QUICK = Sizes(1, 300, 20, 1, 60, 1, (1, 2), 1, 2000, 10)


class Usage(NamedTuple):
    """Seconds, and seconds of CPU, of a run or of one task of it."""

    wall: float
    cpu: float

    def per(self, tasks: float) -> "Usage":
        """The same for one of so many tasks."""
        return Usage(self.wall / tasks, self.cpu / tasks)


class Bench:
    """RabbitMQ, one node or a cluster, and ways to measure on it."""

    def __init__(self, sizes: Sizes, folder: Path, nodes: list[Node]):
        self.sizes, self.folder, self.nodes = sizes, folder, nodes
        self.scaling: dict[int, float] = {}  # workers -> how many one-dot tasks they did in a second, for the plot
        self._running: list[subprocess.Popen | Script] = []

    def __enter__(self) -> "Bench":
        try:
            for node in self.nodes:
                node.launch()
            for node in self.nodes:
                node.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.end()
        for node in self.nodes:
            node.kill()
        for node in self.nodes:
            node.close()

    def url(self, vhost: str) -> str:
        """Return AMQP_URL for one of the virtual hosts."""
        return ";".join(node.url.replace("%2F", vhost) for node in self.nodes)

    def connect(self, vhost: str) -> pika.BlockingConnection:
        """Return a connection of our own, to the first node."""
        return pika.BlockingConnection(pika.URLParameters(self.nodes[0].url.replace("%2F", vhost)))

    def waiting(self, vhost: str):
        """Return RabbitMQ's counts: message_count and consumer_count."""
        with self.connect(vhost) as connection:
            return connection.channel().queue_declare(QUEUE, passive=True).method

    def empty(self, vhost: str) -> None:
        """Throw away all tasks, once nobody holds any."""
        wait_until(lambda: self.waiting(vhost).consumer_count == 0, "workers that were killed are gone")
        with self.connect(vhost) as connection:
            connection.channel().queue_purge(QUEUE)

    def tasks(self, number: int, task: str = "task {:015}") -> Path:
        """Return a file with so many tasks, one per line."""
        file = self.folder / f"{number}-{len(task)}"
        if not file.exists():
            with file.open("w") as lines:
                lines.writelines(f"{task.format(n)}\n" for n in range(number))
        return file

    def start(self, command: list, vhost: str, stdin=subprocess.DEVNULL) -> subprocess.Popen:
        """Start a command; its output goes to a file, as reading from a pipe would cost CPU here."""
        environment = {**os.environ, "AMQP_URL": self.url(vhost)}
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                list(map(str, command)), env=environment, cwd=ROOT, stdin=stdin, stdout=output, stderr=output
            )
        self._running.append(process)
        return process

    @property
    def output(self) -> Path:
        """The file with what the command prints that was started last."""
        return self.folder / "output"

    def run(self, command: list, vhost: str = MAIN, tasks: Path | None = None) -> Usage:
        """Run a command to its end, with a file of tasks as its input; it must succeed."""
        with tasks.open("rb") if tasks else contextlib.nullcontext(subprocess.DEVNULL) as stdin:
            began = time.perf_counter()
            process = self.start(command, vhost, stdin)
            _, status, used = os.wait4(process.pid, 0)
        usage = Usage(time.perf_counter() - began, used.ru_utime + used.ru_stime)
        process.returncode = os.waitstatus_to_exitcode(status)  # as it was waited for behind Popen's back
        self._running.remove(process)
        assert process.returncode == 0, f"{command} ended with {process.returncode}: {self.output.read_text()[-500:]}"
        return usage

    def send(self, command: list, number: int, vhost: str = MAIN) -> Usage:
        """Return what a task takes that comes from a list, the start of the program included."""
        if vhost != DEEP:
            self.empty(vhost)
        return self.run(command, vhost, self.tasks(number)).per(number)

    def work(self, command: list, vhost: str = MAIN) -> Usage:
        """Return what an empty task takes a worker, without the worker's start."""
        if vhost != DEEP:
            self.empty(vhost)
            self.run(SENDER, vhost, self.tasks(self.sizes.work))
        process = self.start(command, vhost)
        watched, done = psutil.Process(process.pid), 0
        with self.output.open("rb") as printed:

            def after(number: int) -> tuple[float, float, int]:
                """Return the time, the CPU time and the tasks done, when at least so many are."""
                nonlocal done
                deadline = time.monotonic() + LIMIT
                while done < number:
                    assert process.poll() is None and time.monotonic() < deadline, self.output.read_text()[-500:]
                    time.sleep(0.005)  # some tenths of a percent of what is measured
                    done += printed.read().count(b" [x] Done")
                return time.perf_counter(), sum(watched.cpu_times()[:2]), done

            first, last = after(self.sizes.work // 20), after(self.sizes.work - 1)
        self.end()
        wall, cpu, count = (b - a for a, b in zip(first, last, strict=True))
        return Usage(wall, cpu).per(count)

    def workers(self, number: int, command: tuple = ("worker.py",), vhost: str = MAIN) -> list[Script]:
        """Start workers whose lines are read, and return them when they wait for tasks."""
        scripts = [Script(*command, url=self.url(vhost)) for _ in range(number)]
        self._running += scripts
        for script in scripts:
            script.wait_for("[*] Waiting", within=LIMIT)
        return scripts

    def end(self) -> None:
        """End whatever was started and still runs."""
        while self._running:
            process = self._running.pop()
            process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.ends()

    def peak_memory(self, number: int, vhost: str) -> float:
        """Return how many megabytes `new_task.py -` has in memory at most while it sends so many tasks."""
        with self.tasks(number).open("rb") as stdin:
            process = self.start(SENDER, vhost, stdin)
            watched, peak = psutil.Process(process.pid), 0
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    peak = max(peak, watched.memory_info().rss)
                time.sleep(0.01)
        assert process.returncode == 0, self.output.read_text()[-500:]
        return peak / 1e6

    def c_client(self, job: str) -> list | None:
        """Return the command of the C baseline, compiled; None where that can't be done."""
        program = self.folder / "baseline"
        command = ["cc", "-O2", "-o", program, ROOT / "tools" / "baseline.c", "-lrabbitmq"]
        if not program.exists() and (not shutil.which("cc") or subprocess.run(command, capture_output=True).returncode):
            print("The C client is left out. For it: apt-get install gcc librabbitmq-dev", flush=True)
            return None
        return [program, job]


def in_turns(variants: dict[str, Callable], rounds: int) -> dict[str, list]:
    """Call each variant once a round; return what they returned. The order changes from round to round."""
    results = {name: [] for name in variants}
    for turn in range(rounds):
        names = list(variants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            results[name].append(variants[name]())
    return results


def times(value: float) -> str:
    """Return a ratio with as many digits as mean something."""
    return f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.2g}" if value < 0.1 else f"{value:,.0f}"


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Return the median of the rounds' ratios, and how far they spread."""
    # What took less than the system's clock can tell, as it may in a quick run, has no ratio.
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b] or [float("nan")]
    return f"**{times(statistics.median(ratios))}** ({times(min(ratios))} to {times(max(ratios))})"


def median(values, unit: str = "", scale: float = 1) -> str:
    """Return the median with three digits, and thousands apart."""
    value = statistics.median(values) * scale
    digits = max(0, 2 - len(str(int(abs(value))))) + (abs(value) < 10)
    return f"{value:,.{digits}f} {unit}".strip()


def table(*rows) -> str:
    """Return a Markdown table that reads well as plain text, too; the first row is its head."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def usage_table(what: str, results: dict[str, list[Usage]], against: str, per: str = "task") -> str:
    """Return a table of speed and CPU, with ratios to the variant that the others are compared with."""
    (base_walls, base_cpus), rows = zip(*results[against], strict=True), []
    for name, usages in results.items():
        walls, cpus = zip(*usages, strict=True)
        ratios = ("1", "1") if name == against else (ratio(base_walls, walls), ratio(cpus, base_cpus))
        rows.append((name, *ratios, median(walls, "µs", 1e6), median(cpus, "µs", 1e6)))
    return table((what, "speed, ratio", "CPU, ratio", f"time per {per}", f"CPU per {per}"), *rows)


# The benchmarks. Each returns a section of the report; its docstring is what the section says below its title.


def bulk(bench: Bench) -> str:
    """Many tasks in

    How fast a list of tasks gets in, start-up included. The speed of all is divided by that of the tutorial's loop,
    which sends tasks and never learns what became of them. Those with "confirmed" know that RabbitMQ has each task on
    disk. The last line is what a task costs `new_task.py -` above its start: the start is that of an empty list.
    """
    sizes, ours, loop = bench.sizes, "`new_task.py -`, confirmed", "the tutorial's loop, unconfirmed"

    def one_process_each() -> Usage:
        bench.empty(MAIN)
        runs = [bench.run([sys.executable, "new_task.py", "task"]) for _ in range(sizes.processes)]
        return Usage(*map(sum, zip(*runs, strict=True))).per(sizes.processes)

    variants = {
        ours: lambda: bench.send(SENDER, sizes.bulk),
        loop: lambda: bench.send(LOOP, sizes.bulk),
        "each one confirmed before the next": lambda: bench.send([*LOOP[:-1], "confirmed"], sizes.slow),
        "`new_task.py WORD` for each task, confirmed": one_process_each,
    }
    if client := bench.c_client("publish"):
        variants["tools/baseline.c, 2000 under way, confirmed"] = lambda: bench.send(client, sizes.bulk)
    results = in_turns(variants, sizes.rounds)
    starts = [bench.run(SENDER, MAIN, bench.tasks(0)).cpu for _ in range(sizes.rounds)]
    above = [usage.cpu - statistics.median(starts) / sizes.bulk for usage in results[ours]]
    return f"{usage_table('sender', results, loop)}\n\nCPU per task above the start: {median(above, 'µs', 1e6)}"


def worker(bench: Bench) -> str:
    """The worker's overhead

    Tasks without a dot, so there is no work: what is left is receiving, printing and acknowledging them one by one.
    The tutorial's loop has no heartbeats while it works, no reconnecting, no handling of signals and of tasks that
    fail: what `worker.py` adds costs the difference.
    """
    loop = "the tutorial's loop"
    commands = {"`worker.py`": WORKER, loop: PLAIN_WORKER}
    if client := bench.c_client("work"):
        commands["tools/baseline.c"] = client
    variants = {name: lambda command=command: bench.work(command) for name, command in commands.items()}
    return usage_table("worker", in_turns(variants, bench.sizes.short), loop)


def by_hand(bench: Bench) -> str:
    """One task by hand

    `python new_task.py hello` against the tutorial's sender, from the start of Python to its end. Ours waits for the
    confirm, theirs doesn't. Most of either is the import of pika.
    """
    bench.empty(MAIN)
    theirs = "the tutorial's sender, unconfirmed"
    commands = {"`new_task.py hello`, confirmed": ["new_task.py", "hello"], theirs: [BASELINES, "one", "hello"]}
    variants = {name: lambda words=words: bench.run([sys.executable, *words]) for name, words in commands.items()}
    return usage_table("sender", in_turns(variants, bench.sizes.short), theirs, per="run")


def latency(bench: Bench) -> str:
    """From the sender to an idle worker

    What someone sees who has a worker waiting in one shell and sends a task in another: from the command to "Received".
    """

    def sends(vhost: str, sender: tuple, worker: tuple):
        bench.empty(vhost)
        (receiver,) = bench.workers(1, worker, vhost)

        def send() -> float:
            before, began = len(receiver.output()), time.monotonic()
            Script(*sender, "hello", url=bench.url(vhost)).ends()
            return receiver.wait_for("Received", times=before // 2 + 1).at - began

        return send

    ours = sends(MAIN, ("new_task.py",), ("worker.py",))
    theirs = sends(OTHER, (BASELINES, "one"), (BASELINES, "work"))
    results = in_turns({"`new_task.py` and `worker.py`": ours, "the tutorial's pair": theirs}, bench.sizes.short)
    bench.end()
    (name, values), (other, base) = results.items()
    rows = (name, ratio(values, base), median(values, "ms", 1000)), (other, "1", median(base, "ms", 1000))
    return table(("pair", "ratio", "command to Received"), *rows)


def scaling(bench: Bench) -> str:
    """More workers

    One-dot tasks (a second of sleep each), as many for each worker. Efficiency is the ideal time divided by the time
    from the first "Received" to the last "Done". Sleeping workers don't compete for CPU: this shows what the queue
    and the scripts cost, and not how many busy workers the machine can carry.
    """
    sizes, efficiency = bench.sizes, {number: [] for number in bench.sizes.workers}

    def makespan(workers: list[Script]) -> float:
        began, number = time.monotonic(), len(workers) * sizes.dots
        bench.run(SENDER, MAIN, bench.tasks(number, "one second."))

        def times() -> list[float]:
            lines = [line for worker in workers for line in worker.lines if line.at > began]
            return [line.at for line in lines if "[x]" in line.text]

        wait_until(lambda: len(times()) == 2 * number, f"{number} one-dot tasks are done", LIMIT)
        return max(times()) - min(times())

    for _ in range(sizes.rounds):
        bench.empty(MAIN)
        workers: list[Script] = []
        for number in sizes.workers:  # those that are there stay: to start 63 of them takes longer than 32
            workers += bench.workers(number - len(workers))
            efficiency[number].append(sizes.dots / makespan(workers))
        bench.end()
    bench.scaling = {number: number * statistics.median(values) for number, values in efficiency.items()}
    rows = [(str(number), ratio(values, [1] * len(values))) for number, values in efficiency.items()]
    return table(("workers", "efficiency"), *rows) + "\n\n![Tasks a second by the number of workers](scaling.svg)"


def quorum(bench: Bench) -> str:
    """Quorum queue and classic queue

    `new_task.py -` and `worker.py` on the queue that they declare themselves, and on a durable classic queue, as older
    tutorials left it. Where the quorum queue is slower, that is the price for its log of every step, which is what a
    cluster needs to lose nothing, and for its count of deliveries.
    """
    return two_queues(bench, {"quorum": MAIN, "classic": CLASSIC}, against="classic")


def two_queues(bench: Bench, vhosts: dict[str, str], against: str) -> str:
    """Return tables of sending to, and working on, queues that differ."""
    sizes = bench.sizes
    sent = in_turns({name: lambda v=v: bench.send(SENDER, sizes.bulk, v) for name, v in vhosts.items()}, sizes.rounds)
    done = in_turns({name: lambda v=v: bench.work(WORKER, v) for name, v in vhosts.items()}, sizes.short)
    return f"{usage_table('`new_task.py -`', sent, against)}\n\n{usage_table('`worker.py`', done, against)}"


def backlog(bench: Bench) -> str:
    """A long list, and a long queue

    The memory that `new_task.py -` takes at most (resident set size): what it holds is a window of tasks that are not
    confirmed, never the list. And the speed of sending to, and working on, a queue with nothing else in it and one
    with a backlog (in another virtual host).
    """
    few, many = bench.sizes.backlog // 100, bench.sizes.backlog
    peaks = {number: bench.peak_memory(number, vhost) for number, vhost in ((few, OTHER), (many, DEEP))}
    rows = [(f"{number:,}", f"{peak:.1f} MB") for number, peak in peaks.items()]
    vhosts = {"an empty queue": MAIN, f"{many:,} tasks in the queue": DEEP}
    return f"{table(('tasks', 'peak memory'), *rows)}\n\n{two_queues(bench, vhosts, 'an empty queue')}"


BENCHMARKS = {
    "bulk": bulk,
    "worker": worker,
    "by-hand": by_hand,
    "latency": latency,
    "scaling": scaling,
    "quorum": quorum,
    "backlog": backlog,
}


def virtual_hosts() -> dict:
    """Return the definitions with which RabbitMQ starts. The tutorial's queue is in each virtual host."""
    names, everything = (MAIN, OTHER, DEEP, CLASSIC), {"configure": ".*", "write": ".*", "read": ".*"}
    queue = {"name": QUEUE, "durable": True, "auto_delete": False}
    return {
        "users": [{"name": "guest", "password": "guest", "tags": "administrator"}],
        "vhosts": [{"name": name} for name in names],
        "permissions": [{"user": "guest", "vhost": name, **everything} for name in names],
        "queues": [{**queue, "vhost": name, "arguments": {} if name == CLASSIC else QUORUM} for name in names],
    }


def carried(sizes: Sizes, folder: Path, count: int) -> tuple[str, ...]:
    """Return what a cluster of so many nodes carries: a column of the table in docs/how-far.md."""
    vhost = "%2F"
    with Bench(sizes, folder, cluster_nodes(folder, count)) as bench:
        node = bench.nodes[0]
        bench.run([sys.executable, "new_task.py"], vhost)  # which declares the queue

        def memory() -> float:
            tidy = "[erlang:garbage_collect(P) || P <- erlang:processes()], erlang:memory(total)."
            return int(node.ctl("eval", tidy)) / 1e6

        def disk() -> float:
            return sum(file.stat().st_size for file in (node.folder / "data").rglob("*") if file.is_file()) / 1e6

        sent = bench.send(SENDER, sizes.bulk, vhost)
        (one,), before = bench.workers(1, vhost=vhost), time.monotonic()
        wait_until(lambda: bench.waiting(vhost).message_count < sizes.bulk * 0.9, "a worker works", LIMIT)
        done = (sizes.bulk - bench.waiting(vhost).message_count) / (time.monotonic() - before)
        worker_mb = psutil.Process(one.process.pid).memory_full_info().pss / 1e6
        bench.end()
        bench.empty(vhost)
        before, connections = memory(), [bench.connect(vhost) for _ in range(sizes.connections)]
        for connection in connections:
            connection.channel().basic_consume(QUEUE, lambda *_: None)
        kilobytes = (memory() - before) / len(connections) * 1000
        for connection in connections:
            connection.close()
        bench.empty(vhost)
        before, disk_before = memory(), disk()
        bench.run(SENDER, vhost, bench.tasks(sizes.backlog))
        megabytes, disk_mb = ((a - b) * 1e6 / sizes.backlog for a, b in ((memory(), before), (disk(), disk_before)))
    return (
        f"{count} node{'s' * (count > 1)}",
        f"{1 / sent.wall:,.0f}",
        f"{done:,.0f}",
        f"{kilobytes:,.0f} kB",
        f"{megabytes:,.0f} MB",
        f"{disk_mb:,.0f} MB",
        f"{worker_mb:,.0f} MB",
    )


def how_far(sizes: Sizes, folder: Path) -> str:
    """Return the table that docs/how-far.md reckons with."""
    what = (
        "",
        "tasks sent a second, by one `new_task.py -`",
        "empty tasks done a second, by one `worker.py`",
        "RabbitMQ's memory for a worker's connection, on its node",
        "memory of each node for a million waiting tasks of 20 bytes",
        "disk of each node for a million waiting tasks of 20 bytes",
        "memory of a `worker.py`",
    )
    columns = [carried(sizes, folder / f"cluster{count}", count) for count in ((1,) if sizes is QUICK else (1, 3))]
    return table(*zip(what, *columns, strict=True))


def plot(tasks_per_second: dict[int, float], file: Path) -> None:
    """Draw the scaling. Everything is a colour that can be seen on white and on black."""
    import matplotlib  # here, as it takes a second, and memory

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey, blue = "#808080", "#3b8eea"
    style = {f"{part}.color": grey for part in ("xtick", "ytick", "text")}
    style |= {"axes.edgecolor": grey, "axes.labelcolor": grey, "svg.fonttype": "none", "svg.hashsalt": "scaling"}
    workers = list(tasks_per_second)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(6.4, 4))
        axes.plot(workers, workers, color=grey, linestyle="--", linewidth=1, label="ideal")
        axes.plot(workers, list(tasks_per_second.values()), color=blue, marker="o", linewidth=2, label="measured")
        axes.set_xlabel("workers")
        axes.set_ylabel("one-dot tasks done in a second")
        axes.grid(color=grey, alpha=0.25, linewidth=0.5)
        axes.legend(frameon=False)
        figure.savefig(file, transparent=True, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def head(bench: Bench) -> str:
    """Return the top of the report: how it was measured, and on what."""
    with bench.connect(MAIN) as connection:
        server = connection._impl.server_properties  # BlockingConnection has no public name for it
    versions = f"Python {platform.python_version()}, pika {importlib.metadata.version('pika')}"
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.platform()}"
    rabbitmq = f"RabbitMQ {server['version']} on {server['platform']}"
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    how = __doc__.strip().rpartition("\n\n")[2]
    return f"# Benchmarks\n\nWritten by `make bench`, on {today}: {rabbitmq}, {versions}; {machine}.\n\n{how}\n"


def section(bench: Bench, benchmark: Callable) -> str:
    """Run a benchmark, and return its section of the report: title, explanation, figures."""
    title, _, explanation = benchmark.__doc__.partition("\n\n")
    explanation = "\n".join(line.strip() for line in explanation.strip().splitlines())
    text = f"## {title}\n\n{explanation}\n\n{benchmark(bench)}\n"
    print(text, flush=True)
    return text


def main() -> int:
    """Measure; return the exit status."""
    names = [*BENCHMARKS, "how-far"]
    parser = argparse.ArgumentParser(
        description=__doc__.replace("NAMES", ", ".join(names)), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=names, help="do these benchmarks only")
    parser.add_argument("--quick", action="store_true", help="see that each benchmark works; the figures mean nothing")
    parser.add_argument("--write", metavar="FOLDER", type=Path, help="write the report there; a full run: docs")
    chosen = parser.parse_args()
    if not (chosen.only or chosen.quick):
        chosen.write = chosen.write or ROOT / "docs"
    sizes, names = QUICK if chosen.quick else FULL, chosen.only or names
    raise_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        (folder / "definitions.json").write_text(json.dumps(virtual_hosts()))
        node = Node(folder / "node", config=f"load_definitions = {folder}/definitions.json\n")
        with Bench(sizes, folder, [node]) as bench:
            report = [head(bench), *(section(bench, BENCHMARKS[name]) for name in names if name in BENCHMARKS)]
        if "how-far" in names:
            print(far := how_far(sizes, folder))
        if chosen.write:
            chosen.write.mkdir(parents=True, exist_ok=True)
            (chosen.write / "benchmarks.md").write_text("\n".join(report))
            plot(bench.scaling, chosen.write / "scaling.svg")
            page = (ROOT / "docs" / "how-far.md").read_text()
            markers = re.compile(r"(<!-- measured.*?-->).*?(<!-- end)", re.DOTALL)
            (chosen.write / "how-far.md").write_text(markers.sub(rf"\1\n\n{far}\n\n\2", page))
        return 0
    except (NodeError, AssertionError) as problem:
        print(f" [!] {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" [!] Interrupted", file=sys.stderr)
    finally:
        ignore_signals()
        shutil.rmtree(folder, ignore_errors=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
