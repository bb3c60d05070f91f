"""Look after the tasks that were set aside: `dead_letters.py list` or `dead_letters.py requeue`.

A worker sets a task aside in the queue task_queue_dead_letters when it has failed too often. Listing leaves them
where they are. Requeueing sends them to task_queue again, for instance when what made them fail has been mended.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

from task_queue import (
    DEAD_LETTERS,
    QUEUE,
    Refused,
    Unreachable,
    describe,
    first_that_answers,
    nodes,
    printable,
    shown,
    tidy_output,
    warn,
)

# How often a dead letter may be looked at before a copy takes its place; RabbitMQ's own limit is 20.
MAX_DELIVERIES = 10


def dead_letters(channel):
    """Yield (delivery tag, properties, task) for each dead letter that is there now, the oldest first."""
    try:
        waiting = channel.queue_declare(queue=DEAD_LETTERS, passive=True).method.message_count
    except ChannelClosedByBroker as error:
        if error.reply_code != 404:
            raise
        waiting = 0  # no task was ever set aside
    if not waiting:
        print(" [*] No dead letters")
    for _ in range(waiting):
        method, properties, task = channel.basic_get(DEAD_LETTERS)
        if method is None:  # somebody else took it
            return
        yield method.delivery_tag, properties, task


def show(channel) -> None:
    """Print a line for each dead letter, and put all of them back."""
    channel.confirm_delivery()
    seen = []
    try:
        for letter in dead_letters(channel):
            seen.append(letter)
            _, properties, task = letter
            headers = properties.headers or {}
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(headers.get("x-set-aside-at", 0)))
            deliveries = headers.get("x-set-aside-after-deliveries")
            why = printable(str(headers.get("x-set-aside-because")))
            print(f" [x] {shown(task)}, set aside {when} after {deliveries} deliveries: {why}")
    finally:
        for letter in seen:
            put_back(channel, *letter)


def put_back(channel, delivery_tag, properties, task) -> None:
    """Put a dead letter back into its queue, where RabbitMQ would drop it when that has been done 20 times."""
    # A nack doesn't count on RabbitMQ 4.3. Where it does, a copy that takes the letter's place starts from zero.
    if (properties.headers or {}).get("x-delivery-count", 0) < MAX_DELIVERIES:
        channel.basic_nack(delivery_tag, requeue=True)
    else:
        send(channel, DEAD_LETTERS, properties, task)
        channel.basic_ack(delivery_tag)


def requeue(channel) -> None:
    """Send each dead letter to the task queue. RabbitMQ has the copy before it forgets the original."""
    channel.confirm_delivery()
    for delivery_tag, properties, task in dead_letters(channel):
        headers = properties.headers or {}
        properties.headers = {name: value for name, value in headers.items() if not name.startswith("x-set-aside-")}
        send(channel, QUEUE, properties, task)
        channel.basic_ack(delivery_tag)
        print(f" [x] Requeued {shown(task)}")


def send(channel, queue: str, properties, task: bytes) -> None:
    """Publish a task, and return when RabbitMQ has confirmed it."""
    (properties.headers or {}).pop("x-delivery-count", None)  # it is of the queue that the task comes from
    channel.basic_publish(exchange="", routing_key=queue, body=task, properties=properties, mandatory=True)


def main() -> int:
    """Do what the command line says; return the exit status."""
    tidy_output()
    commands = {"list": show, "requeue": requeue}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print("usage: dead_letters.py list|requeue", file=sys.stderr)
        return 2
    try:
        with first_that_answers(nodes("dead_letters.py"), pika.BlockingConnection) as connection:
            commands[sys.argv[1]](connection.channel())
        return 0
    except ChannelClosedByBroker as error:
        warn(f"RabbitMQ refuses: {describe(error)}")
    except AMQPError as error:
        warn(f"Lost RabbitMQ ({describe(error)}). No task is lost; try again.")
    except (Unreachable, Refused) as problem:
        warn(str(problem))
    except KeyboardInterrupt:
        warn("Interrupted. No task is lost.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
