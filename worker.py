#!/usr/bin/env python3
"""usage: python worker.py   or   python worker.py --graceful

Do the tasks that new_task.py sends, one at a time, until Ctrl+C. Start as many
as you like, each in its own shell. A task is acknowledged after it is done: if
this worker dies before that, RabbitMQ gives the task to another one. With
--graceful, SIGTERM lets the worker finish its task first. RabbitMQ is on
localhost, unless AMQP_URL=amqp://USER:PASSWORD@HOST/ names another one.
"""

import sys
import time

from task_queue import QUEUE, QUORUM
from task_queue.console import say, shown  # say(): a print() that neither a closed pipe nor a full disk stops
from task_queue.consumer import TaskFailed, keep_working


def work(task: bytes) -> None:
    """Do one task: sleep a second for each dot. Put your own work here.

    It may block as long as it likes. If it raises (sys.exit() counts, too), the task is tried again, ten times in all.
    After a fault the same task may come again: doing it twice must have the same effect as doing it once.
    """
    for _ in range(task.count(b".")):
        time.sleep(1)


def do_tasks(channel) -> None:
    """Do tasks from the queue until the connection is lost. Then this is called again, on a new connection."""
    channel.queue_declare(queue=QUEUE, durable=True, arguments=QUORUM)
    # One task at a time: while this worker is busy, the next tasks go to workers that are free.
    channel.basic_qos(prefetch_count=1)
    say(" [*] Waiting for messages. To exit press CTRL+C")
    for method, properties, task in channel.consume(QUEUE):
        say(f" [x] Received {shown(task)}" + (" (redelivered)" if method.redelivered else ""))
        try:
            with channel.heartbeats():  # keep the connection alive, turn errors into TaskFailed
                work(task)
        except TaskFailed as failure:
            channel.requeue_or_set_aside(method, properties, task, failure)
        else:
            say(" [x] Done")
            # Only now that the work is done: until then RabbitMQ keeps the task for another worker.
            channel.basic_ack(method.delivery_tag)


def main() -> int:
    """Run the worker; return its exit status."""
    return keep_working(do_tasks, __doc__)


if __name__ == "__main__":
    sys.exit(main())
