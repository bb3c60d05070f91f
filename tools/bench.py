"""Measure how fast the two scripts are, side by side with minimal loops on the same machine, in one run.

    python tools/bench.py    in about 15 minutes; writes docs/benchmarks.md, its plot, and the table of docs/how-far.md

It starts RabbitMQ nodes of its own on loopback, in a temporary folder. What is compared takes turns, in an order that
changes from round to round, so that whatever else the machine does hits all of it. Figures are medians. Behind each is
its ratio to the first row: the median of the rounds' ratios, the smallest and the largest.
"""

import argparse
import contextlib
import inspect
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pika
import psutil
from node import Node, NodeError, close_all, cluster_nodes
from processes import ROOT, Script, interruptible, wait_until

sys.path.insert(0, str(ROOT))
from task_queue import QUEUE, QUORUM

WORKER, NEW_TASK = [sys.executable, "worker.py"], [sys.executable, "new_task.py"]
SEND, BASELINE = [*NEW_TASK, "-"], [sys.executable, "tools/baselines.py"]

# Lets a node move its log from memory to the queues' files, and tidy up; returns the bytes that are left in memory.
TIDY = """ra_log_wal:force_roll_over(ra_log_wal), ra_log_segment_writer:await(ra_log_segment_writer),
    [garbage_collect(P) || P <- processes()], erlang:memory(total)."""


class Queue:
    """The task_queue of a node, or of a cluster, and ways to measure on it. A measurement is a dict: {what: figure}."""

    def __init__(self, *nodes: Node, arguments: dict = QUORUM, keep: bool = False):
        self.url, self.keep = nodes[0].url, keep  # keep: whether its tasks stay there
        for node in nodes:
            node.start()
        # How commands are started on it. What they print is not read, as that would cost CPU.
        self.settings = {"env": {**os.environ, "AMQP_URL": self.url}, "cwd": ROOT, "stdout": subprocess.DEVNULL}
        self.channel = self.connect()
        self.channel.queue_declare(QUEUE, durable=True, arguments=arguments)

    def connect(self):
        """Return a channel of a new connection to it."""
        return pika.BlockingConnection(pika.URLParameters(f"{self.url}?heartbeat=0")).channel()

    def counts(self):
        """Return how many tasks wait, and how many workers there are: message_count, consumer_count."""
        return self.channel.queue_declare(QUEUE, passive=True).method

    def empty(self) -> None:
        """Throw away all tasks, once no worker holds any."""
        wait_until(lambda: self.counts().consumer_count == 0, "RabbitMQ notices that the workers are gone")
        if not self.keep:
            self.channel.queue_purge(QUEUE)

    def run(self, command: list, count: int, task: str = "twenty bytes, no dot") -> tuple[float, float, float]:
        """Run a command, so many tasks as its input; return its seconds, those of CPU, and its megabytes in the end."""
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = psutil.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **self.settings)
        with contextlib.suppress(BrokenPipeError):  # it has failed
            process.stdin.write(f"{task}\n".encode() * count)
            process.stdin.flush()
        memory = process.memory_info().rss / 1e6
        _, errors = process.communicate()
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process.returncode == 0, f"{command} ended with {process.returncode}: {errors.decode()[-500:]}"
        return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, memory

    def send(self, command: list, count: int) -> dict:
        """Measure sending a list of tasks, the start of the program included."""
        self.empty()
        wall, cpu, _ = self.run(command, count)
        return {"tasks a second": count / wall, "CPU per task, µs": cpu / count * 1e6}

    def work(self, command: list, count: int) -> dict:
        """Measure doing tasks without a dot. The worker's start doesn't count: it is stopped until all are there."""
        self.empty()
        worker = psutil.Popen(command, stderr=subprocess.PIPE, **self.settings)
        wait_until(lambda: self.counts().consumer_count, "the worker waits for tasks")
        worker.suspend()
        self.run(SEND, count)
        waiting, cpu, began = self.counts().message_count, sum(worker.cpu_times()[:2]), time.monotonic()
        worker.resume()
        # Not until all are done: a worker that is idle before we look would seem slow.
        wait_until(lambda: waiting - self.counts().message_count >= count * 0.9, "the worker works")
        done, wall = waiting - self.counts().message_count, time.monotonic() - began
        cpu, memory = sum(worker.cpu_times()[:2]) - cpu, worker.memory_full_info().uss
        worker.kill()
        worker.wait()
        return {"tasks a second": done / wall, "CPU per task, µs": cpu / done * 1e6, "memory, MB": memory / 1e6}


