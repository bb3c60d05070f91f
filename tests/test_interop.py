"""Workers and senders of mixed kinds on one queue: what declares it as RabbitMQ's tutorials do works with ours."""

import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import DONE, ROOT
from processes import wait_until

from task_queue import QUEUE

# The tutorial's two scripts as one: with words it is new_task, without any it is the worker. Older editions leave out
# the arguments, which makes a classic queue.
PYTHON = """
    import os, sys, pika
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    channel = connection.channel()
    channel.queue_declare(queue="task_queue", durable=True, arguments=ARGUMENTS)
    if message := " ".join(sys.argv[1:]):
        channel.basic_publish("", "task_queue", message, pika.BasicProperties(delivery_mode=2))
        sys.exit(connection.close())

    def callback(ch, method, properties, body):
        print(f" [x] Received {body.decode()}", flush=True)
        ch.basic_ack(delivery_tag=method.delivery_tag)

    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue="task_queue", on_message_callback=callback)
    print(" [*] Waiting", flush=True)
    channel.start_consuming()
"""

# The same in JavaScript, with the package amqplib.
JAVASCRIPT = """
    const connecting = require("amqplib").connect(process.env.AMQP_URL), words = process.argv.slice(2).join(" ");
    (async () => {
        const connection = await connecting, channel = await connection.createChannel(), queue = "task_queue";
        await channel.assertQueue(queue, { durable: true, arguments: { "x-queue-type": "quorum" } });
        if (words) {
            channel.sendToQueue(queue, Buffer.from(words), { persistent: true });
            await channel.close();
            return connection.close();
        }
        await channel.prefetch(1);
        await channel.consume(queue, (message) => {
            console.log(" [x] Received %s", message.content.toString());
            channel.ack(message);
        });
        console.log(" [*] Waiting");
    })();
"""


def in_python(folder, arguments: dict) -> str:
    """Write the script in Python, for the kind of queue that these arguments make, and return its path."""
    script = folder / "theirs.py"
    script.write_text(textwrap.dedent(PYTHON).replace("ARGUMENTS", repr(arguments)))
    return str(script)


@pytest.fixture(scope="session")
def in_javascript(tmp_path_factory):
    """The path of the script in JavaScript."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("the JavaScript pair is left out: no node and npm here")
    folder = tmp_path_factory.mktemp("javascript")
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "amqplib@2"], cwd=folder, check=True)
    (folder / "theirs.js").write_text(JAVASCRIPT)
    return str(folder / "theirs.js")


@pytest.fixture(params=["quorum, ours", "quorum, theirs", "classic, theirs", "javascript, ours", "javascript, theirs"])
def theirs(request, broker, shells, tmp_path):
    """A function that starts a script of the tutorial. The queue is there: ours or theirs have declared it."""
    kind, first = request.param.split(", ")
    if kind == "javascript":
        command = "node", request.getfixturevalue("in_javascript")
    else:
        command = sys.executable, in_python(tmp_path, {"x-queue-type": "quorum"} if kind == "quorum" else {})

    def start(*words: str):
        return shells.shell(shlex.join(["exec", *command, *words]))

    if first == "theirs":
        broker.delete_queue()
        declaring = start()
        declaring.wait_for("[*] Waiting")
        declaring.kill()
    declared = f"{QUEUE}\t{'classic' if kind == 'classic' else 'quorum'}"
    assert declared in broker.node.ctl("list_queues", "name", "type").splitlines()
    return start


def test_a_task_from_another_sender_is_done_by_our_worker(theirs, broker, shells):
    worker = shells.worker()
    sender = theirs("First", "message.")
    assert sender.ends() == 0, str(sender)
    worker.wait_for(DONE)
    assert worker.output()[1:] == [" [x] Received 'First message.'", DONE]
    if shutil.which("amqp-publish"):  # of the package amqp-tools: how shell scripts send
        command = f"amqp-publish --url {broker.url} --persistent --routing-key {QUEUE} --body Second."
        assert shells.shell(command).ends() == 0
        worker.wait_for(DONE, times=2)
        assert worker.output()[3] == " [x] Received 'Second.'"
    assert worker.output("stderr") == []


def test_our_worker_and_theirs_share_our_tasks(theirs, shells):
    our_worker, their_worker = shells.worker(), theirs()
    their_worker.wait_for("[*] Waiting")
    shells.send("one.", "two.", "three.", "four.")
    our_worker.wait_for("[x] Received")
    their_worker.wait_for("[x] Received")
    wait_until(lambda: f"{our_worker}{their_worker}".count("[x] Received") == 4, "all four are taken")
    our_worker.wait_for(DONE, times=f"{our_worker}".count("[x] Received"))


def test_a_classic_declaration_fits_where_quorum_queues_are_the_default(broker, shells, tmp_path):
    """The commands are those of docs/reference.md; on RabbitMQ 4 for another virtual host, as tests share "/"."""
    theirs = in_python(tmp_path, {})
    refused = shells.start(theirs)  # in "/" the queue is there as a quorum queue
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
    for sender, receiver in (("new_task.py", theirs), (theirs, "worker.py")):
        assert shells.start(sender, "Hello", url=url).ends() == 0
        worker = shells.start(receiver, url=url)
        worker.wait_for("[x] Received")
        worker.kill()
    broker.node.ctl("delete_vhost", "tasks")
