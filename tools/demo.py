"""Plays the work-queue tutorial on a real RabbitMQ, with the real new_task.py and worker.py, and counts the outcome.

    make demo

RabbitMQ is found or started by tools/rabbitmq.py and stays up; `make stop` stops it if the demo started it.
"""
# ruff: noqa: E402

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C during the imports, which take a moment: just end, no traceback

import os
import queue
import re
import subprocess
import sys
import threading
import time
from ast import literal_eval
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import rabbitmq
from pika.exceptions import ChannelClosedByBroker
from rabbitmq_node import Node, NodeError

from task_queue import QUEUE
from task_queue.address import describe

ROOT = rabbitmq.ROOT

# How long to wait for a line that must come, before the demo calls it a failure; the longest task takes 8 s.
PATIENCE = 30

# How long a process may take to end when the demo clears up, before it is killed.
GOODBYE = 3

# How far a task is when its worker is killed: far enough to see that it is being done.
MID_TASK = 1.5

# What ends the demo early: Ctrl+C, kill, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The lines of the two scripts that count.
TASK_LINE = re.compile(r" \[x\] (Sent|Received) (b?['\"].*['\"])( \(redelivered\))?$")
WAITING_LINE, DONE_LINE = " [*] Waiting", " [x] Done"

COLOURS = {1: "36", 2: "33", 3: "35", "bold": "1", "red": "31", "green": "32"}


class Failed(Exception):
    """The demo can't go on. The message is for the user."""


@dataclass
class Event:
    """A line that counts, printed in a shell. what: waiting, sent, received, done or ended."""

    shell: int
    what: str
    task: str = ""
    redelivered: bool = False


class Shell:
    """One of the three shells that a person would have open: it runs one command at a time."""

    def __init__(self, number: int, lines: queue.SimpleQueue):
        self.number, self.lines = number, lines
        self.process = None
        self.task = ""  # what its worker is doing

    def run(self, *command: str) -> None:
        """Start one of the two scripts; each line that it prints goes to the queue of lines, None at its end."""
        # In a session of its own: a Ctrl+C in this terminal is for the demo, which then ends it properly.
        with signals_held():
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.lines.put((self, line.rstrip("\n")))
        process.wait()
        self.lines.put((self, None))

    def terminate(self) -> None:
        """Ask what runs here to end."""
        if self.process:
            self.process.terminate()

    def end(self) -> None:
        """Wait until what runs here has ended, and kill it if that takes too long."""
        try:
            if self.process:
                self.process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Demo:
    """The three shells, what they printed, and what was seen to be wrong."""

    def __init__(self):
        self.lines = queue.SimpleQueue()
        self.shells = {number: Shell(number, self.lines) for number in (1, 2, 3)}
        self.events: list[Event] = []
        self.tasks: list[str] = []  # all that new_task.py was asked to send
        self.surprises = 0
        self.server = None  # RabbitMQ, if the demo started it

    # What a person does in a shell.

    def work(self, number: int) -> None:
        """Start worker.py and wait until it waits."""
        self._type(number, "worker.py")
        before = self.count(number, "waiting")
        self.until(lambda: self.count(number, "waiting") > before, f"worker.py in shell {number} to wait for tasks")

    def send(self, task: str) -> None:
        """Send a task with new_task.py from shell 3 and wait until it is sent."""
        self.tasks.append(task)
        self._type(3, "new_task.py", task)
        self._until_ended(3)
        if not self.of("sent", task):
            raise Failed(f"new_task.py did not report {task!r} as sent")

    def ctrl_c(self, number: int) -> None:
        """Press Ctrl+C in a shell and wait until its worker has ended."""
        show(number, "^C")
        self.shells[number].process.send_signal(signal.SIGINT)
        self._until_ended(number)

    def kill_9(self, number: int) -> None:
        """Kill the worker of a shell from shell 3."""
        process = self.shells[number].process
        show(3, f"$ kill -9 {process.pid}    # the worker in shell {number}", "bold")
        process.kill()
        self._until_ended(number)
        show(number, "Killed")

    def _type(self, number: int, script: str, *arguments: str) -> None:
        typed = " ".join([python(), script, *(f'"{argument}"' for argument in arguments)])
        show(number, f"$ {typed}", "bold")
        self.shells[number].run(script, *arguments)

    # What the person sees.

    def until(self, condition, what: str) -> None:
        """Show what the shells print until the condition holds; Failed if it doesn't in time."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self._take_line(deadline, f"waited {PATIENCE} s in vain for {what}")

    def pause(self, seconds: float) -> None:
        """Show what the shells print for some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._take_line(deadline)

    def of(self, what: str, task: str) -> list[Event]:
        """Return the events of one kind about one task."""
        return [event for event in self.events if event.what == what and event.task == task]

    def count(self, number: int, what: str) -> int:
        """Count the events of one kind in one shell."""
        return sum(event.shell == number and event.what == what for event in self.events)

    def received_in(self, number: int, tasks: list[str]) -> list[str]:
        """Return those of the tasks that a shell received, in that order."""
        here = [event.task for event in self.events if event.shell == number and event.what == "received"]
        return [task for task in here if task in tasks]

    def until_done(self, tasks: list[str]) -> None:
        """Wait until workers have done all the tasks."""
        self.until(lambda: all(self.of("done", task) for task in tasks), "the tasks to be done")

    def until_received(self, task: str, times: int = 1) -> Event:
        """Wait until workers have received the task so many times, and return the last one."""
        self.until(
            lambda: len(self.of("received", task)) >= times, f"{task!r} to be received{' again' if times > 1 else ''}"
        )
        return self.of("received", task)[-1]

    def seen(self, as_promised: bool, text: str) -> None:
        """Say what one saw, or that it was not what the step promised."""
        if as_promised:
            tell(paint("green", text))
        else:
            self.surprises += 1
            complain(f"this was not to be expected; it should have been: {text}")

    def _until_ended(self, number: int) -> None:
        before = self.count(number, "ended")
        self.until(lambda: self.count(number, "ended") > before, f"the command in shell {number} to end")

    def _take_line(self, deadline: float, failure: str | None = None) -> None:
        try:
            shell, line = self.lines.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            if failure:
                raise Failed(failure) from None
            return
        if line is not None:
            show(shell.number, line)
        self._record(shell, line)

    def _record(self, shell: Shell, line: str | None) -> None:
        if line is None:
            self.events.append(Event(shell.number, "ended"))
            shell.task = ""
        elif line.startswith(WAITING_LINE):
            self.events.append(Event(shell.number, "waiting"))
        elif line.startswith(DONE_LINE):
            self.events.append(Event(shell.number, "done", shell.task))
        elif match := TASK_LINE.match(line):
            shell.task = literal_eval(match[2])
            self.events.append(Event(shell.number, match[1].lower(), shell.task, bool(match[3])))