class Bench:
    """The benchmarks. Each of SECTIONS is a section of the report: its docstring, and the figures that it returns."""

    SECTIONS = "bulk", "worker", "by_hand", "queues", "scaling", "how_far"

    def __init__(self, quick: bool, folder: Path, pages: Path):
        self.quick, self.folder, self.pages = quick, folder, pages

    def report(self, names: list[str]) -> None:
        """Run benchmarks; print and write what they find."""
        self.pages.mkdir(exist_ok=True)
        node = Node(self.folder / "node")
        self.queue = Queue(node)
        versions = f"RabbitMQ {node.ctl('version').strip()}, Python {sys.version.split()[0]}, pika {pika.__version__}"
        cores = f"{os.cpu_count()} cores that everything shares"
        self.where = f"Measured on {time.strftime('%Y-%m-%d')}: {versions}, {cores}."
        _, _, how = __doc__.rpartition("\n\n")
        sections = [f"# Benchmarks\n\nWritten by `make bench`.\n{self.where}\n\n{how}"]
        for name in names:
            benchmark = getattr(self, name)
            sections.append(f"## {inspect.getdoc(benchmark)}\n\n{benchmark()}\n")
            print(sections[-1], flush=True)
        (self.pages / "benchmarks.md").write_text("\n".join(sections))

    def bulk(self) -> str:
        """Many tasks in

        How fast a list of tasks gets in, start-up included. Those with "confirmed" know that RabbitMQ has each task on
        disk; the tutorial's loop never learns what became of its tasks. The C client has up to 2000 tasks under way, as
        ours. The last line is what a task costs `new_task.py -` above its start: the start is that of an empty list.
        """
        many = self.size(50_000)
        senders = {
            "the tutorial's loop, unconfirmed": ([*BASELINE, "unconfirmed"], many),
            "`new_task.py -`, confirmed": (SEND, many),
            **self.c_client("publish", many, ", confirmed"),
            "the loop, each one confirmed before the next": ([*BASELINE, "confirmed"], self.size(2000)),
            "`new_task.py WORD` for each task, confirmed": ([*NEW_TASK, "hello"], 1),
        }
        figures = self.compare("sender", self.queue.send, senders, rounds=5)
        above = [(self.queue.run(SEND, many)[1] - self.queue.run(SEND, 0)[1]) / many for _ in range(self.size(5))]
        return f"{figures}\n\nCPU per task above the start: {number(median(above) * 1e6)} µs"

    def worker(self) -> str:
        """The worker's overhead

        Tasks without a dot, so there is no work: what is left is receiving, printing and acknowledging them one by one.
        The tutorial's loop has no heartbeats while it works, no reconnecting, no handling of signals and failures.
        """
        count = self.size(5000)
        loop, ours = {"the tutorial's loop": ([*BASELINE, "work"], count)}, {"`worker.py`": (WORKER, count)}
        return self.compare("worker", self.queue.work, loop | ours | self.c_client("work", count), rounds=15)

    def by_hand(self) -> str:
        """One task by hand

        A worker waits, and someone sends it a task. Most of the sender's time is the import of pika. Ours waits for the
        confirm, the tutorial's doesn't. The last figure is from the sender's start to the worker's "Received".
        """

        def once(sender: list, worker: list) -> dict:
            self.queue.empty()
            receiver = Script(*worker[1:], url=self.queue.url)
            receiver.wait_for("[*] Waiting")
            began = time.monotonic()
            wall, cpu, _ = self.queue.run(sender, 1)
            received = receiver.wait_for("Received").at - began
            receiver.kill()
            return {"sender, ms": wall * 1e3, "its CPU, ms": cpu * 1e3, "command to Received, ms": received * 1e3}

        theirs, ours = ([*BASELINE, "unconfirmed"], [*BASELINE, "work"]), ([*NEW_TASK, "hello"], WORKER)
        pairs = {"the tutorial's pair": theirs, "`new_task.py hello`, `worker.py`": ours}
        return self.compare("pair", once, pairs, rounds=21)

    def queues(self) -> str:
        """Quorum queue, classic queue, long queue, long list

        The scripts declare a quorum queue; older tutorials left a classic one. The quorum queue's log of every step has
        its price, but without it a cluster would lose tasks. In the long queue, other tasks wait all the time. Each is
        on a node of its own. `new_task.py -` has a window of unconfirmed tasks in memory, never the list.
        """
        many, sent, done = self.size(1_000_000), self.size(50_000), self.size(2000)
        classic = Queue(Node(self.folder / "classic"), arguments={})
        long = Queue(Node(self.folder / "long"), keep=True)
        few_mb, many_mb = number(self.queue.run(SEND, many // 100)[2]), number(long.run(SEND, many)[2])
        queues = {"quorum": (self.queue,), "classic": (classic,), f"quorum, {many:,} tasks in it": (long,)}
        sending = self.compare("`new_task.py -`", lambda queue: queue.send(SEND, sent), queues, rounds=5)
        working = self.compare("`worker.py`", lambda queue: queue.work(WORKER, done), queues, rounds=21)
        return f"{sending}\n\n{working}\n\nMemory: {few_mb} MB for {many // 100:,} tasks, {many_mb} MB for {many:,}"

    def scaling(self) -> str:
        """More workers

        One-dot tasks (a second of sleep each), as many for each worker, from the first "Received" to the last "Done".
        Sleeping workers don't compete for CPU: this is what queue and scripts cost, not what a busy machine carries.
        """
        import matplotlib.figure  # here, as it takes half a second

        counts, dots, points = (1, 2) if self.quick else (1, 2, 4, 8, 16, 32), self.size(5), []

        def work(count: int) -> dict:
            self.queue.empty()
            workers = [Script("worker.py", url=self.queue.url) for _ in range(count)]
            for worker in workers:
                worker.wait_for("[*] Waiting")
            self.queue.run(SEND, count * dots, "one second.")
            last = max(worker.wait_for("Done", times=dots).at for worker in workers)
            first = min(worker.wait_for("Received").at for worker in workers)
            for worker in workers:
                worker.kill()
            points.append((count, count * dots / (last - first)))
            return {"tasks a second": points[-1][1]}

        figures = self.compare("workers", work, {str(count): (count,) for count in counts}, rounds=5)
        axes = matplotlib.figure.Figure(figsize=(6.4, 4)).subplots()
        axes.plot(counts, counts, "--", label="ideal")
        axes.plot(*zip(*points, strict=True), "o", label="measured")
        axes.set(xlabel="workers", ylabel="one-dot tasks done in a second")
        axes.legend()
        axes.figure.savefig(self.pages / "scaling.svg", metadata={"Date": None})
        return f"{figures}\n\n![Tasks a second by the number of workers](scaling.svg)"

    def how_far(self) -> str:
        """How far it goes

        What one node carries, and what three nodes on the same machine do. docs/how-far.md reckons with that.
        """
        sizes = (1,) if self.quick else (1, 3)
        columns = [self.carried(cluster_nodes(self.folder / f"cluster{size}", size)) for size in sizes]
        rows = [[what, *(number(each[what]) for each in columns)] for what in columns[0]]
        figures = table(["nodes", *map(str, sizes)], *rows)
        page = (ROOT / "docs" / "how-far.md").read_text()
        markers = re.compile(r"(<!-- measured.*?-->).*?(<!-- end)", re.DOTALL)
        (self.pages / "how-far.md").write_text(markers.sub(rf"\1\n\n{self.where}\n\n{figures}\n\n\2", page))
        return figures

    def carried(self, nodes: list[Node]) -> dict[str, float]:
        """Return what a cluster carries. The first node leads its queue, and everyone connects to that."""
        queue, waiting, connections = Queue(*nodes), self.size(1_000_000), self.size(400)

        def used() -> tuple[int, int]:
            """Return the bytes that the first node has in memory, the least of some looks, and on disk."""
            memory = min(int(nodes[0].ctl("eval", TIDY)) for _ in range(self.size(10)))
            du = subprocess.run(["du", "-sk", nodes[0].folder / "data"], capture_output=True, text=True).stdout
            return memory, int(du.split()[0]) * 1024

        sent, done = queue.send(SEND, self.size(50_000)), queue.work(WORKER, self.size(2000))
        memory, disk = used()
        queue.run(SEND, waiting)
        full, full_disk = used()
        channels = [queue.connect() for _ in range(connections)]
        for channel in channels:
            channel.basic_qos(prefetch_count=1)
            channel.basic_consume(QUEUE, lambda *_: None)
        connected, _ = used()
        for node in nodes:
            node.kill()
        return {
            "tasks sent a second, by one `new_task.py -`": sent["tasks a second"],
            "empty tasks done a second, by one `worker.py`": done["tasks a second"],
            "RabbitMQ's memory for a worker's connection, on its node, kB": (connected - full) / connections / 1e3,
            "memory of each node for a million waiting tasks of 20 bytes, MB": (full - memory) / waiting,
            "disk of each node for a million waiting tasks of 20 bytes, MB": (full_disk - disk) / waiting,
            "memory of a `worker.py`, MB": done["memory, MB"],
        }

    def size(self, full: int) -> int:
        """Return how much to do: so much, or in a quick run a hundredth of it."""
        return max(1, full // 100) if self.quick else full

    def c_client(self, job: str, count: int, how: str = "") -> dict[str, tuple]:
        """Return the C baseline as a case to compare with; nothing where it can't be compiled."""
        make = ["make", "-C", self.folder, f"VPATH={ROOT}/tools", "CFLAGS=-O2", "LDLIBS=-lrabbitmq", "baseline"]
        if subprocess.run(make, capture_output=True).returncode == 0:
            return {f"tools/baseline.c{how}": ([self.folder / "baseline", job], count)}
        print("The C client is left out. For it: apt-get install gcc librabbitmq-dev\n", flush=True)
        return {}

    def compare(self, what: str, measure, cases: dict[str, tuple], rounds: int) -> str:
        """Call measure() with each case, once a round; return a table of what it measures."""
        results, names = {name: [] for name in cases}, list(cases)
        for _ in range(1 if self.quick else rounds):
            for name in names:
                results[name].append(measure(*cases[name]))
            names.append(names.pop(0))
        first = next(iter(results.values()))
        rows = [[name, *(cell(figure, each, first) for figure in first[0])] for name, each in results.items()]
        return table([what, *first[0]], *rows)


def cell(figure: str, ours: list[dict], theirs: list[dict]) -> str:
    """Return the median of a figure; behind it that of the rounds' ratios, and how far they spread."""
    # What took less than the system's clock can tell, as it may in a quick run, has no ratio.
    ratios = [a[figure] / b[figure] for a, b in zip(ours, theirs, strict=True) if b[figure]] or [float("nan")]
    spread = f"{number(min(ratios))} to {number(max(ratios))}"
    return f"{number(median(each[figure] for each in ours))}: **{number(median(ratios))}** ({spread})"


def number(value: float) -> str:
    """Return a figure with as many digits as mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], *rows: list[str]) -> str:
    """Return a table in Markdown that reads well as plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def main() -> str | None:
    """Measure; return what went wrong, if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=Bench.SECTIONS, help="measure some of it; writes nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works; writes to quick-bench in $TMPDIR")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        pages = Path(tempfile.gettempdir(), "quick-bench") if chosen.quick else ROOT / "docs"
        bench = Bench(chosen.quick, Path(folder), Path(folder) if chosen.only else pages)
        try:
            with interruptible(close_all):
                bench.report(chosen.only or Bench.SECTIONS)
        except (NodeError, AssertionError) as problem:
            return f" [!] {problem}"
        except KeyboardInterrupt:
            return " [!] Interrupted"


if __name__ == "__main__":
    sys.exit(main())
