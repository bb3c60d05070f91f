"""What the benchmarks measure the two scripts against: the work queue tutorial's steps, with nothing around them.

    AMQP_URL=... python tools/baselines.py STEPS [WORD ...]

They are written for this comparison. They do what a reader of the tutorial would have after half an hour: no confirms
(except in one, which waits for each), no reconnecting, no heartbeats during the work. They import nothing but pika, so
that a run that is mostly start-up is compared fairly.
"""

import os
import sys
import time

import pika

QUEUE = "task_queue"


def connect():
    """Return a connection and a channel. The queue is there already."""
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    return connection, connection.channel()


def publish(channel, task) -> None:
    """Publish one persistent task."""
    properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    channel.basic_publish(exchange="", routing_key=QUEUE, body=task, properties=properties)


def send_one(words) -> None:
    """Declare the queue, publish one task without waiting for a confirm, close: the tutorial's sender."""
    connection, channel = connect()
    channel.queue_declare(queue=QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    message = " ".join(words)
    publish(channel, message)
    print(f" [x] Sent {message}")
    connection.close()


def send_lines(confirm: bool) -> None:
    """Publish each line of the standard input: the tutorial's sender in a loop, with or without a confirm for each."""
    connection, channel = connect()
    if confirm:
        channel.confirm_delivery()  # from here on basic_publish() returns when RabbitMQ has confirmed the task
    for line in sys.stdin.buffer:
        publish(channel, line.rstrip(b"\n"))
    connection.close()


def work() -> None:
    """Do tasks until killed: the tutorial's worker."""
    _, channel = connect()
    # Line by line, as on a terminal and as ours does it: otherwise a file would make printing cheaper for this one.
    sys.stdout.reconfigure(line_buffering=True)
    channel.queue_declare(queue=QUEUE, passive=True)
    print(" [*] Waiting for messages. To exit press CTRL+C")

    def callback(ch, method, _properties, body):
        print(f" [x] Received {body.decode()!r}")
        for _ in range(body.count(b".")):  # not sleep(0), which would be the most of an empty task
            time.sleep(1)
        print(" [x] Done")
        ch.basic_ack(delivery_tag=method.delivery_tag)

    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue=QUEUE, on_message_callback=callback)
    channel.start_consuming()


if __name__ == "__main__":
    steps, *words = sys.argv[1:]
    if steps == "one":
        send_one(words)
    elif steps == "work":
        work()
    else:
        send_lines(confirm={"unconfirmed": False, "confirmed": True}[steps])