# The steps.


def round_robin(demo: Demo) -> None:
    """Step 1."""
    title("1. Two workers share the tasks")
    tell("Shells 1 and 2 run a worker each, shell 3 sends five tasks. Each dot in a task is a second of work.")
    tell("Watch which worker receives which task.")
    demo.work(1)
    demo.work(2)
    tasks = ["First message.", "Second message..", "Third message...", "Fourth message....", "Fifth message....."]
    for task in tasks:
        demo.send(task)
    demo.until_done(tasks)
    demo.seen(
        demo.received_in(1, tasks) == tasks[::2] and demo.received_in(2, tasks) == tasks[1::2],
        "Shell 1 did the first, third and fifth task, shell 2 the second and fourth: they took turns (round robin).",
    )


def killed_workers(demo: Demo) -> None:
    """Step 2."""
    title("2. A worker is killed in the middle of a task")
    tell("First by Ctrl+C, which lets it hand its task back; then by kill -9, which lets it do nothing at all.")
    tell("RabbitMQ keeps a task until its worker says that it is done. Watch who does it in the end.")
    task = "A long task....."
    demo.send(task)
    first = demo.until_received(task)
    demo.pause(MID_TASK)
    demo.ctrl_c(first.shell)
    second = demo.until_received(task, times=2)
    demo.work(first.shell)
    demo.kill_9(second.shell)
    third = demo.until_received(task, times=3)
    demo.until_done([task])
    demo.seen(
        second.redelivered and third.redelivered and first.shell == third.shell != second.shell,
        f"Each time RabbitMQ redelivered the task to the other worker; in the end shell {third.shell} did it.",
    )
    demo.work(second.shell)


