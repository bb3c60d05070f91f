"""usage: python -m task_queue.dead_letters list|requeue

Look after the tasks that were set aside. A worker puts a task into the queue
task_queue_dead_letters when it has failed too often. `list` shows those tasks,
and keeps them; `requeue` sends them to task_queue again.
"""

import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

import pika
import pika.data

from task_queue import DEAD_LETTERS, QUEUE, QUORUM, console, declaration
from task_queue.address import Refused, Unreachable, connect, lost_rabbitmq
from task_queue.publisher import Channel, NotConfirmed

# After this many deliveries a task is set aside. RabbitMQ 4's own limit is 20: then it drops the task.
MAX_DELIVERIES = 10
# How long to wait before a failed task goes back: the cause may pass, and failing must not keep a CPU busy.
PAUSE_AFTER_FAILURE = 1
# How much of an error (characters) and of the headers (bytes) is kept: together they must fit into a frame of 128 kB.
REASON_LENGTH, HEADERS_SIZE = 500, 100_000


def set_aside(task: bytes, properties: Any, tries: int, why: str) -> None:
    """Put a copy of a task into the queue of dead letters. NotConfirmed if RabbitMQ doesn't confirm that.

    On its own connection: RabbitMQ, short of memory or disk, reads nothing from one that publishes, not even acks.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    notes = {"x-set-aside-because": why, "x-set-aside-after-deliveries": tries, "x-set-aside-at": now}
    with Channel("worker.py") as channel:
        channel.queue_declare(queue=DEAD_LETTERS, durable=True, arguments=QUORUM)
        _send_copy(channel, DEAD_LETTERS, task, properties, notes)


def _send_copy(channel: Channel, queue: str, task: bytes, properties: Any, notes: dict[str, Any]) -> None:
    """Send a task once more, as it was, except for headers that RabbitMQ would act on again."""
    not_kept = ("x-delivery-count", "x-acquired-count", "CC", "BCC")
    kept = {name: value for name, value in (properties.headers or {}).items() if name not in not_kept}
    try:
        size = pika.data.encode_table([], kept)
    except Exception:  # pika can't encode all that it can decode
        size = HEADERS_SIZE
    properties.headers = (kept if size < HEADERS_SIZE else {}) | notes
    properties.expiration = properties.user_id = None
    properties.delivery_mode = pika.DeliveryMode.Persistent.value
    channel.basic_publish(exchange="", routing_key=queue, body=task, properties=properties, mandatory=True)
    channel.wait_for_confirms()


def reason(error: BaseException) -> str:
    """Return what an error says, and where it came from, as one line that is not too long."""
    try:
        text = str(error)
    except Exception as another:  # an error's __str__ may raise anything
        text = f"no text, as str() raises {type(another).__name__}"
    told = console.printable(f"{type(error).__name__}{text and ': '}{text[:REASON_LENGTH]}")[:REASON_LENGTH]
    # The last frame that is not in Python itself, in a package or in this folder.
    frames, paths = traceback.extract_tb(error.__traceback__), sysconfig.get_paths()
    others = (paths["stdlib"], paths["purelib"], paths["platlib"], "<frozen", str(Path(__file__).parent))
    place = ([frame for frame in frames if not frame.filename.startswith(others)] or frames)[-1]
    return f"{told} ({console.printable(Path(place.filename).name)[:100]}:{place.lineno})"


def list_or_requeue(command: str) -> None:
    """Print each dead letter, and send it to the task queue (`requeue`), or back to its own (`list`).

    Not just put back: that may count as a delivery, and RabbitMQ 4 drops what was delivered 20 times.
    """
    queue = QUEUE if command == "requeue" else DEAD_LETTERS
    with lost_rabbitmq(), connect("dead_letters.py") as connection, Channel("dead_letters.py") as sender:
        sender.queue_declare(queue=queue, durable=True, arguments=QUORUM)
        channel, _ = declaration.declare(connection, DEAD_LETTERS)
        count = channel.queue_declare(queue=DEAD_LETTERS, passive=True).method.message_count
        if not count:
            console.say(" [*] No dead letters")
        for _ in range(count):
            method, properties, task = channel.basic_get(DEAD_LETTERS)
            if not method:  # somebody else took it
                return
            note = (properties.headers or {}).get
            when, tries, why = map(note, ("x-set-aside-at", "x-set-aside-after-deliveries", "x-set-aside-because"))
            story = console.printable(f"set aside {when} after {tries} deliveries: {why}")
            _send_copy(sender, queue, task, properties, {})
            channel.basic_ack(method.delivery_tag)
            shown = console.shown(task)
            console.say(f" [x] Requeued {shown}" if queue == QUEUE else f" [x] {shown}, {story}")


def main() -> int:
    """Do what the command line says; return the exit status."""
    (command,) = console.arguments(__doc__, lambda words: words in (["list"], ["requeue"]))
    try:
        list_or_requeue(command)
        return 0
    except (Unreachable, Refused, NotConfirmed, KeyboardInterrupt) as problem:
        console.warn(f"{str(problem) or 'interrupted.'} No task is lost.")
        return 1


if __name__ == "__main__":
    sys.exit(main())
