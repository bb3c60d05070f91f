"""Workers and senders of mixed kinds on one queue: whoever declares it as RabbitMQ's tutorials do works with ours."""

import shutil
import subprocess
import textwrap

import pytest
from conftest import DONE
from processes import wait_until

from task_queue import QUEUE

# What the tutorials have in common. The older ones leave out the arguments, which makes a classic queue.
TUTORIAL = """
    import os, sys, pika
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    channel = connection.channel()
    channel.queue_declare(queue="task_queue", durable=True, arguments={arguments!r})
"""

NEW_TASK = """
    message = " ".join(sys.argv[1:])
    channel.basic_publish(
        exchange="", routing_key="task_queue", body=message, properties=pika.BasicProperties(delivery_mode=2)
    )
    print(f" [x] Sent {message}")
    connection.close()
"""

WORKER = """
    def callback(ch, method, properties, body):
        print(f" [x] Received {body.decode()}", flush=True)
        ch.basic_ack(delivery_tag=method.delivery_tag)

    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue="task_queue", on_message_callback=callback)
    print(" [*] Waiting", flush=True)
    channel.start_consuming()
"""


class Tutorial:
    """The tutorial's two scripts, on the kind of queue that this edition of it declares."""

    def __init__(self, folder, arguments: dict):
        self.new_task, self.worker = folder / "their_new_task.py", folder / "their_worker.py"
        for path, rest in ((self.new_task, NEW_TASK), (self.worker, WORKER)):
            path.write_text(textwrap.dedent(TUTORIAL).format(arguments=arguments) + textwrap.dedent(rest))


@pytest.fixture(params=["quorum", "classic"])
def tutorial(request, broker, tmp_path):
    """The tutorial, with its queue in place: the current edition, and an older one that was here before us."""
    if request.param == "quorum":
        return Tutorial(tmp_path, {"x-queue-type": "quorum"})
    broker.declare_anew(durable=True)
    assert f"{QUEUE}\tclassic" in broker.node.ctl("list_queues", "name", "type").splitlines()
    return Tutorial(tmp_path, {})


def test_a_task_from_another_sender_is_done_by_our_worker(tutorial, broker, shells):
    worker = shells.worker()
    sender = shells.start(str(tutorial.new_task), "First", "message.")
    assert sender.ends() == 0, str(sender)
    worker.wait_for(DONE)
    assert worker.output()[1:] == [" [x] Received 'First message.'", DONE]
    if shutil.which("amqp-publish"):  # of the package amqp-tools: how shell scripts send
        command = ["amqp-publish", "--url", broker.url, "--persistent", "--routing-key", QUEUE, "--body", "Second."]
        subprocess.run(command, check=True, timeout=30)
        worker.wait_for(DONE, times=2)
        assert worker.output()[3] == " [x] Received 'Second.'"
    assert worker.output("stderr") == []


def test_our_worker_and_the_tutorials_share_our_tasks(tutorial, broker, shells):
    ours, theirs = shells.worker(), shells.start(str(tutorial.worker))
    theirs.wait_for("[*] Waiting")
    shells.send("one.", "two.", "three.", "four.")
    ours.wait_for("[x] Received")
    theirs.wait_for("[x] Received")
    wait_until(lambda: f"{ours}{theirs}".count("[x] Received") == 4, "all four are taken")
    ours.wait_for(DONE, times=f"{ours}".count("[x] Received"))
