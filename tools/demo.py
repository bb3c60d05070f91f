"""Plays the work-queue tutorial on a real RabbitMQ, with the real new_task.py and worker.py, and counts the outcome.

RabbitMQ is found or started by tools/rabbitmq.py and stays up; `make stop` stops it if the demo started it.
"""

import os
import re
import sys
import time
from ast import literal_eval
from collections import namedtuple
from contextlib import suppress
from functools import partial

import rabbitmq
from node import NodeError
from pika.exceptions import AMQPError, ChannelClosedByBroker
from processes import ROOT, Line, Script, ignore_signals, raise_on_signals, wait_until

sys.path.insert(0, str(ROOT))
from task_queue import QUEUE, address

# The lines of the two scripts that count.
COUNTED = re.compile(r" \[x\] (?P<what>Sent|Received|Done)( (?P<task>b?['\"].*['\"])(?P<again> \(redelivered\))?)?$")

# The Python that runs this, as a person in the project's folder would type it.
PYTHON = sys.executable.removeprefix(f"{ROOT}/")

GO_ON = """
RabbitMQ stays up; make stop stops it if the demo started it. Continue by hand,
as README.md shows:
    source .venv/bin/activate
    python worker.py
    python new_task.py A task of three seconds..."""

# A line that counts, printed in a shell. what: Sent, Received or Done.
Event = namedtuple("Event", ["what", "task", "shell", "redelivered"])

# Colours of a terminal: for the lines of each shell, for what is typed, and for what one saw.
SHELLS, TYPED, SEEN = {1: 36, 2: 33, 3: 35}, 1, 32


def paint(colour: int, text: str) -> str:
    """Return text in a colour on a terminal that wants colours, as it is elsewhere."""
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


class Demo:
    """The three shells that a person would have open, and what was seen there."""

    def __init__(self):
        self.scripts: dict[int, Script] = {}  # shell -> what runs there, or ran last
        self.task = {}  # shell -> the task of the last line that named one
        self.events: list[Event] = []
        self.tasks: list[str] = []  # all that new_task.py was asked to send
        self.server = None  # RabbitMQ, if it was started here

    def show(self, shell: int, line: str) -> None:
        """Print a line as a shell shows it."""
        # As one piece, for shells print at the same time.
        print(paint(SHELLS[shell], f"shell {shell} | ") + line + "\n", end="", flush=True)

    def see(self, shell: int, line: Line) -> None:
        """Show a line that a script has printed, and take note of it if it counts."""
        self.show(shell, line.text)
        if found := COUNTED.match(line.text):
            if found["task"]:  # `Done` doesn't name it
                self.task[shell] = literal_eval(found["task"])
            self.events.append(Event(found["what"], self.task[shell], shell, bool(found["again"])))

    def run(self, shell: int, script: str, *words: str) -> Script:
        """Start one of the two scripts in a shell."""
        self.show(shell, paint(TYPED, " ".join([f"$ {PYTHON}", script, *(f'"{word}"' for word in words)])))
        self.scripts[shell] = Script(script, *words, url=None, see=partial(self.see, shell))
        return self.scripts[shell]

    def work(self, shell: int) -> None:
        """Start a worker and wait until it waits."""
        self.run(shell, "worker.py").wait_for("[*] Waiting")

    def send(self, *tasks: str) -> None:
        """Send tasks from shell 3, one after the other; each must be reported sent."""
        for task in tasks:
            self.tasks.append(task)
            self.run(3, "new_task.py", task).ends()
            assert self.of("Sent", task), f"new_task.py did not report {task!r} as sent"

    def ctrl_c(self, shell: int) -> None:
        """Press Ctrl+C in a shell and wait until its worker has ended."""
        self.show(shell, "^C")
        self.scripts[shell].ctrl_c()
        self.scripts[shell].ends()

    def until_received(self, task: str, times: int = 1) -> Event:
        """Wait until workers have received the task so many times, and return the last one."""
        return wait_until(lambda: self.of("Received", task)[times - 1 :], f"{task!r} is received ({times})")[-1]

    def until_done(self, *tasks: str) -> list[int]:
        """Wait until workers have done all the tasks, and return in which shells they were first received."""
        wait_until(lambda: all(self.of("Done", task) for task in tasks), "the tasks are done")
        return [self.of("Received", task)[0].shell for task in tasks]

    def of(self, what: str, task: str) -> list[Event]:
        """Return the events of one kind about one task."""
        return [event for event in self.events if event[:2] == (what, task)]

    def seen(self, as_promised: bool, text: str) -> None:
        """Say what one saw; AssertionError if that was not what the act promised."""
        assert as_promised, f"this was not to be expected; it should have been: {text}"
        print(paint(SEEN, f"   {text}"), flush=True)


def round_robin(demo: Demo) -> None:
    """1. Two workers share the tasks

    Each dot in a task is a second of work. Watch which worker gets which task.
    """
    demo.work(1)
    demo.work(2)
    tasks = ["First message.", "Second message..", "Third message...", "Fourth message....", "Fifth message....."]
    demo.send(*tasks)
    shells = demo.until_done(*tasks)
    demo.seen(shells == [1, 2, 1, 2, 1], "They took turns (round robin): shell 1 did three tasks, shell 2 the others.")


