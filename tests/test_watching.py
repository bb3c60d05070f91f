"""What the chapter on watching (docs/tutorial.md) shows: what RabbitMQ itself tells about tasks and workers."""

import json
import urllib.request

import pytest
from conftest import Broker, Node, Shells
from node import free_port

pytestmark = pytest.mark.xdist_group("watched_node")


@pytest.fixture(scope="module")
def watched_node(tmp_path_factory):
    """A RabbitMQ with the management UI and the endpoint for Prometheus, on free ports of loopback."""
    ports = {"management": free_port(), "prometheus": free_port()}
    node = Node(
        tmp_path_factory.mktemp("watched"),
        config="".join(f"{what}.tcp.port = {port}\n{what}.tcp.ip = 127.0.0.1\n" for what, port in ports.items()),
        plugins=["rabbitmq_management", "rabbitmq_prometheus"],
    )
    node.start()
    yield node, ports
    node.close()


@pytest.fixture
def watched(watched_node):
    """The same with two workers that are busy while three tasks wait."""
    broker = Broker(watched_node[0])
    broker.empty()
    shells = Shells(broker.url)
    workers = [shells.worker(), shells.worker()]
    shells.send(*(f"task {number}{'.' * 60}" for number in range(5)))
    for worker in workers:
        worker.wait_for("Received")
    yield broker, watched_node[1]
    shells.close()


def get(url: str, user: str = "") -> str:
    """Return what `curl -s` would print."""
    handler = urllib.request.HTTPPasswordMgrWithPriorAuth()
    if user:
        handler.add_password(None, url, user, user, is_authenticated=True)
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(handler))
    with opener.open(url, timeout=10) as answer:
        return answer.read().decode()


def test_rabbitmqctl_shows_that_all_workers_are_busy_while_tasks_wait(watched):
    broker, _ = watched
    columns = ("name", "messages_ready", "messages_unacknowledged", "consumers")
    expected = ["task_queue", "3", "2", "2"]
    broker.wait_until(lambda: expected in table(broker.node.ctl("list_queues", *columns)), "3 wait, 2 are worked on")


def table(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_prometheus_is_told_the_same(watched):
    broker, ports = watched
    url = f"http://127.0.0.1:{ports['prometheus']}/metrics"
    expected = {"rabbitmq_queue_messages_ready 3", "rabbitmq_queue_messages_unacked 2", "rabbitmq_queue_consumers 2"}

    broker.wait_until(lambda: expected <= set(get(url).splitlines()), "the metrics are those of the queue")


def test_the_management_ui_answers_and_knows_the_queue_and_its_workers(watched):
    broker, ports = watched
    url = f"http://127.0.0.1:{ports['management']}"
    assert "RabbitMQ Management" in get(url)
    queue = f"{url}/api/queues/%2F/task_queue"

    def told() -> tuple:
        answer = json.loads(get(queue, user="guest"))
        return tuple(answer.get(key) for key in ("messages_ready", "messages_unacknowledged", "consumers"))

    broker.wait_until(lambda: told() == (3, 2, 2), "the management UI has these figures")

    def names() -> list:
        connections = json.loads(get(f"{url}/api/connections", user="guest"))
        return [connection.get("client_properties", {}).get("connection_name") for connection in connections]

    broker.wait_until(lambda: names().count("worker.py") == 2, "the management UI knows both workers")
