"""Plays the work-queue tutorial on a real RabbitMQ, with the real new_task.py and worker.py, and counts the outcome.

    make demo

RabbitMQ is found or started by tools/rabbitmq.py and stays up; `make stop` stops it if the demo started it.
"""
# ruff: noqa: E402

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C during the imports, which take a moment: just end, no traceback

import inspect
import os
import re
import sys
import time
from ast import literal_eval
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import rabbitmq
from node import NodeError
from pika.exceptions import ChannelClosedByBroker
from processes import ROOT, Script, ignore_signals, raise_on_signals, signals_held, wait_until

from task_queue import QUEUE

# How far a task is when its worker is killed: far enough to see that it is being done.
MID_TASK = 1.5

# The lines of the two scripts that count.
COUNTED = re.compile(r" \[x\] (?P<what>Sent|Received|Done)( (?P<task>b?['\"].*['\"])(?P<again> \(redelivered\))?)?$")

# What the tally leaves out when there is none.
RARE = ("done again", "taken back")

COLOURS = {1: "36", 2: "33", 3: "35", "bold": "1", "red": "31", "green": "32"}

# The Python that runs this, as a person in the project's folder would type it.
PYTHON = os.path.relpath(sys.executable, ROOT) if sys.executable.startswith(f"{ROOT}/") else sys.executable


def paint(colour, text: str) -> str:
    """Return text in a colour on a terminal that wants colours, as it is elsewhere."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or colour is None else f"\033[{COLOURS[colour]}m{text}\033[0m"


def show(shell: int, line: str, colour=None) -> None:
    """Print a line as it appears in one of the shells."""
    print(paint(shell, f"shell {shell} | ") + paint(colour, line), flush=True)


def tell(text: str) -> None:
    """Print a sentence of the teacher."""
    print(f"   {text}", flush=True)


def complain(text: str) -> None:
    """Print one line of diagnosis."""
    print(f" [!] {text}", file=sys.stderr, flush=True)


class Failed(Exception):
    """The demo can't go on. The message is for the user."""


class Event(NamedTuple):
    """A line that counts, printed in a shell. what: Sent, Received or Done."""

    what: str
    task: str
    shell: int
    redelivered: bool


class Demo:
    """The three shells that a person would have open, and what was seen there."""

    def __init__(self):
        self.scripts: dict[int, Script] = {}  # shell -> what runs there, or ran last
        self.shown = {1: 0, 2: 0, 3: 0}  # shell -> how many lines of that were shown
        self.task = {}  # shell -> the task of the last line that named one
        self.events: list[Event] = []
        self.tasks: list[str] = []  # all that new_task.py was asked to send
        self.surprises = 0
        self.server = None  # RabbitMQ, if it was started here

    # What the person does.

    def run(self, shell: int, script: str, *words: str) -> Script:
        """Start one of the two scripts in a shell."""
        show(shell, " ".join([f"$ {PYTHON}", script, *(f'"{word}"' for word in words)]), "bold")
        with signals_held():
            # In a session of its own: a Ctrl+C in this terminal is for the demo, which then ends it properly.
            self.scripts[shell], self.shown[shell] = Script(script, *words, url=None, own_session=True), 0
        return self.scripts[shell]

    def work(self, shell: int) -> None:
        """Start a worker and wait until it waits."""
        worker = self.run(shell, "worker.py")
        self.until(lambda: "[*] Waiting" in str(worker), f"the worker in shell {shell} waits for tasks")

    def send(self, *tasks: str) -> None:
        """Send tasks from shell 3, one after the other; each must be reported sent."""
        for task in tasks:
            self.tasks.append(task)
            self.run(3, "new_task.py", task)
            self.until_ended(3)
            if not self.of("Sent", task):
                raise Failed(f"new_task.py did not report {task!r} as sent")

    def ctrl_c(self, shell: int) -> None:
        """Press Ctrl+C in a shell and wait until its worker has ended."""
        show(shell, "^C")
        self.scripts[shell].ctrl_c()
        self.until_ended(shell)

    def kill_9(self, shell: int) -> None:
        """Kill the worker of a shell from shell 3."""
        worker = self.scripts[shell]
        show(3, f"$ kill -9 {worker.process.pid}    # the worker in shell {shell}", "bold")
        worker.kill()
        self.until_ended(shell)
        show(shell, "Killed")

    # What the person sees.

    def look(self) -> None:
        """Show what the shells have printed since the last look, and take note of what counts."""
        new = [(line, shell) for shell, script in self.scripts.items() for line in script.lines[self.shown[shell] :]]
        for line, shell in sorted(new):
            self.shown[shell] += 1
            show(shell, line.text)
            if found := COUNTED.match(line.text):
                if found["task"]:  # `Done` doesn't name it
                    self.task[shell] = literal_eval(found["task"])
                self.events.append(Event(found["what"], self.task[shell], shell, bool(found["again"])))

    def until(self, condition, what: str) -> None:
        """Show what the shells print until the condition holds; AssertionError if it doesn't in time."""
        wait_until(lambda: self.look() or condition(), what)

    def until_ended(self, shell: int) -> None:
        """Wait until what runs in a shell has ended, and show all that it printed."""
        self.until(lambda: not self.scripts[shell].running, f"the command in shell {shell} ends")
        self.scripts[shell].ends()
        self.look()

    def until_received(self, task: str, times: int = 1) -> Event:
        """Wait until workers have received the task so many times, and return the last one."""
        self.until(lambda: len(self.of("Received", task)) >= times, f"{task!r} is received ({times})")
        return self.of("Received", task)[-1]

    def until_done(self, *tasks: str) -> None:
        """Wait until workers have done all the tasks."""
        self.until(lambda: all(self.of("Done", task) for task in tasks), "the tasks are done")

    def of(self, what: str, task: str) -> list[Event]:
        """Return the events of one kind about one task."""
        return [event for event in self.events if event[:2] == (what, task)]

    def shared(self, *tasks: str) -> list[int]:
        """Return the shells in which the tasks were first received."""
        return [self.of("Received", task)[0].shell for task in tasks]

    def seen(self, as_promised: bool, text: str) -> None:
        """Say what one saw, or that it was not what the act promised."""
        if as_promised:
            tell(paint("green", text))
        else:
            self.surprises += 1
            complain(f"this was not to be expected; it should have been: {text}")