def fair_dispatch(demo: Demo) -> None:
    """Step 3."""
    title("3. A heavy task and four light ones")
    tell("Taking turns would be unfair here: half of the light tasks would wait behind the heavy one.")
    tell("But a worker gets its next task only when it has done the last one (prefetch 1). Watch the free worker.")
    heavy, light = "A heavy task........", [f"Light task {number}." for number in (1, 2, 3, 4)]
    for task in (heavy, *light):
        demo.send(task)
    demo.until_done([heavy, *light])
    busy = demo.of("received", heavy)[0].shell
    free = 3 - busy
    demo.seen(
        demo.received_in(free, light) == light,
        f"While shell {busy} was busy with the heavy task, shell {free} did all the light ones (fair dispatch).",
    )


def killed_rabbitmq(demo: Demo, server: Node | rabbitmq.Container | None) -> None:
    """Step 4."""
    title("4. RabbitMQ is killed while tasks wait")
    if server is None:
        tell("Left out: the demo did not start this RabbitMQ, so it is not the demo's to kill.")
    else:
        tell("The workers stop. Shell 3 sends three tasks, then kills RabbitMQ itself and starts it again.")
        tell("'Sent' means that RabbitMQ has the task on disk. Watch whether a worker gets all three.")
    for number in (1, 2):
        demo.ctrl_c(number)
    if server is None:
        return
    tasks = [f"Kept task {number}." for number in (1, 2, 3)]
    for task in tasks:
        demo.send(task)
    restart(server)
    demo.work(1)
    demo.until_done(tasks)
    demo.seen(
        demo.received_in(1, tasks) == tasks, "All three tasks outlived RabbitMQ's sudden end; the worker did them all."
    )
    demo.ctrl_c(1)


def restart(server: Node | rabbitmq.Container) -> None:
    """Kill RabbitMQ and start it again, with the commands that do the same by hand."""
    is_node = isinstance(server, Node)
    show(3, f"$ kill -9 {server.pid}    # RabbitMQ" if is_node else f"$ docker kill {server.identity[:12]}", "bold")
    server.kill()
    if server.running:
        raise Failed("RabbitMQ runs on after it was killed")
    show(3, f"$ {python()} tools/rabbitmq.py start" if is_node else f"$ docker start {server.identity[:12]}", "bold")
    began = time.monotonic()
    server.start()
    show(3, f"RabbitMQ is back after {time.monotonic() - began:.0f} s")


# Before and after them.


def refuse_to_meddle() -> None:
    """Failed if the queue is in use: the demo's tasks would get into somebody's way, or theirs into the demo's."""
    connection = rabbitmq.connect("demo")
    try:
        found = connection.channel().queue_declare(QUEUE, passive=True).method
    except ChannelClosedByBroker as error:
        if error.reply_code == 404:  # not there yet, so nobody uses it
            return
        raise Failed(f"can't look into the queue {QUEUE}: {error.reply_text}") from None
    finally:
        connection.close()
    in_use = f"the queue {QUEUE} is in use (tasks waiting: {found.message_count}, workers: {found.consumer_count})"
    if found.message_count or found.consumer_count:
        raise Failed(f"{in_use}: let a worker ({python()} worker.py) do the tasks, stop all workers, and try again")


def take_back(tasks: list[str]) -> int | None:
    """Take the tasks of an unfinished demo out of the queue, and nothing else. Return how many, None if it is gone."""
    taken = 0
    try:
        connection = rabbitmq.connect("demo")
        channel = connection.channel()
        deadline = time.monotonic() + 1  # a killed worker's task takes a moment to come back
        while time.monotonic() < deadline:
            method, _, body = channel.basic_get(QUEUE)
            if method and body.decode(errors="replace") in tasks:
                channel.basic_ack(method.delivery_tag)
                taken += 1
            elif not method:
                connection.sleep(0.1)
        connection.close()  # hands back what was others'
    except Exception:  # no RabbitMQ any more, in one of the many ways in which pika says so
        return None
    return taken


def tally(demo: Demo, taken: int | None) -> int:
    """Print the counts of what the processes printed; return how many tasks were lost."""
    sent, received, done = ([e for e in demo.events if e.what == what] for what in ("sent", "received", "done"))
    tasks_done = {event.task for event in done}
    counts = {"sent": len(sent), "done": len(tasks_done), "done again": len(done) - len(tasks_done)}
    counts |= {"redelivered": sum(event.redelivered for event in received), "taken back": taken or 0}
    counts = {what: count for what, count in counts.items() if count or what in ("sent", "done", "redelivered")}
    undone = sum(event.task not in tasks_done for event in sent)
    lost = max(0, undone - (taken or 0))
    # Without RabbitMQ there is no telling what it still has.
    counts["lost" if taken is not None else "lost or still in the queue"] = lost
    text = ", ".join(f"{what} {count}" for what, count in counts.items())
    print("\n" + paint("red" if lost else "green", f"Tally: {text}"), flush=True)
    return lost


