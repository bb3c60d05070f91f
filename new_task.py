#!/usr/bin/env python3
"""Send tasks to the queue that worker.py takes them from.

    python new_task.py First message.           send one task: the words, joined with spaces
    python new_task.py                          send "Hello World!"
    tail -f jobs.txt | python new_task.py -     send each line of the standard input as a task of its own
    AMQP_URL=amqp://USER:PASSWORD@HOST/ python new_task.py ...        use another RabbitMQ than the one on localhost

"Sent" means that RabbitMQ has the task on disk and has said so. The exit status is 0 then, 1 if it isn't so, and 2
if the command line is wrong.
"""

import contextlib
import os
import select
import stat
import sys
import threading
import time

try:
    import pika
except ModuleNotFoundError:
    sys.exit(" [!] pika is not installed. Install it with: python -m pip install -r requirements.txt")
except KeyboardInterrupt:  # to import it takes a moment
    sys.exit(1)

from publisher import NotConfirmed, Publisher
from task_queue import QUEUE, end_line_of_ctrl_c, shown, tidy_output, warn

USAGE = "usage: python new_task.py [WORD ...], or python new_task.py -   (python new_task.py --help tells more)"


def send(tasks, publisher=None) -> int:
    """Send tasks (an iterable of bytes) and return their number, once RabbitMQ has confirmed every one of them.

    publisher: one from task_publisher() that the caller keeps; without it, each call has a connection of its own.
    NotConfirmed, with the reason and the number of leading tasks that are confirmed, if RabbitMQ can't be reached,
    refuses, or confirms nothing for a minute.
    """
    if publisher is None:
        with task_publisher() as publisher:
            return send(tasks, publisher)
    return publisher.send(tasks)  # not before RabbitMQ has confirmed each one; publisher.py keeps count


def task_publisher(tell=lambda line: None) -> Publisher:
    """Return a connection for send() that can be kept, e.g. for as long as a web application runs."""
    return Publisher(set_up, publish, tell)


def set_up(channel, arguments, on_confirm) -> None:
    """Make sure that the queue is there, and that RabbitMQ tells us of every task it has stored.

    Neither call waits for RabbitMQ's answer: if it says no, it closes the channel, and nothing is sent.
    """
    channel.queue_declare(queue=QUEUE, durable=True, arguments=arguments)
    channel.confirm_delivery(on_confirm)


def publish(channel, task: bytes, message_id: str) -> None:
    """Publish one task. Whether it arrived is what on_confirm() hears, later."""
    channel.basic_publish(
        exchange="",  # the default exchange: it routes to the queue of that name
        routing_key=QUEUE,
        body=task,
        properties=pika.BasicProperties(
            delivery_mode=pika.DeliveryMode.Persistent.value,  # on disk, not only in memory
            content_type="text/plain",
            message_id=message_id,  # for a worker that wants to know whether it has seen this task before
            timestamp=int(time.time()),
        ),
        mandatory=True,  # without it RabbitMQ confirms even a task that it could not put into any queue
    )


def send_words(words: list[str]) -> str:
    """Send the words as one task, and return what to print."""
    # fsencode() gives back the very bytes that the shell passed, also where they are no text.
    task = os.fsencode(" ".join(words) if words else "Hello World!")
    with task_publisher(tell=warn) as publisher:
        send([task], publisher)
    return f" [x] Sent {shown(task)}"


def send_lines() -> str:
    """Send each line of the standard input as a task, and return what to print."""
    if sys.stdin is None:
        raise NotConfirmed("standard input is closed.", 0)
    with task_publisher(tell=warn) as publisher:
        try:
            with progress(publisher, sys.stdin.fileno()):
                sent = publisher.send_numbered(numbered_lines(sys.stdin.fileno(), publisher.check))
        except KeyboardInterrupt:
            end_line_of_ctrl_c()
            publisher.close()
            raise NotConfirmed("interrupted.", publisher.leading_confirmed()) from None
        except OSError as error:  # from reading: those of the network never come this far
            publisher.close()
            why = f"can't read standard input ({error.strerror})."
            raise NotConfirmed(why, publisher.leading_confirmed()) from None
    return f" [x] Sent {sent} tasks"


def numbered_lines(file: int, check):
    """Yield (number, line) for each line of a file descriptor that is not empty, as they come, without the newline.

    check() is called every second while no line comes: someone must notice that RabbitMQ is gone.
    """
    number, line_so_far, chunk = 0, [], b"\n"
    while chunk:
        while not select.select([file], [], [], 1)[0]:
            check()
        chunk = os.read(file, 1 << 16)
        *lines, rest = (chunk or b"\n").split(b"\n")
        for part in lines:
            line = b"".join([*line_so_far, part])
            line_so_far.clear()
            number += 1
            if line:
                yield number, line
        line_so_far.append(rest)  # joined only when it is complete: it may be very long


@contextlib.contextmanager
def progress(publisher: Publisher, file: int):
    """While the block runs, show how far it is, if there is a terminal to show it on."""
    ended, started = threading.Event(), time.monotonic()

    def show():
        while not ended.wait(0.5):
            seconds = time.monotonic() - started
            line = f" {publisher.sent} sent, {publisher.confirmed} confirmed, {publisher.confirmed / seconds:.0f}/s"
            # Erased to its right, and the cursor back at its left: what is printed next takes its place.
            print(f"{line}{time_left(file, seconds)}\x1b[K", end="\r", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def time_left(file: int, seconds: float) -> str:
    """Return how long the rest of a file will take, as the part before it took that many seconds; "" for a pipe."""
    size = os.fstat(file).st_size
    if not stat.S_ISREG(os.fstat(file).st_mode) or not size:
        return ""
    done = os.lseek(file, 0, os.SEEK_CUR) / size
    return f", {seconds / done - seconds:.0f} s left" if done else ""


def main() -> int:
    """Do what the command line says; return the exit status."""
    tidy_output()
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if words[:1] == ["--"]:  # what follows are words, whatever they begin with
        words = words[1:]
    elif words and words[0].startswith("-") and words != ["-"]:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        print(send_lines() if words == ["-"] else send_words(words))
        return 0
    except NotConfirmed as problem:
        warn(f"Not sent: {problem}" + how_to_go_on(problem.confirmed) * (words == ["-"]))
    except KeyboardInterrupt:
        end_line_of_ctrl_c()
        warn("Not sent: interrupted.")
    return 1


def how_to_go_on(confirmed: int) -> str:
    """Return what to tell someone whose list of tasks was sent only in part."""
    return (
        f" The first {confirmed} lines are confirmed; "
        f"to send the others: tail -n +{confirmed + 1} FILE | python new_task.py -"
    )


if __name__ == "__main__":
    # All is printed, and the connection closed. What else Python tidies up at its end takes longer than the task did.
    os._exit(main())
