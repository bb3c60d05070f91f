"""Declares the queue: a quorum queue, or the classic one that an older tutorial left. Waits until it is safe to use."""

from typing import Any

from pika import BlockingConnection
from pika.exceptions import ChannelClosedByBroker

from task_queue import QUORUM
from task_queue.address import Refused

# RabbitMQ writes the existence of a new queue to disk up to a second after it has said that the queue is declared.
# If RabbitMQ is killed before then, the queue is gone, with the tasks in it. So nobody uses a queue younger than this.
SETTLE_SECONDS = 2


def declare(connection: BlockingConnection, queue: str) -> tuple[Any, bool]:
    """Declare a durable queue. Return a channel when it is fit for use, and whether it counts deliveries.

    Refused if the queue exists with other settings. pika's other errors are passed on.
    """
    marker = f"{queue}_is_new"  # a queue that RabbitMQ deletes by itself, there while `queue` is too young for use
    found = _declare(connection, queue, passive=True)
    if not found:
        _declare(connection, marker, durable=True, arguments={"x-expires": SETTLE_SECONDS * 1000})
    used = found and (found.message_count or found.consumer_count)  # then it is old enough: no need to ask
    young = not found or (not used and _declare(connection, marker, passive=True))
    for arguments in (QUORUM, {}):  # a quorum queue, or if it is there, a classic one
        channel = connection.channel()
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
            if young:
                connection.sleep(SETTLE_SECONDS)
            return channel, bool(arguments)  # only a quorum queue does
        except ChannelClosedByBroker as error:
            if error.reply_code != 406:  # PRECONDITION_FAILED: it exists with other settings
                raise
    remedy = f"Use another virtual host, or delete it when it is empty: rabbitmqctl delete_queue {queue} --if-empty"
    raise Refused(f"the queue {queue!r} exists with other settings than ours (durable, quorum or classic). {remedy}")


def _declare(connection: BlockingConnection, queue: str, **how: Any) -> Any:
    """Declare a queue, or, if passive, only look for it. Return RabbitMQ's answer with its counts; None on a 404."""
    channel = connection.channel()  # not in a `with` block: that would wait for RabbitMQ even on Ctrl+C
    try:
        found = channel.queue_declare(queue, **how).method
    except ChannelClosedByBroker as error:
        if error.reply_code != 404:
            raise
        return None
    channel.close()
    return found