def killed_workers(demo: Demo) -> None:
    """2. A worker is killed in the middle of a task

    First by Ctrl+C: it hands its task back. Then by kill -9: it can do nothing.
    RabbitMQ keeps a task until its worker says that it is done. Watch who does
    it in the end.
    """
    task = "A long task....."
    demo.send(task)
    first = demo.until_received(task)
    time.sleep(1.5)  # so that one sees it being done
    demo.ctrl_c(first.shell)
    second = demo.until_received(task, times=2)
    demo.work(first.shell)
    victim = demo.scripts[second.shell]
    demo.show(3, paint(TYPED, f"$ kill -9 {victim.process.pid}    # the worker in shell {second.shell}"))
    victim.kill()
    third = demo.until_received(task, times=3)
    demo.until_done(task)
    redelivered = second.redelivered and third.redelivered and first.shell == third.shell != second.shell
    story = "RabbitMQ redelivered the task twice, each time to the other shell."
    demo.seen(redelivered, f"{story} Shell {third.shell} did it.")
    demo.work(second.shell)


def fair_dispatch(demo: Demo) -> None:
    """3. A heavy task and four light ones

    A worker gets its next task only when it has done the last one (prefetch 1).
    Watch the free worker.
    """
    heavy, light = "A heavy task........", [f"Light task {number}." for number in (1, 2, 3, 4)]
    demo.send(heavy, *light)
    busy, *others = demo.until_done(heavy, *light)
    demo.seen(busy not in others, f"While shell {busy} was busy, the other did all the light tasks (fair dispatch).")


def killed_rabbitmq(demo: Demo) -> None:
    """4. RabbitMQ is killed while tasks wait

    'Sent' means that RabbitMQ has the task on disk. Watch whether a worker gets
    all three.
    """
    demo.ctrl_c(1)
    demo.ctrl_c(2)
    if not demo.server:
        print("   Left out: the demo did not start this RabbitMQ, so it must not kill it.")
        return
    tasks = [f"Kept task {number}." for number in (1, 2, 3)]
    demo.send(*tasks)
    demo.show(3, paint(TYPED, "$ make kill-rabbitmq"))
    demo.server.kill()
    assert not demo.server.running, "RabbitMQ runs on after it was killed"
    demo.show(3, paint(TYPED, "$ make rabbitmq"))
    demo.server.start()
    demo.work(1)
    demo.seen(demo.until_done(*tasks) == [1, 1, 1], "All three outlived RabbitMQ's sudden end.")
    demo.ctrl_c(1)


def refuse_to_meddle() -> None:
    """AssertionError if the queue is in use: the demo's tasks would get into somebody's way, or theirs into its."""
    with address.connect("demo") as connection, suppress(ChannelClosedByBroker):  # there is no such queue yet
        found = connection.channel().queue_declare(QUEUE, passive=True).method
        problem = f"the queue {QUEUE} is in use: let a worker do its tasks, then stop all workers, and try again"
        assert found.message_count == found.consumer_count == 0, problem


def clear_up(demo: Demo) -> None:
    """End all processes, and take the tasks of an unfinished demo out of the queue."""
    for script in demo.scripts.values():
        script.kill()
    if undone := {task for task in demo.tasks if not demo.of("Done", task)}:
        with address.connect("demo") as connection, suppress(ChannelClosedByBroker):  # there is no such queue yet
            channel = connection.channel()
            for method, _, body in channel.consume(QUEUE, inactivity_timeout=1):
                if not method:
                    break
                if body.decode(errors="replace") in undone:  # others' go back when the connection ends
                    channel.basic_ack(method.delivery_tag)


def tally(events: list[Event]) -> int:
    """Print the counts of what the processes printed; return how many tasks were lost."""
    sent, done = ({event.task for event in events if event.what == what} for what in ("Sent", "Done"))
    redelivered, lost = sum(event.redelivered for event in events), len(sent - done)
    print(f"\nTally: sent {len(sent)}, done {len(done)}, redelivered {redelivered}, lost {lost}")
    return lost


def main() -> int:
    """Play the demo; return its exit status."""
    raise_on_signals()
    demo = Demo()
    try:
        demo.server = rabbitmq.find()
        refuse_to_meddle()
        for act in (round_robin, killed_workers, fair_dispatch, killed_rabbitmq):
            print(f"\n{act.__doc__.rstrip()}\n", flush=True)
            act(demo)
        lost = tally(demo.events)
        print(GO_ON)
        return 1 if lost else 0
    except KeyboardInterrupt:
        print(" [!] Stopped. If the demo started RabbitMQ, it stays up: make stop stops it.", file=sys.stderr)
        return 130
    except (NodeError, AssertionError, address.Unreachable, address.Refused) as problem:
        print(f" [!] {str(problem).splitlines()[0]}", file=sys.stderr)
        return 1
    finally:
        ignore_signals()  # clearing up takes a few seconds at most, and must not be left undone
        with suppress(address.Unreachable, AMQPError):
            clear_up(demo)


if __name__ == "__main__":
    sys.exit(main())
