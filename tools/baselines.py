"""The tutorial's steps with nothing around them, for bench.py to compare the two scripts with.

    AMQP_URL=... python tools/baselines.py work | unconfirmed < tasks | confirmed < tasks

No reconnecting, no heartbeats during the work, and no confirms (except in `confirmed`, which waits for each). They
import nothing but pika, so that a run that is mostly start-up is compared fairly.
"""

import os
import sys
import time

import pika


def callback(ch, method, _properties, body) -> None:
    """Do a task, as the tutorial's worker does."""
    print(f" [x] Received {body.decode()!r}")
    for _ in range(body.count(b".")):  # not sleep(0), which would be the most of an empty task
        time.sleep(1)
    print(" [x] Done")
    ch.basic_ack(delivery_tag=method.delivery_tag)


connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue="task_queue", durable=True, arguments={"x-queue-type": "quorum"})
if sys.argv[1] == "work":
    sys.stdout.reconfigure(line_buffering=True)  # as on a terminal, and as ours does
    print(" [*] Waiting for messages. To exit press CTRL+C")
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue="task_queue", on_message_callback=callback)
    channel.start_consuming()
if sys.argv[1] == "confirmed":
    channel.confirm_delivery()  # from here on basic_publish() returns when RabbitMQ has confirmed the task
for line in sys.stdin.buffer:
    properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    channel.basic_publish(exchange="", routing_key="task_queue", body=line.rstrip(b"\n"), properties=properties)
connection.close()
