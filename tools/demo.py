"""Plays the work-queue tutorial on a real RabbitMQ, with the real new_task.py and worker.py, and counts the outcome."""

import os
import re
import sys
import time
from collections import namedtuple
from contextlib import suppress

import rabbitmq
from node import NodeError
from pika.exceptions import AMQPError, ChannelClosedByBroker
from processes import ROOT, Line, Shells, interruptible, wait_until

sys.path.insert(0, str(ROOT))
from task_queue import QUEUE, address

GO_ON = """
RabbitMQ stays up; make stop stops it if the demo started it. Continue by hand,
as README.md shows:
    source .venv/bin/activate
    python worker.py
    python new_task.py A task of three seconds..."""

# The lines that count. `Done` doesn't name its task.
COUNTED = re.compile(r" \[x\] (?P<what>Sent|Received|Done)(?: (?P<task>['b\"].*?)(?P<again> \(redelivered\))?)?$")
Event = namedtuple("Event", ["what", "task", "shell", "redelivered"])

# Colours of a terminal: for the lines of each shell, for what is typed, and for what one saw.
SHELLS, TYPED, SEEN = {1: 36, 2: 33, 3: 35}, 1, 32


def paint(colour: int, text: str) -> str:
    """Return text in a colour on a terminal that wants colours, as it is elsewhere."""
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


class Demo(Shells):
    """The three shells that a person would have open, and what was seen there."""

    def __init__(self):
        # With the Python that runs this, as a person in the project's folder would type it.
        super().__init__(sys.executable.removeprefix(f"{ROOT}/"), self.see)
        self.events: list[Event] = []
        self.tasks: list[str] = []  # all that new_task.py was asked to send
        self.server = None  # RabbitMQ, if it was started here

    def see(self, shell: int, line: Line) -> None:
        """Print a line as a shell shows it, and take note of it if it counts."""
        text = paint(TYPED, line.text) if line.text.startswith("$") else line.text
        # As one piece, for shells print at the same time.
        print(paint(SHELLS[shell], f"shell {shell} | ") + text + "\n", end="", flush=True)
        if found := COUNTED.match(line.text):
            task = found["task"] or [event.task for event in self.events if event.shell == shell][-1]
            self.events.append(Event(found["what"], task, shell, bool(found["again"])))

    def send(self, *tasks: str) -> None:
        """Send tasks from shell 3, one after the other; each must be reported sent."""
        for task in tasks:
            self.tasks.append(task)
            self.run(3, f'new_task.py "{task}"').ends()
            assert self.of("Sent", task), f"new_task.py did not report {task!r} as sent"

    def until_received(self, task: str, times: int = 1) -> Event:
        """Wait until workers have received the task so many times, and return the last one."""
        return wait_until(lambda: self.of("Received", task)[times - 1 :], f"{task!r} is received ({times})")[-1]

    def until_done(self, *tasks: str) -> list[int]:
        """Wait until workers have done all the tasks, and return in which shells they were first received."""
        wait_until(lambda: all(self.of("Done", task) for task in tasks), "the tasks are done")
        return [self.of("Received", task)[0].shell for task in tasks]

    def of(self, what: str, task: str) -> list[Event]:
        """Return the events of one kind about one task."""
        return [event for event in self.events if event[:2] == (what, repr(task))]

    def seen(self, as_promised: bool, text: str) -> None:
        """Say what one saw; AssertionError if that was not what the act promised."""
        assert as_promised, f"this was not to be expected; it should have been: {text}"
        print(paint(SEEN, f"   {text}"), flush=True)

    def close(self) -> None:
        """End all processes, and take the tasks of an unfinished demo out of the queue."""
        super().close()
        if undone := {task for task in self.tasks if not self.of("Done", task)}:
            with suppress(address.Unreachable, AMQPError), address.connect("demo") as connection:
                channel = connection.channel()
                for method, _, body in channel.consume(QUEUE, inactivity_timeout=1):
                    if not method:
                        break
                    if body.decode(errors="replace") in undone:  # others' go back when the connection ends
                        channel.basic_ack(method.delivery_tag)


def round_robin(demo: Demo) -> None:
    """1. Two workers share the tasks

    Each dot in a task is a second of work. Watch which worker gets which task.
    """
    demo.work(1)
    demo.work(2)
    tasks = ["First message.", "Second message..", "Third message...", "Fourth message....", "Fifth message....."]
    demo.send(*tasks)
    shells = demo.until_done(*tasks)
    one, other = (1, 2) if shells[0] == 1 else (2, 1)  # RabbitMQ may begin with either of them
    story = f"They took turns (round robin): shell {one} did three tasks, shell {other} the others."
    demo.seen(shells == [one, other, one, other, one], story)


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
    demo.type(3, f"$ kill -9 {victim.process.pid}    # the worker in shell {second.shell}")
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
    demo.type(3, "$ make kill-rabbitmq")
    demo.server.kill()
    assert not demo.server.running, "RabbitMQ runs on after it was killed"
    demo.type(3, "$ make rabbitmq")
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


def main() -> int:
    """Play the demo; return its exit status."""
    demo = Demo()
    try:
        with interruptible(demo.close):
            demo.server = rabbitmq.find()
            refuse_to_meddle()
            for act in (round_robin, killed_workers, fair_dispatch, killed_rabbitmq):
                print(f"\n{act.__doc__.rstrip()}\n", flush=True)
                act(demo)
        sent, done = ({event.task for event in demo.events if event.what == what} for what in ("Sent", "Done"))
        again, lost = sum(event.redelivered for event in demo.events), len(sent - done)
        print(f"\nTally: sent {len(sent)}, done {len(done)}, redelivered {again}, lost {lost}\n{GO_ON}")
        return 1 if lost else 0
    except KeyboardInterrupt:
        print(" [!] Stopped. If the demo started RabbitMQ, it stays up: make stop stops it.", file=sys.stderr)
        return 130
    except (NodeError, AssertionError, address.Unreachable, address.Refused) as problem:
        print(f" [!] {str(problem).splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
