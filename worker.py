#!/usr/bin/env python3
"""Do the tasks that new_task.py sends, one at a time.

    python worker.py                 run until Ctrl+C; start as many as you like, each in its own shell
    python worker.py --graceful      on SIGTERM finish the task in hand first (Ctrl+C still hands it back at once)
    AMQP_URL=amqp://USER:PASSWORD@HOST/ python worker.py        use another RabbitMQ than the one on localhost

A task is acknowledged after it is done. If this worker dies before that, RabbitMQ gives the task to another one:
no task is lost, but a task may be done twice.
"""

import contextlib
import os
import sys
import time
import traceback

try:
    import pika
except ModuleNotFoundError:
    sys.exit(" [!] pika is not installed. Install it with: python -m pip install -r requirements.txt")
except KeyboardInterrupt:  # to import it takes a moment
    sys.exit(0)

from keep_working import LOST, Stop, arguments_for, keep_working, publish_copy
from task_queue import DEAD_LETTERS, QUEUE, Refused, Unreachable, describe, printable, shown, tidy_output, warn

# After so many deliveries a task is set aside. RabbitMQ's own limit is 20: there it would drop the task.
MAX_DELIVERIES = 10

# How long to wait before a failed task goes back: what made it fail may pass, and failing must not keep a CPU busy.
PAUSE_AFTER_FAILURE = 1

# How long to wait before another attempt to set a task aside, when RabbitMQ has no room for it.
PAUSE_BEFORE_SET_ASIDE = 10


def work(task: bytes) -> None:
    """Do one task: sleep a second for each dot. Put your own work here.

    It may block for as long as it likes, and may raise: then the task is tried again, up to MAX_DELIVERIES times.
    It may be given the same task twice, after a fault: doing a task twice must be as good as doing it once.
    """
    for _ in range(task.count(b".")):
        time.sleep(1)


def do_tasks(channel, keep_alive) -> None:
    """Take tasks from the queue and do them, for as long as the channel lasts."""
    channel.queue_declare(queue=QUEUE, durable=True, arguments=arguments_for(QUEUE, channel.connection))
    # Take one task at a time: a worker that is busy leaves the other tasks to those that are free.
    channel.basic_qos(prefetch_count=1)
    print(" [*] Waiting for messages. To exit press CTRL+C")
    for method, properties, task in keep_alive.until_stopped(channel.consume(QUEUE)):
        tries = earlier_deliveries(properties)
        if tries >= MAX_DELIVERIES:
            set_aside(channel, method, properties, task, tries, "its workers died or were stopped", keep_alive)
            continue
        print(f" [x] Received {shown(task)}" + (" (redelivered)" if method.redelivered else ""))
        try:
            with keep_alive:  # RabbitMQ must hear from us meanwhile, or it takes us for dead
                work(task)
        except Stop:
            raise
        except BaseException as error:  # work() may raise anything
            failed(channel, method, properties, task, error, keep_alive)
        else:
            print(" [x] Done")
            # Not before the work is done: until RabbitMQ has this ack, it keeps the task for another worker.
            channel.basic_ack(method.delivery_tag)


def failed(channel, method, properties, task, error, keep_alive) -> None:
    """Give back a task whose work raised, for another try; or set it aside when it has had its tries."""
    text = traceback.format_exception_only(error)[-1].strip()
    why = f"{text[:500]} ({where(error)})"  # not too long, as it must fit into a header
    tries = earlier_deliveries(properties) + 1
    if tries >= MAX_DELIVERIES:
        set_aside(channel, method, properties, task, tries, why, keep_alive)
        return
    warn(f"Failed {shown(task)}: {why}. It will be tried again.")
    with keep_alive:
        time.sleep(PAUSE_AFTER_FAILURE)
    # A reject, not a nack: every RabbitMQ counts it as a delivery that failed.
    channel.basic_reject(method.delivery_tag, requeue=True)


def where(error: BaseException) -> str:
    """Return the file and line that raised an error: one line must do where Python would print a traceback."""
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    path = place.tb_frame.f_code.co_filename
    with contextlib.suppress(OSError):  # the current folder may be gone
        path = min(path, os.path.relpath(path), key=len)
    return f"{path}:{place.tb_lineno}"


def earlier_deliveries(properties) -> int:
    """Return how often a task was delivered in vain. A quorum queue counts that; a classic one doesn't, and it is 0."""
    count = (properties.headers or {}).get("x-delivery-count")
    return count if isinstance(count, int) else 0


def set_aside(channel, method, properties, task, tries: int, why: str, keep_alive) -> None:
    """Move a task that can't be done to the queue of dead letters, where it harms nobody and is not lost."""
    # What RabbitMQ would act on once more, or not accept from us, must not be in the copy.
    kept = {k: v for k, v in (properties.headers or {}).items() if k not in ("x-delivery-count", "CC", "BCC")}
    properties.expiration = properties.user_id = None
    properties.headers = kept | {
        "x-set-aside-because": printable(why),
        "x-set-aside-after-deliveries": tries,
        "x-set-aside-at": int(time.time()),
    }
    properties.delivery_mode = pika.DeliveryMode.Persistent.value
    while not keep_alive.lost:
        try:
            with keep_alive:
                publish_copy(DEAD_LETTERS, task, properties)
        except (Refused, Unreachable, *LOST) as problem:
            # Not given back: RabbitMQ would drop it after 20 deliveries.
            warn(f"Can't set aside {shown(task)}: {describe(problem)} Keeping it, and trying again.")
            with keep_alive:
                time.sleep(PAUSE_BEFORE_SET_ASIDE)
        else:
            # Only now that RabbitMQ has confirmed the copy: a crash in between leaves two, never none.
            channel.basic_ack(method.delivery_tag)
            warn(f"Set aside {shown(task)} in {DEAD_LETTERS} after {tries} deliveries: {why}")
            return


def main() -> int:
    """Run the worker; return its exit status."""
    tidy_output()
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if arguments not in ([], ["--graceful"]):
        print("usage: python worker.py [--graceful]   (python worker.py --help tells more)", file=sys.stderr)
        return 2
    try:
        keep_working(do_tasks, graceful=bool(arguments))
    except Refused as problem:
        warn(str(problem))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