# The four acts. The docstring of each is what the person is told before it.


def round_robin(demo: Demo) -> None:
    """1. Two workers share the tasks

    Shells 1 and 2 run a worker each, shell 3 sends five tasks. Each dot in a task is a second of work.
    Watch which worker receives which task.
    """
    demo.work(1)
    demo.work(2)
    tasks = ["First message.", "Second message..", "Third message...", "Fourth message....", "Fifth message....."]
    demo.send(*tasks)
    demo.until_done(*tasks)
    demo.seen(
        demo.shared(*tasks) == [1, 2, 1, 2, 1],
        "Shell 1 did the first, third and fifth task, shell 2 the second and fourth: they took turns (round robin).",
    )


def killed_workers(demo: Demo) -> None:
    """2. A worker is killed in the middle of a task

    First by Ctrl+C, which lets it hand its task back; then by kill -9, which lets it do nothing at all.
    RabbitMQ keeps a task until its worker says that it is done. Watch who does it in the end.
    """
    task = "A long task....."
    demo.send(task)
    first = demo.until_received(task)
    middle = time.monotonic() + MID_TASK
    demo.until(lambda: time.monotonic() > middle, "the task is half done")
    demo.ctrl_c(first.shell)
    second = demo.until_received(task, times=2)
    demo.work(first.shell)
    demo.kill_9(second.shell)
    third = demo.until_received(task, times=3)
    demo.until_done(task)
    demo.seen(
        second.redelivered and third.redelivered and first.shell == third.shell != second.shell,
        f"Each time RabbitMQ redelivered the task to the other worker; in the end shell {third.shell} did it.",
    )
    demo.work(second.shell)


def fair_dispatch(demo: Demo) -> None:
    """3. A heavy task and four light ones

    Taking turns would be unfair here: half of the light tasks would wait behind the heavy one.
    But a worker gets its next task only when it has done the last one (prefetch 1). Watch the free worker.
    """
    heavy, light = "A heavy task........", [f"Light task {number}." for number in (1, 2, 3, 4)]
    demo.send(heavy, *light)
    demo.until_done(heavy, *light)
    (busy,) = demo.shared(heavy)
    demo.seen(
        demo.shared(*light) == [3 - busy] * 4,
        f"While shell {busy} was busy with the heavy task, shell {3 - busy} did all the light ones (fair dispatch).",
    )


def killed_rabbitmq(demo: Demo) -> None:
    """4. RabbitMQ is killed while tasks wait

    The workers stop. Shell 3 sends three tasks, then kills RabbitMQ itself and starts it again.
    'Sent' means that RabbitMQ has the task on disk. Watch whether a worker gets all three.
    """
    demo.ctrl_c(1)
    demo.ctrl_c(2)
    if not (server := demo.server):
        tell("Left out: the demo did not start this RabbitMQ, so it is not the demo's to kill.")
        return
    tasks = [f"Kept task {number}." for number in (1, 2, 3)]
    demo.send(*tasks)
    show(3, "$ make kill-rabbitmq", "bold")
    server.kill()
    if server.running:
        raise Failed("RabbitMQ runs on after it was killed")
    show(3, "$ make rabbitmq", "bold")
    began = time.monotonic()
    server.start()
    show(3, f"RabbitMQ is back after {time.monotonic() - began:.0f} s")
    demo.work(1)
    demo.until_done(*tasks)
    demo.seen(demo.shared(*tasks) == [1, 1, 1], "All three outlived RabbitMQ's sudden end; the worker did them all.")
    demo.ctrl_c(1)


# Before and after them.


