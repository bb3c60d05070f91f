"""A queue that RabbitMQ can't bring back: nobody spins, nothing is reported sent, and one line tells the cure."""

import time

from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker

from task_queue import QUEUE, QUORUM


def is_usable(broker) -> bool:
    with broker.connect() as connection:
        try:
            connection.channel().basic_get(QUEUE)
        except (ChannelClosedByBroker, ConnectionClosedByBroker):
            return False
    return True


def test_a_queue_that_rabbitmq_cannot_bring_back_is_told_once(mortal, mortal_shells):
    """RabbitMQ 3.10 loses a quorum queue that was deleted just before a kill, and declared again. 4.3 doesn't."""
    with mortal.connect() as connection:
        connection.channel().queue_delete(QUEUE)
    mortal.node.kill()
    mortal.node.start()
    with mortal.connect() as connection:
        connection.channel().queue_declare(QUEUE, durable=True, arguments=QUORUM)
        connection.sleep(2)  # so that the queue itself is on disk
    mortal.node.kill()
    mortal.node.start()
    worker = mortal_shells.start("worker.py")
    worker.wait_for("[*] Waiting")
    if mortal.node.ctl("version").startswith("3."):
        assert not is_usable(mortal)
        worker.wait_for("[*] Waiting", times=6)
        (line,) = worker.output("stderr")
        assert line.startswith(
            " [!] RabbitMQ can't serve the queue 'task_queue' (INTERNAL_ERROR (541)): its log tells more."
        )
        waits = [line.at for line in worker.lines if "[*] Waiting" in line.text]
        assert waits[5] - waits[4] > 1  # it was 0.4 s at first
        mortal.node.ctl("delete_queue", QUEUE)  # what the line advises
    began = time.monotonic()
    assert mortal_shells.new_task("task").output() == [" [x] Sent 'task'"]
    worker.wait_for("[x] Done")
    assert time.monotonic() - began < 15
