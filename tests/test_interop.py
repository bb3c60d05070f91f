"""Workers and senders of mixed kinds on one queue: what declares it as RabbitMQ's tutorials do works with ours."""

import re
import shlex
import shutil
import subprocess
import textwrap

import pytest
from conftest import DONE, ROOT
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


def test_a_classic_declaration_fits_where_quorum_queues_are_the_default(broker, shells, tmp_path):
    """The commands are those of docs/reference.md; on RabbitMQ 4 for another virtual host, as tests share "/"."""
    theirs = Tutorial(tmp_path, {})
    refused = shells.start(str(theirs.worker))  # in "/" the queue is there as a quorum queue
    assert refused.ends() == 1
    refused.wait_for("406")

    page = (ROOT / "docs" / "reference.md").read_text()
    update, add, allow = re.findall(r"^    rabbitmqctl (.*(?: / | tasks ).*)$", page, re.MULTILINE)
    if broker.node.ctl("version").startswith("3."):
        broker.node.ctl(*shlex.split(add))
    else:
        broker.node.ctl("add_vhost", "tasks")
        broker.node.ctl(*shlex.split(update.replace(" / ", " tasks ")))
    broker.node.ctl(*shlex.split(allow))
    url = broker.url.replace("%2F", "tasks")
    for sends, works in (("new_task.py", str(theirs.worker)), (str(theirs.new_task), "worker.py")):
        assert shells.start(sends, "Hello", url=url).ends() == 0
        worker = shells.start(works, url=url)
        worker.wait_for("[x] Received")
        worker.kill()
    broker.node.ctl("delete_vhost", "tasks")


# The tutorial in JavaScript: its two scripts, with the package amqplib.
JAVASCRIPT = """
    const connecting = require("amqplib").connect(process.env.AMQP_URL), words = process.argv.slice(2).join(" ");
    (async () => {{
        const connection = await connecting, channel = await connection.createChannel(), queue = "task_queue";
        await channel.assertQueue(queue, {{ durable: true, arguments: {{ "x-queue-type": "quorum" }} }});
        {rest}
    }})();
"""
JAVASCRIPT_NEW_TASK = """
        channel.sendToQueue(queue, Buffer.from(words), { persistent: true });
        await channel.close(); await connection.close();
"""
JAVASCRIPT_WORKER = """
        await channel.prefetch(1);
        await channel.consume(queue, (message) => {
            console.log(" [x] Received %s", message.content.toString());
            channel.ack(message);
        });
        console.log(" [*] Waiting");
"""


@pytest.fixture(scope="session")
def javascript(tmp_path_factory):
    """The folder with the pair in JavaScript."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("the JavaScript pair is left out: no node and npm here")
    folder = tmp_path_factory.mktemp("javascript")
    for name, rest in (("new_task.js", JAVASCRIPT_NEW_TASK), ("worker.js", JAVASCRIPT_WORKER)):
        (folder / name).write_text(JAVASCRIPT.format(rest=rest))
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "amqplib@2"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_pair_in_javascript_works_with_ours_whoever_declares_first(first, javascript, broker, shells):
    with broker.connect() as connection:
        connection.channel().queue_delete(QUEUE)
    if first == "ours":
        shells.worker().kill()

    sender = shells.shell(f"exec node {javascript}/new_task.js From JavaScript.")
    assert sender.ends() == 0, str(sender)
    ours = shells.worker()
    ours.wait_for("[x] Done")
    assert ours.output()[1:] == [" [x] Received 'From JavaScript.'", " [x] Done"]
    ours.kill()

    theirs = shells.shell(f"exec node {javascript}/worker.js")
    theirs.wait_for("[*] Waiting")
    shells.send("To JavaScript.")
    theirs.wait_for("[x] Received To JavaScript.")