def how_to_go_on(server: Node | rabbitmq.Container | None) -> None:
    """Say how to go on by hand."""
    print("\nRabbitMQ stays up. Go on by hand, in as many shells as you like; README.md leads the way:")
    if server and server.port != rabbitmq.PORT:
        print(f"    export AMQP_URL={os.environ['AMQP_URL']}")
    activate = Path(python()).with_name("activate")
    if (ROOT / activate).exists():
        print(f"    source {activate}")
    print("    python worker.py")
    print("    python new_task.py A task of three seconds...")
    print("make stop stops it." if server else "make stop leaves it alone: the demo did not start it.")


# How it looks.


def python() -> str:
    """Return the Python of this demo as a person in the project's folder would type it."""
    path = Path(sys.executable)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def paint(colour, text: str) -> str:
    """Return text in a colour on a terminal that wants colours, as it is elsewhere."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or colour is None else f"\033[{COLOURS[colour]}m{text}\033[0m"


def show(number: int, line: str, colour=None) -> None:
    """Print a line as it appears in one of the shells."""
    print(paint(number, f"shell {number} | ") + paint(colour, line), flush=True)


def title(text: str) -> None:
    """Print the title of a step."""
    print("\n" + paint("bold", text), flush=True)


def tell(text: str) -> None:
    """Print a sentence of the teacher."""
    print(f"   {text}", flush=True)


def complain(text: str) -> None:
    """Print one line of diagnosis."""
    print(f" [!] {text}", file=sys.stderr, flush=True)


# How it ends.


class Interrupted(BaseException):
    """Somebody wants the demo to end. Its argument is the number of the signal."""


def interrupt(number: int, frame) -> None:
    """Handle a signal."""
    raise Interrupted(number)


@contextmanager
def signals_held():
    """Let signals wait that come in here: else one might hit when a process runs that we don't know of yet."""
    came = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted(came[0])


def play(demo: Demo) -> None:
    """Find a RabbitMQ and play the steps on it."""
    demo.server = rabbitmq.find()
    refuse_to_meddle()
    round_robin(demo)
    killed_workers(demo)
    fair_dispatch(demo)
    killed_rabbitmq(demo, demo.server)


def clear_up(demo: Demo) -> int | None:
    """End all processes and take back what they leave in the queue; return how many tasks those were, or None."""
    for shell in demo.shells.values():
        shell.terminate()
    for shell in demo.shells.values():
        shell.end()
    demo.pause(0.1)  # what they said at last
    undone = [task for task in demo.tasks if not demo.of("done", task)]
    return take_back(undone) if undone else 0


def main() -> int:
    """Play the demo; return its exit status."""
    for number in SIGNALS:
        signal.signal(number, interrupt)
    demo = Demo()
    status = outcome(demo)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the rest takes a few seconds at most, and must not be left undone
    taken = clear_up(demo)
    if status > 1 and taken is None:
        complain(f"RabbitMQ does not answer: what was sent waits for a worker ({python()} worker.py)")
    if status > 1 and rabbitmq.started():
        complain("Stopped. RabbitMQ, which the demo started, stays up: make stop stops it.")
    if status > 1 or not demo.tasks:
        return status
    lost = tally(demo, taken)
    if status == 0:
        how_to_go_on(demo.server)
    return 1 if status or lost or demo.surprises else 0


def outcome(demo: Demo) -> int:
    """Play the demo and return what would be its exit status; above 1 it was stopped by a signal."""
    try:
        play(demo)
    except Interrupted as signalled:
        if signalled.args[0] == signal.SIGHUP:
            silence()
        return 128 + signalled.args[0]
    except (Failed, NodeError) as problem:
        complain(str(problem).splitlines()[0])
        return 1
    except OSError as error:  # nobody reads on (`make demo | head`, a closed terminal), or .rabbitmq can't be written
        with suppress(OSError):
            complain(describe(error))
        silence()
        return 1
    return 0


def silence() -> None:
    """Print nothing more, as nobody is there to read it, and printing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