def refuse_to_meddle() -> None:
    """Failed if the queue is in use: the demo's tasks would get into somebody's way, or theirs into the demo's."""
    with rabbitmq.connect("demo") as connection, suppress(ChannelClosedByBroker):  # there is no such queue yet
        found = connection.channel().queue_declare(QUEUE, passive=True).method
        if found.message_count or found.consumer_count:
            raise Failed(
                f"the queue {QUEUE} is in use (tasks waiting: {found.message_count}, workers: {found.consumer_count}): "
                f"let a worker ({PYTHON} worker.py) do the tasks, stop all workers, and try again"
            )


def take_back(tasks: list[str]) -> int | None:
    """Take the tasks of an unfinished demo out of the queue, and nothing else. Return how many, None if it is gone."""
    taken, deadline = 0, time.monotonic() + 1  # a killed worker's task takes a moment to come back
    with suppress(Exception):  # no RabbitMQ any more, in one of the many ways in which pika says so
        with rabbitmq.connect("demo") as connection:  # whose end hands back what was others'
            channel = connection.channel()
            while time.monotonic() < deadline:
                method, _, body = channel.basic_get(QUEUE)
                if method and body.decode(errors="replace") in tasks:
                    channel.basic_ack(method.delivery_tag)
                    taken += 1
                elif not method:
                    connection.sleep(0.1)
        return taken
    return None


def clear_up(demo: Demo) -> int | None:
    """End all processes and take back what they leave in the queue; return how many tasks those were, or None."""
    for script in demo.scripts.values():
        script.terminate()
    for script in demo.scripts.values():
        with suppress(AssertionError):
            script.ends(within=3)
        script.kill()
    demo.look()
    undone = [task for task in demo.tasks if not demo.of("Done", task)]
    return take_back(undone) if undone else 0


def tally(events: list[Event], taken: int | None) -> int:
    """Print the counts of what the processes printed; return how many tasks were lost."""
    sent, done = ([event.task for event in events if event.what == what] for what in ("Sent", "Done"))
    lost = max(0, len(set(sent) - set(done)) - (taken or 0))
    counts = {"sent": len(sent), "done": len(set(done)), "done again": len(done) - len(set(done))}
    counts |= {"redelivered": sum(event.redelivered for event in events), "taken back": taken or 0}
    text = ", ".join(f"{what} {count}" for what, count in counts.items() if count or what not in RARE)
    # Without RabbitMQ there is no telling what it still has.
    text += f", {'lost or still in the queue' if taken is None else 'lost'} {lost}"
    print("\n" + paint("red" if lost else "green", f"Tally: {text}"), flush=True)
    return lost


def how_to_go_on(server) -> None:
    """Say how to go on by hand."""
    print("\nRabbitMQ stays up. Go on by hand, in as many shells as you like; README.md leads the way:")
    if server and server.port != rabbitmq.PORT:
        print(f"    export AMQP_URL={os.environ['AMQP_URL']}")
    activate = Path(PYTHON).with_name("activate")
    if (ROOT / activate).exists():
        print(f"    source {activate}")
    print("    python worker.py")
    print("    python new_task.py A task of three seconds...")
    print("make stop stops it." if server else "make stop leaves it alone: the demo did not start it.")


# How it ends.


def silence() -> None:
    """Print nothing more, as nobody is there to read it, and printing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def play(demo: Demo) -> int:
    """Play the demo and return what would be its exit status; above 1 it was stopped by a signal."""
    try:
        demo.server = rabbitmq.find()
        refuse_to_meddle()
        for act in (round_robin, killed_workers, fair_dispatch, killed_rabbitmq):
            title, _, *sentences = inspect.getdoc(act).splitlines()
            print("\n" + paint("bold", title), flush=True)
            for sentence in sentences:
                tell(sentence)
            act(demo)
    except KeyboardInterrupt as signalled:
        if signalled.args[0] == signal.SIGHUP:
            silence()
        return 128 + signalled.args[0]
    except (Failed, NodeError, AssertionError) as problem:
        complain(str(problem).splitlines()[0])
        return 1
    except OSError as error:  # nobody reads on (`make demo | head`, a closed terminal), or .rabbitmq can't be written
        with suppress(OSError):
            complain(error.strerror or str(error))
        silence()
        return 1
    return 0


def main() -> int:
    """Play the demo; return its exit status."""
    raise_on_signals()
    demo = Demo()
    status = play(demo)
    ignore_signals()  # the rest takes a few seconds at most, and must not be left undone
    taken = clear_up(demo)
    if status > 1 and taken is None:
        complain(f"RabbitMQ does not answer: what was sent waits for a worker ({PYTHON} worker.py)")
    if status > 1 and rabbitmq.started():
        complain("Stopped. RabbitMQ, which the demo started, stays up: make stop stops it.")
    lost = tally(demo.events, taken) if demo.tasks and status < 2 else 0
    if status == 0:
        how_to_go_on(demo.server)
    return status or (1 if lost or demo.surprises else 0)


if __name__ == "__main__":
    sys.exit(main())
