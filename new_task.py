#!/usr/bin/env python3
"""usage: python new_task.py [WORD ...]   or   python new_task.py - < FILE

Send a task to the queue of worker.py: the words, joined with spaces, or "Hello World!"; or, with -, each line of
standard input. After -- everything is a word. "Sent" means that RabbitMQ has the task on disk and has said so.
The exit status is 0 then, 1 if it isn't so, and 2 if the command line is wrong. RabbitMQ is on localhost, unless
AMQP_URL=amqp://USER:PASSWORD@HOST/ names another one.
"""

import os
import sys
import time

from task_queue import QUEUE, QUORUM, console  # before pika: it says what to do where pika is missing
from task_queue.publisher import Channel, NotConfirmed

import pika  # isort: skip


def send(tasks) -> int:
    """Send tasks, and return how many they are when RabbitMQ has confirmed every one; NotConfirmed if it does not.

    tasks: an iterable of bytes, or a binary file with a task in each line.
    """
    run, number = os.urandom(8).hex(), 0
    with Channel("new_task.py") as channel:
        channel.queue_declare(queue=QUEUE, durable=True, arguments=QUORUM)
        channel.confirm_delivery()
        for number, task in enumerate(channel.each(tasks), 1):
            channel.basic_publish(
                exchange="",  # the default exchange: it routes to the queue of that name
                routing_key=QUEUE,
                body=task,
                properties=pika.BasicProperties(
                    delivery_mode=pika.DeliveryMode.Persistent,  # on disk, not only in memory
                    content_type="text/plain",
                    message_id=f"{run}-{number}",  # tells a worker that it has done this before
                    timestamp=int(time.time()),
                ),
                mandatory=True,  # without it RabbitMQ confirms even a task that found no queue
            )
        channel.wait_for_confirms()  # until RabbitMQ has said that it has them, tasks can be lost
    return number


def main() -> int:
    """Send what the command line says; return the exit status."""
    words = console.arguments(__doc__, lambda words: words in ([], ["-"]) or words[0] == "--" or words[0][:1] != "-")
    lines = words == ["-"]
    if words[:1] == ["--"]:
        words = words[1:]
    task = os.fsencode(" ".join(words) if any(words) else "Hello World!")  # the very bytes that the shell passed
    try:
        number = send(sys.stdin.buffer if lines else [task])
    except (NotConfirmed, KeyboardInterrupt) as problem:
        console.warn(f"Not sent: {str(problem) or 'interrupted.'}", after_ctrl_c=isinstance(problem, KeyboardInterrupt))
        return 1
    console.say(f" [x] Sent {number} tasks" if lines else f" [x] Sent {console.shown(task)}")
    return 0


if __name__ == "__main__":
    os._exit(main())  # all is printed; what Python tidies up at its end takes longer than the task did
