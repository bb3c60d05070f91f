#!/usr/bin/env python3
"""Measure what docs/how-far.md reckons with, and write the figures into that page.

python tools/how_far.py              in about five minutes, on RabbitMQ nodes of its own on loopback
python tools/how_far.py --quick      with numbers too small to mean anything, written nowhere: to see that it works
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pika
from node import NodeError, cluster_nodes
from processes import ROOT, Script

sys.path.insert(0, str(ROOT))
from task_queue import QUEUE, settled_arguments

PAGE = ROOT / "docs" / "how-far.md"
MARKERS = "<!-- measured: written by tools/how_far.py -->", "<!-- end of what was measured -->"

# How many tasks to send, how many of them waiting in the queue to weigh, how many connections to weigh.
FULL = {"tasks": 40_000, "waiting": 1_000_000, "connections": 400}
QUICK = {"tasks": 500, "waiting": 2000, "connections": 10}
WORKERS = 4

# How long any one step may take. None does, unless it is broken.
LIMIT = 900


def send(url: str, tasks: int) -> float:
    """Send so many tasks of 20 bytes through `new_task.py -`; return how many a second, Python's start included."""
    with tempfile.TemporaryFile() as lines:
        lines.write(b"".join(b"task %015d\n" % number for number in range(tasks)))
        lines.seek(0)
        begin = time.monotonic()
        sender = Script("new_task.py", "-", url=url, stdin=lines)
        sender.wait_for(f"Sent {tasks} tasks", within=LIMIT)
    return tasks / (time.monotonic() - begin)


def waiting(url: str) -> int:
    """Return how many tasks wait in the queue."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        return connection.channel().queue_declare(QUEUE, passive=True).method.message_count


def work(url: str, tasks: int, workers: int) -> tuple[float, float]:
    """Let so many workers do the tasks that wait; return tasks a second, and the MB that one worker takes."""
    scripts = [Script("worker.py", url=url) for _ in range(workers)]
    try:
        for script in scripts:
            script.wait_for("[*] Waiting", within=LIMIT)
        begin, first = time.monotonic(), waiting(url)
        while (left := waiting(url)) > first * 0.1:  # the last tenth would measure how evenly they end
            if time.monotonic() - begin > LIMIT:
                raise TimeoutError(f"{left} of {tasks} tasks are left")
            time.sleep(0.2)
        rate = (first - left) / (time.monotonic() - begin)
        return rate, proportional_mb(scripts[0].process.pid)
    finally:
        for script in scripts:
            script.kill()


def proportional_mb(pid: int) -> float:
    """Return the memory of a process, where what several share is shared out among them."""
    (line,) = re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(line) / 1024


def erlang_mb(node) -> float:
    """Return the memory that a node's Erlang has in use, after its processes have tidied up."""
    tidy = "[erlang:garbage_collect(P) || P <- erlang:processes()], erlang:memory(total)."
    return int(node.ctl("eval", tidy)) / 1e6


def purge(url: str) -> None:
    """Empty the queue."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_purge(QUEUE)


def weigh_connections(node, count: int) -> float:
    """Return the kB of a node's memory for each connection that has one channel and one consumer, as a worker has."""
    purge(node.url)  # else each would get a task
    before, connections = erlang_mb(node), []
    for _ in range(count):
        connection = pika.BlockingConnection(pika.URLParameters(node.url + "?heartbeat=0"))
        connections.append(connection)
        channel = connection.channel()
        channel.basic_qos(prefetch_count=1)
        channel.basic_consume(QUEUE, lambda *_: None)
    per_connection = (erlang_mb(node) - before) / count * 1000
    for connection in connections:
        connection.close()
    return per_connection


def weigh_tasks(node, count: int) -> tuple[float, float]:
    """Return the MB of memory, and of disk, that a million waiting tasks of 20 bytes take on a node."""
    purge(node.url)
    before, disk_before = erlang_mb(node), disk_mb(node)
    send(node.url, count)
    millions = count / 1e6
    return (erlang_mb(node) - before) / millions, (disk_mb(node) - disk_before) / millions


def disk_mb(node) -> float:
    """Return how much disk a node's data take."""
    return (
        int(subprocess.run(["du", "-sk", node.folder / "data"], capture_output=True, check=True).stdout.split()[0])
        / 1e3
    )


def measure(count: int, sizes: dict) -> dict:
    """Return the figures for a cluster of so many nodes."""
    with tempfile.TemporaryDirectory(prefix="how-far-") as folder:
        first, *others = nodes = cluster_nodes(folder, count)
        try:
            first.start()
            for node in others:
                node.launch()
            for node in others:
                node.wait_until_ready()
            with pika.BlockingConnection(pika.URLParameters(first.url)) as connection:
                settled_arguments(lambda **queue: connection.channel().queue_declare(**queue).method)
            url = ";".join(node.url for node in nodes)
            figures = {"sent": send(url, sizes["tasks"])}
            figures["four"], figures["worker_mb"] = work(first.url, sizes["tasks"], WORKERS)
            purge(first.url)
            send(url, sizes["tasks"] // 4)
            figures["one"], _ = work(first.url, sizes["tasks"] // 4, 1)
            figures["connection_kb"] = weigh_connections(first, sizes["connections"])
            figures["million_mb"], figures["million_disk_mb"] = weigh_tasks(first, sizes["waiting"])
            figures["version"] = first.ctl("version").strip()
            return figures
        finally:
            for node in nodes:
                node.kill()
            nodes[-1].close()


def table(one: dict, three: dict) -> str:
    """Return the figures as a table in Markdown."""
    rows = [
        ("", "one node", "three nodes"),
        ("---", "---:", "---:"),
        ("tasks sent a second, by one `new_task.py -`", *(f"{case['sent']:,.0f}" for case in (one, three))),
        ("empty tasks done a second, by one `worker.py`", *(f"{case['one']:,.0f}" for case in (one, three))),
        (f"empty tasks done a second, by {WORKERS} of them", *(f"{case['four']:,.0f}" for case in (one, three))),
        (
            "RabbitMQ's memory for a worker's connection, on its node",
            *(f"{case['connection_kb']:,.0f} kB" for case in (one, three)),
        ),
        (
            "memory of each node for a million waiting tasks of 20 bytes",
            *(f"{case['million_mb']:,.0f} MB" for case in (one, three)),
        ),
        (
            "disk of each node for a million waiting tasks of 20 bytes",
            *(f"{case['million_disk_mb']:,.0f} MB" for case in (one, three)),
        ),
        ("memory of a `worker.py`", *(f"{case['worker_mb']:,.0f} MB" for case in (one, three))),
    ]
    machine = f"RabbitMQ {one['version']}, Python {platform.python_version()}, pika {pika.__version__}"
    where = f"Measured on {time.strftime('%Y-%m-%d')}: {machine}, {os.cpu_count()} cores that everything shares."
    return where + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(text: str) -> None:
    """Put the text between the markers of the page."""
    head, rest = PAGE.read_text().split(MARKERS[0])
    tail = rest.split(MARKERS[1])[1]
    PAGE.write_text(f"{head}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{tail}")


def main() -> int:
    """Measure, print, and write."""
    if sys.argv[1:] not in ([], ["--quick"]):
        print("usage: python tools/how_far.py [--quick]", file=sys.stderr)
        return 2
    sizes = QUICK if sys.argv[1:] else FULL
    try:
        text = table(measure(1, sizes), measure(3, sizes))
    except NodeError as problem:
        print(f" [!] {problem}", file=sys.stderr)
        return 1
    print(text)
    if sizes is FULL:
        write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
