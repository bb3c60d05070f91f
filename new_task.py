#!/usr/bin/env python3
"""usage: python new_task.py [WORD ...]   or   python new_task.py - < FILE

Send a task to the queue of worker.py: the words, joined with spaces, or "Hello
World!"; or, with -, each line of standard input. After -- everything is a word.
"Sent" means that RabbitMQ has the task on disk and has said so. The exit status
is 0 if so, 1 if not, and 2 if the command line is wrong. RabbitMQ is on
localhost, unless AMQP_URL=amqp://USER:PASSWORD@HOST/ names another one.
"""

import os
import time

from task_queue import QUEUE, QUORUM, console  # first: it explains what to do if pika is missing
from task_queue.publisher import Channel, NotConfirmed

import pika  # isort: skip


def send(tasks) -> int:
    """Send tasks. Return how many, once RabbitMQ has confirmed them all; raise NotConfirmed otherwise.

    tasks: an iterable of bytes, or an open file (a real one, not gzip's or BytesIO) with one task per line.
    """
    run = os.urandom(8).hex()  # makes the message ids of this run unique
    number = 0
    with Channel("new_task.py") as channel:
        channel.queue_declare(queue=QUEUE, durable=True, arguments=QUORUM)
        channel.confirm_delivery()
        for number, task in enumerate(channel.each(tasks), 1):  # of a file: its lines
            channel.basic_publish(
                exchange="",  # the default exchange: it routes to the queue of that name
                routing_key=QUEUE,
                body=task,
                properties=pika.BasicProperties(
                    delivery_mode=pika.DeliveryMode.Persistent,  # on disk, not only in memory
                    content_type="text/plain",
                    message_id=f"{run}-{number}",  # lets a worker recognise a task it did before
                    timestamp=int(time.time()),
                ),
                mandatory=True,  # without this, RabbitMQ confirms a task even if no queue took it
            )
        channel.wait_for_confirms()  # until RabbitMQ has confirmed them, tasks can still be lost
    return number


def main() -> int:
    """Send what the command line says; return the exit status."""
    words = console.arguments(__doc__, lambda words: words in ([], ["-"]) or words[0] == "--" or words[0][:1] != "-")
    lines = words == ["-"]
    if words[:1] == ["--"]:
        words = words[1:]
    task = os.fsencode(" ".join(words) if any(words) else "Hello World!")  # exactly the bytes that the shell passed
    try:
        number = send(os.fdopen(0, "rb", closefd=False) if lines else [task])
    except (NotConfirmed, KeyboardInterrupt) as problem:
        console.warn(f"Not sent: {str(problem) or 'interrupted.'}", after_ctrl_c=isinstance(problem, KeyboardInterrupt))
        return 1
    console.say(f" [x] Sent {number} tasks" if lines else f" [x] Sent {console.shown(task)}")
    return 0


if __name__ == "__main__":
    os._exit(main())  # all is printed, and for Python to tidy up would take as long as sending a task
