"""What `make bench` compares the two scripts with: the tutorial's steps, with nothing around them.

    AMQP_URL=... python tools/baselines.py one WORD | unconfirmed | confirmed | work

No reconnecting, no heartbeats during the work, and no confirms (except in `confirmed`, which waits for each). They
import nothing but pika, so that a run that is mostly start-up is compared fairly.
"""

import os
import sys
import time

import pika

QUEUE = "task_queue"


def send(channel, task) -> None:
    """Publish one persistent task."""
    properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    channel.basic_publish(exchange="", routing_key=QUEUE, body=task, properties=properties)


def work(channel) -> None:
    """Do tasks until killed: the tutorial's worker. It prints line by line, as on a terminal and as ours does."""
    sys.stdout.reconfigure(line_buffering=True)
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
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    channel = connection.channel()
    if steps == "confirmed":
        channel.confirm_delivery()  # from here on basic_publish() returns when RabbitMQ has confirmed the task
    if steps == "work":
        work(channel)
    elif steps == "one":
        channel.queue_declare(queue=QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        send(channel, " ".join(words))
        print(f" [x] Sent {' '.join(words)}")
    else:
        for line in sys.stdin.buffer:
            send(channel, line.rstrip(b"\n"))
    connection.close()
